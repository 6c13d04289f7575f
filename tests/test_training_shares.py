"""Shares of the layers in training: read from logs that train() wrote, unfinished or wrong ones too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from routesae_lens.analysis.routing import training_shares
from routesae_lens.saes.architectures import RouteTopKTrainingSAEConfig
from routesae_lens.training.train import train


@pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of the data")
def test_shares_in_a_log_that_train_wrote(tiny_hooked, tmp_path: Path):
    from datasets import Dataset

    rows = torch.randint(64, (60, 16), generator=torch.Generator().manual_seed(0)).tolist()
    configs = {
        name: RouteTopKTrainingSAEConfig.for_model(tiny_hooked, layers=[1, 2, 4], d_sae=48, k=4, **options)
        for name, options in {"a": {}, "fixed": {"routing": "fixed", "fixed_layer": 2}}.items()
    }
    result = train(
        tiny_hooked,
        configs,
        Dataset.from_dict({"tokens": rows}),
        output=tmp_path / "run",
        training_tokens=12 * 32,
        context_size=16,
        batch_size=32,
        log_every=5,
    )
    shares = training_shares(result.log, "a")
    assert list(shares.columns) == ["step", "tokens", 1, 2, 4]
    assert shares["step"].tolist() == [1, 5, 10, 12]
    assert shares["tokens"].tolist() == [32, 160, 320, 384]
    assert shares[[1, 2, 4]].sum(axis=1).tolist() == pytest.approx([1] * 4)
    fixed = training_shares(str(result.log), "fixed", [2, 4])
    assert fixed[2].tolist() == [1] * 4 and fixed[4].tolist() == [0] * 4


def line(step: int, **shares: float) -> dict[str, Any]:
    keys = {f"a/metrics/layer_share/{block[1:]}": share for block, share in shares.items()}
    return {"step": step, "tokens": 32 * step} | keys


def test_lines_without_shares_are_left_out():
    lines = [line(1, b1=0.25, b12=0.75), {"step": 1, "tokens": 32, "a/eval/layer_share/1": 9.0}]
    shares = training_shares([*lines, line(3, b1=1.0, b12=0.0)], "a")
    assert shares.to_dict("list") == {"step": [1, 3], "tokens": [32, 96], 1: [0.25, 1.0], 12: [0.75, 0.0]}


def test_a_line_that_is_still_being_written(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    whole = json.dumps(line(1, b1=1.0)) + "\n"
    path.write_text(whole + whole[:20])
    assert len(training_shares(path, "a")) == 1
    path.write_text(whole + whole[:20] + "\n")
    with pytest.raises(ValueError, match=r"log.jsonl, line 2 is no JSON"):
        training_shares(path, "a")


def test_bad_logs(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no file"):
        training_shares(tmp_path / "none.jsonl", "a")
    with pytest.raises(ValueError, match=r"no layer shares of 'b'; it has those of: \['a'\]"):
        training_shares([line(1, b1=1.0)], "b")
    with pytest.raises(ValueError, match="those of: none"):
        training_shares([], "b")
    with pytest.raises(ValueError, match=r"shares of blocks \[1\], not of \[3\]"):
        training_shares([line(1, b1=1.0)], "a", [1, 3])
