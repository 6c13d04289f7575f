"""Meta-SAEs: an SAE that is trained on the decoder rows of another, by SAELens' trainer.

Leask et al. 2025 ("Sparse autoencoders do not find canonical units of analysis"): a BatchTopK SAE with 2,304
meta-latents and k = 4 on the 49,152 decoder directions of an SAE of GPT-2 small. What it finds is read by
``analysis/meta_latents.py``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from routesae_lens.analysis.geometry import decoder_directions
from routesae_lens.analysis.meta_latents import ROWS_AT_ONCE, UNIT_ROWS, decoder_rows
from routesae_lens.models import known_device
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.threshold import ThresholdCounts, check_level
from routesae_lens.training.checkpoint import Checkpoints, CheckpointState
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.log import TrainingLog
from routesae_lens.training.preflight import check_output, check_rate, check_sizes
from routesae_lens.training.record import sae_settings, versions, write_record
from routesae_lens.training.runner import CHECKPOINTS, LOG
from routesae_lens.training.schedules import Schedule, fuse_adam, windows
from routesae_lens.training.trainer import Monitor, MonitoredTrainer

META = "meta"
"""Name of the meta-SAE in its log, and of the hook that its trainer believes to read."""
META_LATENTS, OF_LATENTS = 2304, 49152
"""Meta-latents in the paper, and the latents they were trained on: the default width keeps this ratio."""
FILES = ("cfg.json", "sae_weights.safetensors")


class DecoderRows(Iterator[dict[str, Tensor]]):
    """Endless shuffled batches ``{META: (batch_size, d)}`` of rows, each row once per epoch.

    What is left of an epoch and too short for a batch goes into the next batch. Safe to save and to continue.

    Args:
        rows: decoder rows.
        batch_size: rows per batch, at most all of them.
        seed: of the shuffling.
        device: where batches are given out.
    """

    def __init__(self, rows: Float[Tensor, "row d"], batch_size: int, seed: int, device: str = "cpu"):
        self.rows, self.batch_size, self.device = rows, batch_size, device
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.zeros(0, dtype=torch.long)

    def __next__(self) -> dict[str, Tensor]:
        if len(self._order) < self.batch_size:
            self._order = torch.cat([self._order, torch.randperm(len(self.rows), generator=self._generator)])
        taken, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        return {META: self.rows[taken].to(self.device)}

    def consumed(self) -> None:
        """Nothing is prefetched: what was given out was used."""

    def state_dict(self, *, activations: bool = True) -> dict[str, Tensor]:
        """Where the shuffling stands; the rows themselves are in the SAE."""
        return {"order": self._order.clone(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state_dict` was made."""
        self._order = state["order"]
        self._generator.set_state(state["generator"])


def train_meta_sae(
    sae: Any,
    *,
    d_sae: int | None = None,
    k: int | float = 4,
    latents: Tensor | Sequence[int] | None = None,
    unit_rows: bool = True,
    steps: int = 2000,
    batch_size: int | None = None,
    lr: float = 3e-3,
    schedule: str = "paper",
    seed: int = 0,
    output: str | Path | None = None,
    log_every: int | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
    device: str | None = None,
) -> SAE[Any]:
    """Train a meta-SAE on the decoder rows of an SAE.

    SAELens' ``batchtopk`` architecture, trainer and file format: the result is an ordinary ``jumprelu`` SAE that
    ``SAE.load_from_disk(output)`` loads without this package. Its threshold is set after training so that on the
    rows trained on ``k`` meta-latents per latent are active on average. The same seed gives the same weights. With
    ``output`` the run can be stopped by Ctrl-C or SIGTERM and resumed; the weights then end the same.

    Args:
        sae: any SAE of SAELens or of this package; of a Crosscoder the rows of all layers side by side.
        d_sae: meta-latents; by default 3/64 of the rows, the ratio of Leask et al. (2,304 of 49,152).
        k: meta-latents of a latent on average; need not be whole.
        latents: whose rows to train on, a mask or numbers; all by default. Rows of latents that never fired mean
            nothing: leave them out, for instance with ``features.firing_frequency > 0``.
        unit_rows: scale rows to norm 1.
        steps: training steps.
        batch_size: rows per step; by default 1,024, or all rows where there are fewer.
        lr: learning rate of Adam (0.9, 0.999).
        schedule: as in :func:`~routesae_lens.training.train.train`.
        seed: of the initial weights and the shuffling.
        output: folder for the SAE, ``log.jsonl`` (whose tokens are rows) and ``run.json``; ``meta/<name of the SAE>``
            of a run's folder keeps it beside the record the report reads. None writes nothing.
        log_every: steps between lines of the log; by default 200 lines.
        checkpoint_every: steps between checkpoints in ``output``; 0 for none but those of interruptions.
        resume: continue from the last checkpoint in ``output``; without any, start from the beginning.
        device: by default the SAE's.

    Returns:
        The meta-SAE in its inference form.

    Raises:
        ValueError: too few rows, more meta-latents than rows, k above d_sae, rows that are not finite, numbers that
            make no sense, an unknown device, or a checkpoint of another run.
        FileExistsError: ``output`` holds another run, and ``resume`` is not asked.
        FloatingPointError: the loss or the weights became NaN or infinite.
        TrainingInterrupted: SIGINT or SIGTERM, after writing a checkpoint.
    """
    numbers, rows = decoder_rows(sae, latents, unit=unit_rows)
    batch_size = min(1024, len(rows)) if batch_size is None else batch_size
    d_sae = max(1, round(len(rows) * META_LATENTS / OF_LATENTS)) if d_sae is None else d_sae
    _check_sizes(
        len(rows), d_sae, batch_size, k, steps=(steps, 1), log_every=(log_every, 1),
        checkpoint_every=(checkpoint_every, 0),
    )  # fmt: skip
    check_rate(lr, schedule)
    if output is None and (resume or checkpoint_every):
        raise ValueError("resume and checkpoint_every need a folder: give output")
    if output is not None:
        check_output(Path(output), FILES, resume)
    device = known_device(device or str(decoder_directions(sae).device))
    meta = _build(rows, d_sae, float(k), seed, unit_rows, len(numbers))
    settings = {
        "sae": sae_settings(meta.cfg), "steps": steps, "batch_size": batch_size, "lr": lr, "schedule": schedule,
        "seed": seed, "unit_rows": unit_rows, "rows": len(rows), "rows_crc32": zlib.crc32(rows.numpy().tobytes()),
    }  # fmt: skip
    meta.cfg.device = device
    meta.to(device)
    stream = DecoderRows(rows, batch_size, seed, device)
    every = windows(steps)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if output is None else output)
        folder.mkdir(parents=True, exist_ok=True)
        cfg = SAETrainerConfig(
            total_training_samples=steps * batch_size,
            train_batch_size_samples=batch_size,
            lr=lr,
            lr_end=lr,  # the schedule is installed in place of SAELens'
            device=device,
            dead_feature_window=every.dead_feature_window,
            feature_sampling_window=every.feature_sampling_window,
            checkpoint_path=str(folder / CHECKPOINTS),
        )
        monitor = Monitor(
            log=TrainingLog(folder / LOG),
            checkpoints=Checkpoints(folder / CHECKPOINTS),
            buffer=stream,
            config=settings,
            log_every=log_every or every.log_every,
            checkpoint_every=checkpoint_every,
            unit="row",
        )
        trainer = _trainer(cfg, meta, stream, monitor, schedule, resume)
        write_record(folder, settings | {"versions": versions(), "status": "running"})
        try:
            with nullcontext() if output is None else monitor.interruption:
                trainer.fit()
        except TrainingInterrupted:
            write_record(folder, settings | {"versions": versions(), "status": "interrupted"})
            raise
        _set_threshold(meta, rows, float(k))
        if output is not None:
            _save(meta, folder)
            write_record(folder, settings | {"versions": versions(), "status": "finished"})
    return inference_form(meta)


