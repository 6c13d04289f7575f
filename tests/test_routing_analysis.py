"""Routing analysis: hand-worked routes, and naive loops over a tiny model."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from alike import assert_alike
from spliced import make_sae, ordinary_sae
from test_token_classes import words_only

from routesae_lens.analysis.metrics import Tally
from routesae_lens.analysis.routing import (
    RoutingProfile,
    analyse_routing,
    mutual_information,
    shuffled_table,
)
from routesae_lens.analysis.stream import read_batches, subjects_of
from routesae_lens.analysis.token_classes import class_table
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.saes.crosscoder import CrosscoderTopKSAE, CrosscoderTopKSAEConfig
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.router import Route

BLOCKS = [1, 2, 4]
LN2 = math.log(2)

# Three sequences; 7 is special, and so is position 0.
TOKENS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 6, 8, 9], [5, 7, 6, 7, 7]])
LAYER = torch.tensor([[0, 0, 1, 1, 2], [2, 0, 0, 0, 1], [0, 1, 2, 1, 0]])
CHOSEN_P = torch.tensor([0.5, 0.8, 1.0])  # by sequence; the other two layers share the rest


def probabilities(layer: torch.Tensor) -> torch.Tensor:
    p = CHOSEN_P[:, None, None].expand(3, 5, 3)
    return torch.where(torch.nn.functional.one_hot(layer, 3).bool(), p, (1 - p) / 2)


def sent_to(monkeypatch: pytest.MonkeyPatch, sae: RouteSAE, layer: torch.Tensor, probs: torch.Tensor) -> Any:
    """``sae`` with routes of our choice, in the order in which sequences are read."""
    at = 0

    def route(stack: torch.Tensor, draw: int = 0) -> Route:
        nonlocal at
        here = slice(at, at + len(stack))
        at += len(stack)
        p = probs[here].gather(-1, layer[here][..., None]).squeeze(-1)
        return Route(probs[here], layer[here], probs[here], stack[..., :32], p)

    monkeypatch.setattr(sae, "route", route)
    return sae


def profile_of(sae: Any, model: Any, tokens: torch.Tensor = TOKENS, **options: Any) -> RoutingProfile:
    return analyse_routing({"sae": sae}, model, tokens, progress=False, **options)["sae"]


# --- Hand-worked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_hand_worked_routes(tiny_hooked, monkeypatch, batch_size):
    sae = sent_to(monkeypatch, make_sae(), LAYER, probabilities(LAYER))
    result = profile_of(sae, tiny_hooked, exclude_special_tokens=[7], batch_size=batch_size)
    # Kept are (token -> layer): 6->0, 8->1, 9->2 | 6->0, 6->0, 8->0, 9->1 | 6->2
    assert (result.tokens, result.sequences, result.layers) == (8, 3, BLOCKS)
    assert result.layer_share == {1: 4 / 8, 2: 2 / 8, 4: 2 / 8}
    assert list(result.layer_weight.values()) == pytest.approx([3.5 / 8, 2.1 / 8, 2.4 / 8])
    assert result.mean_p == pytest.approx((3 * 0.5 + 4 * 0.8 + 1.0) / 8)
    half, sharp = 1.5 * LN2, -0.8 * math.log(0.8) - 0.2 * math.log(0.1)
    assert result.entropy == pytest.approx((3 * half + 4 * sharp) / 8)
    assert result.entropy_of_mean == pytest.approx(1.5 * LN2)
    assert result.effective_layers == pytest.approx(2**1.5)
    # Neighbours: 8-9 | 6-6, 6-8, 8-9 | none. Over the gap in the first sequence, 6-8 would be one more.
    assert result.pairs == 4
    assert result.switch_rate == 2 / 4
    assert result.switch_rate_independent == pytest.approx(1 - 0.25 - 0.0625 - 0.0625)
    # Layer 0 gets 1, 3, 0 of 3, 4, 1 tokens: residuals from the share of 1/2 are -0.5, 1, -0.5.
    assert result.layer_share_stderr[1] == pytest.approx(math.sqrt(1.5 / 2) / (8 / 3) / math.sqrt(3))
    # p sums to 1.5, 3.2, 1: residuals from 0.7125 per token are -0.6375, 0.35, 0.2875.
    squares = 0.6375**2 + 0.35**2 + 0.2875**2
    assert result.mean_p_stderr == pytest.approx(math.sqrt(squares / 2) / (8 / 3) / math.sqrt(3))
    # Switches 1, 1, 0 of 1, 3, 0 pairs at a rate of 1/2: residuals 0.5, -0.5, 0.
    assert result.switch_rate_stderr == pytest.approx(math.sqrt(0.5 / 2) / (4 / 3) / math.sqrt(3))
    # Tokens: 6 -> [3, 0, 1], 8 -> [1, 1, 0], 9 -> [0, 1, 1]
    joint = -3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(8)
    assert result.token_information == pytest.approx(2 * 1.5 * LN2 - joint)
    assert 0 <= result.token_information_shuffled <= 1.5 * LN2
    # No tokenizer, no classes.
    assert (result.tokens_by_class, result.share_by_class) == ({}, {})
    assert math.isnan(result.class_information) and math.isnan(result.class_information_shuffled)


def test_position_zero_and_special_tokens_on_demand(tiny_hooked, monkeypatch):
    sae = sent_to(monkeypatch, make_sae(), LAYER, probabilities(LAYER))
    result = profile_of(sae, tiny_hooked, exclude_special_tokens=False, exclude_first_position=False)
    switches = sum((row[1:] != row[:-1]).sum().item() for row in LAYER)
    assert (result.tokens, result.pairs, result.switch_rate) == (15, 12, switches / 12)
    assert result.layer_share == {
        1: (LAYER == 0).sum() / 15,
        2: (LAYER == 1).sum() / 15,
        4: (LAYER == 2).sum() / 15,
    }


def test_shares_by_class(tiny_hooked, monkeypatch):
    # ids: <unk>, the, The, Paris, river, ".", 42, of, it's; 20 is an id that only the model knows
    tiny_hooked.tokenizer = words_only()
    tokens = torch.tensor([[1, 2, 7, 1, 4], [1, 4, 5, 20, 5]])
    layer = torch.tensor([[0, 1, 0, 1, 2], [0, 2, 0, 1, 0]])
    sae = sent_to(monkeypatch, make_sae(), layer, torch.nn.functional.one_hot(layer, 3).float())
    result = profile_of(sae, tiny_hooked, tokens, exclude_special_tokens=False)
    assert result.tokens_by_class == {"punctuation": 2, "function word": 3, "other word": 2, "other": 1}
    assert result.share_by_class == {
        "punctuation": {1: 1.0, 2: 0.0, 4: 0.0},
        "function word": {1: 1 / 3, 2: 2 / 3, 4: 0.0},
        "other word": {1: 0.0, 2: 0.0, 4: 1.0},
        "other": {1: 0.0, 2: 1.0, 4: 0.0},
    }
    # I = H(layer) - H(layer | class); only function words leave something open.
    left = 3 / 8 * (math.log(3) - 2 / 3 * LN2)
    shares = [3 / 8, 3 / 8, 2 / 8]
    entropy = -sum(p * math.log(p) for p in shares)
    assert result.entropy_of_mean == pytest.approx(entropy)
    assert result.class_information == pytest.approx(entropy - left)
    assert 0 <= result.class_information_shuffled < result.class_information
    assert result.token_information == pytest.approx(entropy)  # each id went to one layer


def test_special_tokens_have_a_class_where_they_count(tiny_proxy):
    tokens = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    tokens[0, 3] = tiny_proxy.tokenizer.eos_token_id
    assert "special" not in profile_of(make_sae(), tiny_proxy, tokens).tokens_by_class
    kept = profile_of(make_sae(), tiny_proxy, tokens, exclude_special_tokens=False)
    assert kept.tokens_by_class["special"] == 1 and kept.tokens == 14


# --- Information ---------------------------------------------------------------------------------------------


def test_mutual_information():
    assert mutual_information(torch.tensor([[2.0, 0.0], [0.0, 2.0]])) == pytest.approx(LN2)
    assert mutual_information(torch.tensor([[1.0, 2.0], [2.0, 4.0]])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(torch.tensor([[5.0], [3.0]])) == 0
    table = torch.tensor([[3.0, 0.0, 1.0], [1.0, 1.0, 0.0]]).double()
    p = table / 6
    naive = sum(
        p[i, j] * math.log(p[i, j] / (p[i].sum() * p[:, j].sum()))
        for i in range(2)
        for j in range(3)
        if p[i, j]
    )
    assert mutual_information(table) == pytest.approx(float(naive))


def test_shuffling_a_table_is_shuffling_the_tokens():
    table = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]]).double()
    drawn: Counter[int] = Counter()
    for seed in range(600):
        shuffled = shuffled_table(table, seed)
        assert torch.equal(shuffled.sum(0), table.sum(0)) and torch.equal(shuffled.sum(1), table.sum(1))
        drawn[int(shuffled[0, 0])] += 1
    # Two of four tokens, of which two are in layer 0: 1/6, 4/6, 1/6.
    assert [drawn[i] / 600 for i in range(3)] == pytest.approx([1 / 6, 4 / 6, 1 / 6], abs=0.06)


def test_random_and_fixed_routing(tiny_hooked):
    tokens = torch.randint(64, (64, 32), generator=torch.Generator().manual_seed(0))
    saes = {
        "random": make_sae(routing="random"),
        "batch": make_sae(routing="random", random_per="batch"),
        "fixed": make_sae(routing="fixed"),
        "hard": make_sae(),
    }
    results = analyse_routing(saes, tiny_hooked, tokens, batch_size=8, progress=False)
    random = results["random"]
    assert random.tokens == 64 * 31
    assert list(random.layer_share.values()) == pytest.approx([1 / 3] * 3, abs=0.04)
    assert list(random.layer_share_stderr.values()) == pytest.approx(
        [math.sqrt(2 / 9 / random.tokens)] * 3, rel=0.3
    )
    assert list(random.layer_weight.values()) == pytest.approx([1 / 3] * 3)
    assert random.entropy == pytest.approx(math.log(3)) and random.mean_p == pytest.approx(1 / 3)
    assert random.switch_rate == pytest.approx(2 / 3, abs=0.04)
    assert random.switch_rate_independent == pytest.approx(2 / 3, abs=0.01)
    # It knows nothing of the tokens: all of its information is the finite sample's.
    assert random.token_information == pytest.approx(random.token_information_shuffled, rel=0.3)
    assert random.token_information > 0.01
    hard = results["hard"]
    assert hard.token_information > 2 * hard.token_information_shuffled
    assert results["batch"].switch_rate == 0 < results["batch"].switch_rate_independent
    fixed = results["fixed"]
    assert fixed.layer_share == {1: 0.0, 2: 0.0, 4: 1.0} == fixed.layer_weight
    assert (fixed.entropy, fixed.entropy_of_mean, fixed.effective_layers, fixed.mean_p) == (0, 0, 1, 1)
    assert (fixed.switch_rate, fixed.switch_rate_independent, fixed.token_information) == (0, 0, 0)


# --- On models --------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("routing", ["hard", "soft"])
def test_naive_reference_on_a_real_pass(tiny_proxy, tokens, routing):
    tokens[1, 5] = tiny_proxy.tokenizer.eos_token_id
    sae = make_sae(routing=routing)
    result = profile_of(sae, tiny_proxy, tokens, batch_size=2)
    point = sae.mount(tiny_proxy)
    with torch.no_grad():
        route = sae.route(tiny_proxy.run_with_cache(tokens, names_filter=[point])[1][point])
    names, table = class_table(tiny_proxy.tokenizer)
    counts: Counter[int] = Counter()
    by_class: Counter[tuple[str, int]] = Counter()
    weight, entropy, p, pairs, switches, n = torch.zeros(3), 0.0, 0.0, 0, 0, 0
    for i in range(5):
        for j in range(1, 12):
            if (i, j) == (1, 5):
                continue
            layer = int(route.layer[i, j])
            n += 1
            counts[layer] += 1
            by_class[names[table[tokens[i, j]]], layer] += 1
            weight += route.probs[i, j]
            entropy -= sum(float(q) * math.log(q) for q in route.probs[i, j])
            p += float(route.probs[i, j, layer])
            if j > 1 and (i, j - 1) != (1, 5):
                pairs += 1
                switches += layer != int(route.layer[i, j - 1])
    assert len(counts) > 1 and switches
    assert (result.tokens, result.pairs) == (n, pairs)
    assert result.layer_share == {block: counts[i] / n for i, block in enumerate(BLOCKS)}
    assert list(result.layer_weight.values()) == pytest.approx((weight / n).tolist(), rel=1e-4)
    assert (result.entropy, result.mean_p) == (
        pytest.approx(entropy / n, rel=1e-4),
        pytest.approx(p / n, rel=1e-4),
    )
    assert result.switch_rate == switches / pairs
    for name, total in result.tokens_by_class.items():
        assert total == sum(by_class[name, i] for i in range(3))
        for i, block in enumerate(BLOCKS):
            assert result.share_by_class[name][block] == by_class[name, i] / total
    assert sum(result.tokens_by_class.values()) == n


def test_shares_are_those_of_the_evaluation(tiny_proxy, tokens):
    sae = make_sae()
    result = profile_of(sae, tiny_proxy, tokens)
    subjects = subjects_of({"sae": sae}, tiny_proxy)
    tally = Tally(subjects["sae"])
    for batch in read_batches(subjects, tiny_proxy, tokens):
        tally.add_reading(batch.read(subjects["sae"]), batch.keep)
    assert list(result.layer_share.values()) == (tally.count / tally.count.sum()).tolist()
    assert result.mean_p == pytest.approx(tally.p / result.tokens, rel=1e-6)
    assert result.entropy == pytest.approx(tally.entropy / result.tokens, rel=1e-6)


def test_equal_numbers_on_every_backend(tiny_llama_dir, tokens):
    loaded = [load_model(tiny_llama_dir, backend, device="cpu") for backend in BACKENDS]
    saes = {"hard": make_sae(), "random": make_sae(routing="random")}
    routes = [analyse_routing(saes, model, tokens, progress=False) for model in loaded]
    assert len(BACKENDS) == 3
    assert routes[0]["hard"].class_information > 0
    for other in routes[1:]:
        for name in saes:
            assert_alike(routes[0][name].to_dict(), other[name].to_dict(), 1e-3)


def test_batch_size_does_not_matter(tiny_proxy, tokens):
    # (random routing draws per batch, so it is not asked)
    one, five = (profile_of(make_sae(), tiny_proxy, tokens, batch_size=size).to_dict() for size in (1, 5))
    assert_alike(one, five, 1e-5)


def test_saes_without_a_route_are_left_out(tiny_hooked, tokens):
    plain = ordinary_sae("blocks.5.hook_resid_post")
    cross = CrosscoderTopKSAE(CrosscoderTopKSAEConfig(d_in=96, d_sae=48, k=6, layers=BLOCKS))
    saes = {"plain": plain, "route": make_sae(), "cross": cross, "every": make_sae(routing="every")}
    assert list(analyse_routing(saes, tiny_hooked, tokens, progress=False)) == ["route"]
    del saes["route"]
    with pytest.raises(ValueError, match=r"one RouteSAE.*plain \(StandardSAE\), cross \(CrosscoderTopKSAE\)"):
        analyse_routing(saes, tiny_hooked, tokens, progress=False)


def test_the_forward_stops_after_the_last_routed_layer(tiny_hooked, tokens):
    ran: list[int] = []
    for i, block in enumerate(tiny_hooked.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    profile_of(make_sae((1, 3)), tiny_hooked, tokens, batch_size=3)
    assert ran == [0, 1, 2, 3] * 2


def test_json_and_back(tiny_proxy, tokens):
    profile = profile_of(make_sae(), tiny_proxy, tokens[:1])  # one sequence: no standard errors
    assert math.isnan(profile.entropy_stderr)
    text = json.dumps(profile.to_dict(), allow_nan=False)
    again = RoutingProfile.from_dict(json.loads(text))
    assert again.layer_share == profile.layer_share and again.share_by_class == profile.share_by_class
    assert math.isnan(again.entropy_stderr)
    assert json.dumps(again.to_dict(), allow_nan=False) == text
    with pytest.raises(ValueError, match="not a RoutingProfile: entropy, extra missing or unknown"):
        RoutingProfile.from_dict(
            {k: v for k, v in profile.to_dict().items() if k != "entropy"} | {"extra": 1}
        )


def test_one_position_per_sequence_that_counts_has_no_pairs(tiny_hooked):
    result = profile_of(make_sae(), tiny_hooked, torch.tensor([[5, 6], [7, 8]]))
    assert (result.tokens, result.pairs) == (2, 0)
    assert math.isnan(result.switch_rate) and result.to_dict()["switch_rate"] is None


def test_bad_tokens(tiny_hooked):
    with pytest.raises(ValueError, match="token ids"):
        profile_of(make_sae(), tiny_hooked, torch.zeros(2, 5, dtype=torch.long) + 99)
    with pytest.raises(ValueError, match="nothing to read"):
        profile_of(make_sae(), tiny_hooked, TOKENS, exclude_special_tokens=[6, 7, 8, 9])
    with pytest.raises(ValueError, match="no SAEs given"):
        analyse_routing({}, tiny_hooked, TOKENS)
