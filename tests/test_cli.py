"""``routesae-lens train`` and ``routesae-lens sweep``."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
from sae_lens import SAE
from typer.testing import CliRunner

from routesae_lens.analysis import evaluate
from routesae_lens.cli import app
from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES
from routesae_lens.saes.crosscoder import CROSSCODER_ARCHITECTURES, Crosscoder
from routesae_lens.saes.router import AGGREGATORS, ROUTINGS
from routesae_lens.training import sweep as sweep_module
from routesae_lens.training.checkpoint import Checkpoints
from routesae_lens.training.log import TrainingLog

pytestmark = pytest.mark.filterwarnings("ignore:the data holds", "ignore:end of the data")


def test_the_help_names_every_architecture_and_explains_every_option():
    command: Any = typer.main.get_command(app)
    parameters = command.commands["train"].params
    assert all(getattr(parameter, "help", None) for parameter in parameters)
    helped = {parameter.name: re.split(r"\W+", parameter.help) for parameter in parameters}
    assert {*ROUTE_ARCHITECTURES, *CROSSCODER_ARCHITECTURES} <= {*helped["architecture"]}
    assert {*ROUTINGS} <= {*helped["routing"]}
    assert {*AGGREGATORS} <= {*helped["aggregator"]}


@pytest.fixture
def arguments(tiny_llama_dir: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"A sparse autoencoder, number {i}, reads the stream." for i in range(80)))
    sizes = ["--tokens", "320", "--batch-size", "32", "--context-size", "16", "--d-sae", "64", "--k", "4"]
    where = ["--model", str(tiny_llama_dir), "--dataset", str(text), "--output", str(tmp_path / "run")]
    return ["train", *where, *sizes]


def test_the_command_trains(arguments: list[str], tmp_path: Path):
    extra = ["--architecture", "route_matryoshka_batchtopk", "--layers", "1:3", "--routing", "soft"]
    evaluation = ["--eval-dataset", arguments[4], "--eval-sequences", "2", "--eval-every", "5"]
    done = CliRunner().invoke(
        app, [*arguments, *extra, *evaluation, "--sae-option", "aux_loss_coefficient=0.5"]
    )
    assert done.exit_code == 0, done.output
    sae = SAE.load_from_disk(tmp_path / "run" / "route_matryoshka_batchtopk")
    assert (sae.cfg.layers, sae.cfg.routing, sae.cfg.d_sae) == ([1, 2, 3], "soft", 64)
    assert any("eval" in key for line in TrainingLog(tmp_path / "run" / "log.jsonl").read() for key in line)


def test_the_command_trains_crosscoders(arguments: list[str], tmp_path: Path):
    done = CliRunner().invoke(app, [*arguments, "--architecture", "crosscoder_topk", "--layers", "0:2"])
    assert done.exit_code == 0, done.output
    sae = SAE.load_from_disk(tmp_path / "run" / "crosscoder_topk")
    assert isinstance(sae, Crosscoder) and sae.layers == [0, 1, 2]
    wrong = [*arguments, "--architecture", "crosscoder_topk", "--routing", "soft", "--output", "no"]
    done = CliRunner().invoke(app, wrong)
    assert done.exit_code == 2 and "has no router: it takes no --routing" in done.output.replace("\n", " ")


def test_without_eval_dataset_the_first_documents_are_held_out(arguments: list[str], tmp_path: Path):
    done = CliRunner().invoke(app, [*arguments, "--eval-sequences", "3"])
    assert done.exit_code == 0, done.output
    lines = TrainingLog(tmp_path / "run" / "log.jsonl").read()
    assert sum("route_topk/eval/kl" in line for line in lines) == 5
    none = CliRunner().invoke(app, [*arguments, "--eval-sequences", "0", "--output", str(tmp_path / "none")])
    assert none.exit_code == 0, none.output
    lines = TrainingLog(tmp_path / "none" / "log.jsonl").read()
    assert not any("route_topk/eval/kl" in line for line in lines)
    everything = CliRunner().invoke(app, [*arguments, "--eval-sequences", "10000", "--output", "no"])
    assert everything.exit_code == 2 and "10000 are asked for" in everything.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--architecture", "route_magic"], "unknown architecture 'route_magic'; known: route_topk"),
        (["--layers", "1-3"], "layers must look like"),
        (["--layers", "1:9"], "between 0 and 5"),
        (["--routing", "loud"], "unknown routing 'loud'"),
        (["--backend", "jax"], "unknown backend 'jax'"),
        (["--sae-option", "l1_coefficient=3"], "route_topk takes no --sae-option l1_coefficient"),
        (["--sae-option", "relu"], "expected NAME=VALUE"),
        (["--dataset", "missing.txt"], "no such file or folder"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--tokens", "5"], "less than one batch"),
    ],
)
def test_a_mistake_on_the_command_line_gives_one_message(
    arguments: list[str], wrong: list[str], message: str
):
    done = CliRunner().invoke(app, [*arguments, *wrong])
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ") and "Traceback" not in done.output


def test_an_interrupted_command_says_how_to_go_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Terminating:
        def __init__(self, *_: Any):
            pass

        def __call__(self, **_: Any) -> dict[str, float]:
            if not Checkpoints(tmp_path / "run" / "checkpoints").all():
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

    monkeypatch.setattr(evaluate, "SpliceEvaluator", Terminating)
    more = [
        "--eval-dataset",
        arguments[4],
        "--eval-sequences",
        "1",
        "--eval-every",
        "3",
        "--checkpoint-every",
        "0",
    ]
    monkeypatch.setattr("sys.argv", ["routesae-lens", *arguments, *more])
    stopped = CliRunner().invoke(app, [*arguments, *more])
    assert stopped.exit_code == 130, stopped.output
    assert "stopped by SIGTERM after step 3 of 10" in stopped.output
    again = stopped.output.strip().splitlines()[-1].split()
    assert again[0] == "routesae-lens" and again[-1] == "--resume"
    done = CliRunner().invoke(app, again[1:])
    assert done.exit_code == 0, done.output
    assert "10 steps" in done.output


# --- sweep ------------------------------------------------------------------------------------------------


def sweep_arguments(arguments: list[str], tmp_path: Path, spec: str) -> list[str]:
    file = tmp_path / "sweep.toml"
    file.write_text(spec)
    where = [arguments[i : i + 2] for i in (1, 3, 5)]  # model, dataset, output
    return ["sweep", str(file), *(word for pair in where for word in pair)]


SPEC = """
methods = ["route", "topk"]
k = [2]
d_sae = 16
training_tokens = 128
context_size = 16
batch_size = 32
held_out_sequences = 2
"""


def test_the_sweep_command_trains_evaluates_and_continues(arguments: list[str], tmp_path: Path):
    command = sweep_arguments(arguments, tmp_path, SPEC)
    for _ in range(2):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert "2 SAEs, 0 of them diverged" in done.output.replace("\n", " ")
    lines = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["name", "route-k2-seed0", "topk-k2-seed0"]
    other = CliRunner().invoke(app, sweep_arguments(arguments, tmp_path, SPEC + "lr = 0.01"))
    assert other.exit_code == 2 and "config.lr: there 0.0005, now 0.01" in other.output
    small = [*command[:-1], str(tmp_path / "small"), "--memory-gib", "0.00001"]
    refused = CliRunner().invoke(app, small)
    assert refused.exit_code == 2 and "the sweep needs" in refused.output


def test_a_wrong_sweep_is_refused_before_the_model_loads(arguments: list[str], tmp_path: Path):
    command = sweep_arguments(arguments, tmp_path, SPEC + 'schedule = "x"\nsede = [1]')
    command[3] = "/no/such/model"
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "2 mistakes" in done.output and "'sede'" in done.output and "schedule 'x'" in done.output


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--group-size", "0"], "--group-size must be 1 or more, got 0"),
        (["--memory-gib", "nan"], "--memory-gib must be a positive number, got nan"),
        (["--memory-gib", "0"], "--memory-gib must be a positive number, got 0.0"),
        (["--memory-gib", "-2"], "--memory-gib must be a positive number, got -2.0"),
        (["--memory-gib", "inf"], "--memory-gib must be a positive number, got inf"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_model_loads(
    arguments: list[str], tmp_path: Path, wrong: list[str], message: str
):
    command = sweep_arguments(arguments, tmp_path, SPEC)
    command[3] = "/no/such/model"
    done = CliRunner().invoke(app, [*command, *wrong])
    assert done.exit_code == 2 and message in done.output and "Traceback" not in done.output


def test_the_sweep_command_names_what_is_not_finite(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def evaluate_all(*args: Any, **options: Any) -> Any:
        evaluations = evaluate.evaluate_all(*args, **options)
        evaluations["topk-k2-seed0"] = replace(evaluations["topk-k2-seed0"], kl=float("nan"))
        return evaluations

    monkeypatch.setattr(sweep_module, "evaluate_all", evaluate_all)
    done = CliRunner().invoke(app, sweep_arguments(arguments, tmp_path, SPEC))
    assert done.exit_code == 0, done.output
    assert "not finite: topk-k2-seed0" in done.output
    status = (tmp_path / "run" / "results.csv").read_text()
    assert status.count("not finite") == 1 and status.count("evaluated") == 1
