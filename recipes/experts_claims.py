"""The Scale SAE paper's claims, each as a comparison and a rule (``paper_verdicts.py``). No verdict is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from experts_methods import Kind
from paper_claims import RULES as PAPER_RULES
from paper_claims import Claim, judge
from paper_presets import OWN
from paper_verdicts import (
    OPPOSITE,
    REPRODUCED,
    Comparison,
    Differences,
    Rule,
    equal_k,
    equal_l0,
    in_every_seed,
    in_the_majority,
    nearly_equal,
    number,
    one,
    relative,
)

TOPK, GATED, BEST = "TopK", "Gated", "best of TopK and Switch"
CLOSE = 0.10
"""Relative difference of curves that still counts as "tightly clustered", and of MSE as marginal."""
NO_COPIES = "no verdict: neither has near copies"
"""There is nothing to reduce; a difference of 0 is no evidence against the claim."""
HALVED = 16
"""The L0 at which the paper's figure 8b has redundancy more than halved."""


def no_better(differences: Differences, sign: int) -> str:
    """Reproduced unless at more than half of the sparsities the interval lies on the other side of 0: a claim that
    something does *not* help."""
    verdict = in_the_majority(differences, sign)
    return verdict if verdict == OPPOSITE or verdict.startswith(("one seed", "not run")) else REPRODUCED


def close(differences: Differences, sign: int) -> str:
    """:func:`paper_verdicts.nearly_equal` within a tenth."""
    return nearly_equal(differences, sign, CLOSE)


RULES: dict[Rule, str] = {
    in_the_majority: PAPER_RULES[in_the_majority],
    in_every_seed: PAPER_RULES[in_every_seed],
    no_better: "the interval lies on the other side of 0 at no more than half of the sparsities (claims that something "
    "is not better)",
    close: f"the interval of the relative difference is within ± {CLOSE:.0%} at more than half of the sparsities",
}  # fmt: skip


# --- Comparisons ----------------------------------------------------------------------------------------


def with_best_baseline(runs: pd.DataFrame, switch: str) -> pd.DataFrame:
    """``runs`` and, as a method :data:`BEST`, TopK's or Switch's SAEs, whichever have the lower mean MSE at a k.

    (Gated has no k: it is compared at equal L0.)
    """
    some = runs[runs["method"].isin([TOPK, switch]) & runs["mse"].notna()]
    best = []
    for _, group in some.groupby(["kind", "sparsity"]):
        lowest = group.astype({"mse": float}).groupby("method")["mse"].mean().idxmin()
        best.append(group[group["method"] == lowest].assign(method=BEST))
    return pd.concat([runs, *best], ignore_index=True) if best else runs


def at_k(
    compare: Callable[..., Comparison],
    keep: Callable[[float], bool],
    runs: pd.DataFrame,
    *args: Any,
    **options: Any,
) -> Comparison:
    """A comparison over some k alone."""
    return compare(runs[runs["sparsity"].map(keep)], *args, **options)


def trend(runs: pd.DataFrame, labels: Mapping[int, str], metric: str) -> Comparison:
    """Slope of a metric over log2 e, in each seed and at each k with two e or more."""
    by_label = {label: e for e, label in labels.items()}
    rows = runs[runs["method"].isin(by_label) & runs[metric].notna()]
    differences: dict[str, list[float]] = {}
    for (sparsity, _), group in rows.groupby(["sparsity", "seed"]):
        x = np.log2(group["method"].map(by_label).astype(float))
        if x.nunique() > 1:
            slope = float(np.polyfit(x, group[metric].astype(float), 1)[0])
            differences.setdefault(f"k {sparsity:g}", []).append(slope)
    means = rows.groupby("method")[metric].mean()
    measured = ", ".join(
        f"e = {e}: {number(float(means[label]))}" for e, label in labels.items() if label in means
    )
    return Comparison(differences, measured)


# --- Claims ---------------------------------------------------------------------------------------------


