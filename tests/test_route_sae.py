"""RouteSAE as a SAELens SAE: configs, shapes, the disk, folding, starting from a trained SAE."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from routed_saes import ARCHITECTURES, D_MODEL, D_SAE, LAYERS, make, randomize, stacks, step
from sae_lens import SAE, TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAE

from routesae_lens.saes.architectures import (
    ROUTE_ARCHITECTURES,
    RouteTopKSAE,
    RouteTopKSAEConfig,
    RouteTopKTrainingSAEConfig,
)
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE, RouteTrainingSAE

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
ROUTED = [("sum", "hard"), ("mean", "soft"), ("attention", "straight_through"), ("sum", "random")]


def test_all_six_are_registered():
    assert set(ROUTE_ARCHITECTURES) == {f"route_{name}" for name in ARCHITECTURES}


# --- Shapes and the forward pass ---------------------------------------------------------------------------


@every_architecture
def test_shapes_and_the_flow(architecture):
    for sae in (make(architecture), inference_form(make(architecture))):
        stack = stacks(2, 5)
        routed = sae.route(stack).input
        assert routed.shape == (2, 5, D_MODEL)
        assert sae.encode(stack).shape == (2, 5, D_SAE)
        assert sae.W_enc.shape == (D_MODEL, D_SAE) and sae.W_dec.shape == (D_SAE, D_MODEL)
        assert sae.W_router.shape == (3, D_MODEL) and sae.b_dec.shape == (D_MODEL,)
        assert torch.equal(sae.encode(stack), sae.encode_routed(routed))
        assert torch.equal(sae(stack), sae.decode(sae.encode_routed(routed)))
        assert not [name for name in sae.state_dict() if "." in name]
        assert set(sae.hook_dict) == {name for name in sae.hook_dict if "." not in name}


@every_architecture
def test_saelens_hooks_see_the_routed_space(architecture):
    sae = inference_form(make(architecture))
    _, cache = sae.run_with_cache(stacks(7))
    assert torch.equal(cache["hook_sae_input"], sae.route(stacks(7)).input)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(stacks(7)))
    assert torch.equal(cache["hook_sae_output"], sae(stacks(7)))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated", "standard"])
def test_the_error_term_fills_up_to_the_routed_input(architecture):
    sae = inference_form(make(architecture))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sae.use_error_term = True
    stack = stacks(6)
    routed = sae.route(stack).input
    torch.testing.assert_close(sae(stack), routed)
    # The error is that of the clean SAE: what a hook changes remains a change.
    changed = sae.run_with_hooks(stack, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: 0 * acts)])
    torch.testing.assert_close(changed, sae.b_dec + routed - sae.decode(sae.encode(stack)))
    # ... and a constant for gradients, as in SAELens.
    gradients = []
    for use_error_term in (True, False):
        sae._use_error_term = use_error_term
        stack = stacks(6).requires_grad_()
        gradients.append(torch.autograd.grad((sae(stack) * torch.arange(10.0)).sum(), stack)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(4, 29), (4, 10), (31,)])
def test_a_wrong_last_dimension(shape):
    for sae in (make("topk"), inference_form(make("topk"))):
        for call in (sae, sae.encode, sae.route):
            with pytest.raises(ValueError, match="expected a stack of 3 layers x d_model 10 = 30"):
                call(torch.zeros(shape))
    with pytest.raises(ValueError, match="expected a stack"):
        step(make("topk"), torch.zeros(shape))


def test_signed_topk_keeps_negative_latents():
    config = {"d_in": 30, "d_sae": 24, "layers": LAYERS, "k": 20}
    signed, plain = (
        randomize(RouteTopKSAE(RouteTopKSAEConfig(relu=relu, **config))) for relu in (False, True)
    )
    plain.load_state_dict(signed.state_dict())
    latents = signed.encode(stacks(50))
    assert ((latents != 0).sum(-1) == 20).all() and (latents < 0).any()
    assert torch.equal(plain.encode(stacks(50)), latents.relu())


# --- Config errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"aggregator": "max"}, "unknown aggregator 'max'; known: sum, mean, attention"),
        ({"routing": "Hard"}, "unknown routing"),
        ({"site": "hook_z"}, "unknown site"),
        ({"random_per": "sequence"}, "unknown random_per"),
        ({"d_in": 31}, "31 is not a multiple of 3 layers"),
        ({"k": 25}, "k must be between 1 and d_sae = 24, got 25"),
        ({"k": 0}, "k must be between 1"),
        ({"routing": "fixed"}, "fixed_layer to be one of layers"),
        ({"routing": "fixed", "fixed_layer": 2}, "fixed_layer to be one of layers"),
        ({"fixed_layer": 3}, "only goes with routing='fixed'"),
        ({"layers": []}, "non-empty"),
        ({"layers": [3, 1, 4]}, "strictly increasing"),
        ({"layers": [-1, 3, 4]}, "0 or more"),
        ({"normalize_activations": "layer_norm"}, "does not work on a stack"),
        ({"normalize_activations": "covariance_whitening"}, "does not work on a stack"),
        ({"reshape_activations": "hook_z"}, "does not work on a stack"),
        ({"relu": False, "use_sparse_activations": True}, "relu=False"),
    ],
)
def test_config_errors(kwargs, match):
    config: dict[str, Any] = {"d_in": 30, "d_sae": 24, "layers": LAYERS, "k": 3, **kwargs}
    with pytest.raises(ValueError, match=match):
        RouteTopKTrainingSAEConfig(**config)
    if "use_sparse_activations" not in kwargs:
        with pytest.raises(ValueError, match=match):
            RouteTopKSAEConfig(**config)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("loss", "l2", "unknown loss 'l2'; known: normalized_mse, mse"),
        ("normalize_activations", "constant_norm_rescale", "does not work on a stack"),
        ("normalize_activations", "anything", "normalize_activations"),
    ],
)
def test_values_outside_a_literal(name, value, match):
    cfg = make("topk").cfg
    setattr(cfg, name, value)  # jaxtyping's check, on in the tests alone, would refuse it at construction
    with pytest.raises(ValueError, match=match):
        cfg.__post_init__()


def test_whitening_is_refused():
    with pytest.raises(NotImplementedError, match="several layers"):
        make("topk").fold_activation_whitening(torch.zeros(30), torch.eye(30), torch.eye(30))


def test_the_metadata_names_the_hook_point():
    assert make("topk").cfg.metadata.hook_name == "blocks.4.hook_resid_post_stack_1_3to4"
    sae = make("topk", site="hook_mlp_out", metadata=SAEMetadata(hook_name="mine", model_name="m"))
    assert sae.cfg.metadata.hook_name == "mine"


@pytest.mark.parametrize("backend", ["tiny_hooked", "tiny_bridge", "tiny_proxy"])
def test_configs_for_a_model(backend, request):
    model = request.getfixturevalue(backend)
    cfg = RouteTopKTrainingSAEConfig.for_model(model, d_sae=40, k=2)
    assert cfg.layers == [0, 1, 2, 3] and cfg.d_in == 4 * 32
    sae: Any = get_sae_training_class("route_topk")[0](cfg)
    name = sae.mount(model)
    assert name == cfg.metadata.hook_name and name in model.hook_dict and sae.mount(model) == name
    cache = model.run_with_cache(torch.tensor([[3, 4, 5]]), names_filter=[name])[1]
    assert sae.encode(cache[name]).shape == (1, 3, 40)
    with pytest.raises(ValueError, match="d_model = 10"):
        make("topk").mount(model)
    with pytest.raises(ValueError, match="between 0 and 5"):
        RouteTopKTrainingSAEConfig.for_model(model, layers=[5, 6], d_sae=40, k=2)


# --- The disk ----------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("aggregator, routing", ROUTED)
def test_the_inference_model_survives_the_disk(architecture, aggregator, routing, tmp_path):
    sae = make(architecture, aggregator=aggregator, routing=routing, site="hook_mlp_out")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    memory = inference_form(sae)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name])
    sae.save_inference_model(tmp_path)
    stack = stacks(40)
    for loader in (SAE, RouteSAE):
        disk = loader.load_from_disk(tmp_path)
        assert isinstance(disk, RouteSAE) and type(disk) is type(memory)
        assert disk.cfg.to_dict() == memory.cfg.to_dict()
        assert list(disk.state_dict()) == list(memory.state_dict())
        assert torch.equal(disk.encode(stack), memory.encode(stack))
        assert torch.equal(disk(stack), memory(stack))
        for one, other in zip(disk.route(stack), sae.route(stack), strict=True):
            assert torch.equal(one, other)
    assert memory.cfg.architecture() == {
        "batchtopk": "route_jumprelu",
        "matryoshka_batchtopk": "route_jumprelu",
    }.get(architecture, f"route_{architecture}")
    check_against_training(architecture, sae, memory, stack)


@torch.no_grad()
def check_against_training(architecture, sae, memory, stack) -> None:
    """The same function, up to folded decoder norms; BatchTopK's latents are those above its threshold."""
    latents, recon = sae.encode(stack), sae(stack)
    if "batchtopk" in architecture:
        x = sae.route(stack).input
        pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=-1)
        latents = pre * (pre > 0.7)
        recon = latents / sae.W_dec.norm(dim=-1) @ sae.W_dec + sae.b_dec
        assert 0 < (latents != 0).float().sum(-1).mean() < 12
    torch.testing.assert_close(memory.encode(stack), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(memory(stack), recon, atol=1e-5, rtol=1e-4)


@every_architecture
@pytest.mark.parametrize("aggregator, routing", ROUTED)
def test_a_training_checkpoint_survives_the_disk(architecture, aggregator, routing, tmp_path):
    sae = make(architecture, aggregator=aggregator, routing=routing, loss="mse", route_seed=3)
    sae.save_model(tmp_path)
    for loader in (TrainingSAE, RouteTrainingSAE):
        loaded: Any = loader.load_from_disk(tmp_path)
        assert type(loaded) is type(sae) and loaded.cfg.to_dict() == sae.cfg.to_dict()
        sae = make(architecture, aggregator=aggregator, routing=routing, loss="mse", route_seed=3)
        for name, tensor in sae.state_dict().items():  # SAELens loads BatchTopK's double threshold as float
            assert torch.equal(loaded.state_dict()[name].float(), tensor.float())
        one, other = step(sae, stacks(20), [1, 2]), step(loaded, stacks(20), [1, 2])
        assert torch.equal(one.loss, other.loss) and torch.equal(one.sae_out, other.sae_out)
        assert one.losses.keys() == other.losses.keys()
    fresh = make(architecture, seed=5, aggregator=aggregator, routing=routing)
    fresh.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(fresh.W_enc, sae.W_enc)


def test_load_as_the_wrong_kind(tmp_path):
    TopKSAE(TopKSAEConfig(d_in=10, d_sae=24, k=3)).save_model(tmp_path)
    with pytest.raises(ValueError, match="not of type RouteSAE"):
        RouteSAE.load_from_disk(tmp_path)


# --- Folding of SAELens' input norm ------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("aggregator", ["sum", "mean", "attention"])
@pytest.mark.parametrize("routing", ["hard", "soft", "fixed"])
@torch.no_grad()
def test_folding_keeps_the_function_on_raw_inputs(architecture, aggregator, routing):
    kwargs = {
        "aggregator": aggregator,
        "routing": routing,
        "normalize_activations": "expected_average_only_in",
    }
    sae = make(architecture, standardize=False, **kwargs)
    stack, scale = stacks(30), 0.37
    route, scaled = sae.route(scale * stack), sae(scale * stack)
    expected = inference_form(sae)(scale * stack) / scale
    in_memory = inference_form(sae, scaling_factor=scale)
    assert sae.cfg.normalize_activations == "expected_average_only_in"
    torch.testing.assert_close(in_memory(stack), expected, atol=1e-5, rtol=1e-4)
    sae.fold_activation_norm_scaling_factor(scale)
    torch.testing.assert_close(sae(stack), scaled / scale, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae.route(stack).probs, route.probs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(inference_form(sae)(stack), expected, atol=1e-5, rtol=1e-4)
    assert sae.cfg.normalize_activations == in_memory.cfg.normalize_activations == "none"


@every_architecture
@torch.no_grad()
def test_folding_does_nothing_where_layers_are_standardised(architecture):
    sae = make(architecture, normalize_activations="expected_average_only_in")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    out = sae(stacks(30) * 0.37)
    sae.fold_activation_norm_scaling_factor(0.37)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    torch.testing.assert_close(sae(stacks(30)), out, atol=1e-4, rtol=1e-4)
    assert sae.cfg.normalize_activations == "none"


# --- One layer is a plain SAE ------------------------------------------------------------------------------


def test_over_one_layer_it_is_the_stock_topk_sae():
    """Values, losses and gradients; the shared weights are drawn as SAELens draws them."""
    torch.manual_seed(0)
    stock: Any = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=3))
    torch.manual_seed(0)
    cfg = RouteTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=3, layers=[4], loss="mse")
    routed: Any = get_sae_training_class("route_topk")[0](cfg)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(routed.state_dict()[name], tensor)
    x = stacks(20, n_layers=1)
    z = standardize(x).x
    ours, theirs = step(routed, x, [0, 5, 7]), step(stock, z, [0, 5, 7])
    assert ours.losses.keys() == theirs.losses.keys()
    for name in theirs.losses:
        torch.testing.assert_close(ours.losses[name], theirs.losses[name])
    torch.testing.assert_close(ours.feature_acts.to_dense(), theirs.feature_acts)
    assert torch.equal(ours.sae_in, z)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(dict(routed.named_parameters())[name].grad, parameter.grad)
    assert routed.W_router.grad.abs().max() < 1e-6
    assert torch.equal(inference_form(routed)(x), inference_form(stock)(z))


