"""Routers with a teacher, losses on probabilities, and the rules that came with them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from sae_lens.saes.sae import TrainStepInput
from torch import nn

from routesae_lens.saes.architectures import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from routesae_lens.saes.distillation import router_losses
from routesae_lens.saes.forms import inference_form, with_routing
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.router import Route
from routesae_lens.training.train import train

LAYERS, D_MODEL = [1, 2, 4], 8


def make(**options):
    torch.manual_seed(0)
    cfg = RouteTopKTrainingSAEConfig(
        **{"d_in": 24, "d_sae": 16, "k": 2, "layers": LAYERS, "aux_loss_coefficient": 0.0} | options
    )
    return RouteTopKTrainingSAE(cfg)


def step(sae, stack, n=0, coefficients=None):
    return sae.training_forward_pass(TrainStepInput(stack, coefficients or {}, None, n, False))


@pytest.fixture
def stack():
    return torch.randn(64, 24, generator=torch.Generator().manual_seed(1))


def test_errors_of_every_layer_by_hand(stack):
    sae = make(routing="random")
    x = sae.split(stack)
    errors = sae.layer_errors(x)
    for i in range(3):
        out = sae.decode(sae.encode_routed(x[:, i]))
        expected = (x[:, i] - out).pow(2).sum(-1) / x[:, i].pow(2).sum(-1)
        torch.testing.assert_close(errors[:, i], expected)
    assert not errors.requires_grad


def test_the_oracle_reads_the_best_reconstructed_layer(stack):
    sae = make(routing="oracle")
    route = sae.route(stack)
    x = sae.split(stack)
    assert torch.equal(route.layer, sae.layer_errors(x).argmin(-1))
    torch.testing.assert_close(route.input, x[torch.arange(64), route.layer])
    assert len(route.layer.unique()) > 1


def planted(n=192):
    """Tokens of three kinds: layer i of kind i holds a dictionary row, the other layers noise."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(3, D_MODEL, generator=generator), dim=-1) * 4
    rows = rows - rows.mean(-1, keepdim=True)
    kind = torch.arange(n) % 3
    layers = torch.randn(n, 3, D_MODEL, generator=generator)
    layers[torch.arange(n), kind] = rows[kind]
    return layers.flatten(-2), rows, kind


def test_distillation_teaches_the_router():
    stack, rows, kind = planted()
    sae = make(routing="distilled", oracle_fraction=1.0, explore=0.0, k=1)
    with torch.no_grad():
        units = standardize(rows).x / (D_MODEL - 1) ** 0.5
        sae.W_dec[:3] = units
        sae.W_enc.zero_()[:, :3] = units.T
    best = sae.layer_errors(sae.split(stack)).argmin(-1)
    assert (best == kind).float().mean() > 0.95
    optimizer = torch.optim.Adam([sae.W_router], lr=0.02)
    for n in range(150):
        step(sae, stack, n).losses["distillation_loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    route = sae.route(stack)
    last = step(sae, stack).losses["distillation_loss"]
    torch.testing.assert_close(last, nn.functional.nll_loss(route.probs.log(), best))
    assert last < 0.5
    assert (route.layer == kind).float().mean() > 0.8
    assert torch.equal(route.scale, torch.ones(len(stack)))


def test_which_layers_distillation_trains_on(stack):
    sae = make(routing="distilled", oracle_fraction=0.25, explore=0.0)
    x = sae.split(stack)
    best, own = sae.layer_errors(x).argmin(-1), sae.route(stack).layer
    trained_on = step(sae, stack).sae_in
    expected = torch.cat([best[:16], own[16:]])
    torch.testing.assert_close(trained_on, x[torch.arange(64), expected])

    def share_of_own(n, **options):
        other = make(routing="distilled", oracle_fraction=0.0, **options)
        big = stack.repeat(64, 1)
        read = step(other, big, n).sae_in
        x = other.split(big)
        return (read == x[torch.arange(len(big)), other.route(big).layer]).all(-1).float().mean().item()

    assert share_of_own(0, explore=0.3) == pytest.approx(0.7 + 0.3 / 3, abs=0.03)
    assert share_of_own(4, explore=0.0, uniform_steps=5) == pytest.approx(1 / 3, abs=0.03)
    assert share_of_own(5, explore=0.0, uniform_steps=5) == 1


def test_balance_and_entropy_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]], requires_grad=True)
    route = Route(probs, probs.argmax(-1), probs, probs, probs[:, 0])
    losses = router_losses(route, {"balance": 2.0, "entropy": -0.5, "l1": 7.0})
    assert losses.keys() == {"balance_loss", "entropy_loss"}
    assert losses["balance_loss"].item() == pytest.approx(2.0 * 3 * (0.5 * 0.55 + 0.5 * 0.35), rel=1e-5)
    entropy = torch.distributions.Categorical(probs).entropy().mean()
    torch.testing.assert_close(losses["entropy_loss"], -0.5 * entropy)
    losses["balance_loss"].backward()
    assert probs.grad.abs().max() > 0


