"""The layers of a stack on demand: equal to all of them at once, and never held where they are not needed."""

from __future__ import annotations

import gc

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from routesae_lens.saes import layers as module
from routesae_lens.saes import stack as stacks
from routesae_lens.saes.architectures import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from routesae_lens.saes.crosscoder import CrosscoderTopKTrainingSAE, CrosscoderTopKTrainingSAEConfig
from routesae_lens.saes.layers import Layers, standardize

N, L, D = 37, 4, 12


def raw(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(N, L, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x * torch.tensor([1.0, 30.0, 0.1, 5.0])[:, None] + 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 5 * L * D, 10**6])
def test_what_is_read_equals_all_layers_standardised_bit_for_bit(monkeypatch, dtype, at_once):
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", at_once)
    x, choice = raw(dtype), torch.arange(N) % L
    whole = standardize(x).x
    by_hand = (x.double() - x.double().mean(-1, keepdim=True)) / (x.double().std(-1, keepdim=True) + 1e-6)
    loose = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(whole.double(), by_hand, rtol=loose, atol=loose)
    layers = Layers(x, standardized=True)
    assert torch.equal(layers.read(choice), whole[torch.arange(N), choice])
    assert torch.equal(layers.layer(2), whole[:, 2])
    assert torch.equal(layers.total, whole.sum(1))
    assert torch.equal(layers[3:9].total, whole[3:9].sum(1))
    assert layers._x is None
    assert torch.equal(layers.x, whole)
    assert torch.equal(layers.read(choice), whole[torch.arange(N), choice])


def test_layers_read_as_they_are():
    x = raw()
    layers = Layers.of(x)
    assert layers.x is x
    assert torch.equal(layers.total, x.sum(1))
    assert torch.equal(layers.read(torch.full((N,), 3)), x[:, 3])
    assert Layers.of(layers) is layers


def test_gradients_flow_through_all_of_it():
    x, choice = raw(torch.float64).requires_grad_(), torch.arange(N) % L
    weights = torch.randn(3, N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(layers: Layers) -> torch.Tensor:
        parts = (layers.total, layers.read(choice), layers.layer(1))
        return sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))

    (given,) = torch.autograd.grad(loss(Layers(x, standardized=True)), x)
    whole = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    (expected,) = torch.autograd.grad(loss(Layers.of(whole)), x)
    torch.testing.assert_close(given, expected)


def sae(**kwargs) -> RouteTopKTrainingSAE:
    torch.manual_seed(0)
    return RouteTopKTrainingSAE(
        RouteTopKTrainingSAEConfig(d_in=L * D, d_sae=32, k=3, layers=[0, 1, 2, 3], **kwargs)
    )


def crosscoder() -> CrosscoderTopKTrainingSAE:
    torch.manual_seed(0)
    return CrosscoderTopKTrainingSAE(
        CrosscoderTopKTrainingSAEConfig(d_in=L * D, d_sae=32, k=3, layers=[0, 1, 2, 3])
    )


@pytest.mark.parametrize(
    "routing, held", [("hard", False), ("random", False), ("distilled", False), ("soft", True)]
)
def test_a_step_holds_the_standardised_layers_only_for_mixtures(routing, held):
    batch = raw().flatten(1)
    dead = torch.zeros(32, dtype=torch.bool)
    output = sae(routing=routing).training_forward_pass(TrainStepInput(batch, {}, dead, 0, False))
    output.loss.backward()
    assert stacks._memo.known is not None
    assert (stacks._memo.known.layers._x is not None) == held


def test_saes_share_the_layers_of_one_stack_for_as_long_as_it_lives_unchanged():
    batch, one, two = raw().flatten(1), sae(), sae(routing="random")
    first = one.layers_of(batch)
    assert two.layers_of(batch) is first
    batch[0, 0] += 1
    second = one.layers_of(batch)
    assert second is not first
    assert torch.equal(second.x, standardize(batch.view(N, L, D)).x)
    assert one.layers_of(batch.clone()) is not second
    with torch.inference_mode():
        assert one.layers_of(batch) is not one.layers_of(batch)
    one.layers_of(batch)
    del batch
    gc.collect()
    assert stacks._memo.known is None


def zero_first(x: torch.Tensor, hook: object = None) -> torch.Tensor:
    x[..., 0] = 0
    return x


@pytest.mark.parametrize("crosscoded", [True, False])
def test_what_a_hook_edits_in_place_is_not_read_again(crosscoded):
    batch = raw().flatten(1)
    one = crosscoder() if crosscoded else sae(routing="every")
    clean = one.encode(batch)
    with torch.no_grad(), one.hooks(fwd_hooks=[("hook_sae_input", zero_first)]):
        assert not torch.equal(one.encode(batch), clean)
    assert torch.equal(one.encode(batch), clean)


@pytest.mark.parametrize("standardized", [True, False])
def test_edits_of_what_the_layers_give_out_are_noticed(standardized):
    batch = raw().flatten(1)
    for name in ("x", "total"):
        layers = stacks.layers_once(
            batch.bfloat16() if name == "x" else batch, torch.float32, L, standardized
        )
        assert not layers.edited
        getattr(layers, name).mul_(2)
        assert layers.edited
    again = stacks.layers_once(batch, torch.float32, L, standardized)
    assert again is not layers
    assert torch.equal(again.total, Layers(batch.view(N, L, D), standardized=standardized).total)


def test_layers_made_in_inference_mode_are_not_trained_on():
    batch, one = raw().flatten(1), sae(routing="soft")
    layers = one.layers_of(batch)
    with torch.inference_mode():
        layers.x  # noqa: B018
    dead = torch.zeros(32, dtype=torch.bool)
    one.training_forward_pass(TrainStepInput(batch, {}, dead, 0, False)).loss.backward()
    assert one.W_router.grad is not None


def test_one_number_cannot_be_standardised():
    with pytest.raises(ValueError, match="d_model of 2 or more, got 1"):
        RouteTopKTrainingSAEConfig(d_in=L, d_sae=32, k=3, layers=[0, 1, 2, 3])
    RouteTopKTrainingSAEConfig(d_in=L, d_sae=32, k=3, layers=[0, 1, 2, 3], standardize=False)
