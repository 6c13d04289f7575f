"""Stopping and resuming: on CPU the end is the same, bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAEConfig
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from routesae_lens.saes.route_sae import RouteBatchTopKTrainingSAEConfig, RouteTopKTrainingSAEConfig
from routesae_lens.training.checkpoint import Checkpoints
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.train import TrainingResult, train

STEPS, BATCH = 24, 64


def token_rows(n: int = 60, context: int = 16, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"tokens": torch.randint(64, (n, context), generator=generator).tolist()})


def configs(model: HookedTransformer) -> dict[str, Any]:
    plain = TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4)
    plain.metadata.hook_name = "blocks.4.hook_resid_post"
    return {
        "route": RouteTopKTrainingSAEConfig.for_model(model, d_sae=48, k=4),
        "random": RouteBatchTopKTrainingSAEConfig.for_model(model, d_sae=48, k=4.0, routing="random"),
        "plain": plain,
    }


class Stop:
    """An evaluator that does not measure; it sends this process a signal after a given step."""

    def __init__(self, step: int | None, number: signal.Signals = signal.SIGINT):
        self.calls, self.step, self.number = 0, step, number

    def __call__(self, **_: Any) -> dict[str, float]:
        self.calls += 1
        torch.rand(3)  # an evaluator that draws random numbers must not change the training
        if self.calls == self.step:
            os.kill(os.getpid(), self.number)
        return {"evaluations": 1.0}


def run(model: HookedTransformer, output: Path, stop: Stop, **options: Any) -> TrainingResult:
    defaults: dict[str, Any] = {
        "training_tokens": STEPS * BATCH,
        "context_size": 16,
        "batch_size": BATCH,
        "lm_batch_size": 5,
        "unit_norm_every": 5,
        "log_every": 3,
        "eval_every": 1,
    }
    return train(model, configs(model), token_rows(), output=output, evaluator=stop, **defaults | options)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(output.glob("*/sae_weights.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture
def uninterrupted(tiny_hooked: HookedTransformer, tmp_path: Path) -> Path:
    """The data (15 x 60 tokens, 1.7 epochs) ends once during the run."""
    with pytest.warns(UserWarning, match="goes through it 1.7 times"):
        run(tiny_hooked, tmp_path / "whole", Stop(None))
    return tmp_path / "whole"


@pytest.mark.parametrize(
    ("stop_at", "options"),
    [
        (10, {}),
        (1, {"save_buffer": False}),
        (10, {"save_buffer": False}),
        (17, {"save_buffer": False}),
        (10, {"prefetch": 3}),
        (17, {"prefetch": True, "save_buffer": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:the data holds", "ignore:end of the data")
def test_an_interrupted_and_resumed_run_ends_like_an_uninterrupted_one(
    uninterrupted: Path, tiny_hooked: HookedTransformer, tmp_path: Path, stop_at: int, options: dict[str, Any]
):
    output = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match=f"SIGINT after step {stop_at} of 24") as stopped:
        run(tiny_hooked, output, Stop(stop_at), **options)
    assert stopped.value.checkpoint == Checkpoints(output / "checkpoints").latest()
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert not (output / "route").exists()

    torch.manual_seed(123)  # a new process does not have the old one's random state
    result = run(tiny_hooked, output, Stop(None), resume=True, **options)
    assert result.steps == STEPS
    expected, got = weights(uninterrupted), weights(output)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert (output / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
