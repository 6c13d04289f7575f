"""Refusing what cannot work before anything long starts."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from routesae_lens.saes.k_annealing import ANNEALED, ScopeFields
from routesae_lens.training.record import RUN_FILE, read_record
from routesae_lens.training.rows import BUFFER_DTYPES
from routesae_lens.training.runner import CHECKPOINTS, LOG
from routesae_lens.training.schedules import SCHEDULES


def checked_configs(configs: Any) -> dict[str, TrainingSAEConfig]:
    """A copy of the configs by name. Raises TypeError or ValueError that names the wrong one."""
    if isinstance(configs, TrainingSAEConfig):
        configs = {configs.architecture(): configs}
    if not isinstance(configs, Mapping) or not configs:
        raise TypeError(f"expected a training config or a dict of them, got {configs!r}")
    for name, cfg in configs.items():
        if not isinstance(cfg, TrainingSAEConfig):
            raise TypeError(
                f"SAE {name!r}: expected a training config (...TrainingSAEConfig), got {type(cfg).__name__}"
            )
        if (
            not name
            or Path(name).name != name
            or name.startswith(".")
            or name in (CHECKPOINTS, LOG, RUN_FILE)
        ):
            raise ValueError(f"{name!r} cannot be the name of an SAE: it becomes a folder")
    return copy.deepcopy(dict(configs))  # SAELens writes into their metadata


def check_numbers(
    training_tokens: int,
    batch_size: int,
    context_size: int,
    buffer_tokens: int | None,
    lr: float,
    schedule: str,
    context_limit: int | None,
    buffer_dtype: str | None = None,
    **at_least: tuple[Any, int],
) -> None:
    """Raises ValueError for sizes that cannot work; ``at_least`` holds further ones with their minimum."""
    sizes: dict[str, tuple[Any, int]] = {
        "training_tokens": (training_tokens, 1),
        "batch_size": (batch_size, 1),
        "context_size": (context_size, 2),
        "buffer_tokens": (buffer_tokens, 1),
        **at_least,
    }
    check_sizes(**sizes)
    check_rate(lr, schedule)
    if training_tokens < batch_size:
        raise ValueError(f"training_tokens = {training_tokens} is less than one batch of {batch_size} tokens")
    if buffer_tokens is not None and buffer_tokens < 2 * batch_size:
        raise ValueError(
            f"the buffer ({buffer_tokens} tokens) must hold at least two training batches of {batch_size} tokens"
        )
    if context_limit is not None and context_size > context_limit:
        raise ValueError(f"context_size = {context_size}, but the model reads at most {context_limit} tokens")
    if buffer_dtype not in (None, *BUFFER_DTYPES):
        raise ValueError(f"unknown buffer_dtype {buffer_dtype!r}; known: {', '.join(BUFFER_DTYPES)}")


def check_sizes(**at_least: tuple[Any, int]) -> None:
    """Raises ValueError for a size that is no integer or below the minimum that stands beside it; None passes."""
    for name, (size, minimum) in at_least.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < minimum):
            raise ValueError(f"{name} must be an integer, {minimum} or more; got {size!r}")


def check_rate(lr: Any, schedule: Any) -> None:
    """Raises ValueError for a learning rate that cannot work, or an unknown schedule."""
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")


def run_problems(cfg: TrainingSAEConfig, steps: int, unit_norm_every: int | None) -> list[str]:
    """Why a config does not go with a run of ``steps``, for K-annealing and initialisation."""
    if not isinstance(cfg, ScopeFields):
        return []
    found = []
    if cfg.k_anneal_steps and cfg.k_anneal_steps >= steps:
        found.append(
            f"k_anneal_steps = {cfg.k_anneal_steps}, but the run has {steps} steps: none would train with the final k"
        )
    if cfg.init == "llama_scope" and unit_norm_every:
        found.append(
            "init='llama_scope' gives decoder rows a norm that unit_norm_every would set to 1 before the first step"
        )
    return found


def fit_to_run(configs: Mapping[str, TrainingSAEConfig], steps: int, unit_norm_every: int | None) -> None:
    """Give the configs that leave ``k_anneal_steps`` to the run 10 % of its ``steps``, at least one.

    Raises:
        ValueError: naming every SAE that does not go with such a run, see :func:`run_problems`.
    """
    found = []
    for name, cfg in configs.items():
        if isinstance(cfg, ScopeFields) and cfg.k_anneal_steps is None:
            cfg.k_anneal_steps = min(max(1, round(ANNEALED * steps)), steps - 1)
        found += [f"SAE {name!r}: {problem}" for problem in run_problems(cfg, steps, unit_norm_every)]
    if found:
        raise ValueError("; ".join(found))


def check_output(output: Path, names: Iterable[str], resume: bool) -> None:
    """Raises FileExistsError where ``output`` holds a run that is not to be resumed, or is finished."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; expected a folder")
    there = [name for name in (RUN_FILE, LOG, CHECKPOINTS, *names) if (output / name).exists()]
    if there and not resume:
        raise FileExistsError(
            f"{output} already holds a run ({', '.join(there)}): resume it, or choose another folder"
        )
    if resume and read_record(output).get("status") == "finished":
        raise FileExistsError(f"the run in {output} is finished; there is nothing to resume")


def check_space(output: Path, saes: Mapping[str, TrainingSAE[Any]], buffer_bytes: int) -> None:
    """Raises OSError where SAEs and checkpoints will not fit on the disk."""
    weights = sum(tensor.nbytes for sae in saes.values() for tensor in sae.state_dict().values())
    # a checkpoint: weights, Adam's two moments, buffer; two are kept while a third is written; then the SAEs
    needed = 3 * (3 * weights + buffer_bytes) + weights
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"not enough disk space at {existing}: SAEs and checkpoints need about {needed / 1e9:.2f} GB "
            f"({3 * buffer_bytes / 1e9:.2f} GB of it activation buffers, which save_buffer=False leaves out), "
            f"{free / 1e9:.2f} GB are free"
        )


def context_limit(model: Any) -> int | None:
    """Longest sequence the model reads, where it says so."""
    config = getattr(getattr(model, "model", None), "config", None)
    if isinstance(model, HookedProxyLM):
        return getattr(config, "max_position_embeddings", None)
    return getattr(model.cfg, "n_ctx", None)
