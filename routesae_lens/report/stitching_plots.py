"""The figures of SAE stitching: the way from one SAE to another, the threshold, and what a RouteSAE has of each layer.

Matplotlib is imported where a figure is drawn: the package works without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routesae_lens.analysis.insertion import ThresholdChoice
from routesae_lens.analysis.layer_coverage import LayerCoverage
from routesae_lens.analysis.stitching import StitchingCurve
from routesae_lens.report.visible import visible

PHASES = {
    "insert": ("novel latents inserted", "#0b5cad"),
    "swap": ("groups swapped", "#b84a00"),
    "rest": ("the rest exchanged", "#00735a"),
}
"""What a phase is called and its colour; the first step has none."""
MARKERS = "osD^vP"
COLOURS = ("#0b5cad", "#b84a00", "#00735a", "#8a3b8c", "#6a6200", "#5a6068")


def plot_stitching(curve: StitchingCurve, path: str | Path) -> Path:
    """NormMSE, L0 and, where there is one, KL over the moves from the smaller SAE to the larger, by phase.

    Raises:
        ValueError: an ending other than .svg, .png or .pdf, or no such folder.
    """
    from routesae_lens.report.geometry_plots import figure_path, write_figure

    path = figure_path(path)
    measures = {"norm_mse": "NormMSE", "l0": "L0 (latents per token)"}
    if curve.steps[0].kl is not None:
        measures["kl"] = "KL (nats per token)"
    figure, panels = _panels(len(measures), (3.6 * len(measures), 3.6))
    starts = dict(zip(curve.phase_ends, [0, *curve.phase_ends.values()], strict=False))
    for axes, (name, label) in zip(panels, measures.items(), strict=True):
        axes.plot(
            [step.move for step in curve.steps],
            [getattr(step, name) for step in curve.steps],
            color="#1b1f24", marker="o", ms=3.5, linewidth=1.3,
        )  # fmt: skip
        for phase, end in curve.phase_ends.items():
            text, colour = PHASES[phase]
            axes.axvspan(starts[phase], end, color=colour, alpha=0.13, linewidth=0, label=text)
        axes.set(xlabel="moves", ylabel=label)
    first, end = curve.steps[0].d_sae, curve.steps[-1].d_sae
    last = "the larger SAE" if curve.reaches_large else "all of them and every novel one"
    figure.suptitle(f"From {first:,} latents (left) to {last} (right, {end:,})", fontsize=11)
    _legend(figure, panels[0])
    return write_figure(figure, path)


def plot_threshold(choice: ThresholdChoice, path: str | Path) -> Path:
    """How well each threshold on the best cosine foretells whether inserting a latent lowers the error.

    Raises:
        ValueError: no threshold was found, an ending other than .svg, .png or .pdf, or no such folder.
    """
    from routesae_lens.report.geometry_plots import figure_path, write_figure

    path = figure_path(path)
    if choice.threshold is None:
        raise ValueError("nothing to draw: all insertions lower the error, or all raise it")
    figure, (axes,) = _panels(1, (4.8, 3.4))
    axes.plot(
        choice.thresholds, choice.accuracies, color=COLOURS[0], linewidth=1.5, label="balanced accuracy"
    )
    axes.axhline(0.5, color="#545b64", linewidth=1, linestyle=":", label="chance")
    axes.axvline(
        choice.threshold,
        color=COLOURS[1],
        linewidth=1.2,
        linestyle="--",
        label=f"best: {choice.threshold:.2f}",
    )
    axes.set(xlabel="threshold on the best cosine", ylabel="balanced accuracy", xlim=(0, 1))
    axes.set_title(f"{choice.lowering:,} latents lower the error, {choice.raising:,} raise it", fontsize=10)
    _legend(figure, axes)
    return write_figure(figure, path)


def plot_layer_coverage(found: LayerCoverage | Mapping[str, LayerCoverage], path: str | Path) -> Path:
    """Left: the share of each layer's latents that RouteSAEs have, between chance and another seed's SAE of the layer.

    Right: in the SAEs of how many layers the RouteSAEs' latents have their like. Chance, other layers and ceilings are
    those of the first RouteSAE.

    Raises:
        ValueError: nothing to draw, an ending other than .svg, .png or .pdf, or no such folder.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from routesae_lens.report.geometry_plots import figure_path, write_figure

    path = figure_path(path)
    several = {"RouteSAE": found} if isinstance(found, LayerCoverage) else dict(found)
    if not several:
        raise ValueError("no coverage to draw")
    figure, (left, right) = _panels(2, (9.6, 3.8))
    width = 0.8 / len(several)
    for i, (name, one) in enumerate(several.items()):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)]}
        layers = [row.layer for row in one.layers]
        left.plot(
            layers, [row.covered for row in one.layers], marker=MARKERS[i % len(MARKERS)], ms=5, label=visible(name),
            **style,
        )  # fmt: skip
        places = [n + (i - (len(several) - 1) / 2) * width for n in one.shared]
        right.bar(places, [n / one.route_latents for n in one.shared.values()], width, **style)
    rows = next(iter(several.values())).layers
    lines: dict[str, tuple[list[float | None], str, str]] = {
        "another seed's SAE of the layer": ([row.ceiling for row in rows], "--", "#1b1f24"),
        "the best other layer's SAE": ([row.best_other for row in rows], "-.", "#545b64"),
        "random dictionaries": ([sum(row.random) / len(row.random) for row in rows], ":", "#545b64"),
    }
    for label, (shares, dashes, colour) in lines.items():
        if any(
            share is not None for share in shares
        ):  # (a layer without leaves a gap; a lone point needs its dot)
            known = [math.nan if share is None else share for share in shares]
            left.plot(
                [row.layer for row in rows], known, marker=".", linestyle=dashes, color=colour, linewidth=1.4,
                label=label,
            )  # fmt: skip
    left.set(xlabel="layer", ylabel="latents covered", ylim=(0, None))
    right.set(xlabel="layers whose SAE has its like", ylabel="latents of the RouteSAE")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, left)
    return write_figure(figure, path)


def _panels(columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.grid(axis="y", color="#d3d8de", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
