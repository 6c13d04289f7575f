"""From numbers to verdicts: comparisons make differences, rules judge them.

Everything here reads one table, ``runs``: a row per trained SAE with its ``method``, ``kind`` and ``sparsity``
(k or a coefficient), ``seed`` and what was measured. A comparison makes differences *within a seed* and keeps
them by sparsity; a rule turns them into a verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from paper_presets import NAMES
from scipy import stats

REPRODUCED = "reproduced"
OPPOSITE = "not reproduced: opposite"
NO_DIFFERENCE = "not reproduced: no difference"
NOT_FAR = "not reproduced: the direction holds, but not by so much"
ONE_SEED = "one seed, no verdict"
NOT_RUN = "not run"
NO_PAIRS = "no verdict: nothing to compare"
"""Both methods were run, but share no sparsity or range of L0, or have too few for a slope."""
NO_NUMBERS = "no verdict: trained, but without numbers"
"""All SAEs of a method diverged, or their KL is not finite."""
NOT_TESTABLE = "not testable here"

Differences = Mapping[str, Sequence[float]]
"""By sparsity ("k 14"), one difference for each seed."""

Rule = Callable[[Differences, int], str]
"""From differences, and the sign that is claimed, to a verdict."""


class Comparison(NamedTuple):
    differences: Differences
    measured: str
    """The two means in words."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (t distribution); NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


# --- Rules ------------------------------------------------------------------------------------------------


def _with_several_seeds(differences: Differences) -> tuple[list[tuple[float, float]], str | None]:
    """The intervals, or the verdict where there can be none."""
    filled = [list(values) for values in differences.values() if len(values)]
    if not filled:
        return [], NOT_RUN
    intervals = [interval(values) for values in filled if len(values) > 1]
    return intervals, None if intervals else ONE_SEED


def in_the_majority(differences: Differences, sign: int) -> str:
    """Reproduced (opposite) where at more than half of the sparsities the interval lies on the claimed (other)
    side of 0; else no difference."""
    intervals, none = _with_several_seeds(differences)
    if none:
        return none
    toward = sum(sign * mean > half for mean, half in intervals)
    against = sum(-sign * mean > half for mean, half in intervals)
    if 2 * toward > len(intervals):
        return REPRODUCED
    return OPPOSITE if 2 * against > len(intervals) else NO_DIFFERENCE


def at_some_sparsity(differences: Differences, sign: int) -> str:
    """Reproduced where the interval lies on the claimed side of 0 at one sparsity or more."""
    intervals, none = _with_several_seeds(differences)
    if none:
        return none
    if any(sign * mean > half for mean, half in intervals):
        return REPRODUCED
    return OPPOSITE if all(-sign * mean > half for mean, half in intervals) else NO_DIFFERENCE


def in_every_seed(differences: Differences, sign: int) -> str:
    """Reproduced (opposite) where each single value, of every sparsity and seed, is on the claimed (other) side."""
    _, none = _with_several_seeds(differences)
    if none:
        return none
    values = [sign * value for group in differences.values() for value in group]
    if all(value > 0 for value in values):
        return REPRODUCED
    return OPPOSITE if all(value < 0 for value in values) else NO_DIFFERENCE


NEAR = 0.25
"""Relative difference that still counts as "comparable"."""


def nearly_equal(differences: Differences, sign: int, near: float = NEAR) -> str:
    """Reproduced where the interval of a relative difference lies within ± ``near`` (25 %) at more than half of the
    sparsities; opposite where it lies outside altogether at more than half."""
    intervals, none = _with_several_seeds(differences)
    if none:
        return none
    within = sum(abs(mean) + half < near for mean, half in intervals)
    outside = sum(abs(mean) - half > near for mean, half in intervals)
    if 2 * within > len(intervals):
        return REPRODUCED
    return OPPOSITE if 2 * outside > len(intervals) else NO_DIFFERENCE.replace("no difference", "undecided")


# --- Comparisons ------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Four significant digits, without an exponent."""
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 1000 or value == 0 else 3 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(digits, 0), 4)}f}" if not float(value).is_integer() else f"{value:,.0f}"


def _values(runs: pd.DataFrame, method: str, metric: str) -> pd.DataFrame:
    """Columns sparsity, seed, kind, l0, value; no row where the value is missing."""
    columns = ["sparsity", "seed", "kind", "l0"]
    if metric not in runs:
        return pd.DataFrame(columns=[*columns, "value"])
    found = runs.loc[runs["method"] == method, [*columns, metric]].rename(columns={metric: "value"})
    return found.drop_duplicates(["sparsity", "seed"]).dropna(subset=["value"]).astype({"value": float})


def with_best_block(runs: pd.DataFrame) -> pd.DataFrame:
    """``runs`` and, as a method ``topk@best``, those of the block whose TopK SAEs have the least mean KL at a sparsity.

    It is chosen by the same KL that it is compared in, which makes this an opponent better than its due.
    """
    blocks = runs[runs["method"].str.startswith("topk@") & runs["kl"].notna()]
    best = []
    for _, group in blocks.groupby(["kind", "sparsity"]):
        method = group.astype({"kl": float}).groupby("method")["kl"].mean().idxmin()
        best.append(group[group["method"] == method].assign(method="topk@best"))
    return pd.concat([runs, *best], ignore_index=True)


