"""An SAE of several layers on a model: what its splices are told in each of the two passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.router import Route
from routesae_lens.splice.crosscoder import CrosscoderPass, CrosscoderSplice, hide_latents, show_latents
from routesae_lens.splice.layer_view import LayerSplice, Rows, StackSplice
from routesae_lens.splice.window import Window


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

    def latents(self) -> list[tuple[HookPoint, Rows | None]]:
        """The hook points where its latents appear, and which tokens they stand for."""
        return [(splice.sae.hook_sae_acts_post, splice.rows) for splice in self.splices.values()]

    def read(self, stack: Float[Tensor, "batch pos stacked"], window: Window) -> Route | Tensor:
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
    def splicing(self, read: Any, window: Window) -> Iterator[None]:
        """Let the splices replace the tokens of ``read``, but special tokens and those out of training."""
        raise NotImplementedError
        yield

    def _keep(self, window: Window) -> Bool[Tensor, "batch pos"]:
        bounds = self.positions
        if window.growing and any(bound is not None and bound < 0 for bound in (bounds.start, bounds.stop)):
            raise ValueError(
                f"this {type(self.sae).__name__} was trained on the positions {bounds.start}:{bounds.stop} of its "
                "sequences, which end elsewhere with every generated token"
            )
        keep = window.where(bounds, origin=window.start + window.length)
        if not self.excluded:
            return keep
        if window.tokens is None:
            raise ValueError(
                f"this {type(self.sae).__name__} leaves the tokens {self.excluded} alone, but the model was given "
                "embeddings, not token ids. Give token ids (HookedTransformer.forward also takes tokens=...), or "
                "attach it with exclude_special_tokens=False."
            )
        if window.tokens.shape != keep.shape:
            raise ValueError(
                f"tokens have shape {tuple(window.tokens.shape)}, expected {tuple(keep.shape)} (batch, pos)"
            )
        return keep & ~torch.isin(
            window.tokens.to(keep.device), torch.tensor(self.excluded, device=keep.device)
        )


@dataclass(kw_only=True)
class AttachedRouteSAE(Attached):
    """A RouteSAE on a model: each token is replaced at its routed layer."""

    sae: RouteSAE
    scale_by_p: bool
    routed: bool
    """Whether a token is replaced at its routed layer, and not at every one of ``layers``."""

    def splice_at(self, layer: int, hook_name: str, **options: Any) -> StackSplice:
        return LayerSplice(self.sae, self.sae.layers.index(layer), hook_name=hook_name, **options)

    def read(self, stack: Float[Tensor, "batch pos stacked"], window: Window) -> Route:
        return self.sae.route(stack, start=window.start)

    @contextmanager
    def splicing(self, read: Route, window: Window) -> Iterator[None]:
        keep = self._keep(window)
        scale = read.scale if self.scale_by_p else torch.ones_like(read.scale)
        # One look at the routes for all layers: on a GPU each look waits for what was queued.
        chosen = set(read.layer[keep].unique().tolist()) if self.routed else None
        anything = bool(keep.any())
        try:
            for splice in self.splices.values():
                rows = splice.rows
                rows.scale = scale
                rows.here = keep & (read.layer == splice.index) if self.routed else keep
                rows.empty = not anything if chosen is None else splice.index not in chosen
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

    def latents(self) -> list[tuple[HookPoint, Rows | None]]:
        return [(self.running.view.hook_sae_acts_post, None)]

    def read(self, stack: Float[Tensor, "batch pos stacked"], window: Window) -> Tensor:
        return stack

    @contextmanager
    def splicing(self, read: Tensor, window: Window) -> Iterator[None]:
        self.running.begin(read, self._keep(window))
        try:
            yield
        finally:
            self.running.end()
