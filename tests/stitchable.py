"""Pairs of SAEs for the tests of stitching: random ones, and a planted pair whose groups are known."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata

D_MODEL = 32
LAYERS = [1, 2, 4]
HOOK = "blocks.2.hook_resid_post"


def sae(architecture: str, d_sae: int, seed: int, **fields: Any) -> Any:
    """An inference SAE with random weights, biases and thresholds; decoder rows are of no particular norm."""
    sae_class, config = get_sae_class(architecture)
    if architecture.startswith("route_"):
        layers = fields.setdefault("layers", LAYERS)
        fields.setdefault("d_in", len(layers) * D_MODEL)
    fields = {"d_in": D_MODEL, "metadata": SAEMetadata(hook_name=HOOK), **fields}
    if architecture.startswith("route_"):
        fields["metadata"] = SAEMetadata()
    made: Any = sae_class(config(d_sae=d_sae, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.3
            parameter.copy_(noise.abs() if name == "threshold" else noise)
    return made.eval()


def same_router(sae: Any, other: Any) -> Any:
    """``sae`` with the router of ``other``."""
    with torch.no_grad():
        sae.W_router.copy_(other.W_router)
    return sae


def activations(
    *shape: int, d: int = D_MODEL, seed: int = 5, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, d, generator=generator, dtype=torch.float64) * 1.5 + 0.2).to(dtype)


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Decoder rows of a smaller and a larger dictionary on orthonormal directions e0, e1 ..., some of them longer.

    ======  ============================  =================================================
    small   large                         what it is
    ======  ============================  =================================================
    0: e0   3: e0                         the same latent
    1: e1   0, 7: e1 turned to e20, e21   a latent that split in two (cosine 0.9)
    2: e2   5: (e2 + e3) / sqrt 2         two latents that became one (cosine 0.707)
    3: e3
    4: e4                                 lost: nothing of the larger dictionary is like it
    \\       1, 2, 6: e10, e11, e12        novel
    5: 0    4: 0                          no direction
    ======  ============================  =================================================
    """
    basis = torch.linalg.qr(
        torch.randn(32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )[0]
    e = list(basis.float())
    nothing = torch.zeros(32)
    turned = [0.9 * e[1] + (1 - 0.81) ** 0.5 * other for other in (e[20], e[21])]
    small = torch.stack([e[0], 3 * e[1], e[2], e[3], e[4], nothing])
    large = torch.stack([turned[0], e[10], 0.1 * e[11], 2 * e[0], nothing, e[2] + e[3], e[12], 5 * turned[1]])
    return small, large
