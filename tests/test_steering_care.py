"""What steering refuses, and that the model is left clean after every error."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from spliced import D_MODEL, D_SAE, TOKENS, acts_name, assert_clean, make_sae, ordinary_sae, state_of
from spliced_crosscoders import latents_name, make_crosscoder

from routesae_lens.hook_points import layer_hook_name
from routesae_lens.splice.edits import Ablate, Add, Edit, Scale, Set

POINT = "blocks.3.hook_resid_post"
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "20", None, torch.tensor(2.0)])
@pytest.mark.parametrize("kind", [Set, Add, Scale])
def test_strengths_are_finite_numbers(kind: Any, value: Any):
    with pytest.raises(ValueError, match=f"{kind.__name__} takes a finite number, got"):
        kind(value)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "too large": ({D_SAE: Set(1.0)}, {}, ValueError, f"latent {D_SAE} is out of range: .* 0 to {D_SAE - 1}"),
    "negative": ({-1: Set(1.0)}, {}, ValueError, "latent -1 is out of range"),
    "bool": ({True: Set(1.0)}, {}, ValueError, "latent True is out of range"),
    "float": ({2.0: Set(1.0)}, {}, ValueError, r"latent 2\.0 is out of range"),
    "empty": ({}, {}, ValueError, "no edits given"),
    "no mapping": ([(3, Set(1.0))], {}, TypeError, r"expected edits as \{latent: Set\(20.0\)\}, got list"),
    "a number": ({3: 20.0}, {}, TypeError, "latent 3: expected Set, Add, Scale or Ablate, got 20.0"),
    "a class": ({3: Ablate}, {}, TypeError, "latent 3: expected Set, Add, Scale or Ablate, got <class"),
    "base": ({3: Edit}, {}, TypeError, "latent 3: expected Set"),
    "no maxima": ({3: Set(1.0, relative=True)}, {}, ValueError, "give maxima=.*FeatureSet.max_activation"),
    "no maximum": ({3: Set(1.0, True)}, {"maxima": {4: 1.0}}, ValueError, "maxima has none for it"),
    "short maxima": ({3: Set(1.0, True)}, {"maxima": torch.ones(2)}, ValueError, "maxima has none for it"),
    "zero": ({3: Set(1.0, True)}, {"maxima": {3: 0.0}}, ValueError, r"maxima has 0\.0; expected a positive"),
    "infinite": ({3: Set(1.0, True)}, {"maxima": {3: float("inf")}}, ValueError, "maxima has inf"),
    "not a number": ({3: Set(1.0, True)}, {"maxima": {3: float("nan")}}, ValueError, "maxima has nan"),
    "one maximum": (
        {3: Set(1.0, True)},
        {"maxima": 3.0},
        TypeError,
        "maxima must be a mapping .*; got float",
    ),
    "empty maximum": ({3: Set(1.0, True)}, {"maxima": {3: None}}, TypeError, "maxima must be a mapping"),
    "name": (
        {3: Set(1.0)},
        {"positions": "last"},
        ValueError,
        "unknown positions 'last'; known: all, prompt",
    ),
    "step": ({3: Set(1.0)}, {"positions": slice(0, 3, -1)}, ValueError, "has the step -1"),
    "bound": ({3: Set(1.0)}, {"positions": slice(0.5, 3)}, ValueError, r"has the bound 0\.5"),
    "bool bound": ({3: Set(1.0)}, {"positions": slice(True, 3)}, ValueError, "has the bound True"),
    "bytes": ({3: Set(1.0)}, {"positions": b"all"}, ValueError, "must be whole numbers of 0 or more"),
    "negative ids": ({3: Set(1.0)}, {"positions": [5, -2]}, ValueError, "must be whole numbers of 0 or more"),
    "no ids": ({3: Set(1.0)}, {"positions": []}, ValueError, "at least one"),
    "float ids": ({3: Set(1.0)}, {"positions": [1.5]}, ValueError, "must be whole numbers"),
    "positions": ({3: Set(1.0)}, {"positions": 7}, TypeError, "positions must be one of .*, got int"),
    "layers": ({3: Set(1.0)}, {"layers": "first"}, ValueError, "unknown layers 'first' .* 'routed', 'all'"),
    "layer": ({3: Set(1.0)}, {"layers": [1, 3]}, ValueError, r"does not read the layers \[3\]; it reads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_is_attached(model: Any, name: str):
    edits, options, error, message = REFUSED[name]
    before = state_of(model)
    with pytest.raises(error, match=message), model.steer(make_sae(), edits, **options):
        raise AssertionError("it must not get here")
    assert_clean(model, before)


def test_saes_that_do_not_fit(model: Any):
    before = state_of(model)
    wide = make_sae((1, 2))
    wide.cfg.d_in = 2 * 48
    for sae, error, message in (
        (torch.nn.Linear(2, 2), TypeError, "expected a SAELens SAE, RouteSAE or Crosscoder, got Linear"),
        (wide, ValueError, "48"),
        (make_sae((4, 6)), ValueError, "between 0 and 5"),
        (ordinary_sae("blocks.9.hook_resid_post"), ValueError, "no hook 'blocks.9.hook_resid_post'"),
    ):
        with pytest.raises(error, match=message), model.steer(sae, {3: Set(1.0)}):
            raise AssertionError("it must not get here")
        assert_clean(model, before)
    with pytest.raises(TypeError, match="layers is for RouteSAEs and Crosscoders; this StandardSAE has one"):
        model.steer(ordinary_sae(POINT), {3: Set(1.0)}, layers=[3]).__enter__()
    with pytest.raises(ValueError, match="unknown layers 'routed' for a CrosscoderTopKSAE; known: 'all'"):
        model.steer(make_crosscoder(), {3: Set(1.0)}, layers="routed").__enter__()
    assert_clean(model, before)


def test_what_an_attachment_fixes(model: Any):
    before = state_of(model)
    for sae in (make_sae(), make_crosscoder(), ordinary_sae(POINT)):
        model.add_sae(sae)
        for option in (
            {"use_error_term": True},
            {"exclude_special_tokens": [3]},
            {"scale_by_p": False},
            {"layers": "all"},
        ):
            if option.get("layers") and not hasattr(sae, "layers"):
                continue
            with pytest.raises(ValueError, match=f"already attached, which fixes {next(iter(option))}"):
                model.steer(sae, {3: Set(1.0)}, **option).__enter__()
        model.reset_saes()
        assert_clean(model, before)


def test_two_ordinary_saes_at_one_hook(model: Any):
    """SAELens would put the second in the place of the first, whose edits would be lost without a word."""
    before = state_of(model)
    one, other, elsewhere = ordinary_sae(POINT), ordinary_sae(POINT), ordinary_sae("blocks.1.hook_resid_post")
    with torch.no_grad(), model.steer(one, {5: Add(8.0)}):
        logits = model(TOKENS)
        with (
            pytest.raises(ValueError, match="carries another SAE, which steering this one would displace"),
            model.steer(other, {7: Add(8.0)}),
        ):
            raise AssertionError("it must not get here")
        torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)
        with model.steer(elsewhere, {7: Add(8.0)}):
            assert not torch.allclose(model(TOKENS), logits, atol=1e-3)
    assert_clean(model, before)


def test_a_steered_model_is_not_copied(model: Any):
    """A copy's hooks would be the original's, and do nothing."""
    before = state_of(model)
    sae = make_sae()
    with torch.no_grad(), model.steer(sae, {3: Set(5.0)}):
        for duplicate in (copy.deepcopy, pickle.dumps):
            with pytest.raises(ValueError, match="a steered model cannot be copied or pickled"):
                duplicate(model)
        logits = model(TOKENS)
    assert_clean(model, before)
    with torch.no_grad(), copy.deepcopy(model).steer(sae, {3: Set(5.0)}) as other:
        torch.testing.assert_close(other(TOKENS), logits, rtol=0, atol=0)
    with torch.no_grad(), model.saes(sae):  # attached SAEs are copied along
        other = copy.deepcopy(model)
        torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=0, atol=0)
    assert_clean(model, before)


class Interrupted(Exception):
    pass


def test_the_model_is_clean_after_exceptions_inside(model: Any):
    before = state_of(model)

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise Interrupted

    for sae, latents in (
        (make_sae(), lambda sae: acts_name(model, sae, 2)),
        (make_crosscoder(), latents_name),
        (ordinary_sae(POINT), lambda sae: f"{layer_hook_name(model, 3)}.hook_sae_acts_post"),
    ):
        for name in (layer_hook_name(model, 0), latents, layer_hook_name(model, 5)):
            with pytest.raises(Interrupted), model.steer(sae, {3: Set(5.0)}):
                where = name if isinstance(name, str) else name(sae)
                model.run_with_hooks(TOKENS, fwd_hooks=[(where, fail)])
            assert_clean(model, before)
        for positions in (lambda tokens: tokens[:, 1:] > 3, lambda tokens: tokens, lambda tokens: True):
            with (
                pytest.raises(ValueError, match=r"must be booleans of shape \(2, 9\), got"),
                model.steer(sae, {3: Set(5.0)}, positions=positions),
            ):
                model(TOKENS)
            assert_clean(model, before)


def test_ids_need_token_ids(bridge: Any):
    before = state_of(bridge)
    with (
        pytest.raises(ValueError, match="needs token ids, and the model was given embeddings"),
        bridge.steer(make_sae(), {3: Set(5.0)}, positions=[5]),
    ):
        bridge(torch.randn(1, 5, D_MODEL))
    assert_clean(bridge, before)
