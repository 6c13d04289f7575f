"""The figures of the Llama Scope recipe, each from what was measured. Colours are Okabe and Ito's; markers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

GROUPS: dict[str, tuple[str, str, str, str]] = {
    "annealed": ("TopK, K-annealing", "#0072B2", "o", "-"),
    "fixed": ("TopK, fixed k", "#D55E00", "s", "--"),
    "wide": ("wide TopK, K-annealing", "#009E73", "^", "-."),
    "route": ("RouteSAE, K-annealing", "#CC79A7", "D", ":"),
    "crosscoder": ("Crosscoder, K-annealing", "#8C6D31", "v", (0, (3, 1, 1, 1, 1, 1))),  # type: ignore[dict-item]
}
"""By the beginning of an SAE's name: what it is called, colour, marker and line."""
POSITION_STYLES = {
    "R": ("R: residual stream", "#0072B2", "o"),
    "A": ("A: attention output", "#D55E00", "s"),
    "M": ("M: MLP output", "#009E73", "^"),
    "TC": ("TC: transcoder", "#CC79A7", "D"),
}


def group_of(name: str) -> str:
    return name.rpartition("-")[0]


def called(name: str) -> str:
    """``annealed-seed1`` in words."""
    group, _, seed = name.rpartition("-seed")
    return f"{GROUPS[group][0]}, seed {seed}"


def _panels(columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def _legend(figure: Figure, axes: Sequence[Any], columns: int) -> None:
    known: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True)) | known
    figure.legend(
        known.values(), known.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _band(axis: Any, rows: pd.DataFrame, x: str, y: str, group: str, marker: bool = False) -> None:
    """Mean over seeds, and their range."""
    name, color, shape, line = GROUPS[group]
    by_x = rows.groupby(x)[y]
    mean = by_x.mean()
    style = {"marker": shape, "markersize": 4} if marker else {}
    axis.plot(mean.index, mean, color=color, linestyle=line, linewidth=1.6, label=name, **style)
    if rows["name"].nunique() > 1:
        axis.fill_between(mean.index, by_x.min(), by_x.max(), color=color, alpha=0.2, linewidth=0)


def annealing(curves: pd.DataFrame, ends: float, window: float, running: int) -> Figure:
    """Loss, and silent latents, against tokens (figure 12); ``ends`` of the annealing and ``window`` in tokens.

    ``running``: log lines whose median is drawn as the loss.
    """
    figure, axes = _panels(2, (10.4, 4.4))
    smooth = curves.groupby("name")["loss"].transform(
        lambda loss: loss.rolling(running, min_periods=1).median()
    )
    curves = curves.assign(thousands=curves["tokens"] / 1000, loss=smooth)
    present = [group for group in GROUPS if (curves["group"] == group).any()]
    for group in present:
        rows = curves[curves["group"] == group]
        if group in ("annealed", "fixed", "wide"):
            _band(axes[0], rows, "thousands", "loss", group)
        _band(axes[1], rows[rows["tokens"] > window], "thousands", "silent", group)
    axes[0].set(
        yscale="log",
        ylabel=f"training loss / d_model (median of {running} lines;\nless while k is annealed: more latents)",
    )
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes[0].tick_params(axis="y", which="both", labelsize=8)
    axes[1].set(ylabel=f"latents that fired on none of the\nlast {window / 1000:,.4g} thousand tokens")
    axes[1].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes:
        axis.axvline(ends / 1000, color="gray", linewidth=1, linestyle=":")
        axis.set_xlabel("training tokens, thousands (dotted: the annealing ends)")
        axis.set_xlim(left=0)
    _legend(figure, axes, 3)
    return figure


def positions(evaluations: Mapping[str, Any], layers: Sequence[int]) -> Figure:
    """L0, explained variance and delta LM loss of four positions against the block (figure 10)."""
    panels = {
        "l0": "L0",
        "explained_variance_raw_uncentered": "explained variance (Eq. 6)",
        "explained_variance_raw": "explained variance, centred",
        "delta_ce": "delta LM loss, nats per token",
    }
    figure, axes = _panels(4, (14, 3.8))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for position, (name, color, marker) in POSITION_STYLES.items():
            points = [
                (n, evaluations[f"L{n}{position}"][metric])
                for n in layers
                if f"L{n}{position}" in evaluations
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=6, label=name)
        axis.set(title=title, xlabel="block", xticks=list(layers))
    _legend(figure, axes, 4)
    return figure


def conversion(converted: Mapping[str, Any]) -> Figure:
    """Each SAE with TopK (open) and with a threshold (filled): L0, NormMSE, KL (figure 11)."""
    panels = {"l0": "L0", "norm_mse": "NormMSE", "kl": "KL(clean ‖ spliced), nats per token"}
    names = sorted(converted, key=lambda name: (list(GROUPS).index(group_of(name)), name), reverse=True)
    figure, axes = _panels(3, (13, 0.34 * len(names) + 1.6))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        for y, name in enumerate(names):
            _, color, marker, _ = GROUPS[group_of(name)]
            before, after = (converted[name][when][metric] for when in ("before", "after"))
            axis.plot([before, after], [y, y], color=color, linewidth=1)
            axis.plot(before, y, marker, color=color, markersize=8, markerfacecolor="none")
            axis.plot(after, y, marker, color=color, markersize=5)
        axis.set(title=title, ylim=(-0.6, len(names) - 0.4))
        axis.set_yticks(range(len(names)), [called(name) for name in names] if axis is axes[0] else [])
    axes[0].plot([], [], "o", color="black", markerfacecolor="none", markersize=8, label="TopK")
    axes[0].plot([], [], "o", color="black", markersize=5, label="JumpReLU")
    _legend(figure, axes[:1], 2)
    return figure


def firing(found: Mapping[str, Any]) -> Figure:
    """Latents by how often they fire, the first seed of each kind (figure 4)."""
    figure, axes = _panels(1, (6.6, 4.2))
    for group, (name, color, marker, line) in GROUPS.items():
        one = next((one for sae, one in found.items() if group_of(sae) == group), None)
        if one is None:
            continue
        edges, share = one["edges"], [n / one["d_sae"] for n in one["histogram"]]
        middle = [(a * b) ** 0.5 for a, b in pairwise(edges)]
        axes[0].plot(
            middle, share, color=color, marker=marker, markersize=4, linestyle=line,
            label=f"{name} (never: {one['never_fired'] / one['d_sae']:.1%})",
        )  # fmt: skip
    axes[0].axvline(0.1, color="gray", linewidth=1, linestyle=":")
    axes[0].set(xscale="log", xlabel="share of tokens (dotted: 10 %)", ylabel="share of the latents")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    _legend(figure, axes, 2)
    return figure


def long(found: Mapping[str, Any], training_length: int) -> Figure:
    """NormMSE and L0 by position, of the JumpReLU forms (figure 5)."""
    rows = pd.DataFrame(
        {"name": name, "group": group_of(name), "end": one["end"], "norm_mse": one["norm_mse"], "l0": one["l0"]}
        for name, profile in found["saes"].items()
        for one in profile["bins"]
    )  # fmt: skip
    figure, axes = _panels(2, (10, 4.2))
    for axis, metric, title in ((axes[0], "norm_mse", "NormMSE"), (axes[1], "l0", "L0")):
        for group in GROUPS:
            if (rows["group"] == group).any():
                _band(axis, rows[rows["group"] == group], "end", metric, group, marker=True)
        axis.axvline(training_length, color="gray", linewidth=1, linestyle=":")
        axis.set(xlabel="positions up to (dotted: the training length)", ylabel=title)
    _legend(figure, axes, 3)
    return figure
