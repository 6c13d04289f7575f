"""Triton kernels for the products of ``sparse_products.py``; imported only for tensors on CUDA.

Not run on a GPU yet: tested in triton's interpreter (``TRITON_INTERPRET=1``) against the torch forms.
Products are summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 512
"""Columns that one program works on."""


def decode(
    values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"], W_dec: Float[Tensor, "d_sae d"]
) -> Float[Tensor, "batch d"]:
    """For each token the sum of its rows of ``W_dec`` times its values."""
    (n, k), d = indices.shape, W_dec.shape[1]
    starts = torch.arange(0, n * k + 1, k, device=W_dec.device)
    out = W_dec.new_empty(n, d)
    return _weighted_sums(values.contiguous(), indices.contiguous(), starts, W_dec.contiguous(), out)


def by_latent(
    weights: Float[Tensor, " places"],
    tokens: Int[Tensor, " places"],
    starts: Int[Tensor, " ends"],
    x: Float[Tensor, "batch d"],
) -> Float[Tensor, "d_sae d"]:
    """For each latent the sum of its tokens' rows of ``x`` times their weights.

    Args:
        weights, tokens: latent after latent.
        starts: where each latent's begin, and the end (d_sae + 1 numbers).
        x: what is summed.
    """
    out = x.new_empty(len(starts) - 1, x.shape[1])
    return _weighted_sums(weights, tokens, starts, x.contiguous(), out)


def sampled(
    x: Float[Tensor, "batch d"], W_dec: Float[Tensor, "d_sae d"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """``x @ W_dec.T`` at the indices only."""
    result = x.new_empty(indices.shape)
    _sampled[(indices.numel(),)](
        x.contiguous(), W_dec.contiguous(), indices.contiguous(), result, indices.shape[1], x.shape[1], BLOCK
    )
    return result


def check(device: torch.device) -> None:
    """Raise an AssertionError where the kernels are wrong on a small example, or whatever stops them running."""
    x, W_dec = torch.rand(3, 700, device=device), torch.rand(5, 700, device=device)
    values, indices = torch.rand(3, 2, device=device), torch.tensor([[0, 4], [1, 4], [3, 4]], device=device)
    code = torch.zeros(3, 5, device=device).scatter(1, indices, values)
    weights, tokens = code.T[code.T > 0], (code.T > 0).nonzero()[:, 1]
    starts = torch.tensor([0, 1, 2, 2, 3, 6], device=device)
    torch.testing.assert_close(decode(values, indices, W_dec), code @ W_dec)
    torch.testing.assert_close(sampled(x, W_dec, indices), (x @ W_dec.T).gather(1, indices))
    torch.testing.assert_close(by_latent(weights, tokens, starts, x), code.T @ x)


def _weighted_sums(weights: Tensor, rows: Tensor, starts: Tensor, x: Tensor, out: Tensor) -> Tensor:
    n_sums, d = out.shape
    # (the long dimension of a grid is the first)
    _sum_rows[(n_sums, triton.cdiv(d, BLOCK))](weights, rows, starts, x, out, d, BLOCK)
    return out


@triton.jit
def _sum_rows(weights, rows, starts, x, result, d, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in range(tl.load(starts + group), tl.load(starts + group + 1)):
        row = tl.load(rows + place).to(tl.int64)
        total += tl.load(weights + place) * tl.load(x + row * d + columns, mask=inside, other=0.0)
    tl.store(result + group * d + columns, total, mask=inside)


@triton.jit
def _sampled(x, W_dec, indices, result, k, d, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    token = place // k
    latent = tl.load(indices + place).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, d, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < d
        ours = tl.load(x + token * d + columns, mask=inside, other=0.0)
        total += ours * tl.load(W_dec + latent * d + columns, mask=inside, other=0.0)
    tl.store(result + place, tl.sum(total, axis=0))
