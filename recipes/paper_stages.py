"""What ``reproduce_paper.py`` does with each part: train and splice, features, routes, other rules, profiles.

Every stage writes one JSON file per SAE, whole or not at all, and skips what is there.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import typer
from paper_findings import write_whole
from paper_presets import MEASURED, PARTS, VIEWS, Preset, chosen
from rich.console import Console
from safetensors.torch import load_file, save_file
from study_folder import timed

import routesae_lens as rl


def sweep_config(preset: Preset, part: str, layers: Sequence[int], d_sae: int) -> rl.SweepConfig:
    """The sweep that is one part of a study; it is not checked."""
    methods = tuple(
        one
        for name in PARTS[part]
        for one in ([f"topk@{layer}" for layer in layers] if name == "topk@*" else [name])
    )
    return rl.SweepConfig(
        methods=methods,
        k=chosen(preset.part_k.get(part, "all"), preset.k),
        sparsities={m: preset.coefficients[m] for m in methods if m in preset.coefficients},
        seeds=chosen(preset.part_seeds.get(part, "all"), tuple(range(preset.seeds))),
        layers=tuple(layers),
        d_sae=d_sae,
        options={name: table for name, table in preset.options.items() if name in methods},
        training_tokens=preset.tokens,
        context_size=preset.context_size,
        batch_size=preset.batch_size,
        lm_batch_size=preset.lm_batch_size,
        lr=preset.lr,
        schedule="paper",
        unit_norm_every=10,
        held_out_sequences=sequences_of(preset.kl_tokens, preset.context_size),
        eval_batch_size=preset.eval_batch_size,
    )


def sequences_of(tokens: int, context_size: int) -> int:
    """So many that ``tokens`` of them count."""
    return -(-tokens // max(1, context_size - 1))  # position 0 does not count


class Study:
    """What the stages share: the settings, the model (loaded when first needed), the text and the folder."""

    def __init__(
        self, preset: Preset, dataset: str, eval_dataset: str | None, output: Path, console: Console
    ):
        self.preset, self.dataset, self.eval_dataset = preset, dataset, eval_dataset
        self.output, self.console, self.device = output, console, rl.default_device()

    @cached_property
    def model(self) -> Any:
        torch.set_float32_matmul_precision(self.preset.matmul_precision)
        return rl.load_model(self.preset.model, device=self.device, dtype=self.preset.dtype)

    @cached_property
    def text(self) -> Any:
        return rl.load_text(self.dataset).shuffle(seed=0)

    @cached_property
    def about(self) -> dict[str, Any]:
        """Layers, sizes and the split of the text; made once, with the held-out tokens."""
        path, preset = self.output / "text.json", self.preset
        if path.exists():
            return json.loads(path.read_text())
        backend = rl.backend_of(self.model)
        layers = list(rl.default_layers(backend.n_layers) if preset.layers is None else preset.layers)
        source = self.text if self.eval_dataset is None else rl.load_text(self.eval_dataset)
        if "text" not in next(iter(source)):
            raise typer.BadParameter("the data has no column 'text'")
        documents = _Counted(row["text"] for row in source)
        wanted = max(self.sequences(preset.kl_tokens), self.sequences(preset.feature_tokens))
        ids = rl.held_out_tokens(self.model, documents, n_sequences=wanted, context_size=preset.context_size)
        skipped = documents.count if self.eval_dataset is None else 0
        _write_tensors(self.output / "held_out.safetensors", {"tokens": ids})
        per_epoch = self._tokens_per_epoch(skipped)
        about = {
            "layers": layers,
            "d_model": backend.d_model,
            "d_sae": preset.expansion * backend.d_model if preset.d_sae is None else preset.d_sae,
            "held_out_documents": documents.count,
            "documents_skipped_in_training": skipped,
            "tokens_per_epoch": per_epoch,
            "epochs": None if per_epoch is None else preset.tokens / per_epoch,
        }
        write_whole(path, json.dumps(about, indent=1))
        return about

    def sequences(self, tokens: int) -> int:
        return sequences_of(tokens, self.preset.context_size)

    def held_out(self, tokens: int) -> torch.Tensor:
        """Sequences with so many kept tokens; smaller requests get the first ones of larger."""
        assert self.about
        return load_file(self.output / "held_out.safetensors")["tokens"][: self.sequences(tokens)]

    def _tokens_per_epoch(self, skipped: int, sample: int = 300) -> int | None:
        """About how many tokens the training text has; None where its length is unknown (streamed)."""
        try:
            documents = len(self.text) - skipped
        except TypeError:
            return None
        lengths = [
            1 + len(self.model.tokenizer(row["text"], add_special_tokens=False)["input_ids"])
            for row in self.text.skip(skipped).take(sample)
        ]
        return int(statistics.fmean(lengths) * documents) if lengths else None

    def config(self, part: str) -> rl.SweepConfig:
        return sweep_config(self.preset, part, self.about["layers"], self.about["d_sae"])

    def timed(self, part: str, stage: str) -> AbstractContextManager[None]:
        """See ``study_folder.timed``."""
        return timed(self.output, part, stage)


GROUP = 12
"""SAEs measured on one pass over the held-out text, in one go: what an interruption costs at most."""


@dataclass(kw_only=True)
class MLSAEConfig(rl.RouteTopKTrainingSAEConfig):
    """Trained on every layer (``routing="every"``), saved as one that reads the last: a splice needs one layer a token.

    What other rules would make of it is measured as a view.
    """

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return super().get_inference_sae_cfg_dict() | {"routing": "fixed", "fixed_layer": self.layers[-1]}


def _mlsae(model: Any, layers: list[int], d_sae: int, k: float, seed: int, **given: Any) -> MLSAEConfig:
    options = {"d_sae": d_sae, "k": int(k), "route_seed": seed, "routing": "every", **given}
    if model is None:  # before it is loaded, to find mistakes
        return MLSAEConfig(d_in=8 * len(layers), layers=layers, **options)
    return MLSAEConfig.for_model(model, layers=layers, **options)


RECIPE_METHODS = rl.METHODS | {"mlsae": rl.Method(_mlsae)}


class _Counted:
    """An iterable that knows how many items were taken."""

    def __init__(self, items: Iterable[str]):
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[str]:
        for item in self.items:
            self.count += 1
            yield item


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_name(f".{path.name}")
    save_file(tensors, partial)
    partial.replace(path)


# --- Stages -----------------------------------------------------------------------------------------------


def run_part(study: Study, part: str) -> None:
    folder = study.output / part
    with study.timed(part, "training and KL"):
        config = study.config(part)
        every = max(1, config.training_tokens // config.batch_size // 4)
        result = trained(study, part, config, RECIPE_METHODS, checkpoint_every=every)
    seeds = [member.seed for member in result.members]
    members = {member.name: member for member in result.members}

    def features(saes: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return _features(study, folder / "feature_sets", saes)

    def routing(saes: dict[str, Any]) -> dict[str, dict[str, Any]]:
        routed = {name: sae for name, sae in saes.items() if _has_routes(sae)}
        tokens = study.held_out(study.preset.feature_tokens)
        profiles = (
            rl.analyse_routing(routed, study.model, tokens, batch_size=study.preset.eval_batch_size)
            if routed
            else {}
        )
        return {name: profiles[name].to_dict() if name in profiles else {"layers": None} for name in saes}

    def views(saes: dict[str, Any]) -> dict[str, dict[str, Any]]:
        some = {
            name: sae
            for name, sae in saes.items()
            if (which := VIEWS.get(members[name].method))
            and (which == "all seeds" or members[name].seed == min(seeds))
        }
        return _views(study, saes, some)

    def measure(kind: str, function: Any) -> None:
        with study.timed(part, kind):
            result.measure(kind, function, group_size=GROUP, device=study.device)

    for kind, function in (("features", features), ("routing", routing), ("views", views)):
        if part in MEASURED[kind]:
            measure(kind, function)
    if part == "core":
        with study.timed(part, "profiles"):
            _profiles(study, result)


def trained(
    study: Study, part: str, config: rl.SweepConfig, methods: Mapping[str, rl.Method], **training: Any
) -> rl.SweepResult:
    """Train and splice the SAEs of a part, or read what was trained and spliced; ``training`` goes to ``sweep``."""
    folder, members = study.output / part, config.members(methods)
    if (folder / "sweep.json").exists():
        result = rl.SweepResult.read(folder)
        if result.trained and {member.name for member in members} == set(result.results):
            return result
    study.console.print(
        f"[bold]{part}[/bold]: {len(members)} SAEs, blocks {list(config.layers or ())}, width {config.d_sae}, "
        f"{config.training_tokens:,} tokens"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct")  # (upstream, at every step)
        return rl.sweep(
            study.model,
            config,
            study.text.skip(study.about["documents_skipped_in_training"]),
            study.held_out(study.preset.kl_tokens),
            folder,
            methods=methods,
            **training,
        )


def _has_routes(sae: Any) -> bool:
    return isinstance(sae, rl.RouteSAE) and len(sae.layers) > 1 and sae.cfg.routing != "fixed"


def _features(study: Study, folder: Path, saes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Counts at every threshold; what the features are goes to a file per SAE."""
    preset, thresholds = study.preset, sorted({*study.preset.thresholds, study.preset.threshold})
    sets = rl.collect_features(
        saes,
        study.model,
        study.held_out(preset.feature_tokens),
        threshold=preset.threshold,
        collect_above=thresholds[0],
        batch_size=preset.eval_batch_size,
    )
    folder.mkdir(exist_ok=True)
    for name, found in sets.items():
        found.save(folder / f"{name}.json.gz")
    return {
        name: {
            "tokens": found.tokens,
            "features": found.count(),
            "by_threshold": {f"{t:g}": found.count(t) for t in thresholds},
            "fired": int((found.firing_frequency > 0).sum()),
        }
        for name, found in sets.items()
    }


