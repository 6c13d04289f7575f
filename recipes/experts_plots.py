"""The figures of the comparison of mixtures of experts. Colours are Okabe and Ito's; markers and lines differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pandas as pd
from experts_methods import Kind
from paper_plots import seed_means

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

BY_E = {1: "#000000", 2: "#0072B2", 4: "#009E73", 8: "#D55E00", 16: "#CC79A7"}
MARKERS = {1: "s", 2: "o", 4: "^", 8: "D", 16: "v"}
DENSE = {"topk": ("#7F7F7F", "P"), "gated": ("#B8A900", "X"), "topk_wide": ("#7F7F7F", "*")}
SCALED, PLAIN = "-", "--"
FURTHER = ("#E69F00", "#CC79A7", "#56B4E9", "#8C6D31")
SCALING_COLORS = {"mean": "#0072B2", "none": "#D55E00"}
SCALING_NAMES = {"mean": "with feature scaling", "none": "without"}


def style_of(kind: Kind) -> dict[str, Any]:
    """Colour by e, line by feature scaling; dense SAEs are grey."""
    if not kind.experts:
        color, marker = DENSE[kind.name]
        return {"color": color, "marker": marker, "linestyle": ":"}
    line = SCALED if kind.scaling == "mean" else PLAIN
    fill = "full" if kind.scaling == "mean" else "none"
    color = BY_E.get(kind.active, FURTHER[kind.active % len(FURTHER)])
    return {"color": color, "marker": MARKERS.get(kind.active, "h"), "linestyle": line, "fillstyle": fill}


def frontier(runs: pd.DataFrame, kinds: Mapping[str, Kind], panels: Mapping[str, str]) -> Figure:
    """Metrics against L0, mean and 95 % interval over seeds (figures 3 and 4); SAEs of an L0 below 1 are left out."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels) + 2.4, 4.6), layout="constrained", squeeze=False
    )
    runs = runs[runs["l0"] >= 1]
    for axis, (metric, title) in zip(axes[0], panels.items(), strict=True):
        shown = [label for label in kinds if runs.loc[runs["method"] == label, metric].notna().any()]
        for i, label in enumerate(shown):
            points = seed_means(runs[runs["method"] == label], metric)
            aside = 1 + 0.01 * (i - len(shown) / 2)  # (side by side, where several have the same k)
            axis.errorbar(
                points["l0"] * aside, points["mean"], yerr=points["half"].fillna(0), label=label, markersize=5.5,
                linewidth=1.3, elinewidth=0.9, capsize=2, **style_of(kinds[label]),
            )  # fmt: skip
        axis.set(xlabel="L0 (active latents per token)", ylabel=title, xscale="log")
        _plain(axis.xaxis, sorted({round(float(one)) for one in runs.loc[runs["kind"] == "k", "sparsity"]}))
        axis.grid(alpha=0.3)
    _legend(figure, axes[0])
    return figure


def _plain(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_ticks(ticks)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    known: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        known |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in known}
    figure.legend(known.values(), known.keys(), loc="outside right upper", frameon=False, fontsize=9)


