"""What happens at the end of every training step, hung into SAELens' trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import wandb
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from routesae_lens.training.buffer import ActivationsNotFinite, MixingBuffer, TrainingBatches
from routesae_lens.training.checkpoint import Checkpoints, CheckpointState, rng_state
from routesae_lens.training.interruption import Interruption, TrainingInterrupted
from routesae_lens.training.log import TrainingLog

Evaluator = Callable[..., dict[str, Any]]
"""SAELens' multi-SAE evaluator: ``(saes=, data_provider=, activation_scalers=, hook_names=) -> metrics``."""


@torch.no_grad()
def set_decoder_norm(sae: SAE[Any]) -> None:
    """Scale every decoder row (latent) to norm 1, in place and alone, as the authors do.

    Where latents are measured in units of the decoder norm (``rescale_acts_by_decoder_norm``), this
    changes the SAE's function; the authors' SAE does not do that.
    """
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


@dataclass
class Monitor:
    """What the end of a step looks at. Intervals are in steps; 0 means never."""

    log: TrainingLog
    checkpoints: Checkpoints
    buffer: MixingBuffer
    config: dict[str, Any]
    """Goes into every checkpoint, see ``CheckpointState``."""
    log_every: int
    checkpoint_every: int
    eval_every: int = 0
    unit_norm_every: int = 0
    save_buffer: bool = True
    evaluator: Evaluator | None = None
    interruption: Interruption = field(default_factory=Interruption)


