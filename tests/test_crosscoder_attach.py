"""Attaching Crosscoders to models, beside other SAEs, and detaching them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from spliced import D_MODEL, D_SAE, TOKENS, assert_clean, make_sae, ordinary_sae, state_of
from spliced_crosscoders import LAYERS, latents_name, make_crosscoder, stack_of

from routesae_lens.hook_points import layer_hook_name, mounted_points
from routesae_lens.saes.crosscoder import (
    CrosscoderStandardTrainingSAE,
    CrosscoderStandardTrainingSAEConfig,
)
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge


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
    other = ordinary_sae("blocks.1.hook_resid_post")
    with pytest.raises(TypeError, match="splice_layers is for RouteSAEs and Crosscoders, not for Standard"):
        model.add_sae(other, splice_layers=[1])
    with (
        pytest.raises(TypeError, match="splice_layers is for RouteSAEs and Crosscoders, got Standard"),
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
    with model.saes([other, routed], scale_by_p=False):
        without = model(TOKENS)
        model.add_sae(sae)
        logits = model(TOKENS)
        assert list(model.last_routes) == list(model.route_saes)
        model.reset_saes("blocks.1.hook_resid_post")
        torch.testing.assert_close(model(TOKENS), without, rtol=0, atol=0)
    for saes in ([sae, routed, other], [other, routed, sae]):
        together = model.run_with_saes(TOKENS, saes=saes, scale_by_p=False)
        torch.testing.assert_close(together, logits, rtol=0, atol=0)
    assert not torch.allclose(without, logits, atol=1e-3)
    assert_clean(model, before)


def test_splice_layers_go_to_every_sae_of_several_layers(model: Any):
    """A RouteSAE that does not read them is refused, and nothing is attached."""
    before = state_of(model)
    with (
        pytest.raises(ValueError, match=r"does not read: \[1, 4\]; it reads \[0, 5\]"),
        model.saes([make_crosscoder(), make_sae((0, 5))], splice_layers=[1, 4]),
    ):
        pass
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


def test_what_the_two_classes_cannot_do(hooked: HookedRouteSAETransformer, bridge: RouteSAETransformerBridge):
    sae = make_crosscoder()
    hooked.add_sae(sae, splice_layers=[4])
    with pytest.raises(ValueError, match="after layer 1, the first that a RouteSAE or Crosscoder reads"):
        hooked(torch.randn(1, 3, D_MODEL), start_at_layer=2)
    with bridge.saes(sae), pytest.raises(RuntimeError, match="Crosscoder is attached, but this pass"):
        bridge.original_model(TOKENS)