# --- Starting from a trained SAE ---------------------------------------------------------------------------


def stock_topk(**kwargs) -> Any:
    torch.manual_seed(9)
    return randomize(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=3, **kwargs)))


@torch.no_grad()
def test_init_from_copies_the_weights():
    sae, trained = make("topk"), stock_topk()
    router = sae.W_router.clone()
    sae.init_from(trained)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor)
    assert torch.equal(sae.W_router, router)
    z = stacks(20, n_layers=1)
    torch.testing.assert_close(sae.encode_routed(z), trained.encode(z))
    sae.W_enc.zero_()
    assert trained.W_enc.abs().sum() > 0  # a copy, not a view


@torch.no_grad()
def test_init_from_folds_norms_that_count_there_and_not_here():
    sae, trained = make("topk", rescale_acts_by_decoder_norm=False), stock_topk()
    sae.init_from(trained)
    z = stacks(20, n_layers=1)
    torch.testing.assert_close(sae.encode_routed(z), trained.encode(z))
    torch.testing.assert_close(sae.decode(sae.encode_routed(z)), trained(z))


@torch.no_grad()
def test_init_from_an_inference_sae():
    sae, trained = make("topk"), inference_form(stock_topk())
    sae.init_from(trained)
    z = stacks(20, n_layers=1)
    torch.testing.assert_close(sae.decode(sae.encode_routed(z)), trained(z))


def test_init_from_another_route_sae_keeps_the_router():
    sae, other = make("topk"), make("topk", seed=3)
    router = sae.W_router.clone()
    sae.init_from(other)
    assert torch.equal(sae.W_enc, other.W_enc) and torch.equal(sae.W_router, router)


@pytest.mark.parametrize(
    "target, source, match",
    [
        ("topk", {"d_sae": 25}, r"W_enc: \(10, 25\) into \(10, 24\)"),
        ("topk", {"d_in": 11}, r"W_dec: \(24, 11\) into \(24, 10\)"),
        ("gated", {}, "no b_gate"),
        ("topk", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input: False"),
    ],
)
def test_init_from_mismatches(target, source, match):
    config = {"d_in": D_MODEL, "d_sae": D_SAE, "k": 3, **source}
    sae, before = make(target), make(target).state_dict()
    with pytest.raises(ValueError, match=match):
        sae.init_from(TopKTrainingSAE(TopKTrainingSAEConfig(**config)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_jumprelu_starts_from_topk_with_its_own_threshold():
    sae = make("jumprelu")
    threshold = sae.threshold.clone()
    sae.init_from(stock_topk())
    assert torch.equal(sae.threshold, threshold)
