"""Near copies in dictionaries: planted ones, counts by hand, experts against a naive search, every kind of SAE."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import crosscoders
import pytest
import routed_saes
import torch
from routed_saes import randomize
from spliced import ordinary_sae

from routesae_lens.analysis import geometry
from routesae_lens.analysis.geometry import decoder_directions, encoder_directions, random_dictionary
from routesae_lens.analysis.redundancy import EDGES, expert_similarity, experts_of, feature_redundancy
from routesae_lens.saes.experts import ScaleTrainingSAE, ScaleTrainingSAEConfig

E = torch.eye(8)


def cosines(W_from: torch.Tensor, W_to: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(W_from[:, None].double(), W_to[None].double(), dim=-1)


def turned(cosine: float) -> torch.Tensor:
    """A direction with this cosine to E[0]."""
    return cosine * E[0] + math.sqrt(1 - cosine**2) * E[1]


def experts_by_hand() -> torch.Tensor:
    """Three experts of three latents.

    Expert 0: one direction three times. Expert 1: three directions, one of them expert 0's. Expert 2: three directions
    of its own.
    """
    return torch.stack([E[0], 2 * E[0], 0.1 * E[0], E[0], E[1], E[2], E[3], E[4], E[5]])


# The whole dictionary


def test_planted_copies_are_counted():
    W_dec = torch.stack([E[0], 5 * turned(0.95), turned(0.89), -E[0], E[2], E[2] * 1e-3, 0 * E[0], E[3]])
    result = feature_redundancy(W_dec, progress=False)
    # 0 and 1 of each other (0.95); 2 of 1 (cosine of the angle between them 0.99), 4 and 5 are one direction
    assert result.near_copies.tolist() == [True, True, True, False, True, True, False, False]
    assert (result.d_sae, result.n, result.left_out, result.redundant) == (8, 7, 1, 5)
    assert result.share == pytest.approx(5 / 7)
    assert result.best.latents[[0, 2, 4, 5, 6]].tolist() == [1, 1, 5, 4, -1]
    c12 = 0.95 * 0.89 + math.sqrt((1 - 0.95**2) * (1 - 0.89**2))
    best = [0.95, c12, c12, 0.0, 1.0, 1.0, 0.0]
    assert result.best.living.tolist() == pytest.approx(best, abs=1e-6)
    assert result.mean_best == pytest.approx(sum(best) / 7, abs=1e-6)
    assert sum(result.histogram) == 7 and len(result.histogram) == len(EDGES) - 1
    assert result.histogram[-1] == 4 and result.histogram[EDGES.index(0.0)] == 2
    # strictly above: at a threshold of 1 nothing is, just below the two exact copies are
    assert feature_redundancy(W_dec, threshold=1.0, progress=False).redundant == 0
    assert feature_redundancy(W_dec, threshold=0.9999, progress=False).redundant == 2
    assert feature_redundancy(W_dec, threshold=-1.0, progress=False).redundant == 7


def test_latents_that_do_not_count_are_left_out():
    W_dec = torch.stack([E[0], E[0], E[1], E[2], 0 * E[3]])
    living = torch.tensor([True, False, True, True, True])
    result = feature_redundancy(W_dec, living=living, progress=False)
    # neither is the second judged, nor is it a copy for the first
    assert (result.n, result.left_out, result.redundant) == (3, 2, 0)
    assert result.best.latents[[1, 4]].tolist() == [-1, -1]
    assert feature_redundancy(W_dec, progress=False).redundant == 2


@pytest.mark.parametrize("block", [(3, 4), (1, 1), (50, 50)])
def test_any_block_gives_what_a_naive_search_gives(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry, "ROWS_AT_ONCE", block[0])
    monkeypatch.setattr(geometry, "COLUMNS_AT_ONCE", block[1])
    W_dec = random_dictionary(29, 3, 0)
    W_dec[7] = 0
    best = cosines(W_dec, W_dec).fill_diagonal_(-1)
    best[:, 7] = -1
    best = best.max(1).values[torch.arange(29) != 7]
    result = feature_redundancy(W_dec, threshold=0.97, progress=False)
    assert 0 < result.redundant == int((best > 0.97).sum()) < 28
    torch.testing.assert_close(result.best.living.double(), best, atol=1e-6, rtol=0)


def test_random_directions_have_no_copies_and_planted_ones_do():
    W_dec = random_dictionary(400, 64, 0)
    assert feature_redundancy(W_dec, progress=False).share == 0
    copied = torch.cat([W_dec, W_dec[:100] + 0.1 * random_dictionary(100, 64, 1)])
    assert feature_redundancy(copied, progress=False).redundant == 200


def test_every_kind_of_sae():
    routed = routed_saes.make("topk")
    crosscoder = crosscoders.make("topk")
    plain = ordinary_sae("blocks.2.hook_resid_post")
    for sae in (routed, crosscoder, plain):
        for part, rows in (("decoder", sae.W_dec), ("encoder", sae.W_enc.T)):
            best = cosines(rows.detach(), rows.detach()).fill_diagonal_(-1).max(1).values
            result: Any = feature_redundancy(sae, threshold=0.5, part=part, progress=False)  # type: ignore[arg-type]
            assert result.redundant == int((best > 0.5).sum()) and result.part == part
            torch.testing.assert_close(result.best.cosines.double(), best, atol=1e-6, rtol=0)
    width = crosscoder.W_dec.shape[1] // 3  # one layer's directions alone
    for part, rows in (("decoder", crosscoder.W_dec), ("encoder", crosscoder.W_enc.T)):
        rows = rows.detach()[:, width : 2 * width]
        best = cosines(rows, rows).fill_diagonal_(-1).max(1).values
        result = feature_redundancy(crosscoder, part=part, layer=crosscoder.layers[1], progress=False)  # type: ignore[arg-type]
        torch.testing.assert_close(result.best.cosines.double(), best, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="reads blocks"):
        encoder_directions(crosscoder, 17)
    with pytest.raises(ValueError, match="needs a Crosscoder"):
        feature_redundancy(routed, part="encoder", layer=1)
    with pytest.raises(ValueError, match="needs a Crosscoder"):
        feature_redundancy(routed, layer=1)
    with pytest.raises(ValueError, match="an SAE with an encoder"):
        feature_redundancy(object(), part="encoder")


def test_the_encoder_is_the_scaled_one():
    """Eq. 2.5: a Scale SAE in training and what it is saved as read the same directions."""
    sae: Any = ScaleTrainingSAE(ScaleTrainingSAEConfig(d_in=5, d_sae=12, k=2, n_experts=3, active_experts=2))
    randomize(sae)
    with torch.no_grad():
        sae.expert_scale.copy_(torch.tensor([0.5, -0.9, 3.0]))
        rows = sae.W_enc.T.unflatten(0, (3, 4))
        mean = rows.mean(1, keepdim=True)
        scaled = (mean + (1 + sae.expert_scale)[:, None, None] * (rows - mean)).flatten(0, 1)
    # (saving folds the decoder norms in, which turns nothing)
    torch.testing.assert_close(cosines(encoder_directions(sae), scaled).diagonal(), torch.ones(12).double())
    result = feature_redundancy(sae, part="encoder", progress=False)
    best = cosines(scaled, scaled).fill_diagonal_(-1).max(1).values
    torch.testing.assert_close(result.best.cosines.double(), best, atol=1e-6, rtol=0)
    assert expert_similarity(sae, progress=False).n_experts == 3


def test_the_result_is_json():
    result = feature_redundancy(E[[0, 0, 1]], progress=False)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["share"] == pytest.approx(2 / 3) and written["left_out"] == 0 and "best" not in written
    assert len(written["edges"]) == len(written["histogram"]) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "between -1 and 1; got 1.5"),
        ({"threshold": math.nan}, "between -1 and 1; got nan"),
        ({"threshold": "0.9"}, "between -1 and 1; got '0.9'"),
        ({"sae": E[:1]}, "two living latents or more, got 1 of 1"),
        ({"sae": torch.zeros(4, 2)}, "two living latents or more, got 0 of 4"),
        ({"sae": E * math.nan}, "not finite"),
        ({"part": "both"}, 'must be "decoder" or "encoder"'),
        ({"part": "encoder"}, "of a matrix the rows are compared"),
        ({"layer": 3}, "of a matrix the rows are compared"),
        ({"living": torch.ones(3, dtype=torch.bool)}, "yes or no of 8 latents"),
        ({"living": [True] * 8}, "mask of 8 latents, got list"),
        ({"living": torch.arange(8) == 2}, "got 1 of 8"),
        ({"sae": "mine"}, "an SAE with a decoder"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, unchecked: None):
    with pytest.raises(ValueError, match=message):
        feature_redundancy(**{"sae": E, "progress": False} | options)


# Experts


def test_experts_by_hand():
    result = expert_similarity(experts_by_hand(), experts=3, progress=False)
    assert (result.n_experts, result.width, result.left_out, result.experts_left_out) == (3, 3, 0, ())
    assert result.intra_shares.tolist() == [1, 0, 0]
    assert result.intra_share == pytest.approx(1 / 3) == result.intra_mean
    # all of expert 0 is in 1, a third of 1 is in 0, nothing of 2 or in 2
    assert result.pair_experts.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    assert result.pair_shares.tolist() == pytest.approx([1, 0, 1 / 3, 0, 0, 0])
    assert result.inter_share == pytest.approx(4 / 18) == result.inter_mean
    assert result.pairs == 6 and result.all_pairs and result.inter_share_stderr == 0
    assert sum(result.intra_histogram) == 9 and sum(result.inter_histogram) == 18
    assert (result.intra_histogram[-1], result.inter_histogram[-1]) == (3, 4)


def test_experts_as_a_naive_search():
    W_dec = random_dictionary(20, 3, 0)
    every = cosines(W_dec, W_dec).fill_diagonal_(-2).view(4, 5, 4, 5)
    best = every.amax(-1)  # expert, latent, expert looked in
    result = expert_similarity(W_dec, experts=4, threshold=0.8, progress=False)
    own = torch.stack([best[i, :, i] for i in range(4)])
    assert result.intra_share == pytest.approx((own > 0.8).double().mean().item())
    assert result.intra_mean == pytest.approx(own.mean().item(), abs=1e-6)
    other = torch.stack([best[i, :, j] for i in range(4) for j in range(4) if i != j])
    assert 0 < result.inter_share == pytest.approx((other > 0.8).double().mean().item())
    assert result.inter_mean == pytest.approx(other.mean().item(), abs=1e-6)


def test_a_sample_of_pairs_estimates_all_of_them():
    W_dec = random_dictionary(120, 4, 0)
    exact = expert_similarity(W_dec, experts=12, progress=False)
    sample = expert_similarity(W_dec, experts=12, pairs=40, seed=3, progress=False)
    assert (sample.pairs, sample.all_pairs) == (40, False)
    drawn = [tuple(pair) for pair in sample.pair_experts.tolist()]
    assert len(set(drawn)) == 40 and all(i != j for i, j in drawn)
    by_pair = dict(
        zip(map(tuple, exact.pair_experts.tolist()), exact.pair_shares.tolist(), strict=True)  # type: ignore[arg-type]
    )
    assert sample.pair_shares.tolist() == [by_pair[pair] for pair in drawn]  # type: ignore[index]
    assert sample.inter_share_stderr is not None
    assert 0 < abs(sample.inter_share - exact.inter_share) < 4 * sample.inter_share_stderr < exact.inter_share
    again = expert_similarity(W_dec, experts=12, pairs=40, seed=3, progress=False)
    other = expert_similarity(W_dec, experts=12, pairs=40, seed=4, progress=False)
    assert again.pair_experts.equal(sample.pair_experts) and not other.pair_experts.equal(sample.pair_experts)
    assert expert_similarity(W_dec, experts=12, pairs=1, progress=False).inter_share_stderr is None
    assert sample.intra_share == exact.intra_share


def test_the_standard_error_is_that_of_samples():
    W_dec = random_dictionary(60, 3, 0)
    samples = [
        expert_similarity(W_dec, experts=6, pairs=10, seed=seed, threshold=0.95, progress=False)
        for seed in range(60)
    ]
    spread = torch.tensor([sample.inter_share for sample in samples]).double().std().item()
    claimed = sum(sample.inter_share_stderr or 0.0 for sample in samples) / 60
    assert claimed == pytest.approx(spread, rel=0.25)


def test_dead_experts_are_left_out_and_named():
    W_dec = torch.cat([experts_by_hand(), torch.zeros(3, 8), E[:3] * torch.tensor([[0.0], [0.0], [1.0]])])
    result = expert_similarity(W_dec, experts=5, progress=False)
    assert result.experts_left_out == (3, 4) and result.left_out == 5
    assert result.intra_share == pytest.approx(1 / 3) and result.inter_share == pytest.approx(4 / 18)
    assert result.pairs == 6 and result.all_pairs
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["intra_shares"] == [1, 0, 0, None, None] and written["experts_left_out"] == [3, 4]
    living = torch.ones(15, dtype=torch.bool)
    living[3] = False  # expert 1's copy of expert 0
    assert expert_similarity(W_dec, experts=5, living=living, progress=False).inter_share == 0


def test_the_experts_of_an_sae():
    sae = SimpleNamespace(cfg=SimpleNamespace(n_experts=3), W_dec=experts_by_hand(), W_enc=E[:, :9].clone())
    assert experts_of(sae) == 3
    assert expert_similarity(sae, progress=False).inter_share == pytest.approx(4 / 18)
    assert feature_redundancy(sae, progress=False).redundant == 4
    # groups of any SAE can be compared, but it has to be asked for
    plain = ordinary_sae("blocks.2.hook_resid_post")
    with pytest.raises(ValueError, match="a StandardSAE has no experts"):
        expert_similarity(plain)
    cut = expert_similarity(plain, experts=4, progress=False)
    assert cut.width * 4 == len(decoder_directions(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3}, "3 experts do not divide 8 latents"),
        ({"experts": 1}, "a single expert has no other"),
        ({"experts": 0}, "1 or more; got 0"),
        ({"experts": True}, "1 or more; got True"),
        ({"experts": 8}, "experts of one latent"),
        ({"pairs": 0}, "1 to 12 for 4 experts; got 0"),
        ({"pairs": 13}, "1 to 12 for 4 experts; got 13"),
        ({"threshold": -1.1}, "between -1 and 1"),
        ({"sae": E * math.inf}, "not finite"),
        ({"living": torch.arange(8) < 2}, "two experts or more with two living latents, got 1 of 4"),
    ],
)
def test_bad_experts(options: dict[str, Any], message: str, unchecked: None):
    with pytest.raises(ValueError, match=message):
        expert_similarity(**{"sae": E, "experts": 4, "progress": False} | options)
