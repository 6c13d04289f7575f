"""Crosscoder: one dictionary that reads and writes all layers at once (Lindsey et al., 2024).

A Crosscoder is the SAELens SAE it inherits from, on the multi-layer hook point and in the *standardised*
stack: each token's activation is standardised per layer (``StackSAE.split``), then all layers are encoded
into one latent vector and decoded side by side. The weights have SAELens' natural sizes, ``W_enc``
``(layer d_model, d_sae)`` and ``W_dec`` ``(d_sae, layer d_model)``: the encoder of the stack is the sum of one
encoder per layer, and each slice of a decoder row is that latent's direction in one layer. The norms of
those slices say in which layers a latent lives (:meth:`Crosscoded.decoder_norms`).

``crosscoder_topk``, ``crosscoder_batchtopk`` and ``crosscoder_standard`` train through SAELens' stock
runners and come back with ``SAE.load_from_disk`` (BatchTopK as ``crosscoder_jumprelu``, as SAELens does).

SAELens' initialisation holds unchanged: a decoder row gets the norm ``decoder_init_norm`` over all layers
together (``decoder_init_norm / sqrt(layers)`` in each, about), and the encoder is the decoder's transpose. (For
``init="llama_scope"`` see ``k_annealing.ScopeFields``.)
Whatever else SAELens does with the norm of a row (TopK's ``rescale_acts_by_decoder_norm``,
``fold_W_dec_norm``) takes it over all layers together too: that scales a latent and leaves how it is spread
over the layers alone. The L1 penalty sums the norms of the layers instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.registry import register_sae_class, register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput, _disable_hooks
from torch import Tensor

from routesae_lens.hook_points import join_layers, split_layers
from routesae_lens.saes.fast_topk import FastTopK
from routesae_lens.saes.k_annealing import KAnnealing, ScopeFields
from routesae_lens.saes.signed_topk import ReLUField, ReLUOption
from routesae_lens.saes.stack import StackFields, StackSAE, StackTrainingFields, StackTrainingSAE


class Crosscoded(StackSAE):
    """What training and inference Crosscoders share.

    ``encode`` and ``forward`` take the raw stack; ``encode_standardized``, ``decode`` and all of SAELens'
    hook points live in the standardised stack.
    """

    def standardized(self, stack: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "*batch stacked"]:
        """The stack as the Crosscoder reads and reconstructs it: standardised per token and layer.

        With ``standardize=False`` in the config it is the stack itself.

        Raises:
            ValueError: the last dimension is not ``len(layers) * d_model``.
        """
        return join_layers(self.split(stack))

    def encode(self, x: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of a raw stack: standardise, then encode all layers together."""
        return self.encode_standardized(self.standardized(x))

    def encode_standardized(self, x: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of a stack that is standardised already."""
        return super().encode(x)

    def decode_layers(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch layer d_model"]:
        """Standardised reconstructions of all layers, in the order of ``layers``."""
        return split_layers(self.decode(acts), self.cfg.n_layers)

    def forward(self, x: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "*batch stacked"]:
        """Standardised reconstruction of a raw stack; with the error term it is ``standardized(x)``."""
        standardized = self.standardized(x)
        out = self.decode(self.encode_standardized(standardized))
        if self.use_error_term:
            with torch.no_grad():  # the error is a constant for gradients, as in SAELens
                with _disable_hooks(self):
                    clean = self.decode(self.encode_standardized(standardized))
                error = self.hook_sae_error(standardized - clean)
            out = out + error
        return self.hook_sae_output(out)

    def decoder_norms(self) -> Float[Tensor, "layer d_sae"]:
        """Norm of each latent's decoder direction in each layer, in the order of ``layers``.

        In units of the standardised stack, so that layers compare; with ``standardize=False`` the growth of
        the residual stream is in them. They carry gradients.
        """
        return rearrange(
            self.W_dec, "d_sae (layer d_model) -> layer d_sae d_model", layer=self.cfg.n_layers
        ).norm(dim=-1)

    def layer_decoder(self, layer: int) -> Float[Tensor, "d_sae d_model"]:
        """Decoder directions of one layer (a view of ``W_dec``).

        Args:
            layer: a block number out of ``layers``.

        Raises:
            ValueError: the Crosscoder does not read this layer.
        """
        return split_layers(self.W_dec, self.cfg.n_layers)[:, self._index(layer)]

    def layer_reconstruction(
        self, stack: Float[Tensor, "*batch stacked"], layer: int
    ) -> Float[Tensor, "*batch d_model"]:
        """Standardised reconstruction of one layer, from the raw activations of all layers.

        Args:
            stack: raw activations of all layers side by side.
            layer: a block number out of ``layers``.

        Raises:
            ValueError: the Crosscoder does not read this layer, or the stack has another size.
        """
        index = self._index(layer)
        return self.decode_layers(self.encode(stack))[..., index, :]

    def _index(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"this {type(self).__name__} reads blocks {self.layers}, not block {layer!r}")
        return self.layers.index(layer)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold SAELens' scalar input norm; a no-op where layers are standardised (they undo any scale)."""
        if not self.cfg.standardize:
            super().fold_activation_norm_scaling_factor(scaling_factor)
        self.cfg.normalize_activations = "none"


class Crosscoder(Crosscoded):
    """Common base of the inference Crosscoders: ``isinstance(sae, Crosscoder)``, ``Crosscoder.load_from_disk``."""


@dataclass(kw_only=True)
class CrosscoderTrainingFields(StackTrainingFields):
    """Training fields of every Crosscoder. The normalised loss divides by the norm of the whole stack."""


class CrosscoderTrainingSAE(Crosscoded, StackTrainingSAE):
    """Common base of the Crosscoders in training. SAELens' losses and metrics see the standardised stack."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return super().training_forward_pass(replace(step_input, sae_in=self.standardized(step_input.sae_in)))


# --- TopK ------------------------------------------------------------------------------------------


@dataclass
class CrosscoderTopKSAEConfig(ReLUField, StackFields, TopKSAEConfig):
    """Config of :class:`CrosscoderTopKSAE`. ``relu=False`` keeps negative latents among the k."""

    @classmethod
    def architecture(cls) -> str:
        return "crosscoder_topk"


class CrosscoderTopKSAE(ReLUOption, Crosscoder, TopKSAE):
    """A Crosscoder with TopK."""


@dataclass(kw_only=True)
class CrosscoderTopKTrainingSAEConfig(
    ReLUField, ScopeFields, CrosscoderTrainingFields, TopKTrainingSAEConfig
):
    """Config of :class:`CrosscoderTopKTrainingSAE`: layers, loss, ``relu``, K-annealing, and SAELens' TopK fields."""

    @classmethod
    def architecture(cls) -> str:
        return "crosscoder_topk"


class CrosscoderTopKTrainingSAE(KAnnealing, ReLUOption, CrosscoderTrainingSAE, FastTopK, TopKTrainingSAE):
    """A Crosscoder with TopK in training, with the step that touches only k latents where it applies."""


# --- BatchTopK, and the JumpReLU that it becomes -----------------------------------------------------


@dataclass
class CrosscoderJumpReLUSAEConfig(StackFields, JumpReLUSAEConfig):
    """Config of :class:`CrosscoderJumpReLUSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "crosscoder_jumprelu"


class CrosscoderJumpReLUSAE(Crosscoder, JumpReLUSAE):
    """What a BatchTopK Crosscoder becomes, and the authors' inference with a fixed threshold."""


@dataclass(kw_only=True)
class CrosscoderBatchTopKTrainingSAEConfig(ScopeFields, CrosscoderTrainingFields, BatchTopKTrainingSAEConfig):
    """Config of :class:`CrosscoderBatchTopKTrainingSAE`: layers, loss, K-annealing, and SAELens' BatchTopK fields."""

    @classmethod
    def architecture(cls) -> str:
        return "crosscoder_batchtopk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return CrosscoderJumpReLUSAEConfig


class CrosscoderBatchTopKTrainingSAE(KAnnealing, CrosscoderTrainingSAE, BatchTopKTrainingSAE):
    """A Crosscoder with BatchTopK in training: k latents per token on average over the batch."""

    cfg: Any


# --- Standard (ReLU, L1) -----------------------------------------------------------------------------


@dataclass
class CrosscoderStandardSAEConfig(StackFields, StandardSAEConfig):
    """Config of :class:`CrosscoderStandardSAE`."""

    @classmethod
    def architecture(cls) -> str:
        return "crosscoder_standard"


class CrosscoderStandardSAE(Crosscoder, StandardSAE):
    """A Crosscoder with ReLU: the original one."""


@dataclass(kw_only=True)
class CrosscoderStandardTrainingSAEConfig(CrosscoderTrainingFields, StandardTrainingSAEConfig):
    """Config of :class:`CrosscoderStandardTrainingSAE`: layers, loss, and SAELens' standard fields."""

    @classmethod
    def architecture(cls) -> str:
        return "crosscoder_standard"


class CrosscoderStandardTrainingSAE(CrosscoderTrainingSAE, StandardTrainingSAE):
    """ReLU with the L1 penalty of Lindsey et al. (2024): sum_f a_f * sum_l ||W_dec[f, l]||."""

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        # SAELens would weight by the norm over all layers together, which is indifferent to how many
        # layers share a latent; the sum makes a latent pay for each layer.
        weighted = feature_acts * self.decoder_norms().sum(0)
        sparsity = weighted.norm(p=self.cfg.lp_norm, dim=-1, keepdim=True)
        l1 = (sparsity / self._input_norm(step_input.sae_in)).mean()
        return {"l1_loss": step_input.coefficients["l1"] * l1}


# --- Registration --------------------------------------------------------------------------------------

INFERENCE: tuple[tuple[type[Crosscoder], type[SAEConfig]], ...] = (
    (CrosscoderTopKSAE, CrosscoderTopKSAEConfig),
    (CrosscoderJumpReLUSAE, CrosscoderJumpReLUSAEConfig),
    (CrosscoderStandardSAE, CrosscoderStandardSAEConfig),
)
TRAINING: tuple[tuple[type[CrosscoderTrainingSAE], Any], ...] = (
    (CrosscoderTopKTrainingSAE, CrosscoderTopKTrainingSAEConfig),
    (CrosscoderBatchTopKTrainingSAE, CrosscoderBatchTopKTrainingSAEConfig),
    (CrosscoderStandardTrainingSAE, CrosscoderStandardTrainingSAEConfig),
)
for sae_class, config in INFERENCE:
    register_sae_class(config.architecture(), sae_class, config)
for training_class, config in TRAINING:
    register_sae_training_class(config.architecture(), training_class, config)

CROSSCODER_ARCHITECTURES: dict[str, Any] = {config.architecture(): config for _, config in TRAINING}
"""Training configs by architecture name."""
