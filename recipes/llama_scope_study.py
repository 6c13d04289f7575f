"""What the parts of the Llama Scope recipe share: the settings, the model, the text, the folder, the training."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer
from llama_scope_settings import Settings, Sizes, layers_of, route_layers_of, widths_of
from paper_findings import write_whole
from rich.console import Console
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from study_folder import timed

import routesae_lens as rl
from routesae_lens.training.log import plain
from routesae_lens.training.presets import PRESETS as RECIPES

SCOPE = RECIPES["llama_scope"]
NORM_BATCHES = 10
"""Training batches from which SAELens estimates the input scale; it holds them all at once, of every hook."""
CHECKPOINTS = 4
"""In a training; one more when it is interrupted."""


class Study:
    """One run of the recipe. Parts write ``<name>.json`` when they are done, whole or not at all."""

    def __init__(
        self,
        settings: Settings,
        dataset: str,
        eval_dataset: str | None,
        long_dataset: str | None,
        output: Path,
        console: Console,
    ):
        self.settings, self.dataset = settings, dataset
        self.eval_dataset, self.long_dataset = eval_dataset, long_dataset
        self.output, self.console, self.device = output, console, rl.default_device()
        self.sizes = Sizes.of(settings.model)
        self.layers = layers_of(settings, self.sizes)
        self.layer = self.layers[1]
        self.route_layers = route_layers_of(settings, self.sizes)
        self.d_sae, self.wide = widths_of(settings, self.sizes)

    @cached_property
    def model(self) -> Any:
        return rl.load_model(self.settings.model, device=self.device, dtype=self.settings.dtype)

    # --- Text ---------------------------------------------------------------------------------------

    @cached_property
    def _whole_text(self) -> Any:
        return rl.load_text(self.dataset).shuffle(seed=0)

    @property
    def held_out_documents(self) -> Iterator[str]:
        source = self._whole_text if self.eval_dataset is None else rl.load_text(self.eval_dataset)
        return (row["text"] for row in source.take(self.about["held_out_documents"]))

    @property
    def training_text(self) -> Any:
        skipped = 0 if self.eval_dataset is not None else self.about["held_out_documents"]
        return self._whole_text.skip(skipped)

    def untrained_documents(self) -> Iterator[str]:
        """The long dataset where there is one; else the held-out documents, and what no training gets to of the
        training text, however it packs documents."""
        if self.long_dataset is not None:
            yield from (row["text"] for row in rl.load_text(self.long_dataset))
            return
        yield from self.held_out_documents
        longest = max(self.settings.tokens, self.settings.position_tokens)
        read = 0
        for row in self.training_text:
            if read > 2 * longest:
                yield row["text"]
            else:
                read += len(self.ids(row["text"]))

    @cached_property
    def about(self) -> dict[str, Any]:
        """Layers, sizes and counts of the text; made once, with the held-out and calibration tokens."""
        path, s = self.output / "about.json", self.settings
        if path.exists():
            return json.loads(path.read_text())
        source = self._whole_text if self.eval_dataset is None else rl.load_text(self.eval_dataset)
        if "text" not in next(iter(source)):
            raise typer.BadParameter("the data has no column 'text'")
        wanted = max(self.sequences(n) for n in (s.eval_tokens, s.firing_tokens, s.feature_tokens))
        documents: list[str] = []

        def counted() -> Iterator[str]:
            for row in source:
                documents.append(row["text"])
                yield row["text"]

        held_out = rl.held_out_tokens(self.model, counted(), n_sequences=wanted, context_size=s.context_size)
        skipped = 0 if self.eval_dataset is not None else len(documents)
        calibration = rl.held_out_tokens(
            self.model,
            (row["text"] for row in self._whole_text.skip(skipped)),
            n_sequences=self.sequences(s.calibration_tokens),
            context_size=s.context_size,
        )
        write_tensors(self.output / "tokens.safetensors", {"held_out": held_out, "calibration": calibration})
        about = {
            "layers": self.layers,
            "layer": self.layer,
            "route_layers": self.route_layers,
            "n_layers": self.sizes.n_layers,
            "d_model": self.sizes.d_model,
            "d_sae": self.d_sae,
            "wide": self.wide,
            "held_out_documents": len(documents),
        }
        write_whole(path, json.dumps(about, indent=1))
        return about

    def sequences(self, tokens: int) -> int:
        """So many that ``tokens`` of them count: position 0 and the BOS between documents do not."""
        return -(-round(tokens * 1.02) // (self.settings.context_size - 1))

    def tokens(self, what: str, tokens: int) -> torch.Tensor:
        """``"held_out"`` or ``"calibration"``; smaller requests get the first sequences of larger ones."""
        assert self.about
        return load_file(self.output / "tokens.safetensors")[what][: self.sequences(tokens)]

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    # --- Results ------------------------------------------------------------------------------------

    def done(self, name: str) -> dict[str, Any] | None:
        """What was written under this name, or None."""
        path = self.output / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        path = self.output / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(plain(dict(values)), indent=1, allow_nan=False))
        return json.loads(path.read_text())

    def timed(self, part: str, stage: str) -> AbstractContextManager[None]:
        """See ``study_folder.timed``."""
        return timed(self.output, part, stage)

    # --- SAEs ---------------------------------------------------------------------------------------

    def train(self, part: str, configs: Mapping[str, Any], seeds: Mapping[str, int], tokens: int) -> None:
        """All SAEs of a part on one pass of the language model; nothing where that was done before."""
        folder, s = self.output / part, self.settings
        if self.run(part).get("status") == "finished":
            return
        steps = tokens // s.batch_size
        self.console.print(
            f"[bold]{part}[/bold]: {len(configs)} SAEs, {steps:,} steps of {s.batch_size:,} tokens"
        )
        with self.timed(part, "training"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="To copy construct")  # (upstream, at every step)
            rl.train(
                self.model,
                dict(configs),
                self.training_text,
                output=folder,
                training_tokens=tokens,
                context_size=s.context_size,
                batch_size=s.batch_size,
                lm_batch_size=s.lm_batch_size,
                seed=dict(seeds),
                log_every=max(1, steps // 300),
                checkpoint_every=max(1, steps // CHECKPOINTS),
                on_divergence="freeze",
                resume=True,
                runner_options={
                    "dead_feature_window": max(1, s.silent_window // s.batch_size),
                    "n_batches_for_norm_estimate": min(NORM_BATCHES, max(1, steps // 10)),
                },
                **SCOPE.train,
            )

    def run(self, part: str) -> dict[str, Any]:
        """``run.json`` of a part's training; empty before it."""
        path = self.output / part / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def names(self, part: str) -> list[str]:
        """The SAEs of a part that did not diverge."""
        run = self.run(part)
        return [name for name in run["seeds"] if name not in run.get("diverged", {})]

    def load(self, folder: str) -> SAE[Any]:
        sae: SAE[Any] = SAE.load_from_disk(self.output / folder, device=self.device)
        return sae

    def evaluate(self, saes: Mapping[str, Any], tokens: torch.Tensor, **options: Any) -> dict[str, Any]:
        found = rl.evaluate_all(
            dict(saes),
            self.model,
            tokens,
            batch_size=self.settings.eval_batch_size,
            zero_ablation=False,
            **options,
        )
        return {name: one.to_dict() for name, one in found.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_name(f".{path.name}")
    save_file(tensors, partial)
    partial.replace(path)
