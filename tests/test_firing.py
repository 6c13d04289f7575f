"""Firing frequencies: against dense latents, windows worked by hand, and what too few tokens cannot say."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from spliced import D_SAE, make_sae, ordinary_sae
from spliced_crosscoders import make_crosscoder, stack_of

from routesae_lens.analysis.firing import _Counter, _edges, firing_frequencies
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.saes.fast_topk import Latents

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))


def three() -> dict[str, Any]:
    return {"plain": ordinary_sae(HOOK), "routed": make_sae(), "crosscoder": make_crosscoder()}


def dense(model: Any, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Whether each latent fires on each token after position 0: (token, d_sae)."""
    if sae.cfg.metadata.hook_name == HOOK:
        x = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    else:
        x = stack_of(model, sae, tokens)
    return (sae.encode(x) != 0)[:, 1:].flatten(0, 1)


@torch.no_grad()
def test_as_from_dense_latents(tiny_hooked: Any, tokens: torch.Tensor):
    results = firing_frequencies(
        three(), tiny_hooked, tokens, window=20, batch_size=2, exclude_special_tokens=False, progress=False
    )
    for name, sae in three().items():
        fired, result = dense(tiny_hooked, sae, tokens), results[name]
        assert (result.tokens, result.sequences, result.d_sae) == (55, 5, D_SAE)
        assert result.counts.dtype == torch.long
        assert result.counts.tolist() == fired.sum(0).tolist(), name
        assert result.l0 == pytest.approx(fired.sum(-1).double().mean().item())
        assert result.never_fired == int((~fired.any(0)).sum())
        frequency = fired.double().mean(0)
        torch.testing.assert_close(result.frequency, frequency)
        assert result.dense == int((frequency > 0.1).sum()) and result.dense_share == result.dense / D_SAE
        # two windows of 20 tokens, ending within batches of 22; the last 15 tokens are left over
        silent = torch.stack([~fired[start : start + 20].any(0) for start in (0, 20)]).double().mean(-1)
        assert result.windows == 2
        assert result.silent_share == pytest.approx(silent.mean().item())
        assert result.silent_share_stderr == pytest.approx((silent.std() / 2**0.5).item())
        # every latent is in the histogram once, or has never fired
        assert sum(result.histogram) + result.never_fired == D_SAE
        for low, high, n in zip(result.edges, result.edges[1:], result.histogram, strict=False):
            last = high == result.edges[-1]
            inside = (frequency >= low) & ((frequency < high) | (last & (frequency == high)))
            assert n == int(inside.sum())
    assert results["routed"].never_fired and max(results["plain"].counts) > 5  # not all alike


def test_one_pass_for_all(tiny_hooked: Any, tokens: torch.Tensor):
    runs = []
    tiny_hooked.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    firing_frequencies(three(), tiny_hooked, tokens, batch_size=5, progress=False)
    assert len(runs) == 1


def test_equal_counts_on_every_backend(tiny_llama_dir: Any, tokens: torch.Tensor):
    results = [
        firing_frequencies(three(), load_model(tiny_llama_dir, backend, device="cpu"), tokens, progress=False)
        for backend in BACKENDS
    ]
    for name in three():
        for other in results[1:]:  # (a latent at the edge may fall to either side)
            assert (other[name].counts - results[0][name].counts).abs().sum() <= 2


def test_windows_and_limits_by_hand():
    """10 latents, windows of 4 tokens: 0 fires on every token, 1 on the third alone, 2 on the last of nine."""
    counter = _Counter(10, 4)
    pieces = [([0, 1, 2, 2], [0, 0, 0, 1]), ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0]), ([0, 0], [0, 2])]
    for (token, latent), n in zip(pieces, (3, 5, 1), strict=True):
        counter.add(Latents(torch.tensor(token), torch.tensor(latent), torch.ones(len(token))), n)
    assert counter.silent == [8, 9]
    options: dict[str, Any] = {"silent_limit": 0.1, "dense_above": 0.1, "dense_limit": 0.02}
    result = counter.result(1, bars_per_decade=1, **options)
    assert result.counts.tolist() == [9, 1, 1, *[0] * 7]
    assert (result.tokens, result.windows, result.never_fired) == (9, 2, 7)
    assert result.silent_share == pytest.approx(0.85) and result.few_silent is False
    assert result.silent_share_stderr == pytest.approx(0.05)
    assert result.dense == 3 and result.few_dense is False  # 1 / 9 is more than a tenth
    assert (result.edges, result.histogram) == ((0.1, 1.0), (3,))
    assert result.findings() == [
        "85.0% of the latents are silent over 4 tokens (above the limit of 10%)",
        "30.0% of the latents fire on more than 10% of 9 tokens (above the limit of 2%)",
    ]
    good = counter.result(1, bars_per_decade=1, silent_limit=0.85, dense_above=0.5, dense_limit=0.1)
    assert good.few_silent and good.few_dense and "within the limit of 85%" in good.findings()[0]


