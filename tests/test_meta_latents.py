"""What latents are made of: activations worked by hand, explained variance by the naive formula, the file."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from meta_saes import M, planted
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, JumpReLUSAE, JumpReLUSAEConfig
from torch.nn.functional import normalize

from routesae_lens.analysis import meta_latents as module
from routesae_lens.analysis.meta_latents import MetaLatents, decoder_rows, meta_latents
from routesae_lens.saes.forms import inference_form

ROWS = torch.tensor(
    [
        [0.6, 0.8, 0.0],  # latent 0: meta-latents 1 (0.8) and 0 (0.6)
        [10.0, 0.0, 0.0],  # 1: meta-latent 0 alone, whatever its norm
        [0.0, 0.0, 0.0],  # 2: no direction
        [0.8, 0.6, 0.0],  # 3: 0 (0.8) and 1 (0.6)
        [0.0, 0.0, -1.0],  # 4: nothing
        [0.48, 0.6, 0.64],  # 5: 2 (0.64), 1 (0.6), 0 (0.48)
    ]
)


def axes(d_meta: int = 4, **metadata: Any) -> JumpReLUSAE:
    """A meta-SAE whose meta-latents 0, 1, 2 are the axes, active above 0.4; 3 is dead."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=3, d_sae=d_meta))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(d_meta, 3))
        sae.W_enc.copy_(torch.eye(3, d_meta))
        sae.threshold.fill_(0.4)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    return sae


def pairs(found: list[Any]) -> list[Any]:
    return [tuple(round(x, 5) for x in one) for one in found]


@pytest.fixture
def found() -> MetaLatents:
    return meta_latents(SimpleNamespace(W_dec=ROWS), axes(), progress=False)


def test_meta_latents_worked_by_hand(found: MetaLatents):
    assert found.latents.tolist() == [0, 1, 3, 4, 5] and (found.d_sae, found.d_meta) == (6, 4)
    assert {latent: pairs(found.of(latent)) for latent in found.latents.tolist()} == {
        0: [(1, 0.8), (0, 0.6)],
        1: [(0, 1.0)],
        3: [(0, 0.8), (1, 0.6)],
        4: [],
        5: [(2, 0.64), (1, 0.6), (0, 0.48)],
    }
    assert pairs(found.latents_of(0)) == [(1, 1.0), (3, 0.8), (0, 0.6), (5, 0.48)]
    assert pairs(found.latents_of(2)) == [(5, 0.64)] and found.latents_of(3) == []
    assert found.counts.tolist() == [4, 3, 1, 0] and found.dead.tolist() == [3]
    assert found.l0 == (2 + 1 + 2 + 0 + 3) / 5


def test_what_latents_share(found: MetaLatents):
    assert pairs(found.shared(0, 5)) == [(1, 0.8, 0.6), (0, 0.6, 0.48)]
    assert pairs(found.shared(5, 0)) == [(1, 0.6, 0.8), (0, 0.48, 0.6)]
    assert found.shared(0, 4) == []
    # two in common with 3 (0.48 + 0.48) and with 5 (0.48 + 0.288), one with 1 (0.6)
    assert pairs(found.sharing(0)) == [(3, 2, 0.96), (5, 2, 0.768), (1, 1, 0.6)]
    assert pairs(found.sharing(0, 1)) == [(3, 2, 0.96)]
    assert found.sharing(4) == []


def test_sharing_is_what_comparing_every_pair_gives():
    sae, _, _ = planted()
    sae.W_dec = sae.W_dec[:80]
    cfg = BatchTopKTrainingSAEConfig(d_in=32, d_sae=M, k=3.0)
    torch.manual_seed(0)
    meta = BatchTopKTrainingSAE(cfg)
    meta.topk_threshold.fill_(0.001)
    found = meta_latents(sae, meta, progress=False)
    acts = torch.zeros(80, M, dtype=torch.float64)
    for latent in range(80):
        for number, value in found.of(latent):
            acts[latent, number] = value
    assert 2 < found.l0 < M / 2
    counts, overlap = (acts > 0).double() @ (acts > 0).double().T, acts @ acts.T
    for latent in (0, 17, 79):
        others = [i for i in range(80) if i != latent and counts[latent, i]]
        expected = sorted(others, key=lambda i: (-counts[latent, i], -overlap[latent, i]))
        assert [i for i, _, _ in found.sharing(latent, 80)] == expected
        assert [n for _, n, _ in found.sharing(latent, 80)] == [counts[latent, i] for i in expected]


