"""A sweep: one training for all members, results that appear as they come, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.training import sweep as sweep_module
from routesae_lens.training.checkpoint import Checkpoints
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.log import TrainingLog
from routesae_lens.training.memory import estimate_memory
from routesae_lens.training.sweep import SweepResult, sweep
from routesae_lens.training.sweep_config import SweepConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data", "ignore:frozen at training"
)
CONFIG: dict[str, Any] = {
    "methods": ["route", "random", "topk", "relu", "crosscoder_topk"],
    "k": [2],
    "sparsities": {"topk": [2, 4], "relu": [0.5], "crosscoder_topk": [3]},
    "seeds": [0, 1],
    "layers": [1, 2, 4],
    "d_sae": 40,
    "training_tokens": 14 * 32,
    "context_size": 16,
    "batch_size": 32,
    "held_out_sequences": 4,
    "eval_batch_size": 2,
}


def tiny_model() -> HookedTransformer:
    """A fresh one for every run, as in a new process."""
    sizes: dict[str, Any] = {
        "n_layers": 6,
        "d_model": 32,
        "n_ctx": 32,
        "d_head": 8,
        "n_heads": 4,
        "d_mlp": 64,
    }
    return HookedTransformer(
        HookedTransformerConfig(d_vocab=64, act_fn="gelu", seed=0, device="cpu", **sizes)
    ).eval()


def rows(n: int = 60, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"tokens": ids(n, seed).tolist()})


def ids(n: int, seed: int) -> torch.Tensor:
    return torch.randint(64, (n, 16), generator=torch.Generator().manual_seed(seed))


def run(output: Path, held_out: torch.Tensor | None = None, **changes: Any) -> SweepResult:
    options = {name: changes.pop(name) for name in OPTIONS if name in changes}
    config = SweepConfig.from_dict(CONFIG | changes)
    tokens = ids(CONFIG["held_out_sequences"], 1) if held_out is None else held_out
    return sweep(
        tiny_model(),
        config,
        rows(),
        tokens,
        output,
        **{"group_size": 3, "checkpoint_every": 6, "progress": False} | options,
    )


OPTIONS = (
    "group_size",
    "resume",
    "memory",
    "methods_table",
    "checkpoint_every",
    "on_divergence",
    "log_every",
)


def files(output: Path) -> dict[str, str]:
    """Everything that was measured, and the training log."""
    paths = [*output.glob("results/*.json"), output / "results.csv", output / "training" / "log.jsonl"]
    return {str(path.relative_to(output)): path.read_text() for path in paths}


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


# --- What it refuses --------------------------------------------------------------------------------------

MISTAKES: dict[str, Any] = {
    "methods": ["rout", "topk", "topk", "relu", "route@3"],
    "k": [4, -8, 4, 2.5],
    "seeds": [0, 0],
    "layers": [3, 1],
    "training_tokens": 40,
    "batch_size": 64,
    "buffer_tokens": 2,
    "lr": "fast",
    "schedule": "cosine",
    "scedule": "paper",
    "options": {"gated": {}},
    "unscaled": 1,
}


def test_a_wrong_spec_lists_every_mistake_at_once():
    with pytest.raises(ValueError) as error:
        SweepConfig.from_dict(MISTAKES)
    message = str(error.value)
    assert message.startswith("the sweep has 16 mistakes:")
    for part in (
        "unknown setting 'scedule'; known: methods, k,",
        "unknown method 'rout'; known: route,",
        "methods holds 'topk' more than once",
        "'route@3': route reads several layers",
        "method relu has no sparsity: give sparsities.relu (coefficient of the L1 penalty",
        "k holds -8; expected an integer, 1 or more",
        "k holds 2.5; expected an integer",
        "k holds 4 more than once",
        "seeds holds 0 more than once",
        "layers must be strictly increasing, got [3, 1]",
        "training_tokens = 40 is less than one batch of 64",
        "buffer_tokens = 2 must hold at least two batches of 64",
        "lr must be a positive number, got 'fast'",
        "unknown schedule 'cosine'",
        "options are given for 'gated', which is not among the methods",
        "unscaled must be true or false, got 1",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"d_sae": 1}, ["route, k = 2: more than d_sae = 1", "topk, k = 4: more than d_sae = 1"]),
        (
            {"options": {"route": {"loss": "rmse"}, "topk": {"los": 1}}},
            ["unknown loss 'rmse'; known: normalized_mse, mse", "unexpected keyword argument 'los'"],
        ),
        ({"methods": []}, ["methods is empty"]),
        ({"methods": "route"}, ["methods must be a list, got 'route'"]),
        ({"k": []}, ["method route has no sparsity: give sparsities.route or k"]),
        ({"sparsities": {"relu": [0, 1]}}, ["sparsities.relu holds 0; expected a positive number"]),
        ({"sparsities": {"relu": [1], "gated": [1]}}, ["sparsities are given for 'gated'"]),
        ({"options": {"route": 3}}, ["options.route must be a table of config fields"]),
        ({"training_tokens": None}, ["training_tokens must be an integer, 1 or more; got None"]),
    ],
)
def test_mistakes_are_found_without_a_model(changes: dict[str, Any], messages: list[str]):
    with pytest.raises(ValueError, match="the sweep has") as error:
        SweepConfig.from_dict(CONFIG | changes)
    for message in messages:
        assert message in str(error.value)


def test_what_needs_the_model_is_listed_at_once_and_before_anything_is_written(tmp_path: Path):
    changes = {
        "layers": [1, 7],
        "context_size": 48,
        "d_sae": None,
        "k": [2, 600],
        "methods": ["route", "topk@9"],
    }
    with pytest.raises(ValueError) as error:
        run(tmp_path / "sweep", ids(3, 0), **changes, sparsities={})
    for part in (
        "the sweep has 6 mistakes:",
        "held_out_sequences = 4, but 3 were given",
        "context_size = 48, but the model reads at most 32 tokens",
        "route, k = 2: layers must be between 0 and 5, got [1, 7]",
        "route, k = 600: more than d_sae = 256",
        "topk@9, k = 2: layers must be between 0 and 5, got [9]",
        "topk@9, k = 600: more than d_sae = 256",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_a_config_survives_a_file(tmp_path: Path):
    config = SweepConfig.from_dict(CONFIG | {"options": {"route": {"loss": "mse"}}})
    assert SweepConfig.from_dict(config.to_dict()) == config
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG))
    assert SweepConfig.from_file(tmp_path / "sweep.json") == SweepConfig.from_dict(CONFIG)
    (tmp_path / "sweep.toml").write_text(
        'methods = ["relu", "topk@2"]\nk = [4]\ntraining_tokens = 9000\n[sparsities]\nrelu = [0.5, 2]\n'
    )
    read = SweepConfig.from_file(tmp_path / "sweep.toml")
    assert [member.name for member in read.members()] == [
        "relu-l10.5-seed0",
        "relu-l12-seed0",
        "topk@2-k4-seed0",
    ]
    for name, text, message in (
        ("a.yaml", "", "expected a .toml or .json file"),
        ("a.toml", "methods = [", "is no valid TOML"),
        ("a.json", "[1]", "expected settings by name, got list"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            SweepConfig.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr": 1e-3, "k": [3]},
            r"config.k: there \[2\], now \[3\]\n  config.lr: there 0.0005, now 0.001",
        ),
        ({"held_out": ids(4, 2)}, "held_out.sha256: there"),
        ({"resume": False}, "already holds a sweep"),
    ],
)
def test_an_output_of_another_config_is_refused(whole: Path, changes: dict[str, Any], message: str):
    before = files(whole)
    with pytest.raises(FileExistsError, match=message):
        run(whole, **changes)
    assert files(whole) == before


def test_a_folder_of_something_else_is_refused_and_a_refused_sweep_leaves_none(tmp_path: Path):
    (tmp_path / "results").mkdir()
    with pytest.raises(FileExistsError, match="holds results of something else"):
        run(tmp_path)
    with pytest.raises(ValueError, match="one training batch needs 4096"):
        run(tmp_path / "other", training_tokens=4096, batch_size=4096)
    run(tmp_path / "other", methods=["topk"], k=[2], seeds=[0], sparsities={})  # not "another sweep"


def test_a_sweep_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path):
    with pytest.raises(
        MemoryError, match=r"the sweep needs 0.0\d GiB .*weights 0.00, moments 0.00.*0.00 GiB are"
    ):
        run(tmp_path / "sweep", memory=100_000)
    assert not (tmp_path / "sweep").exists()


def smollm2() -> Any:
    """A model of SmolLM2-135M's shape, without its weights."""
    from sae_lens.load_model import HookedProxyLM
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        **{"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    }
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    return HookedProxyLM(model, None, hook_names=[f"model.layers.{i}" for i in range(30)])


def test_24_saes_fit_in_24_gib_at_smollm2_size():
    model = smollm2()
    coefficients = {name: [1, 2, 3] for name in ("relu", "gated", "jumprelu", "crosscoder_relu")}
    config = SweepConfig.from_dict(
        {
            "methods": ["route", "random", "topk", "crosscoder_topk", *coefficients],
            **{"k": [16, 32, 64], "sparsities": coefficients, "d_sae": 4608, "training_tokens": 10**6},
        }
    )
    configs = config.sae_configs(model)
    assert len(configs) == 24
    estimate = estimate_memory(model, configs, batch_size=2048)
    routed, crosscoder = 2 * 576 * 4608, 2 * 16 * 576 * 4608
    assert estimate.weights == pytest.approx(4 * (18 * routed + 6 * crosscoder), rel=0.01)
    assert estimate.moments == 2 * estimate.weights
    assert estimate.gradient == pytest.approx(4 * crosscoder, rel=0.01)
    assert estimate.buffer == 4 * (16 + 1) * 576 * (2 * (8192 + 2048) + 2048)
    assert 8 * 2**30 < estimate.peak < 12 * 2**30


MEASURED = """
import gc, resource, sys, tempfile, warnings
import psutil, torch
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import test_sweep
from routesae_lens.training.sweep import estimate_memory
torch.set_num_threads(1)
changes = {"methods": ["route", "topk", "relu"], "k": [2, 4], "sparsities": {"relu": [1]}, "batch_size": 256,
           "training_tokens": 512}
test_sweep.run(test_sweep.Path(tempfile.mkdtemp()), **changes, d_sae=16)
before = psutil.Process().memory_info().rss
config = test_sweep.SweepConfig.from_dict(test_sweep.CONFIG | changes | {"d_sae": 16384})
model = test_sweep.tiny_model()
estimate = estimate_memory(model, config.sae_configs(model), batch_size=256, context_size=16)
test_sweep.run(test_sweep.Path(tempfile.mkdtemp()), **changes, d_sae=16384)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(estimate.needed, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_the_estimate_is_what_a_process_takes():
    # glibc would keep what was freed, in amounts that differ from run to run
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    estimated, measured = map(int, done.stdout.split())
    assert estimated > 150 * 2**20
    assert measured / 1.5 < estimated < measured * 1.5
