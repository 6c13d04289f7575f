"""Losses of RouteSAE: on one scale, equal to formulas written by hand, with the gradients they should have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from routed_saes import ARCHITECTURES, D_MODEL, LAYERS, make, stacks, step, zero_biases
from torch import Tensor

from routesae_lens.saes.router import ROUTINGS

DEAD = [0, 3, 7, 8, 13, 20]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "topk, sparse": ("topk", {"use_sparse_activations": True}),
    "topk, decoder norms do not count": ("topk", {"rescale_acts_by_decoder_norm": False}),
    "topk, no ReLU": ("topk", {"relu": False}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka_batchtopk", {}),
    "matryoshka, auxiliary loss by level": ("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}),
    "gated": ("gated", {}),
    "standard": ("standard", {}),
    "standard, p = 0.5": ("standard", {"lp_norm": 0.5}),
}
every_variant = pytest.mark.parametrize("architecture, kwargs", VARIANTS.values(), ids=VARIANTS.keys())


# --- The reconstruction loss -------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - {"distilled", "every"}))  # test_distillation.py
def test_reconstruction_losses_by_hand(architecture, routing):
    for loss in ("normalized_mse", "mse"):
        sae = make(architecture, routing=routing, loss=loss)
        out = step(sae, stacks(9))
        terms = []
        for x, x_hat in zip(out.sae_in, out.sae_out, strict=True):
            squared = sum(float(a - b) ** 2 for a, b in zip(x_hat.tolist(), x.tolist(), strict=True))
            terms.append(
                squared / (sum(float(a) ** 2 for a in x.tolist()) if loss == "normalized_mse" else 1)
            )
        assert out.losses["mse_loss"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
        assert torch.equal(out.sae_in, sae.route(stacks(9)).input)
        if out.feature_acts.shape[0] == 9 and "batchtopk" not in architecture:
            torch.testing.assert_close(out.sae_out, sae(stacks(9)))


def test_normalised_is_the_default():
    assert make("topk").cfg.loss == "normalized_mse"


def test_inner_losses_of_matryoshka_are_normalised_too():
    sae = make("matryoshka_batchtopk")
    out = step(sae, stacks(9))
    acts = out.feature_acts / sae.W_dec.norm(dim=-1)
    for width in (6, 12):
        inner = acts[:, :width] @ sae.W_dec[:width] + sae.b_dec
        expected = ((inner - out.sae_in).pow(2).sum(-1) / out.sae_in.pow(2).sum(-1)).mean()
        torch.testing.assert_close(out.losses[f"inner_mse_loss_{width}"], expected)
    total = sum(out.losses.values())
    torch.testing.assert_close(out.loss, total)


def test_a_token_without_activation_does_no_harm():
    sae = make("topk")
    x = stacks(9)
    x[4] = 1.0  # constant: standardises to zero
    out = step(sae, x, DEAD)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


# --- Scale -------------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("scale", [0.02, 30.0])
def test_the_scale_of_the_input_leaves_normalised_losses_unchanged(architecture, kwargs, scale):
    sae = zero_biases(make(architecture, standardize=False, routing="fixed", **kwargs))
    one, other = step(sae, stacks(9), DEAD), step(sae, scale * stacks(9), DEAD)
    assert one.losses.keys() == other.losses.keys()
    for name in one.losses:
        torch.testing.assert_close(other.losses[name], one.losses[name], rtol=1e-4, atol=1e-6)
    if "standard" not in architecture:
        assert one.losses["auxiliary_reconstruction_loss"] > 1e-3
    # ... which the plain losses do not do
    plain = make(architecture, standardize=False, routing="fixed", loss="mse", **kwargs)
    plain.load_state_dict(sae.state_dict())
    for name in one.losses:
        before, after = (
            step(plain, stacks(9), DEAD).losses[name],
            step(plain, scale * stacks(9), DEAD).losses[name],
        )
        power = 1 if name == "l1_loss" else 2
        torch.testing.assert_close(after, before * scale**power, rtol=1e-3, atol=1e-6)


@every_variant
@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_shrinking_p_is_not_rewarded(architecture, kwargs, routing):
    """The normalised losses have no gradient along the scale of what the shared SAE reads."""
    sae = zero_biases(make(architecture, routing=routing, **kwargs))
    seen: list[Tensor] = []

    def scaled(x: Tensor) -> Tensor:
        seen.append(torch.ones(len(x), 1, requires_grad=True))
        return x * seen[0]

    route = sae.route

    def route_scaled(*args, **kwargs):
        out = route(*args, **kwargs)
        read = scaled(out.input.detach())
        return out._replace(input=read, scale=out.scale.detach() * seen[0][:, 0])

    sae.route = route_scaled
    out = step(sae, stacks(9), DEAD)
    for name, loss in out.losses.items():
        (gradient,) = torch.autograd.grad(loss, seen[0], retain_graph=True, allow_unused=True)
        if gradient is not None:
            assert gradient.abs().max() < 1e-5, name


def test_plain_mse_does_reward_shrinking_p():
    sae = zero_biases(make("topk", loss="mse"))
    route = sae.route(stacks(9))
    loss = step(sae, stacks(9)).loss
    assert torch.autograd.grad(loss, sae.W_router)[0].abs().max() > 1e-3 and route.scale.max() < 1


# --- Auxiliary losses by hand ----------------------------------------------------------------------------------


def by_token(values: list[float]) -> float:
    return sum(values) / len(values)


def revive(sae: Any, pre: Tensor, residual: Tensor, latents: list[int], k: int) -> Tensor:
    """Squared error with which the k strongest dead latents explain one token's residual."""
    strongest = sorted(latents, key=lambda i: -float(pre[i]))[:k]
    explained = torch.zeros(D_MODEL)
    for i in strongest:
        norm = float(sae.W_dec[i].norm()) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
        explained = explained + pre[i] / norm * sae.W_dec[i]
    return (explained - residual).pow(2).sum()


