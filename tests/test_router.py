"""The router: every aggregator with every routing rule against formulas written by hand, and identities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routesae_lens.saes.architectures import RouteTopKSAE, RouteTopKSAEConfig
from routesae_lens.saes.layers import EPS, standardize
from routesae_lens.saes.router import AGGREGATORS, ROUTINGS, uniform_layers

N_LAYERS, D_MODEL = 4, 12
LAYERS = [2, 3, 5, 8]


def make(aggregator="sum", routing="hard", layers=LAYERS, d_model=D_MODEL, **kwargs) -> RouteTopKSAE:
    torch.manual_seed(0)
    if routing == "fixed":
        kwargs.setdefault("fixed_layer", 5)
    cfg = RouteTopKSAEConfig(
        d_in=len(layers) * d_model,
        d_sae=20,
        k=3,
        layers=layers,
        aggregator=aggregator,
        routing=routing,
        **kwargs,
    )
    sae = RouteTopKSAE(cfg)
    if hasattr(sae, "router_query"):
        torch.nn.init.normal_(sae.router_query)
    return sae


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    """Layers of different mean and scale, so that leaving out the standardisation shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, N_LAYERS, D_MODEL, generator=generator)
    return x * torch.tensor([1.0, 3.0, 0.2, 8.0])[:, None] + torch.tensor([0.0, 5.0, -1.0, 2.0])[:, None]


@torch.no_grad()
def by_hand(sae: RouteTopKSAE, x: torch.Tensor):
    """One token (layer, d_model), in plain loops: probs, layer, weights, input, scale."""
    cfg = sae.cfg
    if cfg.standardize:
        rows = []
        for row in x:
            mean = sum(row) / len(row)
            std = math.sqrt(sum((value - mean) ** 2 for value in row) / (len(row) - 1))
            rows.append((row - mean) / (std + 1e-6))
        x = torch.stack(rows)
    n = len(x)
    if cfg.routing in ("random", "fixed"):
        layer = cfg.layers.index(5) if cfg.routing == "fixed" else None
        probs = torch.zeros(n) if cfg.routing == "fixed" else torch.full((n,), 1 / n)
        if layer is not None:
            probs[layer] = 1
    else:
        if cfg.aggregator == "attention":
            attention = torch.tensor(
                [math.exp(float(row @ sae.router_query) / math.sqrt(len(row))) for row in x]
            )
            pooled = sum(a * row for a, row in zip(attention / attention.sum(), x, strict=True))
        else:
            pooled = sum(x) / (n if cfg.aggregator == "mean" else 1)
        odds = torch.tensor([math.exp(float(w @ pooled)) for w in sae.W_router])
        probs = odds / odds.sum()
        layer = max(range(n), key=lambda i: float(probs[i]))
    return x, probs, layer


WITH_TESTS_OF_THEIR_OWN = {"oracle", "every", "top2"}  # test_distillation.py
PAIRS = list(itertools.product(AGGREGATORS, sorted(set(ROUTINGS) - WITH_TESTS_OF_THEIR_OWN), [True, False]))


def test_the_tables_name_what_the_issue_names():
    assert set(AGGREGATORS) == {"sum", "mean", "attention"}
    assert (
        set(ROUTINGS)
        == {"hard", "soft", "random", "fixed", "straight_through", "distilled"} | WITH_TESTS_OF_THEIR_OWN
    )


@pytest.mark.parametrize("aggregator, routing, standardized", PAIRS)
def test_every_pair_against_the_formulas(aggregator, routing, standardized):
    sae = make(aggregator, routing, standardize=standardized)
    with torch.no_grad():
        if hasattr(sae, "W_router") and not standardized:
            sae.W_router.mul_(0.1)
        stacks = activations(2, 5)
        route = sae.route(stacks.flatten(-2))
    assert route.probs.shape == route.weights.shape == (2, 5, N_LAYERS)
    assert route.layer.shape == route.scale.shape == (2, 5) and route.input.shape == (2, 5, D_MODEL)
    for i, j in itertools.product(range(2), range(5)):
        x, probs, layer = by_hand(sae, stacks[i, j])
        torch.testing.assert_close(route.probs[i, j], probs, atol=1e-5, rtol=1e-4)
        layer = int(route.layer[i, j]) if layer is None else layer
        assert route.layer[i, j] == layer
        weights = torch.zeros(N_LAYERS)
        weights[layer] = float(probs[layer]) if routing == "hard" else 1.0
        if routing == "soft":
            weights = probs
        torch.testing.assert_close(route.weights[i, j], weights, atol=1e-5, rtol=1e-4)
        expected = sum(w * row for w, row in zip(weights, x, strict=True))
        torch.testing.assert_close(route.input[i, j], expected, atol=1e-4, rtol=1e-4)
        scale = float(probs[layer]) if routing == "hard" else 1.0
        torch.testing.assert_close(route.scale[i, j], torch.tensor(scale), atol=1e-5, rtol=1e-4)