@pytest.mark.parametrize("at_once", [1, 7, 2048])
def test_explained_variance_is_that_of_the_naive_formula(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", at_once)
    sae, _, _ = planted()
    sae.W_dec = sae.W_dec[:60]
    torch.manual_seed(1)
    meta = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=32, d_sae=M, k=3.0))
    torch.nn.init.normal_(meta.b_dec, std=0.02)
    meta.topk_threshold.fill_(0.001)
    stock = inference_form(meta)
    rows = normalize(sae.W_dec, dim=-1)
    acts = stock.encode(rows)
    out = stock.decode(acts)
    naive = 1 - ((rows - out) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    for one in (stock, meta):  # the training form, whose BatchTopK looks at other rows, is not used as it is
        found = meta_latents(sae, one, progress=False)
        assert found.explained_variance == pytest.approx(naive.item(), abs=1e-6)
        assert found.l0 == (acts > 0).sum().item() / 60
        assert found.of(11)[0] == (int(acts[11].argmax()), pytest.approx(acts[11].max().item(), abs=1e-6))


def test_rows_are_read_as_in_training():
    sae = SimpleNamespace(W_dec=ROWS)
    raw = meta_latents(sae, axes(unit_rows=False), progress=False)
    assert pairs(raw.of(1)) == [(0, 10.0)]
    some = meta_latents(sae, axes(), latents=[5, 1], progress=False)
    assert some.latents.tolist() == [1, 5] and some.d_sae == 6
    with pytest.raises(ValueError, match="latent 0 was not analysed; 2 of the 6 latents were"):
        some.of(0)
    mask = torch.tensor([True, False, True, True, False, False])
    numbers, rows = decoder_rows(sae, mask, unit=False)
    assert numbers.tolist() == [0, 3] and torch.equal(rows, ROWS[[0, 3]])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another SAE": ({"sae": SimpleNamespace(W_dec=torch.ones(4, 5))}, "have 5 numbers, the meta-SAE reads 3"),
    "no variance": ({"sae": SimpleNamespace(W_dec=torch.ones(4, 3))}, "all equal"),
    "frequencies": ({"latents": torch.rand(6)}, r"got torch.float32 of shape \(6,\) .*frequency > 0"),
    "beyond": ({"latents": [0, 6]}, "different numbers of 0 to 5, one or more"),
    "twice": ({"latents": [0, 0]}, "different numbers of 0 to 5"),
    "none": ({"latents": torch.zeros(0, dtype=torch.long)}, "one or more"),
    "nobody alive": ({"latents": [2]}, "no latent is left"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str):
    changed, message = REFUSED[case]
    options = {"sae": SimpleNamespace(W_dec=ROWS), **changed}
    with pytest.raises(ValueError, match=message):
        meta_latents(options.pop("sae"), axes(), progress=False, **options)


def test_questions_without_an_answer(found: MetaLatents):
    for latent in (2, 6, -1):
        with pytest.raises(ValueError, match=f"latent {latent} was not analysed"):
            found.of(latent)
    for number in (4, -1):
        with pytest.raises(ValueError, match=f"expected a meta-latent, 0 to 3, got {number}"):
            found.latents_of(number)
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        found.sharing(0, 0)


def test_the_record_comes_back_the_same(found: MetaLatents):
    again = MetaLatents.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    assert [again.of(i) for i in (0, 5)] == [found.of(i) for i in (0, 5)]
    assert again.sharing(0) == found.sharing(0) and again.activations.dtype == torch.float32


DAMAGED: dict[str, dict[str, Any]] = {
    "short": {"activations": [0.5]},
    "beyond": {"meta": [9] * 8},
    "order": {"latents": [1, 0, 3, 4, 5]},
    "starts": {"starts": [0, 5, 3, 5, 5, 8]},
    "no start": {"starts": []},
    "not finite": {"activations": [float("inf")] * 8},
    "width": {"d_sae": 3},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_is_refused(case: str, found: MetaLatents):
    with pytest.raises(ValueError, match="do not fit each other"):
        MetaLatents.from_dict(found.to_dict() | DAMAGED[case])
