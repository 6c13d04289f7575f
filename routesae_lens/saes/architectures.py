"""RouteSAE over SAELens' SAEs: config, inference class and training class of each, and their registration.

``route_topk``, ``route_batchtopk``, ``route_matryoshka_batchtopk``, ``route_jumprelu``, ``route_gated`` and
``route_standard`` train through SAELens' stock runners and come back with ``SAE.load_from_disk`` (BatchTopK
and Matryoshka as the routed JumpReLU, as SAELens does).

To add one, derive config and SAE from the stock ones as below, and add them to the last table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import Tensor

from routesae_lens.saes.fast_topk import FastTopK
from routesae_lens.saes.k_annealing import KAnnealing, ScopeFields
from routesae_lens.saes.route_sae import RouteFields, RouteSAE, RouteTrainingFields, RouteTrainingSAE
from routesae_lens.saes.signed_topk import ReLUField, ReLUOption

# --- TopK ------------------------------------------------------------------------------------------


@dataclass
class RouteTopKSAEConfig(ReLUField, RouteFields, TopKSAEConfig):
    """Config of :class:`RouteTopKSAE`. ``relu=False`` keeps negative latents among the k, as the authors do."""

    @classmethod
    def architecture(cls) -> str:
        return "route_topk"


class RouteTopKSAE(ReLUOption, RouteSAE, TopKSAE):
    """RouteSAE with a TopK SAE: the paper's."""

    shared_class = TopKSAE
    shared_config = TopKSAEConfig


@dataclass(kw_only=True)
class RouteTopKTrainingSAEConfig(ReLUField, ScopeFields, RouteTrainingFields, TopKTrainingSAEConfig):
    """Config of :class:`RouteTopKTrainingSAE`: the router's fields, ``relu``, K-annealing, and SAELens' TopK fields."""

    @classmethod
    def architecture(cls) -> str:
        return "route_topk"


class RouteTopKTrainingSAE(KAnnealing, ReLUOption, RouteTrainingSAE, FastTopK, TopKTrainingSAE):
    """RouteSAE with a TopK SAE in training, with the step that touches only k latents where it applies."""


# --- JumpReLU: also what BatchTopK and Matryoshka become ----------------------------------------------