def test_balance_is_of_the_routers_own_choice():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]])
    explored = Route(probs, torch.tensor([2, 2]), probs, probs, probs[:, 0])
    own = Route(probs, torch.tensor([0, 1]), probs, probs, probs[:, 0])
    assert router_losses(explored, {"balance": 1.0}) == router_losses(own, {"balance": 1.0})


def test_coefficients_are_scheduled_and_act(stack):
    sae = make(balance_coefficient=0.1, router_warm_up_steps=7)
    scheduled = sae.get_coefficients()["balance"]
    assert (scheduled.value, scheduled.warm_up_steps) == (0.1, 7)
    assert "entropy" not in sae.get_coefficients()
    plain, balanced = step(sae, stack), step(sae, stack, coefficients={"balance": 0.1})
    torch.testing.assert_close(balanced.loss, plain.loss + balanced.losses["balance_loss"])


def test_mlsae_trains_on_every_layer(stack):
    sae = make(routing="every")
    x = sae.split(stack)
    output = step(sae, stack)
    torch.testing.assert_close(output.sae_in, x.reshape(-1, D_MODEL))
    assert sae.encode(stack).shape == (64, 3, 16)
    torch.testing.assert_close(sae.encode(stack)[:, 1], sae.encode_routed(x[:, 1]))
    with pytest.raises(ValueError, match="with_routing"):
        sae.route(stack)
    fixed = with_routing(inference_form(sae), "fixed", fixed_layer=2)
    torch.testing.assert_close(fixed.encode(stack), inference_form(sae).encode(stack)[:, 1])


def test_top2_mixes_the_two_best(stack):
    sae = make(routing="top2")
    route, x = sae.route(stack), sae.split(stack)
    probs = route.probs
    worst = probs.argmin(-1, keepdim=True)
    weights = probs.scatter(-1, worst, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(route.weights, weights)
    torch.testing.assert_close(route.input, (weights[..., None] * x).sum(1))
    assert torch.equal(route.layer, probs.argmax(-1))


def test_layer_scale_is_undone(stack):
    sae = make(routing="random", layer_scale=True, route_seed=3)
    plain = make(routing="random", route_seed=3)
    torch.testing.assert_close(sae.route(stack), plain.route(stack))  # 1 at the start
    with torch.no_grad():
        sae.router_log_scale.copy_(torch.tensor([0.0, 1.0, -1.0]))
    route = sae.route(stack)
    torch.testing.assert_close(route.scale, sae.router_log_scale.exp()[route.layer].detach())
    torch.testing.assert_close(route.input, plain.route(stack).input * route.scale[:, None])
    x = sae.split(stack)
    out = sae.decode(sae.encode_routed(x[:, 1] * torch.e)) / torch.e
    expected = (x[:, 1] - out).pow(2).sum(-1) / x[:, 1].pow(2).sum(-1)
    torch.testing.assert_close(sae.layer_errors(x)[:, 1], expected)


def test_with_routing_shares_parameters(stack):
    sae = inference_form(make(routing="distilled"))
    random = with_routing(sae, "random", route_seed=5)
    assert random.W_enc is sae.W_enc
    assert random.W_dec is sae.W_dec
    assert not hasattr(random, "W_router")
    assert with_routing(sae, "hard").W_router is sae.W_router
    sae.use_error_term = True
    assert with_routing(sae, "oracle").use_error_term
    sae.use_error_term = False
    torch.testing.assert_close(with_routing(sae, "distilled").encode(stack), sae.encode(stack))
    with pytest.raises(ValueError, match="W_router"):
        with_routing(random, "hard")
    with pytest.raises(ValueError, match="fixed_layer"):
        with_routing(sae, "fixed", fixed_layer=3)
    with pytest.raises(ValueError, match="inference"):
        with_routing(make(), "random")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"explore": 1.5}, "explore is a share"),
        ({"oracle_fraction": -0.1}, "oracle_fraction is a share"),
        ({"uniform_steps": -1}, "uniform_steps must be a number of steps"),
        ({"routing": "random", "balance_coefficient": 1.0}, "no learned router"),
        ({"routing": "soft", "layer_scale": True}, "reads one layer"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_train_chooses_the_uniform_steps(tiny_hooked, tmp_path):
    layers = [0, 1]
    cfg = RouteTopKTrainingSAEConfig.for_model(
        tiny_hooked, layers=layers, d_sae=16, k=2, routing="distilled", aux_loss_coefficient=0.0
    )
    given = Dataset.from_dict({"tokens": torch.randint(3, 40, (60, 16)).tolist()})
    options = {"training_tokens": 40 * 16, "batch_size": 16, "context_size": 16}
    result = train(tiny_hooked, {"auto": cfg}, given, output=tmp_path / "auto", **options)
    assert result.saes["auto"].cfg.uniform_steps == 6  # 15 % of 40
    cfg.uniform_steps = 2
    result = train(tiny_hooked, {"given": cfg}, given, output=tmp_path / "given", **options)
    assert result.saes["given"].cfg.uniform_steps == 2
