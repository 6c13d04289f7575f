"""The reconstruction error of the fast training step equals the plain formula, and so do its gradients."""

from __future__ import annotations

import pytest
import torch
from routed_saes import make, stacks, step
from sae_lens.saes.sae import mse_loss

from routesae_lens.saes import row_error as module
from routesae_lens.saes.architectures import RouteTopKTrainingSAE
from routesae_lens.saes.row_error import row_error


def matrix(seed, n=6, d=5):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(preds, target, normalized):
    error = (preds - target).pow(2).sum(-1)
    return error / target.pow(2).sum(-1).clamp_min(1e-12) if normalized else error


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("through", ["target", "scale", "nothing"])
def test_equals_the_plain_formula(normalized, through, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", 10)  # two rows at a time
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    results = []
    for ours in (True, False):
        preds, constant = matrix(1).requires_grad_(), matrix(2).requires_grad_(through == "target")
        scale = torch.tensor([0.1, 0.5, -0.7, 1.0, 2.0, 30.0], dtype=torch.float64)
        scale.requires_grad_(through == "scale")
        target = scale[:, None] * constant
        if ours:
            known = scale if through == "scale" else None
            rows = row_error(preds, target, known, normalized=normalized)
        else:
            rows = plain(preds, target, normalized)
        leaves = [leaf for leaf in (preds, constant, scale) if leaf.requires_grad]
        results.append([rows, *torch.autograd.grad((rows * weights).sum(), leaves)])
    assert len(results[0]) == (2 if through == "nothing" else 3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("through_scale", [True, False])
def test_a_target_of_zeros_has_the_gradients_of_the_smallest_size(through_scale):
    preds, target = matrix(1).mul(1e-6).requires_grad_(), matrix(2).mul(1e-8).requires_grad_()
    target.data[0] = 0
    scale = torch.ones(6, dtype=torch.float64, requires_grad=True) if through_scale else None
    rows = row_error(preds, target, scale, normalized=True)
    expected = plain(preds, target if scale is None else scale[:, None] * target.detach(), True)
    torch.testing.assert_close(rows, expected)
    leaves = [preds, target if scale is None else scale]
    ours, theirs = (torch.autograd.grad(r.sum(), leaves, retain_graph=True) for r in (rows, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_an_sae_whose_loss_was_replaced_keeps_the_other_loss():
    sae = make("topk", loss="normalized_mse")
    sae.mse_loss_fn = mse_loss
    output = step(sae, stacks(9))
    expected = (output.sae_out - output.sae_in).pow(2).sum(-1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], expected)


class AbsoluteError(RouteTopKTrainingSAE):
    def _reconstruction_loss(self, preds, target):
        return (preds - target).abs()


def test_a_class_with_a_loss_of_its_own_keeps_it():
    sae = AbsoluteError(make("topk").cfg)
    output = step(sae, stacks(9))
    expected = (output.sae_out - output.sae_in).abs().sum(-1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], expected)
