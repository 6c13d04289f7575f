"""How much memory training several SAEs at once takes, and whether it is there.

While a run or a sweep trains, it holds (all in bytes; SAEs in float32, ``item`` bytes per number of the model)::

    weights     4 x parameters of all SAEs
    moments     8 x parameters of all SAEs                (Adam's two)
    gradient    4 x parameters of the largest SAE         (freed after each member's own step; on a CPU those of the
                last fast TopK step stay, so the largest of both kinds where members step in different ways)
    step        what one member computes in its step, freed before the next one's: a few tensors of
                batch x d_sae and batch x d_in
    outputs     0: SAELens keeps 2 x batch x d_sae x 4 of every member until all have made their step,
                this package drops them (``members.Member``)
    buffer      (buffer + one forward) tokens x the widths of all distinct hooks x item, stored once (``rows.py``);
                ``host_buffer`` where it is kept in main memory beside a GPU
    batches     the batch that is trained on, those prepared ahead, and those that SAELens holds while it
                estimates an input scale
    forward     of the language model, with the activations of all hooks
    model       the language model itself, already there

and while a sweep evaluates, after all that was freed: one group of SAEs, the model's logits a few times over,
and the latents of one batch. Where a run evaluates while it trains, both are held at once.
"""

from __future__ import annotations

import copy
import sys
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
from routesae_lens.saes.expert_mixins import ExpertFields
from routesae_lens.saes.fast_topk import DEVICES, FEW, FastTopK
from routesae_lens.training.rows import BUFFER_DTYPES, capacity_for

DENSE_STEP, FAST_STEP, REVIVAL = 8, 2, 3
"""Tensors of batch x d_sae that a step holds at once (measured): pre-activations, latents, what fired, and
their gradients. The TopK step of ``saes/fast_topk.py`` has fewer; where all latents are dead, reviving them (the
auxiliary loss) takes three more: pre-activations, which are chosen, and gradients."""
FAST_KEPT, DENSE_KEPT = 26, 3
"""Numbers for every latent that a step keeps (measured), beside one batch x d_sae less than the above: they count
where k is a large part of the width, as at the start of K-annealing."""
SCALED = {"none": 0, "mean": 1, "learned": 3, "identity": 4}
"""Matrices of d_model x d_sae that feature scaling of experts makes in a step (measured): low-pass part, scaled
encoder, gradients. Where the step is dense it always makes what "identity" does."""
STACK_TENSORS = 6
"""Tensors of batch x d_in likewise: the batch, standardised, reconstructed, errors, gradients. Where one layer is
read of each token, all but the batch are of batch x d_model."""
READ_ONE_LAYER = ("hard", "straight_through", "random", "fixed", "distilled", "oracle")
READ_THE_SUM = ("sum", "mean")
"""Rules and aggregators of a router that never hold the standardised layers (``saes/layers.py``)."""
EVALUATED = 4
"""Tensors of tokens x d_sae in an evaluation."""
LOGITS = 3
"""Copies of the logits in an evaluation: clean, spliced, and chunks of their log-probabilities (measured: 2.8)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, see the module's docstring."""

    weights: int
    moments: int
    gradient: int
    step: int
    buffer: int
    batches: int
    forward: int
    evaluation: int
    model: int
    host_buffer: int = 0
    evaluates_in_training: bool = False

    @property
    def training(self) -> int:
        kept = self.weights + self.moments + self.buffer + self.batches
        # (neither a step nor a forward runs during an evaluation)
        step = self.gradient + self.step + self.forward
        return kept + (max(step, self.evaluation) if self.evaluates_in_training else step)

    @property
    def needed(self) -> int:
        """What must be free where the SAEs are, beside the model, which is already there."""
        return max(self.training, self.evaluation)

    @property
    def peak(self) -> int:
        return self.needed + self.model

    def __str__(self) -> str:
        names = [one.name for one in fields(self) if one.name not in ("host_buffer", "evaluates_in_training")]
        parts = ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in names)
        host = f", and {self.host_buffer / 2**30:.2f} GiB of main memory" if self.host_buffer else ""
        return f"{self.needed / 2**30:.2f} GiB beside the model ({parts} GiB){host}"


