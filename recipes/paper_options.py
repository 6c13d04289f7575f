"""Every mistake in the options of ``reproduce_paper.py``, found before a model is loaded or anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paper_presets import Preset
from paper_stages import RECIPE_METHODS, sweep_config
from transformers import AutoConfig

import routesae_lens as rl


def number_list(text: str | None, problems: list[str]) -> tuple[int, ...] | None:
    """``"14,20"`` as (14, 20); what is wrong with it is added to ``problems``."""
    if text is None:
        return None
    try:
        return tuple(sorted({int(one) for one in text.split(",")}))
    except ValueError:
        problems.append(f"expected numbers such as 14,20,32, got {text!r}")
        return None


def block_list(text: str | None, problems: list[str]) -> tuple[int, ...] | None:
    """``"6:21"`` as (6, ..., 21); what is wrong with it is added to ``problems``."""
    try:
        return None if text is None else tuple(rl.parse_layers(text))
    except ValueError as error:
        problems.append(str(error))
        return None


def positive(minutes: float | None) -> list[str]:
    if minutes is None or (math.isfinite(minutes) and minutes > 0):
        return []
    return [f"--minutes must be positive, got {minutes}"]


def mistakes(preset: Preset, parts: Sequence[str]) -> list[str]:
    """What is wrong with these settings: in themselves, with the model, and as the sweep of each part."""
    at_least = {"seeds": 1, "kl_tokens": 1, "feature_tokens": 1, "context_size": 2}
    found = {
        name: f"--{name.replace('_', '-')} must be {least} or more, got {getattr(preset, name)}"
        for name, least in at_least.items()
        if getattr(preset, name) < least
    }
    problems = dict.fromkeys(found.values())  # (each once, though every part has it)
    n_blocks, d_model, longest = _sizes(preset.model)
    layers = list(rl.default_layers(n_blocks) if preset.layers is None else preset.layers)
    if layers[-1] >= n_blocks:
        problems[f"--layers names block {layers[-1]}, but the model has blocks 0 to {n_blocks - 1}"] = None
    if longest is not None and preset.context_size > longest:
        problems[f"--context-size is {preset.context_size}, but the model reads at most {longest} tokens"] = (
            None
        )
    d_sae = preset.expansion * d_model if preset.d_sae is None else preset.d_sae
    said = ("seeds", "held_out_sequences", "context_size")  # what the sweep would say once more, in its words
    for part in parts:
        for problem in sweep_config(preset, part, layers, d_sae).problems(RECIPE_METHODS):
            if not (found and problem.startswith(said)):
                problems[problem] = None
    return list(problems)


def _sizes(model: str) -> tuple[int, int, int | None]:
    """Blocks, d_model and context limit, without the weights."""
    config: Any = AutoConfig.from_pretrained(rl.demo_model_path() if model == "demo" else model)
    config = config.get_text_config()
    return config.num_hidden_layers, config.hidden_size, getattr(config, "max_position_embeddings", None)
