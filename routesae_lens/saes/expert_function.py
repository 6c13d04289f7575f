"""A mixture of experts' TopK autoencoder that computes the selected experts only, as functions of tensors.

Latents of expert i are the block ``[i w : (i + 1) w]`` of ``d_sae = N w``. Encoding multiplies each expert's block with
the tokens that selected it, so that its cost is e / N of the dense product's; decoding and all gradients of encoder and
decoder touch k latents per token (``sparse_products.py``). Everything small, routing weights, scaling
and biases of the chosen latents, is plain torch with its own gradients. :func:`expert_autoencode_dense` is the same
with all experts computed and those that were not selected masked, for tests.

Equations are those of the Scale SAE (Xu et al. 2025, "Beyond Redundancy: Diverse and Specialized Multi-Expert Sparse
Autoencoder").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from routesae_lens.saes.sparse_products import ByLatent, TopKCode, at, decode, slices
from routesae_lens.saes.topk_function import ROWS_AT_ONCE, TopKOutput, autocast_dtype, largest, product


class ExpertChoice(NamedTuple):
    """The experts of each token."""

    probs: Float[Tensor, "*batch expert"]
    """p(x), over all experts."""
    chosen: Int[Tensor, "*batch active"]
    """The e experts of the largest p, ascending."""
    weights: Float[Tensor, "*batch expert"]
    """What the outputs of the selected experts are multiplied with; 0 for the others."""


def choose_experts(
    x: Float[Tensor, "*batch d_in"],
    W_expert: Float[Tensor, "expert d_in"],
    b_expert: Float[Tensor, " d_in"],
    active: int,
    *,
    renormalized: bool = False,
) -> ExpertChoice:
    """The ``active`` experts with the largest p = softmax(W (x - b)) (section 2.2.1).

    Args:
        x: what the SAE reads, without ``b_dec`` taken off.
        W_expert, b_expert: of the router.
        active: e, experts per token.
        renormalized: weights are a second softmax over the selected probabilities, as in the published code; else
            the probabilities themselves (Eq. 2.4).
    """
    logits = (x - b_expert) @ W_expert.T
    wide = torch.promote_types(x.dtype, torch.float32)
    probs = torch.softmax(logits, dim=-1, dtype=wide).to(x.dtype)
    chosen = probs.topk(active, dim=-1, sorted=False).indices.sort(dim=-1).values
    kept = probs.gather(-1, chosen)
    if renormalized:
        kept = torch.softmax(kept, dim=-1, dtype=wide).to(x.dtype)
    return ExpertChoice(probs, chosen, torch.zeros_like(probs).scatter(-1, chosen, kept))


# --- The scaled encoder -----------------------------------------------------------------------------------


def mean_rows(W_enc: Float[Tensor, "d_in d_sae"], n_experts: int) -> Float[Tensor, "d_in expert"]:
    """The mean encoder row of each expert."""
    return W_enc.unflatten(1, (n_experts, -1)).mean(-1)


def identity_rows(W_enc: Float[Tensor, "d_in d_sae"], n_experts: int) -> Float[Tensor, "d_in d_sae"]:
    """The rectangular identity as each expert's low-pass part (Eq. C.2): its j-th latent reads the j-th input."""
    d_in, d_sae = W_enc.shape
    return torch.eye(d_in, d_sae // n_experts, dtype=W_enc.dtype, device=W_enc.device).repeat(1, n_experts)


def scaled_encoder(
    W_enc: Float[Tensor, "d_in d_sae"],
    scale: Float[Tensor, " expert"],
    lowpass: Float[Tensor, "d_in d_sae"] | None = None,
) -> Float[Tensor, "d_in d_sae"]:
    """``lowpass + (1 + scale) (W_enc - lowpass)`` by expert (Eqs. 2.5, C.1-C.3); the low-pass part is the expert's mean
    row where none is given."""
    n_experts, width = len(scale), W_enc.shape[1] // len(scale)
    if lowpass is None:
        lowpass = mean_rows(W_enc, n_experts).repeat_interleave(width, dim=1)
    return torch.lerp(lowpass, W_enc, (1 + scale).repeat_interleave(width))


# --- The autoencoder --------------------------------------------------------------------------------------


def expert_autoencode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    choice: ExpertChoice,
    k: int,
    *,
    scale: Float[Tensor, " expert"] | None = None,
    relu: bool = True,
    norm: Float[Tensor, " d_sae"] | None = None,
    subtract_b_dec: bool = False,
    dead: Int[Tensor, " dead"] | None = None,
    k_dead: int = 0,
) -> TopKOutput:
    """Reconstruction from the k largest latents of the selected experts (Eqs. 2.3, 2.4), plus ``b_dec``.

    The choice is among pre-activations z, not among z times the expert's weight; the reconstruction, and the values
    that are returned, are made of the weighted ones. Under autocast the encoder's product runs in its dtype.

    Args:
        x: what is encoded.
        W_enc, b_enc, W_dec, b_dec: as in SAELens, expert after expert.
        choice: experts of each token, see :func:`choose_experts`.
        k: latents kept per token, at most those of the selected experts.
        scale: omega of each expert on the deviation from its mean row (Eq. 2.5). Other low-pass parts:
            :func:`scaled_encoder` beforehand.
        relu, norm, subtract_b_dec: as for ``topk_autoencode``.
        dead: latents to be revived: ``dead_out`` is made of the ``k_dead`` largest of them (weighted), negative ones
            included; those of experts that were not selected count as 0.
        k_dead: at most ``len(dead)``.
    """
    centered = x - b_dec if subtract_b_dec else x
    scaling = None if scale is None else _Scaling.of(centered, W_enc, scale)
    picked = _pick(centered, W_enc, b_enc, norm, choice, scaling, k, dead, k_dead)
    by_latent = ByLatent(picked.indices, len(b_enc))
    pre = _Gather.apply(centered, W_enc, picked.raw, picked.indices, by_latent)
    values = _weighted(pre, b_enc, picked.indices, choice, scaling, relu)
    out = _Decode.apply(values, picked.indices, W_dec, by_latent) + b_dec
    dead_out = None
    if picked.dead is not None:
        raw, indices, kept = picked.dead
        by_latent = ByLatent(indices, len(b_enc))
        pre = _Gather.apply(centered, W_enc, raw, indices, by_latent)
        revived = _weighted(pre, b_enc, indices, choice, scaling, relu=False).masked_fill(~kept, 0.0)
        dead_out = _Decode.apply(revived, indices, W_dec, by_latent)
    return TopKOutput(out, values.detach(), picked.indices, dead_out)