# --- Identities ------------------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None)


@few
@given(
    seed=seeds,
    aggregator=st.sampled_from(sorted(AGGREGATORS)),
    routing=st.sampled_from(sorted(set(ROUTINGS) - WITH_TESTS_OF_THEIR_OWN)),
)
def test_probabilities_and_weights(seed, aggregator, routing):
    sae = make(aggregator, routing)
    x = activations(3, 4, seed=seed)
    route = sae.route(x.flatten(-2))
    torch.testing.assert_close(route.probs.sum(-1), torch.ones(3, 4))
    assert torch.equal(route.weights.argmax(-1), route.layer)
    z = standardize(x).x
    torch.testing.assert_close(route.input, (z * route.weights[..., None]).sum(-2), atol=1e-5, rtol=1e-5)
    if routing == "soft":
        assert torch.equal(route.weights, route.probs)
    else:
        chosen = z.gather(-2, route.layer[..., None, None].expand(3, 4, 1, D_MODEL)).squeeze(-2)
        assert torch.equal(route.input, chosen * route.scale[..., None])
        assert torch.equal((route.weights != 0).sum(-1), torch.ones(3, 4, dtype=torch.int64))
    if routing == "hard":
        assert torch.equal(route.scale, route.probs.max(-1).values)
    else:
        assert torch.equal(route.scale, torch.ones(3, 4))


