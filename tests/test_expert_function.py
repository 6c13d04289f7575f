"""Computing the selected experts only equals computing all of them: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routesae_lens.saes import expert_function
from routesae_lens.saes.expert_function import (
    choose_experts,
    expert_autoencode,
    expert_autoencode_dense,
    expert_encode,
    identity_rows,
    latent_weights,
    mean_rows,
    scaled_encoder,
)
from routesae_lens.saes.topk_function import topk_autoencode_dense, topk_decode

DTYPE = torch.float64
NAMES = ("x", "W_enc", "b_enc", "W_dec", "b_dec", "W_expert", "b_expert", "scale", "lowpass")


def tensors(n: int, d_in: int, n_experts: int, width: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d_sae = n_experts * width
    shapes = [(n, d_in), (d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,), (n_experts, d_in), (d_in,)]
    shapes += [(n_experts,), (d_in, d_sae)]
    return {
        name: torch.randn(*shape, generator=generator, dtype=DTYPE)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def run(
    function: Any,
    given: dict[str, Tensor],
    active: int,
    k: int,
    scaling: str,
    renormalized: bool,
    **options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """What ``function`` gives, and the gradient of every tensor that it depends on."""
    t = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    choice = choose_experts(t["x"], t["W_expert"], t["b_expert"], active, renormalized=renormalized)
    W_enc, n_experts = t["W_enc"], len(t["W_expert"])
    if scaling == "mean":
        options["scale"] = t["scale"]
    elif scaling == "learned":
        W_enc = scaled_encoder(W_enc, t["scale"], t["lowpass"])
    elif scaling == "identity":
        W_enc = scaled_encoder(W_enc, t["scale"], identity_rows(W_enc, n_experts))
    out = function(t["x"], W_enc, t["b_enc"], t["W_dec"], t["b_dec"], choice, k, **options)
    loss = (out.out.sin() * torch.arange(1.0, t["x"].shape[1] + 1)).sum()
    if out.dead_out is not None:
        loss = loss + 2 * out.dead_out.cos().sum()
    loss.backward()
    return out, {name: tensor.grad for name, tensor in t.items() if tensor.grad is not None}


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 9),
    d_in=st.integers(1, 7),
    n_experts=st.integers(1, 5),
    width=st.integers(1, 5),
    data=st.data(),
    scaling=st.sampled_from(["none", "mean", "identity", "learned"]),
    renormalized=st.booleans(),
    relu=st.booleans(),
    weighted=st.booleans(),
    subtract_b_dec=st.booleans(),
)
def test_equals_the_dense_form(
    n, d_in, n_experts, width, data, scaling, renormalized, relu, weighted, subtract_b_dec
):
    active = data.draw(st.integers(1, n_experts))
    k = data.draw(st.integers(1, active * width))
    given = tensors(n, d_in, n_experts, width, data.draw(st.integers(0, 10_000)))
    norm = given["W_dec"].norm(dim=-1) if weighted else None
    options = {"relu": relu, "norm": norm, "subtract_b_dec": subtract_b_dec}
    dead = sorted(data.draw(st.sets(st.integers(0, n_experts * width - 1))))
    if dead:
        options |= {"dead": torch.tensor(dead), "k_dead": data.draw(st.integers(1, len(dead)))}
    (fast, fast_grads), (dense, dense_grads) = (
        run(function, given, active, k, scaling, renormalized, **options)
        for function in (expert_autoencode, expert_autoencode_dense)
    )
    assert torch.equal(fast.indices, dense.indices)
    for name in ("out", "values", "dead_out"):
        torch.testing.assert_close(getattr(fast, name), getattr(dense, name))
    assert fast_grads.keys() == dense_grads.keys() >= {"W_enc", "W_dec", "W_expert"}
    for name, theirs in dense_grads.items():
        torch.testing.assert_close(
            fast_grads[name], theirs, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scaling", ["none", "mean"])
@pytest.mark.parametrize("active", [1, 2, 3])
def test_gradients_against_finite_differences(scaling: str, active: int):
    given = tensors(4, 3, 3, 4, 7)
    dead = {"dead": torch.tensor([1, 5, 6, 10]), "k_dead": 2}

    def function(*values: Tensor) -> Any:
        t = dict(zip(NAMES, values, strict=True))
        choice = choose_experts(t["x"], t["W_expert"], t["b_expert"], active)
        scale = t["scale"] if scaling == "mean" else None
        code = expert_autoencode(
            t["x"], t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], choice, 3, scale=scale, subtract_b_dec=True, **dead
        )  # fmt: skip
        return code.out, code.dead_out

    # (a step of 1e-6 changes no choice at this seed)
    inputs = tuple(tensor.requires_grad_() for tensor in given.values())
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6)


# --- By hand, and against TopK ---------------------------------------------------------------------------


def test_one_token_by_hand():
    """Three experts of two latents on the axes of the plane; two are active; the choice is among z, not p z."""
    x = torch.tensor([[3.0, 1.0]], dtype=DTYPE)
    W_enc = torch.tensor([[1.0, 0, 0.5, 9, 0, 1], [0, 1, 0, 9, 2, 1]], dtype=DTYPE)
    W_dec, zero = torch.eye(6, 2, dtype=DTYPE) + 1, torch.zeros(6, dtype=DTYPE)
    logits = torch.tensor([[0.0, -1], [0, -2], [1, -2]], dtype=DTYPE)  # of x: -1, -2, 1
    choice = choose_experts(x, logits, torch.zeros(2, dtype=DTYPE), 2)
    p = torch.tensor([-1.0, -2, 1], dtype=DTYPE).exp()
    p = p / p.sum()
    torch.testing.assert_close(choice.probs[0], p)
    assert choice.chosen.tolist() == [[0, 2]]  # so that the 36 of latent 3 is not seen
    # z of expert 0: 3, 1; of expert 2: 2, 4. The two largest are latents 5 (z = 4) and 0 (z = 3)
    code = expert_autoencode(x, W_enc, zero, W_dec, zero[:2], choice, 2)
    assert code.indices.tolist() == [[0, 5]]
    torch.testing.assert_close(code.values[0], torch.stack([3 * p[0], 4 * p[2]]))
    torch.testing.assert_close(code.out[0], 3 * p[0] * W_dec[0] + 4 * p[2] * W_dec[5])
    weights = choose_experts(x, logits, torch.zeros(2, dtype=DTYPE), 2, renormalized=True).weights[0]
    expected = torch.softmax(torch.stack([p[0], p[2]]), 0)
    torch.testing.assert_close(weights, torch.stack([expected[0], 0 * p[1], expected[1]]))


def test_scaling_by_hand():
    W_enc = torch.tensor([[1.0, 3, 10, 20], [0, 2, 5, 5]], dtype=DTYPE)
    scale = torch.tensor([1.0, -0.5], dtype=DTYPE)
    torch.testing.assert_close(mean_rows(W_enc, 2), torch.tensor([[2.0, 15], [1, 5]], dtype=DTYPE))
    expected = torch.tensor([[0.0, 4, 12.5, 17.5], [-1, 3, 5, 5]], dtype=DTYPE)
    torch.testing.assert_close(scaled_encoder(W_enc, scale), expected)
    identity = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]], dtype=DTYPE)
    torch.testing.assert_close(identity_rows(W_enc, 2), identity)
    torch.testing.assert_close(
        scaled_encoder(W_enc, scale, identity),
        torch.tensor([[1.0, 6, 5.5, 10], [0, 3, 2.5, 3]], dtype=DTYPE),
    )


@pytest.mark.parametrize("n_experts", [1, 4])
def test_all_experts_with_weight_one_are_topk(n_experts: int):
    t = tensors(20, 5, n_experts, 12 // n_experts, 0)
    weights = (t["x"], t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"])
    choice = choose_experts(t["x"], t["W_expert"], t["b_expert"], n_experts)
    choice = choice._replace(weights=torch.ones_like(choice.weights))
    dead = {"dead": torch.tensor([0, 3, 7]), "k_dead": 2}
    norm = t["W_dec"].norm(dim=-1)
    ours = expert_autoencode(*weights, choice, 4, norm=norm, **dead)
    theirs = topk_autoencode_dense(*weights, 4, norm=norm, **dead)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_many_rows_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch):
    t = tensors(100, 5, 4, 3, 3)
    dead = {"dead": torch.tensor([0, 3, 7]), "k_dead": 2}
    whole, whole_grads = run(expert_autoencode, t, 2, 3, "mean", False, **dead)
    monkeypatch.setattr(expert_function, "ROWS_AT_ONCE", {"cpu": 8})
    parts, part_grads = run(expert_autoencode, t, 2, 3, "mean", False, **dead)
    for one, other in zip((*whole, *whole_grads.values()), (*parts, *part_grads.values()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_encoding_without_gradients(scaled: bool, relu: bool):
    t = tensors(30, 5, 4, 3, 1)
    choice = choose_experts(t["x"], t["W_expert"], t["b_expert"], 2)
    scale = t["scale"] if scaled else None
    norm = t["W_dec"].norm(dim=-1)
    code = expert_encode(t["x"], t["W_enc"], t["b_enc"], choice, 3, scale=scale, relu=relu, norm=norm)
    dense = expert_autoencode_dense(
        t["x"], t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], choice, 3, scale=scale, relu=relu, norm=norm
    )  # fmt: skip
    assert torch.equal(code.indices, dense.indices) and (relu or (code.values < 0).any())
    torch.testing.assert_close(code.values, dense.values)
    torch.testing.assert_close(topk_decode(code, t["W_dec"], t["b_dec"]), dense.out)


def test_experts_that_were_not_selected_are_not_touched():
    """NaN in their weights reaches nothing: they are not computed, forward or backward."""
    t = tensors(30, 5, 4, 3, 1)
    choice = choose_experts(t["x"], t["W_expert"], t["b_expert"], 2)
    choice = choice._replace(chosen=torch.tensor([[0, 2]]).expand(30, -1))
    choice = choice._replace(weights=choice.probs * torch.tensor([1.0, 0, 1, 0], dtype=DTYPE))
    t["W_enc"].view(5, 4, 3)[:, [1, 3]] = torch.nan
    t["b_enc"].view(4, 3)[[1, 3]] = torch.nan
    t["W_dec"].view(4, 3, 5)[[1, 3]] = torch.nan
    W_enc, W_dec = t["W_enc"].requires_grad_(), t["W_dec"].requires_grad_()
    code = expert_autoencode(t["x"], W_enc, t["b_enc"], W_dec, t["b_dec"], choice, 4)
    code.out.sum().backward()
    assert torch.isfinite(code.out).all() and W_enc.grad is not None and W_dec.grad is not None
    assert torch.isfinite(W_enc.grad).all() and torch.isfinite(W_dec.grad).all()
    assert not W_enc.grad.view(5, 4, 3)[:, [1, 3]].any() and W_enc.grad.view(5, 4, 3)[:, [0, 2]].any()
    assert latent_weights(choice, 12).view(30, 4, 3)[:, 1].eq(0).all()


def test_the_product_under_autocast():
    t = {name: tensor.float() for name, tensor in tensors(50, 16, 4, 6, 0).items()}
    results = []
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(run(expert_autoencode, t, 2, 3, "mean", False))
    (narrow, narrow_grads), (exact, exact_grads) = results
    assert narrow.out.dtype == torch.float32 and not torch.equal(narrow.out, exact.out)
    for name, grad in exact_grads.items():
        assert narrow_grads[name].dtype == torch.float32
        assert (narrow_grads[name] - grad).norm() < 0.3 * grad.norm(), name
