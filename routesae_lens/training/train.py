"""The entry point: :func:`train`."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from sae_lens import SAE, LoggingConfig
from sae_lens.load_model import HookedProxyLM
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from routesae_lens.analysis.evaluate import SpliceEvaluator
from routesae_lens.backends import backend_of
from routesae_lens.hook_points import mount_layers
from routesae_lens.saes.route_sae import RouteTrainingSAE
from routesae_lens.saes.stack import StackFields
from routesae_lens.saes.transcoder_fields import TranscoderFields
from routesae_lens.training.data import is_tokenized, load_text
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.memory import available_memory, estimate_memory, tell_memory
from routesae_lens.training.memory import check_memory as refuse_too_large
from routesae_lens.training.preflight import (
    check_numbers,
    check_output,
    check_space,
    checked_configs,
    context_limit,
    fit_to_run,
)
from routesae_lens.training.record import identity, read_record, record, write_record
from routesae_lens.training.runner import RouteSAETrainingRunner, RunOptions
from routesae_lens.training.schedules import windows
from routesae_lens.training.trainer import ON_DIVERGENCE, Evaluator

UNIFORM = 0.15
"""Share of the steps in which a distilled router's SAE reads random layers, where its config does not say."""


@dataclass(frozen=True)
class TrainingResult:
    """What :func:`train` returns."""

    saes: dict[str, TrainingSAE[Any]]
    """The trained SAEs in training form; ``SAE.load_from_disk(paths[name])`` gives the inference form."""
    paths: dict[str, Path]
    """Folder of each inference SAE."""
    log: Path
    """The JSONL log."""
    steps: int
    tokens: int
    diverged: dict[str, int] = field(default_factory=dict)
    """SAEs that became NaN and were frozen, with the training step; they are not among ``saes``."""