def _label(kind: str, sparsity: float) -> str:
    return f"{kind} {sparsity:g}"


def _grouped(rows: pd.DataFrame) -> dict[str, list[float]]:
    """``difference`` by sparsity, in order."""
    return {
        _label(kind, sparsity): group["difference"].tolist()
        for (kind, sparsity), group in rows.sort_values("sparsity").groupby(["kind", "sparsity"], sort=False)
    }


def equal_k(runs: pd.DataFrame, a: str, b: str, metric: str, factor: float = 1.0) -> Comparison:
    """``a - factor * b`` at equal k and seed."""
    both = _values(runs, a, metric).merge(
        _values(runs, b, metric), on=["kind", "sparsity", "seed"], suffixes=("_a", "_b")
    )
    both["difference"] = both["value_a"] - factor * both["value_b"]
    return Comparison(_grouped(both), _means(both, a, b))


def equal_l0(runs: pd.DataFrame, a: str, b: str, metric: str, factor: float = 1.0) -> Comparison:
    """``a - factor * b`` where a's sparsity is a coefficient: b at a's L0, interpolated over ln L0 in the same seed.

    SAEs of ``a`` whose L0 lies outside the range of b's are left out, and counted in ``measured``.
    """
    ours, theirs = _values(runs, a, metric), _values(runs, b, metric)
    rows, outside = [], 0
    for row in ours.itertuples():
        frontier = theirs[theirs["seed"] == row.seed].sort_values("l0")
        if frontier.empty:
            continue
        # (a TopK SAE that hardly trains may sit a hair beside its k)
        if not 0.98 * frontier["l0"].min() <= row.l0 <= 1.02 * frontier["l0"].max():
            outside += 1
            continue
        at = float(np.interp(math.log(row.l0), np.log(frontier["l0"].astype(float)), frontier["value"]))
        rows.append((row.kind, row.sparsity, row.seed, row.value, at))
    both = pd.DataFrame(rows, columns=["kind", "sparsity", "seed", "value_a", "value_b"])
    both["difference"] = both["value_a"] - factor * both["value_b"]
    left_out = f"{outside} of {outside + len(rows)} SAEs left out: L0 outside the other's range"
    measured = [words for words in (_means(both, a, b), left_out if outside else "") if words]
    return Comparison(_grouped(both), "; ".join(measured))


def relative(
    comparison: Callable[[pd.DataFrame, str, str, str], Comparison],
    runs: pd.DataFrame,
    a: str,
    b: str,
    metric: str,
) -> Comparison:
    """``a / b - 1`` in place of ``a - b``: the same comparison of logarithms."""
    logs = runs.assign(**{metric: np.log(runs[metric].astype(float).where(runs[metric] > 0))})
    differences = comparison(logs, a, b, metric).differences
    as_ratio = {label: [math.expm1(v) for v in values] for label, values in differences.items()}
    return Comparison(as_ratio, comparison(runs, a, b, metric).measured)


def slopes(runs: pd.DataFrame, a: str, b: str, metric: str) -> Comparison:
    """Slope over ln L0 of ``a`` minus that of ``b``, in each seed that has two sparsities or more of both."""
    by_method = [_slope_by_seed(_values(runs, method, metric)) for method in (a, b)]
    seeds = [seed for seed in by_method[0] if seed in by_method[1]]
    pairs = [(by_method[0][seed], by_method[1][seed]) for seed in seeds]
    measured = ""
    if pairs:
        means = [number(statistics.fmean(side)) for side in zip(*pairs, strict=True)]
        measured = f"{_named(a)} {means[0]}, {_named(b)} {means[1]} per unit of ln L0"
    return Comparison({"slope": [x - y for x, y in pairs]}, measured)


def _slope_by_seed(values: pd.DataFrame) -> dict[int, float]:
    found = {}
    for seed, rows in values.groupby("seed"):
        x = np.log(rows["l0"].astype(float).clip(lower=1e-9))
        if len(rows) > 1 and np.ptp(x) > 0:
            found[seed] = float(np.polyfit(x, rows["value"], 1)[0])
    return found


def one(runs: pd.DataFrame, a: str, metric: str) -> Comparison:
    """A quantity that is itself a difference, of every SAE of one method."""
    rows = _values(runs, a, metric).rename(columns={"value": "difference"})
    measured = f"{_named(a)} {number(rows['difference'].mean())}" if len(rows) else ""
    return Comparison(_grouped(rows), measured)


def _named(method: str) -> str:
    """Methods of other studies are called what they are called in their table."""
    return NAMES.get(method, method)


def _means(both: pd.DataFrame, a: str, b: str) -> str:
    if both.empty:
        return ""
    ours, theirs = both["value_a"].mean(), both["value_b"].mean()
    percent = f" ({ours / theirs - 1:+.1%})" if theirs > 0 else ""
    return f"{_named(a)} {number(ours)}, {_named(b)} {number(theirs)}{percent}"
