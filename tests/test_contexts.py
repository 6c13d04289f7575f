"""The streaming rule against the paper's min-heaps in a Python loop; text of any kind around any token."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from routesae_lens.analysis import contexts as contexts_module
from routesae_lens.analysis.contexts import (
    ContextRows,
    PassageReader,
    TextClasses,
    TopContexts,
    strongest_first,
    token_texts,
)
from routesae_lens.analysis.feature_set import FeatureRule
from routesae_lens.analysis.features import _limits


def naive(strengths, classes, threshold, per_class=2, minimum=4, cap=None):
    """The paper's rule, a min-heap for every token class of every feature: {feature: contexts, strongest first}.

    strengths: (token, feature) as nested lists; classes: of each token.
    """
    heaps = defaultdict(lambda: defaultdict(list))
    for token, row in enumerate(strengths):
        for feature, strength in enumerate(row):
            if strength > threshold:
                heap = heaps[feature][classes[token]]
                heapq.heappush(heap, (strength, -token))
                if len(heap) > per_class:
                    heapq.heappop(heap)
    found = {}
    for feature, by_class in sorted(heaps.items()):
        kept = sorted((-strength, -minus) for heap in by_class.values() for strength, minus in heap)
        if len(kept) >= minimum and (cap is None or len(by_class) <= cap):
            found[feature] = [(token, -minus) for minus, token in kept]
    return found


@st.composite
def streams(draw):
    n_tokens, n_features = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    # Few different values, so that ties and values on the threshold are common.
    row = st.lists(st.integers(0, 8), min_size=n_features, max_size=n_features)
    strengths = draw(st.lists(row, min_size=n_tokens, max_size=n_tokens))
    classes = draw(st.lists(st.integers(0, 5), min_size=n_tokens, max_size=n_tokens))
    return strengths, classes


@settings(max_examples=80, deadline=None)
@given(
    stream=streams(),
    threshold=st.integers(2, 6),
    per_class=st.integers(1, 3),
    minimum=st.integers(1, 5),
    cap=st.none() | st.integers(1, 4),
    shown=st.none() | st.integers(5, 8),
    batch=st.integers(1, 41),
    pending=st.sampled_from([0, 7, 10**6]),
)
def test_equals_the_naive_loop_at_every_threshold(
    stream, threshold, per_class, minimum, cap, shown, batch, pending
):
    strengths, classes = stream
    rule = FeatureRule(threshold, False, 1, per_class, minimum, cap, shown)
    values, of_class = torch.tensor(strengths, dtype=torch.float64), torch.tensor(classes)
    n_features = values.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts_module, "PENDING_ROWS", pending)
        store = TopContexts(
            n_features, 6, above=rule.lowest, per_class=per_class, per_feature=rule.held_per_feature
        )
        for start in range(0, len(values), batch):
            part = values[start : start + batch]
            token, feature = (part > store.floor).nonzero(as_tuple=True)
            strength = part[token, feature]
            nothing = torch.zeros_like(strength)
            place = token + start
            store.add(ContextRows(feature, of_class[place], strength, strength, place, token * 0, nothing))
    rows = store.rows()
    assert rows is not None
    retained, crowded = _limits(rows, rule, n_features, 6)
    for level in range(1, 8):
        expected = naive(strengths, classes, level, per_class, minimum, cap)
        found = ((retained > level) & ~(crowded > level)).nonzero().flatten().tolist()
        assert found == list(expected)
        for feature in found:
            mine = (rows.feature == feature) & (rows.strength > level)
            contexts = list(zip(rows.token[mine].tolist(), rows.strength[mine].tolist(), strict=True))
            limit = rule.held_per_feature or len(expected[feature])
            assert contexts == expected[feature][:limit]


def test_the_strongest_come_first_and_equal_ones_in_order():
    values = [1.0, 5e-324, float("inf"), 2.5, 1.0, 1.0 + 2**-52, 2.5, 1e300, 2.2e-308]
    strength = torch.tensor(values, dtype=torch.float64)
    assert strongest_first(strength).tolist() == sorted(range(9), key=lambda i: -values[i])


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(contexts_module, "PENDING_ROWS", 500)
    generator = torch.Generator().manual_seed(0)
    store = TopContexts(20, 1000, above=0.0, per_class=2, per_feature=8)
    held = []
    for batch in range(300):
        strength = torch.rand(50, 20, generator=generator, dtype=torch.float64)
        classes = torch.randint(0, 1000, (50,), generator=generator)
        token, feature = (strength > store.floor).nonzero(as_tuple=True)
        value = strength[token, feature]
        store.add(
            ContextRows(feature, classes[token], value, value, token + 50 * batch, token * 0, value * 0)
        )
        held.append(store.held)
    # 300,000 activations went by; the 160 best and one batch and what waits are held.
    assert max(held) <= 20 * 8 + 50 * 20 + 500
    assert max(held[250:]) <= max(held[:50])
    assert len(store.rows().feature) == 160


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every byte is a token of its own, but for a few pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0} | {piece: i + 1 for i, piece in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


class Passage(NamedTuple):
    before: str
    token: str
    after: str
    document: int
    document_position: int


def passages_of(tokens, tokenizer, context_tokens):
    """The passage around every token."""
    reader = PassageReader(tokens, tokenizer, token_texts(tokens, tokenizer), context_tokens)
    return [Passage(*row) for row in zip(*reader.read(torch.arange(tokens.numel())), strict=True)]


HOSTILE = "<script>alert('x')</script> \u202eright to left\u202c **bold** 😀👩‍👩‍👧 naïve\u2028 \x00 日本 ▁|⟨⟩"


def test_hostile_text_comes_back_whole(byte_tokenizer):
    ids = byte_tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[0, *ids]])
    passages = passages_of(tokens, byte_tokenizer, 1000)
    encoded = HOSTILE.encode()
    assert len(ids) == len(encoded)
    for at in range(len(ids)):
        passage = passages[at + 1]
        assert passage.before + passage.token + passage.after == HOSTILE
        # The whole character that the byte belongs to, and the text before it.
        start = at
        while encoded[start] & 0xC0 == 0x80:
            start -= 1
        assert passage.before == encoded[:start].decode()
        assert len(passage.token) == 1
    assert passages[0].token == "<s>" and passages[0].after == HOSTILE


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_short_contexts_do_not_cut_characters(byte_tokenizer, size):
    ids = byte_tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    passages = passages_of(torch.tensor([[0, *ids]]), byte_tokenizer, size)
    for at in range(1, len(ids) + 1):
        passage = passages[at]
        text = passage.before + passage.token + passage.after
        assert "�" not in text and text in HOSTILE and passage.token


@pytest.fixture
def asked(monkeypatch):
    """The tokens, counted in their document, whose passage the tokenizer was asked for."""
    seen = []
    split = PassageReader._split

    def counting(self, ids, at):
        seen.append(at)
        return split(self, ids, at)

    monkeypatch.setattr(PassageReader, "_split", counting)
    return seen


def join_whole_sequences(tokens, tokenizer, texts, progress=None):
    """Only of sequences that decode to what their tokens do one by one are the texts known to be right."""
    pieces = [texts[i] for i in tokens.flatten().tolist()]
    ends = torch.tensor([0, *itertools.accumulate(map(len, pieces))])
    unsafe = [
        tokenizer.decode(row, clean_up_tokenization_spaces=False) != "".join(texts[i] for i in row)
        for row in tokens.tolist()
    ]
    counts = torch.tensor([0, *itertools.accumulate(bad for bad in unsafe for _ in range(tokens.shape[1]))])
    return contexts_module._Joined("".join(pieces), ends, counts, torch.zeros_like(ends, dtype=torch.bool))


def check_joined(monkeypatch, tokens, tokenizer, size):
    """Joined pieces are what the tokenizer says of every passage on its own."""
    fast = passages_of(tokens, tokenizer, size)
    with monkeypatch.context() as patch:
        patch.setattr(contexts_module, "_join", join_whole_sequences)
        assert fast == passages_of(tokens, tokenizer, size)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 64])
def test_pieces_joined_are_what_the_tokenizer_decodes(byte_tokenizer, monkeypatch, asked, size):
    rows = [
        byte_tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("one, two  3", "naïve 日本", "x“y” 😀👩‍👧z", HOSTILE)
    ]
    tokens = torch.tensor([[0, *row[:5], 0, *row[5:10]] for row in rows])
    check_joined(monkeypatch, tokens, byte_tokenizer, size)
    asked.clear()
    passages_of(tokens[:1], byte_tokenizer, size)
    assert asked == []
    # Of <s> n a ï(two bytes) v, only what cuts the character is asked for (places count from after the BOS).
    passages_of(tokens[1:2, :6], byte_tokenizer, 64)
    assert asked == [2, 3]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), size=st.integers(1, 12))
def test_pieces_joined_of_bytes_that_are_no_text(byte_tokenizer, monkeypatch, data, size):
    # BOS, letters, and bytes that begin or continue characters of two, three and four bytes, "�" one of them.
    ids = [0, *byte_tokenizer("A é“😀�", add_special_tokens=False)["input_ids"]]
    row = st.lists(st.sampled_from(ids), min_size=14, max_size=14)
    tokens = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    check_joined(monkeypatch, tokens, byte_tokenizer, size)


def test_a_character_cut_by_the_end_of_the_sequence(byte_tokenizer):
    ids = byte_tokenizer("ab😀", add_special_tokens=False)["input_ids"]
    passages = passages_of(torch.tensor([[0, *ids[:4]]]), byte_tokenizer, 64)
    for at in (3, 4):
        assert passages[at].before == "ab" and passages[at].token == "�"


def test_documents(byte_tokenizer):
    text = {c: byte_tokenizer(c)["input_ids"][-1] for c in "abcdef"}
    a, b, c, d, e, f = text.values()
    tokens = torch.tensor([[0, a, b, 0], [c, d, 0, e], [0, f, a, b]])
    passages = passages_of(tokens, byte_tokenizer, 64)
    seen = {
        (place // 4, place % 4): (p.document, p.document_position, p.before + "|" + p.token + "|" + p.after)
        for place in range(12)
        if tokens.flatten()[place] != 0
        for p in [passages[place]]
    }
    assert seen == {
        (0, 1): (0, 1, "|a|b"),
        (0, 2): (0, 2, "a|b|"),
        (1, 0): (1, 1, "|c|d"),  # its BOS ends the sequence before
        (1, 1): (1, 2, "c|d|"),
        (1, 3): (2, 1, "|e|"),
        (2, 1): (3, 1, "|f|ab"),
        (2, 2): (3, 2, "f|a|b"),
        (2, 3): (3, 3, "fa|b|"),
    }
    without = passages_of(torch.tensor([[a, b], [c, d]]), byte_tokenizer, 64)
    assert [(p.document, p.document_position) for p in without] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


def test_a_text_that_begins_inside_a_document(byte_tokenizer):
    a, b, c = (byte_tokenizer(letter)["input_ids"][-1] for letter in "abc")
    passages = passages_of(torch.tensor([[a, b, 0], [0, c, b]]), byte_tokenizer, 64)
    seen = [(p.document, p.document_position, p.before, p.token, p.after) for p in passages]
    assert seen == [
        (0, 0, "", "a", "b"),  # no BOS: the first token is text
        (0, 1, "a", "b", ""),
        (1, 0, "", "<s>", ""),
        (2, 0, "", "<s>", "cb"),
        (2, 1, "", "c", "b"),
        (2, 2, "c", "b", ""),
    ]


def test_token_classes(tiny_proxy):
    tokenizer = tiny_proxy.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in ("T", "t", "Ġt", "Ġ", "Ċ", "!")]
    assert None not in ids
    classes = TextClasses(token_texts(torch.tensor([ids]), tokenizer))
    numbers = classes(torch.tensor(ids))
    assert [classes.names[i] for i in numbers] == ["t", "t", "t", "", "", "!"]
