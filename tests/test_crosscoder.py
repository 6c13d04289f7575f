"""Crosscoder: a SAELens SAE on the standardised stack, one encoder and one decoder per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crosscoders import OPTIONS, by_layer, every_inference, every_training, make, make_inference
from routed_saes import D_MODEL, D_SAE, LAYERS, stacks, step
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from routesae_lens.saes.crosscoder import (
    CROSSCODER_ARCHITECTURES,
    Crosscoder,
    CrosscoderJumpReLUSAEConfig,
    CrosscoderTopKSAE,
    CrosscoderTopKSAEConfig,
    CrosscoderTopKTrainingSAEConfig,
)
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.layers import standardize

# --- One encoder per layer, one decoder per layer ---------------------------------------------------------


@every_inference
@torch.no_grad()
def test_the_encoder_is_the_sum_of_one_encoder_per_layer(architecture):
    sae = make_inference(architecture, apply_b_dec_to_input=False)
    stack = stacks(2, 5)
    pre = sae.b_enc.clone()
    for i, x in enumerate(by_layer(stack)):
        pre = pre + x @ sae.W_enc[D_MODEL * i : D_MODEL * (i + 1)]
    if architecture == "topk":
        kept = pre >= pre.topk(3, dim=-1).values[..., -1:]
        acts = (pre * kept).relu()
    else:
        acts = pre * (pre > (sae.threshold if architecture == "jumprelu" else 0))
    assert (acts != 0).any()
    torch.testing.assert_close(sae.encode(stack), acts, atol=1e-5, rtol=0)


@every_inference
@torch.no_grad()
def test_decoders_of_layers(architecture):
    sae = make_inference(architecture)
    stack = stacks(2, 5)
    acts = sae.encode(stack)
    decoded = sae.decode_layers(acts)
    assert decoded.shape == (2, 5, 3, D_MODEL)
    for i, layer in enumerate(LAYERS):
        rows = sae.W_dec[:, D_MODEL * i : D_MODEL * (i + 1)]
        assert torch.equal(sae.layer_decoder(layer), rows)
        by_hand = acts @ rows + sae.b_dec[D_MODEL * i : D_MODEL * (i + 1)]
        torch.testing.assert_close(decoded[..., i, :], by_hand)
        torch.testing.assert_close(sae.layer_reconstruction(stack, layer), by_hand)
        for f in (0, 7, 23):
            norm = sum(float(w) ** 2 for w in rows[f]) ** 0.5
            assert sae.decoder_norms()[i, f].item() == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(sae(stack), decoded.flatten(-2))


def test_layers_are_block_numbers():
    sae = make_inference("topk")
    for call in (sae.layer_decoder, lambda layer: sae.layer_reconstruction(stacks(2), layer)):
        with pytest.raises(ValueError, match=r"reads blocks \[1, 3, 4\], not block 0"):
            call(0)
    with pytest.raises(ValueError, match=r"3 layers x d_model 10 = 30 in the last dimension"):
        sae.encode(torch.zeros(2, 20))


@torch.no_grad()
def test_the_layer_reconstruction_counts_latents_in_units_of_the_decoder_norm():
    sae = make_inference("topk", rescale_acts_by_decoder_norm=True)
    stack = stacks(4)
    acts = sae.encode(stack) / sae.W_dec.norm(dim=-1)
    by_hand = acts @ sae.layer_decoder(3) + sae.b_dec[D_MODEL : 2 * D_MODEL]
    torch.testing.assert_close(sae.layer_reconstruction(stack, 3), by_hand)


# --- The standardised stack --------------------------------------------------------------------------------


@torch.no_grad()
def test_scale_and_shift_of_a_layer_do_not_count():
    sae = make_inference("standard")
    stack = stacks(6)
    torch.testing.assert_close(sae.standardized(stack), torch.cat(by_layer(stack), dim=-1))
    changed = stack.unflatten(-1, (3, -1)) * torch.tensor([2.0, 5.0, 0.5])[:, None] + 7.0
    torch.testing.assert_close(sae(changed.flatten(-2)), sae(stack), atol=1e-4, rtol=1e-4)
    raw = make_inference("standard", standardize=False)
    assert torch.equal(raw.standardized(stack), stack)
    assert not torch.allclose(raw(changed.flatten(-2)), raw(stack), atol=1.0)


@every_inference
@pytest.mark.filterwarnings("ignore:Setting use_error_term")
@torch.no_grad()
def test_the_error_term_completes_the_standardised_stack(architecture):
    sae = make_inference(architecture)
    stack = stacks(2, 5)
    plain = sae(stack)
    sae.use_error_term = True
    torch.testing.assert_close(sae(stack), sae.standardized(stack))
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 0)
    torch.testing.assert_close(sae(stack), sae.standardized(stack) - plain + sae.b_dec)
    sae.reset_hooks()


@pytest.mark.filterwarnings("ignore:Setting use_error_term")
def test_the_error_is_a_constant_for_gradients():
    sae = make_inference("standard")
    sae(stacks(4)).sum().backward()
    without = sae.b_dec.grad.clone()
    sae.zero_grad()
    sae.use_error_term = True
    sae(stacks(4)).sum().backward()
    assert without.abs().max() > 0 and torch.equal(sae.b_dec.grad, without)


# --- One layer is an ordinary SAE ----------------------------------------------------------------------------


@every_training
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_a_crosscoder_of_one_layer_is_an_ordinary_sae(architecture, apply_b_dec_to_input):
    options = {"loss": "mse", "apply_b_dec_to_input": apply_b_dec_to_input}
    sae = make(architecture, layers=[4], **options)
    stock_class, stock_config = get_sae_training_class(architecture)
    stock = stock_class(
        stock_config(
            d_in=D_MODEL, d_sae=D_SAE, apply_b_dec_to_input=apply_b_dec_to_input, **OPTIONS[architecture]
        )
    )
    stock.load_state_dict(sae.state_dict())
    stack = stacks(16, n_layers=1)
    x = standardize(stack).x
    ours, theirs = step(sae, stack, dead=[0, 3, 8]), step(stock, x, dead=[0, 3, 8])
    assert ours.losses.keys() == theirs.losses.keys() and len(ours.losses) == 2
    for name, loss in theirs.losses.items():
        assert loss > 0
        torch.testing.assert_close(ours.losses[name], loss)
    for name in ("sae_in", "sae_out", "loss"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.feature_acts.to_dense(), theirs.feature_acts)
    if not ours.feature_acts.is_sparse:  # (the fast TopK step keeps the chosen pre-activations alone)
        torch.testing.assert_close(ours.hidden_pre, theirs.hidden_pre)
    torch.testing.assert_close(sae.encode(stack), stock.encode(x))
    torch.testing.assert_close(sae(stack), stock(x))
    torch.testing.assert_close(inference_form(sae)(stack), inference_form(stock)(x))


# --- Initialisation, folding -------------------------------------------------------------------------------


@every_training
def test_the_first_decoder_is_the_transposed_encoder_and_its_norm_counts_all_layers(architecture):
    sae_class, config = get_sae_training_class(f"crosscoder_{architecture}")
    sae: Any = sae_class(config(d_in=30, d_sae=D_SAE, layers=LAYERS, **OPTIONS[architecture]))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.full((D_SAE,), 0.1))
    torch.testing.assert_close(sae.decoder_norms().pow(2).sum(0), torch.full((D_SAE,), 0.01))
    assert not sae.b_enc.any() and not sae.b_dec.any()


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "topk"])
@torch.no_grad()
def test_folding_decoder_norms_keeps_the_function_and_the_spread_over_layers(architecture):
    options = {"rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    sae = make_inference(architecture, **options)
    stack = stacks(9)
    before, spread = sae(stack), sae.decoder_norms() / sae.W_dec.norm(dim=-1)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae(stack), before)
    torch.testing.assert_close(sae.decoder_norms(), spread)
    with pytest.raises(NotImplementedError):  # would change which latents are the top k
        make_inference("topk").fold_W_dec_norm()


@every_training
@torch.no_grad()
def test_folding_the_input_scale(architecture):
    stack = stacks(9)
    sae = make(architecture, normalize_activations="expected_average_only_in")
    acts, out = sae.encode(stack), sae(stack)
    inference = inference_form(sae, scaling_factor=0.5)
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    assert inference.cfg.normalize_activations == "none"
    assert torch.equal(inference(stack), inference_form(sae)(stack))  # standardised: no scale arrives
    sae.fold_activation_norm_scaling_factor(0.5)
    assert torch.equal(sae.encode(stack), acts) and torch.equal(sae(stack), out)

    raw = make(architecture, normalize_activations="expected_average_only_in", standardize=False)
    trained_on_half = inference_form(raw)(0.5 * stack)
    torch.testing.assert_close(inference_form(raw, scaling_factor=0.5)(stack), trained_on_half / 0.5)


def test_whitening_cannot_be_folded():
    eye = torch.eye(30)
    with pytest.raises(NotImplementedError, match="one whitening matrix"):
        make_inference("topk").fold_activation_whitening(torch.zeros(30), eye, eye)


# --- Saving, loading, config -----------------------------------------------------------------------------------


@every_training
@torch.no_grad()
def test_a_trained_crosscoder_comes_back_from_disk(architecture, tmp_path):
    sae = make(architecture)
    sae.save_inference_model(tmp_path / "inference")
    loaded = SAE.load_from_disk(tmp_path / "inference")
    becomes = {"batchtopk": "jumprelu"}.get(architecture, architecture)
    assert isinstance(loaded, Crosscoder)
    assert type(Crosscoder.load_from_disk(tmp_path / "inference")) is type(loaded)
    assert loaded.cfg.architecture() == f"crosscoder_{becomes}"
    assert loaded.layers == LAYERS and loaded.cfg.metadata.hook_name == sae.cfg.metadata.hook_name
    stack = stacks(9)
    torch.testing.assert_close(loaded(stack), inference_form(sae)(stack))
    if architecture == "batchtopk":
        pre = sae.encode_with_hidden_pre(sae.standardized(stack))[1]
        torch.testing.assert_close(loaded.encode(stack), pre * (pre > 0.7))  # threshold set in randomize
    else:
        torch.testing.assert_close(loaded(stack), sae(stack))

    sae.save_model(tmp_path / "training")
    again: Any = TrainingSAE.load_from_disk(tmp_path / "training")
    assert type(again) is type(sae) and again.cfg.to_dict() == sae.cfg.to_dict()
    assert again.mse_loss_fn == again._reconstruction_loss
    torch.testing.assert_close(step(again, stack).loss, step(sae, stack).loss)


@every_inference
@torch.no_grad()
def test_an_inference_crosscoder_comes_back_from_disk(architecture, tmp_path):
    options = {"site": "hook_mlp_out", "standardize": False}
    sae = make_inference(architecture, **options)
    sae.save_model(tmp_path)
    loaded = Crosscoder.load_from_disk(tmp_path)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    assert torch.equal(loaded(stacks(9)), sae(stacks(9)))


def test_sparse_activations_are_the_dense_ones():
    dense, sparse = (make("topk", use_sparse_activations=sparse) for sparse in (False, True))
    torch.testing.assert_close(step(dense, stacks(9)).loss, step(sparse, stacks(9)).loss)


@torch.no_grad()
def test_topk_without_relu_keeps_negative_latents():
    sae = make_inference("topk", relu=False)
    sae.b_enc -= 100
    acts = sae.encode(stacks(9))
    assert ((acts < 0).sum(-1) == 3).all()
    sae = CrosscoderTopKSAE(CrosscoderTopKSAEConfig(d_in=30, d_sae=D_SAE, layers=LAYERS, k=3))
    sae.b_enc -= 100
    assert not sae.encode(stacks(9)).any()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"k": D_SAE + 1}, r"k must be between 1 and d_sae = 24, got 25"),
        (
            {"normalize_activations": "covariance_whitening"},
            "covariance_whitening.* does not work on a stack",
        ),
        ({"normalize_activations": "layer_norm"}, "layer_norm.* does not work on a stack"),
        ({"d_in": 31}, "31 is not a multiple of 3 layers"),
        ({"layers": [3, 1, 4]}, "strictly increasing"),
        ({"site": "hook_nowhere"}, "unknown site"),
        ({"relu": False, "use_sparse_activations": True}, "does not go with relu=False"),
    ],
)
def test_configs_that_cannot_work(options, match):
    with pytest.raises(ValueError, match=match):
        CrosscoderTopKTrainingSAEConfig(**{"d_in": 30, "d_sae": D_SAE, "layers": LAYERS, "k": 3} | options)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("loss", "l2", "unknown loss 'l2'; known: normalized_mse, mse"),
        ("k", 2.5, "k must be an integer, got 2.5"),
        ("relu", "no", "relu must be True or False, got 'no'"),
    ],
)
def test_values_of_another_type(name, value, match):
    cfg = make("topk").cfg
    setattr(cfg, name, value)  # jaxtyping's check, on in the tests alone, would refuse it at construction
    with pytest.raises(ValueError, match=match):
        cfg.__post_init__()


def test_the_table_of_architectures():
    assert list(CROSSCODER_ARCHITECTURES) == [
        "crosscoder_topk",
        "crosscoder_batchtopk",
        "crosscoder_standard",
    ]
    batchtopk = CROSSCODER_ARCHITECTURES["crosscoder_batchtopk"](d_in=30, d_sae=24, layers=LAYERS, k=2.5)
    assert batchtopk.get_inference_config_class() is CrosscoderJumpReLUSAEConfig
