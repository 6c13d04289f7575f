"""Products with a code: a (batch, d_sae) matrix A that holds k values in each row.

On the CPU all is plain torch. On CUDA they run through ``topk_triton.py`` where triton is installed and agrees with
torch on a small example, and through torch otherwise. Neither has been run on a GPU yet: the kernels are tested in
triton's interpreter, the torch forms for CUDA on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from routesae_lens.saes import recycled

with warnings.catch_warnings():  # torch says once per process that sparse CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1)
    )


class TopKCode(NamedTuple):
    """The latents that a TopK SAE keeps of each token."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]
    """Ascending in every row."""


def slices(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, max(step, 1)):
        yield slice(start, min(start + step, n))


def decode(code: TopKCode, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """``A @ W_dec``, A the matrix that holds the values at the indices."""
    if kernels := kernels_for(W_dec):
        return kernels.decode(code.values, code.indices, W_dec)
    return embedding_bag(code.indices, W_dec.detach(), per_sample_weights=code.values, mode="sum")


def at(
    x: Float[Tensor, "batch d_out"], W_dec: Float[Tensor, "d_sae d_out"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """``x @ W_dec.T`` at the indices only."""
    if kernels := kernels_for(W_dec):
        return kernels.sampled(x, W_dec, indices)
    if x.device.type != "cpu":
        return _at_gathered(x, W_dec, indices)
    n, k = indices.shape
    starts = torch.arange(0, n * k + 1, k)
    places = torch.sparse_csr_tensor(
        starts, indices.flatten(), x.new_zeros(n * k), (n, len(W_dec)), check_invariants=False
    )
    product = torch.sparse.sampled_addmm(places, x, W_dec.T, beta=0.0)
    return product.values().reshape(n, k)


def _at_gathered(x: Tensor, W_dec: Tensor, indices: Tensor, elements: int = 2**26) -> Tensor:
    """:func:`at` for devices without the sampled product: gathers at most ``elements`` numbers at a time."""
    result = x.new_empty(indices.shape)
    for rows in slices(len(x), max(1, elements // (indices.shape[1] * x.shape[1]))):
        result[rows] = torch.bmm(W_dec[indices[rows]], x[rows, :, None]).squeeze(-1)
    return result


class ByLatent:
    """The code seen from the latents: for each latent its tokens."""

    def __init__(self, indices: Int[Tensor, "batch k"], d_sae: int):
        flat = indices.flatten()
        self.order = torch.argsort(flat.int(), stable=True)
        self.tokens = self.order // indices.shape[1]
        counts = torch.bincount(flat, minlength=d_sae)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def product(
        self, weights: Float[Tensor, "batch k"], x: Float[Tensor, "batch d"], *, transposed: bool = False
    ) -> Tensor:
        """``A.T @ x`` (d_sae, d) or its transpose, A the (batch, d_sae) matrix of ``weights`` at the indices."""
        weights = weights.flatten()[self.order]
        if kernels := kernels_for(x):
            rows: Tensor = kernels.by_latent(weights, self.tokens, self.starts, x)
            return rows.T.contiguous() if transposed else rows
        d, d_sae = x.shape[1], len(self.starts) - 1
        result = recycled.empty(x, *((d, d_sae) if transposed else (d_sae, d)))
        # A part stays in the cache; were its rows a power of two apart, its columns would push each other out.
        x = torch.nn.functional.pad(x.detach(), (0, 16)) if transposed and d % 256 == 0 else x
        for latents in slices(d_sae, max(1, 2**18 // d) if x.device.type == "cpu" else d_sae):
            sums = self._sums(weights, x, latents)[:, :d]
            if transposed:
                result[:, latents] = sums.T
            else:
                result[latents] = sums
        return result

    def _sums(self, weights: Tensor, x: Tensor, latents: slice) -> Tensor:
        starts = self.starts[latents.start : latents.stop + 1]
        places = slice(int(starts[0]), int(starts[-1]))
        return embedding_bag(
            self.tokens[places],
            x.detach(),
            starts - starts[0],
            per_sample_weights=weights[places],
            mode="sum",
            include_last_offset=True,
        )


def kernels_for(x: Tensor) -> Any:
    """The module of triton kernels for this tensor, or None: then torch does it."""
    return _triton(x.device) if x.is_cuda and x.dtype == torch.float32 else None


@functools.cache
def _triton(device: torch.device) -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from routesae_lens.saes import topk_triton

        topk_triton.check(device)
    except Exception as error:  # a compiler, a driver: the torch forms need neither
        warnings.warn(f"triton does not work on {device}, torch is used instead: {error}", stacklevel=2)
        return None
    return topk_triton
