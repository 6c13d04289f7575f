"""The paper's claims and our own, each as a comparison and a rule. No verdict is written down anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
from paper_findings import EVALUATED, UNFINISHED
from paper_presets import NAMES, OWN, PARTS
from paper_verdicts import (
    NO_DIFFERENCE,
    NO_NUMBERS,
    NO_PAIRS,
    NOT_FAR,
    NOT_RUN,
    NOT_TESTABLE,
    OPPOSITE,
    REPRODUCED,
    Comparison,
    Differences,
    Rule,
    at_some_sparsity,
    equal_k,
    equal_l0,
    in_every_seed,
    in_the_majority,
    interval,
    nearly_equal,
    number,
    one,
    relative,
    slopes,
    with_best_block,
)


@dataclass(frozen=True)
class Claim:
    where: str
    text: str
    claimed: str
    compare: Callable[[pd.DataFrame], Comparison] | None = None
    sign: int = 1
    """+1: the difference is claimed to be positive."""
    rule: Rule = in_the_majority
    methods: tuple[str, ...] = ()
    """Those that are compared."""
    metric: str = ""
    """What they are compared in."""
    without_factor: Callable[[pd.DataFrame], Comparison] | None = None
    """The plain comparison, of a claim that says by what factor."""
    reason: str = ""
    """Why there is nothing to compare."""


def _claim(
    where: str,
    text: str,
    claimed: str,
    how: Callable[..., Comparison],
    *args: str,
    sign: int = 1,
    rule: Rule = in_the_majority,
    **options: float,
) -> Claim:
    plain = (lambda runs: how(runs, *args)) if "factor" in options else None
    return Claim(
        where, text, claimed, lambda runs: how(runs, *args, **options), sign, rule, args[:-1], args[-1], plain
    )


_JUDGE = "needs a judge (a language model or people)"
_FAR = "(far: twice as high)"
PAPER: tuple[Claim, ...] = (
    Claim(
        "fig. 1",
        "Low-level features peak in early layers, high-level ones in late layers",
        "an example of each",
        reason="which features are low-level needs a judge; the figure shows the features that peak first and last",
    ),
    _claim("fig. 4", "RouteSAE has a lower KL than TopK", "about 85 and under 150",
           equal_k, "route", "topk", "kl", sign=-1),
    _claim("fig. 4", "Random routing has a higher KL than TopK", "higher", equal_k, "random", "topk", "kl"),
    _claim("fig. 4", "Random routing has a higher KL than RouteSAE", "higher",
           equal_k, "random", "route", "kl"),
    _claim("fig. 4", f"ReLU has a far higher KL than TopK {_FAR}", "350-400 and under 150",
           equal_l0, "relu", "topk", "kl", factor=2.0),
    _claim("fig. 4", f"Gated has a far higher KL than TopK {_FAR}", "350-400 and under 150",
           equal_l0, "gated", "topk", "kl", factor=2.0),
    _claim("fig. 4", "ReLU's and Gated's frontiers are nearly identical", "identical",
           partial(relative, equal_l0), "relu", "gated", "kl", rule=nearly_equal),
    _claim("fig. 4", "ReLU's KL falls more steeply with L0 than TopK's", "400 to 350; minimal decrease",
           slopes, "relu", "topk", "kl", sign=-1),
    _claim("fig. 4", "Gated's KL falls more steeply with L0 than TopK's", "400 to 350; minimal decrease",
           slopes, "gated", "topk", "kl", sign=-1),
    _claim("fig. 5a", "A higher threshold leaves fewer features (RouteSAE)", "fewer",
           one, "route", "features_lost", rule=in_every_seed),
    Claim("fig. 5b", "A higher threshold gives better interpretation scores", "better", reason=_JUDGE),
    _claim("fig. 6", "RouteSAE extracts more features than TopK", "+22.5 % at k = 64",
           equal_k, "route", "topk", "features"),
    _claim("fig. 6", "RouteSAE extracts more features than ReLU", "over 4,000 and 1,000",
           equal_l0, "relu", "route", "features", sign=-1),
    _claim("fig. 6", "RouteSAE extracts more features than Gated", "over 4,000 and 1,000",
           equal_l0, "gated", "route", "features", sign=-1),
    _claim("fig. 6", "TopK extracts more features than ReLU", "over 3,000 and 1,000",
           equal_l0, "relu", "topk", "features", sign=-1),
    _claim("fig. 6", "Random routing sometimes extracts more features than RouteSAE", "sometimes",
           equal_k, "random", "route", "features", rule=at_some_sparsity),
    _claim("fig. 6", "Random's features fall faster with L0 than RouteSAE's", "faster",
           slopes, "random", "route", "features", sign=-1),
    _claim("fig. 6", "TopK's features fall faster with L0 than RouteSAE's", "faster",
           slopes, "topk", "route", "features", sign=-1),
    _claim("fig. 6", "Crosscoder extracts far fewer features than TopK (far: less than half)",
           "about 200 and 3,000", equal_k, "crosscoder_topk", "topk", "features", sign=-1, factor=0.5),
    Claim("fig. 7", "GPT-4o and people agree on categories and scores", "nearly identical", reason=_JUDGE),
    Claim("fig. 8", "RouteSAE has the highest interpretation scores", "above 4.4, +22.3 % at k = 64",
          reason=_JUDGE),
    Claim("fig. 8", "Random routing scores above TopK, ReLU, Gated, Crosscoder", "above", reason=_JUDGE),
    _claim("fig. 9a", "Layer weights in training: more on the outer thirds than on the middle third", "U-shaped",
           one, "route", "u_training", rule=in_every_seed),
    _claim("fig. 9a", "... and more at both ends, not at one alone", "U-shaped",
           one, "route", "both_ends_training", rule=in_every_seed),
    _claim("fig. 9b", "Layer weights at inference: more on the outer thirds than on the middle third", "U-shaped",
           one, "route", "u_inference", rule=in_every_seed),
    _claim("fig. 9b", "... and more at both ends, not at one alone", "U-shaped",
           one, "route", "both_ends_inference", rule=in_every_seed),
    Claim("fig. 10", "Setting a feature to 20 steers what the model says", "two examples",
          reason="two chosen examples; how well steering works needs a judge"),
    _claim("fig. 12", "TopK has a lower NormMSE than RouteSAE", "about 0.15 and 0.16",
           equal_k, "topk", "route", "norm_mse", sign=-1),
    _claim("fig. 12", "TopK has a lower NormMSE than Random", "about 0.15 and 0.25",
           equal_k, "topk", "random", "norm_mse", sign=-1),
    _claim("fig. 12", "ReLU has a higher NormMSE than TopK", "about 0.25 and 0.15",
           equal_l0, "relu", "topk", "norm_mse"),
    _claim("fig. 12", "Gated has a higher NormMSE than TopK", "about 0.25 and 0.15",
           equal_l0, "gated", "topk", "norm_mse"),
    _claim("fig. 12", "ReLU and Random have comparable NormMSE (within 25 %)", "about 0.25 both",
           partial(relative, equal_l0), "relu", "random", "norm_mse", rule=nearly_equal),
    _claim("fig. 12", "Gated and Random have comparable NormMSE (within 25 %)", "about 0.25 both",
           partial(relative, equal_l0), "gated", "random", "norm_mse", rule=nearly_equal),
    _claim("fig. 12", "RouteSAE has a lower NormMSE than Random (slightly behind TopK)", "0.16 and 0.25",
           equal_k, "route", "random", "norm_mse", sign=-1),
    _claim("fig. 12", "Crosscoder has a higher NormMSE than Random", "about 0.35 and 0.25",
           equal_k, "crosscoder_topk", "random", "norm_mse"),
    _claim("fig. 12", "Crosscoder has a higher NormMSE than RouteSAE", "about 0.35 and 0.16",
           equal_k, "crosscoder_topk", "route", "norm_mse"),
    _claim("table 2", "Sum pooling has a lower KL than attention", "81 and 114 (k = 64)",
           equal_k, "route", "route_attention", "kl", sign=-1),
    _claim("table 2", "Sum pooling has a lower NormMSE than attention", "0.158 and 0.177 (k = 64)",
           equal_k, "route", "route_attention", "norm_mse", sign=-1),
    _claim("table 2", "Sum pooling extracts more features than attention", "4,194 and 320 (k = 64)",
           equal_k, "route", "route_attention", "features"),
    Claim("table 2", "Sum pooling scores above attention", "4.49 and 3.77 (k = 64)", reason=_JUDGE),
    _claim("table 3", "Soft routing has a lower NormMSE than hard routing", "0.113 and 0.158 (k = 64)",
           equal_k, "route_soft", "route", "norm_mse", sign=-1),
    _claim("table 3", "Soft routing has a higher KL than hard routing", "147 and 81 (k = 64)",
           equal_k, "route_soft", "route", "kl"),
    _claim("table 3", "Soft routing extracts far fewer features (far: less than half)", "5 and 4,194 (k = 64)",
           equal_k, "route_soft", "route", "features", sign=-1, factor=0.5),
)  # fmt: skip
OURS: tuple[Claim, ...] = (
    *(_claim(
        OWN,
        f"{NAMES[own]} {'has' if metric != 'features' else 'extracts'} {words} than {NAMES[other]}",
        "(own question)", equal_k, own, other, metric, sign=sign,
    )
    for own in ("distilled", "distilled_mean")
    for metric, words, sign, others in (
        ("kl", "a lower KL", -1, ("route", "topk", "random")),
        ("loss_recovered", "more loss recovered", 1, ("route", "topk", "random")),
        ("norm_mse", "a lower NormMSE", -1, ("route", "random")),
        ("features", "more features", 1, ("route", "topk", "random")),
        ("effective_layers", "more layers in use (collapse)", 1, ("route",)),
    )
    for other in others),
    *(_claim(
        OWN,
        f"{NAMES[own]} {words} than a TopK SAE on the best block for all tokens (the one of least mean KL)",
        "(own question)", equal_k, own, "topk@best", metric, sign=sign,
    )
    for own in ("distilled", "distilled_mean")
    for metric, words, sign in (("kl", "has a lower KL", -1), ("features", "extracts more features", 1))),
    _claim(OWN, "The oracle has a lower KL than the distilled router (mean)", "(own question)",
           equal_k, "oracle", "distilled_mean", "kl", sign=-1),
)  # fmt: skip

RULES: dict[Rule, str] = {
    in_the_majority: "the interval excludes 0 at more than half of the sparsities",
    at_some_sparsity: "the interval excludes 0 at one sparsity or more",
    in_every_seed: "the sign holds at every sparsity in every seed",
    nearly_equal: "the interval of the relative difference is within ± 25 % at more than half of the sparsities",
}


def spread(differences: Differences) -> str:
    """Mean difference and 95 % interval by sparsity, in words."""
    parts = []
    for label, values in differences.items():
        if len(values):
            mean, half = interval(values)
            error = "" if math.isnan(half) else f" ± {number(half)}"
            parts.append(f"{label}: {'+' if mean > 0 else ''}{number(mean)}{error} (n {len(values)})")
    return "; ".join(parts)


COLUMNS = ["where", "claim", "claimed", "measured", "spread", "verdict", "rule", "needs"]
"""Of the table of claims; ``needs`` names the parts to run where a claim is not run."""
PART_OF = {method: part for part, methods in PARTS.items() for method in methods} | {"topk@best": "layers"}


def _lacking(runs: pd.DataFrame, claim: Claim, part_of: Mapping[str, str]) -> tuple[str, str]:
    """Why a claim has no differences: the verdict, and the parts to run (again)."""
    measured_with = {
        "features": "features",
        "features_lost": "features",
        "effective_layers": "effective_layers",
    }
    shape = claim.metric.startswith(("u_", "both_ends_"))
    column = "effective_layers" if shape else measured_with.get(claim.metric, "kl")
    parts, without_numbers = [], False
    for method in claim.methods:
        rows = runs[runs["method"] == method]
        if column in rows and rows[column].notna().any():
            continue
        status = rows["status"] if "status" in rows else pd.Series(EVALUATED, rows.index)
        if len(rows) and not status.isin([EVALUATED, *UNFINISHED]).any():
            without_numbers = True  # and running it again would change nothing
        else:
            parts.append(part_of[method])
    if parts:
        return NOT_RUN, " ".join(part for part in dict.fromkeys(part_of.values()) if part in parts)
    return NO_NUMBERS if without_numbers else NO_PAIRS, ""


def judge(
    runs: pd.DataFrame,
    claims: Sequence[Claim] = PAPER + OURS,
    *,
    rules: Mapping[Rule, str] = RULES,
    part_of: Mapping[str, str] = PART_OF,
) -> pd.DataFrame:
    """One row per claim, with :data:`COLUMNS`; ``rules`` in words, ``part_of`` each method, in the parts' order."""
    rows, runs = [], with_best_block(runs)
    for claim in claims:
        if claim.compare is None:
            rows.append(
                (claim.where, claim.text, claim.claimed, "", "", f"{NOT_TESTABLE}: {claim.reason}", "", "")
            )
            continue
        comparison = claim.compare(runs)
        verdict = claim.rule(comparison.differences, claim.sign)
        if claim.without_factor and verdict in (OPPOSITE, NO_DIFFERENCE):
            # (below the factor is not yet the opposite)
            verdict = claim.rule(claim.without_factor(runs).differences, claim.sign)
            verdict = NOT_FAR if verdict == REPRODUCED else verdict
        verdict, needs = _lacking(runs, claim, part_of) if verdict == NOT_RUN else (verdict, "")
        rows.append(
            (
                claim.where,
                claim.text,
                claim.claimed,
                comparison.measured,
                spread(comparison.differences),
                verdict,
                rules[claim.rule],
                needs,
            )
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def count_parameters(d_model: int, d_sae: int, n_layers: int) -> dict[str, int]:
    """Parameters of a TopK SAE, a RouteSAE and a Crosscoder of the same width (with their biases)."""
    topk = 2 * d_model * d_sae + d_sae + d_model
    return {
        "topk": topk,
        "route": topk + n_layers * d_model,
        "crosscoder": 2 * n_layers * d_model * d_sae + d_sae + n_layers * d_model,
    }


def parameter_claims(d_model: int, d_sae: int, n_layers: int) -> pd.DataFrame:
    """The two claims about size, which are arithmetic: no seeds, no spread."""
    sizes = count_parameters(d_model, d_sae, n_layers)
    overhead, factor = sizes["route"] / sizes["topk"] - 1, sizes["crosscoder"] / sizes["topk"]
    rows = [
        ("section 2.2", "RouteSAE adds hardly any parameters to TopK (hardly: under 1 %)", "minimal",
         f"{sizes['route']:,} and {sizes['topk']:,}: +{overhead:.2%}", "",
         REPRODUCED if overhead < 0.01 else "not reproduced", "counted", ""),
        ("section 1", "Crosscoder has about L times the parameters of TopK (about: within 5 %)", f"{n_layers} x",
         f"{sizes['crosscoder']:,} and {sizes['topk']:,}: {factor:.2f} x", "",
         REPRODUCED if abs(factor / n_layers - 1) < 0.05 else "not reproduced", "counted", ""),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)
