"""The splice beside special tokens, other SAEs and hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spliced import (
    D_MODEL,
    TOKENS,
    acts_name,
    assert_clean,
    make_sae,
    ordinary_sae,
    state_of,
    two_passes,
)

from routesae_lens.hook_points import layer_hook_name, mount_layers, mounted_points, unmount_layers
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
from routesae_lens.splice.replace import splice_hooks

# --- Special tokens ----------------------------------------------------------------------------------


def test_special_tokens_and_positions_out_of_training_are_left_alone(model: Any):
    special = [int(TOKENS[0, 3]), int(TOKENS[1, 5])]
    sae = make_sae(metadata={"exclude_special_tokens": special, "seqpos_slice": [1, None]})
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    keep = ~torch.isin(TOKENS, torch.tensor(special)) & (positions > 0)
    assert 0 < keep.sum() < TOKENS[:, 1:].numel()
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    torch.testing.assert_close(logits, two_passes(model, sae, keep=keep).logits, rtol=0, atol=1e-5)
    active = sum(cache[acts_name(model, sae, layer)].abs().sum(-1) for layer in sae.layers) > 0
    assert torch.equal(active, keep)
    # Given explicitly, it replaces the tokens but not the positions.
    everything = model.run_with_saes(TOKENS, saes=sae, exclude_special_tokens=False)
    torch.testing.assert_close(
        everything, two_passes(model, sae, keep=positions > 0).logits, rtol=0, atol=1e-5
    )


def test_the_tokenizers_special_tokens(bridge: RouteSAETransformerBridge):
    sae = make_sae(metadata={"exclude_special_tokens": True})
    tokens = TOKENS.clone()
    tokens[0, 0] = tokens[1, 4] = bridge.tokenizer.bos_token_id
    keep = tokens != bridge.tokenizer.bos_token_id
    torch.testing.assert_close(
        bridge.run_with_saes(tokens, saes=sae),
        two_passes(bridge, sae, tokens, keep).logits,
        rtol=0,
        atol=1e-5,
    )


def test_text_is_spliced_like_its_tokens(bridge: RouteSAETransformerBridge):
    sae = make_sae(metadata={"exclude_special_tokens": True})
    text = "The quick brown fox"
    tokens = bridge.to_tokens(text)
    assert (tokens == bridge.tokenizer.bos_token_id).any()
    with bridge.saes(sae):
        torch.testing.assert_close(bridge(text), bridge(tokens), rtol=0, atol=0)
        padded = bridge([text, "A sparse autoencoder reads"])
        n = tokens.shape[1]
        torch.testing.assert_close(padded[:1, :n], bridge(tokens), rtol=0, atol=1e-4)


def test_special_tokens_that_cannot_be_told_are_refused(hooked: HookedRouteSAETransformer):
    before = state_of(hooked)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        hooked.add_sae(make_sae(), exclude_special_tokens=True)
    assert_clean(hooked, before)
    special = [int(TOKENS[0, 3])]
    with hooked.saes(make_sae(), exclude_special_tokens=special):
        logits = hooked(TOKENS)
        residual = hooked.input_to_embed(TOKENS)[0]
        with pytest.raises(ValueError, match="embeddings, not token ids"):
            hooked(residual, start_at_layer=0)
        torch.testing.assert_close(hooked(residual, start_at_layer=0, tokens=TOKENS), logits, rtol=0, atol=0)
        with pytest.raises(ValueError, match="expected \\(2, 9\\)"):
            hooked(residual, start_at_layer=0, tokens=TOKENS[:, 1:])


def test_embeddings_on_the_bridge_with_special_tokens_are_refused(bridge: RouteSAETransformerBridge):
    embeddings = torch.randn(1, 5, D_MODEL)
    with bridge.saes(make_sae()):
        assert bridge(embeddings).shape == (1, 5, 128)
    with bridge.saes(make_sae(), exclude_special_tokens=True), pytest.raises(ValueError, match="embeddings"):
        bridge(embeddings)


# --- Beside other things -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_an_ordinary_sae_at_another_layer(model: Any, layer: int):
    sae, other = make_sae((1, 2, 4)), ordinary_sae(f"blocks.{layer}.hook_resid_post")

    def apply(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return other.decode(other.encode(x))

    name = layer_hook_name(model, layer)
    point = sae.mount(model)
    stack = []
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, apply), (point, lambda x, hook: stack.append(x))])
    unmount_layers(model, point)
    route = sae.route(stack[0])
    hooks = [(name, apply), *splice_hooks(sae, model, route, torch.ones_like(TOKENS, dtype=torch.bool))]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    before = state_of(model)
    for saes in ([sae, other], [other, sae]):
        torch.testing.assert_close(model.run_with_saes(TOKENS, saes=saes), expected, rtol=0, atol=1e-5)
    assert_clean(model, before)


def test_two_routesaes_on_different_layers(model: Any):
    low, high = make_sae((0, 2)), make_sae((1, 4), "jumprelu")
    points = [low.mount(model), high.mount(model)]
    _, cache = model.run_with_cache(TOKENS, names_filter=points)
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    hooks = [
        hook
        for sae, point in zip((low, high), points, strict=True)
        for hook in splice_hooks(sae, model, sae.route(cache[point]), keep)
    ]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with model.saes([high, low]):
        assert model.route_saes == {points[0]: low, points[1]: high}
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
        model.reset_saes("blocks.2.hook_resid_post")
        assert model.route_saes == {points[1]: high}
    assert model.route_saes == {} and mounted_points(model) == sorted(points)  # they were there before


def test_user_hooks_on_the_stream_are_seen_by_router_and_splice(model: Any):
    sae = make_sae()
    shift = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3)) * 2

    def steer(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + shift

    below, routed = layer_hook_name(model, 0), layer_hook_name(model, 2)
    for name in (below, routed):
        with model.hooks(fwd_hooks=[(name, steer)]):
            steered = model(TOKENS)
            expected = two_passes(
                model, sae
            ).logits  # the hook that is there comes before those of the splice
            with model.saes(sae):  # the hook on the layer's own HookPoint stays in force
                torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(model(TOKENS), steered, rtol=0, atol=0)  # and after the splice is gone
        assert not torch.allclose(expected, model.run_with_saes(TOKENS, saes=sae), atol=1e-2)


def test_the_model_keeps_its_parameters(model: Any):
    sae = make_sae((1, 3))
    parameters = [id(parameter) for parameter in model.parameters()]
    names = set(model.state_dict())
    with model.saes(sae):
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert set(model.state_dict()) == names
        assert not {id(p) for p in sae.parameters()} & set(parameters)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_hooks_below_the_first_layer_that_is_read_fire_once(model: Any, share: bool, gradients: bool):
    """With ``share_prefix``; the bridge shares only while gradients are off. The results are the same."""
    sae = make_sae((2, 3))
    shared = share and (not gradients or isinstance(model, HookedRouteSAETransformer))
    fired: list[int] = []

    def shift(x: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.append(int(hook.name.split(".")[1]))
        return x + 0.3  # both passes have to see it

    model.share_prefix = share
    hooks = [(layer_hook_name(model, layer), shift) for layer in range(6) if layer not in (2, 3)]
    with torch.set_grad_enabled(gradients):
        logits = model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=hooks)
    assert fired == [*([0, 1] if shared else [0, 1, 0, 1]), 4, 5]
    with model.hooks(fwd_hooks=hooks):
        expected = two_passes(model, sae).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_another_multi_layer_hook_point_that_is_heard_gets_all_its_layers(model: Any):
    """Its layers may lie below and above the shared prefix, so nothing is shared then."""
    point = mount_layers(model, [0, 1, 4])
    sae = make_sae((2, 3))
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
        singles = [cache[layer_hook_name(model, layer)] for layer in (0, 1, 4)]
    torch.testing.assert_close(cache[point], torch.cat(singles, dim=-1), rtol=0, atol=0)


def test_run_with_cache_shows_the_spliced_pass(model: Any):
    sae = make_sae((1, 3))
    last = layer_hook_name(model, 5)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    torch.testing.assert_close(logits, two_passes(model, sae).logits, rtol=0, atol=1e-5)
    out = f"{layer_hook_name(model, 1)}.hook_sae_output"
    _, clean = model.run_with_cache(TOKENS)
    [route] = model.last_routes.values()
    changed = (cache[out] - clean[layer_hook_name(model, 1)]).abs().sum(-1) > 1e-6
    assert torch.equal(changed, route.layer == 0)
    assert not torch.equal(cache[last], clean[last])
