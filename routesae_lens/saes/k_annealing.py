"""K-annealing and the initialisation of Llama Scope (He et al., 2024, sections 2.4, 3.3.1, 3.3.2), for TopK SAEs.

:class:`ScopeFields` and :class:`KAnnealing` bring both into any TopK-shaped training SAE of SAELens' kind:
RouteSAEs, Crosscoders, their BatchTopK forms, and ordinary SAEs of one layer (:class:`AnnealedTopKTrainingSAE`).
Nothing of it is left at inference: what is saved has the one k of the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from sae_lens import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from torch import nn

from routesae_lens.saes.fast_topk import FastTopK

ANNEALED = 0.10
"""Share of the steps over which k falls, where a config leaves that to ``train`` (section 3.3.2)."""
SAELENS_INIT_NORM = 0.1
"""SAELens' default of ``decoder_init_norm``."""

Anneal = Literal["linear", "exponential"]
Init = Literal["saelens", "llama_scope"]


def annealed_k(k: int | float, k_start: int, steps: int, kind: Anneal, step: int) -> int | float:
    """Latents per token when ``step`` training steps are done.

    Linear: ``k_start + (k - k_start) step / steps``; exponential: ``k_start (k / k_start)^(step / steps)``. It
    is ``k_start`` in the first step and exactly ``k`` from ``steps`` on. A whole ``k`` gives whole numbers,
    rounded to the nearest; BatchTopK's float gives the mean that is meant.
    """
    if step >= steps:
        return k
    done = step / steps
    now = k_start + (k - k_start) * done if kind == "linear" else k_start * (k / k_start) ** done
    return round(now) if isinstance(k, int) else now


