"""An SAE of several layers on a model: what its splices are told in each of the two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.router import Route
from routesae_lens.splice.crosscoder import CrosscoderPass, CrosscoderSplice, hide_latents, show_latents
from routesae_lens.splice.layer_view import LayerSplice, StackSplice


@dataclass(kw_only=True)
class Attached:
    """What attached RouteSAEs and Crosscoders have in common."""

    sae: Any
    layers: list[int]
    """The block numbers where it is spliced."""
    mounted: bool
    """Whether attaching mounted the multi-layer hook point, so that detaching must unmount it."""
    excluded: list[int]
    positions: slice
    splices: dict[str, StackSplice] = field(default_factory=dict)
    """By the layer's hook name."""

    def splice_at(self, layer: int, hook_name: str, **options: Any) -> StackSplice:
        """A splice for one of ``layers``; ``options`` as :class:`StackSplice` takes them."""
        raise NotImplementedError

    def shown_on(self, point: HookPoint) -> bool:
        """Put hook points that belong to no single layer below the multi-layer one; whether there are any."""
        return False

    def hidden_on(self, point: HookPoint) -> bool:
        """Undo :meth:`shown_on`; whether there was anything."""
        return False

    def read(self, stack: Float[Tensor, "batch pos stacked"]) -> Route | Tensor:
        """What :meth:`splicing` needs of the routing pass."""
        raise NotImplementedError

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
    def splicing(self, read: Any, tokens: Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        """Let the splices replace the tokens of ``read``, but special tokens and those out of training."""
        raise NotImplementedError
        yield

    def _keep(
        self, shape: torch.Size, device: torch.device, tokens: Int[Tensor, "batch pos"] | None
    ) -> Bool[Tensor, "batch pos"]:
        keep = torch.zeros(shape, dtype=torch.bool, device=device)
        keep[:, self.positions] = True
        if not self.excluded:
            return keep
        if tokens is None:
            raise ValueError(
                f"this {type(self.sae).__name__} leaves the tokens {self.excluded} alone, but the model was given "
                "embeddings, not token ids. Give token ids (HookedTransformer.forward also takes tokens=...), or "
                "attach it with exclude_special_tokens=False."
            )
        if tokens.shape != keep.shape:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, expected {tuple(keep.shape)} (batch, pos)"
            )
        return keep & ~torch.isin(tokens.to(keep.device), torch.tensor(self.excluded, device=keep.device))


@dataclass(kw_only=True)
class AttachedRouteSAE(Attached):
    """A RouteSAE on a model: each token is replaced at its routed layer."""

    sae: RouteSAE
    scale_by_p: bool

    def splice_at(self, layer: int, hook_name: str, **options: Any) -> StackSplice:
        return LayerSplice(self.sae, self.sae.layers.index(layer), hook_name=hook_name, **options)

    def read(self, stack: Float[Tensor, "batch pos stacked"]) -> Route:
        return self.sae.route(stack)

    @contextmanager
    def splicing(self, read: Route, tokens: Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        keep = self._keep(read.layer.shape, read.layer.device, tokens)
        scale = read.scale if self.scale_by_p else torch.ones_like(read.scale)
        try:
            for splice in self.splices.values():
                splice.rows.here, splice.rows.scale = (read.layer == splice.index) & keep, scale
            yield
        finally:
            for splice in self.splices.values():
                splice.rows.here = splice.rows.scale = None


@dataclass(kw_only=True)
class AttachedCrosscoder(Attached):
    """A Crosscoder on a model: each token is replaced at every one of ``layers``."""

    sae: Crosscoder
    running: CrosscoderPass

    def splice_at(self, layer: int, hook_name: str, **options: Any) -> StackSplice:
        return CrosscoderSplice(self.running, self.sae.layers.index(layer), **options)

    def shown_on(self, point: HookPoint) -> bool:
        show_latents(point, self.running.view)
        return True

    def hidden_on(self, point: HookPoint) -> bool:
        hide_latents(point)
        return True

    def read(self, stack: Float[Tensor, "batch pos stacked"]) -> Tensor:
        return stack

    @contextmanager
    def splicing(self, read: Tensor, tokens: Int[Tensor, "batch pos"] | None) -> Iterator[None]:
        keep = self._keep(read.shape[:-1], read.device, tokens)
        self.running.begin(read, keep)
        try:
            yield
        finally:
            self.running.end()