def train(
    model: Any,
    sae_configs: Mapping[str, TrainingSAEConfig] | TrainingSAEConfig,
    dataset: str | Path | Dataset | IterableDataset,
    *,
    output: str | Path,
    training_tokens: int,
    context_size: int = 512,
    batch_size: int = 4096,
    lm_batch_size: int | None = None,
    buffer_tokens: int | None = None,
    buffer_dtype: str | None = None,
    buffer_device: str | None = None,
    autocast_lm: bool = False,
    lr: float = 5e-4,
    schedule: str = "paper",
    unit_norm_every: int | None = None,
    seed: int | Mapping[str, int] = 0,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    evaluator: Evaluator | None = None,
    eval_every: int | None = None,
    log_every: int | None = None,
    checkpoint_every: int | None = None,
    save_buffer: bool | None = None,
    on_divergence: str = "raise",
    resume: bool = False,
    init_from: str | Path | SAE[Any] | None = None,
    prefetch: bool | int = False,
    check_memory: bool = True,
    device: str | None = None,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    run_name: str | None = None,
    runner_options: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train one or several SAEs on one pass of a language model, through SAELens' runner.

    Several SAEs (RouteSAEs, and ordinary SAELens SAEs whose ``metadata.hook_name`` is set) see the same
    batches. A recipe of :mod:`~routesae_lens.training.presets` is given as ``**PRESETS["llama_scope"].train``.
    The run can be stopped by Ctrl-C or SIGTERM and resumed: on CPU the weights then end the same.

    Args:
        model: a loaded HookedTransformer, TransformerBridge or HookedProxyLM.
        sae_configs: one config, or several by name; names become folders.
        dataset: see :func:`~routesae_lens.training.data.load_text`.
        output: folder for the SAEs (``<name>/``), ``log.jsonl``, ``run.json`` and ``checkpoints/``.
        training_tokens: rounded down to whole batches.
        context_size: tokens per sequence of the language model.
        batch_size: tokens per training step.
        lm_batch_size: sequences per forward of the language model; by default one training batch.
        buffer_tokens: tokens that are shuffled together; by default four training batches, or more where
            one forward gives more.
        buffer_dtype: in which activations are stored, "bfloat16" for half the memory of "float32"; by default
            as the model gives them.
        buffer_device: where the buffer is, for instance "cpu" beside SAEs on a GPU; by default with the SAEs.
        autocast_lm: run the language model in bfloat16 where PyTorch deems it safe (SAELens' option).
        lr: learning rate of Adam (0.9, 0.999).
        schedule: "paper" (5 % linear warm-up, 75 % constant, 20 % linear to 0), "llama_scope" (the same with a
            warm-up of 10,000 steps, in runs of 200,000 and more) or "constant".
        unit_norm_every: set decoder norms to 1 before training and every so many steps, as the authors do
            with 10. None leaves the decoder free.
        seed: of the initial weights (by name, to train the same config with several), the shuffling and torch.
        exclude_special_tokens: leave out the tokenizer's special tokens, or these token ids.
        exclude_first_position: leave out position 0, whose norm is ~100 times the median.
        evaluator: called as SAELens' multi-SAE evaluator, for instance a ``SpliceEvaluator``; its metrics go
            to the log.
        eval_every: steps between evaluations, a fifth of the run by default; one comes at the end, 0: that one
            alone.
        log_every: steps between lines of the log; by default 200 lines over the run.
        checkpoint_every: steps between checkpoints, a tenth of the run by default; 0 for none but those of
            interruptions. The last two are kept.
        save_buffer: whether checkpoints hold the activation buffer; by default where it is under 2 GB.
            Without it, resuming computes exactly the missing activations again.
        on_divergence: "raise" stops the run at the first SAE whose loss or weights are NaN or infinite;
            "freeze" stops this SAE alone, names it in the log and in ``run.json``, does not save it, and goes
            on with the others as if it had not been there, until none is left.
        resume: continue from the last checkpoint in ``output``; without any, start from the beginning.
        init_from: an SAE (or its folder) whose weights the RouteSAEs start from, see
            ``RouteTrainingSAE.init_from``.
        prefetch: run the language model in a background thread, so many batches ahead; True is one.
        check_memory: refuse a run that will not fit; False only prints the estimate.
        device: of the SAEs; by default the model's.
        wandb_project: log to Weights & Biases as SAELens does, beside the JSONL log.
        wandb_entity: its user or team.
        run_name: its name for the run.
        runner_options: other fields of SAELens' ``MultiSAETrainingRunnerConfig``, for instance
            ``{"autocast": True}``.

    Raises:
        ValueError, TypeError, FileNotFoundError: input that cannot work, before training starts.
        FileExistsError: ``output`` holds another run, and ``resume`` is not asked.
        OSError: not enough disk space.
        MemoryError: the run will not fit; all parts are listed.
        FloatingPointError: activations, losses or weights became NaN or infinite (with "freeze": of all
            SAEs); the last checkpoint stays.
        TrainingInterrupted: SIGINT or SIGTERM, after writing a checkpoint.
    """
    backend = backend_of(model)
    output = Path(output)
    configs = checked_configs(sae_configs)
    check_numbers(
        training_tokens,
        batch_size,
        context_size,
        buffer_tokens,
        lr,
        schedule,
        context_limit(model),
        buffer_dtype,
        lm_batch_size=(lm_batch_size, 1),
        unit_norm_every=(unit_norm_every, 0),
        log_every=(log_every, 1),
        eval_every=(eval_every, 0),
        checkpoint_every=(checkpoint_every, 0),
    )
    if on_divergence not in ON_DIVERGENCE:
        raise ValueError(f"unknown on_divergence {on_divergence!r}; known: {', '.join(ON_DIVERGENCE)}")
    steps = training_tokens // batch_size
    for one in configs.values():
        if getattr(one, "routing", None) == "distilled" and one.uniform_steps is None:
            one.uniform_steps = round(UNIFORM * steps)
    fit_to_run(configs, steps, unit_norm_every)
    if evaluator is not None and not callable(evaluator):
        raise TypeError(f"evaluator must be callable, for instance a SpliceEvaluator; got {evaluator!r}")
    if isinstance(seed, Mapping) and set(seed) != set(configs):
        raise ValueError(f"seed names {sorted(seed)}, the SAEs are {sorted(configs)}")
    check_output(output, configs, resume)
    text = load_text(dataset)
    if getattr(model, "tokenizer", None) is None and not is_tokenized(text):
        raise ValueError(
            "the model has no tokenizer, so it cannot be trained on text: give a dataset with token ids in a "
            "column 'tokens' or 'input_ids'"
        )
    hooks = {name: _hook_name(model, name, cfg) for name, cfg in configs.items()}
    for name, one in configs.items():
        one.metadata.hook_name = hooks[name]
    device = device or str(next(model.parameters()).device)
    buffer_device = buffer_device or device
    every = windows(steps)
    further = dict(runner_options or {})
    estimate = estimate_memory(
        model,
        configs,
        batch_size=batch_size,
        context_size=context_size,
        lm_batch_size=lm_batch_size,
        buffer_tokens=buffer_tokens,
        buffer_dtype=buffer_dtype,
        buffer_apart=torch.device(buffer_device).type != torch.device(device).type,
        mix_fraction=further.get("activations_mixing_fraction", 0.5),
        prefetch=prefetch,
        norm_estimate_batches=further.get("n_batches_for_norm_estimate", every.norm_estimate_batches),
        **_evaluation(evaluator, context_size, len(configs)),
    )
    available = available_memory(device)
    tell_memory(estimate, available, "run")
    if check_memory:
        refuse_too_large(estimate, available, "run", hint=" (check_memory=False)")
    seeds = dict(seed) if isinstance(seed, Mapping) else dict.fromkeys(configs, seed)
    run_seed = min(seeds.values())
    saes = {name: _build(cfg, seeds[name], device, init_from) for name, cfg in configs.items()}
    lm_batch_size = lm_batch_size or max(1, batch_size // context_size)
    cfg = MultiSAETrainingRunnerConfig(
        **{
            "saes": {name: sae.cfg for name, sae in saes.items()},
            "hook_names": hooks,
            "model_name": model_name(model),
            "model_class_name": "AutoModelForCausalLM"
            if isinstance(model, HookedProxyLM)
            else type(model).__name__,
            "model_from_pretrained_kwargs": {},  # how it was loaded is not ours to know
            "dataset_path": str(dataset) if isinstance(dataset, (str, Path)) else "",
            "context_size": context_size,
            "training_tokens": steps * batch_size,
            "store_batch_size_prompts": lm_batch_size,
            "seqpos_slice": (1 if exclude_first_position else None, None),
            "exclude_special_tokens": exclude_special_tokens,
            "device": device,
            "act_store_device": buffer_device,
            "autocast_lm": autocast_lm,
            "prefetch_llm_batches": prefetch,
            "seed": run_seed,
            "train_batch_size_tokens": batch_size,
            "lr": lr,
            "dead_feature_window": every.dead_feature_window,
            "feature_sampling_window": every.feature_sampling_window,
            "n_batches_for_norm_estimate": every.norm_estimate_batches,
            "logger": _wandb(
                output, resume, wandb_project, wandb_entity, run_name, log_every or every.log_every
            ),
            "output_path": str(output),
            "checkpoint_path": None,
        }
        | further
    )
    forward_tokens = lm_batch_size * context_size
    options = RunOptions(
        output=output,
        schedule=schedule,
        unit_norm_every=unit_norm_every or 0,
        log_every=log_every or every.log_every,
        eval_every=max(1, steps // 5) if eval_every is None else eval_every,
        checkpoint_every=every.checkpoint_every if checkpoint_every is None else checkpoint_every,
        buffer_tokens=buffer_tokens or max(4 * batch_size, forward_tokens),
        buffer_dtype=buffer_dtype,
        save_buffer=save_buffer,
        seed=run_seed,
        on_divergence=on_divergence,
        resume=resume,
    )
    runner = RouteSAETrainingRunner(
        cfg,
        options,
        model=model,
        dataset=text.with_format(None) if isinstance(text, Dataset) else text,  # SAELens sets a format on it
        saes=saes,
        evaluator=evaluator,
        identity=identity(cfg, options, seeds, backend.n_layers),
    )
    check_space(output, saes, runner.buffer_bytes if runner.saves_buffer else 0)
    runner.prepare()
    output.mkdir(parents=True, exist_ok=True)
    about = record(cfg, options, seeds)
    write_record(output, about | {"status": "running"})
    try:
        trained = runner.run()
    except TrainingInterrupted as stop:
        about["diverged"] = runner.trainer.diverged
        write_record(output, about | {"status": "interrupted", "checkpoint": str(stop.checkpoint)})
        raise
    about["diverged"] = runner.trainer.diverged
    write_record(output, about | {"status": "finished"})
    return TrainingResult(
        saes=trained,
        paths={name: output / name for name in trained},
        log=runner.log.path,
        steps=runner.trainer.n_training_steps,
        tokens=runner.trainer.n_training_samples,
        diverged=runner.trainer.diverged,
    )


def _evaluation(evaluator: Any, context_size: int, n_saes: int) -> dict[str, Any]:
    """What of an evaluator decides its memory; a function of the user's own is taken to need none."""
    if not isinstance(evaluator, SpliceEvaluator):
        return {"evaluates": False}
    tokens = evaluator.options.get("batch_size", 4) * evaluator.tokens.shape[1]
    sequences = ceil(tokens / context_size)
    return {"group_size": n_saes, "eval_batch_size": sequences, "evaluates_in_training": True}


def model_name(model: Any) -> str:
    if isinstance(model, HookedProxyLM):
        return str(model.model.config._name_or_path or type(model.model).__name__)
    return str(getattr(model.cfg, "model_name", None) or type(model).__name__)


def _hook_name(model: Any, name: str, cfg: TrainingSAEConfig) -> str:
    """Where the SAE reads; a point over several layers or sites is mounted."""
    if isinstance(cfg, StackFields):
        d_in = cfg.n_layers * cfg.d_model
        backend = backend_of(model)
        if cfg.d_model != backend.d_model:
            raise ValueError(
                f"SAE {name!r} was configured for d_model = {cfg.d_model} (d_in = {d_in} over {cfg.n_layers} "
                f"layers), the model has {backend.d_model}; ...TrainingSAEConfig.for_model(model) fits"
            )
        return mount_layers(model, cfg.layers, cfg.site)
    if isinstance(cfg, TranscoderFields):
        try:
            return cfg.mount(model)
        except ValueError as error:
            raise ValueError(f"SAE {name!r}: {error}") from None
    if not cfg.metadata.hook_name:
        raise ValueError(f"SAE {name!r}: set cfg.metadata.hook_name to the hook that it shall read")
    return str(cfg.metadata.hook_name)


def _build(cfg: TrainingSAEConfig, seed: int, device: str, init_from: Any) -> TrainingSAE[Any]:
    """The SAE with seeded weights. (SAELens never reads its config's seed.)"""
    # On the CPU first, so that the weights are the same on every device.
    cfg.device = "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sae: TrainingSAE[Any] = get_sae_training_class(cfg.architecture())[0](cfg)
    if init_from is not None:
        if not isinstance(sae, RouteTrainingSAE):
            raise ValueError(f"init_from is for RouteSAEs; {type(sae).__name__} is none")
        sae.init_from(init_from if isinstance(init_from, SAE) else SAE.load_from_disk(init_from))
    cfg.device = device
    return sae.to(device)


def _wandb(
    output: Path, resume: bool, project: str | None, entity: str | None, name: str | None, log_every: int
) -> LoggingConfig:
    if project is None:
        return LoggingConfig(log_to_wandb=False)
    run_id = read_record(output).get("wandb_id") if resume else None
    if run_id is not None:
        os.environ.setdefault("WANDB_RESUME", "allow")  # SAELens passes the id, but not that it may exist
    return LoggingConfig(
        wandb_project=project,
        wandb_entity=entity,
        run_name=name,
        wandb_id=run_id or uuid.uuid4().hex[:8],
        wandb_log_frequency=log_every,
    )
