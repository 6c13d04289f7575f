"""Which positions of which sequences a forward pass computes.

With a KV cache a pass sees the new positions only, so what depends on a token's place (training's
``seqpos_slice``, random routing, where to steer) must know what came before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The positions of one pass, within sequences that a KV cache may have begun."""

    batch: int
    length: int
    """Positions that the pass computes."""
    start: int
    """Positions that the cache holds."""
    prompt: int
    """How many positions, from the first, are the prompt; those after it were generated."""
    growing: bool
    """Whether more positions may follow: a cache is in use, or the model is generating."""
    device: torch.device
    tokens: Int[Tensor, "batch pos"] | None = None
    """Token ids of the positions; None if the model was given embeddings."""
    mask: Bool[Tensor, "batch total"] | None = None
    """True at tokens, False at padding, cached positions included; None: no padding."""

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Where there is a token, not padding."""
        if self.mask is None:
            return torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        return self.mask[:, self.start :]

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Place of each token in its sequence: 0 is the first that is not padding."""
        if self.mask is None:
            places = torch.arange(self.start, self.start + self.length, device=self.device)
            return places.expand(self.batch, -1)
        return (self.mask.cumsum(-1) - 1)[:, self.start :]

    @property
    def prompt_lengths(self) -> Int[Tensor, "batch 1"]:
        """Tokens of each sequence's prompt, without padding."""
        if self.mask is None:
            return torch.full((self.batch, 1), self.prompt, device=self.device)
        return self.mask[:, : self.prompt].sum(-1, keepdim=True)

    def where(self, positions: slice, origin: Int[Tensor, "batch 1"] | int) -> Bool[Tensor, "batch pos"]:
        """The positions that a slice names; negative bounds count back from ``origin``."""

        def bound(value: int) -> Tensor | int:
            return value if value >= 0 else origin + value

        places, chosen = self.positions, self.real
        first: Tensor | int = 0 if positions.start is None else bound(positions.start)
        chosen = chosen & (places >= first)
        if positions.stop is not None:
            chosen = chosen & (places < bound(positions.stop))
        if positions.step not in (None, 1):
            first = first.clamp_min(0) if isinstance(first, Tensor) else max(first, 0)
            chosen = chosen & ((places - first) % positions.step == 0)
        return chosen
