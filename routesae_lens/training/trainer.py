"""What happens at the end of every training step, hung into SAELens' trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import wandb
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from tqdm.auto import tqdm

from routesae_lens.saes import recycled
from routesae_lens.training.buffer import ActivationsNotFinite, SavedStream, TrainingBatches
from routesae_lens.training.checkpoint import Checkpoints, CheckpointState, rng_state
from routesae_lens.training.interruption import Interruption, TrainingInterrupted
from routesae_lens.training.log import TrainingLog
from routesae_lens.training.members import Member

Evaluator = Callable[..., dict[str, Any]]
"""SAELens' multi-SAE evaluator: ``(saes=, data_provider=, activation_scalers=, hook_names=) -> metrics``."""

ON_DIVERGENCE = ("raise", "freeze")


@torch.no_grad()
def set_decoder_norm(sae: SAE[Any]) -> None:
    """Scale every decoder row (latent) to norm 1, in place and alone, as the authors do.

    Where latents are measured in units of the decoder norm (``rescale_acts_by_decoder_norm``), this
    changes the SAE's function; the authors' SAE does not do that.
    """
    sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))


@dataclass
class Monitor:
    """What the end of a step looks at. Intervals are in steps; 0 means never (evaluations: at the end alone)."""

    log: TrainingLog
    checkpoints: Checkpoints
    buffer: SavedStream
    config: dict[str, Any]
    """Goes into every checkpoint, see ``CheckpointState``."""
    log_every: int
    checkpoint_every: int
    eval_every: int = 0
    unit_norm_every: int = 0
    save_buffer: bool = True
    evaluator: Evaluator | None = None
    on_divergence: str = "raise"
    """"raise", or "freeze" to stop an SAE that became NaN alone; see :data:`ON_DIVERGENCE`."""
    unit: str = "tok"
    """What the progress bar counts."""
    interruption: Interruption = field(default_factory=Interruption)


class MonitoredTrainer(MultiSAETrainer):
    """SAELens' trainer, with an end of step: ``fit`` itself stays SAELens'.

    SAELens calls ``_update_pbar`` last in every step, when its counters are already those of the next one;
    a checkpoint made there resumes exactly. (Its own ``_checkpoint_if_needed`` comes one line too early.)
    """

    monitor: Monitor
    data_provider: TrainingBatches
    members: dict[str, Member]
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
        trainer.members = {
            name: Member(single, trainer._logs_now) for name, single in trainer.trainers.items()
        }
        return trainer

    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Train to the end; the SAEs that did not diverge."""
        if self.n_training_steps == 0 and self.monitor.unit_norm_every:
            self._set_decoder_norms()
        try:
            super().fit()
            return self.running
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
    def diverged(self) -> dict[str, int]:
        """Frozen SAEs, and the step at which each diverged."""
        return {name: m.diverged_at for name, m in self.members.items() if m.diverged_at is not None}

    @property
    def running(self) -> dict[str, TrainingSAE[Any]]:
        """The SAEs that have not diverged."""
        return {name: sae for name, sae in self.saes.items() if self.members[name].diverged_at is None}

    def freeze(self, diverged: Mapping[str, int]) -> None:
        """Freeze SAEs by name, with the step at which each diverged (also from a checkpoint)."""
        for name, step in diverged.items():
            self.members[name].freeze(step)

    @property
    def at_end(self) -> bool:
        return self.n_training_samples >= self.cfg.total_training_samples

    def _is_log_step(self) -> bool:
        return (
            self.n_training_steps % self.monitor.log_every == 0 or self.n_training_steps == 1 or self.at_end
        )

    def _logs_now(self) -> bool:
        return self._is_log_step_begun() or self._is_logging_step()  # the latter is SAELens', for wandb

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
        names = list(self.running)
        values = torch.stack([step_outputs[name].loss.float() for name in names]).tolist()
        losses = dict(zip(names, values, strict=True))
        self._diverge({name: f"the loss is {x}" for name, x in losses.items() if not math.isfinite(x)})
        every = monitor.unit_norm_every
        if every and ((step - 1) % every == 0 or self.at_end):
            self._set_decoder_norms()
        self._show(pbar, {name: losses[name] for name in self.running})
        due = self.at_end or (monitor.eval_every > 0 and step % monitor.eval_every == 0)
        evaluates = monitor.evaluator is not None and due
        if evaluates or self.at_end:
            self._check_weights()
        if self._is_log_step():
            monitor.log.append(step, self.n_training_samples, self._metrics(step_outputs))
        if evaluates:
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
            FloatingPointError: weights that are not finite (unless such SAEs are frozen); nothing is written.
        """
        self._check_weights()
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
            diverged=self.diverged,
        )

    def _checkpoint_if_needed(self) -> None:
        pass  # see the class docstring

    def _check_weights(self) -> None:
        broken = {name: self.members[name].broken_weights() for name in self.running}
        self._diverge({name: f"{', '.join(bad)} not finite" for name, bad in broken.items() if bad})

    def _diverge(self, reasons: dict[str, str]) -> None:
        """SAEs that are not finite: stop them alone, or the run."""
        if not reasons:
            return
        what = "; ".join(f"SAE {name!r}: {reason}" for name, reason in reasons.items())
        if self.monitor.on_divergence == "raise":
            raise FloatingPointError(what)
        step = self.n_training_steps
        self.freeze({name: step for name in reasons})
        if not self.running:
            raise FloatingPointError(f"all {len(self.saes)} SAEs diverged; at last {what}")
        warnings.warn(f"frozen at training step {step}, the others go on: {what}", stacklevel=2)
        self.monitor.log.append(
            step, self.n_training_samples, {f"{name}/diverged": reason for name, reason in reasons.items()}
        )

    def _set_decoder_norms(self) -> None:
        for sae in self.running.values():
            set_decoder_norm(sae)

    def _show(self, bar: Any, losses: dict[str, float]) -> None:
        if self._bar is None:
            self._bar = bar
            bar.set_description("training")
            bar.unit = self.monitor.unit
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
            for name in self.running
            for key, value in self.trainers[name]
            .build_train_step_log_dict(output=step_outputs[name], n_training_samples=self.n_training_samples)
            .items()
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
        recycled.forget()
        try:
            # (the prefetcher must not use the model meanwhile; and evaluating must not change the training)
            with self.data_provider.paused(), torch.random.fork_rng(devices=[]):
                for sae in self.saes.values():
                    sae.eval()
                running = self.running
                metrics = self.monitor.evaluator(
                    saes=running,
                    data_provider=self.data_provider,
                    activation_scalers={name: self.trainers[name].activation_scaler for name in running},
                    hook_names={name: self.hook_names[name] for name in running},
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
