"""Cross-entropy and KL of a batch in blocks, against the same in float64 at once."""

from __future__ import annotations

import pytest
import torch

from routesae_lens.analysis import next_tokens
from routesae_lens.analysis.next_tokens import NextTokens
from routesae_lens.splice.late_logits import Logits

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
KEEP = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
PREDICTED = [(0, 1), (1, 1), (1, 2), (1, 3)]  # kept, and so is the next one


def logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 30 * torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_they_come(logits: torch.Tensor, late: bool) -> Logits:
    """Of an unembedding that reads the logits themselves, less its bias."""
    if not late:
        return Logits(logits)
    bias = torch.arange(11).to(logits.dtype)
    return Logits(logits - bias, torch.eye(11, dtype=logits.dtype), bias)


@pytest.mark.parametrize("late", [(False, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("block, rows", [(1, 1), (12, 4), (33, 3), (10_000, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_in_float64_at_once(late, block: int, rows: int, dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(next_tokens.BLOCK, "cpu", block)
    monkeypatch.setitem(next_tokens.ROWS, "cpu", rows)
    given = [as_they_come(logits(seed, dtype), each) for seed, each in enumerate(late)]
    clean, other = (each.block(slice(None)).reshape(2, 5, 11) for each in given)
    log_p, log_q = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    ours = NextTokens(given[0], TOKENS, KEEP)
    kl, losses = ours.compare(given[1])
    torch.testing.assert_close(kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=3e-5)
    one_by_one = {
        name: -sum(log_probs[row, pos, TOKENS[row, pos + 1]].item() for row, pos in PREDICTED)
        for name, log_probs in (("clean", log_p), ("other", log_q))
    }
    assert ours.predicted == len(PREDICTED)
    assert sorted(map(tuple, losses.nonzero().tolist())) == PREDICTED
    for row, pos in PREDICTED:
        one = -log_q[row, pos, TOKENS[row, pos + 1]].item()
        assert losses[row, pos].item() == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert losses.sum().item() == pytest.approx(one_by_one["other"], rel=1e-5)
    torch.testing.assert_close(ours.losses(given[1]), losses)
    assert ours.clean_losses.sum().item() == pytest.approx(one_by_one["clean"], rel=1e-5)
    assert ours.cross_entropy(given[1]) == pytest.approx(one_by_one["other"], rel=1e-5)


def test_the_same_distribution_has_no_divergence():
    clean = logits(0)
    kl = NextTokens(Logits(clean), TOKENS, KEEP).kl(
        Logits(clean + 7.0)
    )  # a shift of all logits changes nothing
    assert kl.abs().max() < 1e-5


def test_small_divergences_are_not_lost_in_rounding():
    """KL of nearly equal distributions is half the variance of the difference of their logits."""
    clean = logits(0) / 30
    change = 1e-2 * logits(1) / 30
    p = clean.double().softmax(-1)
    variance = (p * change.double().pow(2)).sum(-1) - (p * change.double()).sum(-1).pow(2)
    torch.testing.assert_close(
        NextTokens(Logits(clean), TOKENS, KEEP).kl(Logits(clean + change)), variance / 2, rtol=2e-2, atol=1e-6
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_of_the_model_that_are_not_finite_are_an_error(bad: float):
    clean = logits(0)
    clean[0, 3, 2] = bad  # (does not count)
    kl, _ = NextTokens(Logits(clean), TOKENS, KEEP).compare(Logits(logits(1)))
    assert kl[KEEP].isfinite().all() and not kl[0, 3].isfinite()
    clean[1, 2, 10] = bad
    with pytest.raises(ValueError, match="not finite in sequences 6 to 7"):
        NextTokens(Logits(clean), TOKENS, KEEP, start=6).compare(Logits(logits(1)))


@pytest.mark.parametrize("lowest", [-1e9, torch.finfo(torch.float32).min])
def test_a_token_that_never_comes_leaves_the_others_alone(lowest: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(next_tokens.BLOCK, "cpu", 4)
    clean, other = logits(0), logits(1)
    clean[..., 0] = other[..., 0] = lowest
    kl, losses = NextTokens(as_they_come(clean, False), TOKENS, KEEP).compare(Logits(other))
    log_p, log_q = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    torch.testing.assert_close(kl, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-5, atol=3e-5)
    expected = -log_q.gather(-1, TOKENS.roll(-1, 1)[..., None]).squeeze(-1)
    torch.testing.assert_close(losses[losses != 0], expected[losses != 0], rtol=1e-5, atol=1e-5)


def test_a_token_without_a_logit_is_an_error():
    with pytest.raises(ValueError, match="token 9 has no logit: the model gives 9"):
        NextTokens(Logits(logits(0)[..., :9]), TOKENS, KEEP)
