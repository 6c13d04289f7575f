"""How much memory training several SAEs at once takes, and whether it is there.

While a sweep trains, it holds (all in bytes; SAEs in float32, ``item`` bytes per number of the model)::

    weights     4 x parameters of all SAEs
    moments     8 x parameters of all SAEs                (Adam's two)
    gradient    4 x parameters of the largest SAE         (freed after each member's own step)
    step        what one member computes in its step, freed before the next one's: a few tensors of
                batch x d_sae and batch x d_in
    outputs     0: SAELens keeps 2 x batch x d_sae x 4 of every member until all have made their step,
                this package drops them (``members.Member``)
    buffer      2 x (buffer + one forward) tokens x the widths of all distinct hooks x item, twice because
                the buffer is copied when it is filled up; and one batch
    forward     of the language model
    model       the language model itself, already there

and while it evaluates, after all that was freed: one group of SAEs, the model's logits a few times over, and
the latents of one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from routesae_lens.backends import backend_of
from routesae_lens.saes.fast_topk import FastTopK

DENSE_STEP, FAST_STEP = 8, 2
"""Tensors of batch x d_sae that a step holds at once (measured): pre-activations, latents, what fired, and
their gradients; the TopK step of ``saes/fast_topk.py`` has the first alone."""
STACK_TENSORS = 6
"""Tensors of batch x d_in likewise: the batch, standardised, reconstructed, errors, gradients."""
EVALUATED = 4
"""Tensors of tokens x d_sae in an evaluation."""
LOGITS = 5
"""Copies of the logits in an evaluation: clean as log-probabilities, spliced, and their intermediates."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, see the module's docstring."""

    weights: int
    moments: int
    gradient: int
    step: int
    buffer: int
    forward: int
    evaluation: int
    model: int

    @property
    def training(self) -> int:
        return self.weights + self.moments + self.gradient + self.step + self.buffer + self.forward

    @property
    def needed(self) -> int:
        """What must be free: training or evaluation, whichever takes more; the model is already there."""
        return max(self.training, self.evaluation)

    @property
    def peak(self) -> int:
        return self.needed + self.model

    def __str__(self) -> str:
        parts = ", ".join(f"{one.name} {getattr(self, one.name) / 2**30:.2f}" for one in fields(self))
        return f"{self.needed / 2**30:.2f} GiB beside the model ({parts} GiB)"


def estimate_memory(
    model: Any,
    configs: Mapping[str, TrainingSAEConfig],
    *,
    batch_size: int = 2048,
    context_size: int = 128,
    lm_batch_size: int | None = None,
    buffer_tokens: int | None = None,
    norm_estimate_batches: int = 0,
    group_size: int = 6,
    eval_batch_size: int = 4,
) -> MemoryEstimate:
    """What a sweep over ``configs`` takes at its peak.

    Args:
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        configs: training configs by name.
        batch_size, context_size, lm_batch_size, buffer_tokens: as for ``train``, with the same defaults.
        norm_estimate_batches: batches that SAELens holds while it estimates an input scale, where a config
            asks for one.
        group_size: SAEs that are evaluated together.
        eval_batch_size: sequences per forward of the evaluation.
    """
    lm_batch_size = lm_batch_size or max(1, batch_size // context_size)
    lm_tokens = lm_batch_size * context_size
    buffer_tokens = buffer_tokens or max(4 * batch_size, lm_tokens)
    parameters = {name: _parameters(cfg) for name, cfg in configs.items()}
    hooks = {cfg.metadata.hook_name: cfg.d_in for cfg in configs.values()}
    width, d_model = sum(hooks.values()), backend_of(model).d_model
    item = next(model.parameters()).element_size()
    normed = any(cfg.normalize_activations == "expected_average_only_in" for cfg in configs.values())
    buffer = width * item * (2 * (buffer_tokens + lm_tokens) + batch_size)
    if normed:
        buffer += width * item * batch_size * norm_estimate_batches
    eval_tokens = eval_batch_size * context_size
    largest_sae = max(cfg.d_sae for cfg in configs.values())
    largest = sorted(parameters.values())[-group_size:]
    return MemoryEstimate(
        weights=4 * sum(parameters.values()),
        moments=8 * sum(parameters.values()),
        gradient=4 * max(parameters.values()),
        step=max(_step(cfg, batch_size) for cfg in configs.values()),
        buffer=buffer,
        # (the hooks' own tensors, and attention and MLP of one block)
        forward=item * lm_tokens * (width + 24 * d_model),
        evaluation=4
        * (
            sum(largest)
            + max(largest)  # while one is loaded
            + eval_tokens * (LOGITS * _vocabulary(model) + 2 * width + EVALUATED * largest_sae)
        ),
        model=sum(p.nbytes for p in model.parameters()),
    )


def available_memory(device: str | torch.device = "cpu") -> int:
    """Bytes that are free where the SAEs will be: on the GPU, or in memory (within a container's limit)."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([int(psutil.virtual_memory().available), *_container_limit()])


def check_memory(estimate: MemoryEstimate, available: int) -> None:
    """Raises MemoryError with all parts where ``estimate`` exceeds ``available`` bytes."""
    if estimate.needed > available:
        raise MemoryError(
            f"the sweep needs {estimate}; {available / 2**30:.2f} GiB are available. Train fewer or narrower "
            "SAEs at once, take smaller batches or a smaller buffer, or override the check"
        )


def _parameters(cfg: TrainingSAEConfig) -> int:
    cfg = copy.deepcopy(cfg)
    cfg.device = "meta"  # shapes without numbers
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    return sum(parameter.numel() for parameter in sae.parameters())


def _step(cfg: TrainingSAEConfig, batch_size: int) -> int:
    """Bytes that one member's step holds and frees."""
    sae_class = get_sae_training_class(cfg.architecture())[0]
    fast = (
        issubclass(sae_class, FastTopK)
        and getattr(cfg, "aux_loss_coefficient", 0) == 0
        and torch.device(cfg.device).type == "cpu"
    )
    # Rules that only compare the layers (distilled, oracle) encode them one after the other.
    rows = batch_size * (getattr(cfg, "n_layers", 1) if getattr(cfg, "routing", "") == "every" else 1)
    latents = (FAST_STEP if fast else DENSE_STEP) * cfg.d_sae
    return 4 * (rows * latents + batch_size * STACK_TENSORS * cfg.d_in)


def _vocabulary(model: Any) -> int:
    if isinstance(model, HookedProxyLM):
        return int(model.model.config.vocab_size)
    return int(model.cfg.d_vocab)


def _container_limit(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the control group of this process may still take (Linux, version 2); empty where it sets no limit."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return []
    return [limit - used + int(stat.get("inactive_file", 0))]  # files that are only cached make way
