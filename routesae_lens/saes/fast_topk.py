"""The functions of ``topk_function.py`` for SAEs: SAELens' training step, and encoding and decoding.

:class:`FastTopK` brings the step that touches only k latents per token into a SAELens training SAE.
:func:`encode_topk` and :func:`decode_topk` are what a TopK SAE computes without gradients;
:func:`encode_fast` and :func:`decode_fast` take them where they apply, for any SAE.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TopKSAE, TopKTrainingSAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from torch import Tensor

from routesae_lens.saes.signed_topk import SignedTopK
from routesae_lens.saes.sparse_products import TopKCode
from routesae_lens.saes.topk_function import TopKOutput, topk_autoencode, topk_decode, topk_encode

DEVICES = ("cpu", "cuda")
FEW = 1 / 4
"""Share of the latents up to which the sparse step pays: from there on the dense one is as fast (measured on a CPU)
and holds less, 25 numbers for every kept latent against 8 for every latent."""


def is_fast(sae: Any) -> bool:
    """Whether the sparse form is right for ``sae`` here and now.

    It is not for SAEs without TopK (SAELens' BatchTopK and AbsTopK are subclasses of it that choose otherwise), with
    hooks (which see dense latents), with bfloat16 weights, with SAELens'
    run-time normalisations, under ``torch.compile``, and on devices other than CPU and CUDA.
    """
    return (
        isinstance(sae, TopKSAE | TopKTrainingSAE)
        and type(sae.activation_fn) in (TopK, SignedTopK)
        and not torch.compiler.is_compiling()
        and sae.W_enc.device.type in DEVICES
        and sae.W_enc.dtype in (torch.float32, torch.float64)
        and sae.cfg.normalize_activations in ("none", "expected_average_only_in")
        and sae.cfg.reshape_activations == "none"
        and not _hooked(sae)
    )


def _hooked(sae: SAE[Any]) -> bool:
    points = (sae.hook_sae_input, sae.hook_sae_acts_pre, sae.hook_sae_acts_post, sae.hook_sae_recons)
    return any(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks for point in points)


class OwnSparseCode(SAE[Any]):
    """A TopK SAE that has a sparse form of its own for :func:`encode_topk`."""

    def sparse_code(self, x: Float[Tensor, "batch d_in"], norm: Float[Tensor, " d_sae"] | None) -> TopKCode:
        """The latents kept of ``x`` (in the SAE's dtype), in units of the decoder row; ``norm`` weights the choice."""
        raise NotImplementedError


def encode_topk(sae: SAE[Any], x: Float[Tensor, "batch d_in"]) -> TopKCode:
    """The latents that a TopK SAE keeps, without gradients; ask :func:`is_fast` first.

    Args:
        sae: a TopK SAE, of this package or SAELens' own.
        x: what its encoder reads: ``Route.input`` of a RouteSAE, the standardised stack of a Crosscoder.

    Returns:
        Values in units of ``sae.encode`` and indices; zeros among them are latents that ReLU cut off.
    """
    norm = _norm(sae)
    x = x.to(sae.dtype)
    if isinstance(sae, OwnSparseCode):
        code = sae.sparse_code(x, norm)
    else:
        centered = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
        code = topk_encode(centered, sae.W_enc, sae.b_enc, latents_kept(sae), relu=has_relu(sae), norm=norm)
    return code if norm is None else code._replace(values=code.values * norm[code.indices])


def decode_topk(sae: SAE[Any], code: TopKCode) -> Float[Tensor, "batch d_in"]:
    """What ``sae.decode`` makes of the latents of :func:`encode_topk`."""
    norm = _norm(sae)
    if norm is not None:
        code = code._replace(values=code.values / norm[code.indices])
    return topk_decode(code, sae.W_dec, sae.b_dec)


def latents_kept(sae: Any) -> int:
    """Latents per token now: the activation function's, which K-annealing changes from step to step."""
    return int(sae.activation_fn.k)


def has_relu(sae: Any) -> bool:
    """(not from the config: that of a layer's view is SAELens' own, which has no such field)"""
    return not isinstance(sae.activation_fn, SignedTopK)


def _norm(sae: SAE[Any]) -> Tensor | None:
    return sae.W_dec.detach().norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else None


def encode_fast(
    sae: Any, x: Float[Tensor, "*batch d_in"], encode: Callable[[Tensor], Tensor]
) -> TopKCode | Float[Tensor, "*batch d_sae"]:
    """The latents of ``x`` by :func:`encode_topk` where that is right and no gradients are wanted, or ``encode(x)``.

    The sparse form has one batch dimension.
    """
    if torch.is_grad_enabled() or not is_fast(sae):
        return encode(x)
    return encode_topk(sae, x.flatten(0, -2))


def decode_fast(sae: Any, code: TopKCode | Tensor) -> Tensor:
    """What ``sae.decode`` makes of what :func:`encode_fast` gave."""
    return decode_topk(sae, code) if isinstance(code, TopKCode) else sae.decode(code)


class Latents(NamedTuple):
    """The latents of a batch that are not zero, token after token."""

    token: Int[Tensor, " active"]
    latent: Int[Tensor, " active"]
    """Ascending within a token."""
    value: Float[Tensor, " active"]

    @classmethod
    def of(cls, code: TopKCode | Float[Tensor, "token d_sae"]) -> Latents:
        """Those of a dense tensor, or of what :func:`encode_fast` gave."""
        dense = code.values if isinstance(code, TopKCode) else code
        if isinstance(code, TopKCode) and dense.all():  # as nearly always
            token = torch.arange(len(dense), device=dense.device).repeat_interleave(dense.shape[1])
            return cls(token, code.indices.flatten(), dense.flatten())
        token, place = dense.nonzero(as_tuple=True)
        latent = code.indices[token, place] if isinstance(code, TopKCode) else place
        return cls(token, latent, dense[token, place])


@dataclass
class ScaledStepInput(TrainStepInput):
    """A step input whose ``sae_in`` is ``scale`` times constants: a routed activation times its probability."""

    scale: Float[Tensor, "*batch"] | None = None


class FastTopK(TrainingSAE[Any]):
    """Mixin in front of SAELens' ``TopKTrainingSAE``: its training step through :func:`topk_autoencode`.

    SAEs of a stack stand before it in a list of bases, with their own losses. It steps aside where
    :func:`is_fast` says so, and while more than :data:`FEW` of the latents are kept. Under autocast it works,
    with only the dense products in the narrow dtype.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not is_fast(self) or latents_kept(self) > FEW * self.cfg.d_sae:
            return super().training_forward_pass(step_input)
        x = step_input.sae_in.flatten(0, -2).to(self.dtype)
        dead = None
        if self.cfg.aux_loss_coefficient and step_input.dead_neuron_mask is not None:
            dead = step_input.dead_neuron_mask.nonzero().flatten()
            dead = dead if len(dead) else None
        scale = getattr(step_input, "scale", None)
        scale = None if scale is None else scale.flatten()
        norm = _norm(self)
        code = self._autoencode(x, dead, scale, norm)
        losses = {"mse_loss": self._mean_error(code.out, x, scale)}
        if self.cfg.aux_loss_coefficient:
            losses["auxiliary_reconstruction_loss"] = self._revival_loss(x, code, dead)
        values = code.values
        if norm is not None:  # SAELens measures latents in units of the decoder norm
            values = values * norm[code.indices]
        token = torch.arange(len(values), device=x.device).repeat_interleave(values.shape[1])
        acts = torch.sparse_coo_tensor(
            torch.stack([token, code.indices.flatten()]),
            values.flatten(),
            (len(values), self.cfg.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=code.out.reshape(step_input.sae_in.shape),
            feature_acts=acts,
            hidden_pre=values,  # the chosen ones; nothing but the auxiliary loss reads the others
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def _mean_error(
        self, preds: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"], scale: Tensor | None
    ) -> Float[Tensor, ""]:
        """The reconstruction loss; SAEs of a stack have a faster form of theirs.

        Args:
            scale: says that ``x`` is this factor times constants, as :class:`ScaledStepInput` does.
        """
        return self.mse_loss_fn(preds, x).sum(dim=-1).mean()

    def _autoencode(
        self,
        x: Float[Tensor, "batch d_in"],
        dead: Tensor | None,
        scale: Float[Tensor, " batch"] | None,
        norm: Float[Tensor, " d_sae"] | None,
    ) -> TopKOutput:
        return topk_autoencode(
            x,
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            latents_kept(self),
            relu=has_relu(self),
            norm=norm,
            subtract_b_dec=self.cfg.apply_b_dec_to_input,
            dead=dead,
            k_dead=0 if dead is None else min(self._most_revived, len(dead)),
            scale=scale,
        )

    @property
    def _most_revived(self) -> int:
        """Dead latents of a token that the auxiliary loss revives: SAELens' half of the input's size."""
        return int(self.W_dec.shape[1]) // 2

    def _input_norm(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """What the auxiliary loss is measured in; SAELens' own is not normalised."""
        return torch.ones_like(x[..., :1])

    def _revival_loss(
        self, x: Float[Tensor, "batch d_in"], code: TopKOutput, dead: Tensor | None
    ) -> Float[Tensor, ""]:
        """SAELens' auxiliary loss: dead latents reconstruct what the others leave, here on the scale of the loss.

        Equal to ``TopKTrainingSAE.calculate_topk_aux_loss``, for SAEs of a stack as
        ``StackTrainingSAE.calculate_aux_loss`` calls it.
        """
        if dead is None or code.dead_out is None:
            return x.new_zeros(())
        norm = self._input_norm(x)
        residual = ((x - code.out) / norm).detach()
        scale = min(len(dead) / self._most_revived, 1.0)
        error = (code.dead_out / norm - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * scale * error
