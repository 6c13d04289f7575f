"""The rules by which Llama Scope's claims are judged from the numbers; they were fixed before the run.

Differences are taken within a seed; a verdict needs two seeds or more and the 95 % interval of their mean
(t distribution). Where a claim is about SAEs that were trained with one seed, the number is shown without a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from paper_verdicts import NO_DIFFERENCE, NOT_RUN, ONE_SEED, OPPOSITE, REPRODUCED, interval, number

NOT_ALL = "not reproduced: not with every seed"
UNEQUAL = "not reproduced: they differ"
WIDE = "no verdict: the interval is too wide"
SILENT = 0.10
"""Section 4.4: about a tenth of the latents may be silent."""
EQUAL = 0.02
CLOSE = 0.10
"""A run has converged where its loss is within a tenth of the last."""
RUNNING = 5
"""Log lines whose median counts as the loss of the moment: a single token of a hundredfold norm, as some texts have,
multiplies the loss of its batch."""
LAST = 0.10
"""Share of a run over which the median of the training loss is its final loss."""

RULES = {
    "alive": f"reproduced: in every annealed run at most {SILENT:.0%} of the latents are silent at any time (no firing "
    "over the window given above; judged from its first end on). Not reproduced otherwise",
    "less": "reproduced: the 95 % interval of the difference within a seed is below 0; above: opposite; else no "
    "difference",
    "more": "reproduced: the 95 % interval of the difference within a seed is above 0; below: opposite; else no "
    "difference",
    "equal": f"reproduced: the 95 % interval of the relative difference within a seed lies within ±{EQUAL:.0%}; they "
    "differ: it lies outside; else no verdict",
    "limit": f"reproduced: with every seed at most {SILENT:.0%} of the latents fire on none of the tokens, and at most "
    "2 % on more than a tenth of them. Not reproduced otherwise",
    "no worse": "reproduced: the 95 % interval of the relative difference within a seed lies below +10 %; opposite: it "
    "lies above; else no verdict",
}


@dataclass(frozen=True)
class Claim:
    where: str
    claim: str
    claimed: str
    measured: str
    difference: str
    rule: str
    verdict: str


# --- Curves -------------------------------------------------------------------------------------------


def summary(curve: pd.DataFrame, window: int) -> dict[str, float]:
    """Of one run (columns step, share, loss, silent, k): how many latents stay silent, and the last loss.

    ``window``: steps before which no latent can count as silent.
    """
    counted = curve[curve["step"] > window]
    return {
        "largest_silent": float(counted["silent"].max()),
        "last_silent": float(curve["silent"].iloc[-1]),
        "awake_from": awake_from(counted),
        "final_loss": final_loss(curve),
    }


def final_loss(curve: pd.DataFrame) -> float:
    return float(curve.loc[curve["share"] > 1 - LAST, "loss"].median())


def awake_from(curve: pd.DataFrame) -> float:
    """Share of the run after which no more than :data:`SILENT` of the latents are silent, for good.

    0 where that is so from the first line on, 1 where it never is.
    """
    bad = curve["silent"].to_numpy() > SILENT
    if not bad.any():
        return 0.0
    last = int(bad.nonzero()[0][-1])
    return 1.0 if last + 1 == len(curve) else float(curve["share"].iloc[last + 1])


def reaches(curve: pd.DataFrame, target: float, start: int) -> float:
    """Share of the run at which the running median of the loss first is at most ``target``; 1 where it never is.

    Steps before ``start`` do not count: while k is annealed, more latents make the loss smaller.
    """
    running = curve["loss"].rolling(RUNNING, min_periods=1).median()
    there = curve[(running <= target) & (curve["step"] >= start)]
    return float(there["share"].iloc[0]) if len(there) else 1.0


def convergence(annealed: pd.DataFrame, fixed: pd.DataFrame) -> dict[str, float]:
    """When two runs of one seed come within a tenth of the larger of their final losses, and how their losses
    compare.

    Both are judged from the end of the annealing on. ``ratio`` is the median of the annealed run's loss over the
    other's on the same batch, minus 1.
    """
    last = max(final_loss(annealed), final_loss(fixed))
    k = annealed["k"]
    ends = int(annealed.loc[k == k.iloc[-1], "step"].min())
    both = annealed.merge(fixed, on="step", suffixes=("", "_fixed"))
    both = both[both["step"] >= ends]
    return {
        "annealed": reaches(annealed, (1 + CLOSE) * last, ends),
        "fixed": reaches(fixed, (1 + CLOSE) * last, ends),
        "ratio": float((both["loss"] / both["loss_fixed"]).median()) - 1,
        "first_ratio": float((both["loss"] / both["loss_fixed"]).iloc[0]) - 1,
    }


# --- Rules --------------------------------------------------------------------------------------------


def signed(differences: Sequence[float], sign: int) -> str:
    """On which side of 0 the 95 % interval of the mean lies."""
    if len(differences) < 2:
        return ONE_SEED if differences else NOT_RUN
    mean, half = interval(differences)
    if abs(mean) <= half:
        return NO_DIFFERENCE
    return REPRODUCED if mean * sign > 0 else OPPOSITE


def within(differences: Sequence[float], low: float, high: float, outside: str) -> str:
    """Whether the 95 % interval of the mean lies between two limits, or outside them."""
    if len(differences) < 2:
        return ONE_SEED if differences else NOT_RUN
    mean, half = interval(differences)
    if low <= mean - half and mean + half <= high:
        return REPRODUCED
    return outside if mean - half > high or mean + half < low else WIDE


def every(holds: Sequence[bool]) -> str:
    if len(holds) < 2:
        return ONE_SEED if holds else NOT_RUN
    return REPRODUCED if all(holds) else NOT_ALL


def spread(values: Sequence[float], percent: bool = False) -> str:
    """Mean ± half of the 95 % interval, and the number of values."""
    if not values:
        return ""
    mean, half = interval(values)
    shown = (lambda x: f"{x:.1%}") if percent else number
    return shown(mean) + ("" if math.isnan(half) else f" ± {shown(half)}") + f" (n = {len(values)})"


def ranged(values: Sequence[float], percent: bool = False) -> str:
    """Mean and range over seeds."""
    if not values:
        return "–"
    shown = (lambda x: f"{x:.1%}") if percent else number
    mean = sum(values) / len(values)
    return shown(mean) + (f" ({shown(min(values))} to {shown(max(values))})" if len(values) > 1 else "")