class MonitoredTrainer(MultiSAETrainer):
    """SAELens' trainer, with an end of step: ``fit`` itself stays SAELens'.

    SAELens calls ``_update_pbar`` last in every step, when its counters are already those of the next one;
    a checkpoint made there resumes exactly. (Its own ``_checkpoint_if_needed`` comes one line too early.)
    """

    monitor: Monitor
    data_provider: TrainingBatches
    _bar: Any = None

    @classmethod
    def adopt(cls, trainer: MultiSAETrainer, monitor: Monitor) -> MonitoredTrainer:
        """Turn a trainer that has not begun into a monitored one, in place."""
        trainer.__class__ = cls
        assert isinstance(trainer, cls)
        trainer.monitor = monitor
        trainer.data_provider = TrainingBatches(trainer.data_provider, monitor.buffer)
        trainer.evaluator = (
            None  # ours runs at the end of the step; SAELens' place is reached with wandb only
        )
        for single in trainer.trainers.values():
            # Some SAEs compute metrics on logging steps only, and SAELens logs only to wandb.
            single._is_logging_step = trainer._is_log_step_begun
        return trainer

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        if self.n_training_steps == 0 and self.monitor.unit_norm_every:
            self._set_decoder_norms()
        try:
            return super().fit()
        except FloatingPointError as error:
            step, readers = self.n_training_steps, ""
            if isinstance(error, ActivationsNotFinite):  # while the next step's batch was fetched
                names = [name for name, hook in self.hook_names.items() if hook == error.hook]
                step, readers = step + 1, f", read by SAE {', '.join(map(repr, names))}"
            raise FloatingPointError(
                f"stopped at training step {step}: {error}{readers}. "
                f"Last checkpoint: {self.monitor.checkpoints.latest() or 'none yet'}"
            ) from error
        finally:
            if self._bar is not None:
                self._bar.close()

    @property
    def at_end(self) -> bool:
        return self.n_training_samples >= self.cfg.total_training_samples

    def _is_log_step(self) -> bool:
        return (
            self.n_training_steps % self.monitor.log_every == 0 or self.n_training_steps == 1 or self.at_end
        )

    def _is_log_step_begun(self) -> bool:
        """The same, asked within the step, before the counter moves."""
        step = self.n_training_steps + 1
        return step % self.monitor.log_every == 0 or step == 1 or step == self.cfg.total_training_steps

    @torch.no_grad()
    def _update_pbar(
        self,
        step_outputs: dict[str, TrainStepOutput],
        pbar: tqdm,
        update_interval: int = 1,
    ) -> None:
        """The end of a step: ``n_training_steps`` steps are done."""
        monitor, step = self.monitor, self.n_training_steps
        losses = torch.stack([output.loss.detach().float() for output in step_outputs.values()]).tolist()
        self._check_losses(dict(zip(step_outputs, losses, strict=True)))
        every = monitor.unit_norm_every
        if every and ((step - 1) % every == 0 or self.at_end):
            self._set_decoder_norms()
        self._show(pbar, dict(zip(step_outputs, losses, strict=True)))
        if self._is_log_step():
            monitor.log.append(step, self.n_training_samples, self._metrics(step_outputs))
        if monitor.evaluator and monitor.eval_every and (step % monitor.eval_every == 0 or self.at_end):
            self._evaluate()
        if self.at_end:
            return
        if monitor.interruption.requested:
            raise TrainingInterrupted(
                f"stopped by {monitor.interruption.requested} after step {step} of {self.cfg.total_training_steps}",
                checkpoint=self.save(),
            )
        if monitor.checkpoint_every and step % monitor.checkpoint_every == 0:
            self.save()

    def save(self) -> Any:
        """Checkpoint of this moment (between two steps); returns its folder.

        Raises:
            FloatingPointError: weights that are not finite; nothing is written.
        """
        for name, sae in self.saes.items():
            for parameter, tensor in sae.named_parameters():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(f"{parameter} of SAE {name!r} is NaN or infinite")
        # SAELens would upload the weights of every checkpoint; these are for resuming, the final ones go up.
        logger, on = self.cfg.logger, self.cfg.logger.log_to_wandb
        logger.log_to_wandb = False
        try:
            # (SAELens' method calls back save_checkpoint_fn, which adds our files: runner.py)
            return self.monitor.checkpoints.save(self.n_training_steps, self.save_checkpoint)
        finally:
            logger.log_to_wandb = on

    def state(self) -> CheckpointState:
        monitor = self.monitor
        return CheckpointState(
            step=self.n_training_steps,
            log_size=monitor.log.size,
            config=monitor.config,
            data=monitor.buffer.state_dict(activations=monitor.save_buffer),
            rng=rng_state(),
        )

    def _checkpoint_if_needed(self) -> None:
        pass  # see the class docstring

    def _check_losses(self, losses: dict[str, float]) -> None:
        bad = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
        if bad:
            raise FloatingPointError(
                "the loss is not finite for "
                + ", ".join(f"SAE {name!r} ({loss})" for name, loss in bad.items())
            )

    def _set_decoder_norms(self) -> None:
        for sae in self.saes.values():
            set_decoder_norm(sae)

    def _show(self, bar: Any, losses: dict[str, float]) -> None:
        if self._bar is None:
            self._bar = bar
            bar.set_description("training")
            bar.unit = "tok"
            bar.initial = (
                self.n_training_samples - self.cfg.train_batch_size_samples
            )  # for the rate of a resumed run
            bar.n = bar.initial
        shown = losses if len(losses) <= 4 else {"best": min(losses.values()), "worst": max(losses.values())}
        bar.set_postfix({name: f"{loss:.4f}" for name, loss in shown.items()}, refresh=False)
        bar.update(self.n_training_samples - bar.n)

    def _metrics(self, step_outputs: dict[str, TrainStepOutput]) -> dict[str, Any]:
        return {
            f"{name}/{key}": value
            for name, single in self.trainers.items()
            for key, value in single.build_train_step_log_dict(
                output=step_outputs[name], n_training_samples=self.n_training_samples
            ).items()
        }

    def _maybe_log_sparsity(self, final: bool = False) -> None:
        metrics = {
            f"{name}/{key}": value
            for name, single in self.trainers.items()
            for key, value in single.full_sparsity_window_log().items()
            if isinstance(value, (int, float))  # no histograms
        }
        if metrics:
            self.monitor.log.append(self.n_training_steps, self.n_training_samples, metrics)
        super()._maybe_log_sparsity(final)

    def _evaluate(self) -> None:
        assert self.monitor.evaluator is not None
        try:
            # (the prefetcher must not use the model meanwhile; and evaluating must not change the training)
            with self.data_provider.paused(), torch.random.fork_rng(devices=[]):
                for sae in self.saes.values():
                    sae.eval()
                metrics = self.monitor.evaluator(
                    saes=self.saes,
                    data_provider=self.data_provider,
                    activation_scalers={name: t.activation_scaler for name, t in self.trainers.items()},
                    hook_names=self.hook_names,
                )
        except Exception as error:
            error.add_note(f"in the evaluation after step {self.n_training_steps}; saved {self.save()}")
            raise
        finally:
            for sae in self.saes.values():
                sae.train()
        self.monitor.log.append(self.n_training_steps, self.n_training_samples, metrics)
        if self.cfg.logger.log_to_wandb:
            wandb.log(metrics, step=self.n_training_steps)
