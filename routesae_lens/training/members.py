"""One SAE among the several of a run: its step leaves nothing behind, and it can be frozen alone.

``MultiSAETrainer`` calls ``step`` on every member, keeps what it returns until the step of all is done, and
has no place for a member that diverged; so the member's ``step`` is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor


class Member:
    """Wraps ``trainer.step`` in place.

    On logging steps the metrics are computed at once; then inputs, latents and reconstructions (two tensors
    of batch x width and more per member) are dropped, and only the loss stays.

    Args:
        trainer: SAELens' trainer of this SAE.
        logs_now: whether the step under way is logged.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], logs_now: Callable[[], bool]):
        self.trainer, self.logs_now = trainer, logs_now
        self.diverged_at: int | None = None
        """The training step (from 1) at which the loss or the weights were no longer finite."""
        self._step, self._metrics_of = trainer.step, trainer.build_train_step_log_dict
        self._metrics: dict[str, Any] = {}
        seams: Any = trainer
        seams.step = self.step
        seams.build_train_step_log_dict = lambda output, n_training_samples: self._metrics

    def step(self, batch: Tensor) -> TrainStepOutput:
        if self.diverged_at is not None:
            self.trainer.n_training_samples += len(batch)  # SAELens reads the progress off any member
            return _only_loss(torch.tensor(float("nan")))
        output = self._step(batch)
        if self.logs_now():
            self._metrics = self._metrics_of(
                output=output, n_training_samples=self.trainer.n_training_samples
            )
        return _only_loss(output.loss.detach())

    def freeze(self, step: int) -> None:
        """No more updates, metrics or firing frequencies; weights and optimiser stay as they are."""
        self.diverged_at, self._metrics = step, {}
        seams: Any = self.trainer
        seams.full_sparsity_window_log = dict  # its histogram would choke on the empty window

    def broken_weights(self) -> list[str]:
        """Names of parameters that hold NaN or infinity."""
        return [
            name for name, tensor in self.trainer.sae.named_parameters() if not torch.isfinite(tensor).all()
        ]


def _only_loss(loss: Tensor) -> TrainStepOutput:
    none = torch.zeros(0)
    return TrainStepOutput(
        sae_in=none, sae_out=none, feature_acts=none, hidden_pre=none, loss=loss, losses={}
    )
