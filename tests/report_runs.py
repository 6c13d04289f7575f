"""Folders of runs as ``train`` and ``sweep`` leave them, written without training, for the tests of the report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from routesae_lens.analysis.contexts import Context
from routesae_lens.analysis.feature_set import BlockActivity, Feature, FeatureRule, FeatureSet

LAYERS = [2, 3, 5]
WORDS = (
    "river",
    "boat",
    "quiet",
    "morning",
    "layer",
    "router",
    "stream",
    "fox",
    "seven",
    "blue",
    "the",
    "of",
)


def write_run(folder: Path, names: tuple[str, ...] = ("route",), *, d_sae: int = 40, steps: int = 20) -> Path:
    """``run.json``, ``log.jsonl`` and the SAEs' folders. KL of the i-th SAE: 0.5 + i / 10."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"d_in": 12, "d_sae": d_sae, "k": 4, "layers": LAYERS, "site": "hook_resid_post"}
    config |= {"architecture": "route_topk", "routing": "hard", "aggregator": "sum"}
    record = {
        "config": {"saes": dict.fromkeys(names, config), "model_name": "/somewhere/tiny-model", "lr": 0.001,
                   "training_tokens": steps * 32, "train_batch_size_tokens": 32, "context_size": 16},
        "options": {"schedule": "paper"},
        "seeds": dict.fromkeys(names, 0),
        "versions": {"routesae-lens": "0.1.0"},
        "status": "finished",
        "diverged": {},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {"step": step, "tokens": step * 32}
        for name in names:
            line |= {f"{name}/losses/overall_loss": 3.0 / step, f"{name}/metrics/l0": 4.0}
            shares = dict(zip(LAYERS, (0.5, 0.25, 0.25), strict=True))
            line |= {f"{name}/metrics/layer_share/{layer}": share for layer, share in shares.items()}
        lines.append(line)
    last = {"step": steps, "tokens": steps * 32}
    for i, name in enumerate(names):
        measured = {
            "kl": 0.5 + i / 10,
            "kl_stderr": 0.02,
            "l0": 4.0 + i,
            "loss_recovered": 0.9,
            "tokens": 100.0,
        }
        measured |= {f"layer_share/{layer}": 1 / 3 for layer in LAYERS}
        last |= {f"{name}/eval/{key}": value for key, value in measured.items()}
    lines.append(last)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for i, name in enumerate(names):
        (folder / name).mkdir()
        generator = torch.Generator().manual_seed(i)
        save_file(
            {"W_dec": torch.randn(d_sae, 12, generator=generator)}, folder / name / "sae_weights.safetensors"
        )
    return folder


def context(
    token: str, activation: float, before: str = "so ", after: str = " it was", layer: int = 3
) -> Context:
    return Context(
        before=before, token=token, after=after, document=7, document_position=11, token_id=5, block=layer,
        token_class=token.strip().lower(), activation=activation, strength=activation, p=0.75, sequence=2, position=9,
    )  # fmt: skip


def feature(
    latent: int, contexts: list[Context], frequency: float = 0.1, active: tuple[int, ...] = (0, 30, 5)
) -> Feature:
    blocks = {
        layer: BlockActivity(active=n, above=min(n, 2), mean_activation=2.0 if n else 0.0)
        for layer, n in zip(LAYERS, active, strict=True)
    }
    return Feature(latent, contexts, frequency, max(c.activation for c in contexts), blocks, {})


def feature_set(features: list[Feature], name: str = "route", d_sae: int = 40) -> FeatureSet:
    frequency, largest, retained = (torch.zeros(d_sae, dtype=torch.float64) for _ in range(3))
    for one in features:
        frequency[one.id], largest[one.id] = one.firing_frequency, one.max_activation
        retained[one.id] = 100.0
    rule = FeatureRule(threshold=6.0, min_contexts=2)
    tokens = dict(zip(LAYERS, (300, 500, 200), strict=True))
    return FeatureSet(
        name, rule, 1000, tokens, frequency, largest, retained, torch.zeros_like(frequency), features
    )


def many_features(n: int, n_contexts: int = 10, seed: int = 0) -> list[Feature]:
    """Features with contexts of about 64 tokens; feature i has its largest activation at 10 + i % 17."""
    draw = random.Random(seed)

    def text(n_words: int) -> str:
        return " " + " ".join(draw.choice(WORDS) + str(draw.randrange(100)) for _ in range(n_words))

    features = []
    for i in range(n):
        top = 10.0 + i % 17
        contexts = [
            context(f" {draw.choice(WORDS)}{j}", top - j * 0.3, text(32), text(31), draw.choice(LAYERS))
            for j in range(n_contexts)
        ]
        active = (draw.randrange(50), draw.randrange(50), draw.randrange(1, 50))
        features.append(feature(i, contexts, (i * 7919 % n + 1) / (2 * n), active))
    return features


def write_interpretations(folder: Path, features: dict[str, dict[str, Any]], sae: str = "route") -> None:
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "answers": 0, "answers_without_usage": 0}
    data = {
        "format": "routesae_lens.interpretations/1", "sae": sae, "judge": {"kind": "endpoint", "model": "a-judge"},
        "prompt_sha256": "0", "seed": 0, "max_contexts": None, "available": len(features), "features": features,
        "unparsed": {}, "failed": {}, "usage": usage,
    }  # fmt: skip
    (folder / "interpretations").mkdir(exist_ok=True)
    (folder / "interpretations" / f"{sae}.json").write_text(json.dumps(data))