def expert_autoencode_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    choice: ExpertChoice,
    k: int,
    *,
    scale: Float[Tensor, " expert"] | None = None,
    relu: bool = True,
    norm: Float[Tensor, " d_sae"] | None = None,
    subtract_b_dec: bool = False,
    dead: Int[Tensor, " dead"] | None = None,
    k_dead: int = 0,
) -> TopKOutput:
    """:func:`expert_autoencode` in plain dense torch."""
    encoder = W_enc if scale is None else scaled_encoder(W_enc, scale)
    pre = (x - b_dec if subtract_b_dec else x) @ encoder + b_enc
    weighting = torch.ones_like(b_enc) if norm is None else norm
    order = (pre.detach() * weighting).masked_fill(~selected_latents(choice, len(b_enc)), -torch.inf)
    indices = order.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    weighted = pre * latent_weights(choice, len(b_enc))
    values = weighted.gather(-1, indices)
    if relu:
        values = values * (pre.gather(-1, indices) > 0)
    out = torch.zeros_like(pre).scatter(-1, indices, values) @ W_dec + b_dec
    dead_out = None
    if dead is not None:
        alive = torch.ones_like(b_enc, dtype=torch.bool).index_fill(0, dead, False)
        order = (weighted.detach() * weighting).masked_fill(alive, -torch.inf)
        revived = order.topk(k_dead, dim=-1).indices
        dead_out = torch.zeros_like(pre).scatter(-1, revived, weighted.gather(-1, revived)) @ W_dec
    return TopKOutput(out, values.detach(), indices, dead_out)


