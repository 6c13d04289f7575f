"""The figures of the report. Each function draws one from the report's tables and returns the figure.

Colours are Okabe and Ito's, which colour-blind people can tell apart; markers differ as well, and legends stand
beside the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, MaxNLocator, NullFormatter
from paper_presets import NAMES, PARTS
from paper_verdicts import interval

STYLES: dict[str, tuple[str, str, str]] = {
    "route": ("#0072B2", "o", "-"),
    "distilled": ("#D55E00", "D", "-"),
    "distilled_mean": ("#D55E00", "d", "--"),
    "random": ("#009E73", "s", "-"),
    "topk": ("#000000", "^", "-"),
    "random_batch": ("#009E73", "x", ":"),
    "plain_topk": ("#000000", "+", ":"),
    "route_soft": ("#56B4E9", "v", "--"),
    "route_attention": ("#56B4E9", "P", ":"),
    "relu": ("#CC79A7", "<", "--"),
    "gated": ("#E69F00", ">", "--"),
    "jumprelu": ("#8C6D31", "h", "--"),
    "crosscoder_topk": ("#7F7F7F", "X", "-."),
    "crosscoder_relu": ("#7F7F7F", "*", ":"),
    "mlsae": ("#B8A900", "p", "-."),
}
"""Colour, marker and line of each method."""
SEED_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def seed_means(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Columns sparsity, l0, mean, half (of the 95 % interval over seeds), n: one row per sparsity."""
    found = []
    for (kind, sparsity), group in rows.dropna(subset=[metric]).groupby(["kind", "sparsity"]):
        mean, half = interval(group[metric].astype(float).tolist())
        found.append((kind, sparsity, group["l0"].mean(), mean, half, len(group)))
    return pd.DataFrame(found, columns=["kind", "sparsity", "l0", "mean", "half", "n"]).sort_values("l0")


