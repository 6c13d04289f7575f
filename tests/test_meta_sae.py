"""Training meta-SAEs: known meta-directions are found again, seeds, the file, stopping and going on, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crosscoders
import pytest
import routed_saes
import torch
from meta_saes import D, M, N, planted
from sae_lens import SAE, JumpReLUSAE, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor
from torch.nn.functional import normalize

from routesae_lens.analysis.meta_latents import meta_latents
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.log import TrainingLog
from routesae_lens.training.meta_sae import META, DecoderRows, train_meta_sae

SHORT: dict[str, Any] = {"d_sae": 5, "k": 2, "steps": 6, "batch_size": 8}


def small(n: int = 24, d: int = 6, seed: int = 0) -> Any:
    return SimpleNamespace(W_dec=torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def weights(sae: SAE[Any]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("seed", [0, 1])
def test_known_meta_directions_are_found_again(seed: int):
    sae, directions, has = planted(seed)
    meta = train_meta_sae(sae, d_sae=M + 4, k=2, steps=600, batch_size=256, lr=1e-2, seed=seed)
    cosines = directions @ normalize(meta.W_dec, dim=-1).T
    assert cosines.amax(dim=-1).mean() > 0.98
    found = meta_latents(sae, meta, progress=False)
    assert found.explained_variance > 0.98
    assert len(found.dead) == 4  # those there was no direction for
    # Every row is named by the very meta-latents that its directions became.
    became = cosines.argmax(dim=-1).tolist()
    right = sum(
        {meta for meta, _ in found.of(i)} == {became[j] for j in row.nonzero().flatten()}
        for i, row in enumerate(has)
    )
    assert right > 0.95 * N


def test_the_threshold_lets_k_through_on_the_rows():
    sae = small(200, 12)
    meta = train_meta_sae(sae, d_sae=20, k=1.7, steps=20, batch_size=64)
    # (SAELens' running mean has after 20 steps come 18 % of the way from 0, and lets 5 through)
    assert meta_latents(sae, meta, progress=False).l0 == pytest.approx(1.7, abs=2 / 200)


def test_a_seed_decides_the_weights_and_nothing_outside():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (weights(train_meta_sae(small(), seed=seed, **SHORT)) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, again) and not equal(first, other)
    # The norms of the rows play no part, unless they are asked for.
    scaled = SimpleNamespace(W_dec=small().W_dec * torch.linspace(0.5, 9, 24)[:, None])
    assert torch.allclose(
        weights(train_meta_sae(scaled, seed=7, **SHORT))["W_dec"], first["W_dec"], atol=1e-5
    )
    raw = weights(train_meta_sae(scaled, seed=7, unit_rows=False, **SHORT))
    assert not torch.allclose(raw["W_dec"], first["W_dec"], atol=1e-2)


def test_the_file_is_an_ordinary_sae_of_saelens(tmp_path: Path):
    meta = train_meta_sae(small(), output=tmp_path / "m", **SHORT)
    loaded = SAE.load_from_disk(tmp_path / "m")
    assert type(loaded) is type(meta) is JumpReLUSAE
    assert json.loads((tmp_path / "m" / "cfg.json").read_text())["architecture"] == "jumprelu"
    assert equal(weights(loaded), weights(meta))
    assert loaded.cfg.metadata.unit_rows is True
    rows = normalize(small().W_dec, dim=-1)
    assert torch.equal(loaded(rows), meta(rows))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "cfg.json", "log.jsonl", "run.json", "sae_weights.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "m" / "run.json").read_text())["status"] == "finished"
    lines = [line for line in TrainingLog(tmp_path / "m" / "log.jsonl").read() if "meta/metrics/l0" in line]
    assert [(line["step"], line["tokens"]) for line in lines] == [(i, 8 * i) for i in range(1, 7)]
    assert all(line["meta/metrics/l0"] == 2.0 for line in lines)
    for resume in (False, True):
        with pytest.raises(FileExistsError):
            train_meta_sae(small(), output=tmp_path / "m", resume=resume, **SHORT)


def stopping_after(n: int) -> Callable[[DecoderRows], dict[str, Tensor]]:
    given, draw = 0, DecoderRows.__next__

    def next_batch(self: DecoderRows) -> dict[str, Tensor]:
        nonlocal given
        given += 1
        if given == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    return next_batch


def test_a_stopped_run_goes_on_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = weights(train_meta_sae(small(), output=tmp_path / "whole", **SHORT))
    with monkeypatch.context() as patch:
        patch.setattr(DecoderRows, "__next__", stopping_after(4))
        with pytest.raises(TrainingInterrupted, match="after step 4 of 6") as stop:
            train_meta_sae(small(), output=tmp_path / "two", **SHORT)
    assert stop.value.checkpoint.is_dir()
    assert not (tmp_path / "two" / "cfg.json").exists()
    assert json.loads((tmp_path / "two" / "run.json").read_text())["status"] == "interrupted"
    for changed in ({"lr": 0.1}, {"seed": 1}):
        with pytest.raises(ValueError, match=f"another run:\n  {next(iter(changed))}"):
            train_meta_sae(small(), output=tmp_path / "two", resume=True, **SHORT, **changed)
    with pytest.raises(ValueError, match="another run:\n  rows_crc32"):
        train_meta_sae(small(seed=1), output=tmp_path / "two", resume=True, **SHORT)
    assert equal(weights(train_meta_sae(small(), output=tmp_path / "two", resume=True, **SHORT)), whole)
    assert equal(weights(SAE.load_from_disk(tmp_path / "two")), whole)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "two")]
    assert logs[0] == logs[1]
    shutil.rmtree(tmp_path / "two")
    assert equal(weights(train_meta_sae(small(), output=tmp_path / "two", resume=True, **SHORT)), whole)


def test_every_row_comes_once_per_epoch_and_the_order_can_be_saved():
    rows = torch.arange(10.0)[:, None]
    stream = DecoderRows(rows, 4, seed=0)
    drawn = torch.cat([next(stream)[META] for _ in range(5)]).flatten().tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    other = DecoderRows(rows, 4, seed=1)
    next(stream)
    other.load_state_dict(stream.state_dict())
    for _ in range(5):
        assert torch.equal(next(stream)[META], next(other)[META])


def expert_sae() -> Any:
    from routesae_lens.saes.experts import ScaleTrainingSAE, ScaleTrainingSAEConfig

    return ScaleTrainingSAE(ScaleTrainingSAEConfig(d_in=10, d_sae=24, k=3, n_experts=4, active_experts=2))


KINDS: dict[str, tuple[Callable[[], Any], int]] = {
    "plain": (lambda: TopKTrainingSAE(TopKTrainingSAEConfig(d_in=10, d_sae=24, k=3)), 10),
    "route": (lambda: routed_saes.make("batchtopk"), routed_saes.D_MODEL),
    "crosscoder": (lambda: crosscoders.make("topk"), 3 * routed_saes.D_MODEL),
    "experts": (expert_sae, 10),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_sae_has_a_meta_sae(kind: str):
    make, width = KINDS[kind]
    sae = make()
    before = sae.W_dec.detach().clone()
    meta = train_meta_sae(sae, **SHORT)
    assert meta.cfg.d_in == width and torch.equal(sae.W_dec, before)
    found = meta_latents(sae, meta, progress=False)
    assert found.latents.tolist() == list(range(24)) and found.l0 == pytest.approx(2, abs=0.1)


def test_the_default_width_has_the_papers_ratio():
    assert train_meta_sae(small(128), k=1, steps=1).cfg.d_sae == 6  # 128 * 2304 / 49152
    with pytest.raises(ValueError, match="k = 4 latents per token cannot be active in an SAE with d_sae = 1"):
        train_meta_sae(small(24), steps=1)


def with_nan() -> Any:
    sae = small()
    sae.W_dec[3, 2] = float("nan")
    return sae


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no decoder": ({"sae": object()}, "expected an SAE with a decoder W_dec, got object"),
    "not finite": ({"sae": with_nan()}, "not finite"),
    "no direction": ({"sae": SimpleNamespace(W_dec=torch.zeros(24, 6))}, "no latent is left"),
    "too wide": ({"d_sae": 24}, "too few rows: 24 decoder rows cannot train 24 meta-latents"),
    "few alive": ({"latents": torch.arange(24) < 5}, "too few rows: 5 decoder rows"),
    "batch": ({"batch_size": 25}, "too few rows: 24 .* in batches of 25"),
    "k": ({"k": 6}, "k = 6 .* d_sae = 5"),
    "no k": ({"k": 0}, "k must be a positive number"),
    "little k": ({"k": 0.1}, "less than one in a batch of 8 rows"),
    "d_sae": ({"d_sae": 0}, "d_sae must be an integer, 1 or more; got 0"),
    "steps": ({"steps": 2.5}, "steps must be an integer, 1 or more; got 2.5"),
    "lr": ({"lr": -1.0}, "lr must be positive and finite, got -1.0"),
    "schedule": ({"schedule": "no"}, "unknown schedule 'no'; known: paper"),
    "device": ({"device": "quux"}, "unknown device 'quux'"),
    "resume": ({"resume": True}, "need a folder: give output"),
    "mask": ({"latents": torch.ones(7, dtype=torch.bool)}, "the mask has 7 entries, the SAE 24 latents"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_at_once(case: str, unchecked: None, tmp_path: Path):
    changed, message = REFUSED[case]
    options = {"sae": small(), "output": None if case == "resume" else tmp_path / "m", **SHORT, **changed}
    with pytest.raises(ValueError, match=message):
        train_meta_sae(options.pop("sae"), **options)
    assert not (tmp_path / "m").exists()


def test_rows_that_explode_stop_the_run(tmp_path: Path):
    sae = SimpleNamespace(W_dec=small(d=D).W_dec * 1e25)
    with pytest.raises(FloatingPointError, match="stopped at training step 1: SAE 'meta'"):
        train_meta_sae(sae, unit_rows=False, output=tmp_path / "m", **SHORT)
    assert not (tmp_path / "m" / "cfg.json").exists()