def latent_weights(choice: ExpertChoice, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
    """For each latent what its expert's output is multiplied with."""
    return choice.weights.repeat_interleave(d_sae // choice.weights.shape[-1], dim=-1)


def selected_latents(choice: ExpertChoice, d_sae: int) -> Bool[Tensor, "*batch d_sae"]:
    """Whether each latent's expert was selected. (A weight may be 0 where a probability underflows.)"""
    selected = torch.zeros_like(choice.probs, dtype=torch.bool).scatter(-1, choice.chosen, True)
    return selected.repeat_interleave(d_sae // selected.shape[-1], dim=-1)


@torch.no_grad()
def expert_encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    choice: ExpertChoice,
    k: int,
    *,
    scale: Float[Tensor, " expert"] | None = None,
    relu: bool = True,
    norm: Float[Tensor, " d_sae"] | None = None,
) -> TopKCode:
    """The latents of :func:`expert_autoencode`, in units of the decoder row; ``norm`` weights the choice."""
    scaling = None if scale is None else _Scaling.of(x, W_enc, scale)
    raw, indices, _ = _pick(x, W_enc, b_enc, norm, choice, scaling, k)
    return TopKCode(_weighted(raw, b_enc, indices, choice, scaling, relu), indices)


class _Scaling(NamedTuple):
    """A scaled pre-activation is ``gain f - shift``, f of the latent as it is (Eq. 2.5)."""

    gain: Tensor
    """(expert,): 1 + omega."""
    shift: Tensor
    """(batch, expert): omega times the product with the expert's mean row."""

    @classmethod
    def of(cls, x: Tensor, W_enc: Tensor, scale: Tensor) -> _Scaling:
        return cls(1 + scale, scale * (x @ mean_rows(W_enc, len(scale))).to(x.dtype))


def _weighted(
    raw: Tensor, b_enc: Tensor, indices: Tensor, choice: ExpertChoice, scaling: _Scaling | None, relu: bool
) -> Tensor:
    """The latents at the indices (batch, k), from products with the encoder's columns: scaled, with bias, and times the
    weight of their experts."""
    n_experts = choice.weights.shape[1]
    expert = indices // (len(b_enc) // n_experts)
    pre = raw
    if scaling is not None:
        pre = pre * scaling.gain.expand(len(raw), -1).gather(1, expert) - scaling.shift.gather(1, expert)
    pre = pre + b_enc.index_select(0, indices.flatten()).view_as(indices)
    return (pre.relu() if relu else pre) * choice.weights.gather(1, expert)


# --- Choosing ----------------------------------------------------------------------------------------------


class _Dead(NamedTuple):
    """As :class:`_Picked`."""

    raw: Tensor
    indices: Tensor
    kept: Tensor
    """(batch, places): False where a token has fewer of them."""


class _Picked(NamedTuple):
    raw: Tensor
    """(batch, k): products with the encoder's columns, without scaling and bias."""
    indices: Tensor
    """Ascending in every row."""
    dead: _Dead | None


@torch.no_grad()
def _pick(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    norm: Tensor | None,
    choice: ExpertChoice,
    scaling: _Scaling | None,
    k: int,
    dead: Tensor | None = None,
    k_dead: int = 0,
) -> _Picked:
    """The k largest pre-activations of each token's experts, and the dead latents among them that are revived."""
    (n, active), n_experts = choice.chosen.shape, choice.probs.shape[1]
    width = len(b_enc) // n_experts
    raw, indices = x.new_empty(n, k), choice.chosen.new_empty(n, k)
    revived = None
    if dead is not None:
        places = min(k_dead, active * width)
        is_dead = torch.zeros_like(b_enc, dtype=torch.bool).index_fill_(0, dead, True).view(n_experts, width)
        revived = _Dead(*(like.new_empty(n, places) for like in (raw, indices, is_dead)))
    # as many pre-activations at once as topk_function.py has
    at_once = min(n, ROWS_AT_ONCE.get(x.device.type, n) * n_experts // active)
    buffers = x.new_empty(2, at_once * active, width)
    for rows in slices(n, at_once):
        chosen = choice.chosen[rows]
        here = None if scaling is None else scaling._replace(shift=scaling.shift[rows])
        products, order, place = _by_expert(x[rows], W_enc, b_enc, norm, chosen, n_experts, here, buffers)
        order = order[place].flatten(1)
        raw[rows], indices[rows] = _found(largest(order, k).sort(dim=-1).values, products, place, chosen)
        if revived is not None and dead is not None:
            ours, weights = is_dead[chosen], choice.weights[rows].gather(1, chosen)
            order = (order.view_as(ours) * weights[..., None]).masked_fill_(~ours, -torch.inf).flatten(1)
            top = torch.topk(order, revived.raw.shape[1], dim=-1)
            revived.raw[rows], revived.indices[rows] = _found(top.indices, products, place, chosen)
            # the others' zeros come before negative ones
            zeros = len(dead) - ours.sum((1, 2))
            rank = torch.arange(revived.raw.shape[1], device=x.device) + zeros[:, None]
            revived.kept[rows] = torch.isfinite(top.values) & ((top.values >= 0) | (rank < k_dead))
    return _Picked(raw, indices, revived)


def _by_expert(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    norm: Tensor | None,
    chosen: Tensor,
    n_experts: int,
    scaling: _Scaling | None,
    buffers: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Products with the encoder and what decides the choice, both ((token active), width), expert after expert; and the
    row among them of each token's experts (token, active)."""
    (n, active), width = chosen.shape, len(b_enc) // n_experts
    flat = chosen.flatten()
    by_expert = torch.argsort(flat.int(), stable=True)
    place = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(len(flat), device=x.device))
    tokens, (raw, order) = by_expert // active, buffers[:, : n * active]
    start, dtype = 0, autocast_dtype(x)
    for expert, count in enumerate(torch.bincount(flat, minlength=n_experts).tolist()):
        here, block = slice(start, start + count), slice(expert * width, (expert + 1) * width)
        start += count
        if not count:
            continue
        ours = x if count == n else x[tokens[here]]
        if dtype is None:
            torch.mm(ours, W_enc[:, block], out=raw[here])
        else:
            raw[here] = product(ours, W_enc[:, block], dtype)
        if scaling is None:
            torch.add(raw[here], b_enc[block], out=order[here])
        else:
            torch.mul(raw[here], scaling.gain[expert], out=order[here])
            order[here] += b_enc[block]
            order[here] -= scaling.shift[tokens[here], expert, None]
        if norm is not None:
            order[here] *= norm[block]
    return raw, order, place.view(n, active)


def _found(columns: Tensor, products: Tensor, place: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Products and latents at places (token, k) among the (active width) of each token."""
    width = products.shape[1]
    slot, latent = columns // width, columns % width
    return products.view(-1)[place.gather(1, slot) * width + latent], chosen.gather(1, slot) * width + latent


# --- The two products with a gradient -------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """``raw``, which is ``x @ W_enc`` at the indices; its gradients touch these alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, raw: Tensor, indices: Tensor, by_latent: ByLatent
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, indices)
        ctx.by_latent = by_latent
        return raw.view_as(raw)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, indices = ctx.saved_tensors
        grad_x = grad_W_enc = None
        if ctx.needs_input_grad[0]:
            grad_x = decode(TopKCode(grad, indices), W_enc.T.contiguous())
        if ctx.needs_input_grad[1]:
            grad_W_enc = ctx.by_latent.product(grad, x, transposed=True)
        return grad_x, grad_W_enc, None, None, None


class _Decode(torch.autograd.Function):
    """The sum of the decoder rows at the indices, times the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, by_latent: ByLatent) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        ctx.by_latent = by_latent
        return decode(TopKCode(values, indices), W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            grad_values = at(grad, W_dec, indices)
        if ctx.needs_input_grad[2]:
            grad_W_dec = ctx.by_latent.product(values, grad)
        return grad_values, None, grad_W_dec, None