def claims_of(kinds: Mapping[str, Kind], k: Sequence[int]) -> list[Claim]:
    """Those that the SAEs of a run can be asked about."""
    scaled, plain = by_e(kinds, "mean"), by_e(kinds, "none")
    switch = plain.get(1, "")
    several = [e for e in scaled if e >= 2]
    ask = _Ask()
    for e in several:
        if switch:
            ask("abstract", f"{scaled[e]}: 24 % less error than other MoE SAEs (Switch)", "-24 %",
                equal_k, scaled[e], switch, "mse", sign=-1, factor=0.76)  # fmt: skip
    for e in several:
        ask("fig. 3a", f"{scaled[e]}: 37 % lower MSE than the next best at L0 of 32 and more", "-37 % to -43 %",
            partial(at_k, equal_k, lambda one: one >= 32), scaled[e], BEST, "mse", sign=-1, factor=0.63)  # fmt: skip
    for e in several:
        ask("fig. 3a", f"Gated has a higher MSE than {scaled[e]}", "higher",
            equal_l0, GATED, scaled[e], "mse")  # fmt: skip
    if switch:
        ask("fig. 3a", "Switch has no lower MSE than TopK of equal FLOPs", "not lower",
            equal_k, switch, TOPK, "mse", rule=no_better)  # fmt: skip
        ask("fig. 3c", "Switch recovers no more loss than TopK of equal FLOPs", "not more",
            equal_k, switch, TOPK, "loss_recovered", sign=-1, rule=no_better)  # fmt: skip
    for e in several:
        ask("fig. 3c", f"{scaled[e]} recovers more loss than TopK from an L0 of 8 on", "more",
            equal_k, scaled[e], TOPK, "loss_recovered")  # fmt: skip
    ask("fig. 3c", "Gated recovers less loss than TopK", "the least of all",
        equal_l0, GATED, TOPK, "loss_recovered", sign=-1)  # fmt: skip
    for labels in (scaled, plain):
        for e in (e for e in labels if e >= 2 and 1 in labels):
            ask("fig. 4a", f"{labels[e]} has a lower MSE than e = 1", "lower",
                equal_k, labels[e], labels[1], "mse", sign=-1)  # fmt: skip
    for e in (e for e in several if e > 2 and 2 in several):
        ask("fig. 4a", f"e >= 2 suffices: {scaled[e]} has nearly the MSE of e = 2 (within {CLOSE:.0%})", "clustered",
            partial(relative, equal_k), scaled[e], scaled[2], "mse", rule=close)  # fmt: skip
    both = [e for e in scaled if e in plain]
    for e in both:
        ask("fig. 5", f"Feature scaling lowers the MSE, e = {e}", "lower",
            equal_k, scaled[e], plain[e], "mse", sign=-1)  # fmt: skip
    for e in both:
        ask("fig. 5", f"Feature scaling raises the loss recovered, e = {e}", "higher",
            equal_k, scaled[e], plain[e], "loss_recovered")  # fmt: skip
    for e in scaled:
        ask(
            "section 2.2.2", f"ω ends above 0, e = {e}", "always", one, scaled[e], "omega", rule=in_every_seed
        )
    if len(scaled) > 1:
        ask.trend("fig. 2", "ω grows with e (per doubling of e)", "grows", scaled, "omega")
    for e in (e for e in plain if e >= 2 and switch):
        ask("fig. 8a", f"Fewer redundant features than e = 1: {plain[e]}", "significantly fewer",
            equal_k, plain[e], switch, "redundancy", sign=-1)  # fmt: skip
    for e in several:
        if switch:
            ask("abstract", f"{scaled[e]}: 99 % fewer redundant features than other MoE SAEs (Switch)", "-99 %",
                equal_k, scaled[e], switch, "redundancy", sign=-1, factor=0.01)  # fmt: skip
    for e in both:
        ask("fig. 8b", f"Feature scaling leaves fewer redundant features, e = {e}", "fewer",
            equal_k, scaled[e], plain[e], "redundancy", sign=-1)  # fmt: skip
    for e in both if HALVED in k else []:
        ask("fig. 8b", f"... fewer than half as many at an L0 of {HALVED}, e = {e}", "over 50 % fewer",
            partial(at_k, equal_k, lambda one: one == HALVED), scaled[e], plain[e], "redundancy", sign=-1,
            factor=0.5)  # fmt: skip
    for e in (e for e in plain if e >= 2):
        ask("fig. 6a", f"More similar within an expert than between experts: {plain[e]}", "high and low",
            one, plain[e], "intra_minus_inter", rule=in_every_seed)  # fmt: skip
    for e in (e for e in plain if e >= 2 and switch):
        ask("fig. 6a", f"Less similar between experts than e = 1: {plain[e]}", "lower",
            equal_k, plain[e], switch, "inter_mean", sign=-1)  # fmt: skip
    for e in several:
        if 1 in scaled:
            ask("fig. 6b", f"Verbs use fewer experts than with e = 1 (area under the CDF): {scaled[e]}", "steeper",
                equal_k, scaled[e], scaled[1], "area_verbs")  # fmt: skip
    for e in both:
        word, sign = ("raises", 1) if e == 1 else ("lowers", -1)
        ask("fig. 7a", f"Feature scaling {word} the activation similarity of verbs, e = {e}",
            "higher" if e == 1 else "-6 % on average", equal_k, scaled[e], plain[e], "similarity_verbs",
            sign=sign)  # fmt: skip
    for e in (e for e in plain if e >= 2 and switch):
        ask("fig. 7b", f"Without scaling e = 1 has a lower activation similarity than {plain[e]}", "lower",
            equal_k, switch, plain[e], "similarity_verbs", sign=-1)  # fmt: skip
    _appendix(ask, kinds)
    return [*ask.claims, *_NOT_HERE]


