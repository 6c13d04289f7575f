"""A Crosscoder on a model: one set of latents per token, written to several layers.

All layers are spliced from the same latents, so these are no property of a layer: their hook points stand
below the multi-layer hook point that the Crosscoder reads, as ``<point>.hook_sae_acts_post`` and so on, and
fire once in a spliced pass, just before the first spliced layer is replaced. An edit there reaches every
spliced layer. Each layer has ``<layer's hook>.hook_sae_error`` and ``<layer's hook>.hook_sae_output``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.sae import SAEMetadata, _disable_hooks
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.splice.layer_view import RoutedHookPoint, Rows, StackSplice
from routesae_lens.splice.replace import in_stream, kept_rows

LATENT_HOOKS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
"""Hook points of a Crosscoder that belong to no single layer; the first and last see the standardised stack."""


class CrosscoderPass:
    """What the layers of an attached Crosscoder share in the running pass.

    Args:
        sae: the Crosscoder.
        point: name of its multi-layer hook point on the model.
    """

    def __init__(self, sae: Crosscoder, point: str):
        self.sae, self.rows = sae, Rows()
        self.view = crosscoder_view(sae, point, self.rows)
        self.stack: Tensor | None = None
        self._decoded: Tensor | None = None
        self._unedited: Tensor | None = None

    def begin(self, stack: Float[Tensor, "batch pos stacked"], keep: Bool[Tensor, "batch pos"]) -> None:
        """Splice the tokens of ``keep``, whose clean activations are ``stack``."""
        self.stack, self.rows.here = stack, keep

    def end(self) -> None:
        self.stack = self.rows.here = self._decoded = self._unedited = None

    def decoded(self) -> Float[Tensor, "token layer d_model"]:
        """Reconstructions (standardised where the Crosscoder standardises), from latents that hooks may edit."""
        if self._decoded is None:
            self._decoded = self._autoencode(self._kept())
        return self._decoded

    @torch.no_grad()
    def unedited(self) -> Float[Tensor, "token layer d_model"]:
        """Reconstructions from latents as they are without hooks, for the error term."""
        if self._unedited is None:
            with _disable_hooks(self.view):
                self._unedited = self._autoencode(self._kept())
        return self._unedited

    def _kept(self) -> Float[Tensor, "token stacked"]:
        assert self.stack is not None and self.rows.here is not None
        return kept_rows(self.stack, self.rows.here)

    def _autoencode(self, stack: Float[Tensor, "token stacked"]) -> Float[Tensor, "token layer d_model"]:
        self.view.dtype = self.sae.dtype  # sae.to(dtype) cannot know of its views
        return self.view.decode_layers(self.view.encode(stack))


def crosscoder_view(sae: Crosscoder, point: str, rows: Rows) -> Crosscoder:
    """The same Crosscoder, on the same parameters, with hook points of its own.

    Args:
        sae: the Crosscoder; nothing is copied.
        point: name of its multi-layer hook point, for ``view.cfg.metadata.hook_name``.
        rows: which tokens the view's hook points stand for.
    """
    view: Any = copy.copy(sae)
    view._modules = sae._modules.copy()
    view.cfg = copy.copy(sae.cfg)
    view.cfg.metadata = SAEMetadata(**sae.cfg.metadata.to_dict() | {"hook_name": point})
    for name in sae.hook_dict:
        setattr(view, name, RoutedHookPoint(rows))
    view.mod_dict, view.hook_dict = {}, {}  # until setup: those of sae
    view.setup()
    return view


class CrosscoderSplice(StackSplice):
    """The splice of a Crosscoder at one of its layers.

    Args:
        running: what it shares with the Crosscoder's other layers.
        index: of the layer in ``sae.layers``.
        options: the keyword arguments of :class:`StackSplice`.
    """

    def __init__(self, running: CrosscoderPass, index: int, **options: Any):
        # SAELens' classes list what an SAE has in hook_dict below its layer; these fire below the point.
        hookless = copy.copy(running.view)
        hookless.hook_dict = {}
        super().__init__(hookless, running.rows, index, **options)
        self.running = running

    def _written(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        out = in_stream(self.running.sae, self.running.decoded()[:, self.index], rows)
        if self.use_error_term:
            # Of the current stream, as for every other SAE: what an edit changed in the layers below stays,
            # and the difference that it makes here comes on top.
            with torch.no_grad():
                unedited = in_stream(self.running.sae, self.running.unedited()[:, self.index], rows)
                error = self.hook_sae_error(rows - unedited)
            out = out + error
        return out


def show_latents(point: HookPoint, view: Crosscoder) -> None:
    """Put the view's hook points below the multi-layer hook point."""
    for name in LATENT_HOOKS:
        setattr(point, name, view.hook_dict[name])


def hide_latents(point: HookPoint) -> None:
    """Undo :func:`show_latents`."""
    for name in LATENT_HOOKS:
        if hasattr(point, name):
            delattr(point, name)
