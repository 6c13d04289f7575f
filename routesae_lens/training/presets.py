"""Presets: published training recipes by name, as options of ``train`` and fields of training configs.

Whatever makes configs and trains them can name one::

    scope = PRESETS["llama_scope"]
    cfg = AnnealedTopKTrainingSAEConfig(
        d_in=576, d_sae=4608, k=50, **scope.fields_of(AnnealedTopKTrainingSAEConfig)
    )
    train(model, cfg, text, output=..., training_tokens=..., **scope.train)

So do ``routesae-lens train --preset llama_scope`` and a sweep's ``preset = "llama_scope"``, where everything that is
given explicitly wins. RouteSAE's own recipe, ``paper``, is what holds without a preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sae_lens.saes.sae import TrainingSAEConfig

from routesae_lens.saes.transcoder_fields import TranscoderFields

DEFAULTS: dict[str, Any] = {
    "lr": 5e-4,
    "schedule": "paper",
    "unit_norm_every": None,
    "exclude_special_tokens": True,
    "exclude_first_position": True,
}
"""The options of ``train`` that a preset may set, and what they are without one."""


@dataclass(frozen=True)
class Preset:
    """One recipe: what it sets. What it does not name (k, widths, tokens, batches) stays the caller's."""

    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of ``train``, out of :data:`DEFAULTS`."""
    sae: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the SAEs' configs; take them by :meth:`fields_of`."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.train if name not in DEFAULTS]:
            raise ValueError(f"a preset does not set {', '.join(unknown)}; it may set: {', '.join(DEFAULTS)}")

    def settings(self, **given: Any) -> dict[str, Any]:
        """All of :data:`DEFAULTS`, as this preset has them, and those ``given``, which win."""
        return {**DEFAULTS, **self.train, **given}

    def fields_of(self, config: type[TrainingSAEConfig], **given: Any) -> dict[str, Any]:
        """The fields of ``config`` that this preset sets, and those ``given``, which win.

        SAEs that standardise each token's activation get no input scale: standardising undoes it. Nor do
        transcoders, whose own ``normalize`` gives each of their sites one.

        Raises:
            ValueError: ``config`` lacks fields of the preset, because it is no TopK-shaped SAE of this package.
        """
        known = {one.name: one.default for one in fields(config)}
        if missing := [name for name in self.sae if name not in known]:
            raise ValueError(
                f"{config.architecture()} does not go with this preset, it has no {', '.join(missing)}; "
                "expected a TopK-shaped training SAE of this package (annealed_topk for an ordinary one)"
            )
        chosen = dict(self.sae)
        if issubclass(config, TranscoderFields) or given.get("standardize", known.get("standardize", False)):
            chosen.pop("normalize_activations", None)
        return chosen | given


PRESETS: dict[str, Preset] = {
    "paper": Preset(),  # the defaults of ``train`` and of the configs (RouteSAE, section 4.1)
    # Llama Scope, sections 2.4 and 3.3. Its loss is the plain squared error, which SAELens' SAEs have. RouteSAEs
    # and Crosscoders keep their normalised loss (loss="mse" is the other): with the plain one a router learns to
    # shrink p.
    "llama_scope": Preset(
        train={"lr": 8e-4, "schedule": "llama_scope", "exclude_special_tokens": True},
        sae={
            "k_anneal_steps": None,  # 10 % of the run's
            "init": "llama_scope",
            "normalize_activations": "expected_average_only_in",  # mean norm sqrt(D), folded afterwards
            "rescale_acts_by_decoder_norm": True,  # Eq. 5
            "apply_b_dec_to_input": False,
            "aux_loss_coefficient": 0.0,
        },
    ),
}
"""The presets by name. To add one, give it an entry."""


def find_preset(name: str) -> Preset:
    """The preset ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
