"""What a splice writes: the reconstruction of a token, in the model's own space, at its routed layer.

Training saw the standardised activation times p, so the splice standardises the *current* stream,
multiplies by p, encodes, decodes, divides by p and undoes the standardisation with the current
stream's statistics. The authors' splice leaves p out on both sides (``scale_by_p=False``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from routesae_lens.hook_points import layer_hook_name
from routesae_lens.saes.route_sae import Routed
from routesae_lens.saes.router import Route, standardize

Hook = Callable[..., Tensor]


def check_device(sae: Any, model: Any) -> None:
    """Raise a ValueError where SAE and model are on different kinds of devices."""
    ours, theirs = sae.W_dec.device, next(model.parameters()).device
    if ours.type != theirs.type:
        raise ValueError(f"the SAE is on {ours}, the model on {theirs}: sae.to({str(theirs)!r}) moves it")


def reconstruct(
    sae: Routed,
    x: Float[Tensor, "*batch d_model"],
    scale: Float[Tensor, "*batch"],
    autoencode: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*batch d_model"]:
    """The activations ``x`` of one layer through the shared SAE and back to the model's space.

    Args:
        sae: gives the standardisation and, by default, encoder and decoder.
        x: activations of the model, unstandardised.
        scale: ``Route.scale`` of each token, or ones for the authors' unscaled splice.
        autoencode: encode and decode by other means (a layer view with hook points of its own).
    """
    stats = standardize(x.to(sae.dtype)) if sae.cfg.standardize else None
    z = x.to(sae.dtype) if stats is None else stats.x
    scale = scale.to(sae.dtype)[..., None]
    z = z * scale
    y = (sae.decode(sae.encode_routed(z)) if autoencode is None else autoencode(z)) / scale
    if stats is not None:
        y = y * stats.std + stats.mean
    return y.to(x.dtype)


def splice_hooks(
    sae: Routed,
    model: Any,
    route: Route,
    keep: Bool[Tensor, "batch pos"],
    *,
    scale_by_p: bool = True,
) -> list[tuple[str, Hook]]:
    """Forward hooks that replace each token's activation by its reconstruction at its routed layer.

    Args:
        sae: a RouteSAE.
        model: gives the hook names; run it with ``run_with_hooks(tokens, fwd_hooks=...)``.
        route: routes of the same tokens, from a clean pass.
        keep: tokens to replace; the others (special tokens, padding) flow through untouched.
        scale_by_p: consistent with training (default), or the authors' unscaled splice.
    """
    scale = route.scale.detach() if scale_by_p else torch.ones_like(route.scale)

    def at(index: int) -> Hook:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            here = (route.layer == index) & keep
            return x.index_put((here,), reconstruct(sae, x[here], scale[here]))

        return hook

    return [(layer_hook_name(model, layer, sae.cfg.site), at(i)) for i, layer in enumerate(sae.layers)]
