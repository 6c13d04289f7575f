"""What makes a TopK SAE of SAELens' kind a mixture of experts, in training and inference; ``experts.py`` has the SAEs.

``feature_acts`` are the latents times their expert's weight, so that ``decode`` is SAELens' own: ``feature_acts @ W_dec
+ b_dec`` is Eq. 2.4, with the ``b_pre`` of Eq. 2.1 in the place of ``b_dec``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from routesae_lens.saes.expert_function import (
    ExpertChoice,
    choose_experts,
    expert_autoencode,
    expert_encode,
    identity_rows,
    latent_weights,
    mean_rows,
    scaled_encoder,
    selected_latents,
)
from routesae_lens.saes.fast_topk import FastTopK, OwnSparseCode, encode_fast, has_relu, latents_kept
from routesae_lens.saes.sparse_products import TopKCode
from routesae_lens.saes.topk_function import TopKOutput

ExpertWeights = Literal["softmax", "renormalized"]
FeatureScaling = Literal["none", "mean", "identity", "learned"]


@dataclass(kw_only=True)
class ExpertFields:
    """Config fields of every SAE that is a mixture of experts; they stand before SAELens' in a list of bases.

    Args:
        n_experts: N, the experts; they share the ``d_sae`` latents equally.
        active_experts: e, the experts that are computed for a token.
        expert_weights: what an expert's output is multiplied with. "softmax" is its probability among all experts
            (Eq. 2.4); "renormalized" a second softmax over the selected probabilities, as in the published code.

    Raises:
        ValueError: numbers that cannot be: e above N, N not dividing ``d_sae``, k above the latents of e experts.
    """

    n_experts: int = 16
    active_experts: int = 2
    expert_weights: ExpertWeights = "softmax"
    metadata: Any = field(default_factory=SAEMetadata)  # (SAELens' from_dict hands over a dict first)

    def __post_init__(self) -> None:
        cfg: Any = self
        for name in ("n_experts", "active_experts", "d_sae", "k"):
            value = getattr(cfg, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer, 1 or more; got {value!r}")
        super().__post_init__()  # type: ignore[misc]
        _check_known("expert_weights", self.expert_weights, ExpertWeights)
        if self.active_experts > self.n_experts:
            raise ValueError(
                f"active_experts = {self.active_experts} is more than n_experts = {self.n_experts}"
            )
        if cfg.d_sae % self.n_experts:
            raise ValueError(
                f"n_experts = {self.n_experts} does not divide d_sae = {cfg.d_sae} into experts of one width"
            )
        if cfg.k > (latents := self.active_experts * self.expert_width):
            raise ValueError(
                f"k = {cfg.k} is more than the {latents} latents of active_experts = {self.active_experts} "
                f"experts of {self.expert_width} latents each"
            )
        if self.expert_weights == "renormalized" and self.active_experts == 1:
            raise ValueError(
                "expert_weights='renormalized' needs active_experts of 2 or more: the weight of a single expert "
                "would be 1 whatever the router says, and the router learn nothing"
            )

    @property
    def expert_width(self) -> int:
        """Latents of one expert."""
        cfg: Any = self
        return int(cfg.d_sae // self.n_experts)


def _check_known(name: str, value: Any, literal: Any) -> None:
    if value not in get_args(literal):
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(get_args(literal))}")


@dataclass(kw_only=True)
class ExpertTrainingFields(ExpertFields):
    """Training fields on top of :class:`ExpertFields`.

    Args:
        feature_scaling: scale encoder rows' deviation from a low-pass part by 1 + omega, omega learned for each
            expert and 0 at the start (Eq. 2.5). The part is the expert's "mean" row (Eq. C.1), the rectangular
            "identity" (C.2), or "learned" (C.3; it starts as the mean row); "none" scales nothing. What is saved for
            inference has the scaled encoder, and omega as ``expert_scale``.
        expert_balance_coefficient: alpha of the load-balancing loss of Eq. 2.2, alpha N sum_i f_i P_i: P_i is the mean
            probability of expert i, f_i its share of the batch's selections (e for each token, so that balanced
            experts give alpha for every e). The paper does not say its alpha. None takes a tenth of
            the reconstruction loss at the start, about: 0.1 where that is normalised, else 0.1 times the size of the
            activation (the squared error is summed over it). With a tenth of that half of the experts were never
            selected after 200 thousand tokens, see ``recipes/results/README.md``.
    """

    feature_scaling: FeatureScaling = "mean"
    expert_balance_coefficient: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        cfg: Any = self
        _check_known("feature_scaling", self.feature_scaling, FeatureScaling)
        alpha = self.alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < float("inf"):
            raise ValueError(f"expert_balance_coefficient must be a number, 0 or more; got {alpha!r}")
        if getattr(cfg, "use_sparse_activations", False):
            raise ValueError(
                "use_sparse_activations does not go with experts, whose own step is sparse already"
            )
        unfoldable = ["covariance_whitening"] if self.feature_scaling != "none" else []
        unfoldable += ["expected_average_only_in"] if self.feature_scaling == "identity" else []
        standardized = getattr(cfg, "standardize", False)  # undoes any scale, nothing is folded
        if cfg.normalize_activations in unfoldable and not standardized:
            raise ValueError(
                f"normalize_activations={cfg.normalize_activations!r} cannot be folded into an encoder with "
                f"feature_scaling={self.feature_scaling!r}"
            )

    @property
    def alpha(self) -> float:
        """``expert_balance_coefficient``, or what None stands for."""
        if self.expert_balance_coefficient is not None:
            return self.expert_balance_coefficient
        cfg: Any = self
        normalized = getattr(cfg, "loss", "mse") == "normalized_mse"
        return 0.1 if normalized else 0.1 * getattr(cfg, "d_model", cfg.d_in)


# --- What training and inference share ------------------------------------------------------------------


class Experts(OwnSparseCode):
    """Mixin in front of SAELens' TopK SAEs: the router, and latents of the selected experts only."""

    cfg: Any
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_expert: nn.Parameter
    """(expert, d_in): the router."""
    b_expert: nn.Parameter
    """(d_in,): taken off what the router reads."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        d_in = self.W_dec.shape[1]  # (of a RouteSAE's stack it is less than cfg.d_in)
        router = nn.Linear(d_in, self.cfg.n_experts, bias=False, dtype=self.dtype, device=self.device)
        self.W_expert = nn.Parameter(router.weight.detach())
        self.b_expert = nn.Parameter(torch.zeros(d_in, dtype=self.dtype, device=self.device))

    def choose_experts(self, x: Float[Tensor, "*batch d_in"]) -> ExpertChoice:
        """The experts of what this SAE reads (a RouteSAE: ``route(stack).input``)."""
        return choose_experts(
            x.to(self.dtype),
            self.W_expert,
            self.b_expert,
            self.cfg.active_experts,
            renormalized=self.cfg.expert_weights == "renormalized",
        )

    def sparse_code(self, x: Float[Tensor, "batch d_in"], norm: Float[Tensor, " d_sae"] | None) -> TopKCode:
        W_enc, scale = self._encoder()
        return expert_encode(
            x - self.b_dec if self.cfg.apply_b_dec_to_input else x,
            W_enc,
            self.b_enc,
            self.choose_experts(x),
            latents_kept(self),
            scale=scale,
            relu=has_relu(self),
            norm=norm,
        )

    def _encoder(self) -> tuple[Tensor, Tensor | None]:
        """Encoder, and omega where it is still to be scaled with it."""
        return self.W_enc, None

    def _encode_dense(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        """Latents, and all pre-activations times their expert's weight (0 where it was not selected)."""
        centered = self.process_sae_in(x)
        choice = self.choose_experts(centered + self.b_dec * self.cfg.apply_b_dec_to_input)
        W_enc, scale = self._encoder()
        W_enc = W_enc if scale is None else scaled_encoder(W_enc, scale)
        hidden_pre = self.hook_sae_acts_pre(centered @ W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        weights = latent_weights(choice, self.cfg.d_sae)
        others = ~selected_latents(choice, self.cfg.d_sae)
        # (k is at most the latents of the selected experts, so no -inf is ever kept)
        kept = self.activation_fn(hidden_pre.masked_fill(others, -torch.inf))
        return self.hook_sae_acts_post(kept * weights), hidden_pre * weights

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.W_expert.mul_(scaling_factor)
        self.b_expert.div_(scaling_factor)

    @torch.no_grad()
    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        dtype = torch.promote_types(self.dtype, whitening_matrix.dtype)
        mean, whitening, unwhitening = (
            tensor.to(self.device, dtype) for tensor in (mean, whitening_matrix, unwhitening_matrix)
        )
        self.W_expert.copy_(self.W_expert.to(dtype) @ whitening.T)
        self.b_expert.copy_(self.b_expert.to(dtype) @ unwhitening + mean)


class ExpertInference(Experts):
    """The inference form: its encoder is scaled already."""

    expert_scale: Tensor
    """(expert,): the omega that training ended with, 0 where nothing was scaled. Nothing here depends on it."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        scale = torch.zeros(self.cfg.n_experts, dtype=self.dtype, device=self.device)
        self.register_buffer("expert_scale", scale)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents; without gradients only the selected experts are computed where ``is_fast`` says so."""
        if x.ndim == 1:
            return self.encode(x[None])[0]
        code = encode_fast(self, x, lambda x: self._encode_dense(x)[0])
        if not isinstance(code, TopKCode):
            return code
        acts = code.values.new_zeros(len(code.values), self.cfg.d_sae)
        return acts.scatter_(1, code.indices, code.values).view(*x.shape[:-1], self.cfg.d_sae)


class ExpertTraining(Experts, FastTopK):
    """The training form: feature scaling, and the load-balancing loss."""

    _stepping = False
    _choice: ExpertChoice | None = None
    """The experts of the step that is being made."""

    def initialize_weights(self) -> None:
        super().initialize_weights()
        if self.cfg.feature_scaling != "none":
            scale = torch.empty(self.cfg.n_experts, dtype=self.dtype, device=self.device)
            self.expert_scale = nn.Parameter(scale)
        if self.cfg.feature_scaling == "learned":
            self.W_lowpass = nn.Parameter(torch.empty_like(self.W_enc))
        self.start_scaling()

    @torch.no_grad()
    def start_scaling(self) -> None:
        """No scaling of the encoder as it is now: omega 0, and a learned low-pass part at the mean rows."""
        if self.cfg.feature_scaling != "none":
            self.expert_scale.zero_()
        if self.cfg.feature_scaling == "learned":
            mean = mean_rows(self.W_enc, self.cfg.n_experts)
            self.W_lowpass.copy_(mean.repeat_interleave(self.cfg.expert_width, dim=1))

    def _encoder(self) -> tuple[Tensor, Tensor | None]:
        match self.cfg.feature_scaling:
            case "none":
                return self.W_enc, None
            case "mean":
                return self.W_enc, self.expert_scale
            case "learned":
                lowpass: Tensor = self.W_lowpass
            case _:
                lowpass = identity_rows(self.W_enc, self.cfg.n_experts)
        return scaled_encoder(self.W_enc, self.expert_scale, lowpass), None

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        return self._encode_dense(x)

    def _autoencode(
        self, x: Tensor, dead: Tensor | None, scale: Tensor | None, norm: Tensor | None
    ) -> TopKOutput:
        # (``scale`` is of no use here: experts are chosen by x, whose gradient is needed whole)
        W_enc, omega = self._encoder()
        return expert_autoencode(
            x,
            W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            self.choose_experts(x),
            latents_kept(self),
            scale=omega,
            relu=has_relu(self),
            norm=norm,
            subtract_b_dec=self.cfg.apply_b_dec_to_input,
            dead=dead,
            k_dead=0 if dead is None else min(self._most_revived, len(dead)),
        )

    def choose_experts(self, x: Float[Tensor, "*batch d_in"]) -> ExpertChoice:
        choice = super().choose_experts(x)
        if self._stepping:
            self._choice = choice
        return choice

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._stepping = True
        try:
            output = super().training_forward_pass(step_input)
            choice = self._choice
        finally:
            self._stepping, self._choice = False, None
        assert choice is not None
        if self.cfg.alpha:
            balance = self.cfg.alpha * load_balance(choice)
            output.losses["expert_balance_loss"] = balance
            output.loss = output.loss + balance
        output.metrics.update(expert_metrics(choice))
        if self.cfg.feature_scaling != "none":
            omega = self.expert_scale.detach()
            output.metrics |= {
                f"expert_scale_{name}": getattr(omega, name)() for name in ("mean", "min", "max")
            }
        return output

    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        W_enc, omega = self._encoder()
        state_dict["W_enc"] = (W_enc if omega is None else scaled_encoder(W_enc, omega)).detach().clone()
        state_dict.pop("W_lowpass", None)
        state_dict.setdefault("expert_scale", torch.zeros_like(self.W_expert[:, 0]))
        super().process_state_dict_for_saving_inference(state_dict)

    def fold_and_get_W_dec_norm(self) -> Tensor:
        if self.cfg.feature_scaling != "none" and self.expert_scale.any():
            raise NotImplementedError(
                f"decoder norms cannot be folded beside feature_scaling={self.cfg.feature_scaling!r}, they would "
                "change its low-pass part; fold them into inference_form(sae), whose encoder is scaled already"
            )
        return super().fold_and_get_W_dec_norm()

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        if self.cfg.feature_scaling == "identity":
            raise NotImplementedError("an input scale cannot be folded beside feature_scaling='identity'")
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.feature_scaling == "learned":
            self.W_lowpass.mul_(scaling_factor)


def load_balance(choice: ExpertChoice) -> Float[Tensor, ""]:
    """N sum_i f_i P_i (Eq. 2.2): 1 where experts are used equally, N / e where the same e have all probability."""
    probs = choice.probs.flatten(0, -2)
    return probs.shape[-1] * (_shares(choice).to(probs.dtype) * probs.mean(0)).sum()


def _shares(choice: ExpertChoice) -> Float[Tensor, " expert"]:
    """Of all selections that of each expert; they sum to 1."""
    counts = torch.bincount(choice.chosen.flatten(), minlength=choice.probs.shape[-1])
    return counts.double() / counts.sum()


def expert_metrics(choice: ExpertChoice) -> dict[str, Tensor]:
    """How one batch uses the experts: shares of the most and least used one among all selections, entropy of the shares
    (nats; log N is balance), mean entropy of the probabilities, and the mean probability of a selected expert."""
    probs, shares = choice.probs.detach().double(), _shares(choice)
    return {
        "expert_share_max": shares.max(),
        "expert_share_min": shares.min(),
        "expert_share_entropy": torch.special.entr(shares).sum(),
        "expert_entropy": torch.special.entr(probs).sum(-1).mean(),
        "expert_mean_p": probs.gather(-1, choice.chosen).mean(),
    }
