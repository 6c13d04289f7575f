"""Mixtures of expert SAEs: Switch SAE and Scale SAE, and a Scale SAE as the shared SAE of a RouteSAE.

A router sends each token to e of N experts; TopK is over the latents of these together (Xu et al. 2025, Eqs. 2.3-2.5;
with e = 1 and no feature scaling the Switch SAE of Mudide et al. 2024). Only the selected experts are computed, forward
and backward, see ``expert_function.py``. Latents of expert i are the block ``[i w : (i + 1) w]`` of ``d_sae = N w``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import register_sae_class, register_sae_training_class

from routesae_lens.saes.expert_mixins import (
    ExpertFields,
    ExpertInference,
    ExpertTraining,
    ExpertTrainingFields,
    FeatureScaling,
)
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.route_sae import RouteFields, RouteSAE, RouteTrainingFields, RouteTrainingSAE
from routesae_lens.saes.signed_topk import ReLUField, ReLUOption

# --- Scale SAE ---------------------------------------------------------------------------------------------


@dataclass
class ScaleSAEConfig(ReLUField, ExpertFields, TopKSAEConfig):
    """Config of :class:`ScaleSAE`. ``relu=False`` keeps negative latents among the k."""

    @classmethod
    def architecture(cls) -> str:
        return "scale_topk"


class ScaleSAE(ReLUOption, ExpertInference, TopKSAE):
    """A mixture of expert TopK SAEs, e of N of which are computed for a token (Xu et al. 2025)."""


@dataclass(kw_only=True)
class ScaleTrainingSAEConfig(ReLUField, ExpertTrainingFields, TopKTrainingSAEConfig):
    """Config of :class:`ScaleTrainingSAE`: experts, feature scaling, ``relu``, and SAELens' TopK fields.

    Its loss is SAELens' squared error summed over ``d_in``, about ``d_in`` at the start for inputs scaled by
    ``normalize_activations="expected_average_only_in"``, as ``expert_balance_coefficient`` supposes by default.
    """

    @classmethod
    def architecture(cls) -> str:
        return "scale_topk"


class ScaleTrainingSAE(ReLUOption, ExpertTraining, TopKTrainingSAE):
    """A Scale SAE in training, saved as :class:`ScaleSAE`."""


# --- Switch SAE --------------------------------------------------------------------------------------------


def _check_fixed(cfg: Any, **fixed: Any) -> None:
    for name, value in fixed.items():
        if getattr(cfg, name) != value:
            raise ValueError(
                f"a Switch SAE has {name}={value!r}, got {getattr(cfg, name)!r}; a Scale SAE takes both"
            )


@dataclass(kw_only=True)
class SwitchSAEConfig(ScaleSAEConfig):
    """Config of :class:`SwitchSAE`."""

    active_experts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fixed(self, active_experts=1)

    @classmethod
    def architecture(cls) -> str:
        return "switch_topk"


class SwitchSAE(ScaleSAE):
    """One expert TopK SAE of N for each token (Mudide et al. 2024; Eq. 2.1)."""


@dataclass(kw_only=True)
class SwitchTrainingSAEConfig(ScaleTrainingSAEConfig):
    """Config of :class:`SwitchTrainingSAE`: as :class:`ScaleTrainingSAEConfig`, with one expert, unscaled."""

    active_experts: int = 1
    feature_scaling: FeatureScaling = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fixed(self, active_experts=1, feature_scaling="none")

    @classmethod
    def architecture(cls) -> str:
        return "switch_topk"


class SwitchTrainingSAE(ScaleTrainingSAE):
    """A Switch SAE in training, saved as :class:`SwitchSAE`."""


# --- RouteSAE over a Scale SAE -----------------------------------------------------------------------------


@dataclass
class RouteScaleSAEConfig(ReLUField, ExpertFields, RouteFields, TopKSAEConfig):
    """Config of :class:`RouteScaleSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "route_scale"


class RouteScaleSAE(ReLUOption, RouteSAE, ExpertInference, TopKSAE):
    """RouteSAE with a Scale SAE: one router chooses the layer, another the experts."""

    shared_class = ScaleSAE
    shared_config = ScaleSAEConfig


@dataclass(kw_only=True)
class RouteScaleTrainingSAEConfig(
    ReLUField, ExpertTrainingFields, RouteTrainingFields, TopKTrainingSAEConfig
):
    """Config of :class:`RouteScaleTrainingSAE`: the layer router's fields, experts, ``relu``, SAELens' TopK fields."""

    @classmethod
    def architecture(cls) -> str:
        return "route_scale"


class RouteScaleTrainingSAE(ReLUOption, RouteTrainingSAE, ExpertTraining, TopKTrainingSAE):
    """RouteSAE with a Scale SAE in training, with the step that computes the selected experts only."""

    starts_anew = (*RouteTrainingSAE.starts_anew, "expert_scale", "W_lowpass")

    @torch.no_grad()
    def init_from(self, sae: SAE[Any]) -> None:
        """As :meth:`RouteTrainingSAE.init_from`, also from an expert SAE with another ``feature_scaling``: the encoder
        becomes the scaled one of ``sae``, and scaling starts anew from there (omega 0)."""
        self.start_scaling()  # (decoder norms can be folded then)
        super().init_from(inference_form(sae) if isinstance(sae, ExpertTraining) else sae)
        self.start_scaling()


# --- Registration ------------------------------------------------------------------------------------------

INFERENCE: tuple[tuple[Any, Any], ...] = (
    (ScaleSAE, ScaleSAEConfig),
    (SwitchSAE, SwitchSAEConfig),
    (RouteScaleSAE, RouteScaleSAEConfig),
)
TRAINING: tuple[tuple[Any, Any], ...] = (
    (ScaleTrainingSAE, ScaleTrainingSAEConfig),
    (SwitchTrainingSAE, SwitchTrainingSAEConfig),
    (RouteScaleTrainingSAE, RouteScaleTrainingSAEConfig),
)
for sae_class, config in INFERENCE:
    register_sae_class(config.architecture(), sae_class, config)
for training_class, config in TRAINING:
    register_sae_training_class(config.architecture(), training_class, config)

EXPERT_ARCHITECTURES: dict[str, Any] = {config.architecture(): config for _, config in TRAINING}
"""Training configs by architecture name."""