def _experts_axis(axis: Any, es: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    _plain(axis.xaxis, es)
    axis.set_xlabel("active experts, e")
    axis.grid(alpha=0.3)


def redundancy(runs: pd.DataFrame) -> Figure:
    """Near copies, and shared latents of verbs, against e with and without scaling, by k (figures 7 and 8)."""
    runs = runs[runs["scaling"].isin(SCALING_NAMES)]
    ks = sorted(runs["sparsity"].unique())
    metrics = {"redundancy": "latents with a near copy\n(decoder cosine above 0.9)",
               "similarity_verbs": "activation similarity\nof verbs (Eq. A.3)"}  # fmt: skip
    figure, axes = plt.subplots(
        2,
        len(ks),
        figsize=(3.3 * len(ks) + 2, 6),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    for column, k in zip(axes.T, ks, strict=True):
        for axis, (metric, title) in zip(column, metrics.items(), strict=True):
            for scaling, name in SCALING_NAMES.items():
                rows = runs[(runs["scaling"] == scaling) & (runs["sparsity"] == k)]
                _against_e(axis, rows, metric, name, scaling)
            _experts_axis(axis, sorted(runs["active"].unique()))
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.set_ylabel(title if column is axes.T[0] or k == ks[0] else "")
        column[0].set(title=f"k = {k:g}", xlabel="")
    highest = float(runs["redundancy"].max())
    axes[0, 0].set_ylim(0, 1.15 * highest if highest > 0 else 0.01)  # (shared by the row)
    axes[1, 0].set_ylim(bottom=0)
    _legend(figure, [axes[0, 0]])
    return figure


def _against_e(axis: Any, rows: pd.DataFrame, metric: str, name: str, scaling: str) -> None:
    points = [
        (e, *seed_means(group.assign(l0=1.0), metric)[["mean", "half"]].to_numpy()[0])
        for e, group in rows.dropna(subset=[metric]).groupby("active")
    ]
    if points:
        x, y, half = zip(*points, strict=True)
        axis.errorbar(
            x, y, yerr=pd.Series(half).fillna(0), label=name, color=SCALING_COLORS[scaling],
            marker="o" if scaling == "mean" else "s", linestyle=SCALED if scaling == "mean" else PLAIN, capsize=3,
        )  # fmt: skip


def omega(runs: pd.DataFrame, curves: pd.DataFrame) -> Figure:
    """The scale factor against e at the end (figure 2), and in training; bars are the extremes over experts."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    runs = runs[(runs["scaling"] == "mean") & runs["omega"].notna()]
    ks = sorted(runs["sparsity"].unique())
    colors = dict(
        zip(ks, ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#000000") * 9, strict=False)
    )
    for i, k in enumerate(ks):
        rows = runs[runs["sparsity"] == k].groupby("active")
        mean, low, high = rows["omega"].mean(), rows["omega_min"].min(), rows["omega_max"].max()
        aside = 1 + 0.04 * (i - (len(ks) - 1) / 2)
        axes[0].errorbar(
            mean.index * aside, mean, yerr=[(mean - low).clip(lower=0), (high - mean).clip(lower=0)],
            color=colors[k], marker=list(MARKERS.values())[i % 5], capsize=3, elinewidth=0.9, label=f"k = {k:g}",
        )  # fmt: skip
    axes[0].axhline(0, color="gray", linewidth=1)
    axes[0].set_ylabel("ω at the end: mean, and the\nextremes of all experts and seeds")
    _experts_axis(axes[0], sorted(runs["active"].unique()))
    axes[0].legend(frameon=False, fontsize=9)
    curves = curves[(curves["scaling"] == "mean") & (curves["sparsity"] == (ks[len(ks) // 2] if ks else 0))]
    for e, rows in curves.groupby("active"):
        by_step = rows.groupby("step")["omega"].mean()
        axes[1].plot(by_step.index, by_step, color=BY_E.get(int(e), "#8C6D31"), label=f"e = {e:g}")
    axes[1].axhline(0, color="gray", linewidth=1)
    axes[1].set(xlabel="training step", ylabel="mean ω", title=f"k = {ks[len(ks) // 2]:g}" if ks else "")
    axes[1].grid(alpha=0.3)
    axes[1].legend(frameon=False, fontsize=9)
    return figure


def utilisation(cdfs: pd.DataFrame, k: float) -> Figure:
    """Cumulative use of the experts, the most used first (figure 6b), with and without scaling; means over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for axis, which, title in (
        (axes[0], "verbs", "tokens that look like verbs"),
        (axes[1], "all", "all tokens"),
    ):
        rows = cdfs[(cdfs["sparsity"] == k) & (cdfs["tokens"] == which) & cdfs["scaling"].isin(SCALING_NAMES)]
        for (e, scaling), group in rows.groupby(["active", "scaling"]):
            line = group.groupby("experts_share")["share"].mean()
            axis.plot(
                line.index, line, color=BY_E.get(int(e), "#8C6D31"), linewidth=1.4, label=f"e = {e:g}, "
                f"{SCALING_NAMES[scaling]}", linestyle=SCALED if scaling == "mean" else PLAIN,
            )  # fmt: skip
        axis.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle=":", label="all experts alike")
        axis.set(title=f"{title}, k = {k:g}", xlabel="share of the experts, most used first")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of activations")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    _legend(figure, axes[:1])
    return figure


def overlaps(found: pd.DataFrame, k: float) -> Figure:
    """How many latents two verbs share, with and without scaling, a panel for each e (figure 11); means over seeds."""
    found = found[
        (found["sparsity"] == k) & (found["tokens"] == "verbs") & found["scaling"].isin(SCALING_NAMES)
    ]
    es = sorted(found["active"].unique())
    figure, axes = plt.subplots(
        1, len(es), figsize=(3.2 * len(es) + 2, 3.6), layout="constrained", squeeze=False, sharey=True
    )
    for axis, e in zip(axes[0], es, strict=True):
        for scaling, name in SCALING_NAMES.items():
            rows = found[(found["active"] == e) & (found["scaling"] == scaling)]
            # (a missing overlap is one that no pair of that seed has)
            line = rows.groupby("overlap")["share"].sum() / max(1, rows["seed"].nunique())
            axis.plot(
                line.index, line, color=SCALING_COLORS[scaling], label=name, marker="o" if scaling == "mean" else "s",
                markersize=3, linestyle=SCALED if scaling == "mean" else PLAIN,
            )  # fmt: skip
        axis.set(title=f"e = {e:g}, k = {k:g}", xlabel="latents shared by two verbs", yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("share of the pairs")
    _legend(figure, axes[0])
    return figure
