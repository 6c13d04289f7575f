"""What a splice writes: reconstructions, in the model's own space.

RouteSAE, one layer per token: training saw the standardised activation times p, so the splice standardises
the *current* stream, multiplies by p, encodes, decodes, divides by p and undoes the standardisation with
the current stream's statistics. The authors' splice leaves p out on both sides (``scale_by_p=False``).

Crosscoder, many layers per token: the latents come from the clean pass, for only there all its layers can
be read before the first of them is replaced; each layer's reconstruction is written with the statistics of
the current stream at that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from routesae_lens.hook_points import check_layers, layer_hook_name, split_layers
from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.fast_topk import decode_fast, encode_fast
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import Routed, RouteSAE
from routesae_lens.saes.router import Route
from routesae_lens.saes.sparse_products import TopKCode

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
    y = (sae.autoencode_routed if autoencode is None else autoencode)(z) / scale
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


def crosscoder_hooks(
    sae: Crosscoder,
    model: Any,
    stack: Float[Tensor, "batch pos stacked"],
    keep: Bool[Tensor, "batch pos"],
    *,
    splice_layers: Sequence[int] | None = None,
) -> list[tuple[str, Hook]]:
    """Forward hooks that replace the chosen layers of each kept token by a Crosscoder's reconstructions.

    Args:
        sae: a Crosscoder.
        model: gives the hook names; run it with ``run_with_hooks(tokens, fwd_hooks=...)``.
        stack: what its multi-layer hook point gave for the same tokens in a clean pass.
        keep: tokens to replace; the others (special tokens, padding) flow through untouched.
        splice_layers: block numbers to replace, all that it reads by default.

    Raises:
        ValueError: ``splice_layers`` names layers that the Crosscoder does not read.
    """
    chosen = chosen_layers(sae, splice_layers)
    decoded = split_layers(decode_fast(sae, encode_stack(sae, kept_rows(stack, keep))), len(sae.layers))

    def at(index: int) -> Hook:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            return x.index_put((keep,), in_stream(sae, decoded[:, index], x[keep]))

        return hook

    return [(layer_hook_name(model, layer, sae.cfg.site), at(sae.layers.index(layer))) for layer in chosen]


def encode_stack(
    sae: Crosscoder, stack: Float[Tensor, "token stacked"]
) -> TopKCode | Float[Tensor, "token d_sae"]:
    """A Crosscoder's latents of a raw stack, sparse where that is right (see ``fast_topk.encode_fast``)."""
    return encode_fast(sae, sae.standardized(stack), sae.encode_standardized)


def kept_rows(
    stack: Float[Tensor, "batch pos stacked"], keep: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "token stacked"]:
    """The kept tokens of a stack."""
    with torch.inference_mode(
        False
    ):  # standardising remembers its input by version; inference tensors have none
        return stack[keep]


def in_stream(
    sae: Crosscoder, y: Float[Tensor, "*batch d_model"], x: Float[Tensor, "*batch d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """A Crosscoder's reconstruction ``y`` of one layer in the model's space, in place of the activation ``x``.

    Where the Crosscoder standardises, ``y`` gets the mean and the standard deviation of ``x``.
    """
    if sae.cfg.standardize:
        stats = standardize(x.to(sae.dtype))
        y = y * stats.std + stats.mean
    return y.to(x.dtype)


def chosen_layers(sae: RouteSAE | Crosscoder, splice_layers: Sequence[int] | None) -> list[int]:
    """The block numbers that a splice of ``sae`` replaces: ``splice_layers``, or all that it reads.

    Raises:
        ValueError: ``splice_layers`` are not block numbers, or not among those that ``sae`` reads.
    """
    if splice_layers is None:
        return sae.layers
    layers = check_layers(splice_layers)
    if missing := [layer for layer in layers if layer not in sae.layers]:
        raise ValueError(
            f"splice_layers {layers} name layers that this {type(sae).__name__} does not read: {missing}; "
            f"it reads {sae.layers}"
        )
    return layers
