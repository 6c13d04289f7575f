"""Feature sets made by hand, for what reads them."""

from __future__ import annotations

import torch

from routesae_lens.analysis.contexts import Context
from routesae_lens.analysis.feature_set import BlockActivity, Feature, FeatureRule, FeatureSet


def context(before: str, token: str, after: str, activation: float = 16.0, position: int = 3) -> Context:
    return Context(
        before,
        token,
        after,
        0,
        position,
        token.strip().lower(),
        7,
        activation,
        activation,
        2,
        0.5,
        0,
        position,
    )


def feature_set(n: int = 5, name: str = "route", text: str = "On {i} Monday") -> FeatureSet:
    """``n`` interpretable features out of ``2 n`` latents: the odd ones, each with four contexts."""
    candidates = [
        Feature(
            i,
            [
                context(f"{text.format(i=i)} and", f" day{j}", " it rained.", 20.0 - j, position=j)
                for j in range(4)
            ],
            0.01,
            20.0,
            {2: BlockActivity(4, 4, 18.0)},
            {},
        )
        for i in range(1, 2 * n, 2)
    ]
    retained = torch.zeros(2 * n, dtype=torch.float64)
    retained[1::2] = 16.5
    zeros = torch.zeros(2 * n, dtype=torch.float64)
    return FeatureSet(
        name, FeatureRule(threshold=15.0), 1000, {2: 1000}, zeros, retained + 1, retained, zeros, candidates
    )
