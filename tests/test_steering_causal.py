"""Raising a latent raises what it stands for: planted cases in which the change of the logits is known.

The blocks of the model write nothing and it has no final norm, so logits are the sum of what was embedded and
what a splice added, read by the unembedding. A decoder row is the unembedding direction of one token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

from routesae_lens.saes.architectures import RouteStandardSAE, RouteStandardSAEConfig
from routesae_lens.saes.crosscoder import CrosscoderStandardSAE, CrosscoderStandardSAEConfig
from routesae_lens.splice.edits import Ablate, Add, Set
from routesae_lens.splice.hooked import HookedRouteSAETransformer

D, VOCAB, N_LAYERS, LATENT, TOKEN = 16, 24, 5, 3, 11
TOKENS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
STREAMS = [f"blocks.{i}.hook_resid_post" for i in range(N_LAYERS)]


@pytest.fixture
def silent() -> HookedRouteSAETransformer:
    """A model of blocks that write nothing, in float64; every unembedding direction is orthogonal to others."""
    config = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D,
        n_ctx=16,
        d_head=4,
        n_heads=4,
        d_mlp=8,
        d_vocab=VOCAB,
        act_fn="relu",
        normalization_type=None,
        dtype=torch.float64,
        device="cpu",
        seed=0,
    )
    model = HookedRouteSAETransformer(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for block in model.blocks:
            for name in ("W_O", "b_O"):
                getattr(block.attn, name).zero_()
            block.mlp.W_out.zero_()
            block.mlp.b_out.zero_()
        # Token TOKEN alone is read from its direction, a unit vector without a mean.
        model.W_U[:, TOKEN] = unit()
        others = torch.arange(VOCAB) != TOKEN
        model.W_U[:, others] -= unit()[:, None] * (unit() @ model.W_U[:, others])
    return model


def unit() -> torch.Tensor:
    direction = torch.linspace(-1, 1, D, dtype=torch.float64) ** 3 + torch.tensor([0.1, -0.1] * (D // 2))
    direction = direction - direction.mean()
    return direction / direction.norm()


@torch.no_grad()
def planted(sae: Any, writes: list[float]) -> Any:
    """Random weights, but latent LATENT writes ``writes[layer]`` times the direction of TOKEN."""
    sae = sae.to(torch.float64)
    generator = torch.Generator().manual_seed(2)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    sae.W_dec[LATENT] = torch.cat([factor * unit() for factor in writes])
    return sae


def route_sae(layers: list[int], **fields: Any) -> RouteStandardSAE:
    config = RouteStandardSAEConfig(d_in=len(layers) * D, d_sae=12, layers=layers, **fields)
    return planted(RouteStandardSAE(config), [1.0])


def run(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the stream after every block (block, batch, pos, d_model)."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    streams = [
        cache[f"{name}.hook_sae_output" if f"{name}.hook_sae_output" in cache else name] for name in STREAMS
    ]
    return logits, torch.stack(streams)


def std(x: torch.Tensor) -> torch.Tensor:
    return x.std(-1) + 1e-6


def only_token(change: torch.Tensor) -> torch.Tensor:
    """Change of TOKEN's logit; no other logit may have moved."""
    others = torch.arange(VOCAB) != TOKEN
    torch.testing.assert_close(change[..., others], torch.zeros_like(change[..., others]), rtol=0, atol=1e-9)
    return change[..., TOKEN]


@pytest.mark.parametrize("value", [4.0, -1.5])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("scale_by_p", [True, False])
def test_a_latent_moves_its_token_at_the_routed_layer_only(
    silent: Any, value: float, standardize: bool, scale_by_p: bool
):
    sae = route_sae([1, 2, 4], standardize=standardize)
    before, clean = run(silent)
    with silent.steer(sae, {LATENT: Add(value)}, scale_by_p=scale_by_p):
        after, streams = run(silent)
        [route] = silent.last_routes.values()
    assert len(route.layer.unique()) > 1
    # The blocks write nothing, so every layer of a token has the same stream, and the same std.
    factor = std(clean[0]) if standardize else torch.ones(TOKENS.shape, dtype=torch.float64)
    p = route.scale if scale_by_p else torch.ones_like(route.scale)
    predicted = value * factor / p
    torch.testing.assert_close(only_token(after - before), predicted, rtol=1e-9, atol=1e-9)
    routed_to = torch.tensor(sae.layers)[route.layer]
    for layer in range(N_LAYERS):
        moved = streams[layer] - clean[layer]
        reached = (routed_to <= layer)[..., None]  # below its layer a token's stream is untouched
        torch.testing.assert_close(
            moved, torch.where(reached, predicted[..., None] * unit(), 0.0), rtol=1e-9, atol=1e-9
        )


