"""SAELens' own runners train RouteSAEs unmodified, and the README's example does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from backends import TOKENS
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

from routesae_lens.analysis.evaluate import SpliceEvaluator
from routesae_lens.hook_points import mount_layers, mounted_points
from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.route_sae import RouteSAE

LAYERS = [1, 2, 4]


@pytest.fixture
def data() -> Dataset:
    ids = torch.randint(3, 60, (80, 16), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"tokens": ids.tolist()})


def config(model, architecture: str, **kwargs):
    if "topk" in architecture:
        kwargs["k"] = 4 if architecture == "route_topk" else 4.0
    if "matryoshka" in architecture:
        kwargs["matryoshka_widths"] = [16, 64]
    return ROUTE_ARCHITECTURES[architecture].for_model(model, layers=LAYERS, d_sae=64, **kwargs)


COMMON = {
    "context_size": 16,
    "training_tokens": 640,
    "train_batch_size_tokens": 64,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 16,
    "prepend_bos": False,
    "streaming": False,
    "checkpoint_path": None,
    "dead_feature_window": 3,
    "dataset_path": "none",
}


@pytest.mark.parametrize("architecture", ROUTE_ARCHITECTURES)
def test_single_runner(tiny_hooked, data, tmp_path, architecture):
    cfg = LanguageModelSAERunnerConfig(
        sae=config(tiny_hooked, architecture),
        hook_name=mount_layers(tiny_hooked, LAYERS),
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **COMMON,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=tiny_hooked)
    before = {name: weights.clone() for name, weights in runner.sae.state_dict().items()}
    trained = runner.run()
    assert all(
        not torch.equal(before[name], getattr(trained, name)) for name in ("W_enc", "W_dec", "W_router")
    )
    loaded, again = SAE.load_from_disk(tmp_path), RouteSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, RouteSAE) and type(again) is type(loaded)
    stack = torch.randn(7, 3 * 32)
    assert torch.equal(loaded(stack), inference_form(trained)(stack))
    assert torch.equal(loaded.route(stack).layer, trained.route(stack).layer)


def test_the_runners_mount_a_point_that_is_not_there(tiny_hooked, data, tmp_path):
    sae = config(tiny_hooked, "route_topk")
    assert mounted_points(tiny_hooked) == []
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=sae.metadata.hook_name,
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **COMMON,
    )
    LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=tiny_hooked).run()
    assert mounted_points(tiny_hooked) == [sae.metadata.hook_name]
    cfg.hook_name = sae.metadata.hook_name.replace("blocks", "model.layers")
    with pytest.raises(
        ValueError, match=r"is called 'blocks\.4\.hook_resid_post_stack_1to2_4' on this model"
    ):
        LanguageModelSAETrainingRunner(cfg, override_dataset=data, override_model=tiny_hooked)
    several = MultiSAETrainingRunnerConfig(
        saes={"a": config(tiny_hooked, "route_topk")},
        hook_names=cfg.hook_name,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        **COMMON,
    )
    with pytest.raises(ValueError, match="is called"):
        MultiSAETrainingRunner(several, override_dataset=data, override_model=tiny_hooked)


@pytest.mark.parametrize("prefetch", [False, True])
def test_multi_runner_with_our_evaluator(tiny_hooked, data, tmp_path, prefetch, monkeypatch):
    logged: list[dict] = []
    monkeypatch.setattr("wandb.init", lambda **_: None)
    monkeypatch.setattr("wandb.finish", lambda **_: None)
    monkeypatch.setattr("wandb.log", lambda metrics, step: logged.append(metrics))
    monkeypatch.setattr("sae_lens.config.LoggingConfig.log", lambda *_, **__: None)
    saes = {
        "hard": config(tiny_hooked, "route_topk"),
        "random": config(tiny_hooked, "route_topk", routing="random"),
    }
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=mount_layers(tiny_hooked, LAYERS),
        output_path=str(tmp_path),
        prefetch_llm_batches=prefetch,
        logger=LoggingConfig(wandb_log_frequency=1, eval_every_n_wandb_logs=5),
        **COMMON,
    )
    runner = MultiSAETrainingRunner(cfg, override_dataset=data, override_model=tiny_hooked)
    runner.evaluator = SpliceEvaluator(tiny_hooked, TOKENS)
    runner.run()
    assert set(SAE.load_from_disk(tmp_path / "hard").layers) == set(LAYERS)
    evaluations = [metrics for metrics in logged if "hard/eval/kl" in metrics]
    assert len(evaluations) == 2 and all(metrics["random/eval/kl"] > 0 for metrics in evaluations)
    steps = [metrics for metrics in logged if "hard/metrics/route_entropy" in metrics]
    assert len(steps) == 10
    assert sum(steps[-1][f"hard/metrics/layer_share/{layer}"] for layer in LAYERS) == pytest.approx(1)
    assert "hard/sparsity/dead_features" in steps[-1]


def test_readme_example(tiny_llama_dir, tmp_path, monkeypatch):
    from routesae_lens import HookedRouteSAETransformer, load_model

    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(
        code
        for code in re.findall(r"```python\n(.*?)```", readme, re.S)
        if "run_with_cache_with_saes" in code
    )
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": f"The river {i} was quiet, and {i * i} boats lay still."}) for i in range(80)]
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(
        HookedRouteSAETransformer,
        "from_pretrained_no_processing",
        lambda name: load_model(
            tiny_llama_dir, "hooked", device="cpu", model_class=HookedRouteSAETransformer
        ),
    )
    for ours, small in (
        ("Skylion007/openwebtext", str(tmp_path / "text")),
        ("runs/route", str(tmp_path / "run")),
        ("range(2, 9)", "range(1, 6)"),
        ("d_sae=6144, k=32", "d_sae=64, k=4"),
        ("context_size=128", "context_size=16"),
        ("10_000_000", "640"),
        ("size_tokens=2048", "size_tokens=64"),
    ):
        assert ours in block, f"the README's example changed: no {ours}"
        block = block.replace(ours, small)
    names: dict = {}
    exec(block, names)
    latents = names["cache"]["blocks.5.hook_resid_post.hook_sae_acts_post"]
    assert isinstance(names["sae"], RouteSAE) and names["sae"].cfg.metadata.model_name == "gpt2"
    assert latents.shape[-1] == 64 and names["logits"].shape[:2] == latents.shape[:2]
