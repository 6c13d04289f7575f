"""The squared error of a reconstruction, token by token, as one function with a gradient of its own.

Written with torch's operators it makes a dozen matrices of the batch's size; memory new to the process costs several
times as much as the arithmetic done in it. Here one is made, the gradient that the reconstruction gets (and another for
a target that has its own).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from routesae_lens.saes.sparse_products import slices

SMALLEST = 1e-12
"""What ||target||^2 counts as at least."""
NUMBERS_AT_ONCE = 2**18
"""Of the difference: few enough to stay in the cache."""


def row_error(
    preds: Float[Tensor, "batch d"],
    target: Float[Tensor, "batch d"],
    scale: Float[Tensor, " batch"] | None = None,
    *,
    normalized: bool,
) -> Float[Tensor, " batch"]:
    """||preds - target||^2 of every token, or that divided by ||target||^2.

    Args:
        preds: the reconstruction.
        target: what it is compared with; it has a gradient, too.
        scale: says that ``target`` is this factor (not 0) times constants, and gets the gradient instead of it.
        normalized: divide by ||target||^2 (at least :data:`SMALLEST`).
    """
    rows: Tensor = _RowError.apply(preds, target if scale is None else target.detach(), scale, normalized)
    return rows


def _parts(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, with memory of their size that is used again."""
    at_once = max(1, NUMBERS_AT_ONCE // x.shape[1])
    scratch = torch.empty_like(x[:at_once])
    for rows in slices(len(x), at_once):
        yield rows, scratch[: rows.stop - rows.start]


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()


class _RowError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, preds: Tensor, target: Tensor, scale: Tensor | None, normalized: bool) -> Tensor:
        error = preds.new_empty(len(preds))
        for rows, scratch in _parts(preds):
            error[rows] = _squared_norm(torch.sub(preds[rows], target[rows], out=scratch))
        size = _squared_norm(target) if normalized else None
        ctx.save_for_backward(preds, target, scale, error, size)
        return error if size is None else error / size.clamp_min(SMALLEST)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        preds, target, scale, error, size = ctx.saved_tensors
        weight = 2 * grad
        through_size = None  # the gradient to ||target||^2, times 2
        if size is not None:
            weight = weight / size.clamp_min(SMALLEST)
            through_size = -weight * error / size.clamp_min(SMALLEST) * (size > SMALLEST)
        grad_preds = torch.sub(preds, target).mul_(weight[:, None])
        grad_target = grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_target = -grad_preds
            if through_size is not None:
                grad_target.addcmul_(through_size[:, None], target)
        if scale is not None and ctx.needs_input_grad[2]:
            grad_scale = grad.new_empty(len(grad))
            for rows, scratch in _parts(preds):
                grad_scale[rows] = -torch.mul(grad_preds[rows], target[rows], out=scratch).sum(-1)
            if through_size is not None and size is not None:
                grad_scale += through_size * size
            grad_scale /= scale
        return grad_preds, grad_target, grad_scale, None
