"""SAEs to splice, and what the tests of the splice compare with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from routesae_lens.hook_points import layer_hook_name, mounted_points, unmount_layers
from routesae_lens.saes.architectures import (
    RouteGatedSAE,
    RouteGatedSAEConfig,
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
    RouteTopKSAE,
    RouteTopKSAEConfig,
)
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.splice.replace import splice_hooks

D_MODEL, D_SAE = 32, 48
ARCHITECTURES: dict[str, Any] = {
    "topk": (RouteTopKSAE, RouteTopKSAEConfig),
    "jumprelu": (RouteJumpReLUSAE, RouteJumpReLUSAEConfig),
    "gated": (RouteGatedSAE, RouteGatedSAEConfig),
    "standard": (RouteStandardSAE, RouteStandardSAEConfig),
}
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def make_sae(
    layers: tuple[int, ...] = (1, 2, 4),
    architecture: str = "topk",
    metadata: dict[str, Any] | None = None,
    **fields: Any,
) -> RouteSAE:
    """A RouteSAE with random weights (biases too) under which tokens really go to different layers."""
    sae_class, config = ARCHITECTURES[architecture]
    if architecture == "topk":
        fields = {"k": 6} | fields
    if fields.get("routing") == "fixed":
        fields = {"fixed_layer": layers[-1]} | fields
    cfg = config(
        d_in=len(layers) * D_MODEL,
        d_sae=D_SAE,
        layers=list(layers),
        metadata=SAEMetadata(**metadata or {}),
        **fields,
    )
    sae = sae_class(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise.abs() if name == "threshold" else noise)
    return sae


def ordinary_sae(hook_name: str) -> StandardSAE:
    torch.manual_seed(2)
    return StandardSAE(
        StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook_name))
    )


def acts_name(model: Any, sae: RouteSAE, layer: int) -> str:
    return f"{layer_hook_name(model, layer, sae.cfg.site)}.hook_sae_acts_post"


def two_passes(
    model: Any, sae: RouteSAE, tokens: torch.Tensor = TOKENS, keep: Any = None, **options: Any
) -> Any:
    """Routes from a clean pass, then one replacement per layer by ordinary hooks; no splice class involved."""
    assert not model.acts_to_saes
    point = sae.mount(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=point)
        route = sae.route(cache[point])
    unmount_layers(model, point)
    keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
    logits = model.run_with_hooks(tokens, fwd_hooks=splice_hooks(sae, model, route, keep, **options))
    return SimpleNamespace(logits=logits, route=route)


GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
PAD = 2
"""Padding id of the tiny Llama's tokenizer."""


@torch.no_grad()
def by_hand(model: Any, tokens: torch.Tensor, n: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Greedy tokens, each from a forward over the whole sequence: no generate, no cache."""
    for _ in range(n):
        options = {} if mask is None else {"attention_mask": mask}
        tokens = torch.cat([tokens, model(tokens, **options)[:, -1:].argmax(-1)], dim=1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return tokens


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of prompts of different lengths."""
    length = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    return tokens, (torch.arange(length) >= torch.tensor([[length - len(row)] for row in rows])).long()


def assert_clean(model: Any, before: dict[str, Any]) -> None:
    """Nothing of any SAE, of steering or of a pass is left on ``model``, and it computes what it did."""
    assert model.acts_to_saes == {} and model.route_saes == model.crosscoders == {}
    assert model._steerings == []
    assert mounted_points(model) == []
    assert set(model.hook_dict) == before["hooks"]
    assert torch_hooks(model) == before["torch_hooks"]
    assert not any("forward" in block.__dict__ for block in model.blocks)
    assert model._generation is None and not {"_window", "_embedded_tokens"} & set(model.__dict__)
    torch.testing.assert_close(model(TOKENS), before["logits"], rtol=0, atol=0)


def torch_hooks(model: Any) -> dict[str, int]:
    """How many hooks of torch's own each module has, where there are any."""
    counts = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in model.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


def state_of(model: Any) -> dict[str, Any]:
    logits = model(TOKENS).detach()
    return {"hooks": set(model.hook_dict), "logits": logits, "torch_hooks": torch_hooks(model)}
