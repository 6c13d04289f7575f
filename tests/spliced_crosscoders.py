"""Crosscoders to splice and evaluate, and what the tests of their splice compare with."""

from __future__ import annotations

from typing import Any

import torch
from spliced import D_MODEL, D_SAE, TOKENS

from routesae_lens.hook_points import layer_hook_name, unmount_layers
from routesae_lens.saes.crosscoder import (
    Crosscoder,
    CrosscoderJumpReLUSAE,
    CrosscoderJumpReLUSAEConfig,
    CrosscoderStandardSAE,
    CrosscoderStandardSAEConfig,
    CrosscoderTopKSAE,
    CrosscoderTopKSAEConfig,
)

LAYERS = [1, 2, 4]
ARCHITECTURES: dict[str, Any] = {
    "topk": (CrosscoderTopKSAE, CrosscoderTopKSAEConfig),
    "jumprelu": (CrosscoderJumpReLUSAE, CrosscoderJumpReLUSAEConfig),
    "standard": (CrosscoderStandardSAE, CrosscoderStandardSAEConfig),
}


@torch.no_grad()
def make_crosscoder(layers: Any = LAYERS, architecture: str = "topk", **fields: Any) -> Crosscoder:
    """A Crosscoder with random weights, biases too."""
    sae_class, config = ARCHITECTURES[architecture]
    if architecture == "topk":
        fields = {"k": 6} | fields
    sae = sae_class(config(d_in=len(layers) * D_MODEL, d_sae=D_SAE, layers=list(layers), **fields))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sae.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(noise.abs() if name == "threshold" else noise)
    return sae


def latents_name(sae: Crosscoder) -> str:
    return f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"


@torch.no_grad()
def stack_of(model: Any, sae: Crosscoder, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What the Crosscoder reads in a clean pass, through its own hook point."""
    point = sae.mount(model)
    _, cache = model.run_with_cache(tokens, names_filter=point)
    unmount_layers(model, point)
    return cache[point]


@torch.no_grad()
def clean_layers(model: Any, sae: Crosscoder, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """The same by the backend's own single hooks: (batch, pos, layer, d_model)."""
    names = [layer_hook_name(model, layer, sae.cfg.site) for layer in sae.layers]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name] for name in names], dim=2)


def two_passes(
    model: Any, sae: Any, tokens: torch.Tensor = TOKENS, keep: Any = None, chosen: Any = None
) -> torch.Tensor:
    """Logits with latents from a clean pass and every layer overwritten by plain hooks; all arithmetic by hand.

    For the architectures whose latents are ReLU or JumpReLU of an affine map.
    """
    keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
    z = clean_layers(model, sae, tokens)
    if sae.cfg.standardize:
        z = (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-6)
    pre = (z.flatten(-2) - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc
    acts = pre * (pre > sae.threshold) if hasattr(sae, "threshold") else pre.relu()
    decoded = (acts @ sae.W_dec + sae.b_dec).unflatten(-1, (len(sae.layers), D_MODEL))

    def overwrite(index: int) -> Any:
        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
            y = decoded[:, :, index]
            if sae.cfg.standardize:
                y = y * (x.std(-1, keepdim=True) + 1e-6) + x.mean(-1, keepdim=True)
            return torch.where(keep[..., None], y, x)

        return hook

    hooks = [
        (layer_hook_name(model, layer, sae.cfg.site), overwrite(index))
        for index, layer in enumerate(sae.layers)
        if chosen is None or layer in chosen
    ]
    return model.run_with_hooks(tokens, fwd_hooks=hooks)
