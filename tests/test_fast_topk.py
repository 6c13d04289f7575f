"""The sparse TopK step equals the dense one: values and gradients; so do encoding and decoding."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

from routesae_lens.saes import fast_topk
from routesae_lens.saes.architectures import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from routesae_lens.saes.crosscoder import CrosscoderTopKTrainingSAE, CrosscoderTopKTrainingSAEConfig
from routesae_lens.saes.fast_topk import FastTopK, decode_topk, encode_topk, is_fast
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.sparse_products import ByLatent, _at_gathered, at
from routesae_lens.saes.topk_function import GROUP, largest, topk_autoencode, topk_autoencode_dense
from routesae_lens.splice.layer_view import layer_view


def parameters(d_in, d_sae, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,)]
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def norms(d_sae):
    return 0.5 + torch.rand(d_sae, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    d_in=st.integers(1, 7),
    d_sae=st.integers(1, 13),
    data=st.data(),
    relu=st.booleans(),
    weighted=st.booleans(),
    subtract_b_dec=st.booleans(),
)
def test_equals_the_dense_form(n, d_in, d_sae, data, relu, weighted, subtract_b_dec):
    k = data.draw(st.integers(1, d_sae))
    seed = data.draw(st.integers(0, 10_000))
    options = {"relu": relu, "norm": norms(d_sae) if weighted else None, "subtract_b_dec": subtract_b_dec}
    dead = sorted(data.draw(st.sets(st.integers(0, d_sae - 1))))
    if dead:
        options |= {"dead": torch.tensor(dead), "k_dead": data.draw(st.integers(1, len(dead)))}
    results = []
    for function in (topk_autoencode, topk_autoencode_dense):
        weights = parameters(d_in, d_sae, seed)
        x = torch.randn(
            n, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
        ).requires_grad_()
        code = function(x, *weights, k, **options)
        loss = (code.out.sin() * torch.arange(1.0, d_in + 1)).sum()
        if dead:
            loss = loss + code.dead_out.cos().sum()
        loss.backward()
        results.append((code, [tensor.grad for tensor in (x, *weights)]))
    (fast, fast_grads), (dense, dense_grads) = results
    torch.testing.assert_close(fast.out, dense.out)
    torch.testing.assert_close(fast.dead_out, dense.dead_out)
    assert torch.equal(fast.indices, dense.indices)
    torch.testing.assert_close(fast.values, dense.values)
    for ours, theirs in zip(fast_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("dead", [None, [0, 3, 7]])
def test_the_gradient_of_a_scale_equals_the_one_through_the_input(relu, weighted, subtract_b_dec, dead):
    options = {"relu": relu, "norm": norms(12) if weighted else None, "subtract_b_dec": subtract_b_dec}
    options |= {"dead": torch.tensor(dead), "k_dead": 2} if dead else {}
    constant = torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    results = []
    for through_scale in (True, False):
        weights = parameters(5, 12, 1)
        scale = torch.tensor([0.1, 0.5, -0.7, 1.0, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
        x = scale[:, None] * constant
        code = topk_autoencode(x, *weights, 4, **options, scale=scale if through_scale else None)
        loss = code.out.sin().sum() + (code.dead_out.cos().sum() if dead else 0)
        loss.backward()
        results.append([tensor.grad for tensor in (scale, *weights)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert ours.abs().max() > 1e-3


def test_many_rows_are_encoded_in_parts():
    weights = parameters(5, 12, 0)
    x = torch.randn(600, 5, dtype=torch.float64)
    dead = {"dead": torch.tensor([0, 3, 7]), "k_dead": 2}
    fast, dense = (f(x, *weights, 4, **dead) for f in (topk_autoencode, topk_autoencode_dense))
    for ours, theirs in zip(fast, dense, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ties", [False, True])
def test_wide_rows_are_searched_in_groups(ties):
    pre = torch.randn(50, 40 * GROUP, generator=torch.Generator().manual_seed(0))
    pre = pre.mul(3).round() if ties else pre
    pre[3] = -torch.inf
    found = largest(pre, 10)
    assert all(len(set(row)) == 10 for row in found.tolist())
    assert torch.equal(pre.gather(1, found).sort(descending=True).values, pre.topk(10).values)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("d", [256, 300])  # (rows a power of two apart are laid out anew)
def test_products_by_latent_in_parts(d, transposed):
    d_sae, generator = 2**18 // d * 2 + 7, torch.Generator().manual_seed(0)
    x, weights = (torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (d, 6))
    indices = torch.rand(9, d_sae, generator=generator).topk(6).indices.sort().values
    indices[:, -1] = d_sae - 1
    expected = torch.zeros(9, d_sae, dtype=torch.float64).scatter(1, indices, weights).T @ x
    product = ByLatent(indices, d_sae).product(weights, x, transposed=transposed)
    torch.testing.assert_close(product, expected.T if transposed else expected)
    assert product.is_contiguous()


def test_the_sampled_product_by_gathering():
    x, W_dec = torch.randn(20, 6), torch.randn(11, 6)
    indices = torch.rand(20, 11).topk(4).indices.sort().values
    expected = (x @ W_dec.T).gather(1, indices)
    torch.testing.assert_close(at(x, W_dec, indices), expected)
    torch.testing.assert_close(_at_gathered(x, W_dec, indices, elements=100), expected)  # 4 rows at a time


# --- The training step ------------------------------------------------------------------------------------


def route_sae(**options):
    torch.manual_seed(0)
    options = {"d_in": 24, "d_sae": 32, "k": 3, "layers": [1, 2, 4], "dtype": "float64", **options}
    return RouteTopKTrainingSAE(RouteTopKTrainingSAEConfig(**options))


def crosscoder(**options):
    torch.manual_seed(0)
    options.pop("routing")
    options = {"d_in": 12, "d_sae": 32, "k": 3, "layers": [1, 2, 4], "dtype": "float64", **options}
    return CrosscoderTopKTrainingSAE(CrosscoderTopKTrainingSAEConfig(**options))


def both_steps(sae, step_input, monkeypatch, autocast=False):
    """The outputs and gradients of the fast step and of SAELens' own."""
    results = []
    for fast in (True, False):
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if not fast:
                patch.setattr(fast_topk, "is_fast", lambda sae: False)
            output = sae.training_forward_pass(step_input)
        assert output.feature_acts.is_sparse == fast
        sae.zero_grad()
        output.loss.backward()
        grads = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
        results.append((output, grads))
    return results


