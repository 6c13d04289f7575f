"""The parts of the Llama Scope recipe, every setting of each preset, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

import routesae_lens as rl

PARTS: dict[str, tuple[str, ...]] = {
    "annealing": (),
    "positions": (),
    "conversion": ("annealing",),
    "generalisation": ("annealing", "conversion"),
    "geometry": ("annealing", "conversion"),
    "report": (),
}
"""The parts in their order, and those whose SAEs each of them needs."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers."""

    model: str = "demo"
    base_model: str | None = None
    """A relative of the model, for figure 6; without it that comparison is left out."""
    dtype: str = "float32"
    layers: tuple[int, ...] | None = None
    """Three blocks: of the positions and the Crosscoder; the middle one is that of all other SAEs. By default at a
    quarter, half and three quarters of the depth (7, 14 and 22 of 30 blocks)."""
    route_layers: tuple[int, ...] | None = None
    expansion: int = 8
    wide_expansion: int = 32
    d_sae: int | None = None
    wide: int | None = None
    k: int = 50
    seeds: int = 3
    tokens: int = 300_000
    position_tokens: int = 150_000
    context_size: int = 128
    batch_size: int = 2048
    lm_batch_size: int = 16
    silent_window: int = 20_480
    """Training tokens over which a latent that never fires counts as silent."""
    eval_tokens: int = 4_000
    eval_batch_size: int = 4
    firing_tokens: int = 100_000
    """Held-out tokens for the firing frequencies, and the window of the paper's health limits."""
    feature_tokens: int = 20_000
    calibration_tokens: int = 8_000
    tolerance: float = 0.1
    long_rows: int = 6
    """Long contexts that are evaluated by position."""
    long_factor: int = 16
    chats: int = 32
    neighbours: tuple[int, int] = (6, 24)
    """Latents on the map, of each dictionary of the usual width and of the wide one (figure 7)."""


PRESETS: dict[str, Settings] = {
    "cpu": Settings(),
    # every part in small; its numbers say nothing
    "tiny": Settings(
        expansion=2, wide_expansion=4, k=4, seeds=2, tokens=64 * 24, position_tokens=64 * 12, context_size=16,
        batch_size=64, lm_batch_size=4, silent_window=64 * 3, eval_tokens=120, firing_tokens=200, feature_tokens=150,
        calibration_tokens=450, long_rows=2, long_factor=4, chats=3, neighbours=(3, 5),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Of a model, without its weights."""

    n_layers: int
    d_model: int
    longest: int | None

    @classmethod
    def of(cls, model: str) -> Sizes:
        config: Any = AutoConfig.from_pretrained(rl.demo_model_path() if model == "demo" else model)
        config = config.get_text_config()
        return cls(
            config.num_hidden_layers, config.hidden_size, getattr(config, "max_position_embeddings", None)
        )


def layers_of(settings: Settings, sizes: Sizes) -> list[int]:
    n = sizes.n_layers
    return list(settings.layers or dict.fromkeys((n // 4, max(0, n // 2 - 1), 3 * n // 4)))


def route_layers_of(settings: Settings, sizes: Sizes) -> list[int]:
    return list(settings.route_layers or rl.default_layers(sizes.n_layers))


def widths_of(settings: Settings, sizes: Sizes) -> tuple[int, int]:
    """Of the usual SAEs and of the wide one."""
    return (
        settings.d_sae or settings.expansion * sizes.d_model,
        settings.wide or settings.wide_expansion * sizes.d_model,
    )


def named_parts(given: Sequence[str] | None, problems: list[str]) -> list[str]:
    """The parts that were asked for (``"positions,report"`` too), after those they need; all by default."""
    asked = [name.strip() for text in given or () for name in text.split(",")] or list(PARTS)
    problems += [f"unknown part {name!r}; known: {', '.join(PARTS)}" for name in asked if name not in PARTS]
    wanted = {one for name in asked for one in (*PARTS.get(name, ()), name)}
    return [name for name in PARTS if name in wanted]


def mistakes(settings: Settings) -> list[str]:
    """What is wrong with these settings, in themselves and with the model."""
    at_least = {
        "k": 1, "seeds": 1, "context_size": 2, "batch_size": 1, "lm_batch_size": 1, "eval_tokens": 1,
        "firing_tokens": 1, "feature_tokens": 1, "calibration_tokens": 1, "long_rows": 1, "long_factor": 2, "chats": 1,
        "tokens": 20 * settings.batch_size, "position_tokens": 10 * settings.batch_size,
    }  # fmt: skip
    found = [
        f"--{name.replace('_', '-')} must be {least} or more, got {getattr(settings, name)}"
        + (
            f" ({least // settings.batch_size} training steps)"
            if name.endswith("tokens") and least > 1
            else ""
        )
        for name, least in at_least.items()
        if getattr(settings, name) < least
    ]
    sizes = Sizes.of(settings.model)
    d_sae, wide = widths_of(settings, sizes)
    layers = layers_of(settings, sizes)
    for option, some in (("layers", layers), ("route-layers", route_layers_of(settings, sizes))):
        if some != sorted(set(some)) or not 0 <= some[0] <= some[-1] < sizes.n_layers:
            found.append(
                f"--{option} must be different blocks from 0 to {sizes.n_layers - 1}, ascending; got {some}"
            )
    if len(layers) != 3:
        found.append(f"--layers must name three blocks, got {layers}")
    if settings.k > min(d_sae, sizes.d_model):
        found.append(
            f"--k is {settings.k}, more than the width {d_sae} or the {sizes.d_model} that annealing begins with"
        )
    if wide <= d_sae:
        found.append(f"--wide is {wide}, no wider than the other dictionaries ({d_sae})")
    needed = -(-settings.k // settings.tolerance**2)
    if settings.calibration_tokens < needed:
        found.append(
            f"--calibration-tokens must be {needed:.0f} or more for k = {settings.k} to {settings.tolerance:g} "
            f"(k / tolerance^2), got {settings.calibration_tokens}"
        )
    long = settings.context_size * settings.long_factor
    if sizes.longest is not None and long > sizes.longest:
        found.append(
            f"--context-size times --long-factor is {long}, but the model reads at most {sizes.longest} tokens"
        )
    return found
