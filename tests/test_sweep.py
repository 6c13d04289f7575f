"""A sweep: one training for all members, and results that appear as they come."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from sweeps import CONFIG, files, ids, run, tiny_model

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.training import sweep as sweep_module
from routesae_lens.training.checkpoint import Checkpoints
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.log import TrainingLog
from routesae_lens.training.sweep import SweepResult
from routesae_lens.training.sweep_config import SweepConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data", "ignore:frozen at training"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a sweep that nothing interrupted."""
    output = tmp_path_factory.mktemp("sweep") / "whole"
    run(output)
    return output


# --- What it trains and writes ----------------------------------------------------------------------------


def test_all_members_are_trained_and_evaluated_as_they_would_be_alone(whole: Path):
    result = SweepResult.read(whole)
    names = [member.name for member in result.members]
    assert len(names) == 2 * (1 + 1 + 2 + 1 + 1)
    assert names[0] == "route-k2-seed0" and "relu-l10.5-seed1" in names
    assert result.trained and result.diverged == {} and result.training_tokens == 448
    assert list(result.results) == names
    with result.csv.open() as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert list(lines) == names
    saes = {name: SAE.load_from_disk(whole / "training" / name) for name in names}
    assert saes["topk-k4-seed1"].cfg.k == 4 and saes["crosscoder_topk-k3-seed0"].cfg.layers == [1, 2, 4]
    expected = evaluate_all(saes, tiny_model(), ids(4, 1), batch_size=2, progress=False)
    for name, evaluation in expected.items():
        for metric in ("kl", "delta_ce", "loss_recovered", "norm_mse", "l0", "dead_latents"):
            assert float(lines[name][metric]) == getattr(evaluation, metric), (name, metric)
        assert {
            layer: float(lines[name][f"layer_share/{layer}"]) for layer in evaluation.layer_share
        } == evaluation.layer_share
        stored = result.results[name]
        assert stored["tokens"] == evaluation.tokens and stored["status"] == "evaluated"
        assert stored["versions"]["sae-lens"] and stored["sweep"] == result.identity
    assert (lines["topk-k2-seed1"]["sparsity_kind"], lines["topk-k2-seed1"]["seed"]) == ("k", "1")


def test_rules_that_need_their_own_form_are_evaluated(tmp_path: Path):
    result = run(tmp_path, methods=["mlsae", "distilled", "plain_topk"], seeds=[3], sparsities={}, k=[3])
    assert result.load("mlsae-k3-seed3").cfg.routing == "random"
    assert result.load("mlsae-k3-seed3").cfg.route_seed == 3
    assert result.load("distilled-k3-seed3").cfg.routing == "distilled"
    assert all(record["kl"] > 0 for record in result.results.values()) and len(result.results) == 3


def test_seeds_give_other_weights_and_the_same_tokens(whole: Path):
    first, second = (
        load_file(whole / "training" / f"topk-k4-seed{seed}" / "sae_weights.safetensors") for seed in (0, 1)
    )
    assert not torch.equal(first["W_enc"], second["W_enc"])
    record = json.loads((whole / "training" / "run.json").read_text())
    assert record["seeds"]["topk-k4-seed1"] == 1
    assert len(record["config"]["saes"]) == 12  # one run for all


# --- Stopped and continued --------------------------------------------------------------------------------


def kill_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    append, calls = TrainingLog.append, []

    def stopping(self: TrainingLog, step: int, *args: Any) -> None:
        append(self, step, *args)
        calls.append(step)
        if step == 10 and calls.count(10) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingLog, "append", stopping)


def kill_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopping(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "train", stopping)


