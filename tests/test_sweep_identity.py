"""A folder belongs to one sweep: the same settings, model and texts; and what damaged files say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sweeps import files, ids, rows, run, tiny_model

from routesae_lens.hook_points import mount_layers, mounted_points
from routesae_lens.models import load_model
from routesae_lens.training.sweep import SweepResult
from routesae_lens.training.sweep_identity import check_same_sweep, probe_model, text_fingerprint

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data", "ignore:frozen at training"
)
SMALL: dict[str, Any] = {"methods": ["route", "topk"], "sparsities": {}, "seeds": [0]}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished sweep of two members."""
    output = tmp_path_factory.mktemp("sweep") / "small"
    run(output, **SMALL)
    return output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 1e-3, "k": [3]},
            r"config.k: there \[2\], now \[3\]\n  config.lr: there 0.0005, now 0.001",
        ),
        ({"held_out": ids(4, 2)}, "held_out.sha256: there"),
        ({"model": tiny_model(seed=1)}, r"probe.1: there 1.18\d+, now 0.95\d+\n  probe.2"),
        ({"dataset": rows(seed=5)}, "text.sha256: there"),
        ({"dataset": rows(61)}, "text.rows: there 60, now 61"),
        ({"resume": False}, "already holds a sweep"),
    ],
)
def test_an_output_of_another_config_is_refused(small: Path, changes: dict[str, Any], message: str):
    before = files(small)
    with pytest.raises(FileExistsError, match=message):
        run(small, **SMALL | changes)
    assert files(small) == before


def test_a_folder_of_something_else_is_refused_and_a_refused_sweep_leaves_none(tmp_path: Path):
    (tmp_path / "results").mkdir()
    with pytest.raises(FileExistsError, match="holds results of something else"):
        run(tmp_path)
    with pytest.raises(ValueError, match="one training batch needs 4096"):
        run(tmp_path / "other", training_tokens=4096, batch_size=4096)
    run(tmp_path / "other", methods=["topk"], k=[2], seeds=[0], sparsities={})  # not "another sweep"


@pytest.mark.parametrize("missing", [("probe",), ("probe", "text")])
def test_a_folder_written_before_the_fingerprints_is_read_and_continued(
    small: Path, missing: tuple[str, ...]
):
    path, before = small / "sweep.json", files(small)
    whole = path.read_text()
    sheet = json.loads(whole)
    for part in missing:
        del sheet["about"][part]
    path.write_text(json.dumps(sheet))
    assert len(SweepResult.read(small).results) == 2
    assert run(small, **SMALL).identity == sheet["identity"]
    assert files(small) == before
    path.write_text(whole)


def test_a_probe_may_differ_in_its_last_digits(small: Path):
    about = json.loads((small / "sweep.json").read_text())["about"]
    near = about | {"probe": {layer: value * 1.005 for layer, value in about["probe"].items()}}
    far = about | {"probe": {layer: value * 1.05 for layer, value in about["probe"].items()}}
    check_same_sweep(small, near, about)
    with pytest.raises(FileExistsError, match=r"probe\.0: there"):
        check_same_sweep(small, far, about)


def test_a_local_model_is_the_same_by_any_path(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for source in (str(tiny_llama_dir), os.path.relpath(tiny_llama_dir, tmp_path)):
        run(tmp_path / "sweep", model=load_model(source, backend="huggingface"), **SMALL)
    sheet = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert sheet["about"]["model"]["name"] == tiny_llama_dir.name
    sheet["about"]["model"]["name"] = str(tiny_llama_dir)  # as it was written before
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sheet))
    run(tmp_path / "sweep", model=load_model(str(tiny_llama_dir), backend="huggingface"), **SMALL)
    sheet["about"]["model"]["name"] = "tiny-other"
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(sheet))
    with pytest.raises(FileExistsError, match=r"model\.name: there 'tiny-other', now 'tiny-llama"):
        run(tmp_path / "sweep", model=load_model(str(tiny_llama_dir), backend="huggingface"), **SMALL)


def test_the_probe_is_the_root_mean_square_of_every_block(tiny_hooked: Any):
    _, cache = tiny_hooked.run_with_cache(torch.arange(8)[None])
    assert probe_model(tiny_hooked) == pytest.approx(
        {str(i): float((cache[f"blocks.{i}.hook_resid_post"] ** 2).mean() ** 0.5) for i in range(6)}
    )
    assert mounted_points(tiny_hooked) == []
    point = mount_layers(tiny_hooked, range(6))
    probe_model(tiny_hooked)
    assert mounted_points(tiny_hooked) == [point]


def test_a_text_is_known_by_its_words_and_not_by_where_it_lies(tmp_path: Path):
    words = [f"document {i}" for i in range(200)]
    same = Dataset.from_dict({"text": words, "source": ["a"] * 200})
    known = text_fingerprint(Dataset.from_dict({"text": words}))
    assert known["rows"] == 200
    assert text_fingerprint(same) == known == text_fingerprint(same.with_format("numpy"))
    assert text_fingerprint(Dataset.from_dict({"text": ["another", *words[1:]]})) != known
    assert text_fingerprint(Dataset.from_dict({"text": words[:199]})) != known
    streamed = text_fingerprint(same.to_iterable_dataset())
    assert streamed["rows"] is None
    assert streamed == text_fingerprint(Dataset.from_dict({"text": words}).to_iterable_dataset())


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sweep.json", "{}", "it lacks identity, about, members"),
        ("sweep.json", "{", "is damaged"),
        ("sweep.json", "[1]", "expected values by name, got list"),
        ("sweep.json", '{"identity": "", "about": 3, "members": []}', "its 'about' lacks config"),
        (
            "sweep.json",
            '{"identity": "", "about": {"config": {}, "model": {}, "saes": {}}, "members": []}',
            "training_tokens",
        ),
        ("results/topk-k2-seed0.json", "{}", "it lacks name, status"),
        ("results/topk-k2-seed0.json", "", "is damaged"),
        ("training/run.json", "{", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(small: Path, file: str, text: str, message: str):
    whole = (small / file).read_text()
    (small / file).write_text(text)
    try:
        with pytest.raises(ValueError, match=f"{file}.*{message}"):
            print(SweepResult.read(small).results)
        if message != "training_tokens":
            with pytest.raises(ValueError, match=f"{file}.*{message}"):
                run(small, **SMALL)
    finally:
        (small / file).write_text(whole)