@few
@given(
    seed=seeds,
    aggregator=st.sampled_from(sorted(AGGREGATORS)),
    routing=st.sampled_from(["hard", "soft", "straight_through"]),
    order=st.permutations(range(N_LAYERS)),
)
def test_permuting_layers_with_the_routers_rows_permutes_the_route(seed, aggregator, routing, order):
    sae = make(aggregator, routing)
    x = activations(6, seed=seed)
    route = sae.route(x.flatten(-2))
    with torch.no_grad():
        sae.W_router.copy_(sae.W_router[order])
    permuted = sae.route(x[:, order].flatten(-2))
    torch.testing.assert_close(permuted.probs, route.probs[:, order], atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.tensor(order)[permuted.layer], route.layer)
    torch.testing.assert_close(permuted.weights, route.weights[:, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(permuted.input, route.input, atol=1e-4, rtol=1e-4)


@few
@given(seed=seeds)
def test_a_single_token_routes_as_in_its_batch(seed):
    sae = make()
    x = activations(2, 3, seed=seed).flatten(-2)
    together, alone = sae.route(x), sae.route(x[1, 2])
    assert alone.layer.shape == () and alone.layer == together.layer[1, 2]
    torch.testing.assert_close(alone.input, together.input[1, 2])


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("routing", ["hard", "soft", "straight_through"])
def test_one_layer_has_probability_one(aggregator, routing):
    sae = make(aggregator, routing, layers=[7])
    x = activations(5)[:, 1]
    route = sae.route(x)
    assert torch.equal(route.probs, torch.ones(5, 1)) and torch.equal(route.layer, torch.zeros(5).long())
    assert torch.equal(route.input, standardize(x).x)


def test_aggregators_differ():
    x = activations(20).flatten(-2)
    probs = [make(name).route(x).probs for name in AGGREGATORS]
    for one, other in itertools.combinations(probs, 2):
        assert not torch.allclose(one, other, atol=1e-2)


def test_attention_starts_as_the_mean():
    sae = make("attention")
    torch.nn.init.zeros_(sae.router_query)
    mean = make("mean")
    x = activations(5).flatten(-2)
    torch.testing.assert_close(sae.route(x).probs, mean.route(x).probs)
    sae.route(x).probs[:, 0].sum().backward()
    assert sae.router_query.grad.abs().max() > 1e-6


# --- Straight-through ------------------------------------------------------------------------------------


@few
@given(seed=seeds)
def test_straight_through_is_hard_without_the_scale(seed):
    hard, straight = make(routing="hard"), make(routing="straight_through")
    x = activations(8, seed=seed)
    route = straight.route(x.flatten(-2))
    assert torch.equal(route.layer, hard.route(x.flatten(-2)).layer)
    assert torch.equal(route.probs, hard.route(x.flatten(-2)).probs)
    assert torch.equal(route.input, standardize(x).x[torch.arange(8), route.layer])  # exactly x_i


def test_straight_through_gives_the_router_the_gradient_of_p():
    sae = make(routing="straight_through")
    x = activations(8)
    direction = torch.randn(8, D_MODEL)
    (sae.route(x.flatten(-2)).input * direction).sum().backward()
    got = sae.W_router.grad.clone()
    sae.W_router.grad = None
    route = sae.route(x.flatten(-2))
    p = route.probs.gather(-1, route.layer[:, None]).squeeze(-1)
    (p * (route.input.detach() * direction).sum(-1)).sum().backward()
    torch.testing.assert_close(got, sae.W_router.grad)
    assert got.abs().max() > 1e-4


@pytest.mark.parametrize("routing", ["random", "fixed"])
def test_rules_without_a_router_have_no_router_parameters(routing):
    assert not [name for name, _ in make("attention", routing).named_parameters() if "router" in name]


# --- Random ------------------------------------------------------------------------------------------------


def test_random_is_uniform():
    """Chi-square over layers, and over pairs of neighbouring positions; 0.9999 quantiles of chi2(6), chi2(48)."""
    drawn = uniform_layers((50, 400), 7, seed=3)
    counts = drawn.flatten().bincount(minlength=7).double()
    assert chi_square(counts) < 27.9
    for one, other in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        pairs = (7 * one + other).flatten().bincount(minlength=49).double()
        assert chi_square(pairs) < 95


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_draws_and_seeds_are_independent():
    shape = (20, 200)
    base = uniform_layers(shape, 7, seed=3, draw=0)
    for other in (uniform_layers(shape, 7, seed=3, draw=1), uniform_layers(shape, 7, seed=4, draw=0)):
        agree = (base == other).double().mean()
        assert abs(agree - 1 / 7) < 0.03


@few
@given(
    seed=st.integers(-(2**40), 2**40), draw=st.integers(0, 10**6), n_layers=st.integers(1, 40),
    sequences=st.integers(1, 5), positions=st.integers(1, 20), more=st.integers(0, 30),
)  # fmt: skip
def test_random_depends_on_seed_draw_sequence_and_position_alone(
    seed, draw, n_layers, sequences, positions, more
):
    drawn = uniform_layers((sequences, positions), n_layers, seed, draw)
    assert drawn.min() >= 0 and drawn.max() < n_layers
    assert torch.equal(drawn, uniform_layers((sequences, positions), n_layers, seed, draw))
    larger = uniform_layers((sequences + more, positions + more), n_layers, seed, draw)
    assert torch.equal(drawn, larger[:sequences, :positions])


def test_random_route_uses_seed_and_draw():
    sae, same, other = make(routing="random"), make(routing="random"), make(routing="random", route_seed=9)
    x = activations(3, 30).flatten(-2)
    torch.manual_seed(5)
    layer = sae.route(x).layer
    torch.manual_seed(6)  # the global generator plays no part
    assert torch.equal(layer, same.route(x).layer)
    assert torch.equal(layer[:, :7], sae.route(x[:, :7]).layer)
    assert not torch.equal(layer, sae.route(x, draw=1).layer)
    assert not torch.equal(layer, other.route(x).layer)
    assert len(layer.unique()) == N_LAYERS


def test_random_per_batch():
    sae = make(routing="random", random_per="batch")
    x = activations(3, 30).flatten(-2)
    layers = [sae.route(x, draw=draw).layer for draw in range(200)]
    assert all(len(layer.unique()) == 1 for layer in layers)
    counts = torch.stack([layer[0, 0] for layer in layers]).bincount(minlength=N_LAYERS).double()
    assert chi_square(counts) < 21.1  # 0.9999 quantile of chi2(3)


# --- Standardisation -------------------------------------------------------------------------------------


@few
@given(seed=seeds, scale=st.floats(0.01, 1000), shift=st.floats(-100, 100))
def test_standardize(seed, scale, shift):
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z, mean, std = standardize(x)
    torch.testing.assert_close(z.mean(-1), torch.zeros(5, 3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(-1), torch.ones(5, 3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(z * std + mean, x)
    torch.testing.assert_close(standardize(x * scale + shift).x, z, atol=1e-3, rtol=0)


def test_standardize_uses_the_unbiased_deviation_and_adds_eps_to_it():
    _, mean, std = standardize(torch.tensor([[0.0, 2.0]]))
    assert mean.item() == 1 and std.item() == pytest.approx(math.sqrt(2) + EPS)
    # eps counts where the deviation is of its size
    tiny = torch.tensor([[0.0, 2e-6]], dtype=torch.float64)
    assert standardize(tiny).x[0, 1].item() == pytest.approx(1e-6 / (math.sqrt(2) * 1e-6 + 1e-6))
    constant = standardize(torch.full((2, 8), 3.0))
    assert torch.equal(constant.x, torch.zeros(2, 8))
    assert EPS == 1e-6


def test_standardize_in_half_precision_computes_in_float32():
    x = (torch.randn(4, 64) * 3 + 40).bfloat16()
    z, mean, std = standardize(x)
    assert z.dtype == mean.dtype == std.dtype == torch.bfloat16
    assert torch.equal(z, standardize(x.float()).x.bfloat16())