def test_a_tenth_of_the_tokens_is_not_more_than_a_tenth():
    counter = _Counter(2, 100)
    counter.add(Latents(torch.arange(30) % 3, torch.zeros(30, dtype=torch.long), torch.ones(30)), 300)
    result = counter.result(1, bars_per_decade=2, silent_limit=0.1, dense_above=0.1, dense_limit=0.02)
    assert result.dense == 0
    assert result.edges == pytest.approx([10 ** (e / 2) for e in range(-6, 1)])
    assert result.histogram == (0, 0, 0, 0, 1, 0)  # a bar holds its lower edge


@pytest.mark.parametrize("tokens", [1, 2, 10, 11, 100, 100_000, 3_000_001, 10**9])
def test_the_histogram_reaches_down_to_one_token(tokens: int):
    edges = _edges(tokens, 4)
    assert edges[0] <= 1 / tokens and edges[-1] == 1 and list(edges) == sorted(edges)
    assert tokens == 1 or edges[0] * 10 > 1 / tokens


def test_too_few_tokens_say_so(tiny_hooked: Any, tokens: torch.Tensor):
    result = firing_frequencies({"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens, progress=False)["sae"]
    assert result.window == 100_000 and result.windows == 0
    assert result.silent_share is result.silent_share_stderr is result.few_silent is None
    assert "cannot be judged yet: 55 tokens were seen, the limit is about 100,000" in result.findings()[0]
    assert result.few_dense in (True, False)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["tokens"] == 55 and written["few_silent"] is None and "counts" not in written
    assert len(written["edges"]) == len(written["histogram"]) + 1


def test_special_tokens_do_not_count(tiny_hooked: Any, tokens: torch.Tensor):
    sae, tokens = ordinary_sae(HOOK), tokens.clamp(max=30)
    tokens[1:] = 40  # only the first sequence counts, also in batches that then have no token at all
    result = firing_frequencies(
        {"sae": sae}, tiny_hooked, tokens, batch_size=1, exclude_special_tokens=[40], progress=False
    )["sae"]
    assert result.tokens == 11
    assert result.counts.tolist() == dense(tiny_hooked, sae, tokens[:1]).sum(0).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be an integer, 1 or more; got 0"),
        ({"window": 1.5}, "window must be an integer, 1 or more; got 1.5"),
        ({"window": float("nan")}, "window must be an integer"),
        ({"bars_per_decade": True}, "bars_per_decade must be an integer, 1 or more; got True"),
        ({"bars_per_decade": 0}, "bars_per_decade must be an integer, 1 or more; got 0"),
        ({"dense_above": 2.0}, "dense_above is a share, between 0 and 1; got 2"),
        ({"silent_limit": -1.0}, "silent_limit is a share"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_bad_options(
    tiny_hooked: Any, tokens: torch.Tensor, options: dict[str, Any], message: str, unchecked: None
):
    with pytest.raises(ValueError, match=message):
        firing_frequencies({"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens, **options)


def test_bad_input(tiny_hooked: Any, tokens: torch.Tensor):
    with pytest.raises(ValueError, match="no SAEs given"):
        firing_frequencies({}, tiny_hooked, tokens)
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        firing_frequencies({"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens.repeat(1, 4))
    with pytest.raises(ValueError, match="nothing to read"):
        firing_frequencies(
            {"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens, exclude_special_tokens=list(range(64))
        )