def test_a_clamp_moves_it_by_what_the_latent_lacked(silent: Any):
    sae = route_sae([1, 2, 4])
    before, clean = run(silent)
    _, cache = silent.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
    [route] = silent.last_routes.values()
    own = sum(cache[f"blocks.{i}.hook_resid_post.hook_sae_acts_post"][..., LATENT] for i in sae.layers)
    assert (own > 0).any() and (own == 0).any()
    for edit, difference in ((Set(20.0), 20 - own), (Ablate(), -own)):
        with silent.steer(sae, {LATENT: edit}):
            after, _ = run(silent)
        predicted = difference * std(clean[0]) / route.scale
        torch.testing.assert_close(only_token(after - before), predicted, rtol=1e-9, atol=1e-9)


def test_only_the_chosen_positions_move(silent: Any):
    sae = route_sae([1, 2, 4])
    before, clean = run(silent)
    with silent.steer(sae, {LATENT: Add(3.0)}, positions=slice(2, -3)):
        after, streams = run(silent)
        [route] = silent.last_routes.values()
    here = torch.zeros(TOKENS.shape, dtype=torch.bool)
    here[:, 2:4] = True
    predicted = torch.where(here, 3 * std(clean[0]) / route.scale, 0.0)
    torch.testing.assert_close(only_token(after - before), predicted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(streams[:, ~here], clean[:, ~here], rtol=0, atol=1e-12)


def test_at_chosen_layers_every_layer_adds(silent: Any):
    """The second layer's std is that of the stream that the first has moved."""
    sae = route_sae([1, 2, 4])
    before, clean = run(silent)
    with silent.steer(sae, {LATENT: Add(3.0)}, layers=[1, 4]):
        after, streams = run(silent)
        [route] = silent.last_routes.values()
    first = 3 * std(clean[0]) / route.scale
    second = 3 * std(clean[0] + first[..., None] * unit()) / route.scale
    torch.testing.assert_close(only_token(after - before), first + second, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(streams[0], clean[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(streams[2], clean[0] + first[..., None] * unit(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("chosen", [None, [1, 4], 2])
def test_a_crosscoder_moves_it_by_the_sum_over_its_layers(silent: Any, chosen: Any, standardize: bool):
    writes = {1: 1.0, 2: 0.5, 4: -2.0}
    config = CrosscoderStandardSAEConfig(d_in=3 * D, d_sae=12, layers=list(writes), standardize=standardize)
    sae = planted(CrosscoderStandardSAE(config), list(writes.values()))
    before, clean = run(silent)
    with silent.steer(sae, {LATENT: Add(3.0)}, layers=chosen):
        after, streams = run(silent)
    listed = [chosen] if isinstance(chosen, int) else chosen or list(writes)
    stream = clean[0]
    for layer in range(N_LAYERS):
        if layer in listed:
            factor = std(stream) if standardize else torch.ones(TOKENS.shape, dtype=torch.float64)
            stream = stream + (3 * writes[layer] * factor)[..., None] * unit()
        torch.testing.assert_close(streams[layer], stream, rtol=1e-9, atol=1e-9)
    total = (stream - clean[0]) @ unit()
    torch.testing.assert_close(only_token(after - before), total, rtol=1e-9, atol=1e-9)
    if not standardize:
        expected = torch.full(TOKENS.shape, 3 * sum(writes[i] for i in listed), dtype=torch.float64)
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9)


def test_an_ordinary_sae_moves_it_at_its_layer(silent: Any):
    metadata = SAEMetadata(hook_name=STREAMS[2])
    sae = planted(StandardSAE(StandardSAEConfig(d_in=D, d_sae=12, metadata=metadata)), [1.0])
    before, clean = run(silent)
    with silent.steer(sae, {LATENT: Add(3.0)}):
        after, streams = run(silent)
    full = torch.full(TOKENS.shape, 3.0, dtype=torch.float64)
    torch.testing.assert_close(only_token(after - before), full, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(streams[:2], clean[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(streams[2], clean[2] + 3 * unit(), rtol=1e-9, atol=1e-9)


def test_raised_at_generated_tokens_it_is_what_the_model_says(silent: Any):
    """The prompt is untouched; every generated token that is steered is followed by TOKEN."""
    sae = route_sae([1, 2, 4])
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    plain = silent.generate(TOKENS, use_past_kv_cache=False, **options)
    with silent.steer(sae, {LATENT: Add(1e3)}, positions="generated"):
        steered = silent.generate(TOKENS, use_past_kv_cache=False, **options)
    assert torch.equal(steered[:, 7], plain[:, 7])  # chosen at the prompt's last token
    assert (steered[:, 8:] == TOKEN).all() and not (plain[:, 8:] == TOKEN).all()
