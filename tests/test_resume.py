"""Stopping and resuming: on CPU the end is the same, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import TopKTrainingSAEConfig
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from routesae_lens.saes.architectures import RouteBatchTopKTrainingSAEConfig, RouteTopKTrainingSAEConfig
from routesae_lens.training.checkpoint import DATA_FILE, Checkpoints
from routesae_lens.training.interruption import Interruption, TrainingInterrupted
from routesae_lens.training.train import TrainingResult, train

STEPS, BATCH = 24, 64


pytestmark = [
    pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"),
]


def tiny_model(seed: int = 0) -> HookedTransformer:
    """A fresh one for every run, as in a new process."""
    sizes: dict[str, Any] = {
        "n_layers": 6,
        "d_model": 32,
        "n_ctx": 32,
        "d_head": 8,
        "n_heads": 4,
        "d_mlp": 64,
    }
    config = HookedTransformerConfig(d_vocab=64, act_fn="gelu", seed=seed, device="cpu", **sizes)
    return HookedTransformer(config).eval()


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
    defaults |= {"sae_configs": configs(model), "dataset": token_rows()}
    return train(model, output=output, evaluator=stop, **defaults | options)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(output.glob("*/sae_weights.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole run. Its data (15 x 60 tokens, 1.7 epochs) ends once on the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole") / "run"
    with pytest.warns(UserWarning, match="goes through it 1.7 times"):
        run(tiny_model(), output, Stop(None))
    torch.set_num_threads(before)
    return output


@pytest.mark.parametrize(
    ("stop_at", "options"),
    [
        (10, {}),
        (1, {"save_buffer": False}),
        (10, {"save_buffer": False}),
        (17, {"save_buffer": False}),  # in the second epoch, with tokens of the first still in the buffer
        (10, {"prefetch": 3}),
        (17, {"prefetch": True, "save_buffer": False}),
    ],
)
def test_an_interrupted_and_resumed_run_ends_like_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path, stop_at: int, options: dict[str, Any]
):
    output = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match=f"SIGINT after step {stop_at} of 24") as stopped:
        run(tiny_model(), output, Stop(stop_at), **options)
    assert stopped.value.checkpoint == Checkpoints(output / "checkpoints").latest()
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert not (output / "route").exists()
    assert ("data.acts" in load_file(stopped.value.checkpoint / DATA_FILE)) == options.get(
        "save_buffer", True
    )

    torch.manual_seed(123)  # a new process does not have the old one's random state
    result = run(tiny_model(), output, Stop(None), resume=True, **options)
    assert result.steps == STEPS
    assert_same_run(output, uninterrupted)
    assert json.loads((output / "run.json").read_text())["status"] == "finished"


def assert_same_run(output: Path, expected: Path) -> None:
    """Weights and log are the same, bit for bit."""
    ours, theirs = weights(output), weights(expected)
    assert ours.keys() == theirs.keys() and len(ours) > 12
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert (output / "log.jsonl").read_text() == (expected / "log.jsonl").read_text()


def test_a_run_that_died_resumes_from_its_last_checkpoint(uninterrupted: Path, tmp_path: Path):
    class Dies(Stop):
        def __call__(self, **_: Any) -> dict[str, float]:
            if self.calls == 12:
                raise BrokenPipeError("died")
            return super().__call__()

    with pytest.raises(BrokenPipeError) as died:
        run(tiny_model(), tmp_path / "run", Dies(None), checkpoint_every=5)
    assert "step_00000013" in died.value.__notes__[0]
    # As if that one could not be written either: three logged steps are now ahead of the last checkpoint.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000013")
    (tmp_path / "run" / "checkpoints" / ".partial_step_00000013").mkdir()
    run(tiny_model(), tmp_path / "run", Stop(None), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning(uninterrupted: Path, tmp_path: Path):
    class Killed(Stop):
        def __call__(self, **_: Any) -> dict[str, float]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model(), tmp_path / "run", Killed(None))
    run(tiny_model(), tmp_path / "run", Stop(None), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_scale_estimated_from_data_is_kept(tmp_path: Path):
    """SAELens draws the batches for it before the first step; they belong to the data position."""

    def scaled(output: Path, stop: Stop, **options: Any) -> dict[str, torch.Tensor]:
        cfg = TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4, normalize_activations="expected_average_only_in")
        cfg.metadata.hook_name = "blocks.4.hook_resid_post"
        run(tiny_model(), output, stop, sae_configs={"scaled": cfg}, **options)
        return weights(output)

    expected = scaled(tmp_path / "whole", Stop(None))
    with pytest.raises(TrainingInterrupted):
        scaled(tmp_path / "stopped", Stop(9), prefetch=2, save_buffer=False)
    got = scaled(tmp_path / "stopped", Stop(None), prefetch=2, save_buffer=False, resume=True)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(TrainingInterrupted):
        run(tiny_model(), output, Stop(5))
    return output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3}, "another run:\n  lr: checkpoint 0.0005, now 0.001"),
        ({"batch_size": 32}, "train_batch_size_tokens: checkpoint 64, now 32"),
        ({"dataset": token_rows(seed=1)}, "the data is not the text that the checkpoint was trained on"),
        ({"seed": 1}, "seeds.plain: checkpoint 0, now 1"),
        (
            {"sae_configs": {"route": RouteTopKTrainingSAEConfig(d_in=96, d_sae=64, k=4, layers=[1, 2, 3])}},
            r"saes.route.d_sae: checkpoint 48, now 64",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    stopped: Path, tmp_path: Path, options: dict[str, Any], message: str
):
    output = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run(tiny_model(), output, Stop(None), resume=True, **options)
    assert (output / "log.jsonl").read_bytes() == (stopped / "log.jsonl").read_bytes()


def test_a_checkpoint_of_another_model_is_refused(stopped: Path, tmp_path: Path):
    output = shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(ValueError, match=r"probe\.blocks"):
        run(tiny_model(seed=1), output, Stop(None), resume=True)


def test_a_damaged_checkpoint_is_named(stopped: Path, tmp_path: Path):
    output = shutil.copytree(stopped, tmp_path / "run")
    (output / "checkpoints" / "step_00000005" / DATA_FILE).write_bytes(b"broken")
    with pytest.raises(ValueError, match="step_00000005 is no readable checkpoint"):
        run(tiny_model(), output, Stop(None), resume=True)


def test_nothing_in_a_checkpoint_needs_code_to_load(stopped: Path):
    files = [file for file in (stopped / "checkpoints" / "step_00000005").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json", ".pt"}
    for file in files:
        if file.suffix == ".pt":
            torch.load(file, weights_only=True)


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)

    def whole(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")

    def full_disk(name: str) -> None:
        whole(name)
        raise OSError(28, "No space left on device")

    for step in (1, 2, 3):
        checkpoints.save(step, whole)
    with pytest.raises(OSError, match="No space") as error:
        checkpoints.save(4, full_disk)
    assert "last complete checkpoint: " + str(tmp_path / "step_00000003") in error.value.__notes__[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


# --- Signals ------------------------------------------------------------------------------------------------


def test_handlers_come_back_and_a_second_signal_stops_at_once():
    before = [signal.getsignal(number) for number in Interruption.SIGNALS]
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt, match="second signal"):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in Interruption.SIGNALS] == before
    assert not issubclass(TrainingInterrupted, Exception)


def test_outside_the_main_thread_no_handler_is_set(tmp_path: Path):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(run, tiny_model(), tmp_path / "run", Stop(None)).result().steps == STEPS
