"""The language models that a multi-layer hook point is mounted on, and its value made by other means."""

from __future__ import annotations

import pytest
import torch

from routesae_lens.hook_points import SITES

LAYERS = [1, 2, 4]
TOKENS = torch.tensor([[0, 5, 17, 33, 8], [0, 44, 3, 3, 61]])
BACKENDS = ["tiny_hooked", "tiny_bridge", "tiny_proxy"]
PROXY_HOOKS = {
    "hook_resid_pre": lambda i: f"model.layers.{i - 1}",
    "hook_resid_post": lambda i: f"model.layers.{i}",
    "hook_attn_out": lambda i: f"model.layers.{i}.self_attn",
    "hook_mlp_out": lambda i: f"model.layers.{i}.mlp",
}

every_backend = pytest.mark.parametrize("model", BACKENDS, indirect=True)
sae_backends = pytest.mark.parametrize("sae_model", BACKENDS[:2], indirect=True)
every_site = pytest.mark.parametrize("site", SITES)


def tiny_gemma2():
    """A family that normalises what attention and MLP write before it is added to the stream."""
    from sae_lens.load_model import HookedProxyLM
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return HookedProxyLM(Gemma2ForCausalLM(config).eval(), None)  # type: ignore[arg-type]


def stack_of(model, name: str, **kwargs) -> torch.Tensor:
    return model.run_with_cache(TOKENS, names_filter=[name], **kwargs)[1][name]


def one_by_one(model, site: str, layers=LAYERS) -> torch.Tensor:
    """The single layers' activations by the backend's own hooks, one run for each layer."""
    if type(model).__name__ == "HookedProxyLM":
        if site == "hook_resid_mid":  # no module puts it out: what attention adds to the block's input
            parts = zip(one_by_one(model, "hook_resid_pre"), one_by_one(model, "hook_attn_out"), strict=True)
            return torch.stack([resid + attention for resid, attention in parts])
        hooks = [PROXY_HOOKS[site](i) for i in layers]
    else:
        hooks = [f"blocks.{i}.{site}" for i in layers]
    return torch.cat([stack_of(model, hook) for hook in hooks], dim=-1)
