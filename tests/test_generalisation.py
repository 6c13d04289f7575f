"""Long contexts by position, conversations, and the same SAEs on related models."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from spliced import D_MODEL, make_sae, ordinary_sae
from spliced_crosscoders import make_crosscoder

from routesae_lens.analysis.evaluate import evaluate, evaluate_all
from routesae_lens.analysis.generalisation import _bins, evaluate_by_position, long_documents
from routesae_lens.analysis.model_comparison import compare_models
from routesae_lens.analysis.prompts import conversation_tokens
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.splice.replace import splice_hooks

HOOK = "blocks.2.hook_resid_post"
TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)
CHAT = [{"role": "user", "content": "The river?"}, {"role": "assistant", "content": "It was quiet."}]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (3, 32), generator=torch.Generator().manual_seed(0))


def three() -> dict[str, Any]:
    return {"plain": ordinary_sae(HOOK), "routed": make_sae(), "crosscoder": make_crosscoder()}


@pytest.fixture
def chatty(tiny_proxy: Any) -> Any:
    tiny_proxy.tokenizer.chat_template = TEMPLATE
    return tiny_proxy


# By position


@torch.no_grad()
def test_bins_are_as_by_hand(tiny_hooked: Any, tokens: torch.Tensor):
    sae = make_sae()
    profile = evaluate_by_position(
        {"sae": sae}, tiny_hooked, tokens, training_length=8, edges="doubling",
        exclude_special_tokens=False, batch_size=2, progress=False,
    )["sae"]  # fmt: skip
    assert [(one.start, one.end) for one in profile.bins] == [(0, 8), (8, 16), (16, 32)]
    assert (profile.tokens, profile.sequences, profile.length) == (3 * 31, 3, 32)
    clean, cache = tiny_hooked.run_with_cache(tokens)
    stack = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in sae.layers], -2)
    route, keep = sae.route(stack.flatten(-2)), torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    spliced = tiny_hooked.run_with_hooks(
        tokens, fwd_hooks=splice_hooks(sae, tiny_hooked, route, keep, scale_by_p=True)
    )
    log_p, log_q = clean.double().log_softmax(-1), spliced.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    losses = [
        -log[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1) for log in (log_p, log_q)
    ]  # of position i: what the token at i + 1 costs
    acts = sae.encode_routed(route.input)
    z_hat = (sae.decode(acts) / route.scale[..., None]).double()
    x = stack.gather(-2, route.layer[..., None, None].expand(-1, -1, 1, D_MODEL)).squeeze(-2).double()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
    z, x_hat = (x - mean) / std, z_hat * std + mean
    for one in profile.bins:
        here, result = slice(max(one.start, 1), one.end), one.evaluation
        assert result.tokens == 3 * (here.stop - here.start) and result.sequences == 3
        assert result.kl == pytest.approx(kl[:, here].mean().item(), rel=1e-4)
        per_sequence = kl[:, here].mean(-1)
        assert result.kl_stderr == pytest.approx((per_sequence.std() / 3**0.5).item(), rel=1e-3)
        ours, theirs = (loss[:, here] for loss in losses)  # (the last position predicts nothing)
        assert result.predicted == ours.numel()
        assert result.ce_clean == pytest.approx(ours.mean().item(), rel=1e-4)
        assert result.delta_ce == pytest.approx((theirs - ours).mean().item(), rel=1e-3, abs=1e-5)
        assert result.l0 == pytest.approx(acts[:, here].bool().double().sum(-1).mean().item())
        a, b, layer = z[:, here].flatten(0, 1), z_hat[:, here].flatten(0, 1), route.layer[:, here].flatten()
        assert result.norm_mse == pytest.approx(
            ((a - b).pow(2).sum(-1) / a.pow(2).sum(-1)).mean().item(), rel=1e-4
        )
        rest = sum((a[layer == i] - a[layer == i].mean(0)).pow(2).sum() for i in layer.unique())
        assert result.explained_variance == pytest.approx((1 - (a - b).pow(2).sum() / rest).item(), rel=1e-3)
        a, b = x[:, here], x_hat[:, here]
        uncentered = 1 - (a - b).pow(2).sum() / a.pow(2).sum()
        assert result.explained_variance_raw_uncentered == pytest.approx(uncentered.item(), rel=1e-3)
        assert result.ce_zero is None and result.loss_recovered is None


def test_one_bin_is_the_evaluation_and_bins_add_up_to_it(tiny_hooked: Any, tokens: torch.Tensor):
    options: dict[str, Any] = {"batch_size": 2, "progress": False}
    whole = evaluate_all(three(), tiny_hooked, tokens, zero_ablation=False, **options)
    one = evaluate_by_position(three(), tiny_hooked, tokens, training_length=8, edges=[0, 32], **options)
    four = evaluate_by_position(three(), tiny_hooked, tokens, training_length=8, **options)
    for name, expected in whole.items():
        got = one[name].bins[0].evaluation
        for metric, value in expected.to_dict().items():
            if isinstance(value, str | None):
                assert getattr(got, metric) == value
            else:
                assert getattr(got, metric) == pytest.approx(value, rel=1e-5), metric
        bins = [part.evaluation for part in four[name].bins]
        assert [part.end for part in four[name].bins] == [8, 16, 24, 32]
        assert sum(part.tokens for part in bins) == expected.tokens == four[name].tokens
        assert sum(part.predicted for part in bins) == expected.predicted
        for metric, weight in (
            ("kl", "tokens"),
            ("l0", "tokens"),
            ("norm_mse", "tokens"),
            ("delta_ce", "predicted"),
        ):
            total = sum(getattr(part, metric) * getattr(part, weight) for part in bins)
            assert total / getattr(expected, weight) == pytest.approx(getattr(expected, metric), rel=1e-4)


def test_a_bin_that_some_sequences_have_nothing_in(tiny_hooked: Any, tokens: torch.Tensor):
    tokens[0, 16:] = 60
    profile = evaluate_by_position(
        {"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens, training_length=16,
        exclude_special_tokens=[60], progress=False,
    )["sae"]  # fmt: skip
    late = profile.bins[1].evaluation
    assert late.tokens == 2 * 16 and profile.tokens == 3 * 15 + 2 * 16
    alone = evaluate_by_position(
        {"sae": ordinary_sae(HOOK)}, tiny_hooked, tokens[1:], training_length=16, progress=False,
    )["sae"]  # fmt: skip
    for metric in ("kl", "norm_mse", "explained_variance", "delta_ce"):
        assert getattr(late, metric) == pytest.approx(getattr(alone.bins[1].evaluation, metric), rel=1e-5)
    with pytest.raises(ValueError, match="every token at positions 16 to 31 is special or at position 0"):
        evaluate_by_position(
            {"sae": ordinary_sae(HOOK)},
            tiny_hooked,
            tokens[:1],
            training_length=16,
            exclude_special_tokens=[60],
        )


@pytest.mark.parametrize(
    ("edges", "trained", "length", "expected"),
    [
        ("equal", 10, 32, [(0, 10), (10, 20), (20, 30), (30, 32)]),
        ("equal", 4, 64, [(i, i + 4) for i in range(0, 64, 4)]),  # 16 times the training length
        ("doubling", 4, 64, [(0, 4), (4, 8), (8, 16), (16, 32), (32, 64)]),
        ("doubling", 4, 20, [(0, 4), (4, 8), (8, 16), (16, 20)]),
        ([0, 3, 7], 4, 20, [(0, 3), (3, 7)]),
        ([5, 7], 100, 20, [(5, 7)]),
    ],
)
def test_bins(edges: Any, trained: int, length: int, expected: list[tuple[int, int]]):
    assert _bins(edges, trained, length) == expected


def test_the_training_length_is_what_the_sae_says(tiny_hooked: Any, tokens: torch.Tensor):
    saes = three()
    with pytest.raises(ValueError, match=r"they say .*'plain': None.*: give training_length"):
        evaluate_by_position(saes, tiny_hooked, tokens)
    for sae in saes.values():
        sae.cfg.metadata.context_size = 16
    profiles = evaluate_by_position(saes, tiny_hooked, tokens, progress=False)
    assert [one.end for one in profiles["routed"].bins] == [16, 32]
    rows = profiles["plain"].rows()
    assert [(row["start"], row["end"], row["training_lengths"]) for row in rows] == [(0, 16, 1), (16, 32, 2)]
    assert rows[1]["kl"] == profiles["plain"].bins[1].evaluation.kl
    written = json.loads(json.dumps(profiles["plain"].to_dict(), allow_nan=False))
    assert written["training_length"] == 16 and written["bins"][1]["norm_mse"] == rows[1]["norm_mse"]
    saes["plain"].cfg.metadata.context_size = 8
    with pytest.raises(ValueError, match=r"'plain': 8, 'routed': 16.*give training_length"):
        evaluate_by_position(saes, tiny_hooked, tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training_length": 32}, "sequences of 32 tokens are not longer than the training length, 32"),
        ({"training_length": 0}, "training_length must be 1 or more, got 0"),
        ({"edges": "log"}, "edges must be 'equal', 'doubling' or a list of positions, got 'log'"),
        (
            {"edges": [0, 4, 4]},
            r"ascending positions between 0 and the sequences' length, 32; got \[0, 4, 4\]",
        ),
        ({"edges": [0, 33]}, r"got \[0, 33\]"),
        ({"edges": [4]}, r"got \[4\]"),
        ({"edges": [0, 1]}, "every token at positions 0 to 0 is special or at position 0"),
    ],
)
def test_bad_bins(tiny_hooked: Any, tokens: torch.Tensor, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate_by_position({"sae": make_sae()}, tiny_hooked, tokens, **{"training_length": 8} | options)


def test_longer_than_the_models_context(tiny_hooked: Any, tokens: torch.Tensor):
    with pytest.raises(ValueError, match="sequences of 64 tokens exceed the model's context of 32"):
        evaluate_by_position({"sae": make_sae()}, tiny_hooked, tokens.repeat(1, 2), training_length=8)
    with pytest.raises(ValueError, match="sequences of 33 tokens exceed the model's context of 32"):
        long_documents(tiny_hooked, iter(()), length=33)


# Long documents


def test_long_documents_are_cut_and_short_ones_counted(tiny_proxy: Any):
    text = "The river was quiet, and the boats lay still. " * 4
    ids = tiny_proxy.tokenizer(text, add_special_tokens=False)["input_ids"]
    documents = [text, "Short.", list(range(3, 35)), torch.arange(3, 34), text[::-1]]
    found = long_documents(tiny_proxy, documents, length=32)
    assert found.skipped == 2 and found.tokens.shape == (3, 32)
    assert found.tokens[0].tolist() == [tiny_proxy.tokenizer.bos_token_id, *ids[:31]]
    assert found.tokens[1].tolist() == list(range(3, 35))  # ids stay as they are: 31 of them are too few
    assert found.to_dict() == {"documents": 3, "length": 32, "skipped": 2}
    two = long_documents(tiny_proxy, iter(documents), length=32, n_documents=2)
    assert two.skipped == 1 and torch.equal(two.tokens, found.tokens[:2])


def test_bad_documents(tiny_proxy: Any, tiny_hooked: Any):
    with pytest.raises(ValueError, match="0 of 2 documents have 32 tokens or more; 1 are asked for"):
        long_documents(tiny_proxy, ["Short.", [3, 4]], length=32)
    with pytest.raises(ValueError, match="1 of 2 documents have 8 tokens or more; 2 are asked for"):
        long_documents(tiny_proxy, [list(range(3, 20)), [3, 4]], length=8, n_documents=2)
    with pytest.raises(ValueError, match="no tokenizer; give token ids"):
        long_documents(tiny_hooked, ["A text."], length=8)
    with pytest.raises(ValueError, match="between 0 and 63, got 100 to 107"):
        long_documents(tiny_hooked, [list(range(100, 110))], length=8)
    for options in ({"length": 1}, {"length": 8, "n_documents": 0}):
        with pytest.raises(ValueError, match="must be"):
            long_documents(tiny_hooked, [], **options)


# Conversations


def test_conversations_through_the_template(chatty: Any):
    tokenizer = chatty.tokenizer
    found = conversation_tokens(chatty, [CHAT, "It lay still.", CHAT[:1]], context_size=48)
    texts = tokenizer.batch_decode(found.tokens)
    assert texts[0].startswith("<s>user: The river?</s>\nassistant: It was quiet.</s>")
    assert texts[1].startswith("<s>user: Write a text.</s>\nassistant: It lay")
    assert "bot:" not in "".join(texts)  # finished, so nobody is asked to answer
    assert texts[2].startswith("<s>user: The river?</s>\n")
    lengths = (found.tokens != tokenizer.pad_token_id).sum(-1)
    assert lengths.max() == found.tokens.shape[1] and found.filling == int((lengths.max() - lengths).sum())
    assert set(found.exclude) >= set(tokenizer.all_special_ids)
    assert found.truncated == 0
    cut = conversation_tokens(chatty, iter([CHAT, CHAT[:1]]), context_size=20, n_conversations=2)
    assert cut.truncated == 1 and torch.equal(cut.tokens[0], found.tokens[0, :20])
    assert cut.to_dict() == {
        "conversations": 2, "tokens": int(lengths[[0, 2]].clamp(max=20).sum()), "truncated": 1,
    }  # fmt: skip


def test_special_tokens_of_the_template_are_excluded(chatty: Any):
    chatty.tokenizer.add_special_tokens(
        {"additional_special_tokens": ["t"]}
    )  # (one that the model has a row for)
    turn = chatty.tokenizer.convert_tokens_to_ids("t")
    found = conversation_tokens(chatty, [CHAT], context_size=64)
    assert turn in found.exclude
    assert (found.tokens == turn).any()
    result = evaluate(
        ordinary_sae(HOOK), chatty, found.tokens, exclude_special_tokens=found.exclude, progress=False
    )
    special = torch.isin(found.tokens, torch.tensor(found.exclude))
    assert special[0, 0] and result.tokens == int((~special).sum())
    by_default = evaluate(ordinary_sae(HOOK), chatty, found.tokens, progress=False)
    assert by_default.tokens == result.tokens + int((found.tokens == turn).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_filling_up_changes_nothing(tiny_llama_dir: Any, backend: str):
    model = load_model(tiny_llama_dir, backend, device="cpu")
    model.tokenizer.chat_template = TEMPLATE
    chats = [CHAT, CHAT[:1]]
    together = conversation_tokens(model, chats, context_size=64)
    assert together.filling
    saes = three()
    filled = evaluate_all(
        saes, model, together.tokens, exclude_special_tokens=together.exclude, progress=False
    )
    alone = []
    for chat in chats:
        one = conversation_tokens(model, [chat], context_size=64)
        assert not one.filling
        alone.append(
            evaluate_all(saes, model, one.tokens, exclude_special_tokens=one.exclude, progress=False)
        )
    for name in saes:
        tokens = [results[name].tokens for results in alone]
        assert filled[name].tokens == sum(tokens)
        for metric in ("kl", "l0", "norm_mse"):
            mean = sum(getattr(r[name], metric) * n for r, n in zip(alone, tokens, strict=True)) / sum(tokens)
            assert getattr(filled[name], metric) == pytest.approx(mean, rel=1e-4), (name, metric)


def test_bad_conversations(chatty: Any, tiny_hooked: Any):
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        conversation_tokens(tiny_hooked, [CHAT], context_size=16)
    with pytest.raises(ValueError, match="exceed the model's context of 64"):
        conversation_tokens(chatty, [CHAT], context_size=65)
    with pytest.raises(ValueError, match="0 conversations were given, 1 or more are asked for"):
        conversation_tokens(chatty, [], context_size=16)
    with pytest.raises(ValueError, match="1 conversations were given, 3 or more"):
        conversation_tokens(chatty, [CHAT], context_size=16, n_conversations=3)
    with pytest.raises(ValueError, match="conversation 1: expected turns such as"):
        conversation_tokens(chatty, [CHAT, [{"role": "user"}]], context_size=16)
    for options in ({"context_size": 1}, {"context_size": 16, "n_conversations": 0}):
        with pytest.raises(ValueError, match="must be"):
            conversation_tokens(chatty, [CHAT], **options)
    chatty.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ValueError, match="conversation 0: the chat template refuses these turns: no such"):
        conversation_tokens(chatty, [CHAT], context_size=16)
    chatty.tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"the tokenizer '.*tiny-llama.*' has no chat template"):
        conversation_tokens(chatty, [CHAT], context_size=16)


@pytest.mark.parametrize("document", [None, {"text": "A text."}, [1.5] * 9, [[3] * 9], [True] * 9])
def test_documents_that_are_none(tiny_hooked: Any, document: Any, unchecked: None):
    with pytest.raises(ValueError, match="expected a text or a row of token ids as a document, got"):
        long_documents(tiny_hooked, [document], length=8)
    with pytest.raises(ValueError, match="expected a list of documents, got one text"):
        long_documents(tiny_hooked, "A text.", length=8)


def test_a_list_of_models(tiny_hooked: Any, tokens: torch.Tensor, unchecked: None):
    with pytest.raises(ValueError, match="two or more models by name, got list"):
        compare_models({"sae": make_sae()}, [tiny_hooked, tiny_hooked], tokens)  # type: ignore[arg-type]


def test_bad_conversations_unchecked(chatty: Any, unchecked: None):
    with pytest.raises(ValueError, match="expected a list of conversations, got str"):
        conversation_tokens(chatty, "Hello", context_size=16)


# Related models


@pytest.fixture
def relatives(tiny_hooked: Any) -> dict[str, Any]:
    instruct = copy.deepcopy(tiny_hooked)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in instruct.parameters():
            weights.add_(0.3 * weights.std() * torch.randn(weights.shape, generator=generator))
    return {"base": tiny_hooked, "instruct": instruct}


def test_the_same_saes_on_both_models(relatives: dict[str, Any], tokens: torch.Tensor):
    saes = three()
    found = compare_models(saes, relatives, tokens, zero_ablation=False, progress=False)
    for name, model in relatives.items():
        expected = evaluate_all(saes, model, tokens, zero_ablation=False, progress=False)
        for sae in saes:
            assert found.evaluations[name][sae].to_dict() == expected[sae].to_dict()
    assert found.evaluations["base"]["plain"].kl != found.evaluations["instruct"]["plain"].kl
    rows = found.rows()
    assert [(row["sae"], row["model"]) for row in rows] == [
        (sae, model) for sae in saes for model in ("base", "instruct")
    ]
    assert rows[1]["delta_ce"] == found.evaluations["instruct"]["plain"].delta_ce
    assert rows[0]["tokens"] == rows[1]["tokens"] == 3 * 31
    assert all(isinstance(value, int | float | str | None) for row in rows for value in row.values())
    assert json.loads(json.dumps(found.to_dict()))["base"]["plain"]["l0"] == rows[0]["l0"]


def test_the_same_tokens_count_on_models_of_any_backend(tiny_llama_dir: Any, tokens: torch.Tensor):
    models = {backend: load_model(tiny_llama_dir, backend, device="cpu") for backend in BACKENDS[:2]}
    models[BACKENDS[0]].tokenizer.eos_token = "t"  # special to the one alone
    turn = models[BACKENDS[0]].tokenizer.convert_tokens_to_ids("t")
    tokens[1, 5] = turn
    rows = compare_models({"sae": make_sae()}, models, tokens, progress=False).rows()
    n = int((tokens[:, 1:] != turn).sum())
    assert n < 3 * 31 and [row["tokens"] for row in rows] == [n, n]
    assert rows[0]["kl"] == pytest.approx(rows[1]["kl"], rel=2e-3)


def test_models_that_do_not_fit(relatives: dict[str, Any], tiny_llama_dir: Any, tokens: torch.Tensor):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    saes = {"sae": make_sae()}
    with pytest.raises(ValueError, match=r"two or more models by name, got \['base'\]"):
        compare_models(saes, {"base": relatives["base"]}, tokens)
    cfg = dict(n_ctx=32, d_head=8, n_heads=2, d_mlp=16, act_fn="gelu", seed=0, device="cpu")
    other = HookedTransformer(HookedTransformerConfig(n_layers=7, d_model=16, d_vocab=80, **cfg))
    with pytest.raises(
        ValueError,
        match=r"do not fit each other: d_model \(base: 32, other: 16\); n_layers \(base: 6, other: 7\); "
        r"vocabulary \(base: 64, other: 80\)",
    ):
        compare_models(saes, {"base": relatives["base"], "other": other}, tokens)
    one, two = (load_model(tiny_llama_dir, device="cpu") for _ in range(2))
    ours = one.tokenizer.convert_ids_to_tokens(50)

    class Renamed:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["<tool>" if i == 50 else one.tokenizer.convert_ids_to_tokens(i) for i in ids]

    two.tokenizer = Renamed()
    tokens[0, 3] = 50
    with pytest.raises(ValueError, match=r"token 50 \(base: .*" + repr(ours) + r".*, instruct: '<tool>'\)"):
        compare_models(saes, {"base": one, "instruct": two}, tokens)
    with pytest.raises(ValueError, match="between 0 and 63"):
        compare_models(saes, relatives, tokens + 60)
