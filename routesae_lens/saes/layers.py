"""The layers of a stack, each token's activation standardised per layer (RouteSAE, appendix C)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

EPS = 1e-6
"""Added to the standard deviation, as in the authors' code."""

NUMBERS_AT_ONCE = 2**18
"""Standardised together: few enough to stay in the cache."""


class Standardized(NamedTuple):
    x: Float[Tensor, "*batch d_model"]
    mean: Float[Tensor, "*batch 1"]
    std: Float[Tensor, "*batch 1"]
    """Already with :data:`EPS` added: ``x * std + mean`` is the original."""


def standardize(x: Float[Tensor, "*batch d_model"], *, overwrite: bool = False) -> Standardized:
    """Per token (and layer): subtract the mean, divide by the unbiased standard deviation + 1e-6.

    Statistics are computed in at least float32; the result has the dtype of ``x``.

    Args:
        overwrite: the memory of ``x`` may be used for the result.
    """
    if not (x.requires_grad or torch.compiler.is_compiling()):
        return _standardize_in_parts(x, overwrite)
    wide = _wide(x)
    mean = wide.mean(-1, keepdim=True)
    centered = wide - mean
    # (the norm rather than torch.std: its gradient at a constant activation is 0, not NaN)
    norm = torch.linalg.vector_norm(centered, dim=-1, keepdim=True)
    std = norm / (x.shape[-1] - 1) ** 0.5 + EPS
    return Standardized((centered / std).to(x.dtype), mean.to(x.dtype), std.to(x.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Part(NamedTuple):
    """Some rows of a tensor, standardised in at least float32."""

    rows: slice
    x: Tensor
    """Overwritten by the next part (unless it was to be written elsewhere)."""
    mean: Tensor
    std: Tensor


def _parts(x: Float[Tensor, "row *inner d_model"], into: Tensor | None = None) -> Iterator[_Part]:
    """The rows of ``x`` standardised without gradients, a few at a time, in ``into`` or in memory that is used again.

    Memory new to the process costs several times as much as the arithmetic done in it.
    """
    at_once = max(1, NUMBERS_AT_ONCE // max(1, x[:1].numel()))
    memory = torch.empty_like(_wide(x[:at_once])) if into is None else into
    for start in range(0, len(x), at_once):
        rows = slice(start, min(start + at_once, len(x)))
        wide = _wide(x[rows])
        mean = wide.mean(-1, keepdim=True)
        out = memory[: len(wide)] if into is None else memory[rows]
        centered = torch.sub(wide, mean, out=out)
        std = torch.linalg.vector_norm(centered, dim=-1, keepdim=True) / (x.shape[-1] - 1) ** 0.5 + EPS
        yield _Part(rows, centered.div_(std), mean, std)


@torch.no_grad()
def _standardize_in_parts(x: Tensor, overwrite: bool) -> Standardized:
    flat = x.reshape(-1, x.shape[-1])
    wide = flat.dtype == torch.promote_types(flat.dtype, torch.float32)  # else results must be narrowed
    made = flat if overwrite and wide else torch.empty_like(flat)
    result = Standardized(made, flat.new_empty(len(flat), 1), flat.new_empty(len(flat), 1))
    for part in _parts(flat, made if wide else None):
        if not wide:
            made[part.rows] = part.x
        result.mean[part.rows], result.std[part.rows] = part.mean, part.std
    x_, mean, std = (to.view(*x.shape[:-1], to.shape[-1]) for to in result)
    return Standardized(x_, mean, std)


class Layers:
    """The layers of a stack as an SAE reads them, computed where they are asked for.

    Most routers need the sum over layers and one layer per token: for these the standardised layers (the
    largest tensors of a training step) are never held at once. Gradients flow through all of it.

    Args:
        raw: activations of the layers.
        standardized: whether they are read standardised.
    """

    def __init__(self, raw: Float[Tensor, "*batch layer d_model"], *, standardized: bool):
        self.raw, self.standardized = raw, standardized
        self.shape = raw.shape
        # (plain attributes: torch.compile cannot trace functools.cached_property)
        self._made: list[tuple[Tensor, int]] = []
        self._x: Tensor | None = None if standardized else self._given_out(raw)
        self._total: Tensor | None = None

    @classmethod
    def of(cls, x: Layers | Float[Tensor, "*batch layer d_model"]) -> Layers:
        """``x``, or a tensor of layers that are read as they are."""
        return x if isinstance(x, Layers) else cls(x, standardized=False)

    def _given_out(self, made: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # (what is made there is not kept)
            self._made.append((made, -1 if made.is_inference() else made._version))
        return made

    @property
    def edited(self) -> bool:
        """Whether something they gave out was edited in place, or made in inference mode: of no use elsewhere."""
        return any(made.is_inference() or made._version != version for made, version in self._made)

    def __getitem__(self, tokens: slice) -> Layers:
        """The same of some tokens (along the first dimension)."""
        return Layers(self.raw[tokens], standardized=self.standardized)

    @property
    def x(self) -> Float[Tensor, "*batch layer d_model"]:
        """All of them."""
        if self._x is None:
            self._x = self._given_out(standardize(self.raw).x)
        return self._x

    def layer(self, index: int) -> Float[Tensor, "*batch d_model"]:
        """One layer of every token."""
        return standardize(self.raw[..., index, :]).x if self._x is None else self._x[..., index, :]

    @property
    def total(self) -> Float[Tensor, "*batch d_model"]:
        """Their sum."""
        if self._total is None:
            self._total = self._given_out(self._sum())
        return self._total

    def _sum(self) -> Tensor:
        if self._x is not None or self.raw.requires_grad or torch.compiler.is_compiling():
            return reduce(self.x, "... layer d_model -> ... d_model", "sum")
        flat = self.raw.reshape(-1, *self.shape[-2:])
        total = flat.new_empty(len(flat), self.shape[-1])
        with torch.no_grad():
            for part in _parts(flat):
                total[part.rows] = part.x.to(total.dtype).sum(1)
        return total.view(*self.shape[:-2], self.shape[-1])

    def read(self, layer: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """The layer that is given for each token, as an index into the layers."""
        index = layer[..., None, None].expand(*layer.shape, 1, self.shape[-1])
        if self._x is not None:
            return self._x.gather(-2, index).squeeze(-2)
        return standardize(self.raw.gather(-2, index).squeeze(-2), overwrite=True).x
