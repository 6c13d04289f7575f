"""The claims of Llama Scope's paper, from the numbers of the recipe's parts (rules: ``llama_scope_verdicts.py``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from llama_scope_verdicts import (
    CLOSE,
    EQUAL,
    RULES,
    SILENT,
    UNEQUAL,
    Claim,
    convergence,
    every,
    ranged,
    signed,
    spread,
    summary,
    within,
)
from paper_verdicts import ONE_SEED, OPPOSITE, number


def annealing_claims(
    curves: Mapping[str, pd.DataFrame], window: int, final: Mapping[str, float]
) -> list[Claim]:
    """Of figure 12. ``curves`` by SAE, ``window`` in steps, ``final`` the held-out NormMSE by SAE."""
    found = {name: summary(curve, window) for name, curve in curves.items()}
    seeds = [n.removeprefix("annealed-") for n in curves if n.startswith("annealed-")]
    pairs = [s for s in seeds if f"fixed-{s}" in curves]
    a = [f"annealed-{s}" for s in pairs]
    f = [f"fixed-{s}" for s in pairs]
    peaks = [found[f"annealed-{s}"]["largest_silent"] for s in seeds]
    claims = [
        Claim(
            "figure 12",
            "with K-annealing the latents are active during the whole training",
            "almost all fire at least once over 1e6 tokens",
            f"largest share of silent latents {ranged(peaks, percent=True)}",
            "",
            RULES["alive"],
            every([peak <= SILENT for peak in peaks]),
        )
    ]
    for name, what in (("route-seed100", "RouteSAE"), ("crosscoder-seed100", "Crosscoder")):
        if name in found:
            peak = found[name]["largest_silent"]
            claims.append(
                Claim("figure 12", f"the same of the {what}", "–", f"largest share of silent latents {peak:.1%}",
                      "", RULES["alive"], every([peak <= SILENT]))
            )  # fmt: skip
    wake = [found[y]["awake_from"] - found[x]["awake_from"] for x, y in zip(a, f, strict=True)]
    claims.append(
        Claim(
            "figure 12",
            "without it they begin to be active later in the training",
            "after about 1/3 of the steps",
            f"at most {SILENT:.0%} silent for good after {ranged([found[y]['awake_from'] for y in f], True)} of the "
            f"run, annealed {ranged([found[x]['awake_from'] for x in a], True)}",
            spread(wake, percent=True),
            RULES["more"],
            signed(wake, 1),
        )
    )
    gap = [final[x] / final[y] - 1 for x, y in zip(a, f, strict=True) if x in final and y in final]
    claims.append(
        Claim(
            "figure 12",
            "both reach the same MSE",
            "the same",
            f"held-out NormMSE {ranged([final[x] for x in a if x in final])} annealed, "
            f"{ranged([final[y] for y in f if y in final])} not",
            spread(gap, percent=True),
            RULES["equal"],
            within(gap, -EQUAL, EQUAL, UNEQUAL),
        )
    )
    speed = [convergence(curves[x], curves[y]) for x, y in zip(a, f, strict=True)]
    sooner = [one["annealed"] - one["fixed"] for one in speed]
    lower = [one["ratio"] for one in speed]
    claims.append(
        Claim(
            "figure 12",
            "with K-annealing the loss converges faster",
            "faster",
            f"within {CLOSE:.0%} of the final loss (the larger of the two) after "
            f"{ranged([one['annealed'] for one in speed], True)} of the run, not annealed "
            f"{ranged([one['fixed'] for one in speed], True)}; judged from the end of the annealing on",
            spread(sooner, percent=True),
            RULES["less"],
            signed(sooner, -1),
        )
    )
    claims.append(
        Claim(
            "figure 12",
            "the same: its loss is the lower one from the end of the annealing on",
            "lower",
            f"against the other's on the same batch {ranged(lower, True)} (median over batches), "
            f"{ranged([one['first_ratio'] for one in speed], True)} in the first step with k latents",
            spread(lower, percent=True),
            RULES["less"],
            signed(lower, -1),
        )
    )
    return claims


def wide_claims(evaluations: Mapping[str, Any]) -> list[Claim]:
    """Of section 4.2; one seed."""
    pair = [evaluations.get(name) for name in ("wide-seed100", "annealed-seed0")]
    if None in pair:
        return []
    wide, narrow = (one for one in pair if one is not None)
    return [
        Claim(
            "section 4.2",
            f"the wide SAE has the {better} {what}",
            better,
            f"{number(wide[metric])}, the narrow one {number(narrow[metric])}",
            number(wide[metric] - narrow[metric]),
            RULES["more" if sign > 0 else "less"],
            signed([wide[metric] - narrow[metric]], sign),
        )
        for metric, what, better, sign in (
            ("explained_variance_raw_uncentered", "explained variance", "higher", 1),
            ("delta_ce", "delta LM loss", "lower", -1),
        )
    ]


def position_claims(evaluations: Mapping[str, Any], layers: Sequence[int]) -> list[Claim]:
    """Of section 4.2: residual stream against the other three; one seed."""
    metric = "explained_variance_raw_uncentered"
    claims = []
    for other in ("A", "M", "TC"):
        pairs = [(evaluations.get(f"L{n}R"), evaluations.get(f"L{n}{other}")) for n in layers]
        both = [(r[metric], o[metric]) for r, o in pairs if r is not None and o is not None]
        if both:
            wins = sum(r > o for r, o in both)
            claims.append(
                Claim(
                    "section 4.2",
                    f"R explains more variance (Eq. 6) than {other}",
                    "more",
                    f"in {wins} of {len(both)} blocks: "
                    + ", ".join(f"{number(r)} against {number(o)}" for r, o in both),
                    "",
                    RULES["more"],
                    ONE_SEED,
                )
            )
    return claims


def conversion_claims(converted: Mapping[str, Any]) -> list[Claim]:
    """Of figure 11, over the annealed TopK SAEs."""
    some = [one for name, one in converted.items() if name.startswith("annealed")]
    claims = []
    for metric, what in (("norm_mse", "NormMSE"), ("l0", "L0")):
        change = [one["after"][metric] / one["before"][metric] - 1 for one in some]
        claims.append(
            Claim(
                "figure 11",
                f"JumpReLU inference leaves {what} as it was",
                "nearly identical",
                f"{ranged([one['before'][metric] for one in some])} before, "
                f"{ranged([one['after'][metric] for one in some])} after",
                spread(change, percent=True),
                RULES["equal"],
                within(change, -EQUAL, EQUAL, UNEQUAL),
            )
        )
    return claims


def generalisation_claims(parts: Mapping[str, Any]) -> list[Claim]:
    """Of figures 4, 5 and 6, over the annealed TopK SAEs."""
    claims = []
    if firing := parts.get("firing"):
        some = [one for name, one in firing.items() if name.startswith("annealed")]
        silent = [one["never_fired"] / one["d_sae"] for one in some]
        dense = [one["dense_share"] for one in some]
        claims.append(
            Claim(
                "section 4.4",
                "few latents are silent, and few fire often",
                "about 10 % on 100,000 tokens; below 2 %",
                f"{ranged(silent, True)} silent on {some[0]['tokens']:,} tokens; {ranged(dense, True)} dense",
                "",
                RULES["limit"],
                every([s <= SILENT and d <= 0.02 for s, d in zip(silent, dense, strict=True)]),
            )
        )
    if long := parts.get("long"):
        some = [one["bins"] for name, one in long["saes"].items() if name.startswith("annealed")]
        for metric, what, claimed in (("norm_mse", "NormMSE", "+12 %"), ("l0", "L0", "50 to 55")):
            pairs = [(bins[0][metric], bins[-1][metric]) for bins in some]
            change = [b / a - 1 for a, b in pairs]
            claims.append(
                Claim(
                    "figure 5",
                    f"{what} is larger at the last positions than within the training length",
                    claimed,
                    f"{ranged([a for a, _ in pairs])} first, {ranged([b for _, b in pairs])} last",
                    spread(change, percent=True),
                    RULES["more"],
                    signed(change, 1),
                )
            )
    chat = parts.get("chat", {})
    if "plain" in chat:
        some_names = [name for name in chat["plain"] if name.startswith("annealed")]
        for metric, what in (("delta_ce", "delta LM loss"), ("l0", "L0")):
            pairs = [(chat["plain"][name][metric], chat["chat"][name][metric]) for name in some_names]
            change = [b / a - 1 for a, b in pairs]
            claims.append(
                Claim(
                    "figure 6",
                    f"no significantly larger {what} on chats",
                    "no degradation",
                    f"{ranged([b for _, b in pairs])} on chats, "
                    f"{ranged([a for a, _ in pairs])} on the same text, plain",
                    spread(change, percent=True),
                    RULES["no worse"],
                    within(change, -math.inf, 0.10, OPPOSITE),
                )
            )
    return claims


def geometry_claims(distributions: Mapping[str, Any]) -> list[Claim]:
    """Of figure 8 and section 4.6; one pair of SAEs each."""
    claims = []
    for name, claim in (
        ("fixed-seed1", "another training's latents have far better matches than random ones"),
        ("wide-seed100", "the wide dictionary has latents that the narrow one lacks"),
    ):
        if name in distributions:
            one = distributions[name]
            claims.append(
                Claim(
                    "section 4.6",
                    claim,
                    "yes",
                    f"{one['at_random']['new']:.1%} match none better than random ones do (99 % of these below "
                    f"{number(one['at_random']['threshold'])}); {one['at_bound']['new']:.1%} none above the bound "
                    f"{number(one['bound'])}",
                    "",
                    "one pair of SAEs: described, not judged",
                    ONE_SEED,
                )
            )
    return claims
