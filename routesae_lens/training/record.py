"""``run.json``: what a run was made of, for people and for resuming."""

from __future__ import annotations

import json
import platform
from dataclasses import fields as fields_of
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAEConfig

from routesae_lens.saes.k_annealing import ScopeFields
from routesae_lens.training.runner import RunOptions

RUN_FILE = "run.json"


def identity(
    cfg: MultiSAETrainingRunnerConfig, options: RunOptions, seeds: dict[str, int], n_layers: int
) -> dict[str, Any]:
    """Everything that decides the weights: a checkpoint of a run with another identity is refused."""
    fields = (
        "context_size", "training_tokens", "train_batch_size_tokens", "seqpos_slice", "exclude_special_tokens",
        "prepend_bos", "disable_concat_sequences", "sequence_separator_token", "activations_mixing_fraction",
        "adam_beta1", "adam_beta2", "lr", "autocast", "autocast_lm", "dead_feature_window", "feature_sampling_window",
    )  # fmt: skip
    ours = ["schedule", "unit_norm_every", "buffer_tokens"]
    if options.buffer_dtype is not None:  # (checkpoints of older versions know no such setting)
        ours.append("buffer_dtype")
    return {
        "saes": {name: sae_settings(sae) for name, sae in cfg.saes.items()},
        "hooks": cfg.hook_names_per_sae,
        "seeds": seeds,
        "model_layers": n_layers,
        **{name: getattr(cfg, name) for name in fields},
        **{name: getattr(options, name) for name in ours},
    }


def sae_settings(cfg: TrainingSAEConfig) -> dict[str, Any]:
    """What of an SAE's config decides its numbers.

    K-annealing and initialisation are left out at their defaults: folders of older versions do not have them.
    """
    later = {one.name: one.default for one in fields_of(ScopeFields)}
    return {
        name: value
        for name, value in cfg.to_dict().items()
        if name not in ("metadata", "device") and not (name in later and value == later[name])
    }


def record(cfg: MultiSAETrainingRunnerConfig, options: RunOptions, seeds: dict[str, int]) -> dict[str, Any]:
    """What ``run.json`` tells beside the status."""
    return {
        "config": json.loads(json.dumps(cfg.to_dict(), default=str)),
        "options": json.loads(json.dumps(vars(options), default=str)),
        "seeds": seeds,
        "wandb_id": cfg.logger.wandb_id,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that decide numbers."""
    packages = ("routesae-lens", "sae-lens", "transformer-lens", "torch", "transformers", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_record(output: Path, record: dict[str, Any]) -> None:
    """Write ``run.json``, whole or not at all."""
    write_whole(output / RUN_FILE, json.dumps(record, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_record(output: Path) -> dict[str, Any]:
    """``run.json`` of ``output``; empty where there is none. Raises ValueError where it is damaged."""
    path = output / RUN_FILE
    return read_object(path) if path.exists() else {}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds values by name. Raises ValueError with the path where it does not."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: expected values by name, got {type(values).__name__}")
    return values
