"""Crosscoders in the model: what is written at each layer, the latents that hooks see, attaching."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from spliced import D_MODEL, D_SAE, TOKENS, assert_clean, make_sae, ordinary_sae, state_of
from spliced_crosscoders import (
    ARCHITECTURES,
    LAYERS,
    clean_layers,
    latents_name,
    make_crosscoder,
    stack_of,
    two_passes,
)

from routesae_lens.hook_points import layer_hook_name, mounted_points
from routesae_lens.saes.crosscoder import (
    CrosscoderStandardTrainingSAE,
    CrosscoderStandardTrainingSAEConfig,
)
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
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


def test_the_error_term_does_not_undo_an_edit_nor_count_it_twice(model: Any):
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
    # What is written: the error of the clean pass, and the rest (b_dec alone) with the stream's statistics.
    full = (seen["acts"] @ sae.W_dec + sae.b_dec).unflatten(-1, (len(LAYERS), D_MODEL))
    for index, layer in enumerate(LAYERS):
        then, now = clean[:, :, index], seen[layer, "in"]
        mean, std = (then.mean(-1, keepdim=True), then.std(-1, keepdim=True) + 1e-6)
        error = then - (full[:, :, index] * std + mean)
        bias = sae.b_dec.unflatten(-1, (len(LAYERS), D_MODEL))[index]
        expected = bias * (now.std(-1, keepdim=True) + 1e-6) + now.mean(-1, keepdim=True) + error
        torch.testing.assert_close(seen[layer, "out"], expected, rtol=1e-4, atol=1e-4)


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
    [routing, spliced], [acts] = leaves, latents
    assert routing.grad is None and spliced.grad.abs().max() > 0
    assert sae.W_enc.grad.abs().max() > 0 and sae.W_dec.grad.abs().max() > 0
    # The same gradient as with latents given as plain numbers.
    given = acts.detach().clone().requires_grad_()
    model.run_with_hooks_with_saes(
        TOKENS, saes=sae, fwd_hooks=[(latents_name(sae), lambda x, hook: given)]
    ).square().sum().backward()
    torch.testing.assert_close(acts.grad, given.grad, rtol=1e-5, atol=1e-5)
    assert given.grad.abs().max() > 0


# --- Attaching and detaching -------------------------------------------------------------------------


def test_attach_and_reset_by_every_name(model: Any):
    sae = make_crosscoder()
    before = state_of(model)
    for name in (sae.cfg.metadata.hook_name, "blocks.1.hook_resid_post", layer_hook_name(model, 4), None):
        for chosen in (None, [1, 4]):
            model.add_sae(sae, splice_layers=chosen)
            assert list(model.crosscoders.values()) == [sae] and model.route_saes == {}
            assert list(model.acts_to_saes) == [f"blocks.{i}.hook_resid_post" for i in chosen or LAYERS]
            spliced = model(TOKENS)
            assert not torch.allclose(spliced, before["logits"], atol=1e-3) and model.last_routes == {}
            torch.testing.assert_close(model(TOKENS), spliced, rtol=0, atol=0)
            model.reset_saes(name)
            assert_clean(model, before)
    assert sae.hook_sae_acts_post.name == "hook_sae_acts_post"  # the SAE's own hook points are untouched


def test_a_mounted_point_is_left_as_it_was(model: Any):
    sae = make_crosscoder()
    point = sae.mount(model)
    before = set(model.hook_dict)
    model.run_with_saes(TOKENS, saes=sae)
    assert mounted_points(model) == [point] and set(model.hook_dict) == before
    assert stack_of(model, sae).shape == (*TOKENS.shape, len(LAYERS) * D_MODEL)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("failing", [2, 4])
def test_attaching_is_all_or_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, failing: int):
    before = state_of(model)
    put, calls = type(model)._put, []

    def fail_once(self: Any, path: str, module: Any) -> None:
        calls.append(path)
        if len(calls) == failing:
            raise Interrupted
        put(self, path, module)

    monkeypatch.setattr(type(model), "_put", fail_once)
    with pytest.raises(Interrupted):
        model.add_sae(make_crosscoder())
    assert_clean(model, before)


def test_the_model_is_clean_after_an_exception(model: Any):
    sae = make_crosscoder()
    before = state_of(model)

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise Interrupted

    for name in (layer_hook_name(model, 0), latents_name(sae), layer_hook_name(model, 5)):
        with pytest.raises(Interrupted):
            model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=[(name, fail)])
        assert_clean(model, before)
    with model.saes(sae):
        logits = model(TOKENS)
        with pytest.raises(Interrupted):
            model.run_with_hooks(TOKENS, fwd_hooks=[(latents_name(sae), fail)])
        torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_what_cannot_be_attached_is_refused(model: Any):
    before = state_of(model)
    sae = make_crosscoder()
    training = CrosscoderStandardTrainingSAE(
        CrosscoderStandardTrainingSAEConfig(d_in=3 * D_MODEL, d_sae=D_SAE, layers=LAYERS)
    )
    with pytest.raises(TypeError, match=r"inference_form\(sae\)"):
        model.add_sae(training)
    with pytest.raises(TypeError, match="scale_by_p=False is for RouteSAEs, not for CrosscoderTopKSAE"):
        model.add_sae(sae, scale_by_p=False)
    with pytest.raises(TypeError, match="scale_by_p=False is for"), model.saes(sae, scale_by_p=False):
        pass
    for other in (make_sae(), ordinary_sae("blocks.1.hook_resid_post")):
        with pytest.raises(TypeError, match="splice_layers is for Crosscoders"):
            model.add_sae(other, splice_layers=[1])
        with (
            pytest.raises(TypeError, match="splice_layers is for Crosscoders"),
            model.saes(other, splice_layers=[1]),
        ):
            pass
    with pytest.raises(ValueError, match=r"does not read: \[3\]; it reads \[1, 2, 4\]"):
        model.add_sae(sae, splice_layers=[1, 3])
    for bad in ([], [4, 1]):
        with pytest.raises(ValueError, match="layers must be"):
            model.run_with_saes(TOKENS, saes=sae, splice_layers=bad)
    assert_clean(model, before)

    model.add_sae(sae, splice_layers=[1, 4])
    with pytest.raises(ValueError, match="a Crosscoder is already attached"):
        model.add_sae(make_crosscoder(architecture="standard"), splice_layers=[2])
    with pytest.raises(ValueError, match="already carries a Crosscoder; two cannot share a layer"):
        model.add_sae(make_sae((0, 4)))
    with pytest.raises(ValueError, match="carries a Crosscoder; reset_saes"):
        model.add_sae(ordinary_sae("blocks.4.hook_resid_post"))
    model.reset_saes()
    model.add_sae(make_sae((0, 4)))
    with pytest.raises(ValueError, match="already carries a RouteSAE"):
        model.add_sae(sae)
    model.add_sae(sae, splice_layers=[1, 2])  # it only reads layer 4
    model.reset_saes()
    assert_clean(model, before)


def test_beside_a_routesae_and_an_ordinary_sae(model: Any):
    sae, routed, other = make_crosscoder(), make_sae((0, 5)), ordinary_sae("blocks.3.hook_resid_post")
    before = state_of(model)
    logits = []
    for saes in ([sae, routed, other], [other, routed, sae]):
        logits.append(model.run_with_saes(TOKENS, saes=saes, scale_by_p=False, splice_layers=[1, 4]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    with model.saes([other, routed], scale_by_p=False):
        without = model(TOKENS)
        model.add_sae(sae, splice_layers=[1, 4])
        torch.testing.assert_close(model(TOKENS), logits[0], rtol=0, atol=0)
        assert list(model.last_routes) == list(model.route_saes)
        model.reset_saes("blocks.1.hook_resid_post")
        torch.testing.assert_close(model(TOKENS), without, rtol=0, atol=0)
    assert not torch.allclose(without, logits[0], atol=1e-3)
    assert_clean(model, before)


def test_a_deep_copy_is_a_model_of_its_own(model: Any):
    sae = make_crosscoder()
    model.add_sae(sae)
    logits = model(TOKENS)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(TOKENS), logits, rtol=0, atol=0)
    [its_own] = twin.crosscoders.values()
    assert its_own is not sae and twin.acts_to_saes["blocks.1.hook_resid_post"].W_dec is its_own.W_dec
    ablate = [(latents_name(sae), lambda acts, hook: acts * 0)]
    ablated = twin.run_with_hooks(TOKENS, fwd_hooks=ablate)
    torch.testing.assert_close(ablated, model.run_with_hooks(TOKENS, fwd_hooks=ablate), rtol=0, atol=0)
    with torch.no_grad():
        its_own.W_dec.mul_(2)
    assert not torch.allclose(twin(TOKENS), logits, atol=1e-3)
    twin.reset_saes()
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_another_dtype_and_parameters_that_change(hooked: HookedRouteSAETransformer):
    sae = make_crosscoder(architecture="standard")
    names, state = set(hooked.state_dict()), len(list(hooked.parameters()))
    hooked.add_sae(sae)
    assert set(hooked.state_dict()) == names and len(list(hooked.parameters())) == state
    logits = hooked(TOKENS)
    for dtype in (torch.float64, torch.float32):
        sae.to(dtype)  # its view must notice
        assert hooked(TOKENS).dtype == torch.float32
        torch.testing.assert_close(hooked(TOKENS), logits, rtol=0, atol=1e-3)
        hooked.reset_saes()
        hooked.add_sae(sae)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert not torch.allclose(hooked(TOKENS), logits, atol=1e-3)


# --- Forward's arguments and generation --------------------------------------------------------------


def test_uncached_generation_equals_a_forward_for_every_token(hooked: HookedRouteSAETransformer):
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    clean = hooked.generate(TOKENS, **options)
    with hooked.saes(make_crosscoder(), exclude_special_tokens=[int(TOKENS[0, 3])]):
        expected = TOKENS
        for _ in range(4):
            expected = torch.cat([expected, hooked(expected)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(hooked.generate(TOKENS, use_past_kv_cache=False, **options), expected)
        with pytest.raises(NotImplementedError, match="use_past_kv_cache=False"):
            hooked.generate(TOKENS, **options)
    assert not torch.equal(expected, clean)


def test_what_the_two_classes_cannot_do(hooked: HookedRouteSAETransformer, bridge: RouteSAETransformerBridge):
    sae = make_crosscoder()
    hooked.add_sae(sae, splice_layers=[4])
    with pytest.raises(ValueError, match="after layer 1, the first that a RouteSAE or Crosscoder reads"):
        hooked(torch.randn(1, 3, D_MODEL), start_at_layer=2)
    with bridge.saes(sae):
        with pytest.raises(NotImplementedError, match="generate"):
            bridge.generate(TOKENS)
        with pytest.raises(RuntimeError, match="Crosscoder is attached, but this pass"):
            bridge.original_model(TOKENS)