CASES = [(route_sae, routing) for routing in ("hard", "straight_through", "random", "soft")]


@pytest.mark.parametrize(("make", "routing"), [*CASES, (crosscoder, None)])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
@pytest.mark.parametrize("n_dead", [0, 2, 5, 20, 32])  # 4 are revived (RouteSAE), 6 (Crosscoder)
def test_a_training_step_equals_saelens_own(make, routing, rescale, loss, n_dead, monkeypatch):
    sae = make(routing=routing, rescale_acts_by_decoder_norm=rescale, loss=loss, aux_loss_coefficient=0.7)
    with torch.no_grad():  # biases and norms that matter
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dead = torch.zeros(32, dtype=torch.bool)
    dead[torch.randperm(32)[:n_dead]] = True
    x = torch.randn(20, sae.cfg.d_in, dtype=torch.float64)
    (fast, fast_grads), (dense, dense_grads) = both_steps(
        sae, TrainStepInput(x, {}, dead, 0, False), monkeypatch
    )
    torch.testing.assert_close(fast.feature_acts.to_dense(), dense.feature_acts.detach())
    assert (n_dead > 0) == (fast.losses["auxiliary_reconstruction_loss"].item() > 0)
    torch.testing.assert_close(fast.losses, dense.losses)
    for name in ("sae_in", "sae_out", "loss"):
        torch.testing.assert_close(getattr(fast, name), getattr(dense, name))
    assert fast_grads.keys() == dense_grads.keys()
    for name, theirs in dense_grads.items():
        torch.testing.assert_close(fast_grads[name], theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_without_a_coefficient_nothing_is_revived():
    sae = route_sae(aux_loss_coefficient=0.0)
    dead = torch.ones(32, dtype=torch.bool)
    output = sae.training_forward_pass(
        TrainStepInput(torch.randn(4, 24, dtype=torch.float64), {}, dead, 0, False)
    )
    assert output.feature_acts.is_sparse and list(output.losses) == ["mse_loss"]


def test_the_step_under_autocast(monkeypatch):
    sae = route_sae(dtype="float32", aux_loss_coefficient=1.0)
    dead = torch.arange(32) % 3 == 0
    x = torch.randn(50, 24)
    step = TrainStepInput(x, {}, dead, 0, False)
    (fast, fast_grads), (dense, dense_grads) = both_steps(sae, step, monkeypatch, autocast=True)
    _, (_, exact_grads) = both_steps(sae, step, monkeypatch)
    pre = torch.get_autocast_dtype("cpu")
    assert pre == torch.bfloat16
    assert fast.loss.item() == pytest.approx(dense.loss.item(), rel=0.02)
    assert not torch.equal(fast_grads["W_enc"], exact_grads["W_enc"])  # autocast did something
    for name, exact in exact_grads.items():
        ours, theirs = ((g[name] - exact).norm() / exact.norm() for g in (fast_grads, dense_grads))
        assert ours < 1.3 * theirs + 0.01, name


def test_where_it_steps_aside():
    sae = route_sae(dtype="float32")
    assert isinstance(sae, FastTopK) and is_fast(sae)
    handle = sae.hook_sae_acts_post.register_forward_hook(lambda *_: None)
    assert not is_fast(sae)
    handle.remove()
    assert is_fast(sae)
    assert not is_fast(route_sae(dtype="bfloat16"))
    assert not is_fast(route_sae(dtype="float32", device="meta"))
    compiled = torch.compile(lambda x: x + is_fast(sae), backend="eager")
    assert compiled(torch.zeros(())).item() == 0 and is_fast(sae)


def test_gradients_of_gradients_are_refused():
    weights = parameters(5, 12, 0)
    out = topk_autoencode(torch.randn(4, 5, dtype=torch.float64), *weights, 3).out
    (grad,) = torch.autograd.grad(out.pow(2).sum(), weights[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- Encoding and decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoding_and_decoding_equal_the_dense_ones(relu, rescale, training):
    sae = route_sae(relu=relu, rescale_acts_by_decoder_norm=rescale)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    sae = sae if training else inference_form(sae)
    x = torch.randn(20, 8, dtype=torch.float64)
    code = encode_topk(sae, x)
    acts = sae.encode_routed(x)
    dense = torch.zeros_like(acts).scatter(1, code.indices, code.values)
    torch.testing.assert_close(dense, acts)
    torch.testing.assert_close(decode_topk(sae, code), sae.decode(acts))
    with torch.no_grad():
        torch.testing.assert_close(sae.autoencode_routed(x[None]), sae.decode(acts)[None])


def test_saelens_own_topk_can_be_encoded_too():
    sae = TopKSAE(TopKSAEConfig(d_in=8, d_sae=32, k=3))
    x = torch.randn(20, 8)
    code = encode_topk(sae, x)
    torch.testing.assert_close(sae.encode(x).gather(1, code.indices), code.values)
    assert is_fast(sae)
    assert not is_fast(TopKSAE(replace(sae.cfg, normalize_activations="layer_norm")))
    assert issubclass(RouteTopKTrainingSAE, TopKTrainingSAE)


def test_a_layers_view_keeps_negative_latents():
    sae = inference_form(route_sae(relu=False, dtype="float32"))
    torch.nn.init.constant_(sae.b_enc, -10.0)
    view = layer_view(sae, "blocks.2.hook_resid_post")
    x = torch.randn(20, 8)
    assert is_fast(view) and (view.encode(x) < 0).any()
    code = encode_topk(view, x)
    torch.testing.assert_close(view.encode(x), torch.zeros(20, 32).scatter(1, code.indices, code.values))


@pytest.mark.parametrize(("architecture", "stacked"), [("abstopk", False), ("route_batchtopk", True)])
def test_subclasses_of_topk_that_choose_otherwise_are_not_fast(architecture, stacked):
    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(
        config_class(d_in=24, d_sae=32, k=2.0 if stacked else 2, **({"layers": [1, 2, 4]} if stacked else {}))
    )
    assert isinstance(sae, TopKTrainingSAE) and not is_fast(sae)
    if stacked:  # what the oracle asks
        x = torch.randn(20, 8)
        with torch.no_grad():
            torch.testing.assert_close(sae.autoencode_routed(x), sae.decode(sae.encode_routed(x)))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_triton_kernels_in_its_interpreter():
    check = "from routesae_lens.saes import topk_triton as t; import torch; t.check(torch.device('cpu'))"
    subprocess.run([sys.executable, "-c", check], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
