"""Every setting of the comparison of mixtures of experts, its presets, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from experts_methods import Kind, appendix_kinds, main_kinds, methods_of
from llama_scope_settings import Sizes
from paper_presets import Preset
from paper_stages import sequences_of

import routesae_lens as rl

UNUSED = ("options", "threshold", "thresholds", "profile_min_tokens", "part_k", "part_seeds", "layers")
"""Settings of ``paper_presets.Preset`` that decide nothing here (or have another name: ``layer``)."""


@dataclass(frozen=True)
class Settings(Preset):
    """Everything that decides the numbers: what ``paper_presets.Preset`` has, and what is about experts."""

    layer: int | None = None
    """The block that all SAEs read; by default the last of ``default_layers``, three quarters of the depth."""
    expansion: int = 8
    """Total width of an expert SAE, in d_model; ``d_sae`` gives it in latents."""
    per_active: int = 8
    """Experts for each active one: N = ``per_active`` x e. A dense SAE has 1/``per_active`` of the total width, which
    is what every expert SAE computes for a token."""
    experts: tuple[int, ...] = (1, 2, 4, 8)
    """Active experts e that are compared."""
    k: tuple[int, ...] = (16, 32, 64)
    coefficients: dict[str, tuple[float, ...]] = field(default_factory=lambda: {"gated": (0.12, 0.2, 0.3)})
    """So that L0 spans the range of k: 69, 30 and 13 on block 21 of the demo model."""
    wide: bool = False
    """Also a TopK SAE that computes the full width: no fair comparison, an upper reference."""
    seeds_at_once: int = 1
    """Seeds that are trained on one pass of the language model: more take more memory and disk, but fewer passes."""
    balance: float = 0.1
    """Coefficient of the load-balancing loss (alpha of Eq. 2.2); the paper does not say which it used. With 0.01 half
    of the experts are never selected in so short a run."""
    appendix_e: int = 4
    """Active experts of the alternatives of appendix C and of the authors' weights; 0 leaves these out."""
    kl_tokens: int = 3_000
    feature_tokens: int = 12_000
    """Held-out tokens on which co-activations and the experts' use are counted."""

    def __post_init__(self) -> None:
        if self.layer is not None:
            object.__setattr__(self, "layers", (self.layer,))

    def named(self) -> dict[str, Any]:
        """What decides the numbers, by name."""
        return {name: value for name, value in asdict(self).items() if name not in UNUSED}


PRESETS: dict[str, Settings] = {
    "cpu": Settings(batch_size=1024),
    # every part in small; its numbers say nothing
    "tiny": Settings(
        expansion=4, per_active=2, experts=(1, 2), k=(2, 4), coefficients={"gated": (0.05, 0.2)}, seeds=2,
        tokens=64 * 10, context_size=16, batch_size=64, lm_batch_size=4, kl_tokens=60, feature_tokens=200,
        appendix_e=2, wide=True, seeds_at_once=1,
    ),
}  # fmt: skip


def width_of(settings: Settings, sizes: Sizes) -> int:
    """Latents of an expert SAE, of all its experts together."""
    return settings.d_sae or settings.expansion * sizes.d_model


def layer_of(settings: Settings, sizes: Sizes) -> int:
    return rl.default_layers(sizes.n_layers)[-1] if settings.layer is None else settings.layer


def parts_of(settings: Settings) -> dict[str, tuple[int, ...]]:
    """The parts that train, in their order, and the seeds of each: one language-model pass and one folder a part."""
    seeds, step = range(settings.seeds), max(1, settings.seeds_at_once)
    groups = [tuple(seeds[start : start + step]) for start in range(0, settings.seeds, step)]
    return {"seeds" + "_".join(map(str, group)): group for group in groups}


def kinds_of(settings: Settings) -> list[Kind]:
    """The SAEs of every part."""
    s = settings
    kinds = main_kinds(s.experts, s.per_active, s.balance, s.wide)
    return kinds + (appendix_kinds(s.appendix_e, s.per_active, s.balance) if s.appendix_e else [])


def sweep_of(settings: Settings, part: str, layer: int, d_sae: int) -> rl.SweepConfig:
    """The sweep that is one part; it is not checked."""
    kinds, middle = kinds_of(settings), (settings.k[len(settings.k) // 2],)
    return rl.SweepConfig(
        methods=tuple(kind.name for kind in kinds),
        k=settings.k,
        sparsities=settings.coefficients
        | {kind.name: middle for kind in kinds if kind.name.startswith("renorm")},
        seeds=parts_of(settings)[part],
        layers=(layer,),
        d_sae=d_sae,
        training_tokens=settings.tokens,
        context_size=settings.context_size,
        batch_size=settings.batch_size,
        lm_batch_size=settings.lm_batch_size,
        lr=settings.lr,
        schedule="paper",
        unit_norm_every=10,
        held_out_sequences=sequences_of(settings.kl_tokens, settings.context_size),
        eval_batch_size=settings.eval_batch_size,
    )


def mistakes(settings: Settings) -> list[str]:
    """What is wrong with these settings: in themselves, with the model, and as the sweep of each part."""
    s = settings
    at_least = {
        "seeds": 1, "seeds_at_once": 1, "appendix_e": 0, "kl_tokens": 1, "feature_tokens": 2, "context_size": 2,
        "per_active": 2, "batch_size": 1,
    }  # fmt: skip
    found = [
        f"--{name.replace('_', '-')} must be {least} or more, got {getattr(s, name)}"
        for name, least in at_least.items()
        if getattr(s, name) < least
    ]
    if not s.experts or min(s.experts) < 1:
        found.append(f"--experts must be numbers of 1 or more, got {list(s.experts)}")
    if s.balance < 0:
        found.append(f"--balance must be 0 or more, got {s.balance:g}")
    sizes = Sizes.of(s.model)
    if s.layer is not None and not 0 <= s.layer < sizes.n_layers:
        found.append(f"--layer is {s.layer}, but the model has blocks 0 to {sizes.n_layers - 1}")
    if sizes.longest is not None and s.context_size > sizes.longest:
        found.append(
            f"--context-size is {s.context_size}, but the model reads at most {sizes.longest} tokens"
        )
    if found:
        return found
    width = width_of(s, sizes)
    for e in sorted({*s.experts, s.appendix_e} - {0}):
        if width % (s.per_active * e):
            found.append(
                f"the width {width} is not divided by {s.per_active * e} experts (--per-active x {e})"
            )
    computed = width // s.per_active
    if found or max(s.k) > computed:
        return found or [f"--k is {max(s.k)}, but {computed} latents are computed for a token"]
    problems = {
        problem: None
        for part in parts_of(s)
        for problem in sweep_of(s, part, layer_of(s, sizes), width).problems(methods_of(kinds_of(s)))
    }
    return list(problems)
