"""One layer of a multi-layer SAE, as SAELens' model classes know SAEs: a view and its wrapper.

A RouteSAE is one SAE on several layers, but SAELens attaches one SAE object, with one set of hook
points, to one hook. A *layer view* is a stock inference SAE on the parameters of the RouteSAE with hook
points of its own; :class:`LayerSplice` runs it on the tokens that are routed to its layer. (For SAEs that
read the model's raw activations outside a splice see ``saes/layer_views.py``.)
:class:`StackSplice` is what it shares with the Crosscoder's (``splice/crosscoder.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.saes.sae import SAEMetadata, _disable_hooks
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.saes.layer_views import stock_config
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.splice.replace import reconstruct


@dataclass
class Rows:
    """Which tokens an SAE reads in the running pass; shared by its hook points."""

    here: Bool[Tensor, "batch pos"] | None = None
    """The tokens to replace (for a RouteSAE those routed to this layer); None outside a spliced pass."""
    scale: Float[Tensor, "batch pos"] | None = None
    """What each token's activation is multiplied by before encoding (p, or one)."""
    empty: bool = False
    """Whether no token is to be replaced here in the running pass."""
    bypass: bool = False
    """True during the routing pass, which must see the stream as it is without the RouteSAE."""


class RoutedHookPoint(HookPoint):
    """Shows hooks ``batch pos ...`` although only the rows of the tokens to replace are computed.

    Hooks see zeros at the other tokens; what they write there is dropped. Without hooks nothing is
    scattered. Outside a spliced pass it is an ordinary HookPoint.
    """

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows
        self.edits = 0
        """How many of the hooks are steering's, which has nothing to do where no token is replaced."""

    @property
    def heard(self) -> bool:
        """Whether anybody but steering listens."""
        return len(self._forward_hooks) > self.edits or bool(self._backward_hooks)

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        here = self.rows.here
        if here is None:
            return super().__call__(x)
        if not (self._forward_hooks or self._backward_hooks):
            return x
        full = x.new_zeros((*here.shape, x.shape[-1])).index_put((here,), x)
        return super().__call__(full)[here]


def layer_view(sae: RouteSAE, hook_name: str, rows: Rows | None = None) -> SAE[Any]:
    """A stock SAELens SAE for one routed layer, on the very parameters of ``sae``.

    Its input is what the shared SAE reads: standardised and scaled, see
    :func:`routesae_lens.splice.replace.reconstruct`. Router and standardisation are not part of it.

    Args:
        sae: the RouteSAE; nothing is copied, so what happens to its parameters happens to the view's.
        hook_name: the layer's hook, for ``view.cfg.metadata.hook_name``.
        rows: which tokens the view's hook points stand for.

    Returns:
        an SAE of class ``sae.shared_class`` whose six hook points are :class:`RoutedHookPoint`.
    """
    metadata = {
        key: value for key, value in sae.cfg.metadata.items() if key != "model_from_pretrained_kwargs"
    }
    cfg = stock_config(sae, SAEMetadata(**metadata | {"hook_name": hook_name}))
    view = sae.shared_class(cfg)
    view._parameters, view._buffers = sae._parameters, sae._buffers
    view.activation_fn = sae.activation_fn
    cfg.device = sae.cfg.device
    view.device = sae.device
    for name in list(view.hook_dict):
        setattr(view, name, RoutedHookPoint(Rows() if rows is None else rows))
    view.setup()
    return view


class StackSplice(_SAEWrapper):
    """What stands at the hook of one layer while an SAE that reads several is attached.

    Args:
        view: what SAELens takes for the SAE of this layer.
        rows: the tokens to replace.
        index: of the layer in ``sae.layers``.
        path: where on the model this module stands.
        original: the HookPoint that it replaces; hooks on it keep firing, before the splice, as
            ``<path>.hook_original``.
        use_error_term: add what the SAE fails to reconstruct, so that the stream stays what it was.
    """

    def __init__(
        self,
        view: SAE[Any],
        rows: Rows,
        index: int,
        *,
        path: str,
        original: HookPoint,
        use_error_term: bool,
    ):
        super().__init__(view, use_error_term=use_error_term)
        self.index, self.path, self.rows = index, path, rows
        self.hook_original = original
        self.hook_sae_error = RoutedHookPoint(rows)

    def forward(
        self, original_output: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with the tokens of ``rows`` replaced by their reconstructions at this layer.

        Raises:
            RuntimeError: the model was run by other means than its ``forward``, so there was no routing pass.
        """
        x = self.hook_original(original_output)
        if self.rows.bypass:
            return x
        here = self.rows.here
        if here is None:
            raise RuntimeError(
                f"{self.path}: a RouteSAE or Crosscoder is attached, but this pass has no routes. Call the model "
                "itself (or run_with_cache, run_with_hooks), not the module that it wraps."
            )
        if self.rows.empty and not self._heard:
            return self.hook_sae_output(x)
        return self.hook_sae_output(x.index_put((here,), self._written(x[here])))

    @property
    def _heard(self) -> bool:
        return any(point.heard for point in (*self.sae.hook_dict.values(), self.hook_sae_error))

    def _written(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """What replaces the activations ``rows``, error term included."""
        raise NotImplementedError


class LayerSplice(StackSplice):
    """The splice of a RouteSAE at one of its layers.

    Args:
        sae: the RouteSAE.
        index: of the layer in ``sae.layers``.
        hook_name: the layer's hook, as the view's metadata name it.
        options: the keyword arguments of :class:`StackSplice`.
    """

    def __init__(self, sae: RouteSAE, index: int, *, hook_name: str, **options: Any):
        rows = Rows()
        super().__init__(layer_view(sae, hook_name, rows), rows, index, **options)
        # In __dict__, like SAELens' own, to keep the parameters out of the model's.
        self.__dict__["route_sae"] = sae

    def _written(self, rows: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        assert self.rows.here is not None and self.rows.scale is not None
        scale = self.rows.scale[self.rows.here]
        out = reconstruct(self.route_sae, rows, scale, self._autoencode)
        if self.use_error_term:
            # As in SAELens: from a run without hooks, so that an intervention on a latent is not undone by it.
            with torch.no_grad():
                with _disable_hooks(self.sae):
                    clean = reconstruct(self.route_sae, rows, scale, self._autoencode)
                error = self.hook_sae_error(rows - clean)
            out = out + error
        return out

    def _autoencode(self, z: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        self.sae.dtype = self.route_sae.dtype  # sae.to(dtype) cannot know of its views
        return self.sae.decode(self.sae.encode(z))
