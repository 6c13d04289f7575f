"""What steering does to a latent, and at which tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from routesae_lens.splice.window import Window


class Edit:
    """A change of one latent's activation."""

    relative: bool = False
    """Whether the strength is in units of the feature's own maximum."""

    def __call__(
        self, acts: Float[Tensor, "*batch"], unit: Float[Tensor, "*#batch"]
    ) -> Float[Tensor, "*batch"]:
        """The activations after the edit; ``unit`` is 1, or the feature's maximum."""
        raise NotImplementedError


@dataclass(frozen=True)
class Set(Edit):
    """Clamp to ``value`` (RouteSAE, figure 10, with 20)."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        _check_number(self, self.value)

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return torch.zeros_like(acts) + self.value * unit


@dataclass(frozen=True)
class Add(Edit):
    """Add ``value``."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        _check_number(self, self.value)

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return acts + self.value * unit


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply by ``factor``; a latent that is not active stays so."""

    factor: float

    def __post_init__(self) -> None:
        _check_number(self, self.factor)

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return acts * self.factor


@dataclass(frozen=True)
class Ablate(Edit):
    """Set to zero."""

    def __call__(self, acts: Tensor, unit: Tensor) -> Tensor:
        return torch.zeros_like(acts)


def _check_number(edit: Edit, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{type(edit).__name__} takes a finite number, got {value!r}")


Positions = str | slice | Collection[int] | Callable[[Tensor], Tensor]
"""Tokens to steer: "all", "prompt", "generated", a slice, token ids, or a predicate of token ids.

A slice counts the tokens of each sequence, without padding; negative bounds count back from the end of the
prompt. A predicate takes token ids (batch, pos) and returns booleans of that shape. It must judge each token by
itself: with a KV cache it is asked about the new tokens alone.
"""
_NAMED = ("all", "prompt", "generated")


def check_edits(
    edits: Mapping[int, Edit], d_sae: int, maxima: Mapping[int, float] | Tensor | None
) -> dict[int, tuple[Edit, float]]:
    """``edits`` by latent with the unit of each strength, once all is known to be right.

    Raises:
        TypeError: no mapping from latents to edits.
        ValueError: nothing to do, a latent that the SAE does not have, or a relative strength without a
            positive maximum of that feature.
    """
    if not isinstance(edits, Mapping):
        raise TypeError(
            f"expected edits as {{latent: Set(20.0)}}, got {type(edits).__name__} {str(edits)[:60]!r}"
        )
    if not edits:
        raise ValueError("no edits given: expected for example {latent: Set(20.0)}")
    checked = {}
    for latent, edit in edits.items():
        if isinstance(edit, type) or not isinstance(edit, Edit):
            raise TypeError(f"latent {latent!r}: expected Set, Add, Scale or Ablate, got {edit!r}")
        try:
            index = operator.index(latent)
        except TypeError:
            index = -1
        if isinstance(latent, bool) or not 0 <= index < d_sae:
            raise ValueError(f"latent {latent!r} is out of range: this SAE has latents 0 to {d_sae - 1}")
        checked[index] = (edit, _maximum(index, maxima) if edit.relative else 1.0)
    return checked


def _maximum(latent: int, maxima: Mapping[int, float] | Tensor | None) -> float:
    if maxima is None:
        raise ValueError(
            f"the strength for latent {latent} is relative to the feature's maximum: give maxima={{{latent}: ...}}, "
            "or all of them, as FeatureSet.max_activation is"
        )
    found: Any = "none for it"
    try:
        found = maxima[latent]
        maximum = float(found)
    except (KeyError, IndexError, ValueError):
        maximum = math.nan
    except TypeError as error:
        raise TypeError(
            f"maxima must be a mapping or a tensor of numbers by latent, such as FeatureSet.max_activation; got "
            f"{type(maxima).__name__}"
        ) from error
    if not (math.isfinite(maximum) and maximum > 0):
        raise ValueError(
            f"the strength for latent {latent} is relative to its maximum, and maxima has "
            f"{found if isinstance(found, str) else maximum}; expected a positive number"
        )
    return maximum


def check_positions(positions: Positions) -> None:
    """Raise a ValueError or TypeError that says what ``positions`` may be."""
    if isinstance(positions, str):
        if positions not in _NAMED:
            raise ValueError(f"unknown positions {positions!r}; known: {', '.join(_NAMED)}")
    elif isinstance(positions, slice):
        if positions.step is not None and (not isinstance(positions.step, int) or positions.step < 1):
            raise ValueError(f"positions has the step {positions.step!r}; expected a positive number or none")
        for bound in (positions.start, positions.stop):
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int)):
                raise ValueError(f"positions has the bound {bound!r}; expected a whole number or none")
    elif isinstance(positions, Collection):
        ids = list(positions)
        whole = all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids)
        if not ids or not whole or isinstance(positions, bytes):
            raise ValueError(
                f"positions as token ids must be whole numbers of 0 or more, at least one, got {positions!r}"
            )
    elif not callable(positions):
        raise TypeError(
            f"positions must be one of {', '.join(map(repr, _NAMED))}, a slice, token ids or a function of token "
            f"ids, got {type(positions).__name__}"
        )


def chosen(positions: Positions, window: Window) -> Bool[Tensor, "batch pos"]:
    """The tokens that ``positions`` names among those of a pass; never padding.

    Raises:
        ValueError: it asks for token ids and the model was given embeddings, or a predicate answered
            something other than a boolean for every token.
    """
    if isinstance(positions, slice):
        return window.where(positions, origin=window.prompt_lengths)
    columns = torch.arange(window.start, window.start + window.length, device=window.device)
    if positions == "all":
        return window.real
    if positions == "prompt":
        return window.real & (columns < window.prompt)
    if positions == "generated":
        return window.real & (columns >= window.prompt)
    if window.tokens is None:
        raise ValueError(
            "steering at certain tokens needs token ids, and the model was given embeddings; give token ids, or "
            "positions as 'all', 'prompt', 'generated' or a slice"
        )
    tokens: Int[Tensor, "batch pos"] = window.tokens.to(window.device)
    if isinstance(positions, Collection):
        return window.real & torch.isin(tokens, torch.tensor(list(positions), device=window.device))
    assert callable(positions)
    answer = positions(tokens)
    if not isinstance(answer, Tensor) or answer.shape != tokens.shape or answer.dtype != torch.bool:
        got = f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else repr(answer)
        raise ValueError(f"positions(tokens) must be booleans of shape {tuple(tokens.shape)}, got {got}")
    return window.real & answer
