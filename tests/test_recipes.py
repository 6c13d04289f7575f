"""The recipes, in small: the quickstart from text to table, and what keeps the shipped text free of repetition."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import typer
from recipe_modules import recipe

from routesae_lens.demo import demo_text_path


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [
        {"text": f"The river {i} was quiet; {i * i} boats lay still in harbour {i % 7}. " * 3}
        for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_quickstart(tiny_llama_dir, text, tmp_path, capsys):
    options = {
        "model": str(tiny_llama_dir),
        "dataset": str(text),
        "tokens": 1500,
        "eval_tokens": 120,
        "context_size": 16,
        "batch_size": 64,
        "expansion": 2,
        "k": 4,
        "seeds": 2,
        "held_out_documents": 10,
        "output": tmp_path / "run",
    }
    quickstart = recipe("quickstart")
    quickstart.main(**options)
    written = json.loads((tmp_path / "run/results.json").read_text())
    assert set(written["results"]) == {f"{m}-seed{s}" for m in quickstart.METHODS for s in (0, 1)}
    assert written["training_tokens"] == 1500 // 64 * 64
    assert written["run"]["versions"]["sae-lens"] and written["run"]["seeds"]["TopK-seed1"] == 1
    route = written["results"]["RouteSAE-seed0"]
    assert sum(route["layer_share"].values()) == pytest.approx(1) and 90 < route["tokens"] <= 120
    assert route["kl_unscaled"] is not None and written["results"]["TopK-seed0"]["layer_share"] == {"3": 1.0}
    for plot in ("training_curves.png", "layer_shares.png"):
        assert (tmp_path / "run" / plot).read_bytes().startswith(b"\x89PNG")
    assert "KL (nats/token)" in capsys.readouterr().out

    # once more: nothing is trained again, and the numbers are the same
    log = (tmp_path / "run/log.jsonl").read_text()
    quickstart.main(**options)
    again = json.loads((tmp_path / "run/results.json").read_text())
    with pytest.raises(typer.BadParameter, match="holds a run with k=4; choose another --output"):
        quickstart.main(**options | {"k": 5})
    assert "holds a finished run" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run/log.jsonl").read_text() == log
    assert again["results"]["RouteSAE-seed0"]["kl"] == pytest.approx(route["kl"], rel=1e-4)


def test_shipped_text_is_deduplicated_and_small():
    rows = pd.read_parquet(demo_text_path())
    assert demo_text_path().stat().st_size < 3_000_000
    assert rows["text"].is_unique and rows["prompt"].is_unique and rows["topic"].nunique() > 50
    assert rows["text"].str.len().sum() > 2_000_000  # over half a million tokens


def test_deduplicated():
    deduplicated = recipe("sample_text").deduplicated
    words = " ".join(f"word{i}" for i in range(80))
    lines, shingles = set(), set()
    assert deduplicated(words, lines, shingles) == words
    assert deduplicated(words, lines, shingles) is None  # the same line again
    assert deduplicated("a new start\n" + words[5:], lines, shingles) is None  # mostly seen before
    assert deduplicated("too short", lines, shingles) is None
    assert deduplicated("again and " * 100, lines, shingles) is None  # repeats itself
