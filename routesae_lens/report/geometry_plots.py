"""The figures of feature geometry: the map of a neighbourhood and the distribution of best matches.

``map_svg`` and ``matches_svg`` are drawn for the page and take its colours; ``save_figure`` writes a file that
stands alone. Dictionaries differ in marker as well as in colour.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from routesae_lens.analysis.feature_map import FeatureMap, MapPoint
from routesae_lens.analysis.match_distribution import MatchDistribution
from routesae_lens.report.plots import INK, LINE, LINES, MARKERS, MUTED, SURFACE, as_svg, empty_figure
from routesae_lens.report.visible import visible

MAP_SIZE, MATCHES_SIZE = (5.2, 4.2), (5.2, 3.6)
"""Width and height in inches."""
LONGEST = 40
"""Characters of a dictionary's name in a legend."""


@dataclass(frozen=True)
class Colours:
    ink: str
    muted: str
    line: str
    surface: str
    lines: tuple[str, ...]


# Of page.css; the page itself gets stand-ins, so that one drawing serves both.
LIGHT = Colours(
    "#1b1f24", "#545b64", "#d3d8de", "#ffffff",
    ("#0b5cad", "#b84a00", "#00735a", "#8a3b8c", "#6a6200", "#5a6068"),
)  # fmt: skip
DARK = Colours(
    "#e8eaed", "#aab2bc", "#3a424c", "#14171b",
    ("#7cb7ff", "#ff9e62", "#52d3ad", "#e09fe0", "#d3c84e", "#bac1c9"),
)  # fmt: skip
STAND_INS = Colours(INK, MUTED, LINE, SURFACE, LINES)


def map_svg(found: FeatureMap, name: str) -> Markup:
    """The map of a feature for the page (figure 7); ``name`` is the drawing's own among those of the page."""
    figure, axes = empty_figure(*MAP_SIZE)
    _draw_map(figure, axes, found, STAND_INS)
    text = f"Map of {len(found.points)} latents around latent {found.latent} of {_shown(found.dictionary)}"
    return as_svg(figure, name, text)


def matches_svg(found: MatchDistribution, name: str) -> Markup:
    """The cumulative distribution of best matches for the page (figure 8)."""
    figure, axes = empty_figure(*MATCHES_SIZE)
    _draw_matches(figure, axes, found, STAND_INS)
    first, second = map(_shown, found.names)
    text = f"Share of the latents of {first} whose best match in {second} is at most this similar"
    return as_svg(figure, name, text)


def save_figure(found: FeatureMap | MatchDistribution, path: str | Path, *, dark: bool = False) -> Path:
    """Write one of the two figures as a file, whole or not at all; its ending says in which format.

    Raises:
        ValueError: an ending that is neither .svg, .png nor .pdf, or no such folder.
    """
    path = figure_path(path)
    colours = DARK if dark else LIGHT
    figure, axes = empty_figure(*(MAP_SIZE if isinstance(found, FeatureMap) else MATCHES_SIZE))
    if isinstance(found, FeatureMap):
        _draw_map(figure, axes, found, colours)
    else:
        _draw_matches(figure, axes, found, colours)
    figure.patch.set_facecolor(colours.surface)
    axes.patch.set_facecolor(colours.surface)
    return write_figure(figure, path)


def figure_path(path: str | Path) -> Path:
    """``path``, if a figure can be written there.

    Raises:
        ValueError: an ending that is neither .svg, .png nor .pdf, or no such folder.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"a figure is written as .svg, .png or .pdf, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to")
    return path


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all, the same bytes for the same figure; names in it may hold dollar signs."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with rc_context({"svg.hashsalt": path.stem, "text.parse_math": False}):
            when = {"CreationDate": None} if path.suffix == ".pdf" else {}
            metadata = {"Date": None} if path.suffix == ".svg" else when
            figure.savefig(partial, format=path.suffix[1:], dpi=150, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _draw_map(figure: Figure, axes: Axes, found: FeatureMap, colours: Colours) -> None:
    _recolour(axes, colours)
    for i, (dictionary, points) in enumerate(_by_dictionary(found)):
        axes.plot(
            [point.x for point in points], [point.y for point in points],
            MARKERS[i % len(MARKERS)], color=colours.lines[i % len(colours.lines)], ms=6, alpha=0.85,
            mec=colours.surface, mew=0.6, label=_shown(dictionary), gid=f"map-{i}",
        )  # fmt: skip
    chosen = found.points[0]
    axes.plot(
        [chosen.x], [chosen.y], "o", ms=12, mfc="none", mec=colours.ink, mew=1.6,
        label=f"latent {found.latent} of {_shown(found.dictionary)}", gid="map-chosen",
    )  # fmt: skip
    axes.spines[:].set(visible=True, color=colours.line)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    axes.set_title(
        f"Latents near latent {found.latent} (UMAP of decoder rows)", color=colours.ink, parse_math=False
    )
    _legend(figure, colours, 2)


def _draw_matches(figure: Figure, axes: Axes, found: MatchDistribution, colours: Colours) -> None:
    _recolour(axes, colours)
    axes.plot(found.cosine, found.share, color=colours.lines[0], linewidth=1.8, label="best matches")
    means = [sum(shares) / len(shares) for shares in zip(*found.random, strict=True)]
    lowest, highest = map(min, zip(*found.random, strict=True)), map(max, zip(*found.random, strict=True))
    axes.fill_between(
        found.cosine, list(lowest), list(highest), color=colours.lines[1], alpha=0.3, linewidth=0
    )
    seeds = len(found.seeds)
    axes.plot(
        found.cosine, means, "--", color=colours.lines[1], linewidth=1.5,
        label=f"random dictionaries, {seeds} seed{'s' if seeds > 1 else ''}",
    )  # fmt: skip
    if found.bound < 1:
        axes.axvline(
            found.bound, color=colours.ink, linewidth=1.2, linestyle=":", label=f"bound {found.bound:.3f}"
        )
    axes.set(xlim=(left_edge(found), 1), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("cosine with the best match, at most", color=colours.ink)
    axes.set_ylabel("share of latents", color=colours.ink)
    first, second = map(_shown, found.names)
    axes.set_title(f"{first} in {second}", color=colours.ink, parse_math=False)
    _legend(figure, colours, 3)


def left_edge(found: MatchDistribution) -> float:
    """Where the figure begins: 0, or lower where best matches are: the left half is empty but in few dimensions."""
    curves = [found.share, *found.random]
    below = [x for i, x in enumerate(found.cosine) if all(curve[i] == 0 for curve in curves)]
    return min(0.0, max(below, default=-1.0))


def _by_dictionary(found: FeatureMap) -> Iterator[tuple[str, list[MapPoint]]]:
    for name in dict.fromkeys(point.dictionary for point in found.points):
        yield name, [point for point in found.points if point.dictionary == name]


def _shown(name: str) -> str:
    name = visible(name).replace("\n", " ")
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _recolour(axes: Axes, colours: Colours) -> None:
    axes.spines[["left", "bottom"]].set_color(colours.muted)
    axes.tick_params(colors=colours.muted, labelcolor=colours.ink)
    axes.grid(axis="y", color=colours.line, linewidth=0.6)


def _legend(figure: Figure, colours: Colours, columns: int) -> None:
    legend = figure.legend(
        frameon=False, loc="outside lower center", ncols=columns, labelcolor=colours.ink, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