def kill_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def stopping(saes: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate_all(saes, *args, **options)

    monkeypatch.setattr(sweep_module, "evaluate_all", stopping)


def kill_between_files(monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = sweep_module.write_whole, []

    def stopping(path: Path, text: str) -> None:
        calls.append(path)
        if path.name.startswith("topk-k2"):
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(sweep_module, "write_whole", stopping)


@pytest.mark.parametrize(
    "kill", [kill_before_training, kill_in_training, kill_in_evaluation, kill_between_files]
)
def test_a_sweep_stopped_in_any_phase_ends_like_one_that_was_not(
    whole: Path, tmp_path: Path, kill: Callable[[pytest.MonkeyPatch], None]
):
    with pytest.MonkeyPatch.context() as patch:
        kill(patch)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(tmp_path)
    if kill is kill_in_training:
        assert isinstance(stopped.value, TrainingInterrupted)
        assert Checkpoints(tmp_path / "training" / "checkpoints").latest() is not None
    done = len(list(tmp_path.glob("results/*.json")))
    assert done == {kill_in_evaluation: 6, kill_between_files: 4}.get(kill, 0)
    assert not list(tmp_path.glob("**/.*.json"))
    torch.manual_seed(99)  # a new process does not have the old one's random state
    run(tmp_path)
    assert files(tmp_path) == files(whole)


def test_what_is_done_is_not_done_again(whole: Path, monkeypatch: pytest.MonkeyPatch):
    before = files(whole)
    for name in ("train", "evaluate_all"):
        monkeypatch.setattr(sweep_module, name, None)
    run(whole)
    assert files(whole) == before


def test_a_recipe_can_measure_more_in_the_same_way(whole: Path):
    result, seen = SweepResult.read(whole), []

    def norms(saes: dict[str, Any]) -> dict[str, Any]:
        seen.append(list(saes))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {
            name: {"norm": sae.W_dec.norm().item(), "of": {"nan": float("nan")}} for name, sae in saes.items()
        }

    with pytest.raises(KeyboardInterrupt):
        result.measure("norms", norms, group_size=5, progress=False)
    records = result.measure("norms", norms, group_size=5, progress=False)
    names = [member.name for member in result.members]
    assert seen == [names[:5], names[5:10], names[10:], names[10:]]
    weights = load_file(whole / "training" / names[3] / "sae_weights.safetensors")
    assert records[names[3]]["norm"] == pytest.approx(weights["W_dec"].norm().item())
    assert records[names[3]]["of"] == {"nan": None} and records[names[3]]["method"] == "random"
    with pytest.raises(ValueError, match="nothing was measured of route-k2-seed0"):
        result.measure("nothing", lambda saes: {}, progress=False)
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        result.measure("training", norms)


# --- Members that diverge ---------------------------------------------------------------------------------


def diverging(monkeypatch: pytest.MonkeyPatch, steps: dict[str, int]) -> None:
    """The members of ``steps`` get a NaN weight before the given step."""
    from routesae_lens.training.members import Member

    step = Member.step

    def poisoning(self: Member, batch: torch.Tensor) -> Any:
        trainer = self.trainer
        name = names[id(trainer.sae)]
        if steps.get(name) == trainer.n_training_steps + 1 and self.diverged_at is None:
            with torch.no_grad():
                trainer.sae.W_enc[0, 0] = float("nan")
        return step(self, batch)

    names: dict[int, str] = {}
    from routesae_lens.training import train as train_module

    build = train_module._build
    order: list[str] = []

    def named(*args: Any) -> Any:
        sae = build(*args)
        names[id(sae)] = members[len(order) % len(members)]
        order.append(names[id(sae)])
        return sae

    members = [member.name for member in SweepConfig.from_dict(CONFIG).members()]
    monkeypatch.setattr(train_module, "_build", named)
    monkeypatch.setattr(Member, "step", poisoning)


BAD = {"random-k2-seed0": 5, "crosscoder_topk-k3-seed1": 9, "route-k2-seed0": 14}
"""The last one, first of all members, in the last step."""


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_member_that_diverges_stops_alone(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
):
    diverging(monkeypatch, BAD)
    if interrupted:
        with pytest.MonkeyPatch.context() as patch:
            kill_in_training(patch)
            with pytest.raises(TrainingInterrupted):
                run(tmp_path)
        state = json.loads(next(tmp_path.glob("training/checkpoints/step_00000010/state.json")).read_text())
        assert state["diverged"] == {name: step for name, step in BAD.items() if step < 14}
    result = run(tmp_path)
    assert result.diverged == BAD
    assert json.loads((tmp_path / "training" / "run.json").read_text())["diverged"] == BAD
    log = TrainingLog(tmp_path / "training" / "log.jsonl").read()
    for name, step in BAD.items():
        assert not (tmp_path / "training" / name).exists()
        assert result.results[name]["status"] == f"diverged at step {step}"
        assert "kl" not in result.results[name]
        assert [line["step"] for line in log if f"{name}/diverged" in line] == [step]
        trained = [line["step"] for line in log if f"{name}/losses/overall_loss" in line]
        assert trained == list(range(1, step))
    expected = SweepResult.read(whole).results
    for name, record in result.results.items():
        if name not in BAD:
            assert record == expected[name] | {"sweep": record["sweep"]}, name
            ours, theirs = (
                load_file(folder / "training" / name / "sae_weights.safetensors")
                for folder in (tmp_path, whole)
            )
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    with result.csv.open() as file:
        status = {line["name"]: line["status"] for line in csv.DictReader(file)}
    assert status["random-k2-seed0"] == "diverged at step 5" and status["topk-k2-seed0"] == "evaluated"


def test_when_all_diverge_the_sweep_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    members = [member.name for member in SweepConfig.from_dict(CONFIG).members()]
    diverging(monkeypatch, {name: 3 + i % 2 for i, name in enumerate(members)})
    with pytest.raises(FloatingPointError, match="training step 4: all 12 SAEs diverged; at last SAE 'route"):
        run(tmp_path)
    assert not (tmp_path / "results").exists()


def test_divergence_can_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    diverging(monkeypatch, {"random-k2-seed0": 5})
    with pytest.raises(FloatingPointError, match="training step 5: SAE 'random-k2-seed0': the loss is nan"):
        run(tmp_path, on_divergence="raise")


# --- What it costs, and results that are no numbers -------------------------------------------------------


@pytest.mark.parametrize(
    "methods", [["route", "topk"], ["route", "random", "topk", "mlsae", "relu", "gated"]]
)
def test_training_runs_the_language_model_once_for_any_number_of_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: list[str]
):
    model, train, embedded = tiny_model(), sweep_module.train, []

    def counting(*args: Any, **options: Any) -> Any:
        handle = model.embed.register_forward_pre_hook(lambda _, args: embedded.append(args[0].numel()))
        try:
            return train(*args, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(sweep_module, "train", counting)
    sparsities = {name: [0.5] for name in methods if name in ("relu", "gated")}
    result = run(tmp_path, model=model, methods=methods, sparsities=sparsities, seeds=[0])
    assert len(result.results) == len(methods)
    # The probe of 8; then 2 sequences of 16 at a time, of which 30 tokens go into the buffer: 18 forwards for the
    # 448 that are trained on and the 92 that the buffer of 128 still holds.
    assert embedded == [8] + 18 * [32]


def test_a_member_whose_evaluation_is_not_finite_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spoiled(saes: Any, *args: Any, **options: Any) -> Any:
        evaluations = evaluate_all(saes, *args, **options)
        return evaluations | {"route-k2-seed0": replace(evaluations["route-k2-seed0"], kl=float("inf"))}

    monkeypatch.setattr(sweep_module, "evaluate_all", spoiled)
    result = run(tmp_path, methods=["route", "topk"], sparsities={}, seeds=[0])
    assert {name: record["status"] for name, record in result.results.items()} == {
        "route-k2-seed0": "not finite",
        "topk-k2-seed0": "evaluated",
    }
    assert result.not_finite == ["route-k2-seed0"]
    assert result.results["route-k2-seed0"]["kl"] is None