def by_e(kinds: Mapping[str, Kind], scaling: str) -> dict[int, str]:
    """Labels of the FLOP-matched mixtures, by e."""
    return {
        kind.active: label
        for label, kind in kinds.items()
        if kind.scaling == scaling and "expert_weights" not in kind.given
    }


def _appendix(ask: _Ask, kinds: Mapping[str, Kind]) -> None:
    for e, identity in by_e(kinds, "identity").items():
        mean, learned = by_e(kinds, "mean").get(e), by_e(kinds, "learned").get(e)
        for other in (mean, learned):
            if other:
                ask("fig. 10", f"The identity as low-pass part has a higher MSE than {other}", "significantly higher",
                    equal_k, identity, other, "mse")  # fmt: skip
        if mean and learned:
            ask("fig. 10", f"A learned low-pass part has nearly the mean's MSE (within {CLOSE:.0%})", "marginal",
                partial(relative, equal_k), learned, mean, "mse", rule=close)  # fmt: skip
    for label, kind in kinds.items():
        mean = by_e(kinds, "mean").get(kind.active)
        if "expert_weights" in kind.given and mean:
            ask(OWN, f"The authors' weights (a second softmax) have a lower MSE than the paper's, e = {kind.active}",
                "(own question)", equal_k, label, mean, "mse", sign=-1)  # fmt: skip


class _Ask:
    """Collects claims."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []

    def __call__(
        self, where: str, text: str, claimed: str, how: Callable[..., Comparison], *args: str, sign: int = 1,
        rule: Rule = in_the_majority, **options: float,
    ) -> None:  # fmt: skip
        plain = (lambda runs: how(runs, *args)) if "factor" in options else None
        self.claims.append(
            Claim(
                where,
                text,
                claimed,
                lambda runs: how(runs, *args, **options),
                sign,
                rule,
                args[:-1],
                args[-1],
                plain,
            )
        )

    def trend(self, where: str, text: str, claimed: str, labels: Mapping[int, str], metric: str) -> None:
        self.claims.append(
            Claim(where, text, claimed, lambda runs: trend(runs, labels, metric), 1, in_the_majority,
                  tuple(labels.values()), metric)
        )  # fmt: skip


_NOT_HERE = (
    Claim("fig. 3b", "The same on questions of another domain (HLE-Biomedical)", "lower MSE",
          reason="that text does not ship; --eval-dataset takes any other"),
    Claim("fig. 3d", "Scale has the best automatic interpretation scores", "best",
          reason="needs a judge (a language model or people)"),
    Claim("fig. 5b", "e = 16 fails at low L0 without feature scaling", "-10.9 % MSE with it",
          reason="not trained by default; --experts 1,2,4,8,16 adds the rows of e = 16"),
)  # fmt: skip


def judged(runs: pd.DataFrame, kinds: Mapping[str, Kind], k: Sequence[int], part: str) -> pd.DataFrame:
    """A row per claim, with ``paper_claims.COLUMNS``; ``part`` is the one to run where nothing was."""
    with_best = with_best_baseline(runs, by_e(kinds, "none").get(1, ""))
    claims = claims_of(kinds, k)
    table = judge(with_best, claims, rules=RULES, part_of=dict.fromkeys([*kinds, BEST], part))
    for i, claim in enumerate(claims):
        if claim.metric == "redundancy":
            values = runs.loc[runs["method"].isin(claim.methods), "redundancy"].astype(float)
            if (values == 0).all() and len(values):
                table.loc[i, "verdict"] = NO_COPIES
    return table
