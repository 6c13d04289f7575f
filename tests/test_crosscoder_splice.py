"""Crosscoders in the model: what is written at each layer, and the latents that hooks see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from spliced import D_MODEL, D_SAE, TOKENS
from spliced_crosscoders import (
    ARCHITECTURES,
    LAYERS,
    clean_layers,
    latents_name,
    make_crosscoder,
    stack_of,
    two_passes,
)

from routesae_lens.hook_points import layer_hook_name
from routesae_lens.splice.hooked import RouteSAETransformerBridge
from routesae_lens.splice.replace import crosscoder_hooks

KEEP = torch.ones_like(TOKENS, dtype=torch.bool)


# --- What is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("chosen", [None, [2], [1, 4]])
def test_the_splice_by_hand(model: Any, architecture: str, chosen: list[int] | None):
    sae = make_crosscoder(architecture=architecture)
    expected = two_passes(model, sae, chosen=chosen)
    logits = model.run_with_saes(TOKENS, saes=sae, splice_layers=chosen)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits, model(TOKENS), atol=1e-3)
    if chosen is not None:
        assert not torch.allclose(logits, model.run_with_saes(TOKENS, saes=sae), atol=1e-3)


@pytest.mark.parametrize("site", ["hook_resid_post", "hook_resid_pre", "hook_mlp_out"])
@pytest.mark.parametrize("standardize", [True, False])
def test_every_site_and_without_standardisation(model: Any, site: str, standardize: bool):
    sae = make_crosscoder(architecture="standard", site=site, standardize=standardize)
    expected = two_passes(model, sae)
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("chosen", [None, [1, 4]])
def test_the_splice_is_the_one_that_evaluation_uses(model: Any, architecture: str, chosen: list[int] | None):
    sae = make_crosscoder(architecture=architecture)
    hooks = crosscoder_hooks(sae, model, stack_of(model, sae), KEEP, splice_layers=chosen)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    logits = model.run_with_saes(TOKENS, saes=sae, splice_layers=chosen)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_special_tokens_and_positions_out_of_training_flow_through(model: Any):
    special = [int(TOKENS[0, 3]), int(TOKENS[1, 5])]
    metadata = {"exclude_special_tokens": special, "seqpos_slice": [1, None]}
    sae = make_crosscoder(architecture="standard", metadata=SAEMetadata(**metadata))
    keep = ~torch.isin(TOKENS, torch.tensor(special))
    keep[:, 0] = False
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    torch.testing.assert_close(logits, two_passes(model, sae, keep=keep), rtol=0, atol=1e-5)
    assert torch.equal(cache[latents_name(sae)].abs().sum(-1) > 0, keep)
    everything = model.run_with_saes(TOKENS, saes=sae, exclude_special_tokens=False)
    keep = torch.ones_like(keep)
    keep[:, 0] = False
    torch.testing.assert_close(everything, two_passes(model, sae, keep=keep), rtol=0, atol=1e-5)


# --- The error term ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("chosen", [None, [4]])
def test_with_the_error_term_every_layer_comes_out_clean(
    model: Any, architecture: str, chosen: list[int] | None
):
    sae = make_crosscoder(architecture=architecture)
    clean = clean_layers(model, sae)
    logits, cache = model.run_with_cache_with_saes(
        TOKENS, saes=sae, use_error_term=True, splice_layers=chosen
    )
    torch.testing.assert_close(logits, model(TOKENS), rtol=0, atol=1e-4)
    for index, layer in enumerate(LAYERS):
        name = layer_hook_name(model, layer)
        if chosen is None or layer in chosen:
            out, error = cache[f"{name}.hook_sae_output"], cache[f"{name}.hook_sae_error"]
            torch.testing.assert_close(out, clean[:, :, index], rtol=0, atol=1e-4)
            assert error.abs().max() > 0.1
        else:
            assert f"{name}.hook_sae_error" not in cache


def test_with_the_error_term_an_edit_is_added_to_the_current_stream_of_each_layer(model: Any):
    sae = make_crosscoder(architecture="standard")
    clean, seen = clean_layers(model, sae), {}

    def ablate(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        seen["acts"] = acts
        return acts * 0

    def catch(layer: int, what: str) -> Any:
        return lambda x, hook: seen.__setitem__((layer, what), x)

    hooks = [(latents_name(sae), ablate)]
    for layer in LAYERS:
        path = layer_hook_name(model, layer)
        hooks += [
            (f"{path}.hook_original", catch(layer, "in")),
            (f"{path}.hook_sae_output", catch(layer, "out")),
        ]
    logits = model.run_with_hooks_with_saes(TOKENS, saes=sae, use_error_term=True, fwd_hooks=hooks)
    assert not torch.allclose(logits, model(TOKENS), atol=1e-3)
    # What is written: the current stream, and what the edit took away (b_dec stays) with its statistics.
    lost = (seen["acts"] @ sae.W_dec).unflatten(-1, (len(LAYERS), D_MODEL))
    for index, layer in enumerate(LAYERS):
        now = seen[layer, "in"]
        expected = now - lost[:, :, index] * (now.std(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(seen[layer, "out"], expected, rtol=1e-4, atol=1e-4)
        if index:  # what the layers below have lost is not given back
            assert not torch.allclose(now, clean[:, :, index], atol=1e-1)


# --- Latents -----------------------------------------------------------------------------------------


def test_the_latents_are_those_of_the_clean_pass_under_one_name(model: Any):
    sae = make_crosscoder()
    stack = stack_of(model, sae)
    calls: list[str] = []
    with model.saes(sae):
        [point] = model.crosscoders
        names = [name for name in model.hook_dict if name.endswith("hook_sae_acts_post")]
        assert names == [latents_name(sae)] == [f"{point}.hook_sae_acts_post"]
        model.run_with_hooks(TOKENS, fwd_hooks=[(names[0], lambda x, hook: calls.append(hook.name))])
        assert calls == names
        _, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(cache[names[0]], sae.encode(stack), rtol=0, atol=1e-6)
    assert cache[names[0]].shape == (*TOKENS.shape, D_SAE)
    torch.testing.assert_close(cache[f"{point}.hook_sae_input"], sae.standardized(stack), rtol=0, atol=1e-6)
    assert cache[f"{point}.hook_sae_recons"].shape == stack.shape


def test_the_name_of_the_latents_is_the_one_saelens_gives(bridge: RouteSAETransformerBridge):
    sae = make_crosscoder()
    bridge.add_sae(sae)
    assert list(bridge.acts_to_saes) == [f"blocks.{i}.hook_resid_post" for i in LAYERS]
    for view in bridge.acts_to_saes.values():
        assert bridge.get_sae_hook_name(view) == latents_name(sae)


@pytest.mark.parametrize("chosen", [None, [2, 4]])
def test_editing_a_latent_reaches_every_spliced_layer_of_that_token(model: Any, chosen: list[int] | None):
    sae = make_crosscoder()
    batch, pos, latent = 1, 4, 7

    def edit(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[batch, pos, latent] = 3.0
        return acts

    acts = edit(sae.encode(stack_of(model, sae)), None)
    decoded = (acts @ sae.W_dec + sae.b_dec).unflatten(-1, (len(LAYERS), D_MODEL))
    with model.saes(sae, splice_layers=chosen):
        plain, before = model.run_with_cache(TOKENS)
        with model.hooks(fwd_hooks=[(latents_name(sae), edit)]):
            logits, after = model.run_with_cache(TOKENS)
    assert (logits - plain)[batch, pos:].abs().max() > 1e-3
    torch.testing.assert_close(logits[0], plain[0], rtol=0, atol=0)
    for index, layer in enumerate(LAYERS):
        path = layer_hook_name(model, layer)
        if chosen is not None and layer not in chosen:
            assert f"{path}.hook_sae_output" not in after
            continue
        x, out = after[f"{path}.hook_original"], after[f"{path}.hook_sae_output"]
        expected = decoded[:, :, index] * (x.std(-1, keepdim=True) + 1e-6) + x.mean(-1, keepdim=True)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert (out - before[f"{path}.hook_sae_output"])[batch, pos].abs().max() > 1e-2


def test_gradients_reach_the_latents_and_what_is_encoded_is_a_constant(model: Any):
    sae = make_crosscoder(architecture="standard")
    leaves, latents = [], []

    def cut(x: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(x.detach().requires_grad_())
        return leaves[-1]

    def catch(x: torch.Tensor, hook: Any) -> None:
        x.retain_grad()
        latents.append(x)

    first = layer_hook_name(model, 0)
    hooks = [(first, cut), (latents_name(sae), catch)]
    model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=hooks).square().sum().backward()
    [*routing, spliced], [acts] = leaves, latents  # (HookedTransformer runs block 0 once for both passes)
    assert all(x.grad is None for x in routing) and spliced.grad.abs().max() > 0
    assert sae.W_enc.grad.abs().max() > 0 and sae.W_dec.grad.abs().max() > 0
    # The same gradient as with latents given as plain numbers.
    given = acts.detach().clone().requires_grad_()
    model.run_with_hooks_with_saes(
        TOKENS, saes=sae, fwd_hooks=[(latents_name(sae), lambda x, hook: given)]
    ).square().sum().backward()
    torch.testing.assert_close(acts.grad, given.grad, rtol=1e-5, atol=1e-5)
    assert given.grad.abs().max() > 0
