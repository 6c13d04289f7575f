"""Switch, Scale and routed Scale SAEs: their step, what they save, folding, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_saes import D_MODEL, LAYERS, randomize, stacks
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from test_fast_topk import both_steps
from torch.utils.flop_counter import FlopCounterMode

from routesae_lens.saes.expert_mixins import ExpertChoice, expert_metrics, load_balance
from routesae_lens.saes.experts import EXPERT_ARCHITECTURES, RouteScaleSAE, ScaleSAE
from routesae_lens.saes.fast_topk import decode_topk, encode_topk, is_fast
from routesae_lens.saes.forms import inference_form, with_routing

SCALINGS = ["none", "mean", "identity", "learned"]
D_SAE = 32


def config(architecture: str, **fields: Any) -> Any:
    known: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "k": 3, "n_experts": 4, "dtype": "float64"}
    if architecture == "route_scale":
        known |= {"d_in": D_MODEL * len(LAYERS), "layers": LAYERS}
    return get_sae_training_class(architecture)[1](**known | fields)


def make(architecture: str = "scale_topk", **fields: Any) -> Any:
    """A training SAE with random weights, biases and scaling."""
    torch.manual_seed(0)
    sae: Any = get_sae_training_class(architecture)[0](config(architecture, **fields))
    randomize(sae)
    with torch.no_grad():
        sae.W_expert.normal_(0, 0.4)
    return sae


def inputs(architecture: str, n: int = 40) -> torch.Tensor:
    return stacks(n, n_layers=len(LAYERS) if architecture == "route_scale" else 1).double()


KINDS = [("switch_topk", {})]
KINDS += [("scale_topk", {"feature_scaling": scaling}) for scaling in SCALINGS]
KINDS += [
    ("scale_topk", {"relu": False, "expert_weights": "renormalized", "apply_b_dec_to_input": False}),
    ("scale_topk", {"n_experts": 1, "active_experts": 1}),
    ("scale_topk", {"active_experts": 4}),
    ("route_scale", {}),
    ("route_scale", {"routing": "straight_through", "loss": "mse", "relu": False}),
    ("route_scale", {"routing": "every", "feature_scaling": "learned"}),
]


# --- The step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "fields"), KINDS)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [0, 2, 20])  # 5 are revived
def test_a_training_step_equals_the_dense_one(
    architecture: str, fields: dict[str, Any], rescale: bool, n_dead: int, monkeypatch: pytest.MonkeyPatch
):
    sae = make(architecture, rescale_acts_by_decoder_norm=rescale, aux_loss_coefficient=0.7, **fields)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[torch.randperm(D_SAE)[:n_dead]] = True
    step = TrainStepInput(inputs(architecture), {}, dead, 0, False)
    (fast, fast_grads), (dense, dense_grads) = both_steps(sae, step, monkeypatch)
    torch.testing.assert_close(fast.feature_acts.to_dense(), dense.feature_acts.detach())
    assert set(fast.losses) == {"mse_loss", "auxiliary_reconstruction_loss", "expert_balance_loss"}
    assert (n_dead > 0) == (fast.losses["auxiliary_reconstruction_loss"].item() > 0)
    torch.testing.assert_close(fast.losses, dense.losses)
    torch.testing.assert_close(fast.loss, sum(fast.losses.values()))
    torch.testing.assert_close(fast.metrics, dense.metrics)
    for name in ("sae_in", "sae_out", "loss"):
        torch.testing.assert_close(getattr(fast, name), getattr(dense, name))
    assert (
        fast_grads.keys()
        == dense_grads.keys()
        >= {"W_expert", "b_expert", "W_enc", "W_dec", "b_enc", "b_dec"}
    )
    assert ("expert_scale" in fast_grads) == (sae.cfg.feature_scaling != "none")
    for name, theirs in dense_grads.items():
        torch.testing.assert_close(
            fast_grads[name], theirs, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_reconstruction_is_the_papers():
    """Eqs. 2.3-2.5, token by token and expert by expert, as they are written."""
    sae = make("scale_topk", active_experts=2, rescale_acts_by_decoder_norm=False)
    x = inputs("scale_topk", 10)
    with torch.no_grad():
        acts, out = sae.encode(x), sae(x)
    for token, ours, latents in zip(x, out, acts, strict=True):
        p = torch.softmax(sae.W_expert @ (token - sae.b_expert), 0)
        selected = sorted(range(4), key=lambda i: -p[i].item())[:2]
        f = {}
        for i in selected:
            rows = sae.W_enc.T[8 * i : 8 * i + 8]
            mean = rows.mean(0, keepdim=True)
            scaled = mean + (1 + sae.expert_scale[i]) * (rows - mean)
            for j, value in enumerate(scaled @ (token - sae.b_dec) + sae.b_enc[8 * i : 8 * i + 8]):
                f[i, j] = value
        top = sorted(f, key=lambda ij: -f[ij].item())[:3]
        x_hat = sae.b_dec + sum(p[i] * f[i, j].relu() * sae.W_dec[8 * i + j] for i, j in top)
        torch.testing.assert_close(ours, x_hat)
        assert set(latents.nonzero().flatten().tolist()) <= {8 * i + j for i, j in top}


def test_load_balancing_by_hand():
    probs = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.6, 0.2, 0.1]])
    choice = ExpertChoice(probs, torch.tensor([[0, 1], [1, 2]]), probs)
    f, P = [0.25, 0.5, 0.25, 0.0], [0.3, 0.425, 0.175, 0.1]
    assert load_balance(choice).item() == pytest.approx(4 * sum(a * b for a, b in zip(f, P, strict=True)))
    metrics = {name: value.item() for name, value in expert_metrics(choice).items()}
    assert metrics["expert_share_max"] == 0.5 and metrics["expert_share_min"] == 0
    assert metrics["expert_share_entropy"] == pytest.approx(1.5 * torch.log(torch.tensor(2.0)).item())
    assert metrics["expert_mean_p"] == pytest.approx((0.5 + 0.25 + 0.6 + 0.2) / 4)
    even = ExpertChoice(torch.full((4, 4), 0.25), torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]]), probs)
    assert load_balance(even).item() == pytest.approx(1)


def test_what_a_step_reports_and_what_a_coefficient_of_zero_leaves_out():
    sae = make("scale_topk", aux_loss_coefficient=0.0, expert_balance_coefficient=0.0)
    output = sae.training_forward_pass(TrainStepInput(inputs("scale_topk"), {}, None, 0, False))
    assert list(output.losses) == ["mse_loss"] and output.feature_acts.is_sparse
    assert output.metrics["expert_scale_min"] == sae.expert_scale.min()
    assert sae._choice is None  # nothing of the step is kept
    routed = make("route_scale", balance_coefficient=0.1)
    output = routed.training_forward_pass(
        TrainStepInput(inputs("route_scale"), {"balance": 0.1}, None, 0, False)
    )
    assert {"balance_loss", "expert_balance_loss"} <= set(output.losses)
    assert {"route_entropy", "expert_entropy", "expert_scale_mean"} <= set(output.metrics)


# --- At inference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "fields"), [kind for kind in KINDS if kind[1].get("routing") != "every"]
)
@pytest.mark.parametrize("rescale", [True, False])
def test_what_is_saved_computes_the_same(
    architecture: str, fields: dict[str, Any], rescale: bool, tmp_path: Path
):
    sae = make(architecture, rescale_acts_by_decoder_norm=rescale, **fields)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is get_sae_class(architecture)[0] and isinstance(loaded, TopKSAE)
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    x = inputs(architecture)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded(x), sae(x))
    state = loaded.state_dict()
    assert "W_lowpass" not in state and "expert_scale" not in dict(loaded.named_parameters())
    expected = before.get("expert_scale", torch.zeros(loaded.cfg.n_experts, dtype=torch.float64))
    assert torch.equal(state["expert_scale"], expected)
    form = inference_form(sae)
    assert form.state_dict().keys() == state.keys()
    assert all(torch.equal(form.state_dict()[name], tensor) for name, tensor in state.items())
    details = loaded.cfg.metadata["training_architecture_details"]
    assert details["feature_scaling"] == sae.cfg.feature_scaling
    loaded.save_model(tmp_path / "again")
    assert torch.equal(SAE.load_from_disk(tmp_path / "again")(x), loaded(x))


@pytest.mark.parametrize(
    ("architecture", "fields"), [kind for kind in KINDS if kind[1].get("routing") != "every"]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_the_sparse_form_equals_the_dense_one(
    architecture: str, fields: dict[str, Any], training: bool, rescale: bool
):
    sae = make(architecture, rescale_acts_by_decoder_norm=rescale, **fields)
    sae = sae if training else inference_form(sae)
    x = inputs("scale_topk", 20)  # what the shared SAE reads
    encode = sae.encode_routed if architecture == "route_scale" else sae.encode
    with torch.no_grad():
        assert is_fast(sae)
        code, acts = encode_topk(sae, x), sae._encode_dense(x)[0]
        torch.testing.assert_close(encode(x), acts)
        torch.testing.assert_close(torch.zeros_like(acts).scatter(1, code.indices, code.values), acts)
        torch.testing.assert_close(decode_topk(sae, code), sae.decode(acts))


def test_batches_of_any_shape_and_hooks_on_all_points():
    sae = inference_form(make("scale_topk"))
    x = inputs("scale_topk", 12)
    torch.testing.assert_close(sae(x.view(3, 4, -1)), sae(x).view(3, 4, -1))
    seen: dict[str, Any] = {}
    names = [
        "hook_sae_input",
        "hook_sae_acts_pre",
        "hook_sae_acts_post",
        "hook_sae_recons",
        "hook_sae_output",
    ]
    hooks = [(name, lambda value, hook: seen.update({hook.name: value.shape[-1]})) for name in names]
    sae.run_with_hooks(x, fwd_hooks=hooks)
    assert seen == dict(zip(names, [D_MODEL, D_SAE, D_SAE, D_MODEL, D_MODEL], strict=True))
    sae.use_error_term = True
    torch.testing.assert_close(sae(x), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_number_formats(dtype: torch.dtype):
    x = inputs("scale_topk").to(dtype)
    exact = make("scale_topk").to(torch.float32).to(torch.float64)
    sae = make("scale_topk").to(dtype)
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    output.loss.backward()
    assert output.sae_out.dtype == sae.W_expert.grad.dtype == dtype
    expected = exact.training_forward_pass(TrainStepInput(x.double(), {}, None, 0, False)).losses["mse_loss"]
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert output.losses["mse_loss"].item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("scaling", ["none", "mean", "learned"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_an_input_scale_is_folded(scaling: str, training: bool, rescale: bool):
    sae = make(
        "scale_topk",
        feature_scaling=scaling,
        normalize_activations="expected_average_only_in",
        rescale_acts_by_decoder_norm=rescale,
    )
    sae = sae if training else inference_form(sae)
    x = inputs("scale_topk")
    # (in units of the decoder norm latents become smaller with it)
    expected = sae(4 * x) / 4, sae.encode(4 * x) / (4 if rescale else 1)
    sae.fold_activation_norm_scaling_factor(4.0)
    torch.testing.assert_close((sae(x), sae.encode(x)), expected)


@pytest.mark.parametrize("subtract", [True, False])
def test_decoder_norms_and_whitening_are_folded_at_inference(subtract: bool):
    sae = make("scale_topk", apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=True)
    with pytest.raises(NotImplementedError, match="beside feature_scaling='mean'"):
        sae.fold_W_dec_norm()
    sae, x = inference_form(sae), inputs("scale_topk")
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    before = sae(x), sae.encode(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close((sae(x), sae.encode(x)), before)
    mean, M = torch.randn(D_MODEL).double(), torch.randn(D_MODEL, D_MODEL).double()
    expected = sae((x - mean) @ M) @ M.inverse() + mean, sae.encode((x - mean) @ M)
    sae.fold_activation_whitening(mean, M, M.inverse())
    torch.testing.assert_close((sae(x), sae.encode(x)), expected)


# --- Joined with routing over layers ------------------------------------------------------------------


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("layer_scale", [True, False])
def test_layer_views_are_scale_saes(relu: bool, layer_scale: bool, tmp_path: Path):
    sae: Any = inference_form(make("route_scale", relu=relu, layer_scale=layer_scale, standardize=True))
    view = sae.layer_view(3)
    assert type(view) is ScaleSAE and view.cfg.relu is relu
    x = inputs("scale_topk")
    fixed: Any = sae.router_log_scale[1].exp() if layer_scale else 1.0
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    with torch.no_grad():
        expected = sae.decode(sae.encode_routed((x - mean) / std * fixed)) / fixed * std + mean
        torch.testing.assert_close(view(x), expected, rtol=1e-4, atol=1e-4)  # SAELens' epsilon is another
    view.save_model(tmp_path / "view")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "view")(x), view(x))
    with pytest.raises(
        ValueError, match="views of a RouteScaleSAE are ScaleSAEs, which SAELens does not have"
    ):
        sae.save_layer_views(tmp_path / "views")
    assert not (tmp_path / "views").exists()


def test_another_rule_of_the_layer_router():
    sae = inference_form(make("route_scale"))
    other = with_routing(sae, "fixed", fixed_layer=LAYERS[0])
    assert isinstance(other, RouteScaleSAE) and other.W_expert is sae.W_expert
    x = inputs("route_scale")
    first = other.split(x)[:, 0]
    torch.testing.assert_close(other.encode(x), sae.encode_routed(first))


@pytest.mark.parametrize("theirs", SCALINGS)
@pytest.mark.parametrize("ours", SCALINGS)
def test_a_routed_one_starts_from_another_whatever_their_scaling(ours: str, theirs: str):
    """(what is loaded from a folder is the inference form)"""
    scale, x = make("scale_topk", feature_scaling=theirs), inputs("scale_topk")
    for source in (scale, inference_form(scale)):
        sae = make("route_scale", feature_scaling=ours, rescale_acts_by_decoder_norm=False)
        sae.init_from(source)
        torch.testing.assert_close(sae.encode_routed(x), scale.encode(x))
        torch.testing.assert_close(sae.decode(sae.encode_routed(x)), scale(x))
        assert ours == "none" or not sae.expert_scale.any()
    with pytest.raises(ValueError, match="no W_expert"):
        make("route_scale").init_from(TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=3)))


def test_experts_that_were_not_selected_are_not_computed_at_inference():
    sae, x = inference_form(make("scale_topk")), inputs("scale_topk", 12)
    with torch.no_grad(), FlopCounterMode(display=False) as products:
        acts = sae.encode(x.view(3, 4, -1))
    router, two_experts = 4, 2 * D_SAE // 4
    assert products.get_total_flops() == 2 * 12 * D_MODEL * (router + two_experts)
    torch.testing.assert_close(acts.view(12, -1), sae.encode(x))  # (with gradients all are computed)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x[0]), acts[0, 0])
        assert sae.encode(x[:0]).shape == (0, D_SAE)


# --- Errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"active_experts": 5}, "active_experts = 5 is more than n_experts = 4"),
        ({"n_experts": 5}, "n_experts = 5 does not divide d_sae = 32"),
        ({"k": 17}, "k = 17 is more than the 16 latents of active_experts = 2 experts of 8 latents each"),
        ({"n_experts": 0}, "n_experts must be an integer, 1 or more; got 0"),
        ({"active_experts": 1.5}, "active_experts must be an integer, 1 or more; got 1.5"),
        ({"k": True}, "k must be an integer, 1 or more; got True"),
        ({"expert_weights": "sigmoid"}, "unknown expert_weights 'sigmoid'; known: softmax, renormalized"),
        ({"feature_scaling": "high"}, "unknown feature_scaling 'high'; known: none, mean, identity, learned"),
        ({"expert_weights": "renormalized", "active_experts": 1}, "needs active_experts of 2 or more"),
        (
            {"expert_balance_coefficient": -1},
            "expert_balance_coefficient must be a number, 0 or more; got -1",
        ),
        ({"use_sparse_activations": True}, "use_sparse_activations does not go with experts"),
        ({"relu": 1}, "relu must be True or False, got 1"),
    ],
)
@pytest.mark.parametrize("architecture", ["scale_topk", "route_scale"])
def test_what_cannot_be(architecture: str, fields: dict[str, Any], message: str, unchecked: None):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(architecture, **fields)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("switch_topk", {"active_experts": 2}, "a Switch SAE has active_experts=1, got 2"),
        ("switch_topk", {"feature_scaling": "mean"}, "a Switch SAE has feature_scaling='none', got 'mean'"),
        ("scale_topk", {"normalize_activations": "covariance_whitening"}, "with feature_scaling='mean'"),
        (
            "scale_topk",
            {"normalize_activations": "expected_average_only_in", "feature_scaling": "identity"},
            "with feature_scaling='identity'",
        ),
    ],
)
def test_what_cannot_be_of_one_kind(architecture: str, fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        config(architecture, **fields)


def test_the_default_balance_follows_the_scale_of_the_loss():
    assert config("scale_topk").alpha == pytest.approx(0.1 * config("scale_topk").d_in)
    route = config("route_scale", expert_balance_coefficient=None)
    assert route.alpha == 0.1
    assert config("route_scale", loss="mse").alpha == pytest.approx(0.1 * route.d_model)
    assert config("route_scale", expert_balance_coefficient=0.0).alpha == 0.0


def test_configs_survive_json():
    for architecture in EXPERT_ARCHITECTURES:
        cfg = config(architecture)
        assert type(cfg).from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
        inference = get_sae_class(architecture)[1].from_dict(cfg.get_inference_sae_cfg_dict())
        assert (inference.n_experts, inference.active_experts) == (4, 1 if "switch" in architecture else 2)