@pytest.mark.parametrize("dead", [DEAD, DEAD[:2], []], ids=len)
@pytest.mark.parametrize("name", [name for name in VARIANTS if "topk" in name or name == "matryoshka"])
@torch.no_grad()
def test_topk_auxiliary_loss(name, dead):
    architecture, kwargs = VARIANTS[name]
    sae = make(architecture, aux_loss_coefficient=0.7, **kwargs)
    out = step(sae, stacks(9), dead)
    k = min(D_MODEL // 2, len(dead))
    hidden_pre = sae.encode_with_hidden_pre(out.sae_in)[1]
    terms = [
        float(revive(sae, pre, x - x_hat, dead, k) / x.pow(2).sum())
        for x, x_hat, pre in zip(out.sae_in, out.sae_out, hidden_pre, strict=True)
    ]
    expected = 0.7 * min(len(dead) / (D_MODEL // 2), 1.0) * by_token(terms) if dead else 0.0
    assert out.losses["auxiliary_reconstruction_loss"].item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_matryoshka_auxiliary_loss_by_level():
    sae = make("matryoshka_batchtopk", use_matryoshka_aux_loss=True, aux_loss_coefficient=0.7)
    out = step(sae, stacks(9), DEAD)
    total, start = 0.0, 0
    for width in (6, 12, 24):
        dead = [i for i in DEAD if start <= i < width]
        acts = out.feature_acts[:, :width] / sae.W_dec[:width].norm(dim=-1)
        partial = acts @ sae.W_dec[:width] + sae.b_dec
        terms = [
            float(revive(sae, pre, x - x_hat, dead, min(len(dead), D_MODEL // 2)) / x.pow(2).sum())
            for x, x_hat, pre in zip(out.sae_in, partial, out.hidden_pre, strict=True)
        ]
        total += min(len(dead) / (D_MODEL // 2), 1.0) * by_token(terms)
        start = width
    assert out.losses["auxiliary_reconstruction_loss"].item() == pytest.approx(0.7 * total, rel=1e-4)
    assert sae._aux_norm is None


@torch.no_grad()
def test_gated_auxiliary_losses():
    for apply_b_dec_to_input in (True, False):
        sae = make("gated", apply_b_dec_to_input=apply_b_dec_to_input)
        out = step(sae, stacks(9))
        l1, error = [], []
        for x in out.sae_in:
            centred = x - sae.b_dec if apply_b_dec_to_input else x
            gate = [max(float(centred @ sae.W_enc[:, i] + sae.b_gate[i]), 0.0) for i in range(24)]
            l1.append(sum(g * float(sae.W_dec[i].norm()) for i, g in enumerate(gate)) / float(x.norm()))
            error.append(
                float((torch.tensor(gate) @ sae.W_dec + sae.b_dec - x).pow(2).sum() / x.pow(2).sum())
            )
        assert out.losses["l1_loss"].item() == pytest.approx(0.3 * by_token(l1), rel=1e-4)
        assert out.losses["auxiliary_reconstruction_loss"].item() == pytest.approx(by_token(error), rel=1e-4)


@pytest.mark.parametrize("p", [1.0, 0.5, 2.0])
@torch.no_grad()
def test_standard_sparsity_loss(p):
    sae = make("standard", lp_norm=p)
    out = step(sae, stacks(9))
    terms = []
    for x, acts in zip(out.sae_in, out.feature_acts, strict=True):
        weighted = [float(a * sae.W_dec[i].norm()) for i, a in enumerate(acts)]
        terms.append(sum(w**p for w in weighted) ** (1 / p) / float(x.norm()))
    assert out.losses["l1_loss"].item() == pytest.approx(0.3 * by_token(terms), rel=1e-4)


@torch.no_grad()
def test_l0_counts_latents_whatever_the_loss():
    losses = []
    for loss in ("normalized_mse", "mse"):
        sae = make("jumprelu", loss=loss)
        out = step(sae, stacks(9))
        count = (out.hidden_pre > sae.threshold).float().sum(-1).mean()
        torch.testing.assert_close(out.losses["l0_loss"], 0.2 * count)
        losses.append(out.losses["l0_loss"])
    assert torch.equal(*losses) and count > 1


# --- Straight-through ----------------------------------------------------------------------------------------


@every_architecture
def test_the_straight_through_target_is_detached(architecture):
    """The router's gradient is the one of ||x_hat(x (1 + p - sg p)) - sg(x)||^2 / sg(||x||^2)."""
    sae = make(architecture, routing="straight_through")
    loss = step(sae, stacks(9)).losses["mse_loss"]
    (got,) = torch.autograd.grad(loss, sae.W_router)
    route = sae.route(stacks(9))
    acts, _ = sae.encode_with_hidden_pre(route.input)
    target = route.input.detach()
    by_hand = ((sae.decode(acts) - target).pow(2).sum(-1) / target.pow(2).sum(-1)).mean()
    (expected,) = torch.autograd.grad(by_hand, sae.W_router)
    torch.testing.assert_close(got, expected)
    assert got.abs().max() > 1e-4


@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
def test_the_straight_through_target_is_detached_in_the_gated_auxiliary_loss(loss):
    sae = make("gated", routing="straight_through", loss=loss)
    aux = step(sae, stacks(9)).losses["auxiliary_reconstruction_loss"]
    (got,) = torch.autograd.grad(aux, sae.W_router)
    x = sae.route(stacks(9)).input
    target = x.detach()
    gate = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_gate)
    error = (gate @ sae.W_dec + sae.b_dec - target).pow(2).sum(-1)
    by_hand = (error if loss == "mse" else error / target.pow(2).sum(-1)).mean()
    torch.testing.assert_close(aux, by_hand)
    torch.testing.assert_close(got, torch.autograd.grad(by_hand, sae.W_router)[0])


def test_the_hard_target_is_attached():
    """As in the authors' code, where the normalised loss hardly moves the router while biases are zero."""
    sae = make("topk")
    (got,) = torch.autograd.grad(step(sae, stacks(9)).losses["mse_loss"], sae.W_router)
    x = sae.route(stacks(9)).input
    by_hand = ((sae.decode(sae.encode_routed(x)) - x).pow(2).sum(-1) / x.pow(2).sum(-1)).mean()
    torch.testing.assert_close(got, torch.autograd.grad(by_hand, sae.W_router)[0])
    still = step(zero_biases(sae), stacks(9)).losses["mse_loss"]
    assert torch.autograd.grad(still, sae.W_router)[0].abs().max() < 1e-6 < got.abs().max()


# --- Metrics ---------------------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("routing", sorted(set(ROUTINGS) - {"distilled", "every"}))
def test_metrics(architecture, routing):
    sae = make(architecture, routing=routing)
    with torch.no_grad():
        out, route = step(sae, stacks(40), n=7), sae.route(stacks(40), draw=7)
    shares = [float(out.metrics[f"layer_share/{layer}"]) for layer in LAYERS]
    assert shares == pytest.approx([(route.layer == i).float().mean().item() for i in range(3)])
    assert sum(shares) == pytest.approx(1)
    chosen = [float(p[i]) for p, i in zip(route.probs, route.layer, strict=True)]
    assert float(out.metrics["route_mean_p"]) == pytest.approx(by_token(chosen), rel=1e-5)
    entropy = [-sum(p * math.log(p) for p in row.tolist() if p > 0) for row in route.probs]
    assert float(out.metrics["route_entropy"]) == pytest.approx(by_token(entropy), rel=1e-5, abs=1e-9)
    assert not any(getattr(v, "requires_grad", False) for v in step(sae, stacks(40)).metrics.values())
    assert ("topk_threshold" in out.metrics) == ("batchtopk" in architecture)


def test_random_draws_anew_every_step():
    sae = make("topk", routing="random")
    x = stacks(40)
    assert torch.equal(step(sae, x, n=3).sae_in, step(sae, x, n=3).sae_in)
    assert not torch.equal(step(sae, x, n=3).sae_in, step(sae, x, n=4).sae_in)
