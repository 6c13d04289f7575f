"""Features whose decoder directions point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routesae_lens.analysis.feature_set import FeatureSet
from routesae_lens.analysis.geometry import nearest_within

WEIGHTS = "sae_weights.safetensors"


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
    try:
        return nearest_by_cosine(W_dec, ids, features.firing_frequency > 0, n) if ids else {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def nearest_by_cosine(
    W_dec: Float[Tensor, "d_sae d_out"], ids: Sequence[int], among: Bool[Tensor, " d_sae"], n: int
) -> dict[int, list[tuple[int, float]]]:
    """``nearest_within`` as the page takes it: latent and cosine of each neighbour, by the latent they belong to.

    Args:
        W_dec: decoder directions, all layers of a Crosscoder together.
        ids: latents whose neighbours are looked for.
        among: latents that may be neighbours.
    """
    near = nearest_within(W_dec, n, latents=ids, among=among, progress=False)
    return {
        latent: [(other, cosine) for other, cosine in zip(others, cosines, strict=True) if other >= 0]
        for latent, others, cosines in zip(ids, near.latents.tolist(), near.cosines.tolist(), strict=True)
    }
