"""The settings of the stitching recipe, and its stages. Each writes its file whole or not at all, and skips what is
there already."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llama_scope_settings import Sizes
from llama_scope_study import write_tensors
from paper_findings import write_whole
from paper_presets import Preset
from paper_stages import Study as PaperStudy
from sae_lens import SAE
from safetensors.torch import load_file

import routesae_lens as rl

METHODS = ("route", "distilled_mean")
"""The paper's RouteSAE, and the distilled router over the mean of layers."""
LAYER_SEEDS = 2
"""SAEs of each layer: one that is looked for in the RouteSAEs, and another seed's, which is the ceiling."""
SMALL = "small"
MEASURES = ("l0", "norm_mse", "explained_variance", "kl", "delta_ce", "tokens", "layer_share")


@dataclass(frozen=True)
class Settings(Preset):
    """Everything that decides the numbers; of ``k`` only the first counts."""

    expansion: int = 2
    k: tuple[int, ...] = (32,)
    kl_tokens: int = 1_000
    feature_tokens: int = 20_000
    """Held-out tokens on which firings are counted."""
    every: int = 3
    """Every so many-th routed layer has SAEs of its own."""
    route_seeds: int = 2
    small: int | None = None
    """Width of the smaller SAE that is stitched; a quarter of the larger by default."""
    stitched_layer: int | None = None
    """Its block: the middle one of those with SAEs of their own."""
    threshold: float = 0.7
    calibration_tokens: int = 4_000
    tolerance: float = 0.25
    effect_tokens: int = 4_000
    steps: int = 12


PRESETS: dict[str, Settings] = {
    "cpu": Settings(),
    # every stage in small; its numbers say nothing
    "tiny": Settings(
        d_sae=64, k=(4,), tokens=64 * 12, context_size=16, batch_size=64, lm_batch_size=4, kl_tokens=60,
        feature_tokens=400, every=2, route_seeds=1, calibration_tokens=200, effect_tokens=100, steps=3,
    ),
}  # fmt: skip


def mistakes(settings: Settings) -> list[str]:
    """What is wrong with these settings, in themselves and with the model."""
    s = settings
    at_least = {
        "tokens": s.batch_size, "batch_size": 1, "context_size": 2, "kl_tokens": 1, "feature_tokens": 1, "every": 1,
        "route_seeds": 1, "steps": 1, "effect_tokens": 1, "d_sae": 1, "small": 1,
    }  # fmt: skip
    found = [
        f"--{name.replace('_', '-')} must be {least} or more, got {getattr(s, name)}"
        for name, least in at_least.items()
        if getattr(s, name) is not None and getattr(s, name) < least
    ]
    if s.k[0] < 1:
        found.append(f"--k must be 1 or more, got {s.k[0]}")
    if found:
        return found
    sizes = Sizes.of(s.model)
    layers = list(s.layers or rl.default_layers(sizes.n_layers))
    width = s.d_sae or s.expansion * sizes.d_model
    small = small_width(s, width)
    if not 0 <= layers[0] <= layers[-1] < sizes.n_layers:
        found.append(f"--layers must be blocks from 0 to {sizes.n_layers - 1}, got {layers}")
    if s.stitched_layer is not None and s.stitched_layer not in layers[:: s.every]:
        found.append(f"--stitched-layer must be one of {layers[:: s.every]}, got {s.stitched_layer}")
    if not s.k[0] <= small < width:
        found.append(f"--small must be from k = {s.k[0]} to below the width {width}, got {small}")
    if not 0 < s.threshold <= 1:
        found.append(f"--threshold must be above 0 and at most 1, got {s.threshold}")
    if s.calibration_tokens + max(s.kl_tokens, s.effect_tokens) > s.feature_tokens:
        found.append(
            f"--feature-tokens must hold the {s.calibration_tokens} tokens of the calibration beside those of the "
            f"measures ({max(s.kl_tokens, s.effect_tokens)}), got {s.feature_tokens}"
        )
    if sizes.longest is not None and s.context_size > sizes.longest:
        found.append(
            f"--context-size is {s.context_size}, but the model reads at most {sizes.longest} tokens"
        )
    return found


