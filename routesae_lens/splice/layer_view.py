"""One routed layer of a RouteSAE, as SAELens' model classes know SAEs: a view and its wrapper.

A RouteSAE is one SAE on several layers, but SAELens attaches one SAE object, with one set of hook
points, to one hook. A *layer view* is a stock inference SAE on the parameters of the RouteSAE with hook
points of its own; :class:`LayerSplice` runs it on the tokens that are routed to its layer.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from sae_lens.saes.sae import SAEMetadata, _disable_hooks
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.splice.replace import reconstruct


@dataclass
class Rows:
    """Which tokens a layer's SAE reads in the running pass; shared by the layer's hook points."""

    here: Bool[Tensor, "batch pos"] | None = None
    """The tokens routed to this layer; None outside a spliced pass."""
    scale: Float[Tensor, "batch pos"] | None = None
    """What each token's activation is multiplied by before encoding (p, or one)."""
    bypass: bool = False
    """True during the routing pass, which must see the stream as it is without the RouteSAE."""


class RoutedHookPoint(HookPoint):
    """Shows hooks ``batch pos ...`` although only the rows of the routed tokens are computed.

    Hooks see zeros at tokens routed elsewhere; what they write there is dropped. Without hooks nothing is
    scattered. Outside a spliced pass it is an ordinary HookPoint.
    """

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows

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
    given = {field.name: getattr(sae.cfg, field.name) for field in fields(sae.shared_config)}
    metadata = {
        key: value for key, value in sae.cfg.metadata.items() if key != "model_from_pretrained_kwargs"
    }
    cfg: Any = sae.shared_config(
        **given
        | {
            "d_in": sae.cfg.d_model,
            "device": "meta",  # so that the weights below cost nothing until they are replaced
            "metadata": SAEMetadata(**metadata | {"hook_name": hook_name}),
        }
    )
    view = sae.shared_class(cfg)
    view._parameters, view._buffers = sae._parameters, sae._buffers
    view.activation_fn = sae.activation_fn
    cfg.device = sae.cfg.device
    view.device = sae.device
    for name in list(view.hook_dict):
        setattr(view, name, RoutedHookPoint(Rows() if rows is None else rows))
    view.setup()
    return view


class LayerSplice(_SAEWrapper):
    """What stands at the hook of a routed layer while a RouteSAE is attached.

    Args:
        sae: the RouteSAE.
        index: of the layer in ``sae.layers``.
        hook_name: the layer's hook, as the view's metadata name it.
        path: where on the model this module stands.
        original: the HookPoint that it replaces; hooks on it keep firing, before the splice, as
            ``<path>.hook_original``.
        use_error_term: add what the SAE fails to reconstruct, so that the stream stays what it was.
    """

    def __init__(
        self,
        sae: RouteSAE,
        index: int,
        *,
        hook_name: str,
        path: str,
        original: HookPoint,
        use_error_term: bool,
    ):
        rows = Rows()
        super().__init__(layer_view(sae, hook_name, rows), use_error_term=use_error_term)
        # In __dict__, like SAELens' own, to keep the parameters out of the model's.
        self.__dict__["route_sae"] = sae
        self.index, self.path, self.rows = index, path, rows
        self.hook_original = original
        self.hook_sae_error = RoutedHookPoint(rows)

    def forward(
        self, original_output: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream with this layer's routed tokens replaced by their reconstructions.

        Raises:
            RuntimeError: the model was run by other means than its ``forward``, so there are no routes.
        """
        x = self.hook_original(original_output)
        if self.rows.bypass:
            return x
        if self.rows.here is None or self.rows.scale is None:
            raise RuntimeError(
                f"{self.path}: a RouteSAE is attached, but this pass has no routes. Call the model itself (or "
                "run_with_cache, run_with_hooks), not the module that it wraps."
            )
        here = self.rows.here
        rows, scale = x[here], self.rows.scale[here]
        out = reconstruct(self.route_sae, rows, scale, self._autoencode)
        if self.use_error_term:
            # As in SAELens: from a run without hooks, so that an intervention on a latent is not undone by it.
            with torch.no_grad():
                with _disable_hooks(self.sae):
                    clean = reconstruct(self.route_sae, rows, scale, self._autoencode)
                error = self.hook_sae_error(rows - clean)
            out = out + error
        return self.hook_sae_output(x.index_put((here,), out))

    def _autoencode(self, z: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        self.sae.dtype = self.route_sae.dtype  # sae.to(dtype) cannot know of its views
        return self.sae.decode(self.sae.encode(z))
