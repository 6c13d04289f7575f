"""Did steering a feature change the text as it should? The rule that is applied to every feature alike.

Whether a text expresses a feature was defined before anything was generated. The controls, the sampling's
temperature and the measure "next" came after short trials with three features, which showed that raised features
brought what follows their tokens.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import routesae_lens as rl

PERPLEXITY_LIMIT = 3.0
RULE = (
    "A completion expresses a feature where the feature fires in a clean reading of the text (share of tokens), or "
    "where the text contains one of the feature's own tokens (those of its contexts). Of either measure the rise "
    "over the unsteered completions is taken pair by pair (same prompt, same random numbers); it counts if it is "
    "more than twice its standard error over the pairs, and is specific if it exceeds, by more than twice the "
    "standard error of that difference, the rise of the same measure when other latents are steered as strongly. "
    f"Fluent means a perplexity under the clean model below {PERPLEXITY_LIMIT:g} times that of the unsteered "
    "completions. Verdict: 'steers' if a rise is counted, specific and fluent at some strength; 'steers, but "
    "breaks fluency' if it is counted and specific, but nowhere fluent; 'not specific' if it is counted, but "
    "nowhere specific; otherwise 'does not steer'. By the same rule it is judged whether the text goes on as after "
    "the feature's tokens: share of tokens among the ten that the clean model expects there more than it does after "
    "other features' tokens. Several strengths and measures are tried, so some rises come from chance: the "
    "controls are judged by the same rule, for the same measures, to show how many."
)
MEASURES = {
    "firing": "fires on (share of tokens)",
    "own": "contains own tokens (share of completions)",
    "next": "goes on as after own tokens (share of tokens)",
}
EXPRESSED, CONTINUED = ("firing", "own"), ("next",)
STEERS, BREAKS, UNSPECIFIC, NOT = (
    "steers",
    "steers, but breaks fluency",
    "not specific",
    "does not steer",
)


def own_tokens(feature: rl.Feature, most: int = 5) -> list[str]:
    """Classes of the strongest activated tokens that have a letter in them."""
    return [token for token in feature.tokens if any(map(str.isalpha, token))][:most]


def measures(completion: rl.Completion, feature: rl.Feature, expected: Collection[str]) -> dict[str, float]:
    """Does the text express the feature, and does it go on as after the feature's tokens (``expected``)?"""
    classes = [string.strip().lower() for string in completion.strings]
    return {
        "firing": completion.firing_share(feature.id),
        "own": float(not set(own_tokens(feature)).isdisjoint(classes)),
        "next": sum(one in expected for one in classes) / len(classes),
    }


def rise(values: Sequence[float]) -> dict[str, float]:
    """Mean of paired differences, its standard error, and whether the mean is above twice that."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "stderr": error, "counts": float(mean > max(2 * error, 1e-12))}


def more_frequent(before: Sequence[rl.Completion], after: Sequence[rl.Completion]) -> list[str]:
    """What the steered completions have and the unsteered have not: tokens with their numbers of completions."""

    def texts_with(completions: Sequence[rl.Completion]) -> Counter[str]:
        return Counter(word for one in completions for word in {s.strip().lower() for s in one.strings})

    old, new = texts_with(before), texts_with(after)
    gained = sorted(new, key=lambda word: (old[word] - new[word], word))
    return [f"{word} ({old[word]} → {new[word]})" for word in gained if word and new[word] - old[word] > 2][
        :6
    ]


def judged(
    feature: rl.Feature,
    expected: Collection[str],
    main: rl.DoseResponse,
    controls: Sequence[rl.DoseResponse],
) -> dict[str, Any]:
    """Rows by strength, and the verdicts, of a feature and of its controls."""

    def measured(dose: rl.DoseResponse) -> list[list[dict[str, float]]]:
        return [[measures(one, feature, expected) for one in row] for row in dose.completions]

    ours, others = measured(main), [measured(each) for each in controls]
    rows = []
    for i, row in enumerate(main.rows):
        filled: dict[str, Any] = {**vars(row), "perplexity_ratio": row.perplexity / main.rows[0].perplexity}
        for name in MEASURES:
            base = [one[name] for one in ours[0]]
            gain = [one[name] - before for one, before in zip(ours[i], base, strict=True)]
            control = [
                statistics.fmean(each[i][pair][name] for each in others) - before
                for pair, before in enumerate(base)
            ]
            filled[name] = statistics.fmean(one[name] for one in ours[i])
            filled[f"{name}_rise"] = rise(gain)
            filled[f"{name}_over_controls"] = rise([a - b for a, b in zip(gain, control, strict=True)])
            filled[f"{name}_control"] = statistics.fmean(base) + statistics.fmean(control)
        filled["control_kl"] = statistics.fmean(each.rows[i].kl for each in controls)
        filled["control_perplexity"] = statistics.fmean(each.rows[i].perplexity for each in controls)
        filled["more_frequent"] = more_frequent(main.completions[0], main.completions[i])
        rows.append(filled)
    verdict, strength = _verdict(rows[1:], EXPRESSED)
    continues, continues_at = _verdict(rows[1:], CONTINUED)
    return {
        "rows": rows,
        "verdict": verdict,
        "at": strength,
        "continues": continues,
        "continues_at": continues_at,
        "controls": [each.feature for each in controls],
        "controls_that_rise": sum(_rises_anywhere(each, EXPRESSED) for each in others),
        "controls_that_continue": sum(_rises_anywhere(each, CONTINUED) for each in others),
    }


def _rises_anywhere(rows: Sequence[Sequence[dict[str, float]]], names: Collection[str]) -> bool:
    return any(
        rise([one[name] - before[name] for one, before in zip(row, rows[0], strict=True)])["counts"]
        for row in rows[1:]
        for name in names
    )


def _verdict(rows: Sequence[dict[str, Any]], names: Collection[str]) -> tuple[str, float | None]:
    """By ``RULE``, and the first strength that it holds at."""

    def first(holds: Callable[[dict[str, Any], str], bool]) -> float | None:
        return next((row["value"] for row in rows if any(holds(row, name) for name in names)), None)

    def rises(row: dict[str, Any], name: str) -> bool:
        return bool(row[f"{name}_rise"]["counts"])

    def specific(row: dict[str, Any], name: str) -> bool:
        return rises(row, name) and bool(row[f"{name}_over_controls"]["counts"])

    def fluent(row: dict[str, Any], name: str) -> bool:
        return specific(row, name) and row["perplexity_ratio"] < PERPLEXITY_LIMIT

    for verdict, holds in ((STEERS, fluent), (BREAKS, specific), (UNSPECIFIC, rises)):
        if (strength := first(holds)) is not None:
            return verdict, strength
    return NOT, None
