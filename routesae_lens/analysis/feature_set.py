"""The interpretable features of an SAE: what is known of each, counts at any threshold, and the file."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from routesae_lens.analysis.contexts import Context

FORMAT = "routesae_lens.features/1"


@dataclass(frozen=True)
class FeatureRule:
    """What makes a feature interpretable, and how much of it is kept. See ``collect_features``."""

    threshold: int | float = 15.0
    relative: bool = True
    collect_above: int | float | None = None
    contexts_per_token: int = 2
    min_contexts: int = 4
    max_token_classes: int | None = None
    max_contexts: int | None = 32
    context_tokens: int = 64

    def __post_init__(self) -> None:
        if not _is_number(self.threshold) or not 0 < self.threshold < math.inf:
            raise ValueError(f"threshold must be a positive number, got {self.threshold!r}")
        lowest = self.threshold / 3 if self.collect_above is None else self.collect_above
        if not _is_number(lowest) or not 0 <= lowest <= self.threshold:
            raise ValueError(
                f"collect_above must be between 0 and the threshold {self.threshold}, got {lowest!r}"
            )
        object.__setattr__(self, "threshold", float(self.threshold))
        object.__setattr__(self, "collect_above", float(lowest))
        for name in (
            "contexts_per_token",
            "min_contexts",
            "context_tokens",
            "max_token_classes",
            "max_contexts",
        ):
            value = getattr(self, name)
            if value is None and name.startswith("max_"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")
        if not isinstance(self.relative, bool):
            raise ValueError(f"relative must be True or False, got {self.relative!r}")
        if self.max_contexts is not None and self.max_contexts < self.min_contexts:
            raise ValueError(
                f"max_contexts must be at least min_contexts = {self.min_contexts}, got {self.max_contexts}"
            )

    @property
    def lowest(self) -> float:
        """The lowest threshold that can be answered."""
        assert self.collect_above is not None
        return self.collect_above

    @property
    def held_per_feature(self) -> int | None:
        """How many contexts must be held of a feature to decide about it and to show ``max_contexts``."""
        if self.max_contexts is None:
            return None
        # So many contexts come from more than max_token_classes classes for certain.
        crowd = (
            0 if self.max_token_classes is None else self.contexts_per_token * (self.max_token_classes + 1)
        )
        return max(self.max_contexts, self.min_contexts, crowd)


@dataclass(frozen=True)
class BlockActivity:
    """Activations of one feature at one block, over all kept tokens routed there."""

    active: int
    """Tokens on which it is above 0."""
    above: int
    """Tokens on which it is above the threshold of the collection."""
    mean_activation: float
    """Mean over the ``active`` tokens, in units of p = 1; 0 where there are none."""


@dataclass(frozen=True)
class Feature:
    """An interpretable feature."""

    id: int
    """Number of the latent."""
    contexts: list[Context]
    """Strongest first: the ``contexts_per_token`` of each token class, at most ``max_contexts`` in all."""
    firing_frequency: float
    """Share of kept tokens on which it is above 0."""
    max_activation: float
    """In units of p = 1."""
    blocks: dict[int, BlockActivity]
    """Histogram over blocks; empty for an SAE that reads several at once."""
    decoder_norms: dict[int, float]
    """Norm of its decoder direction in each block, of an SAE that writes several at once; else empty."""

    @property
    def tokens(self) -> list[str]:
        """Classes of the activated tokens, strongest first."""
        return list(dict.fromkeys(context.token_class for context in self.contexts))


@dataclass(eq=False)
class FeatureSet:
    """The interpretable features of one SAE, at the threshold of the collection and above."""

    name: str
    rule: FeatureRule
    tokens: int
    """Kept tokens that were read."""
    layer_tokens: dict[int, int]
    """Kept tokens by the block they were routed to; empty for an SAE that reads several at once."""
    firing_frequency: Float[Tensor, " d_sae"]
    """Share of kept tokens on which each latent is above 0, float64."""
    max_activation: Float[Tensor, " d_sae"]
    """In units of p = 1, float64."""
    retained_below: Float[Tensor, " d_sae"]
    """A latent has enough contexts at every threshold below this; 0 for too few above ``collect_above``."""
    crowded_below: Float[Tensor, " d_sae"]
    """... and more than ``max_token_classes`` at every threshold below this; 0 for never."""
    candidates: list[Feature]
    """Latents with enough contexts at ``rule.threshold``, those with too many token classes too."""

    def retained(self, threshold: int | float | None = None) -> Bool[Tensor, " d_sae"]:
        """Which latents are interpretable features at a threshold (by default the collection's).

        Raises:
            ValueError: a threshold below ``rule.collect_above``: nothing was collected there.
        """
        threshold = self.rule.threshold if threshold is None else threshold
        if not _is_number(threshold) or not self.rule.lowest <= threshold < math.inf:
            raise ValueError(
                f"contexts of {self.name!r} were collected above {self.rule.lowest}; a threshold must be a "
                f"number of at least that, got {threshold!r} (collect again with a lower collect_above)"
            )
        return (self.retained_below > threshold) & ~(self.crowded_below > threshold)

    def count(self, threshold: int | float | None = None) -> int:
        """Number of interpretable features."""
        return int(self.retained(threshold).sum())

    def curve(self, thresholds: Iterable[int | float]) -> list[int]:
        """:meth:`count` at each threshold, without another pass."""
        return [self.count(threshold) for threshold in thresholds]

    @property
    def features(self) -> list[Feature]:
        """The interpretable features at the threshold of the collection."""
        return self.features_at(self.rule.threshold)

    def features_at(self, threshold: int | float) -> list[Feature]:
        """The interpretable features at this threshold, with the contexts above it.

        Raises:
            ValueError: a threshold below the collection's: text is kept above that only.
        """
        if _is_number(threshold) and threshold < self.rule.threshold:
            raise ValueError(
                f"contexts of {self.name!r} have text above the threshold {self.rule.threshold} only, got "
                f"{threshold!r} (counts are known from {self.rule.lowest} on)"
            )
        retained = self.retained(threshold)
        return [
            replace(feature, contexts=[c for c in feature.contexts if c.strength > threshold])
            for feature in self.candidates
            if retained[feature.id]
        ]

    def save(self, path: str | Path) -> None:
        """Write everything as one JSON file, compressed if its name ends in .gz; whole or not at all."""
        path = Path(path)
        data = {
            "format": FORMAT,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "rule": asdict(self.rule),
            **{name: getattr(self, name).tolist() for name in _PER_LATENT},
            "candidates": [_as_dict(feature) for feature in self.candidates],
        }
        # ASCII alone: text may hold marks that turn the writing direction of whatever displays the file.
        written = json.dumps(data, allow_nan=False).encode()
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_bytes(gzip.compress(written, mtime=0) if path.suffix == ".gz" else written)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> FeatureSet:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of features, one of another format, or a damaged one.
        """
        content = Path(path).read_bytes()
        try:
            data = json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
        except (ValueError, OSError, EOFError, zlib.error, RecursionError) as error:
            raise ValueError(f"{path} is no file of features: {type(error).__name__}: {error}") from error
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path} is no file of features: expected format {FORMAT!r}, got {found!r}")
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is a damaged file of features: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> FeatureSet:
        per_latent = {name: torch.tensor(data[name], dtype=torch.float64) for name in _PER_LATENT}
        if len({vector.shape for vector in per_latent.values()}) > 1:
            raise ValueError("the lists " + ", ".join(_PER_LATENT) + " differ in length")
        candidates = [
            Feature(
                feature["id"],
                [Context(**context) for context in feature["contexts"]],
                feature["firing_frequency"],
                feature["max_activation"],
                {int(block): BlockActivity(**counts) for block, counts in feature["blocks"].items()},
                {int(block): norm for block, norm in feature["decoder_norms"].items()},
            )
            for feature in data["candidates"]
        ]
        latents = range(len(per_latent["max_activation"]))
        for feature in candidates:
            if type(feature.id) is not int or feature.id not in latents:
                raise ValueError(f"feature {feature.id!r} is none of the {len(latents)} latents")
        if len({feature.id for feature in candidates}) < len(candidates):
            raise ValueError("a feature is there twice")
        layer_tokens = {int(block): count for block, count in data["layer_tokens"].items()}
        rule = FeatureRule(**data["rule"])
        return cls(data["name"], rule, data["tokens"], layer_tokens, candidates=candidates, **per_latent)


def _as_dict(feature: Feature) -> dict[str, Any]:
    contexts = [context._asdict() for context in feature.contexts]
    return asdict(replace(feature, contexts=[])) | {"contexts": contexts}


_PER_LATENT = ("firing_frequency", "max_activation", "retained_below", "crowded_below")


def feature_count_curves(
    feature_sets: Mapping[str, FeatureSet], thresholds: Iterable[int | float]
) -> pd.DataFrame:
    """Number of interpretable features of every SAE at every threshold: columns sae, threshold, count.

    Raises:
        ValueError: a threshold below what was collected.
    """
    thresholds = list(thresholds)
    rows = [
        (name, threshold, count)
        for name, features in feature_sets.items()
        for threshold, count in zip(thresholds, features.curve(thresholds), strict=True)
    ]
    return pd.DataFrame(rows, columns=["sae", "threshold", "count"])


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