def estimate_memory(
    model: Any,
    configs: Mapping[str, TrainingSAEConfig],
    *,
    batch_size: int = 2048,
    context_size: int = 128,
    lm_batch_size: int | None = None,
    buffer_tokens: int | None = None,
    buffer_dtype: str | None = None,
    buffer_apart: bool = False,
    mix_fraction: float = 0.5,
    prefetch: bool | int = False,
    norm_estimate_batches: int = 0,
    group_size: int = 6,
    eval_batch_size: int = 4,
    evaluates: bool = True,
    evaluates_in_training: bool = False,
) -> MemoryEstimate:
    """What training ``configs`` at once takes at its peak, and evaluating them.

    Args:
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        configs: training configs by name.
        batch_size, context_size, lm_batch_size, buffer_tokens, buffer_dtype, prefetch: as for ``train``, with
            the same defaults.
        buffer_apart: the buffer is kept in main memory, the SAEs are on a GPU.
        mix_fraction: part of the buffer that stays for the next round.
        norm_estimate_batches: batches that SAELens holds while it estimates an input scale, where a config
            asks for one.
        group_size: SAEs that are evaluated together.
        eval_batch_size: sequences per forward of the evaluation.
        evaluates: whether there is an evaluation.
        evaluates_in_training: whether it comes while optimiser and buffer are held.
    """
    lm_batch_size = lm_batch_size or max(1, batch_size // context_size)
    lm_tokens = lm_batch_size * context_size
    buffer_tokens = buffer_tokens or max(4 * batch_size, lm_tokens)
    parameters = {name: _parameters(cfg) for name, cfg in configs.items()}
    hooks = {cfg.metadata.hook_name: cfg.d_in for cfg in configs.values()}
    width, d_model = sum(hooks.values()), backend_of(model).d_model
    item = next(model.parameters()).element_size()
    stored = item if buffer_dtype is None else BUFFER_DTYPES[buffer_dtype].itemsize
    buffer = width * stored * capacity_for(buffer_tokens, batch_size, lm_tokens, mix_fraction)
    normed = any(cfg.normalize_activations != "none" for cfg in configs.values())
    held = 1 + (int(prefetch) + 1 if prefetch else 0) + (norm_estimate_batches if normed else 0)
    eval_tokens = eval_batch_size * context_size
    largest_sae = max(cfg.d_sae for cfg in configs.values())
    largest = sorted(parameters.values())[-group_size:]
    return MemoryEstimate(
        weights=4 * sum(parameters.values()),
        moments=8 * sum(parameters.values()),
        gradient=4 * sum(_largest_by_step(configs, parameters)),
        step=max(_step(cfg, batch_size) for cfg in configs.values()),
        buffer=0 if buffer_apart else buffer,
        host_buffer=buffer if buffer_apart else 0,
        evaluates_in_training=evaluates_in_training,
        batches=width * stored * batch_size * held,
        # (the hooks' own tensors, and attention and MLP of one block)
        forward=item * lm_tokens * (width + 24 * d_model),
        evaluation=4
        * evaluates
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


def check_memory(estimate: MemoryEstimate, available: int, what: str = "sweep", hint: str = "") -> None:
    """Raises MemoryError with all parts where ``estimate`` exceeds ``available`` bytes, or its part in main
    memory what is free there."""
    message = (
        f"the {what} needs {estimate}; {{}} GiB are available. Train fewer or narrower SAEs at once, take "
        f"smaller batches or a smaller buffer (or store it as bfloat16), or override the check{hint}"
    )
    if estimate.needed > available:
        raise MemoryError(message.format(f"{available / 2**30:.2f}"))
    if estimate.host_buffer and estimate.host_buffer > (host := available_memory("cpu")):
        raise MemoryError(message.format(f"of main memory {host / 2**30:.2f}"))


def tell_memory(estimate: MemoryEstimate, available: int, what: str) -> None:
    """Print the estimate, on the standard error like the progress bars."""
    print(f"memory: the {what} needs {estimate}; {available / 2**30:.2f} GiB are available", file=sys.stderr)


def _parameters(cfg: TrainingSAEConfig) -> int:
    cfg = copy.deepcopy(cfg)
    cfg.device = "meta"  # shapes without numbers
    sae = get_sae_training_class(cfg.architecture())[0](cfg)
    return sum(parameter.numel() for parameter in sae.parameters())


def _is_fast(cfg: TrainingSAEConfig) -> bool:
    sae_class = get_sae_training_class(cfg.architecture())[0]
    k = getattr(cfg, "largest_k", getattr(cfg, "k", 0))
    return (
        issubclass(sae_class, FastTopK) and torch.device(cfg.device).type in DEVICES and k <= FEW * cfg.d_sae
    )


def _largest_by_step(configs: Mapping[str, TrainingSAEConfig], parameters: Mapping[str, int]) -> list[int]:
    """Parameters of the largest SAE; on a CPU of the largest with a fast step and the largest without."""
    kinds: dict[bool, int] = {}
    for name, cfg in configs.items():
        kind = _is_fast(cfg) and torch.device(cfg.device).type == "cpu"
        kinds[kind] = max(kinds.get(kind, 0), parameters[name])
    return list(kinds.values())


def _step(cfg: TrainingSAEConfig, batch_size: int) -> int:
    """Bytes that one member's step holds and frees."""
    fast, k = _is_fast(cfg), getattr(cfg, "largest_k", getattr(cfg, "k", 0))
    revival = REVIVAL if getattr(cfg, "aux_loss_coefficient", 0) else 0
    # Rules that only compare the layers (distilled, oracle) encode them one after the other.
    rows = batch_size * (getattr(cfg, "n_layers", 1) if getattr(cfg, "routing", "") == "every" else 1)
    tensors, kept = (FAST_STEP, FAST_KEPT) if fast else (DENSE_STEP, DENSE_KEPT)
    latents = max(tensors * cfg.d_sae, (tensors - 1) * cfg.d_sae + int(kept * k))
    d_model = getattr(cfg, "d_model", cfg.d_in)
    if fast and isinstance(cfg, ExpertFields):  # revives among the selected experts' alone
        revived = min(d_model // 2, cfg.active_experts * cfg.expert_width)
        latents += FAST_KEPT * revived if revival else 0
    elif fast:
        latents += revival * cfg.d_sae
    scaling = getattr(cfg, "feature_scaling", "none")
    matrices = SCALED[scaling if fast or scaling == "none" else "identity"]
    one_layer = getattr(cfg, "routing", None) in READ_ONE_LAYER and cfg.aggregator in READ_THE_SUM
    read = cfg.d_in + (STACK_TENSORS - 1) * cfg.d_model if one_layer else STACK_TENSORS * cfg.d_in
    return 4 * (rows * latents + batch_size * read + matrices * d_model * cfg.d_sae)


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
