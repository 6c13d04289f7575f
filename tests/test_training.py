"""The entry point: what it trains, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, TopKSAEConfig, TopKTrainingSAEConfig
from transformer_lens import HookedTransformer

from routesae_lens.saes import recycled
from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES, RouteTopKTrainingSAEConfig
from routesae_lens.training.checkpoint import Checkpoints
from routesae_lens.training.preflight import checked_configs
from routesae_lens.training.schedules import Schedule, paper_schedule, windows
from routesae_lens.training.train import TrainingResult, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"),
]
CONTEXT, BATCH = 16, 32


def token_rows(n: int = 60, column: str = "tokens") -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({column: torch.randint(64, (n, CONTEXT), generator=generator).tolist()})


def config(model: Any, architecture: str = "route_topk", **options: Any) -> Any:
    if architecture in ("route_topk", "route_batchtopk", "route_matryoshka_batchtopk"):
        options["k"] = 4 if architecture == "route_topk" else 4.0
    if architecture == "route_matryoshka_batchtopk":
        options["matryoshka_widths"] = [16, 48]
    return ROUTE_ARCHITECTURES[architecture].for_model(model, d_sae=48, **options)


def run(model: Any, output: Path, configs: Any = None, dataset: Any = None, **options: Any) -> TrainingResult:
    defaults: dict[str, Any] = {"training_tokens": 12 * BATCH, "context_size": CONTEXT, "batch_size": BATCH}
    data = token_rows() if dataset is None else dataset
    return train(model, configs or config(model), data, output=output, **defaults | options)


def log_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- What it trains and writes ---------------------------------------------------------------------------


def test_every_architecture_trains_with_an_ordinary_sae_beside_it(
    tiny_hooked: HookedTransformer, tmp_path: Path
):
    plain = TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4)
    plain.metadata.hook_name = "blocks.4.hook_resid_post"
    configs = {name: config(tiny_hooked, name) for name in ROUTE_ARCHITECTURES} | {"plain": plain}
    result = run(tiny_hooked, tmp_path / "run", configs)
    assert (result.steps, result.tokens) == (12, 12 * BATCH)
    for name, path in result.paths.items():
        loaded = SAE.load_from_disk(path)
        acts = tiny_hooked.run_with_cache(torch.arange(10)[None], names_filter=loaded.cfg.metadata.hook_name)[
            1
        ]
        assert torch.isfinite(loaded(acts[loaded.cfg.metadata.hook_name])).all(), name
        assert loaded.cfg.metadata.seqpos_slice in ((1, None), [1, None])
    # The caller's configs are not written into.
    assert configs["route_topk"].metadata.context_size is None


def test_memory_kept_for_gradients_goes_when_the_run_ends_and_before_evaluations(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recycled, "SMALLEST", 1)
    kept, let_go, forget = [], [], recycled.forget

    def spy() -> None:
        kept.append(recycled.kept_bytes())
        forget()

    monkeypatch.setattr(recycled, "forget", spy)

    def evaluator(**_: Any) -> dict[str, float]:
        let_go.append(recycled.kept_bytes())
        return {}

    run(tiny_hooked, tmp_path / "run", evaluator=evaluator, eval_every=6)
    assert max(kept) == 2 * 32 * 48 * 4 and recycled.kept_bytes() == 0
    assert let_go and not any(let_go)


def test_the_log_tells_what_sae_lens_would_send_to_wandb(tiny_hooked: HookedTransformer, tmp_path: Path):
    seen: list[str] = []

    def evaluator(
        saes: Any, data_provider: Any, activation_scalers: Any, hook_names: Any
    ) -> dict[str, float]:
        assert saes.keys() == activation_scalers.keys() == hook_names.keys() == {"route_topk"}
        assert not saes["route_topk"].training
        with pytest.raises(RuntimeError, match="must not draw from the training data"):
            next(data_provider)
        seen.append("call")
        return {"route_topk/eval/kl": 0.5}

    result = run(tiny_hooked, tmp_path / "run", evaluator=evaluator, eval_every=5, log_every=4, prefetch=2)
    lines = log_lines(result.log)
    steps = [line for line in lines if "route_topk/losses/overall_loss" in line]
    assert [line["step"] for line in steps] == [1, 4, 8, 12]
    assert [line["tokens"] for line in steps] == [BATCH * line["step"] for line in steps]
    single = "route_topk/"
    for key in (
        *("metrics/explained_variance", "metrics/l0", "details/current_learning_rate"),
        *("sparsity/dead_features", "metrics/route_mean_p", "metrics/route_entropy"),
        *(f"metrics/layer_share/{layer}" for layer in result.saes["route_topk"].cfg.layers),
    ):
        assert all(isinstance(line[single + key], (int, float)) for line in steps), key
    shares = [line[f"{single}metrics/layer_share/{layer}"] for line in steps for layer in (0, 1, 2, 3)]
    assert sum(shares) == pytest.approx(len(steps))
    assert [line["step"] for line in lines if "route_topk/eval/kl" in line] == [5, 10, 12]
    assert len(seen) == 3
    # windows of the firing frequencies: ceil(12 / 5) = 3 steps
    assert [line["step"] for line in lines if "route_topk/sparsity/below_1e-5" in line] == [3, 6, 9, 12]


def test_wandb_gets_the_same_and_nothing_is_evaluated_twice(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sent: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr("wandb.log", lambda metrics, step: sent.append((step, metrics)))
    monkeypatch.setattr("wandb.init", lambda **_: None)
    uploads: list[Any] = []
    monkeypatch.setattr("wandb.log_artifact", lambda artifact, aliases=None: uploads.append(aliases))
    calls: list[int] = []

    def evaluator(**_: Any) -> dict[str, float]:
        calls.append(len(calls))
        return {"route_topk/eval/kl": 0.5}

    options: dict[str, Any] = {"wandb_project": "project", "log_every": 2, "eval_every": 6}
    result = run(tiny_hooked, tmp_path / "run", evaluator=evaluator, **options)
    assert len(calls) == 2
    assert uploads == [["final_model"], None]  # the SAE and its firing frequencies, no checkpoints
    logged = {step: metrics for step, metrics in sent if "route_topk/losses/overall_loss" in metrics}
    for line in log_lines(result.log):
        if "route_topk/losses/overall_loss" in line and line["step"] != 1:
            there = logged[line["step"] - 1]  # SAELens numbers a step by the steps done before it
            assert all(there[key] == value for key, value in line.items() if key not in ("step", "tokens"))
    assert [step for step, metrics in sent if "route_topk/eval/kl" in metrics] == [6, 12]


def test_the_run_is_on_record(tiny_hooked: HookedTransformer, tmp_path: Path):
    run(tiny_hooked, tmp_path / "run", seed=3)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["seeds"] == {"route_topk": 3}
    assert record["config"]["lr"] == 5e-4 and record["options"]["schedule"] == "paper"
    assert {"torch", "sae-lens", "transformer-lens", "routesae-lens"} <= record["versions"].keys()


def test_seeds_decide_the_weights(tiny_hooked: HookedTransformer, tmp_path: Path):
    configs = {name: config(tiny_hooked) for name in ("a", "b", "c")}
    torch.manual_seed(99)
    first = run(tiny_hooked, tmp_path / "1", configs, seed={"a": 0, "b": 0, "c": 1}).saes
    torch.manual_seed(100)
    second = run(tiny_hooked, tmp_path / "2", {"a": config(tiny_hooked)}, seed=0).saes
    assert torch.equal(first["a"].W_dec, first["b"].W_dec)
    assert torch.equal(first["a"].W_dec, second["a"].W_dec)
    assert not torch.equal(first["a"].W_dec, first["c"].W_dec)


def test_unit_norm_holds_before_the_first_step_every_n_steps_and_at_the_end(
    tiny_hooked: HookedTransformer, tmp_path: Path
):
    off_by: list[float] = []

    def watch(saes: Any, **_: Any) -> dict[str, float]:
        off_by.append((saes["route_topk"].W_dec.norm(dim=1) - 1).abs().max().item())
        return {}

    one = config(tiny_hooked, rescale_acts_by_decoder_norm=False)
    options: dict[str, Any] = {"evaluator": watch, "eval_every": 1, "lr": 1e-2, "schedule": "constant"}
    run(tiny_hooked, tmp_path / "run", one, unit_norm_every=4, **options)
    assert [off < 1e-6 for off in off_by] == [step in (1, 5, 9, 12) for step in range(1, 13)]
    assert max(off_by) < 0.1  # the decoder starts with norm 0.1, so it was set before the first step


def test_an_evaluator_is_called_at_the_end_in_any_case(tiny_hooked: HookedTransformer, tmp_path: Path):
    for eval_every, calls in ((0, 1), (5, 3), (6, 2), (100, 1)):  # of 12 steps
        called: list[int] = []
        run(
            tiny_hooked,
            tmp_path / str(eval_every),
            evaluator=lambda called=called, **_: called.append(1) or {},
            eval_every=eval_every,
        )
        assert len(called) == calls, eval_every


def test_text_trains_on_every_backend(tiny_bridge: Any, tiny_proxy: Any, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The quick brown fox number {i} jumps over the lazy dog." for i in range(80))
    )
    for name, model in (("bridge", tiny_bridge), ("proxy", tiny_proxy)):
        one = config(model, normalize_activations="expected_average_only_in")
        result = run(model, tmp_path / name, one, text)
        assert SAE.load_from_disk(result.paths["route_topk"]).cfg.metadata.exclude_special_tokens is True


def test_a_route_sae_starts_from_a_trained_one(tiny_hooked: HookedTransformer, tmp_path: Path):
    first = run(tiny_hooked, tmp_path / "first")
    start: list[torch.Tensor] = []

    def watch(saes: Any, **_: Any) -> dict[str, float]:
        start.append(saes["route_topk"].W_enc.detach().clone())
        return {}

    run(tiny_hooked, tmp_path / "second", init_from=first.paths["route_topk"], evaluator=watch, eval_every=1)
    # (the paper's warm-up gives the first step of 12 rate 1: Adam moves every weight by at most the rate)
    assert (start[0] - SAE.load_from_disk(first.paths["route_topk"]).W_enc).abs().max() < 6e-4


def test_windows_follow_the_length_of_the_run():
    assert windows(12) == (1, 1, 1, 3, 1)
    assert windows(3000) == (15, 300, 300, 600, 100)
    assert windows(100_000) == (500, 10_000, 1000, 2000, 100)
    assert paper_schedule(0, 1) == paper_schedule(0, 4) == 1.0
    with pytest.raises(ValueError, match="unknown schedule 'cosine'; known: paper, constant"):
        Schedule("cosine", 10)


def test_the_fused_optimiser_trains_the_same_up_to_rounding(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fused = run(tiny_hooked, tmp_path / "fused").saes["route_topk"].state_dict()
    calls: list[Any] = []
    monkeypatch.setattr("routesae_lens.training.runner.fuse_adam", calls.append)
    default = run(tiny_hooked, tmp_path / "default").saes["route_topk"].state_dict()
    assert len(calls) == 1 and not calls[0].param_groups[0]["fused"]
    for name, tensor in default.items():
        assert torch.allclose(tensor, fused[name], rtol=0, atol=1e-5), name
    assert not torch.equal(default["W_enc"], fused["W_enc"])  # another kernel was at work


# --- What it refuses --------------------------------------------------------------------------------------


def test_nan_activations_stop_the_run_and_leave_the_checkpoint(
    tiny_hooked: HookedTransformer, tmp_path: Path
):
    forwards = 0

    def poison(value: torch.Tensor, hook: Any) -> torch.Tensor:
        nonlocal forwards
        forwards += 1
        return value * float("nan") if forwards > 9 else value

    tiny_hooked.add_hook("blocks.1.hook_resid_post", poison, is_permanent=True)
    with pytest.raises(FloatingPointError) as stopped:
        run(tiny_hooked, tmp_path / "run", {"mine": config(tiny_hooked)}, checkpoint_every=1, lm_batch_size=2)
    latest = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert latest is not None
    done = int(latest.name.removeprefix("step_"))
    for part in (f"training step {done + 1}:", "blocks.3.hook_resid_post_stack_0to3", "'mine'", str(latest)):
        assert part in str(stopped.value)
    assert len(Checkpoints(tmp_path / "run" / "checkpoints").all()) == 2


def test_a_diverging_sae_is_named_and_never_saved(tiny_hooked: HookedTransformer, tmp_path: Path):
    def break_it(saes: Any, **_: Any) -> dict[str, float]:
        saes["bad"].W_enc.data[0, 0] = float("inf")
        return {}

    configs = {"good": config(tiny_hooked), "bad": config(tiny_hooked)}
    options: dict[str, Any] = {"evaluator": break_it, "eval_every": 7}
    with pytest.raises(FloatingPointError, match=r"training step 8: SAE 'bad': the loss is inf.*00000006"):
        run(tiny_hooked, tmp_path / "1", configs, checkpoint_every=6, **options)
    with pytest.raises(FloatingPointError, match=r"training step 7: SAE 'bad': W_enc.* not finite"):
        run(tiny_hooked, tmp_path / "2", configs, checkpoint_every=7, **options)
    assert Checkpoints(tmp_path / "2" / "checkpoints").all() == []


def hookless(model: Any) -> Any:
    return TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4)


def wrong_hook(model: Any) -> Any:
    cfg = TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4)
    cfg.metadata.hook_name = "blocks.4.hook_nothing"
    return cfg


def wrong_width(model: Any) -> Any:
    cfg = TopKTrainingSAEConfig(d_in=33, d_sae=48, k=4)
    cfg.metadata.hook_name = "blocks.4.hook_resid_post"
    return cfg


BAD_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"dataset": Dataset.from_dict({"text": ["a b c"]})}, "no tokenizer"),
    "no column": (
        {"dataset": Dataset.from_dict({"body": ["a"]})},
        "has the columns body; expected one of text",
    ),
    "no rows": ({"dataset": Dataset.from_dict({"tokens": []})}, "holds no rows"),
    "too little": ({"dataset": token_rows(2)}, r"holds 30 tokens to train on .* one training batch needs 32"),
    "short rows": ({"context_size": 20}, "context_size 16"),
    "long context": ({"context_size": 33}, "context_size = 33, but the model reads at most 32 tokens"),
    "less than a batch": (
        {"training_tokens": 31},
        "training_tokens = 31 is less than one batch of 32 tokens",
    ),
    "small buffer": ({"buffer_tokens": 63}, "63 tokens. must hold at least two training batches of 32"),
    "bad rate": ({"lr": 0.0}, "lr must be positive"),
    "no rate": ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
    "schedule": ({"schedule": "cosine"}, "known: paper, constant"),
    "bad name": ({"configs": lambda m: {"a/b": config(m)}}, "'a/b' cannot be the name of an SAE"),
    "no hook": ({"configs": hookless}, "set cfg.metadata.hook_name"),
    "wrong hook": ({"configs": wrong_hook}, "did not fire hook 'blocks.4.hook_nothing'"),
    "wrong width": ({"configs": wrong_width}, "has d_in = 33, but blocks.4.hook_resid_post gives 32"),
    "other model": (
        {"configs": RouteTopKTrainingSAEConfig(d_in=30, d_sae=48, k=4, layers=[1, 2])},
        "configured for d_model = 15 .* the model has 32",
    ),
    "layers": (
        {"configs": RouteTopKTrainingSAEConfig(d_in=64, d_sae=48, k=4, layers=[1, 9])},
        "between 0 and 5",
    ),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_is_refused_before_anything_is_written(
    tiny_hooked: HookedTransformer, tmp_path: Path, case: str
):
    options, message = BAD_RUNS[case]
    if callable(options.get("configs")):
        options = options | {"configs": options["configs"](tiny_hooked)}
    with pytest.raises((ValueError, TypeError), match=message):
        run(tiny_hooked, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_what_is_no_training_config_is_named():
    for wrong in (TopKSAEConfig(d_in=32, d_sae=48, k=4), "route_topk"):
        with pytest.raises(TypeError, match="SAE 'a': expected a training config"):
            checked_configs({"a": wrong})
    with pytest.raises(TypeError, match="expected a training config or a dict of them"):
        checked_configs({})


def test_an_output_folder_with_another_run_is_refused(tiny_hooked: HookedTransformer, tmp_path: Path):
    run(tiny_hooked, tmp_path / "run")
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(tiny_hooked, tmp_path / "run")
    with pytest.raises(FileExistsError, match="is finished; there is nothing to resume"):
        run(tiny_hooked, tmp_path / "run", resume=True)


def test_too_little_disk_space_is_noticed_at_the_start(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(OSError, match=r"not enough disk space .* about 0.00 GB .* 0.00 GB are free"):
        run(tiny_hooked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_number_of_epochs_is_said(tiny_hooked: HookedTransformer, tmp_path: Path):
    with pytest.warns(UserWarning, match=r"120 tokens to train on, fewer than .* = 384: .* 3\.2 times"):
        run(tiny_hooked, tmp_path / "run", dataset=token_rows(8))
