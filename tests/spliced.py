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


def assert_clean(model: Any, before: dict[str, Any]) -> None:
    """Nothing of any SAE is left on ``model``, and it computes what it did."""
    assert model.acts_to_saes == {} and model.route_saes == model.crosscoders == {}
    assert mounted_points(model) == []
    assert set(model.hook_dict) == before["hooks"]
    torch.testing.assert_close(model(TOKENS), before["logits"], rtol=0, atol=0)


def state_of(model: Any) -> dict[str, Any]:
    return {"hooks": set(model.hook_dict), "logits": model(TOKENS).detach()}