def _panels(columns: int, size: tuple[float, float], rows: int = 1, **shared: bool) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes by row and column."""
    options: dict[str, Any] = {"layout": "constrained", "squeeze": False, **shared}
    return plt.subplots(rows, columns, figsize=size, **options)


def frontier(runs: pd.DataFrame, metric: str, y_label: str) -> Figure | None:
    """A metric against L0, mean and 95 % interval over seeds (figures 4, 6 and 12): the core, then all methods.

    SAEs with less than one active latent per token are left out, and named.
    """
    idle = [NAMES[m] for m in STYLES if (runs.loc[runs["method"] == m, "l0"] < 1).any()]
    runs = runs[~(runs["l0"] < 1)]
    shown = [m for m in STYLES if runs.loc[runs["method"] == m, metric].notna().any()]
    if not shown:
        return None
    core = [m for m in PARTS["core"] if m in shown]
    panels = [core, shown] if core and len(shown) > len(core) else [shown]
    figure, axes = _panels(len(panels), (4.1 * len(panels) + 2.2, 4.2))
    for axis, methods in zip(axes[0], panels, strict=True):
        tops: list[float] = []
        l0: list[float] = []
        for i, method in enumerate(methods):
            color, marker, line = STYLES[method]
            points = seed_means(runs[runs["method"] == method], metric)
            tops, l0 = tops + points["mean"].tolist(), l0 + points["l0"].tolist()
            # (side by side, where several methods have the same k)
            aside = 1 + 0.012 * (i - (len(methods) - 1) / 2) if methods is core else 1
            axis.errorbar(
                points["l0"] * aside,
                points["mean"],
                yerr=points["half"].fillna(0) if methods is panels[0] else None,
                label=NAMES[method] if methods is shown else None,
                color=color,
                marker=marker,
                linestyle=line,
                markersize=5.5,
                linewidth=1.4,
                capsize=3,
                elinewidth=1,
            )
        if min(tops) > 0 and max(tops) > 8 * min(tops):
            axis.set_yscale("log")
            _plain_numbers(axis.yaxis)
        if max(l0) > 4 * min(l0) > 0:
            axis.set_xscale("log")
            _plain_numbers(axis.xaxis)
        axis.set(xlabel="L0 (active latents per token)")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(y_label)
    if len(panels) > 1:
        axes[0, 0].set_title("core, 95 % interval over seeds", fontsize=10)
        left_out = f"\n(without {', '.join(idle)}: L0 below 1)" if idle else ""
        axes[0, 1].set_title(f"all methods, means{left_out}", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _plain_numbers(axis: Any) -> None:
    """Numbers in place of powers of ten, on minor ticks too where there are few major ones."""
    low, high = axis.get_data_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = high < 30 * max(low, 1e-9)
    axis.set_minor_formatter(
        LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)) if few else NullFormatter()
    )


def feature_curves(features: pd.DataFrame, methods: Sequence[str], threshold: float) -> Figure | None:
    """Number of interpretable features against the threshold, a line per sparsity (figure 5 a)."""
    methods = [method for method in methods if (features["method"] == method).any()]
    if not methods:
        return None
    figure, axes = _panels(len(methods), (4.2 * len(methods) + 1.2, 3.6), sharey=True)
    sparsities = sorted(features.loc[features["method"].isin(methods), "sparsity"].unique())
    colors = plt.get_cmap("viridis")
    for axis, method in zip(axes[0], methods, strict=True):
        rows = features[features["method"] == method]
        for i, sparsity in enumerate(sparsities):
            points = [
                (t, *interval(group["features"].astype(float).tolist()))
                for t, group in rows[rows["sparsity"] == sparsity].groupby("threshold")
            ]
            if points:
                x, mean, half = zip(*points, strict=True)
                axis.errorbar(
                    x,
                    mean,
                    yerr=[0 if h != h else h for h in half],
                    marker="osD^vPX"[i % 7],
                    markersize=4,
                    capsize=2,
                    color=colors(0.9 * i / max(len(sparsities) - 1, 1)),
                    label=f"k = {sparsity:g}" if axis is axes[0, 0] else None,
                )
        axis.axvline(threshold, color="gray", linestyle="--", linewidth=1)
        axis.annotate(
            "used in figure 6",
            (threshold, 1),
            (3, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
            color="dimgray",
            rotation=90,
            va="top",
        )
        axis.set(title=NAMES[method], xlabel="threshold (for inputs of norm √2048)")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="interpretable features", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def layer_weights(routing: pd.DataFrame, method: str) -> Figure | None:
    """Mean p of each block (solid) and the share of tokens sent there (dotted), each seed by itself (figure 9)."""
    rows = routing[(routing["method"] == method) & (routing["token_class"] == "all")]
    if rows.empty:
        return None
    every = sorted(rows["sparsity"].unique())
    chosen = sorted({every[0], every[len(every) // 2], every[-1]})
    figure, axes = _panels(len(chosen), (3.6 * len(chosen) + 1.6, 5.4), rows=2, sharex=True, sharey=True)
    for column, sparsity in enumerate(chosen):
        of_k = rows[rows["sparsity"] == sparsity]
        for row, phase in enumerate(("training", "inference")):
            axis = axes[row, column]
            for i, (seed, one) in enumerate(of_k.groupby("seed")):
                first, color = row == column == 0, SEED_COLORS[i % len(SEED_COLORS)]
                one = one.sort_values("layer")
                axis.plot(
                    one["layer"],
                    one[f"{phase}_weight"],
                    color=color,
                    marker="o",
                    markersize=3.5,
                    linewidth=1.5,
                    label=f"seed {seed}, mean p" if first else None,
                )
                axis.plot(
                    one["layer"],
                    one[f"{phase}_share"],
                    color=color,
                    linestyle=":",
                    linewidth=1.5,
                    label=f"seed {seed}, share" if first else None,
                )
            axis.axhline(
                1 / of_k["layer"].nunique(),
                color="gray",
                linewidth=1,
                linestyle="--",
                label="uniform" if row == column == 0 else None,
            )
            axis.set_title(f"{phase}, k = {sparsity:g}", fontsize=10)
            axis.set_ylim(0, 1.02)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel(f"{NAMES[method]}: weight of the block", fontsize=10)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def profiles(records: Sequence[dict[str, Any]]) -> Figure | None:
    """Layer-wise activation of features that peak first and last, with their tokens (figure 1)."""
    records = [record for record in records if record["features"]]
    if not records:
        return None
    figure, axes = _panels(len(records), (4.9 * len(records), 5.2), sharey=True)
    for axis, record in zip(axes[0], records, strict=True):
        counts = {"early": 0, "late": 0}
        for feature in record["features"]:
            i = counts[feature["end"]]
            counts[feature["end"]] += 1
            late = feature["end"] == "late"
            axis.plot(
                record["layers"],
                feature["profile"],
                color=("#D55E00", "#E69F00", "#CC79A7")[i % 3]
                if late
                else ("#0072B2", "#56B4E9", "#009E73")[i % 3],
                linestyle="--" if late else "-",
                marker="s" if late else "o",
                markersize=3.5,
                label=f"{feature['id']}: {tokens_in_words(feature['top'])}",
            )
        axis.set(title=NAMES[record["method"]], xlabel="block", ylim=(-0.02, 1.05))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=8)
    axes[0, 0].set_ylabel("mean activation / its largest over blocks")
    return figure


def tokens_in_words(tokens: Sequence[str]) -> str:
    """Tokens that any font and matplotlib's mathematics can show."""
    text = ", ".join(repr(token).encode("ascii", "backslashreplace").decode() for token in tokens)
    return (text if len(text) < 46 else text[:43] + "...").replace("$", r"\$")


