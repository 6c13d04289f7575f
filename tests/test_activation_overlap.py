"""What tokens share: against double loops, samples within their standard error, experts by hand, sets of tokens."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routed_saes import randomize
from sae_lens.saes.sae import SAEMetadata
from spliced import D_MODEL, D_SAE, make_sae, ordinary_sae
from spliced_crosscoders import make_crosscoder, stack_of

from routesae_lens.analysis import activation_overlap
from routesae_lens.analysis.activation_overlap import OverlapCounter, activation_similarity
from routesae_lens.analysis.expert_use import ExpertCounter, expert_utilisation
from routesae_lens.analysis.token_classes import texts_in_context
from routesae_lens.analysis.token_sets import chosen_tokens, read_token_set
from routesae_lens.models import load_model
from routesae_lens.saes.experts import RouteScaleSAE, RouteScaleSAEConfig, ScaleSAE, ScaleSAEConfig
from routesae_lens.saes.fast_topk import Latents
from routesae_lens.saes.sparse_products import TopKCode

HOOK = "blocks.2.hook_resid_post"


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))


def codes(tokens: int, d_sae: int, share: float = 0.2, seed: int = 0) -> torch.Tensor:
    """Dense latents, some active far more often than others, some tokens without any."""
    generator = torch.Generator().manual_seed(seed)
    often = torch.rand(d_sae, generator=generator) * 2 * share
    acts = torch.randn(tokens, d_sae, generator=generator)
    acts = acts * (torch.rand(tokens, d_sae, generator=generator) < often)
    acts[::7] = 0
    return acts


def naive(acts: torch.Tensor) -> tuple[float, list[int]]:
    """Eq. A.3 as it is written, and how many unordered pairs share 0, 1, 2 ... latents."""
    sets = [set(row.nonzero().flatten().tolist()) for row in acts]
    n, k = len(sets), sum(map(len, sets)) / len(sets)
    total, histogram = 0.0, [0] * (acts.shape[1] + 1)
    for i in range(n):
        for j in range(n):
            if i != j:
                total += len(sets[i] & sets[j]) / k
                histogram[len(sets[i] & sets[j])] += i < j
    while not histogram[-1]:
        histogram.pop()
    return total / (n * (n - 1)), histogram


def counted(acts: torch.Tensor, pieces: tuple[int, ...] = (), **options: Any) -> Any:
    counter = OverlapCounter(acts.shape[1], len(acts), **options)
    for piece in acts.split(list(pieces) or len(acts)):
        counter.add(piece)
    return counter.result()


# Pairs of tokens


def test_by_hand():
    acts = torch.tensor([[1.0, 2, 0, 0], [3, 0, -1, 0], [0, 4, 5, 0]])  # every pair shares one of two latents
    result = counted(acts)
    assert (result.tokens, result.d_sae, result.active_latents, result.l0, result.k_total) == (3, 4, 3, 2, 2)
    assert (result.mean_overlap, result.similarity, result.histogram) == (1, 0.5, (0, 3))
    assert result.all_pairs and (result.sampled_similarity, result.sampled_stderr) == (0.5, 0)
    assert counted(acts, k=4).similarity == 0.25
    same = counted(torch.ones(2, 3))
    assert (same.similarity, same.histogram, same.shares) == (1, (0, 0, 0, 1), [0, 0, 0, 1])
    nothing = counted(torch.zeros(3, 2))
    assert nothing.similarity is None and nothing.sampled_stderr is None and nothing.histogram == (3,)


@pytest.mark.parametrize("block", [1, 5, 64])
def test_as_a_double_loop(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activation_overlap, "TOKENS_AT_ONCE", block)
    acts = codes(41, 30)
    similarity, histogram = naive(acts)
    for pieces in ((), (1, 0, 30, 10)):
        result = counted(acts, pieces)
        assert result.similarity == pytest.approx(similarity, rel=1e-12)
        assert list(result.histogram) == histogram and len(histogram) > 3
        assert sum(result.histogram) == result.pairs == 41 * 40 // 2 and result.all_pairs
    monkeypatch.setattr(activation_overlap, "NUMBERS_AT_ONCE", 100)  # blocks of three tokens
    assert list(counted(acts).histogram) == histogram


def test_sparse_and_dense_latents_are_one():
    acts = codes(20, 10)
    values, indices = acts.abs().topk(6, dim=-1)  # zeros among them are not active
    acts = torch.zeros(20, 10).scatter(1, indices, values)
    order = indices.sort(dim=-1)
    by_code = OverlapCounter(10, 20)
    by_code.add(TopKCode(values.gather(1, order.indices), order.values))
    by_latents = OverlapCounter(10, 20)
    by_latents.add(Latents.of(acts[:13]), 13)
    by_latents.add(Latents.of(acts[13:]), 7)
    assert by_code.result() == by_latents.result() == counted(acts)


def test_counts_of_long_texts_do_not_overflow():
    counter = OverlapCounter(2, 6 * 10**9, pairs=1)
    counter.counts += 6 * 10**9  # c (c - 1) is 3.6e19, int64 ends at 9.2e18
    counter.seen = counter.tokens
    counter._held = [(torch.zeros(0), torch.zeros(0))]
    result = counter.result()
    assert (result.mean_overlap, result.similarity) == (2, 1)


def test_a_sample_is_within_its_standard_error():
    acts = codes(300, 60)
    exact = counted(acts)
    samples = [counted(acts, (100, 200), pairs=400, seed=seed) for seed in range(50)]
    errors = torch.tensor([(s.sampled_similarity - exact.similarity) / s.sampled_stderr for s in samples])
    assert errors.double().square().mean().sqrt() == pytest.approx(1, rel=0.3)  # a z-score
    assert abs(errors.double().mean()) < 3 / 50**0.5
    for sample in samples:
        assert sample.similarity == exact.similarity  # exact in any case
        assert sum(sample.histogram) == sample.pairs == 400 and not sample.all_pairs
    assert counted(acts, pairs=400, seed=7).histogram == samples[7].histogram != samples[8].histogram
    # the shares of many pairs are those of all
    many = counted(acts, pairs=200_000)
    for share, expected in zip(many.shares, exact.shares, strict=False):
        assert share == pytest.approx(expected, abs=0.01)
    assert counted(acts, pairs=1).sampled_stderr is None


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_sampled_pairs_one_by_one(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activation_overlap, "PAIRS_AT_ONCE", at_once)
    acts = codes(9, 12, share=0.4)
    counter = OverlapCounter(12, 9, pairs=30, seed=1)
    counter.add(acts)
    assert counter._pairs is not None and counter._needed is not None
    names = counter._needed.tolist()
    overlaps = []
    for i, j in counter._pairs.T.tolist():
        assert i != j
        overlaps.append(int(((acts[names[i]] != 0) & (acts[names[j]] != 0)).sum()))
    assert list(counter.result().histogram) == torch.tensor(overlaps).bincount().tolist()


def test_large_sets_are_sampled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(activation_overlap, "ALL_PAIRS_UP_TO", 30)
    monkeypatch.setattr(activation_overlap, "SAMPLED_PAIRS", 77)
    assert counted(codes(30, 5)).all_pairs
    result = counted(codes(31, 5))
    assert (result.pairs, result.all_pairs) == (77, False)
    assert counted(codes(31, 5), pairs="all").pairs == 31 * 15
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["histogram"] == list(result.histogram) and sum(written["shares"]) == pytest.approx(1)


def test_bad_codes(unchecked: None):
    with pytest.raises(ValueError, match="a pair of tokens needs two, got 1"):
        OverlapCounter(3, 1)
    with pytest.raises(ValueError, match=r'or "all"; got 0'):
        OverlapCounter(3, 5, pairs=0)
    with pytest.raises(ValueError, match="above 0, got nan"):
        OverlapCounter(3, 5, k=math.nan)
    with pytest.raises(ValueError, match="not finite"):
        OverlapCounter(3, 5).add(Latents.of(torch.full((2, 3), math.nan)), 2)
    with pytest.raises(ValueError, match="give n"):
        OverlapCounter(3, 5).add(Latents.of(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="latents of 2 tokens, but n is 3"):
        OverlapCounter(3, 5).add(torch.ones(2, 3), 3)
    with pytest.raises(ValueError, match="latents of 2 tokens and 2 latents, got token 1 and latent 2"):
        OverlapCounter(2, 5).add(Latents.of(torch.ones(2, 3)), 2)
    with pytest.raises(ValueError, match=r"expected latents \(token, 4\), got shape \(2, 3\)"):
        OverlapCounter(4, 5).add(torch.ones(2, 3))
    with pytest.raises(ValueError, match="token after token"):  # a sample of pairs would be counted wrong
        OverlapCounter(3, 5).add(Latents(*(column.flip(0) for column in Latents.of(torch.ones(2, 3)))), 2)
    with pytest.raises(ValueError, match="5 tokens were announced, 6 came"):
        OverlapCounter(3, 5).add(torch.ones(6, 3))
    with pytest.raises(ValueError, match="5 tokens were announced, 0 came"):
        OverlapCounter(3, 5).result()


# SAEs on a model


def three() -> dict[str, Any]:
    return {"plain": ordinary_sae(HOOK), "routed": make_sae(), "crosscoder": make_crosscoder()}


def dense(model: Any, sae: Any, tokens: torch.Tensor) -> torch.Tensor:
    if sae.cfg.metadata.hook_name == HOOK:
        return sae.encode(model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK])
    return sae.encode(stack_of(model, sae, tokens))


@torch.no_grad()
def test_saes_as_from_dense_latents(tiny_hooked: Any, tokens: torch.Tensor):
    mask = tokens % 3 == 0
    mask[2] = False  # a sequence that need not be read
    mask[:, 0] = True  # position 0 does not count all the same
    results = activation_similarity(three(), tiny_hooked, tokens, where=mask, batch_size=2, progress=False)
    mask[:, 0] = False
    for name, sae in three().items():
        acts = dense(tiny_hooked, sae, tokens)[mask]
        similarity, histogram = naive(acts)
        assert results[name].tokens == len(acts) and results[name].similarity == pytest.approx(similarity), (
            name
        )
        assert list(results[name].histogram) == histogram
    assert len({result.similarity for result in results.values()}) == 3
    sampled = activation_similarity(three(), tiny_hooked, tokens, pairs=50, k=6, progress=False)
    assert sampled["plain"].tokens == 55 and sampled["plain"].pairs == 50 and sampled["plain"].k_total == 6


def test_one_pass_for_all(tiny_hooked: Any, tokens: torch.Tensor):
    runs = []
    tiny_hooked.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    activity = read_token_set(three(), tiny_hooked, tokens, chosen_tokens(tokens, tiny_hooked), batch_size=5)
    assert [(one.name, one.n) for one in activity] == [("plain", 55), ("routed", 55), ("crosscoder", 55)]
    assert len(runs) == 1


@torch.no_grad()
def test_one_pass_for_several_sets(tiny_hooked: Any, tokens: torch.Tensor):
    keep, every = (tokens % 3 > 0) & (tokens != 4), tokens % 2 == 0
    keep[1] = False  # places are those of the text, not of what is read of it
    keep = chosen_tokens(tokens, tiny_hooked, keep)
    for name, sae in three().items():
        acts, seen = dense(tiny_hooked, sae, tokens), torch.zeros(0, dtype=torch.long)
        stream = read_token_set({name: sae}, tiny_hooked, tokens, keep, batch_size=2)
        for one in stream:
            some = one.among(every)
            assert one.experts is None and some.experts is None and some.name == name
            assert some.n == len(some.place) < one.n == len(one.place)
            whole = torch.zeros(some.n, D_SAE).index_put(
                (some.latents.token, some.latents.latent), some.latents.value
            )
            torch.testing.assert_close(whole, acts.flatten(0, 1)[some.place], atol=1e-4, rtol=1e-4)
            seen = torch.cat([seen, some.place])
        assert seen.tolist() == (keep & every).flatten().nonzero().flatten().tolist()


def test_tokens_by_mask_rule_and_words(tiny_llama_dir: Any):
    model = load_model(tiny_llama_dir, "hooked", device="cpu")
    tokens = model.to_tokens("In the morning the river was quiet, and the boats lay still in the harbour.")
    texts = texts_in_context(model.tokenizer, tokens[0].tolist())
    rule = chosen_tokens(tokens, model, lambda text: text.startswith(" "))
    assert rule[0].tolist() == [i > 0 and text.startswith(" ") for i, text in enumerate(texts)]
    assert 0 < rule.sum() < len(texts) - 1
    words = chosen_tokens(tokens, model, ["THE", " in "])
    expected = [i > 0 and text.strip().lower() in ("the", "in") for i, text in enumerate(texts)]
    assert words[0].tolist() == expected and sum(expected) > 1
    assert not chosen_tokens(tokens, model)[0, 0] and chosen_tokens(tokens, model, rule | words).equal(
        rule | words
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("the", "a mask, a function of a token's text or a list of words, got 'the'"),
        (3, "got 3"),
        ([7, 9], "words must be text, got 7"),
        (torch.ones(5, 11, dtype=torch.bool), r"a mask of shape \(5, 12\), got torch.bool of \(5, 11\)"),
        (torch.ones(5, 12), "got torch.float32"),
        (torch.zeros(5, 12, dtype=torch.bool), "no token is in the set"),
        (torch.arange(60).view(5, 12) == 0, "no token is in the set"),
        (torch.arange(60).view(5, 12) == 1, "a pair of tokens needs two, got 1"),
        (["the"], "no tokenizer"),
    ],
)
def test_bad_sets(tiny_hooked: Any, tokens: torch.Tensor, where: Any, message: str, unchecked: None):
    with pytest.raises(ValueError, match=message):
        activation_similarity({"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens, where=where)


def test_bad_saes(tiny_hooked: Any, tokens: torch.Tensor):
    with pytest.raises(ValueError, match="'all' encodes every layer of a token"):
        activation_similarity({"all": make_sae(routing="every")}, tiny_hooked, tokens)
    sae = ordinary_sae(HOOK)
    sae.W_enc.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite weights: W_enc"):
        activation_similarity({"sae": sae}, tiny_hooked, tokens)
    with pytest.raises(ValueError, match="no SAEs given"):
        activation_similarity({}, tiny_hooked, tokens)
    with pytest.raises(ValueError, match="pairs must be an integer"):
        activation_similarity({"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens, pairs=-1)


# Experts


def test_experts_by_hand():
    """Three experts of two latents; of four tokens one uses an expert twice, one uses two, one none."""
    counter = ExpertCounter(6, 3)
    acts = torch.zeros(4, 6)
    for token, latent in [(0, 2), (0, 3), (1, 3), (1, 4), (3, 2)]:
        acts[token, latent] = 1
    counter.add(Latents.of(acts[:2]), 2)
    counter.add(Latents.of(acts[2:]), 2)
    use = counter.result()
    assert (use.tokens, use.counts, use.order, use.unused) == (4, (0, 3, 1), (1, 2, 0), 1)
    assert use.experts_per_token == 1 and use.cdf == (0.75, 1, 1) and use.top_share == 0.75
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert use.entropy == pytest.approx(entropy) and use.effective_experts == pytest.approx(math.exp(entropy))
    assert [use.experts_for(share) for share in (0.1, 0.75, 0.76, 1.0)] == [1, 1, 2, 2]
    written = json.loads(json.dumps(use.to_dict(), allow_nan=False))
    assert written["cdf"] == [0.75, 1, 1] and written["experts_for_half"] == 1
    with pytest.raises(ValueError, match="a share above 0"):
        use.experts_for(0)


def test_even_use_and_no_use():
    even = ExpertCounter(8, 4)
    even.add(Latents.of(torch.eye(8)), 8)
    use = even.result()
    assert use.cdf == (0.25, 0.5, 0.75, 1) and use.order == (0, 1, 2, 3)
    assert use.entropy == pytest.approx(math.log(4)) and use.effective_experts == pytest.approx(4)
    with pytest.raises(ValueError, match="no expert is active on any of 0 tokens"):
        ExpertCounter(8, 4).result()
    with pytest.raises(ValueError, match="3 experts do not divide 8"):
        ExpertCounter(8, 3)


@torch.no_grad()
def test_the_experts_of_saes(tiny_hooked: Any, tokens: torch.Tensor):
    """Any SAE whose config says how many experts it has; here the latents of ordinary ones in groups."""
    saes = {"plain": ordinary_sae(HOOK), "routed": make_sae()}
    for sae in saes.values():
        sae.cfg.n_experts = 8  # type: ignore[attr-defined]
    mask = tokens % 2 == 0
    use = expert_utilisation(saes, tiny_hooked, tokens, where=mask, batch_size=2, progress=False)
    mask[:, 0] = False
    for name, sae in saes.items():
        acts = dense(tiny_hooked, sae, tokens)[mask]
        active = (acts.unflatten(-1, (8, D_SAE // 8)) != 0).any(-1)
        assert use[name].counts == tuple(active.sum(0).tolist())
        assert use[name].experts_per_token == pytest.approx(active.sum(1).double().mean().item())
    with pytest.raises(ValueError, match="has no experts"):
        expert_utilisation(saes | {"other": make_crosscoder()}, tiny_hooked, tokens)
    saes["plain"].cfg.n_experts = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="7 experts do not divide 48"):
        expert_utilisation(saes, tiny_hooked, tokens)
    with pytest.raises(ValueError, match="no SAEs given"):
        expert_utilisation({}, tiny_hooked, tokens)


def expert_saes() -> dict[str, Any]:
    """A Scale SAE on one block, and one whose tokens go to different layers first."""
    fields = {"d_sae": D_SAE, "n_experts": 8, "active_experts": 3, "k": 4}
    metadata = SAEMetadata(hook_name=HOOK)
    plain = ScaleSAE(ScaleSAEConfig(d_in=D_MODEL, metadata=metadata, **fields))
    layers = [1, 2, 4]
    routed = RouteScaleSAE(RouteScaleSAEConfig(d_in=3 * D_MODEL, layers=layers, routing="random", **fields))
    return {"plain": randomize(plain), "routed": randomize(routed)}


@torch.no_grad()
def test_the_experts_that_a_router_selects(tiny_hooked: Any, tokens: torch.Tensor):
    saes = expert_saes()
    mask = tokens % 2 == 0
    mask[:, 0] = False
    use = expert_utilisation(saes, tiny_hooked, tokens, where=mask, batch_size=5, progress=False)
    x = tiny_hooked.run_with_cache(tokens, names_filter=HOOK)[1][HOOK][mask]
    # every sequence holds a token of the set, so that the one batch has the same random layers
    routed_x = saes["routed"].route(stack_of(tiny_hooked, saes["routed"], tokens), draw=0).input[mask]
    for name, read in (("plain", x), ("routed", routed_x)):
        sae = saes[name]
        logits = (read - sae.b_expert) @ sae.W_expert.T
        chosen = logits.topk(3).indices
        assert use[name].selected and use[name].experts_per_token == 3
        assert use[name].counts == tuple(chosen.flatten().bincount(minlength=8).tolist())
        active = {
            one.among(mask).name: one.among(mask) for one in read_token_set(saes, tiny_hooked, tokens, mask)
        }[name]
        inside = (active.latents.latent // 6)[:, None] == active.experts[active.latents.token]  # type: ignore[index]
        assert inside.any(1).all()  # no latent of an expert that was not selected


def test_selected_experts_by_hand():
    counter = ExpertCounter(6, 3)
    counter.add_selected(torch.tensor([[0, 2], [1, 2]]))
    counter.add_selected(torch.tensor([[0, 2]]))
    use = counter.result()
    assert (use.tokens, use.counts, use.order, use.selected) == (3, (2, 1, 3), (2, 0, 1), True)
    with pytest.raises(ValueError, match="counted apart"):
        counter.add(Latents.of(torch.ones(1, 6)), 1)
    with pytest.raises(ValueError, match="0 to 2, got 0 to 3"):
        counter.add_selected(torch.tensor([[0, 3]]))


def test_what_is_no_mapping(tiny_hooked: Any, tokens: torch.Tensor, unchecked: None):
    for function in (activation_similarity, expert_utilisation):
        with pytest.raises(ValueError, match="expected SAEs by name"):
            function(SimpleNamespace(), tiny_hooked, tokens, progress=False)  # type: ignore[arg-type]