@dataclass
class RouteJumpReLUSAEConfig(RouteFields, JumpReLUSAEConfig):
    """Config of :class:`RouteJumpReLUSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "route_jumprelu"


class RouteJumpReLUSAE(RouteSAE, JumpReLUSAE):
    """RouteSAE with a JumpReLU SAE; BatchTopK and Matryoshka become this one, too."""

    shared_class = JumpReLUSAE
    shared_config = JumpReLUSAEConfig


@dataclass(kw_only=True)
class RouteJumpReLUTrainingSAEConfig(RouteTrainingFields, JumpReLUTrainingSAEConfig):
    """Config of :class:`RouteJumpReLUTrainingSAE`: the router's fields, and SAELens' JumpReLU fields."""

    @classmethod
    def architecture(cls) -> str:
        return "route_jumprelu"


class RouteJumpReLUTrainingSAE(RouteTrainingSAE, JumpReLUTrainingSAE):
    """RouteSAE with a JumpReLU SAE in training: L0 penalty, learned thresholds."""

    def _normalized_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
        norm: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        # L0 counts latents: it has no scale to remove.
        return JumpReLUTrainingSAE.calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out)


# --- BatchTopK and Matryoshka BatchTopK ---------------------------------------------------------------


@dataclass(kw_only=True)
class RouteBatchTopKTrainingSAEConfig(ScopeFields, RouteTrainingFields, BatchTopKTrainingSAEConfig):
    """Config of :class:`RouteBatchTopKTrainingSAE`: the router's fields, K-annealing, and SAELens' BatchTopK fields."""

    @classmethod
    def architecture(cls) -> str:
        return "route_batchtopk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return RouteJumpReLUSAEConfig


class RouteBatchTopKTrainingSAE(KAnnealing, RouteTrainingSAE, BatchTopKTrainingSAE):
    """RouteSAE with a BatchTopK SAE in training: k latents per token on average over the batch."""

    cfg: Any


@dataclass(kw_only=True)
class RouteMatryoshkaBatchTopKTrainingSAEConfig(
    ScopeFields, RouteTrainingFields, MatryoshkaBatchTopKTrainingSAEConfig
):
    """Config of :class:`RouteMatryoshkaBatchTopKTrainingSAE`: the router's fields, K-annealing, and SAELens' own."""

    @classmethod
    def architecture(cls) -> str:
        return "route_matryoshka_batchtopk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return RouteJumpReLUSAEConfig


class RouteMatryoshkaBatchTopKTrainingSAE(KAnnealing, RouteTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """RouteSAE with a Matryoshka BatchTopK SAE in training: nested widths, each reconstructing alone."""

    cfg: Any
    _aux_norm: Tensor | None = None

    def _iterable_decode(self, feature_acts: Tensor, include_outer_loss: bool = False) -> Any:
        for width, decoded in super()._iterable_decode(feature_acts, include_outer_loss):
            yield width, decoded if self._aux_norm is None else decoded / self._aux_norm

    def _normalized_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
        norm: Tensor,
    ) -> Tensor | dict[str, Tensor]:
        # The partial reconstructions hold b_dec, so they are divided where they are made.
        self._aux_norm = norm
        try:
            return MatryoshkaBatchTopKTrainingSAE.calculate_aux_loss(
                self,
                replace(step_input, sae_in=step_input.sae_in / norm),
                feature_acts,
                hidden_pre / norm,
                sae_out / norm,
            )
        finally:
            self._aux_norm = None


# --- Gated --------------------------------------------------------------------------------------------


@dataclass
class RouteGatedSAEConfig(RouteFields, GatedSAEConfig):
    """Config of :class:`RouteGatedSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "route_gated"


class RouteGatedSAE(RouteSAE, GatedSAE):
    """RouteSAE with a Gated SAE."""

    shared_class = GatedSAE
    shared_config = GatedSAEConfig


@dataclass(kw_only=True)
class RouteGatedTrainingSAEConfig(RouteTrainingFields, GatedTrainingSAEConfig):
    """Config of :class:`RouteGatedTrainingSAE`: the router's fields, and SAELens' Gated fields."""

    @classmethod
    def architecture(cls) -> str:
        return "route_gated"


class RouteGatedTrainingSAE(RouteTrainingSAE, GatedTrainingSAE):
    """RouteSAE with a Gated SAE in training: L1 penalty on the gate, and the gate's own reconstruction."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        # SAELens' terms, written out: both go through encoder biases, so dividing the input would not divide
        # them, and its reconstruction compares with the very tensor that is encoded.
        x = step_input.sae_in
        target = self._target(x)
        norm = self._input_norm(x)
        gate = torch.relu((x - self.b_dec * self.cfg.apply_b_dec_to_input) @ self.W_enc + self.b_gate)
        l1 = (gate * self.W_dec.norm(dim=1)).sum(-1, keepdim=True) / norm
        error = (gate @ self.W_dec + self.b_dec - target) / norm
        return {
            "l1_loss": step_input.coefficients["l1"] * l1.mean(),
            "auxiliary_reconstruction_loss": error.pow(2).sum(-1).mean(),
        }


# --- Standard (ReLU, L1) --------------------------------------------------------------------------------


@dataclass
class RouteStandardSAEConfig(RouteFields, StandardSAEConfig):
    """Config of :class:`RouteStandardSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "route_standard"


class RouteStandardSAE(RouteSAE, StandardSAE):
    """RouteSAE with a ReLU SAE."""

    shared_class = StandardSAE
    shared_config = StandardSAEConfig


@dataclass(kw_only=True)
class RouteStandardTrainingSAEConfig(RouteTrainingFields, StandardTrainingSAEConfig):
    """Config of :class:`RouteStandardTrainingSAE`: the router's fields, and SAELens' standard fields."""

    @classmethod
    def architecture(cls) -> str:
        return "route_standard"


class RouteStandardTrainingSAE(RouteTrainingSAE, StandardTrainingSAE):
    """RouteSAE with a ReLU SAE in training: L1 penalty."""


# --- Registration -----------------------------------------------------------------------------------------

INFERENCE: tuple[tuple[type[RouteSAE], type[SAEConfig]], ...] = (
    (RouteTopKSAE, RouteTopKSAEConfig),
    (RouteJumpReLUSAE, RouteJumpReLUSAEConfig),
    (RouteGatedSAE, RouteGatedSAEConfig),
    (RouteStandardSAE, RouteStandardSAEConfig),
)
TRAINING: tuple[tuple[type[RouteTrainingSAE], Any], ...] = (
    (RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig),
    (RouteBatchTopKTrainingSAE, RouteBatchTopKTrainingSAEConfig),
    (RouteMatryoshkaBatchTopKTrainingSAE, RouteMatryoshkaBatchTopKTrainingSAEConfig),
    (RouteJumpReLUTrainingSAE, RouteJumpReLUTrainingSAEConfig),
    (RouteGatedTrainingSAE, RouteGatedTrainingSAEConfig),
    (RouteStandardTrainingSAE, RouteStandardTrainingSAEConfig),
)
for sae_class, config in INFERENCE:
    register_sae_class(config.architecture(), sae_class, config)
for training_class, config in TRAINING:
    register_sae_training_class(config.architecture(), training_class, config)

ROUTE_ARCHITECTURES: dict[str, Any] = {config.architecture(): config for _, config in TRAINING}
"""Training configs by architecture name."""