def _views(study: Study, saes: dict[str, Any], some: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """KL and the rest of the same dictionary under other routing rules."""
    rules = {f"{name}/{rule}": form for name, sae in some.items() for rule, form in _rules(sae).items()}
    evaluations = (
        rl.evaluate_all(
            rules,
            study.model,
            study.held_out(study.preset.kl_tokens),
            batch_size=study.preset.eval_batch_size,
        )
        if rules
        else {}
    )
    result: dict[str, dict[str, Any]] = {name: {"views": {}} for name in saes}
    for key, evaluation in evaluations.items():
        name, _, rule = key.rpartition("/")
        result[name]["views"][rule] = evaluation.to_dict()
    return result


def _rules(sae: Any) -> dict[str, Any]:
    last = sae.layers[-1]
    return {
        f"fixed {last}": rl.with_routing(sae, "fixed", fixed_layer=last),
        "random": rl.with_routing(sae, "random", route_seed=0),
        "oracle": rl.with_routing(sae, "oracle"),
    }


def _profiles(study: Study, result: rl.SweepResult, n_each: int = 3) -> None:
    """Figure 1: interpretable features that peak in the first and the last layers, with their tokens.

    Of TopK, as in the paper, and of Random, whose dictionary has seen every layer.
    """
    k = chosen("middle", study.preset.k)[0]
    for method in ("topk", "random"):
        name = f"{method}-k{k}-seed0"
        path = result.output / "profiles" / f"{name}.json"
        found = result.output / "feature_sets" / f"{name}.json.gz"
        if path.exists() or not found.exists():
            continue
        features = {one.id: one for one in rl.FeatureSet.load(found).features}
        record: dict[str, Any] = {
            "name": name,
            "method": method,
            "layers": study.about["layers"],
            "features": [],
        }
        if len(features) >= 2:
            profiles = rl.layer_profiles(
                result.load(name, study.device),
                study.model,
                study.held_out(study.preset.feature_tokens),
                list(features),
                layers=study.about["layers"],
                batch_size=study.preset.eval_batch_size,
            )
            record["tokens"] = profiles.tokens
            rows: list[dict[str, Any]] = [
                {
                    "id": i,
                    "profile": profile,
                    "active_tokens": active,
                    "peak": peak,
                    "top": features[i].tokens[:4],
                }
                for i, profile, active, peak in zip(
                    profiles.features, profiles.profile, profiles.active_tokens, profiles.peak, strict=True
                )
                if active >= study.preset.profile_min_tokens and peak is not None
            ]
            rows.sort(key=lambda row: (row["peak"], _centre(row["profile"])))
            n = min(n_each, len(rows) // 2)
            record["features"] = [row | {"end": "early"} for row in rows[:n]]
            record["features"] += [row | {"end": "late"} for row in rows[len(rows) - n :]]
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(record, indent=1))


def _centre(profile: list[float]) -> float:
    return sum(i * value for i, value in enumerate(profile)) / (sum(profile) or 1)
