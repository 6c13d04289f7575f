"""The rest of Llama Scope's training recipe: initialisation, input scale, Eq. 5, learning rate."""

from __future__ import annotations

import copy
from math import sqrt
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from test_k_annealing import ANNEALED, make, step_input

from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAE, AnnealedTopKTrainingSAEConfig
from routesae_lens.training.schedules import llama_scope_schedule, paper_schedule

# --- Initialisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ANNEALED)
def test_llama_scopes_initialisation(architecture: str):
    sae, usual = make(architecture, init="llama_scope"), make(architecture)
    slices = 3 if "crosscoder" in architecture else 1
    rows = sae.W_dec.detach().reshape(48, slices, 8)
    norm = torch.full((48, slices), sqrt(2 * 8 / 48), dtype=torch.float64)
    torch.testing.assert_close(rows.norm(dim=-1), norm)
    assert torch.equal(sae.W_enc, sae.W_dec.T) and sae.W_enc.is_contiguous()
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()  # untied
    assert not sae.b_enc.any() and not sae.b_dec.any()
    # The directions are those of SAELens' Kaiming-uniform rows.
    theirs = usual.W_dec.detach().reshape(48, slices, 8)
    unit = theirs / theirs.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rows / rows.norm(dim=-1, keepdim=True), unit)
    assert all(parameter.requires_grad for parameter in sae.parameters())


@pytest.mark.parametrize("architecture", ["annealed_topk", "crosscoder_topk"])
def test_it_starts_near_the_input(architecture: str):
    """Section 3.3.1: a near-zero reconstruction loss, with every latent that ReLU lets through."""
    errors = {}
    for init in ("llama_scope", "saelens"):
        fields: dict[str, Any] = {} if architecture == "annealed_topk" else {"standardize": False}
        sae = make(architecture, d_sae=8192, k=8192, init=init, **fields)
        x = torch.randn(20, sae.cfg.d_in, dtype=torch.float64)
        errors[init] = ((sae(x) - x).norm() / x.norm()).item()
    assert errors["llama_scope"] < 0.1 < 0.5 < errors["saelens"]


# --- The input scale, and Eq. 5 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("annealed_topk", {}),
        ("annealed_topk", {"apply_b_dec_to_input": False}),
        ("route_topk", {"standardize": False}),
        ("route_topk", {"standardize": False, "routing": "soft"}),
        ("route_topk", {"standardize": False, "aggregator": "attention", "apply_b_dec_to_input": False}),
        ("crosscoder_topk", {"standardize": False}),
    ],
)
def test_the_folded_sae_on_raw_input_equals_the_training_sae_on_scaled_input(
    architecture: str, fields: dict[str, Any]
):
    sae = make(architecture, normalize_activations="expected_average_only_in", init="llama_scope", **fields)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = 5 + 20 * torch.randn(40, sae.cfg.d_in, dtype=torch.float64)
    scaler = ActivationScaler()
    scaler.estimate_scaling_factor(sae.cfg.d_in, iter([x]), n_batches_for_norm_estimate=1)
    scale = scaler.scaling_factor
    assert scale is not None
    assert (x * scale).norm(dim=-1).mean().item() == pytest.approx(sqrt(sae.cfg.d_in), rel=1e-6)
    expected = sae(x * scale) / scale
    saved = inference_form(sae, scale)
    assert saved.cfg.normalize_activations == "none"
    torch.testing.assert_close(saved(x), expected)
    torch.testing.assert_close(saved.encode(x), sae.encode(x * scale) / scale)
    folded = copy.deepcopy(sae)  # as SAELens folds at the end of a run
    folded.fold_activation_norm_scaling_factor(scale)
    torch.testing.assert_close(folded(x), expected)
    assert not torch.allclose(sae(x), expected)


@pytest.mark.parametrize("sae_class", [TopKTrainingSAE, AnnealedTopKTrainingSAE])
def test_saelens_decoder_norm_rescaling_is_equation_5(sae_class: Any):
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        **{"d_in": 5, "d_sae": 12, "k": 3, "dtype": "float64"},
        "apply_b_dec_to_input": False,
    }
    cfg_class = {TopKTrainingSAE: TopKTrainingSAEConfig}.get(sae_class, AnnealedTopKTrainingSAEConfig)
    sae = sae_class(cfg_class(**fields, rescale_acts_by_decoder_norm=True))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(30, 5, dtype=torch.float64)
    expected, f = torch.zeros(30, 5, dtype=torch.float64), torch.zeros(30, 12, dtype=torch.float64)
    norms = [sqrt(sum(w**2 for w in row)) for row in sae.W_dec.tolist()]
    for t in range(30):
        pre = [(sae.W_enc[:, i] @ x[t] + sae.b_enc[i]).item() for i in range(12)]
        weighted = [max(0.0, pre[i]) * norms[i] for i in range(12)]
        mask = sorted(range(12), key=lambda i: -weighted[i])[:3]
        for i in mask:
            f[t, i] = max(0.0, pre[i])
        expected[t] = sum((f[t, i] * sae.W_dec[i].detach() for i in range(12)), sae.b_dec.detach())
    torch.testing.assert_close(sae(x).detach(), expected)
    output = sae.training_forward_pass(step_input(x, 0))
    torch.testing.assert_close(output.sae_out.detach(), expected)
    by_norm = f * torch.tensor(norms, dtype=torch.float64)
    torch.testing.assert_close(output.feature_acts.detach().to_dense(), by_norm)  # SAELens' units
    unweighted = sae_class(cfg_class(**fields, rescale_acts_by_decoder_norm=False))
    unweighted.load_state_dict(sae.state_dict())
    assert not torch.allclose(unweighted(x), expected)  # the choice differs
    # Section 3.3.4: unit decoder rows, and the norms in the encoder.
    saved = inference_form(sae)
    torch.testing.assert_close(saved.W_dec.norm(dim=-1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(saved(x), expected)
    torch.testing.assert_close(saved.encode(x), by_norm)


# --- The learning rate --------------------------------------------------------------------------------------


def test_the_schedule():
    long = 1_000_000
    steps_and_factors = {0: 0, 2_500: 0.25, 10_000: 1, 799_999: 1, 800_000: 1, 900_000: 0.5, long: 0}
    assert {step: llama_scope_schedule(step, long) for step in steps_and_factors} == steps_and_factors
    for steps in (1, 24, 100, 200_000):  # up to here 5 % are at most 10,000
        for step in range(0, steps + 1, max(1, steps // 100)):
            assert llama_scope_schedule(step, steps) == paper_schedule(step, steps)
