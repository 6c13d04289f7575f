"""Interpretable features of an SAE whose activations are written down by hand, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from routesae_lens.analysis import features
from routesae_lens.analysis.feature_set import BlockActivity
from routesae_lens.analysis.features import collect_features
from routesae_lens.analysis.stream import Batch
from routesae_lens.analysis.subjects import Reading, Subject
from routesae_lens.saes.router import Route

WORDS = ["<s>", " The", " the", " cat", " Cat", " sat", ".", " on"]


class Words:
    """A tokenizer of eight words."""

    bos_token_id = 0

    def decode(self, ids, **kwargs):
        return "".join(WORDS[i] for i in ids)


# Two sequences; position 0 is BOS and is not kept. The second holds the end of one document and another one.
TOKENS = torch.tensor(
    [
        [0, 1, 3, 5, 7, 2],  # <s> The cat sat on the
        [0, 4, 5, 0, 3, 6],  # <s> Cat sat <s> cat .
    ]
)
# Activations of the kept tokens, in units of p = 1, by feature.
#        The  cat  sat  on  the | Cat  sat  cat   .
ACTS = {
    # classes the (20, 16), cat (18, 17, 19): the weakest "cat" goes, "sat" at 15 exactly is not above it: 4
    0: [20, 18, 15, 0, 16, 17, 0, 19, 0],
    # three contexts: too few
    1: [16, 16, 0, 0, 0, 0, 0, 0, 16],
    # one class three times, two kept, and one more class: three contexts, though four tokens are above
    2: [0, 16, 0, 0, 0, 18, 0, 17, 16],
    # ties: of four cats with 16 ... the two earliest are kept; four classes, five contexts
    3: [16, 16, 16, 0, 0, 16, 0, 16, 16],
    # fires, but never above the threshold
    4: [1, 2, 3, 4, 5, 6, 7, 8, 15],
    # never fires
    5: [0] * 9,
}
P = torch.tensor([0.5, 1.0, 0.25, 0.5, 0.5, 1.0, 0.5, 0.5, 0.25])
LAYER = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1, 1])
BLOCKS = [2, 5]


class HandWritten(Subject):
    """A routed subject whose latents are p times the numbers above."""

    layers = BLOCKS
    point = "point"
    replaces = ["point"]  # noqa: RUF012

    def __init__(self):
        self.sae = SimpleNamespace(
            cfg=SimpleNamespace(d_sae=len(ACTS)),
            dtype=torch.float32,
        )

    def read(self, activation, draw):
        acts, p, layer = activation[..., :-2], activation[..., -2], activation[..., -1].long()
        chosen = torch.nn.functional.one_hot(layer, 2) * p[..., None]
        return Reading(Route(chosen, layer, chosen, acts * p[..., None], p), layer, acts, acts)

    def encode(self, reading, keep):
        return reading.route.input[keep]


def run(monkeypatch, batch_size=1, **options):
    keep = TOKENS != 0
    activation = torch.zeros(2, 6, len(ACTS) + 2)
    columns = torch.tensor([ACTS[i] for i in ACTS], dtype=torch.float32).T
    activation[keep] = torch.cat([columns, P[:, None], LAYER[:, None]], 1)

    def batches(subjects, model, tokens, *, batch_size, **kwargs):
        for index, start in enumerate(range(0, len(tokens), batch_size)):
            rows = slice(start, start + batch_size)
            yield Batch(index, start, tokens[rows], keep[rows], {"point": activation[rows]}, None)

    monkeypatch.setattr(features, "subjects_of", lambda saes, model: {"hand": HandWritten()})
    monkeypatch.setattr(features, "read_batches", batches)
    model = SimpleNamespace(tokenizer=Words())
    options = {"relative": False, "progress": False, "batch_size": batch_size, **options}
    return collect_features({}, model, TOKENS, **options)["hand"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_papers_rule(monkeypatch, batch_size):
    result = run(monkeypatch, batch_size)
    assert result.count() == 2
    first, third = result.features
    assert (first.id, third.id) == (0, 3)
    assert [(c.token, c.token_class, c.activation) for c in first.contexts] == [
        (" The", "the", 20),
        (" cat", "cat", 19),
        (" cat", "cat", 18),
        (" the", "the", 16),
    ]
    assert first.tokens == ["the", "cat"]
    # All are 16: in the order of the text, and the third and fourth "cat" ("Cat" and the last one) ...
    assert [(c.sequence, c.position, c.token_class) for c in third.contexts] == [
        (0, 1, "the"),
        (0, 2, "cat"),
        (0, 3, "sat"),
        (1, 1, "cat"),
        (1, 5, "."),  # ... the last "cat" at (1, 4) is gone
    ]


def test_where_a_context_is(monkeypatch):
    contexts = {(c.sequence, c.position): c for c in run(monkeypatch).features[0].contexts}
    last_cat = contexts[1, 4]
    assert (last_cat.before, last_cat.token, last_cat.after) == ("", " cat", ".")
    assert (last_cat.document, last_cat.document_position) == (2, 1)  # the third BOS, and right after it
    assert (last_cat.block, last_cat.p, last_cat.token_id) == (5, 0.5, 3)
    first_cat = contexts[0, 2]
    assert (first_cat.before, first_cat.token, first_cat.after) == (" The", " cat", " sat on the")
    assert (first_cat.document, first_cat.document_position, first_cat.block) == (0, 2, 5)
    assert first_cat.p == 1.0 and first_cat.strength == first_cat.activation == 18


def test_the_length_of_a_context(monkeypatch):
    contexts = run(monkeypatch, context_tokens=3).features[0].contexts
    assert [(c.before, c.token, c.after) for c in contexts][2] == (" The", " cat", " sat")
    contexts = run(monkeypatch, context_tokens=2).features[0].contexts
    assert [(c.before, c.token, c.after) for c in contexts][2] == (" The", " cat", "")


def test_counts_over_all_tokens(monkeypatch):
    result = run(monkeypatch)
    assert result.tokens == 9
    assert result.firing_frequency.tolist() == pytest.approx([6 / 9, 3 / 9, 4 / 9, 6 / 9, 1, 0])
    assert result.max_activation.tolist() == [20, 16, 18, 16, 15, 0]
    assert result.layer_tokens == {2: 5, 5: 4}
    first = result.features[0]
    assert first.firing_frequency == pytest.approx(6 / 9) and first.max_activation == 20
    # block 2: The 20, sat 15, the 16, Cat 17 (and sat 0); block 5: cat 18, cat 19
    assert first.blocks == {2: BlockActivity(4, 3, 68 / 4), 5: BlockActivity(2, 2, 37 / 2)}


def test_other_thresholds_without_another_pass(monkeypatch):
    result = run(monkeypatch)
    # Feature 0 has four contexts down from 16 (strictly above), feature 3 likewise, feature 4 its 4th-strongest
    # class (cat 8, cat 6, sat 7, . 15, on 4, the 5): 15, 8, 7, 6 and so four contexts below 6.
    assert result.retained_below.tolist() == [16, 0, 0, 16, 6, 0]
    assert result.curve([5, 5.9, 6, 14, 15, 16, 17]) == [3, 3, 2, 2, 2, 0, 0]
    with pytest.raises(ValueError, match=r"collected above 5\.0.*got 4"):
        result.count(4)
    assert result.features_at(15.5)[0].contexts == result.features[0].contexts
    with pytest.raises(ValueError, match=r"text above the threshold 15"):
        result.features_at(6)
    assert run(monkeypatch, threshold=5.9).features[-1].tokens == [".", "cat", "sat"]


def test_feature_two_keeps_two_of_a_class(monkeypatch):
    two = {f.id: f for f in run(monkeypatch, min_contexts=3).features}[2]
    assert [(c.token_class, c.activation) for c in two.contexts] == [("cat", 18), ("cat", 17), (".", 16)]


def test_the_authors_variant(monkeypatch):
    assert [f.id for f in run(monkeypatch, min_contexts=5).features] == [3]
    # Feature 0 has two classes, feature 3 has four.
    assert [f.id for f in run(monkeypatch, max_token_classes=3).features] == [0]
    assert [f.id for f in run(monkeypatch, max_token_classes=4).features] == [0, 3]
    assert run(monkeypatch, max_token_classes=1).count() == 0
    # At a lower threshold "sat" joins the classes of feature 0.
    assert run(monkeypatch, max_token_classes=2).curve([14.9, 15]) == [0, 1]


def test_one_context_for_each_class(monkeypatch):
    result = run(monkeypatch, contexts_per_token=1, min_contexts=2)
    assert [c.activation for c in result.features[0].contexts] == [20, 19]


def test_activations_are_in_units_of_p_equal_to_one(monkeypatch):
    # The latents themselves are above 15 on two tokens alone, those with p = 1.
    result = run(monkeypatch)
    assert result.features[0].contexts[0].activation == 20  # the latent is 10 there
    assert result.features[0].contexts[0].p == 0.5


def test_a_relative_threshold(monkeypatch):
    """The SAE's input, in units of p = 1, is the column of activations itself here."""
    result = run(monkeypatch, relative=True, threshold=15.0, min_contexts=1)
    zero = {f.id: f for f in result.features}[0]
    strength = {(c.sequence, c.position): (c.activation, c.strength) for c in zero.contexts}
    norms = {
        (1, 1): (17**2 + 18**2 + 16**2 + 6**2) ** 0.5,
        (1, 4): (19**2 + 17**2 + 16**2 + 8**2) ** 0.5,
    }
    assert strength[1, 1] == (17, pytest.approx(17 * 2048**0.5 / norms[1, 1]))
    assert strength[1, 4] == (19, pytest.approx(19 * 2048**0.5 / norms[1, 4]))
    # The cat with 18 has so large an input (norm 33.1) that it is the weakest of its class.
    assert (0, 2) not in strength
