"""A RouteSAE on a model: what its splices are told in each of the two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.router import Route
from routesae_lens.splice.layer_view import LayerSplice


@dataclass
class Attached:
    """A RouteSAE on a model."""

    sae: RouteSAE
    mounted: bool
    """Whether attaching mounted the multi-layer hook point, so that detaching must unmount it."""
    scale_by_p: bool
    excluded: list[int]
    positions: slice
    splices: dict[str, LayerSplice]
    """By the layer's hook name."""

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        for splice in self.splices.values():
            splice.rows.bypass = True
        try:
            yield
        finally:
            for splice in self.splices.values():
                splice.rows.bypass = False

    @contextmanager
    def routed(self, route: Route, tokens: Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        """Let the splices replace the tokens of ``route``, but special tokens and those out of training."""
        keep = self._keep(route, tokens)
        scale = route.scale if self.scale_by_p else torch.ones_like(route.scale)
        try:
            for splice in self.splices.values():
                splice.rows.here, splice.rows.scale = (route.layer == splice.index) & keep, scale
            yield
        finally:
            for splice in self.splices.values():
                splice.rows.here = splice.rows.scale = None

    def _keep(self, route: Route, tokens: Int[Tensor, "batch pos"] | None) -> Bool[Tensor, "batch pos"]:
        keep = torch.zeros_like(route.layer, dtype=torch.bool)
        keep[:, self.positions] = True
        if not self.excluded:
            return keep
        if tokens is None:
            raise ValueError(
                f"this RouteSAE leaves the tokens {self.excluded} alone, but the model was given embeddings, "
                "not token ids. Give token ids (HookedTransformer.forward also takes tokens=...), or attach it "
                "with exclude_special_tokens=False."
            )
        if tokens.shape != keep.shape:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, expected {tuple(keep.shape)} (batch, pos)"
            )
        return keep & ~torch.isin(tokens.to(keep.device), torch.tensor(self.excluded, device=keep.device))
