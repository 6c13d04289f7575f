"""TopK with or without a ReLU: ``relu=False`` keeps negative latents among the k, as the authors' code does.

Shared by the package's TopK SAEs. Both classes stand before the others in a list of bases: then ``relu`` is the
last field of a config, and SAELens' own activation is what ``super()`` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor, nn


class SignedTopK(nn.Module):
    """The k largest pre-activations, negative ones included (the authors' TopK has no ReLU)."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        top = torch.topk(x, k=self.k, dim=-1, sorted=False)
        return torch.zeros_like(x).scatter(-1, top.indices, top.values)


@dataclass(kw_only=True)
class ReLUField:
    """The option ``relu`` of a config, in training and at inference."""

    relu: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if not isinstance(self.relu, bool):
            raise ValueError(f"relu must be True or False, got {self.relu!r}")
        if not self.relu and getattr(self, "use_sparse_activations", False):
            raise ValueError("use_sparse_activations does not go with relu=False")


class ReLUOption(SAE[Any]):
    """Its effect on a TopK SAE."""

    cfg: Any

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return super().get_activation_fn() if self.cfg.relu else SignedTopK(self.cfg.k)