def small_width(settings: Settings, width: int) -> int:
    return settings.small or max(1, width // 4)


def layer_name(layer: int, seed: int) -> str:
    return f"layer{layer}-{seed}"


class Study(PaperStudy):
    """The settings, the model (loaded when first needed), the text and the folder, as of ``reproduce_paper.py``."""

    @property
    def settings(self) -> Settings:
        assert isinstance(self.preset, Settings)
        return self.preset

    @property
    def own_layers(self) -> list[int]:
        """Layers that have SAEs of their own."""
        layers: list[int] = self.about["layers"][:: self.settings.every]
        return layers

    @property
    def stitched_layer(self) -> int:
        chosen = self.settings.stitched_layer
        return self.own_layers[len(self.own_layers) // 2] if chosen is None else chosen

    @property
    def route_names(self) -> list[str]:
        return [f"{method}-{seed}" for method in METHODS for seed in range(self.settings.route_seeds)]

    def configs(self) -> dict[str, Any]:
        """Of every SAE, in the order of their seeds."""
        s, width = self.settings, self.about["d_sae"]
        make = [(name, name.rpartition("-")[0], width) for name in self.route_names]
        make += [
            (layer_name(layer, seed), f"topk@{layer}", width)
            for seed in range(LAYER_SEEDS)
            for layer in self.own_layers
        ]
        make.append((SMALL, f"topk@{self.stitched_layer}", small_width(s, width)))
        return {
            name: rl.make_config(method, self.model, self.about["layers"], d_sae, s.k[0], seed)
            for seed, (name, method, d_sae) in enumerate(make)
        }

    def load(self, name: str) -> SAE[Any]:
        sae: SAE[Any] = SAE.load_from_disk(self.output / "training" / name, device=self.device)
        return sae

    def run(self) -> dict[str, Any]:
        """``run.json`` of the training; empty before it."""
        return self.done("training/run") or {}

    def done(self, name: str) -> dict[str, Any] | None:
        path = self.output / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, values: dict[str, Any]) -> None:
        write_whole(self.output / f"{name}.json", json.dumps(values, indent=1, allow_nan=False))

    def calibration(self) -> torch.Tensor:
        """The last of the held-out sequences; what is measured reads the first ones."""
        s = self.settings
        return self.held_out(s.feature_tokens)[-self.sequences(s.calibration_tokens) :]


def train(study: Study) -> None:
    """All SAEs on one pass of the language model, each from initial weights of its own."""
    s = study.settings
    if study.run().get("status") == "finished":
        return
    configs = study.configs()
    steps = s.tokens // s.batch_size
    study.console.print(
        f"[bold]training[/bold]: {len(configs)} SAEs, {steps:,} steps of {s.batch_size:,} tokens"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="To copy construct")  # (upstream, at every step)
        rl.train(
            study.model,
            configs,
            study.text.skip(study.about["documents_skipped_in_training"]),
            output=study.output / "training",
            training_tokens=s.tokens,
            context_size=s.context_size,
            batch_size=s.batch_size,
            lm_batch_size=s.lm_batch_size,
            lr=s.lr,
            # Not one seed for all: SAEs that start alike stay alike, and coverage would show that.
            seed={name: seed for seed, name in enumerate(configs)},
            log_every=max(1, steps // 50),
            checkpoint_every=0,  # (an interruption writes one all the same)
            resume=True,
        )


def evaluate(study: Study) -> None:
    """Splice every SAE, and count the firings of its latents."""
    s = study.settings
    saes = {name: study.load(name) for name in study.run()["seeds"]}
    fired = rl.firing_frequencies(
        saes, study.model, study.held_out(s.feature_tokens), batch_size=s.eval_batch_size
    )
    write_tensors(study.output / "firing.safetensors", {name: one.counts for name, one in fired.items()})
    found = rl.evaluate_all(
        saes, study.model, study.held_out(s.kl_tokens), batch_size=s.eval_batch_size, zero_ablation=False
    )
    study.write(
        "evaluation",
        {
            name: {measure: getattr(found[name], measure) for measure in MEASURES}
            | {
                "d_sae": fired[name].d_sae,
                "never_fired": fired[name].never_fired,
                "firing_tokens": fired[name].tokens,
            }
            for name in saes
        },
    )


def coverage(study: Study) -> None:
    """Every RouteSAE against the first SAEs of the layers; the second ones are the ceiling."""
    fires = load_file(study.output / "firing.safetensors")
    first, second = (
        {layer: study.load(layer_name(layer, seed)) for layer in study.own_layers}
        for seed in range(LAYER_SEEDS)
    )
    found = {}
    for name in study.route_names:
        method, _, seed = name.rpartition("-")
        twin = f"{method}-{(int(seed) + 1) % study.settings.route_seeds}"
        found[name] = rl.layer_coverage(
            study.load(name),
            first,
            study.settings.threshold,
            ceilings=second,
            route_ceiling=None if twin == name else study.load(twin),
            route_fires=fires[name],
            layer_fires={layer: fires[layer_name(layer, 0)] for layer in first},
        )
        study.console.print(f"{name}\n{found[name]}", highlight=False)
    (study.output / "report").mkdir(exist_ok=True)
    rl.plot_layer_coverage(found, study.output / "report/coverage.png")
    study.write("coverage", {name: one.to_dict() for name, one in found.items()})


def stitching(study: Study) -> None:
    """From the small SAE to the larger one of its layer, both with a threshold in TopK's place."""
    s = study.settings
    pair = {}
    conversions = {}
    for name in (SMALL, layer_name(study.stitched_layer, 0)):
        converted = rl.to_jumprelu(
            study.load(name),
            study.model,
            study.calibration(),
            tolerance=s.tolerance,
            batch_size=s.eval_batch_size,
        )
        pair[name], conversions[name] = converted.sae, converted.to_dict()
        converted.sae.save_model(study.output / "jumprelu" / name)
    small, large = pair.values()
    split = rl.split_latents(small, large, s.threshold)
    effects = rl.insertion_effects(
        small, large, study.model, study.held_out(s.effect_tokens), batch_size=s.eval_batch_size
    )
    choice = rl.choose_threshold(split.large, effects)
    curve = rl.stitch(
        small, large, study.model, study.held_out(s.kl_tokens), split=split, steps=s.steps,
        batch_size=s.eval_batch_size,
    )  # fmt: skip
    says = effects.fires > 0
    novel = torch.zeros(len(says), dtype=torch.bool)
    novel[split.novel] = True
    improves = {
        kind: {
            "fired": int((says & which).sum()),
            "lowering": int((says & which & (effects.change < 0)).sum()),
        }
        for kind, which in (("novel", novel), ("reconstruction", ~novel))
    }
    (study.output / "report").mkdir(exist_ok=True)
    rl.plot_stitching(curve, study.output / "report/stitching.png")
    if choice.threshold is not None:
        rl.plot_threshold(choice, study.output / "report/threshold.png")
    study.write(
        "stitching",
        {
            "layer": study.stitched_layer,
            "small": SMALL,
            "large": layer_name(study.stitched_layer, 0),
            "conversions": conversions,
            "curve": curve.to_dict(),
            "split": split.to_dict(),
            "threshold": choice.to_dict(),
            "small_mse": effects.mse,
            "effects": improves,
        },
    )


STAGES: dict[str, Callable[[Study], None]] = {
    "training": train,
    "evaluation": evaluate,
    "coverage": coverage,
    "stitching": stitching,
}
"""In their order; each is done when its file is there (the training: when it says so)."""


def run_stages(study: Study) -> None:
    for name, stage in STAGES.items():
        if name == "training" or study.done(name) is None:
            with study.timed("stitch_layers", name):
                stage(study)


def read(output: Path) -> dict[str, Any]:
    """Everything that was measured so far."""
    names = ("settings", "text", "stages", *STAGES)
    paths = {name: output / ("training/run.json" if name == "training" else f"{name}.json") for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