def _check_sizes(n_rows: int, d_sae: Any, batch_size: Any, k: Any, **at_least: tuple[Any, int]) -> None:
    """Raises ValueError for sizes that cannot work; ``at_least`` holds further ones with their minimum."""
    check_sizes(d_sae=(d_sae, 1), batch_size=(batch_size, 1), **at_least)
    if d_sae >= n_rows or batch_size > n_rows:
        raise ValueError(
            f"too few rows: {n_rows} decoder rows cannot train {d_sae} meta-latents in batches of {batch_size}; "
            "there must be fewer meta-latents than rows, and at least one batch of rows"
        )
    check_level(k, 1, d_sae=d_sae)
    if k * batch_size < 1:
        raise ValueError(f"k = {k} meta-latents per row is less than one in a batch of {batch_size} rows")


def _build(
    rows: Tensor, d_sae: int, k: float, seed: int, unit_rows: bool, n_latents: int
) -> BatchTopKTrainingSAE:
    cfg = BatchTopKTrainingSAEConfig(
        d_in=rows.shape[1],
        d_sae=d_sae,
        k=k,
        metadata=SAEMetadata(**{UNIT_ROWS: unit_rows, "trained_on": f"decoder rows of {n_latents} latents"}),
    )
    # On the CPU first, so that the weights are the same on every device.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BatchTopKTrainingSAE(cfg)


def _trainer(
    cfg: SAETrainerConfig,
    meta: BatchTopKTrainingSAE,
    stream: DecoderRows,
    monitor: Monitor,
    schedule: str,
    resume: bool,
) -> MonitoredTrainer:
    """SAELens' trainer with this package's end of step, at the beginning or where the last checkpoint was made."""

    def add_state(checkpoint_path: Path | None) -> None:
        assert checkpoint_path is not None
        trainer.state().write(checkpoint_path)

    trainer = MonitoredTrainer.adopt(
        MultiSAETrainer(cfg, {META: meta}, {META: META}, stream, save_checkpoint_fn=add_state), monitor
    )
    (single,) = trainer.trainers.values()
    Schedule(schedule, cfg.total_training_steps).install(single)
    fuse_adam(single.optimizer)
    last = monitor.checkpoints.latest() if resume else None
    if last is None:
        monitor.log.cut(0)
        return trainer
    state = CheckpointState.read(last)
    state.check_same(json.loads(json.dumps(monitor.config)))
    stream.load_state_dict(state.data)
    trainer.load_checkpoint(last)
    fuse_adam(single.optimizer)  # the checkpoint brings its own switches
    monitor.log.cut(state.log_size)
    return trainer


@torch.no_grad()
def _set_threshold(meta: BatchTopKTrainingSAE, rows: Tensor, k: float) -> None:
    """The threshold above which ``k`` meta-latents per row are active, over all rows.

    SAELens' is a running mean of each batch's smallest active value, from 0: too low after a short run, and lower
    than the one that gives k. The rows are few enough to count them all.
    """
    counts = ThresholdCounts()
    for part in rows.split(ROWS_AT_ONCE):
        counts.add(meta.encode_with_hidden_pre(part.to(meta.device))[1])
    meta.topk_threshold.fill_(counts.threshold(k).value)


def _save(meta: BatchTopKTrainingSAE, folder: Path) -> None:
    """Weights and config, each whole or not at all; the config, without which nothing loads, last."""
    partial = folder / ".partial"
    weights, config = meta.save_inference_model(partial)
    for path in (weights, config):
        path.replace(folder / path.name)
    partial.rmdir()
