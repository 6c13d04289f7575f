"""A sweep over a tiny model that the tests of sweeps share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformer_lens import HookedTransformer, HookedTransformerConfig

from routesae_lens.training.sweep import SweepResult, sweep
from routesae_lens.training.sweep_config import SweepConfig

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
    return HookedTransformer(
        HookedTransformerConfig(d_vocab=64, act_fn="gelu", seed=seed, device="cpu", **sizes)
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
        options.pop("model", None) or tiny_model(),
        config,
        options.pop("dataset", None) or rows(),
        tokens,
        output,
        **{"group_size": 3, "checkpoint_every": 6, "progress": False} | options,
    )


OPTIONS = (
    "model",
    "dataset",
    "group_size",
    "resume",
    "memory",
    "checkpoint_every",
    "on_divergence",
    "log_every",
)


def files(output: Path) -> dict[str, str]:
    """Everything that was measured, and the training log."""
    paths = [*output.glob("results/*.json"), output / "results.csv", output / "training" / "log.jsonl"]
    return {str(path.relative_to(output)): path.read_text() for path in paths}
