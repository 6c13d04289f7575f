"""What changes with the step, as functions of the total number of steps; and the optimiser's fast kernel."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import torch
from sae_lens.training.sae_trainer import SAETrainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARM_UP, DECAY = 0.05, 0.20
"""Fractions of the paper's schedule; the 75 % between them are constant."""

SCOPE_WARM_UP = 10_000
"""Steps of Llama Scope's warm-up (section 3.3.2)."""

FUSED_DEVICES = ("cpu", "cuda")


def paper_schedule(step: int, total_steps: int) -> float:
    """Factor on the learning rate at ``step`` (0-based): 5 % linear from 0, 75 % constant, 20 % linear to 0.

    The first step has factor 0, and the last one 1 / (20 % of the steps), as in the authors' code.
    """
    return _trapezoid(step, total_steps, int(WARM_UP * total_steps), int(DECAY * total_steps))


def llama_scope_schedule(step: int, total_steps: int) -> float:
    """Llama Scope's: linear from 0 over the first 10,000 steps, constant, linear to 0 over the last 20 %.

    A run of under 200,000 steps warms up over 5 % of them, as the paper of RouteSAE does: 10,000 steps might be
    all there are.
    """
    warm_up = min(SCOPE_WARM_UP, int(WARM_UP * total_steps))
    return _trapezoid(step, total_steps, warm_up, int(DECAY * total_steps))


def _trapezoid(step: int, total_steps: int, warm_up: int, decay: int) -> float:
    if step < warm_up:
        return step / warm_up
    if step < total_steps - decay or decay == 0:
        return 1.0
    return max(0.0, (total_steps - step) / decay)


def constant_schedule(step: int, total_steps: int) -> float:
    """Factor 1 at every step."""
    return 1.0


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "paper": paper_schedule,
    "constant": constant_schedule,
    "llama_scope": llama_scope_schedule,
}
"""To add a schedule, write a function ``(step, total_steps) -> factor`` and give it an entry."""


class Schedule:
    """A schedule of :data:`SCHEDULES` for a given length, in the form LambdaLR takes.

    It is an object, not a closure, because LambdaLR saves and loads the ``__dict__`` of objects, and drops
    functions silently.
    """

    def __init__(self, name: str, total_steps: int):
        if name not in SCHEDULES:
            raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
        self.name, self.total_steps = name, total_steps

    def __call__(self, step: int) -> float:
        return SCHEDULES[self.name](step, self.total_steps)

    def install(self, trainer: SAETrainer[Any, Any]) -> None:
        """Replace the trainer's own scheduler; before the first step only."""
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.cfg.lr  # SAELens' scheduler has already scaled it
            group.pop("initial_lr", None)
        trainer.lr_scheduler = LambdaLR(trainer.optimizer, self)


def fuse_adam(optimizer: Optimizer) -> None:
    """Switch Adam to PyTorch's fused kernel, about 10 times cheaper on a CPU; equal up to rounding.

    SAELens makes the optimiser without it. Call it before the first step, and again after a checkpoint was
    loaded (which brings its own switches). Where PyTorch has no such kernel nothing changes.
    """
    for group in optimizer.param_groups:
        if all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in group["params"]):
            group["fused"], group["foreach"] = True, False
            for p in group["params"]:
                if "step" in (state := optimizer.state.get(p, {})):
                    # the fused kernel counts on the parameter's device, the default one on the CPU
                    state["step"] = state["step"].to(device=p.device, dtype=torch.float32)


class Windows(NamedTuple):
    """Intervals in steps. SAELens' defaults (1,000 and more) never come round in a short run."""

    log_every: int
    """200 lines over the run."""
    checkpoint_every: int
    """10 checkpoints over the run; the last two are kept."""
    dead_feature_window: int
    """A latent is dead after this many steps without firing: a tenth of the run, at most SAELens' 1,000."""
    feature_sampling_window: int
    """Firing frequencies are counted over windows of this length: a fifth of the run, at most SAELens' 2,000.

    It is rounded so that the last window, whose frequencies are saved with the SAE, is not a sliver.
    """
    norm_estimate_batches: int
    """Batches for ``normalize_activations="expected_average_only_in"``; SAELens' 1,000 exceed a short run."""


def windows(total_steps: int) -> Windows:
    """The :class:`Windows` of a run of ``total_steps``."""
    return Windows(
        log_every=max(1, total_steps // 200),
        checkpoint_every=max(1, total_steps // 10),
        dead_feature_window=max(1, min(1000, total_steps // 10)),
        feature_sampling_window=ceil(total_steps / max(5, ceil(total_steps / 2000))),
        norm_estimate_batches=max(1, min(100, total_steps // 10)),
    )
