"""A feature set as the page's script reads it: one short row per feature, and what is shown once it is opened.

Rows and details are lists in the order named here, not objects: thousands of repeated keys would be half the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from routesae_lens.analysis.feature_set import Feature, FeatureSet
from routesae_lens.report.contents import ReportContents

DETAILS_AT_ONCE = 50
"""The details of so many features are parsed together when one of them is opened."""
BINS = 12


def feature_rows(contents: ReportContents) -> list[list[Any]]:
    """latent, firing frequency, largest activation, main layer, token classes, category, score, explanation."""
    features = _set_of(contents)
    judged = contents.interpretations.features if contents.interpretations else {}
    rows = []
    for feature in features.features:
        told = judged.get(feature.id)
        rows.append(
            [
                feature.id,
                short(feature.firing_frequency),
                short(feature.max_activation),
                main_layer(feature),
                feature.tokens,
                *((told.category, told.score, told.explanation) if told else (None, None, None)),
            ]
        )
    return rows


def feature_details(contents: ReportContents, n_contexts: int) -> Iterator[list[list[Any]]]:
    """Batches of :data:`DETAILS_AT_ONCE` features, in the order of the rows.

    Of each: layers (of :func:`layer_rows`), the histogram's counts and its upper end, the number of contexts
    that the set holds, the strongest ``n_contexts`` of them (before, token, after, activation, layer, p,
    document, position), and the neighbours (latent, cosine).
    """
    features = _set_of(contents)
    details = [_details(feature, features, contents, n_contexts) for feature in features.features]
    for start in range(0, len(details), DETAILS_AT_ONCE):
        yield details[start : start + DETAILS_AT_ONCE]


def _set_of(contents: ReportContents) -> FeatureSet:
    assert contents.features is not None
    return contents.features


def _details(feature: Feature, features: FeatureSet, contents: ReportContents, n_contexts: int) -> list[Any]:
    shown = feature.contexts[:n_contexts]
    counts = histogram([context.activation for context in feature.contexts], feature.max_activation)
    return [
        layer_rows(feature, features.layer_tokens),
        [counts, short(feature.max_activation)],
        len(feature.contexts),
        [
            [
                context.before,
                context.token,
                context.after,
                short(context.activation),
                context.block,
                None if context.p is None else short(context.p),
                context.document,
                context.document_position,
            ]
            for context in shown
        ],
        [[latent, round(cosine, 3)] for latent, cosine in contents.neighbours.get(feature.id, [])],
    ]


def layer_rows(feature: Feature, layer_tokens: dict[int, int]) -> list[list[Any]]:
    """layer, share, active tokens, their share of the tokens routed there, mean activation on them.

    The share is that of the feature's summed activation which falls into the layer. Of an SAE that writes
    several layers at once it is the layer's share of its decoder norms, and the rest is None.
    """
    weights = _layer_weights(feature)
    total = sum(weights.values())
    rows: list[list[Any]] = []
    for layer, weight in weights.items():
        row: list[Any] = [layer, round(weight / total, 4) if total else 0.0, None, None, None]
        if layer in feature.blocks:
            activity, routed = feature.blocks[layer], layer_tokens.get(layer, 0)
            rate = short(activity.active / routed) if routed else None
            row[2:] = [activity.active, rate, short(activity.mean_activation)]
        rows.append(row)
    return rows


def main_layer(feature: Feature) -> int | None:
    """The layer with the largest share (see :func:`layer_rows`), the earlier of equal ones; None if none has any."""
    weights = _layer_weights(feature)
    return max(weights, key=weights.__getitem__) if any(weights.values()) else None


def _layer_weights(feature: Feature) -> dict[int, float]:
    weights = {layer: one.active * one.mean_activation for layer, one in feature.blocks.items()}
    weights = weights or dict(feature.decoder_norms)
    return dict(sorted(weights.items()))


def histogram(values: Sequence[float], largest: float) -> list[int]:
    """Counts of values in :data:`BINS` equal parts of 0 to ``largest``, which belongs to the last."""
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, max(0, int(value / largest * BINS)))] += 1
    return counts


def short(value: float) -> float | int:
    """Four significant digits: the file stays small."""
    if not math.isfinite(value):
        raise ValueError(f"a feature set holds the number {value}")
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded == int(rounded) else rounded
