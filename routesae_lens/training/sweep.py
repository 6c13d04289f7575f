"""A sweep: methods x sparsities x seeds, trained on one language-model forward per batch, then evaluated.

``output`` holds ``sweep.json`` (what the sweep is), ``training/`` (what ``train`` writes), ``results/<member>.json``
and ``results.csv`` (what was measured). Everything is written whole or not at all, so a sweep that was
stopped at any point goes on from there: training from its checkpoint, evaluation with the next group.
"""

from __future__ import annotations

import csv
import gc
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.analysis.stream import check_tokens
from routesae_lens.saes.forms import with_routing
from routesae_lens.training.checkpoint import flat
from routesae_lens.training.data import load_text
from routesae_lens.training.log import plain
from routesae_lens.training.memory import available_memory, check_memory, estimate_memory, tell_memory
from routesae_lens.training.methods import METHODS, Method
from routesae_lens.training.record import read_object, read_record, versions, write_whole
from routesae_lens.training.schedules import windows
from routesae_lens.training.sweep_config import SweepConfig, SweepMember
from routesae_lens.training.sweep_identity import (
    SWEEP_FILE,
    about_sweep,
    check_same_sweep,
    identity_of,
    read_sheet,
)
from routesae_lens.training.train import train

CSV_FILE, TRAINING, RESULTS = "results.csv", "training", "results"
NOT_FINITE = "not finite"
"""Status of a member whose evaluation gave NaN or infinity."""
NORM_ESTIMATE_BATCHES = 10
"""SAELens holds them all at once, of every hook, while it estimates the input scale of a plain SAE."""

Measure = Callable[[dict[str, SAE[Any]]], Mapping[str, Mapping[str, Any]]]
"""From inference SAEs by name to what was measured of each, ready for JSON."""


