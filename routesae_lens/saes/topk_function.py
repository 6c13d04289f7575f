"""The TopK autoencoder that touches only k latents per token, as functions of tensors.

Encoding needs one dense product; decoding, both weight gradients and the gradient to the latents need k of
``d_sae`` columns, and reviving dead latents needs the dead ones. :func:`topk_autoencode` computes exactly that;
:func:`topk_autoencode_dense` is the same in plain torch, for tests. :func:`topk_encode` and :func:`topk_decode`
are its halves without gradients. Rows are encoded a few hundred at a time, so that pre-activations stay in the
cache and no (batch, d_sae) matrix is made. The sparse products are those of ``sparse_products.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from routesae_lens.saes.sparse_products import ByLatent, TopKCode, at, decode, slices

ROWS_AT_ONCE = {"cpu": 256, "cuda": 4096}
"""Rows encoded together: few enough for the cache (CPU) or the memory, many enough for a fast product."""
GROUP = 16
"""Latents of which only the largest competes at first, see :func:`largest`."""


class TopKOutput(NamedTuple):
    """A reconstruction and the latents it is made of."""

    out: Float[Tensor, "batch d_out"]
    values: Float[Tensor, "batch k"]
    """In units of the decoder row, without gradient."""
    indices: Int[Tensor, "batch k"]
    """Ascending in every row."""
    dead_out: Float[Tensor, "batch d_out"] | None
    """What the dead latents alone reconstruct, without ``b_dec`` (None where no ``dead`` were given)."""


def topk_autoencode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    k: int,
    *,
    relu: bool = True,
    norm: Float[Tensor, " d_sae"] | None = None,
    subtract_b_dec: bool = False,
    dead: Int[Tensor, " dead"] | None = None,
    k_dead: int = 0,
    scale: Float[Tensor, " batch"] | None = None,
) -> TopKOutput:
    """Reconstruction from the k largest pre-activations ``x @ W_enc + b_enc``.

    Under autocast the encoder's product (and those of dead latents) run in its dtype, the rest in the weights'.

    Args:
        x: what is encoded.
        W_enc, b_enc, W_dec, b_dec: as in SAELens. (A transcoder's ``d_out`` may differ from its ``d_in``.)
        k: latents kept per token.
        relu: drop negative ones among them.
        norm: choose by pre-activation times this, the decoder norms (SAELens' ``rescale_acts_by_decoder_norm``).
            The reconstruction of the chosen ones is the same.
        subtract_b_dec: encode ``x - b_dec`` (SAELens' ``apply_b_dec_to_input``).
        dead: latents to be revived: ``dead_out`` is made of the ``k_dead`` largest of them, negative ones
            included (Gao et al., 2024, appendix A.2).
        k_dead: at most ``len(dead)``.
        scale: says that ``x`` is this factor (not 0) times constants. The gradient that would go to ``x`` goes to
            the factor instead, at next to no cost: the product of a constant with an encoder column is known
            from the pre-activation.
    """
    out, values, indices, dead_out = _TopKAutoencode.apply(
        x if scale is None else x.detach(),
        scale,
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        norm,
        dead,
        k,
        k_dead,
        relu,
        subtract_b_dec,
    )
    return TopKOutput(out, values, indices, None if dead is None else dead_out)


def topk_autoencode_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    k: int,
    *,
    relu: bool = True,
    norm: Float[Tensor, " d_sae"] | None = None,
    subtract_b_dec: bool = False,
    dead: Int[Tensor, " dead"] | None = None,
    k_dead: int = 0,
) -> TopKOutput:
    """:func:`topk_autoencode` in plain dense torch."""
    pre = (x - b_dec if subtract_b_dec else x) @ W_enc + b_enc
    weighted = (pre if norm is None else pre * norm).detach()
    indices = weighted.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    values = pre.gather(-1, indices)
    values = values.relu() if relu else values
    out = torch.zeros_like(pre).scatter(-1, indices, values) @ W_dec + b_dec
    dead_out = None
    if dead is not None:
        alive = torch.ones_like(b_enc, dtype=torch.bool).index_fill(0, dead, False)
        revived = weighted.masked_fill(alive, -torch.inf).topk(k_dead, dim=-1).indices
        dead_out = torch.zeros_like(pre).scatter(-1, revived, pre.gather(-1, revived)) @ W_dec
    return TopKOutput(out, values.detach(), indices, dead_out)


@torch.no_grad()
def topk_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    relu: bool = True,
    norm: Float[Tensor, " d_sae"] | None = None,
) -> TopKCode:
    """The k largest pre-activations of each row, in units of the decoder row; ``norm`` weights the choice."""
    return _encode(x, W_enc, b_enc, norm, k, relu)[0]


@torch.no_grad()
def topk_decode(
    code: TopKCode, W_dec: Float[Tensor, "d_sae d_out"], b_dec: Float[Tensor, " d_out"]
) -> Float[Tensor, "batch d_out"]:
    """The reconstruction of :func:`topk_encode`'s code."""
    return decode(code, W_dec).add_(b_dec)


# --- Forward and backward -------------------------------------------------------------------------------


class _TopKAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        norm: Tensor | None,
        dead: Tensor | None,
        k: int,
        k_dead: int,
        relu: bool,
        subtract_b_dec: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = x - b_dec if subtract_b_dec else x
        code, pre_dead = _encode(x, W_enc, b_enc, norm, k, relu, dead)
        left_out, dead_out = None, x.new_empty(0)
        if dead is not None:
            left_out = _left_out(pre_dead, None if norm is None else norm[dead], k_dead)
            if left_out is not None:
                pre_dead.masked_fill_(left_out, 0.0)
            dead_out = product(pre_dead, W_dec[dead])
        ctx.save_for_backward(x, scale, W_enc, b_enc, W_dec, b_dec, *code, dead, pre_dead, left_out)
        ctx.relu, ctx.subtract_b_dec, ctx.dtype = relu, subtract_b_dec, autocast_dtype(x)
        ctx.mark_non_differentiable(*code, *([] if dead is not None else [dead_out]))
        return decode(code, W_dec).add_(b_dec), *code, dead_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, W_enc, b_enc, W_dec, b_dec, values, indices, dead, revived, left_out = ctx.saved_tensors
        d_sae, grad_out = len(W_dec), grads[0].contiguous()
        grad_values = at(grad_out, W_dec, indices)
        if ctx.relu:
            grad_values *= values > 0
        by_latent = ByLatent(indices, d_sae)
        grad_b_enc = grad_values.new_zeros(d_sae).index_add_(0, indices.flatten(), grad_values.flatten())
        if dead is not None:
            grad_dead_out = grads[3]
            grad_revived = product(grad_dead_out, W_dec[dead].T, ctx.dtype)
            if left_out is not None:
                grad_revived.masked_fill_(left_out, 0.0)
            grad_b_enc.index_add_(0, dead, grad_revived.sum(0))
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            rows = W_enc.T.contiguous()
            grad_x = decode(TopKCode(grad_values, indices), rows)
            if dead is not None:
                grad_x += product(grad_revived, rows[dead], ctx.dtype)
            del rows
        if scale is not None and ctx.needs_input_grad[1]:
            # scale (x / scale) @ W_enc = pre-activation - bias, and grad_x is never made
            bias = b_enc - b_dec @ W_enc if ctx.subtract_b_dec else b_enc
            grad_scale = (grad_values * (values - bias[indices])).sum(1)
            if dead is not None:
                grad_scale += (grad_revived * (revived - bias[dead])).sum(1)
            grad_scale /= scale
        grad_W_enc = by_latent.product(grad_values, x, transposed=True)
        if dead is not None:
            grad_W_enc.index_add_(1, dead, product(x.T, grad_revived, ctx.dtype))
        grad_W_dec = by_latent.product(values, grad_out)
        if dead is not None:
            grad_W_dec.index_add_(0, dead, product(revived.T, grad_dead_out, ctx.dtype))
        grad_b_dec = grad_out.sum(0)
        if ctx.subtract_b_dec:
            grad_b_dec -= W_enc @ grad_b_enc
        return grad_x, grad_scale, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, *[None] * 6


def _encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    norm: Tensor | None,
    k: int,
    relu: bool,
    dead: Tensor | None = None,
) -> tuple[TopKCode, Tensor]:
    """The code, and the pre-activations of the dead latents (token, dead)."""
    n, d_sae = len(x), W_enc.shape[1]
    code = TopKCode(x.new_empty(n, k), torch.empty(n, k, dtype=torch.int64, device=x.device))
    pre_dead = x.new_empty(n, 0 if dead is None else len(dead))
    dtype = autocast_dtype(x)
    narrow = None if dtype is None else W_enc.to(dtype)
    at_once = min(n, ROWS_AT_ONCE.get(x.device.type, n))
    pre, weighted = x.new_empty(at_once, d_sae), x.new_empty(0 if norm is None else at_once, d_sae)
    weighted_bias = None if norm is None else b_enc * norm
    for rows in slices(n, at_once):
        here = pre[: rows.stop - rows.start]
        if narrow is None:
            torch.mm(x[rows], W_enc, out=here)
        else:
            here.copy_(product(x[rows], narrow, dtype))
        if norm is None or weighted_bias is None:
            order = here.add_(b_enc)
        else:  # (in one walk through memory)
            order = torch.addcmul(weighted_bias, here, norm, out=weighted[: len(here)])
        code.indices[rows] = largest(order, k).sort(dim=-1).values
        torch.gather(here, -1, code.indices[rows], out=code.values[rows])
        if dead is not None:
            pre_dead[rows] = here.index_select(1, dead)
    if norm is not None:
        code.values.add_(b_enc[code.indices])
        if dead is not None:
            pre_dead.add_(b_enc[dead])
    if relu:
        code.values.relu_()
    return code, pre_dead


def largest(pre: Float[Tensor, "row d_sae"], k: int) -> Int[Tensor, "row k"]:
    """Places of the k largest, in no order.

    They lie in the k groups of the largest maxima: a latent of another group is topped by k maxima. So wide
    rows are searched twice, once among the maxima and once within the groups chosen.
    """
    n_groups, rest = divmod(pre.shape[1], GROUP)
    if rest or 4 * k > n_groups or pre.device.type != "cpu":
        return torch.topk(pre, k, dim=-1, sorted=False).indices
    maxima = pre.view(-1, GROUP, n_groups).amax(1)  # group j: latents j, j + n_groups, ...
    groups = torch.topk(maxima, k, dim=-1, sorted=False).indices
    members = torch.arange(0, pre.shape[1], n_groups, device=pre.device)
    candidates = (groups[:, None] + members[:, None]).flatten(1)
    chosen = torch.topk(pre.gather(1, candidates), k, dim=-1, sorted=False).indices
    return candidates.gather(1, chosen)


def _left_out(pre: Tensor, norm: Tensor | None, k: int) -> Tensor | None:
    """Where the k largest of a row (weighted by ``norm``) are not; None where all are."""
    if k == pre.shape[1]:
        return None
    kept = torch.topk(pre if norm is None else pre * norm, k, dim=-1, sorted=False).indices
    return torch.ones_like(pre, dtype=torch.bool).scatter_(-1, kept, False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    if x.dtype == torch.float64:  # which autocast leaves alone
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b`` in ``dtype`` (under autocast in its own), returned in the dtype of ``a``."""
    if dtype is None:
        return (a @ b).to(a.dtype)
    return (a.to(dtype) @ b.to(dtype)).to(a.dtype)
