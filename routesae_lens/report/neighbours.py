"""Features whose decoder directions point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routesae_lens.analysis.feature_set import FeatureSet

WEIGHTS = "sae_weights.safetensors"
ROWS_AT_ONCE = 512
"""Similarities are computed for so many features at a time: memory is this times d_sae."""


def nearest_features(folder: Path, features: FeatureSet, n: int) -> dict[int, list[tuple[int, float]]]:
    """The ``n`` nearest latents of every feature among those that fired, by the SAE saved in ``folder``.

    Dead latents are left out: their directions mean nothing. Empty where the folder holds no weights.

    Raises:
        ValueError: weights of another width, or a damaged file.
    """
    path = folder / WEIGHTS
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as weights:
            W_dec = weights.get_tensor("W_dec").float()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    width = len(features.firing_frequency)
    if len(W_dec) != width:
        raise ValueError(f"{path} has {len(W_dec)} latents, the features are of an SAE with {width}")
    ids = [feature.id for feature in features.features]
    return nearest_by_cosine(W_dec, ids, features.firing_frequency > 0, n)


def nearest_by_cosine(
    W_dec: Float[Tensor, "d_sae d_out"], ids: Sequence[int], among: Bool[Tensor, " d_sae"], n: int
) -> dict[int, list[tuple[int, float]]]:
    """The ``n`` other latents with the highest cosine to each of ``ids``, highest first; of equal ones any.

    Args:
        W_dec: decoder directions, all layers of a Crosscoder together.
        ids: latents whose neighbours are looked for.
        among: latents that may be neighbours.
    """
    directions = torch.nn.functional.normalize(W_dec, dim=-1)
    found: dict[int, list[tuple[int, float]]] = {}
    for rows in torch.tensor(list(ids), dtype=torch.long).split(ROWS_AT_ONCE):
        cosines = directions[rows] @ directions.T
        cosines[:, ~among] = -torch.inf
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        values, latents = cosines.topk(min(n, len(directions)), dim=-1)
        for latent, near, cosine in zip(rows.tolist(), latents.tolist(), values.tolist(), strict=True):
            found[latent] = [
                (other, value) for other, value in zip(near, cosine, strict=True) if value > -torch.inf
            ]
    return found
