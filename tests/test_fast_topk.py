"""The sparse TopK step equals the dense one: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainStepInput

from routesae_lens.saes.architectures import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from routesae_lens.saes.fast_topk import FastTopK, topk_autoencode, topk_autoencode_dense


def parameters(d_in, d_sae, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,)]
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    d_in=st.integers(1, 7),
    d_sae=st.integers(1, 13),
    data=st.data(),
    relu=st.booleans(),
    weight_by_norm=st.booleans(),
    subtract_b_dec=st.booleans(),
)
def test_equals_the_dense_form(n, d_in, d_sae, data, relu, weight_by_norm, subtract_b_dec):
    k = data.draw(st.integers(1, d_sae))
    seed = data.draw(st.integers(0, 10_000))
    options = {"relu": relu, "weight_by_norm": weight_by_norm, "subtract_b_dec": subtract_b_dec}
    results = []
    for function in (topk_autoencode, topk_autoencode_dense):
        weights = parameters(d_in, d_sae, seed)
        x = torch.randn(
            n, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
        ).requires_grad_()
        code = function(x, *weights, k, **options)
        (code.out.sin() * torch.arange(1.0, d_in + 1)).sum().backward()
        results.append((code, [tensor.grad for tensor in (x, *weights)]))
    (fast, fast_grads), (dense, dense_grads) = results
    torch.testing.assert_close(fast.out, dense.out)
    assert torch.equal(fast.indices, dense.indices)
    torch.testing.assert_close(fast.values, dense.values)
    for ours, theirs in zip(fast_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class _Dense(RouteTopKTrainingSAE):
    def _fast(self, step_input):
        return False


@pytest.mark.parametrize("routing", ["hard", "straight_through", "random"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
def test_a_training_step_equals_saelens_own(routing, rescale, loss):
    cfg = RouteTopKTrainingSAEConfig(
        d_in=24, d_sae=32, k=3, layers=[1, 2, 4], routing=routing, loss=loss,
        rescale_acts_by_decoder_norm=rescale, aux_loss_coefficient=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    fast = RouteTopKTrainingSAE(cfg)
    dense = _Dense(cfg)
    dense.load_state_dict(fast.state_dict())
    step_input = TrainStepInput(torch.randn(20, 24), {}, None, 0, False)
    outputs = []
    for sae in (fast, dense):
        output = sae.training_forward_pass(step_input)
        output.loss.backward()
        outputs.append(output)
    assert outputs[0].feature_acts.is_sparse  # the fast path was taken
    torch.testing.assert_close(outputs[0].feature_acts.to_dense(), outputs[1].feature_acts.detach())
    for name in ("sae_in", "sae_out", "loss"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name))
    for (name, ours), theirs in zip(fast.named_parameters(), dense.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_it_steps_aside():
    cfg = RouteTopKTrainingSAEConfig(d_in=16, d_sae=8, k=2, layers=[0, 1], aux_loss_coefficient=1.0)
    sae = RouteTopKTrainingSAE(cfg)
    assert isinstance(sae, FastTopK)
    x = torch.randn(4, 8)
    alive, dead = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    assert sae._fast(TrainStepInput(x, {}, None, 0, False))
    assert sae._fast(TrainStepInput(x, {}, alive, 0, False))
    assert not sae._fast(TrainStepInput(x, {}, dead, 0, False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not sae._fast(TrainStepInput(x, {}, None, 0, False))
    handle = sae.hook_sae_acts_post.register_forward_hook(lambda *_: None)
    assert not sae._fast(TrainStepInput(x, {}, None, 0, False))
    handle.remove()
    assert not sae.to(torch.bfloat16)._fast(TrainStepInput(x, {}, None, 0, False))