def routers(runs: pd.DataFrame) -> Figure | None:
    """KL of every way to choose a layer at one sparsity: seeds, mean and 95 % interval."""
    tried = runs[runs["part"].isin(("core", "routers")) & runs["kl"].notna()]
    ours = tried[tried["part"] == "routers"]
    if ours.empty:
        return None
    k = ours["sparsity"].iloc[0]
    at_k = tried[(tried["sparsity"] == k) & (tried["kind"] == ours["kind"].iloc[0])]
    groups = sorted(at_k.groupby("method"), key=lambda item: -item[1]["kl"].mean())
    figure, axis = plt.subplots(figsize=(8.2, 0.36 * len(groups) + 1.2), layout="constrained")
    for row, (method, group) in enumerate(groups):
        color = STYLES[method][0] if method in STYLES else "#7F7F7F"
        mean, half = interval(group["kl"].astype(float).tolist())
        axis.errorbar(
            mean, row, xerr=0 if half != half else half, color=color, marker="|", markersize=12, capsize=3
        )
        axis.scatter(group["kl"], [row] * len(group), color=color, s=22, zorder=3)
    axis.set_yticks(range(len(groups)), [NAMES.get(method, method) for method, _ in groups])
    axis.set(xlabel=f"KL (nats/token), k = {k:g}; dots are seeds")
    axis.grid(axis="x", alpha=0.3)
    return figure


def fixed_layers(layers: pd.DataFrame, others: pd.DataFrame, sparsity: float) -> Figure | None:
    """KL of one TopK SAE per block beside the methods that choose (columns label, kl, half, color, line)."""
    if layers.empty:
        return None
    figure, axis = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
    means = [
        (layer, *interval(group["kl"].astype(float).tolist())) for layer, group in layers.groupby("layer")
    ]
    x, mean, half = zip(*means, strict=True)
    axis.errorbar(
        x,
        mean,
        yerr=[0 if h != h else h for h in half],
        color="black",
        marker="^",
        capsize=3,
        label="TopK on that block alone",
    )
    for i, row in enumerate(others.itertuples()):
        axis.axhline(row.kl, color=row.color, linestyle=row.line, label=f"{row.label}: {row.kl:.3f}")
        if row.half == row.half:
            at = max(x) + 0.05 * (max(x) - min(x)) * (1 + 0.5 * i)
            axis.errorbar(at, row.kl, yerr=row.half, color=row.color, capsize=3)
    axis.set(title=f"One block for all tokens, k = {sparsity:g}", xlabel="block", ylabel="KL (nats/token)")
    axis.set_xticks(x[:: 1 + len(x) // 12])  # (the intervals at the right belong to no block)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
