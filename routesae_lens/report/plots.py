"""The figures of a report, as SVG that takes the page's colours and font.

Matplotlib draws with stand-in colours; each is replaced by a variable of the page's style sheet, so that one
drawing serves light and dark. Methods differ in marker and line as well as in colour.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from routesae_lens.report.visible import visible

INK, MUTED, LINE, SURFACE = "#000a01", "#000a02", "#000a03", "#000a04"
LINES = ("#000b01", "#000b02", "#000b03", "#000b04", "#000b05", "#000b06")
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", SURFACE: "--surface"} | {
    color: f"--plot-{i + 1}" for i, color in enumerate(LINES)
}
MARKERS, DASHES = "oDs^vPX<>*hdp", ("-", "--", "-.", ":")
LABELLED = 0.06
"""Layers below this share at the end of training get no label beside the figure; the table has them all."""


def curve(frame: pd.DataFrame, column: str, title: str) -> Markup:
    """One quantity over the tokens of the training."""
    figure, axes = empty_figure(3.4, 2.3)
    points = frame[["tokens", column]].dropna()
    few = len(points) < 12
    axes.plot(
        points["tokens"], points[column], color=LINES[0], linewidth=1.5, marker="o" if few else "", ms=4
    )
    axes.set_title(title)
    _tokens_axis(axes)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return as_svg(figure, f"curve-{column}", f"{title} against training tokens")


def shares_in_training(frame: pd.DataFrame) -> Markup:
    """Share of tokens routed to each layer in the batches of training, stacked (figure 9 a)."""
    figure, axes = empty_figure(4.6, 3.0)
    layers = [column for column in frame if isinstance(column, int)]
    stack = frame[layers].to_numpy().T
    shades = {f"#000c{i:02x}": i / max(1, len(layers) - 1) for i in range(len(layers))}
    axes.stackplot(frame["tokens"], stack, colors=list(shades), edgecolor=SURFACE, linewidth=0.25)
    below = 0.0
    for layer, share in zip(layers, stack[:, -1], strict=True):
        if share >= LABELLED:
            axes.annotate(
                f"layer {layer}",
                (1.0, below + share / 2),
                xycoords=("axes fraction", "data"),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        below += share
    axes.set(ylim=(0, 1), xlim=(frame["tokens"].iloc[0], frame["tokens"].iloc[-1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("In training, by batch")
    _tokens_axis(axes)
    text = "Share of tokens routed to each layer over the training, stacked from the lowest layer up"
    return as_svg(figure, "shares-in-training", text, shades)


def shares_at_inference(routing: Mapping[str, Mapping[int, float]]) -> Markup:
    """Share of held-out tokens routed to each layer, with its standard error, and mean probability (figure 9 b)."""
    figure, axes = empty_figure(4.6, 3.0)
    share, weight = routing["layer_share"], routing.get("layer_weight", {})
    error = routing.get("layer_share_stderr", {})
    errors = [0.0 if math.isnan(error.get(layer, 0.0)) else error.get(layer, 0.0) for layer in share]
    at = range(len(share))
    axes.bar(
        at,
        list(share.values()),
        color=LINES[0],
        label="share of tokens",
        yerr=errors if any(errors) else None,
        error_kw={"ecolor": INK, "elinewidth": 1},
    )
    if weight:
        means = [weight.get(layer, math.nan) for layer in share]
        axes.plot(at, means, "D", color=LINES[1], ms=5, mec=SURFACE, mew=0.7, label="mean probability")
        axes.legend(frameon=False, loc="upper right")
    axes.set_xticks(list(at), [str(layer) for layer in share])
    axes.set_xlabel("layer")
    axes.set_ylim(0, min(1.0, 1.15 * max([*share.values(), *weight.values(), 0.01])))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("On held-out text")
    return as_svg(figure, "shares-at-inference", "Share of held-out tokens routed to each layer")


def kl_against_sparsity(points: Sequence[Mapping[str, Any]], chosen: str) -> Markup:
    """KL against L0: every SAE, and a line through each method's means over seeds; the page's SAE is ringed."""
    frame = pd.DataFrame(points).dropna(subset=["l0", "kl"])
    methods = frame["method"].nunique()
    figure, axes = empty_figure(4.6, 3.2 + 0.2 * math.ceil((methods + 1) / 2))
    for i, (method, rows) in enumerate(frame.groupby("method", sort=False)):
        color, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        dashes = DASHES[i // len(LINES) % len(DASHES)]
        means = rows.assign(l0=rows["l0"].round(1)).groupby("l0", as_index=False)["kl"].mean()
        axes.plot(
            means["l0"], means["kl"], dashes, color=color, marker=marker, ms=6, label=visible(str(method))
        )
        axes.plot(rows["l0"], rows["kl"], marker, color=color, ms=3, alpha=0.6)
    ours = frame[frame["name"] == chosen]
    axes.plot(ours["l0"], ours["kl"], "o", ms=13, mfc="none", mec=INK, mew=1.5, label="the SAE of this page")
    axes.set(xlabel="L0 (active latents per token)", ylabel="KL (nats per token)")
    axes.set_ylim(0, 1.08 * max(frame["kl"].max(), 1e-6))
    figure.legend(frameon=False, loc="outside lower center", ncols=2, labelcolor=INK, fontsize=9)
    return as_svg(figure, "kl", "KL on held-out text against sparsity for every method of the run")


def empty_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, with the frame that all of them share."""
    figure = Figure(figsize=(width, height), layout="constrained")
    with rc_context({"font.size": 9}):
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _tokens_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training tokens")


def as_svg(figure: Figure, name: str, description: str, shades: Mapping[str, float] | None = None) -> Markup:
    """The drawing as it stands in the page; ``shades`` are stand-ins for depths between --shallow and --deep."""
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
            text.set_color(INK)
        if (legend := axes.get_legend()) is not None:
            for entry in legend.get_texts():
                entry.set_color(INK)
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(
            out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for color, variable in VARIABLES.items():
        drawn = drawn.replace(color, f"var({variable})")
    for color, depth in (shades or {}).items():
        mixed = f"color-mix(in oklab, var(--deep) {round(100 * depth)}%, var(--shallow))"
        drawn = drawn.replace(color, mixed)
    # Every drawing names its parts figure_1, axes_1 ...: one page may have each id once.
    drawn = re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{name.replace('/', '-')}-", drawn)
    opening = Markup('<svg role="img" aria-label="{}" ').format(description)
    return Markup(opening + Markup(drawn.removeprefix("<svg ")))
