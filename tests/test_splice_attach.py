"""Attaching RouteSAEs to models, and what forward refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE
from spliced import (
    D_MODEL,
    D_SAE,
    TOKENS,
    acts_name,
    assert_clean,
    make_sae,
    ordinary_sae,
    state_of,
)

from routesae_lens.hook_points import layer_hook_name, mounted_points
from routesae_lens.saes.architectures import (
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
)
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
from routesae_lens.splice.layer_view import layer_view

# --- Attaching and detaching -------------------------------------------------------------------------


def test_attach_and_reset_by_every_name(model: Any):
    sae = make_sae((1, 3))
    before = state_of(model)
    [point] = [sae.cfg.metadata.hook_name]
    for name in (point, "blocks.1.hook_resid_post", layer_hook_name(model, 3), None):
        model.add_sae(sae)
        assert list(model.acts_to_saes) == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
        assert not torch.allclose(model(TOKENS), before["logits"], atol=1e-3)
        model.reset_saes(name)
        assert_clean(model, before)
    model.add_sae(sae)
    with pytest.raises(
        ValueError, match=r"no SAE is attached to blocks.0.hook_resid_post; attached: \['blocks.1"
    ):
        model.reset_saes([point, "blocks.0.hook_resid_post"])
    assert model.route_saes == {point: sae}


def test_a_mounted_point_is_left_as_it_was(model: Any):
    sae = make_sae()
    point = sae.mount(model)
    model.run_with_saes(TOKENS, saes=sae)
    assert mounted_points(model) == [point]


def test_views_share_the_parameters(model: Any):
    sae = make_sae()
    model.add_sae(sae)
    for layer in sae.layers:
        view = model.acts_to_saes[f"blocks.{layer}.hook_resid_post"]
        assert type(view) is TopKSAE and view.cfg.d_in == D_MODEL
        assert view.W_dec is sae.W_dec and view.W_enc is sae.W_enc
    logits = model(TOKENS)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert not torch.allclose(model(TOKENS), logits, atol=1e-3)


def test_a_view_works_on_its_own(hooked: HookedRouteSAETransformer):
    sae = make_sae()
    view = layer_view(sae, "blocks.1.hook_resid_post")
    x = torch.randn(3, 4, D_MODEL)
    latents, cache = view.encode(x), view.run_with_cache(x)[1]
    torch.testing.assert_close(latents, sae.encode_routed(x), rtol=0, atol=0)
    torch.testing.assert_close(cache["hook_sae_acts_post"], latents, rtol=0, atol=0)
    assert view.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


class Interrupted(Exception):
    pass


def test_the_model_is_clean_after_an_exception(model: Any):
    sae, other = make_sae(), ordinary_sae("blocks.3.hook_resid_post")
    before = state_of(model)
    with pytest.raises(Interrupted), model.saes([other, sae]):
        model(TOKENS)
        raise Interrupted
    assert_clean(model, before)

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise Interrupted

    for name in (
        layer_hook_name(model, 0),
        layer_hook_name(model, 5),
    ):  # in the routing pass; in the spliced one
        with pytest.raises(Interrupted):
            model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=[(name, fail)])
        assert_clean(model, before)
    with model.saes(sae):
        logits = model(TOKENS)
        with pytest.raises(Interrupted):
            model.run_with_hooks(TOKENS, fwd_hooks=[(acts_name(model, sae, 2), fail)])
        torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_attaching_is_all_or_nothing(model: Any, monkeypatch: pytest.MonkeyPatch):
    before = state_of(model)
    put, calls = type(model)._put, []

    def fail_the_second_time(self: Any, path: str, module: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise Interrupted
        put(self, path, module)

    monkeypatch.setattr(type(model), "_put", fail_the_second_time)
    with pytest.raises(Interrupted):
        model.add_sae(make_sae())
    assert_clean(model, before)


def test_what_cannot_be_attached_is_refused(model: Any):
    before = state_of(model)
    training = RouteTopKTrainingSAE(
        RouteTopKTrainingSAEConfig(d_in=3 * D_MODEL, d_sae=D_SAE, k=6, layers=[1, 2, 4])
    )
    with pytest.raises(TypeError, match=r"inference_form\(sae\)"):
        model.add_sae(training)
    with pytest.raises(ValueError, match="between 0 and 5"):
        model.add_sae(make_sae((4, 6)))
    for name in ("blocks.9.hook_resid_post", "blocks.1.hook_nowhere"):
        with pytest.raises(ValueError, match="no hook"):
            model.add_sae(ordinary_sae(name))
        with pytest.raises(ValueError, match="no hook"), model.saes([make_sae(), ordinary_sae(name)]):
            pass
    with pytest.raises(TypeError, match="scale_by_p"):
        model.add_sae(ordinary_sae("blocks.1.hook_resid_post"), scale_by_p=False)
    assert_clean(model, before)

    sae = make_sae((1, 2, 4))
    model.add_sae(sae)
    logits = model(TOKENS)
    with pytest.raises(ValueError, match="cannot share a layer"):
        model.add_sae(make_sae((0, 4)))
    with pytest.raises(ValueError, match="already attached"):
        model.add_sae(make_sae((1, 2, 4), "gated"))
    for name in ("blocks.2.hook_resid_post", layer_hook_name(model, 2)):
        with pytest.raises(ValueError, match="carries a RouteSAE"), model.saes([ordinary_sae(name)]):
            pass
    with pytest.raises(ValueError, match="read-only copy"):
        model.add_sae(ordinary_sae(sae.cfg.metadata.hook_name))
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)
    model.reset_saes()
    assert_clean(model, before)

    other = ordinary_sae("blocks.2.hook_resid_post")
    model.add_sae(other)
    with pytest.raises(ValueError, match="already carries an SAE"):
        model.add_sae(sae)
    assert model.acts_to_saes == {"blocks.2.hook_resid_post": other} and mounted_points(model) == []
    model.reset_saes("blocks.2.hook_resid_post")
    assert_clean(model, before)


def test_an_ordinary_sae_can_still_leave_special_tokens_out(
    hooked: HookedRouteSAETransformer, bridge: RouteSAETransformerBridge
):
    other = ordinary_sae("blocks.2.hook_resid_post")
    special = [int(TOKENS[0, 3])]
    _, cache = hooked.run_with_cache_with_saes(
        TOKENS, saes=other, exclude_special_tokens=special, use_error_term=True
    )
    error = cache["blocks.2.hook_resid_post.hook_sae_error"]
    assert torch.equal(error.abs().sum(-1) == 0, special[0] == TOKENS)
    for attach in (bridge.add_sae, bridge.saes(other, exclude_special_tokens=special).__enter__):
        with pytest.raises(TypeError, match="exclude_special_tokens"):
            attach(*([other, None, special] if attach == bridge.add_sae else []))
    assert bridge.acts_to_saes == {}


def test_a_deep_copy_is_a_model_of_its_own(model: Any):
    sae = make_sae()
    model.add_sae(sae)
    logits = model(TOKENS)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(TOKENS), logits, rtol=0, atol=0)
    [its_own] = twin.route_saes.values()
    assert its_own is not sae and twin.acts_to_saes["blocks.1.hook_resid_post"].W_dec is its_own.W_dec
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "mlp" in name:
                parameter.zero_()
    assert not torch.allclose(twin(TOKENS), logits, atol=1e-3)
    twin.reset_saes()
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_moving_the_model_leaves_the_sae_alone(hooked: HookedRouteSAETransformer):
    sae = make_sae()
    hooked.add_sae(sae)
    logits = hooked(TOKENS)
    hooked.to(torch.float64)
    assert sae.W_enc.dtype == torch.float32
    assert hooked(TOKENS).dtype == torch.float64
    torch.testing.assert_close(hooked(TOKENS).float(), logits, rtol=0, atol=1e-3)


def test_both_classes_can_be_made_directly(tiny_llama_dir: Any, tiny_hooked: Any):
    booted = RouteSAETransformerBridge.boot_transformers(str(tiny_llama_dir), device="cpu")
    assert type(booted) is RouteSAETransformerBridge
    sae = make_sae()
    assert not torch.allclose(booted.run_with_saes(TOKENS, saes=sae), booted(TOKENS), atol=1e-3)
    made = HookedRouteSAETransformer(tiny_hooked.cfg)
    made.load_state_dict(tiny_hooked.state_dict())
    expected = made.run_with_saes(TOKENS, saes=sae)
    turned = HookedRouteSAETransformer.from_model(tiny_hooked)
    torch.testing.assert_close(turned.run_with_saes(TOKENS, saes=sae), expected, rtol=0, atol=0)
    assert set(turned.hook_dict) == set(made.hook_dict)
    assert turned.blocks[0].mlp.hook_in.name == "blocks.0.mlp.hook_in"
    cached = turned.run_with_cache(TOKENS, names_filter="blocks.0.mlp.hook_in")[1]
    assert cached["blocks.0.mlp.hook_in"].shape == (*TOKENS.shape, D_MODEL)


def test_a_model_of_another_class_is_not_turned_into_ours(tiny_hooked: Any, tiny_bridge: Any):
    for model, ours in ((tiny_hooked, HookedRouteSAETransformer), (tiny_bridge, RouteSAETransformerBridge)):
        own = type("Own", (type(model),), {})
        model.__class__ = own
        with pytest.raises(TypeError, match="got Own"):
            ours.from_model(model)
        assert type(model) is own


# --- Forward's arguments --------------------------------------------------------------------------


def test_starting_and_stopping_on_hookedtransformer(hooked: HookedRouteSAETransformer):
    sae = make_sae((1, 2, 4))
    _, clean = hooked.run_with_cache(TOKENS)
    with hooked.saes(sae):
        logits, cache = hooked.run_with_cache(TOKENS)
        for start in (0, 1):
            residual = clean[f"blocks.{start}.hook_resid_pre"]
            torch.testing.assert_close(hooked(residual, start_at_layer=start), logits, rtol=0, atol=1e-5)
        for start in (2, -1):
            with pytest.raises(ValueError, match="after layer 1"):
                hooked(clean["blocks.2.hook_resid_pre"], start_at_layer=start)
        stopped = hooked(TOKENS, stop_at_layer=3)
        torch.testing.assert_close(stopped, cache["blocks.3.hook_resid_pre"], rtol=0, atol=0)
        loss = hooked(TOKENS, return_type="loss", loss_per_token=True)
        assert torch.equal(hooked(TOKENS, "loss", True), loss)  # as HookedTransformer takes them
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, TOKENS[:, 1:], reduction="none")
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def test_the_bridge_refuses_what_it_cannot_do(bridge: RouteSAETransformerBridge):
    sae = make_sae((1, 2, 4))
    with bridge.saes(sae):
        logits = bridge(TOKENS)
        for option in ({"start_at_layer": 0}, {"stop_at_layer": 3}):
            with pytest.raises(NotImplementedError, match=next(iter(option))):
                bridge(TOKENS, **option)
        with pytest.raises(RuntimeError, match="routing pass ended"):
            bridge.run_with_cache(TOKENS, stop_at_layer=3)
        with pytest.raises(RuntimeError, match="no routes"):
            bridge.original_model(TOKENS)
        torch.testing.assert_close(bridge(TOKENS, "logits"), logits, rtol=0, atol=0)


def test_views_are_saes_for_saelens(model: Any):
    model.add_sae(make_sae())
    assert all(isinstance(view, SAE) for view in model.acts_to_saes.values())
