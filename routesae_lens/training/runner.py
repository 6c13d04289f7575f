"""SAELens' multi-SAE runner with checkpoints that resume exactly. A single SAE is a dict of one."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import logger as sae_lens_logger
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from routesae_lens.backends import SitesHookPoint
from routesae_lens.saes import recycled
from routesae_lens.saes.transcoder_fields import TranscoderFields
from routesae_lens.training.buffer import MixingBuffer
from routesae_lens.training.checkpoint import Checkpoints, CheckpointState, restore_rng
from routesae_lens.training.data import measure
from routesae_lens.training.log import TrainingLog
from routesae_lens.training.rows import BUFFER_DTYPES, capacity_for, forward_rows
from routesae_lens.training.schedules import Schedule, fuse_adam
from routesae_lens.training.trainer import Evaluator, Monitor, MonitoredTrainer

CHECKPOINTS, LOG = "checkpoints", "log.jsonl"


@dataclass(kw_only=True)
class RunOptions:
    """What this package adds to SAELens' config. Intervals are in steps; 0 means never.

    Args:
        output: folder of the run.
        schedule: learning-rate schedule, see ``schedules.SCHEDULES``.
        unit_norm_every: set decoder norms to 1 before training, after steps 1, 1 + n, 1 + 2n ... and the last.
        log_every: a line of ``log.jsonl``.
        eval_every: call the evaluator (and at the end; 0: only then).
        checkpoint_every: a checkpoint; interruptions make one in any case.
        buffer_tokens: tokens that are shuffled together.
        buffer_dtype: in which activations are stored; None: as the model gives them.
        save_buffer: whether checkpoints hold the activation buffer. None: where it is under
            ``save_buffer_limit`` bytes. Without it, resuming computes the missing activations again.
        seed: of the shuffling and of torch's global generators.
        on_divergence: what happens to an SAE whose loss or weights become NaN or infinite, see
            ``trainer.ON_DIVERGENCE``.
        resume: continue from the last checkpoint in ``output``, if there is one.
    """

    output: Path
    schedule: str = "paper"
    unit_norm_every: int = 0
    log_every: int = 1
    eval_every: int = 0
    checkpoint_every: int = 0
    buffer_tokens: int
    buffer_dtype: str | None = None
    save_buffer: bool | None = None
    save_buffer_limit: int = 2_000_000_000
    seed: int = 0
    on_divergence: str = "raise"
    resume: bool = False


class RouteSAETrainingRunner(MultiSAETrainingRunner):
    """:class:`MultiSAETrainingRunner` with its own data stream, end of step and interruption handling.

    Args:
        cfg: SAELens' config; ``n_checkpoints`` and ``resume_from_checkpoint`` are not used.
        options: see :class:`RunOptions`.
        model: with the hook points of all SAEs mounted.
        dataset: with a column that SAELens knows, see ``data.load_text``.
        saes: by the names of ``cfg.saes``.
        evaluator: None for no evaluation. (SAELens' own misreads SAEs over several layers.)
        identity: what a checkpoint must have in common with this run to be continued by it.
    """

    trainer: MonitoredTrainer
    buffer: MixingBuffer | None = None
    _resumed: tuple[Path, CheckpointState] | None = None

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        options: RunOptions,
        *,
        model: Any,
        dataset: Any,
        saes: Mapping[str, TrainingSAE[Any]],
        evaluator: Evaluator | None = None,
        identity: Mapping[str, Any] | None = None,
    ):
        cfg.checkpoint_path = str(
            options.output / CHECKPOINTS
        )  # (set in its __init__ it would get a random suffix)
        self.options, self.identity = options, dict(identity or {})
        self.checkpoints = Checkpoints(options.output / CHECKPOINTS)
        self.log = TrainingLog(options.output / LOG)
        with _without_false_alarms():
            super().__init__(cfg, dataset, model, dict(saes))
        self.evaluator: Any = evaluator

    def prepare(self) -> None:
        """Look at data, model and checkpoint; :meth:`run` does it where it was not done before.

        Raises:
            ValueError: too little data, a hook or a width that does not fit the model, or a checkpoint of
                another run.
            FloatingPointError: the model answers NaN.
        """
        store = self.activations_store
        measure(store, self.cfg.training_tokens)
        self.identity |= {"lm_batch_size": store.store_batch_size_prompts, "probe": self._probe()}
        self.buffer = MixingBuffer(
            store,
            list(dict.fromkeys(self.cfg.hook_names_per_sae.values())),
            buffer_size=self.options.buffer_tokens,
            batch_size=self.cfg.train_batch_size_tokens,
            mix_fraction=self.cfg.activations_mixing_fraction,
            seed=self.options.seed,
            dtype=self._buffer_dtype,
            output_device=torch.device(self.cfg.device),
            read_ahead=bool(self.cfg.prefetch_llm_batches),
        )
        folder = self.checkpoints.latest() if self.options.resume else None
        self._resumed = None if folder is None else (folder, CheckpointState.read(folder))
        if self._resumed is not None:
            # Here and not where the weights are loaded: a prefetcher starts reading at once.
            self._resumed[1].check_same(self.identity)
            self.buffer.load_state_dict(self._resumed[1].data)
            self._resumed[1].data.clear()  # or a second copy of the buffer would stay for the whole run

    def run(self) -> dict[str, TrainingSAE[Any]]:
        """Train, or go on training, and save the inference SAEs under ``cfg.output_path``; diverged ones are not.

        Raises:
            FloatingPointError: activations, losses or weights are NaN or infinite (of all SAEs, where
                ``on_divergence`` is "freeze").
            TrainingInterrupted: SIGINT or SIGTERM, after writing a checkpoint.
        """
        if self.buffer is None:
            self.prepare()
        self.activations_store.get_multi_hook_data_loader = lambda: self.buffer
        torch.manual_seed(self.options.seed)
        try:
            return super().run()
        except BaseException:
            if wandb.run is not None and self.cfg.logger.log_to_wandb:
                wandb.finish(exit_code=1)
            raise
        finally:
            recycled.forget()

    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        """SAELens' place between the making of the trainer and ``fit``."""
        options = self.options
        assert self.buffer is not None  # prepare()
        for single in trainer.trainers.values():
            Schedule(options.schedule, self.cfg.total_training_steps).install(single)
            fuse_adam(single.optimizer)
        monitor = Monitor(
            log=self.log,
            checkpoints=self.checkpoints,
            buffer=self.buffer,
            config=self.identity,
            log_every=options.log_every,
            checkpoint_every=options.checkpoint_every,
            eval_every=options.eval_every,
            unit_norm_every=options.unit_norm_every,
            save_buffer=self.saves_buffer,
            evaluator=self.evaluator,
            on_divergence=options.on_divergence,
        )
        self.trainer = MonitoredTrainer.adopt(trainer, monitor)
        if self._resumed is not None:
            folder, state = self._resumed
            trainer.load_checkpoint(folder)  # after the schedule is in its place, or it would start anew
            for single in trainer.trainers.values():
                fuse_adam(single.optimizer)  # the checkpoint may come from a version that did not
            self.trainer.freeze(state.diverged)
            restore_rng(state.rng)
            self.log.cut(state.log_size)
        else:
            self.log.cut(0)
        with monitor.interruption:
            return self.trainer.fit()

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is not None:
            with self.trainer.data_provider.paused():  # what is written is the buffer itself, not a copy
                self.trainer.state().write(checkpoint_path)

    @property
    def buffer_bytes(self) -> int:
        """Largest size of the activation buffer in a checkpoint."""
        cfg, store = self.cfg, self.activations_store
        width = sum({hook: cfg.saes[name].d_in for name, hook in cfg.hook_names_per_sae.items()}.values())
        prefetched = int(cfg.prefetch_llm_batches) + 1 if cfg.prefetch_llm_batches else 0
        rows = prefetched * cfg.train_batch_size_tokens + capacity_for(
            self.options.buffer_tokens,
            cfg.train_batch_size_tokens,
            forward_rows(store.store_batch_size_prompts, store.context_size, store.seqpos_slice),
            cfg.activations_mixing_fraction,
        )
        dtype = self._buffer_dtype or next(self.model.parameters()).dtype
        return rows * (width * dtype.itemsize + 16)

    @property
    def _buffer_dtype(self) -> torch.dtype | None:
        name = self.options.buffer_dtype
        return None if name is None else BUFFER_DTYPES[name]

    @property
    def saves_buffer(self) -> bool:
        if self.options.save_buffer is None:
            return self.buffer_bytes < self.options.save_buffer_limit
        return self.options.save_buffer

    @torch.no_grad()
    def _probe(self) -> dict[str, float]:
        """One forward over eight tokens, to refuse now what would fail later: root mean square by hook.

        It also goes into checkpoints: a run that is resumed with another model shows another value.
        """
        hooks = self.cfg.hook_names_per_sae
        tokens = torch.arange(8, device=next(self.model.parameters()).device)[None]
        try:
            acts = self.activations_store.get_multi_hook_activations(tokens)
        except KeyError as error:
            raise ValueError(
                f"the model did not fire hook {error}; hooks asked for: {sorted(set(hooks.values()))}"
            ) from error
        for name, hook in hooks.items():
            if acts[hook].shape[-1] != self.cfg.saes[name].d_in:
                raise ValueError(
                    f"SAE {name!r} has d_in = {self.cfg.saes[name].d_in}, but {hook} gives "
                    f"{acts[hook].shape[-1]} values per token"
                )
            sae, point = self.cfg.saes[name], self.model.hook_dict[hook]
            if isinstance(sae, TranscoderFields) and isinstance(point, SitesHookPoint):
                expected = [sae.d_read, sae.d_out]
                if point.widths != expected:
                    raise ValueError(
                        f"SAE {name!r} reads {expected[0]} values and predicts {expected[1]}, but the sites of "
                        f"{hook} have {point.widths[0]} and {point.widths[1]}"
                    )
        probe = {hook: acts[hook].double().pow(2).mean().sqrt().item() for hook in sorted(acts)}
        if bad := [hook for hook, value in probe.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"the model's activations are NaN or infinite at {', '.join(bad)}")
        return probe


@contextmanager
def _without_false_alarms() -> Iterator[None]:
    """SAELens warns that an overridden run is not reproducible from its config alone (ours has run.json),
    and compares the rows of a dataset with a number of tokens."""
    level = sae_lens_logger.level
    sae_lens_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The training dataset contains fewer samples")
            warnings.filterwarnings("ignore", message="Dataset is not tokenized")
            yield
    finally:
        sae_lens_logger.setLevel(level)
