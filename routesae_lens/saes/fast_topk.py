"""The TopK autoencoder that touches only k latents per token.

Encoding needs one dense product; decoding, both weight gradients and the gradient to the latents need k of
``d_sae`` columns. :func:`topk_autoencode` computes exactly that; :func:`topk_autoencode_dense` is the same in
plain torch, for tests and for what the fast one does not take. :class:`FastTopK` brings it into a SAELens
training SAE.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from torch.nn.functional import embedding_bag

with warnings.catch_warnings():  # torch says once per process that sparse CSR tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1)
    )


class TopKCode(NamedTuple):
    """A reconstruction and the latents it is made of."""

    out: Float[Tensor, "batch d_in"]
    values: Float[Tensor, "batch k"]
    """In units of the decoder row, without gradient."""
    indices: Int[Tensor, "batch k"]
    """Ascending in every row."""


def topk_autoencode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    *,
    relu: bool = True,
    weight_by_norm: bool = False,
    subtract_b_dec: bool = False,
) -> TopKCode:
    """Reconstruction from the k largest pre-activations ``x @ W_enc + b_enc``.

    Args:
        x: what is encoded.
        W_enc, b_enc, W_dec, b_dec: as in SAELens.
        k: latents kept per token.
        relu: drop negative ones among them.
        weight_by_norm: choose by pre-activation times decoder norm (SAELens' ``rescale_acts_by_decoder_norm``).
            The reconstruction of the chosen ones is the same.
        subtract_b_dec: encode ``x - b_dec`` (SAELens' ``apply_b_dec_to_input``).
    """
    centered = x - b_dec if subtract_b_dec else x
    norm = W_dec.detach().norm(dim=-1) if weight_by_norm else None
    return TopKCode(*_TopKAutoencode.apply(centered, W_enc, b_enc, W_dec, b_dec, norm, k, relu))


def topk_autoencode_dense(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    k: int,
    *,
    relu: bool = True,
    weight_by_norm: bool = False,
    subtract_b_dec: bool = False,
) -> TopKCode:
    """:func:`topk_autoencode` in plain dense torch."""
    pre = (x - b_dec if subtract_b_dec else x) @ W_enc + b_enc
    indices = _choose(pre, W_dec.norm(dim=-1) if weight_by_norm else None, k)
    values = pre.gather(-1, indices)
    values = values.relu() if relu else values
    acts = torch.zeros_like(pre).scatter(-1, indices, values)
    return TopKCode(acts @ W_dec + b_dec, values.detach(), indices)


def _choose(pre: Tensor, norm: Tensor | None, k: int) -> Tensor:
    top: Tensor = torch.topk(pre if norm is None else pre * norm, k, dim=-1, sorted=False).indices
    return top.sort(dim=-1).values


class _TopKAutoencode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        norm: Tensor | None,
        k: int,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre = torch.addmm(b_enc, x, W_enc)
        indices = _choose(pre, norm, k)
        values = pre.gather(-1, indices)
        if relu:
            values = values.relu()
        ctx.save_for_backward(x, W_enc, W_dec, values, indices)
        ctx.relu = relu
        ctx.mark_non_differentiable(values, indices)
        return embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec, values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, W_dec, values, indices = ctx.saved_tensors
        d_sae = len(W_dec)
        grad_out = grads[0].contiguous()
        # the gradient to the k latents: rows of grad_out times rows of W_dec, at the chosen places only
        places = torch.sparse_csr_tensor(
            _row_starts(indices),
            indices.flatten(),
            values.flatten(),
            (len(x), d_sae),
            check_invariants=False,
        )
        product = torch.sparse.sampled_addmm(places, grad_out, W_dec.T, beta=0.0)
        grad_values = product.values().reshape(indices.shape)
        if ctx.relu:
            grad_values = grad_values * (values > 0)
        by_latent = _Transposed(indices, d_sae)
        grad_x = None
        if ctx.needs_input_grad[0]:
            rows = W_enc.T.contiguous()
            grad_x = embedding_bag(indices, rows, per_sample_weights=grad_values, mode="sum")
        grad_b_enc = grad_values.new_zeros(d_sae).index_add_(0, indices.flatten(), grad_values.flatten())
        return (
            grad_x,
            by_latent.product(grad_values, x).T,
            grad_b_enc,
            by_latent.product(values, grad_out),
            grad_out.sum(0),
            None,
            None,
            None,
        )


def _row_starts(indices: Tensor) -> Tensor:
    n, k = indices.shape
    return torch.arange(0, n * k + 1, k, device=indices.device)


class _Transposed:
    """The chosen places seen from the latents: for each latent its tokens."""

    def __init__(self, indices: Int[Tensor, "batch k"], d_sae: int):
        flat = indices.flatten()
        self.order = torch.argsort(flat, stable=True)
        self.tokens = self.order // indices.shape[1]
        counts = torch.bincount(flat, minlength=d_sae)
        self.starts = counts.cumsum(0) - counts

    def product(self, weights: Float[Tensor, "batch k"], x: Float[Tensor, "batch d"]) -> Tensor:
        """``A.T @ x``, A the (batch, d_sae) matrix that holds ``weights`` at the chosen places."""
        return embedding_bag(
            self.tokens, x, self.starts, per_sample_weights=weights.flatten()[self.order], mode="sum"
        )


class FastTopK(TrainingSAE[Any]):
    """Mixin in front of SAELens' ``TopKTrainingSAE``: its training step through :func:`topk_autoencode`.

    It steps aside where only SAELens' own computation is right: with dead latents to be revived by the
    auxiliary loss, with hooks on the SAE, under autocast or ``torch.compile``, and for now on other
    devices than the CPU.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self._fast(step_input):
            return super().training_forward_pass(step_input)
        x = step_input.sae_in
        code = self._autoencode(x.flatten(0, -2))
        sae_out = code.out.reshape(x.shape)
        none_dead = (
            {"auxiliary_reconstruction_loss": x.new_zeros(())} if self.cfg.aux_loss_coefficient else {}
        )
        mse_loss = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
        values = code.values
        if self.cfg.rescale_acts_by_decoder_norm:  # SAELens measures latents in units of the decoder norm
            values = values * self.W_dec.detach().norm(dim=-1)[code.indices]
        token = torch.arange(len(values), device=x.device).repeat_interleave(values.shape[1])
        acts = torch.sparse_coo_tensor(
            torch.stack([token, code.indices.flatten()]),
            values.flatten(),
            (len(values), self.cfg.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=acts,
            hidden_pre=values,  # the chosen ones; nothing but the auxiliary loss reads the others
            loss=mse_loss,
            losses={"mse_loss": mse_loss} | none_dead,
        )

    def _autoencode(self, x: Float[Tensor, "batch d_in"]) -> TopKCode:
        return topk_autoencode(
            x,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            int(self.cfg.k),
            relu=getattr(self.cfg, "relu", True),
            weight_by_norm=self.cfg.rescale_acts_by_decoder_norm,
            subtract_b_dec=self.cfg.apply_b_dec_to_input,
        )

    @torch.no_grad()
    def fast_autoencode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Encode and decode without gradient and without firing hooks."""
        return self._autoencode(x.flatten(0, -2)).out.reshape(x.shape)

    def _fast(self, step_input: TrainStepInput) -> bool:
        dead = step_input.dead_neuron_mask
        hooks = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post, self.hook_sae_recons)
        return (
            (self.cfg.aux_loss_coefficient == 0 or dead is None or not bool(dead.any()))
            and self._computable()
            and not any(
                hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks for hook in hooks
            )
        )

    def _computable(self) -> bool:
        return (
            self.W_enc.device.type == "cpu"
            and self.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and self.cfg.normalize_activations in ("none", "expected_average_only_in")
            and self.cfg.reshape_activations == "none"
        )