@dataclass(frozen=True)
class SweepResult:
    """A sweep on the disk, finished or not."""

    output: Path
    members: tuple[SweepMember, ...]
    identity: str
    """Hash of everything that decides the numbers; every result carries it."""
    training_tokens: int
    diverged: dict[str, int]
    """Members that became NaN, and the training step."""

    @classmethod
    def read(cls, output: str | Path) -> SweepResult:
        """Of an output folder; no model is needed.

        Raises:
            FileNotFoundError: no sweep there.
            ValueError: a damaged file.
        """
        output = Path(output)
        sheet = read_sheet(output)
        try:
            members = tuple(SweepMember(**one) for one in sheet["members"])
            config = sheet["about"]["config"]
            training_tokens = config["training_tokens"] // config["batch_size"] * config["batch_size"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{output / SWEEP_FILE} is damaged: {type(error).__name__}: {error}") from error
        return cls(
            output=output,
            members=members,
            identity=sheet["identity"],
            training_tokens=training_tokens,
            diverged=read_record(output / TRAINING).get("diverged", {}),
        )

    @property
    def trained(self) -> bool:
        """Whether the training is finished."""
        return read_record(self.output / TRAINING).get("status") == "finished"

    @property
    def csv(self) -> Path:
        """One line per member measured so far."""
        return self.output / CSV_FILE

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """What ``results/<member>.json`` hold so far, by member."""
        return self.records(RESULTS)

    @property
    def not_finite(self) -> list[str]:
        """Members whose evaluation gave NaN or infinity."""
        return [name for name, record in self.results.items() if record["status"] == NOT_FINITE]

    def load(self, name: str, device: str = "cpu") -> SAE[Any]:
        """The inference SAE of a member.

        An MLSAE encodes every layer and chooses none; it comes with a random layer for each token, drawn as
        evenly as it was trained. ``with_routing`` gives it another rule.
        """
        sae: SAE[Any] = SAE.load_from_disk(self.output / TRAINING / name, device=device)
        if getattr(sae.cfg, "routing", None) == "every":
            seed = next(member.seed for member in self.members if member.name == name)
            sae = with_routing(sae, "random", route_seed=seed)
        return sae

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """The files of one :meth:`measure`, by member, in the members' order.

        Raises:
            ValueError: a damaged file.
        """
        paths = {member.name: self.output / kind / f"{member.name}.json" for member in self.members}
        records = {name: read_object(path) for name, path in paths.items() if path.exists()}
        for name, record in records.items():
            if missing := {"name", "status"} - record.keys():
                raise ValueError(f"{paths[name]} is damaged: it lacks {', '.join(sorted(missing))}")
        return records

    def measure(
        self, kind: str, measure: Measure, *, group_size: int = 6, device: str = "cpu", progress: bool = True
    ) -> dict[str, dict[str, Any]]:
        """Measure all members in groups that share one pass; those already measured are not measured again.

        Writes ``<output>/<kind>/<member>.json`` after each group. Members that diverged are left out; where the
        KL is not finite, the status says so.

        Args:
            kind: name of the folder, for instance "features".
            measure: from SAEs by name to one dict of values for each.
            group_size: SAEs held in memory and measured at once.
            device: where the SAEs are loaded.
            progress: show a bar.

        Raises:
            ValueError: a name that cannot be a folder of its own, a group size below 1, or an SAE of which
                ``measure`` gave nothing.
        """
        if not kind or Path(kind).name != kind or kind in (TRAINING, SWEEP_FILE, CSV_FILE):
            raise ValueError(f"{kind!r} cannot be the name of a folder of results")
        if group_size < 1:
            raise ValueError(f"group_size must be 1 or more, got {group_size}")
        pending = [
            member
            for member in self.members
            if member.name not in self.diverged and not (self.output / kind / f"{member.name}.json").exists()
        ]
        with tqdm(total=len(pending), desc=kind, unit="SAE", disable=not progress) as bar:
            for group in _groups(pending, group_size):
                measured = measure({member.name: self.load(member.name, device) for member in group})
                if missing := [member.name for member in group if member.name not in measured]:
                    raise ValueError(f"nothing was measured of {', '.join(missing)}")
                for member in group:
                    values = plain(measured[member.name])
                    status = NOT_FINITE if values.get("kl", 0) is None else "evaluated"  # (JSON has no NaN)
                    self._write(kind, member, {"status": status} | values)
                bar.update(len(group))
                self._write_csv()
        return self.records(kind)

    def note_diverged(self) -> None:
        """A result for each member that has none to come."""
        for member in self.members:
            if member.name in self.diverged:
                step = self.diverged[member.name]
                self._write(RESULTS, member, {"status": f"diverged at step {step}"})
        self._write_csv()

    def _write(self, kind: str, member: SweepMember, values: Mapping[str, Any]) -> None:
        about = {
            **{"name": member.name, "method": member.method, "sparsity_kind": member.kind},
            **{"sparsity": member.sparsity, "seed": member.seed, "training_tokens": self.training_tokens},
        }
        record = about | plain(values) | {"versions": versions(), "sweep": self.identity}
        (self.output / kind).mkdir(exist_ok=True)
        write_whole(self.output / kind / f"{member.name}.json", json.dumps(record, indent=1))

    def _write_csv(self) -> None:
        rows = [
            flat({key: value for key, value in record.items() if key not in ("versions", "sweep")}, "/")
            for record in self.results.values()
        ]
        if rows:
            text = io.StringIO()
            columns = dict.fromkeys(column for row in rows for column in row)
            writer = csv.DictWriter(text, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_whole(self.csv, text.getvalue())


def sweep(
    model: Any,
    config: SweepConfig,
    dataset: str | Path | Dataset | IterableDataset,
    held_out: Int[Tensor, "sequence pos"],
    output: str | Path,
    *,
    methods: Mapping[str, Method] = METHODS,
    resume: bool = True,
    group_size: int = 6,
    memory: int | None = None,
    on_divergence: str = "freeze",
    progress: bool = True,
    **training: Any,
) -> SweepResult:
    """Train all members of a sweep in one run of ``train``, then evaluate them by splicing.

    Interrupted at any point, the same call goes on; neither a finished training nor an evaluation is redone.

    Args:
        model: HookedTransformer, TransformerBridge or HookedProxyLM.
        config: see :class:`SweepConfig`.
        dataset: text for training, as for ``train``.
        held_out: ``config.held_out_sequences`` sequences of token ids for the evaluation.
        output: folder of this sweep alone.
        methods: the table in which ``config.methods`` are looked up.
        resume: continue a sweep of the same config; False refuses a folder that has one.
        group_size: SAEs evaluated together, on one clean pass.
        memory: bytes that may be used; by default what is free on the model's device. See ``memory.py``.
        on_divergence: "freeze" stops a member that becomes NaN alone, "raise" stops the sweep.
        progress: show bars.
        training: what of ``train``'s arguments decides no number: ``checkpoint_every``, ``log_every``,
            ``save_buffer``, ``prefetch``.

    Raises:
        ValueError: listing every mistake of ``config``, before anything is written; a text that cannot be
            read, or a damaged file in ``output``.
        FileExistsError: ``output`` holds another sweep; the settings that differ are listed.
        MemoryError: the sweep will not fit; all parts are listed.
        FloatingPointError: all members diverged.
        TrainingInterrupted: SIGINT or SIGTERM while training, after writing a checkpoint.
    """
    config.check(methods)
    if group_size < 1:
        raise ValueError(f"group_size must be 1 or more, got {group_size}")
    if unknown := sorted(set(training) - {"checkpoint_every", "log_every", "save_buffer", "prefetch"}):
        raise TypeError(f"sweep takes no {', '.join(unknown)}; what decides numbers belongs into the config")
    check_tokens(held_out, model)
    wrong = []
    if len(held_out) != config.held_out_sequences:
        wrong.append(f"held_out_sequences = {config.held_out_sequences}, but {len(held_out)} were given")
    configs = config.sae_configs(model, methods, more_problems=wrong)
    output, device = Path(output), str(next(model.parameters()).device)
    about = about_sweep(model, config, configs, load_text(dataset), held_out)
    known = _check_output(output, about, resume)
    # What is known stays as it was measured; a folder written before a part was recorded gets it now.
    about |= known.get("about", {})
    identity = known.get("identity") or identity_of(about)
    members = config.members(methods)
    if read_record(output / TRAINING).get("status") != "finished":
        sizes: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("batch_size", "context_size", "lm_batch_size", "buffer_tokens", "buffer_dtype")
        }
        steps = config.training_tokens // config.batch_size
        norm_batches = min(NORM_ESTIMATE_BATCHES, windows(steps).norm_estimate_batches)
        estimate = estimate_memory(
            model,
            configs,
            **sizes,
            prefetch=training.get("prefetch", False),
            norm_estimate_batches=norm_batches,
            group_size=group_size,
            eval_batch_size=config.eval_batch_size,
        )
        available = available_memory(device) if memory is None else memory
        tell_memory(estimate, available, "sweep")
        check_memory(estimate, available)
        output.mkdir(parents=True, exist_ok=True)
        sheet = {"identity": identity, "about": about, "members": [one._asdict() for one in members]}
        write_whole(output / SWEEP_FILE, json.dumps(sheet | {"versions": versions()}, indent=1))
        try:
            train(
                model,
                configs,
                dataset,
                output=output / TRAINING,
                training_tokens=config.training_tokens,
                **sizes,
                lr=config.lr,
                schedule=config.schedule,
                unit_norm_every=config.unit_norm_every,
                seed={member.name: member.seed for member in members},
                exclude_special_tokens=config.exclude_special_tokens,
                exclude_first_position=config.exclude_first_position,
                on_divergence=on_divergence,
                autocast_lm=config.autocast_lm,
                check_memory=False,  # (just done, with the evaluation)
                resume=True,
                runner_options={"n_batches_for_norm_estimate": norm_batches},
                **training,
            )
        except Exception:
            if not read_record(output / TRAINING):  # refused before it began: nothing to protect
                (output / SWEEP_FILE).unlink()
            raise
        gc.collect()  # training SAEs and their optimisers, which hang in cycles
    result = SweepResult.read(output)
    result.note_diverged()

    def evaluated(saes: dict[str, SAE[Any]]) -> dict[str, dict[str, Any]]:
        evaluations = evaluate_all(
            saes,
            model,
            held_out,
            batch_size=config.eval_batch_size,
            exclude_special_tokens=config.exclude_special_tokens,
            exclude_first_position=config.exclude_first_position,
            unscaled=config.unscaled,
            progress=progress,
        )
        return {name: evaluation.to_dict() for name, evaluation in evaluations.items()}

    result.measure(RESULTS, evaluated, group_size=group_size, device=device, progress=progress)
    return result


def _check_output(output: Path, about: dict[str, Any], resume: bool) -> dict[str, Any]:
    """``sweep.json`` of ``output``, empty where there is none.

    Raises FileExistsError where ``output`` holds another sweep, or one that is not to be continued.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file; expected a folder")
    if not (output / SWEEP_FILE).exists():
        if there := [name for name in (TRAINING, RESULTS, CSV_FILE) if (output / name).exists()]:
            raise FileExistsError(
                f"{output} holds {', '.join(there)} of something else; choose another folder"
            )
        return {}
    if not resume:
        raise FileExistsError(f"{output} already holds a sweep: resume it, or choose another folder")
    sheet = read_sheet(output)
    check_same_sweep(output, about, sheet["about"])
    return sheet


def _groups(members: list[SweepMember], size: int) -> Iterator[list[SweepMember]]:
    for start in range(0, len(members), size):
        yield members[start : start + size]