@dataclass(kw_only=True)
class ScopeFields:
    """Config fields of K-annealing and of the initialisation; they stand before SAELens' in a list of bases.

    Args:
        k_start: latents per token in the first step; None takes the size of one layer's activation (the paper's
            D), or ``d_sae`` where that is less.
        k_anneal_steps: training steps over which k falls from ``k_start`` to ``k``. 0 keeps ``k`` throughout;
            None lets ``train`` choose 10 % of its steps (SAELens' own runners take it as 0).
        k_anneal: "linear" or "exponential", see :func:`annealed_k`.
        init: "saelens" gives decoder rows the norm ``decoder_init_norm``, "llama_scope" the norm sqrt(2 D / F)
            (D the size of one layer's activation, F = ``d_sae``). Rows are Kaiming-uniform, the encoder is the
            decoder's transpose, and biases are zero either way. A Crosscoder's row gets that norm in each layer,
            so sqrt(2 L D / F) over all L: with either, decoding what was encoded gives about the input.

    Raises:
        ValueError: widths, a k or ``k_start`` that cannot be, negative steps, unknown kinds, or
            ``decoder_init_norm`` beside ``init="llama_scope"``.
    """

    k_start: int | None = None
    k_anneal_steps: int | None = 0
    k_anneal: Anneal = "linear"
    init: Init = "saelens"

    def __post_init__(self) -> None:
        cfg: Any = self
        for name in ("d_in", "d_sae"):
            if not _is_integer(getattr(cfg, name)) or getattr(cfg, name) < 1:
                raise ValueError(f"{name} must be an integer, 1 or more; got {getattr(cfg, name)!r}")
        if not _is_number(cfg.k) or not 0 < cfg.k <= cfg.d_sae:  # before other bases compare it
            raise ValueError(f"k must be between 1 and d_sae = {cfg.d_sae}, got {cfg.k!r}")
        super().__post_init__()  # type: ignore[misc]
        for name, known in (("k_anneal", get_args(Anneal)), ("init", get_args(Init))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        steps, start = self.k_anneal_steps, self.k_start
        if steps is not None and (not _is_integer(steps) or steps < 0):
            raise ValueError(f"k_anneal_steps must be a number of steps, 0 or more; got {steps!r}")
        if start is not None and (not _is_integer(start) or not cfg.k <= start <= cfg.d_sae):
            raise ValueError(
                f"k_start must be an integer between k = {cfg.k} and d_sae = {cfg.d_sae}, got {start!r}"
            )
        if start is not None and steps == 0:
            raise ValueError(
                f"k_start={start} needs k_anneal_steps: a number of steps, or None for 10 % of them"
            )
        if start is None and steps != 0 and self.first_k < cfg.k:
            raise ValueError(
                f"k = {cfg.k} is more than the {self.first_k} latents (the size of one layer's activation) "
                "from which it is annealed by default; give k_start"
            )
        if self.init == "llama_scope" and cfg.decoder_init_norm != SAELENS_INIT_NORM:
            raise ValueError(
                f"decoder_init_norm={cfg.decoder_init_norm} does not go with init='llama_scope', which gives "
                "decoder rows the norm sqrt(2 D / F)"
            )

    @property
    def first_k(self) -> int:
        """Latents per token in the first step of an annealed run."""
        cfg: Any = self
        return min(_activation_size(cfg), cfg.d_sae) if self.k_start is None else self.k_start

    @property
    def largest_k(self) -> int | float:
        """The most latents per token that any step keeps."""
        cfg: Any = self
        return cfg.k if self.k_anneal_steps == 0 else max(self.first_k, cfg.k)

    def k_at(self, step: int) -> int | float:
        """Latents per token when ``step`` training steps are done, see :func:`annealed_k`."""
        cfg: Any = self
        return annealed_k(cfg.k, self.first_k, self.k_anneal_steps or 0, self.k_anneal, step)


class KAnnealing(TrainingSAE[Any]):
    """Mixin in front of a TopK-shaped training SAE, see :class:`ScopeFields`.

    The annealed k holds within a training step of an SAE in training mode, and nowhere else: ``encode`` and
    ``forward`` keep the k of the config at all times, as do evaluations and saved SAEs. It depends on
    the number of the step alone, so a resumed run goes on with the right one. (BatchTopK's running threshold sees
    the annealed steps, too; it forgets them at its own ``topk_threshold_lr``, 1 % a step.)
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.init == "llama_scope":
            self._scale_to_llama_scope()

    @torch.no_grad()
    def _scale_to_llama_scope(self) -> None:
        d_sae, d = len(self.W_dec), _activation_size(self.cfg)
        rows = rearrange(self.W_dec.data, "d_sae (layer d) -> d_sae layer d", d=d)
        rows = rows / rows.norm(dim=-1, keepdim=True) * sqrt(2 * d / d_sae)
        self.W_dec = nn.Parameter(rearrange(rows, "d_sae layer d -> d_sae (layer d)"))
        self.W_enc = nn.Parameter(self.W_dec.data.T.clone().contiguous())

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self.training or not self.cfg.k_anneal_steps:
            return super().training_forward_pass(step_input)
        k = self.cfg.k_at(step_input.n_training_steps)
        with self._keeping(k):
            output = super().training_forward_pass(step_input)
        output.metrics["k"] = k
        return output

    @contextmanager
    def _keeping(self, k: int | float) -> Iterator[None]:
        """Another k for the activation function, which the dense and the fast step both ask."""
        activation: Any = self.activation_fn
        usual, activation.k = activation.k, k
        try:
            yield
        finally:
            activation.k = usual


def _activation_size(cfg: Any) -> int:
    """The paper's D: d_model where several layers are read, ``d_in`` otherwise."""
    return int(getattr(cfg, "d_model", cfg.d_in))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- An ordinary SAE of one layer ---------------------------------------------------------------------


@dataclass(kw_only=True)
class AnnealedTopKTrainingSAEConfig(ScopeFields, TopKTrainingSAEConfig):
    """Config of :class:`AnnealedTopKTrainingSAE`: K-annealing, initialisation, and SAELens' TopK fields."""

    def __post_init__(self) -> None:
        if not _is_integer(self.k):
            raise ValueError(f"k must be an integer, got {self.k!r}")
        super().__post_init__()

    @classmethod
    def architecture(cls) -> str:
        return "annealed_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


class AnnealedTopKTrainingSAE(KAnnealing, FastTopK, TopKTrainingSAE):
    """SAELens' TopK SAE in training, with K-annealing and the step that touches only k latents.

    It is saved as SAELens' own ``TopKSAE``, which loads without this package.
    """


register_sae_training_class(
    AnnealedTopKTrainingSAEConfig.architecture(), AnnealedTopKTrainingSAE, AnnealedTopKTrainingSAEConfig
)
