"""Transcoders in training: SAEs that read one site of a block and reconstruct another (Llama Scope, section 3.2).

``topk_transcoder`` (decoder-norm TopK, Eq. 5) and ``standard_transcoder`` (ReLU, L1) train through SAELens' runners
on a hook point over both sites, ``mount_sites``: the value is what is read and what is to be predicted, side by
side, and ``d_in`` of a *training* config is the width of both, as SAELens' buffer and runners take it. What
is saved is SAELens' own and loads without this package, with ``d_in`` and ``d_out`` apart, ``hook_name`` and
``hook_name_out``:

- ``standard_transcoder`` as ``Transcoder`` or ``SkipTranscoder``, the same function;
- ``topk_transcoder`` as ``JumpReLUTranscoder`` or ``JumpReLUSkipTranscoder``. SAELens has no TopK transcoder.
  All latents get the one threshold above which k are active *on average* (section 3.3.4), so single tokens have
  more or fewer than k. It is followed in training (:meth:`TopKTranscoderTrainingSAE.update_threshold`);
  :func:`calibrate` finds it exactly on given data.

Loss: squared error of the output at scale S_out (below), summed over its ``d_out`` numbers and averaged over
tokens, as SAELens has it for SAEs of one layer. (Not divided by the output's norm, as RouteSAEs do.)

Scales (section 3.3.3): input and output are multiplied by ``S = sqrt(width) / mean norm``, each by its own. The
means are over the first ``norm_batches`` training batches, running while these are trained on; they are in the
weights' state, so that a resumed run goes on with the same. Saving folds them in (section 3.3.4) and gives decoder rows
norm 1. SAELens' own ``normalize_activations`` would give both sites one scale, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.registry import register_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoderConfig,
    TranscoderConfig,
)
from torch import Tensor, nn

from routesae_lens.saes.fast_topk import FastTopK
from routesae_lens.saes.k_annealing import Init, KAnnealing, ScopeFields
from routesae_lens.saes.threshold import Threshold, check_calibration, check_level, find_threshold
from routesae_lens.saes.topk_function import TopKOutput
from routesae_lens.saes.transcoder_fields import TranscoderFields

THRESHOLD_ROWS = 128
"""Tokens of a batch on which the threshold is followed: their pre-activations are all computed."""


class TranscoderTrainingSAE(TrainingSAE[Any]):
    """Mixin in front of a SAELens training SAE, which then reads one part of its input and predicts the other.

    ``encode`` and ``forward`` take both parts side by side, as the hook point gives them, unscaled; ``forward`` gives
    the unscaled prediction. ``decode`` and SAELens' losses live at scale S_out.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    norm_sums: Float[Tensor, " site"]
    norm_tokens: Float[Tensor, ""]

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        wide: dict[str, Any] = {"dtype": torch.float64, "device": self.W_dec.device}
        self.register_buffer("norm_sums", torch.zeros(2, **wide))
        self.register_buffer("norm_tokens", torch.zeros((), **wide))
        self._read: Tensor | None = None  # what is encoded, while SAELens' code handles what is predicted

    def initialize_weights(self) -> None:
        """Decoder rows Kaiming-uniform, of the norm that ``init`` or ``decoder_init_norm`` asks for; the encoder
        drawn likewise but by itself (section 3.3.1); zero biases and ``W_skip``."""
        cfg, norm = self.cfg, self.cfg.decoder_init_norm
        if getattr(cfg, "init", None) == "llama_scope":
            norm = sqrt(2 * cfg.d_out / cfg.d_sae)
        self.W_dec = nn.Parameter(self._drawn(cfg.d_out, norm))
        columns = self._drawn(cfg.d_read, None if norm is None else norm * sqrt(cfg.d_read / cfg.d_out))
        self.W_enc = nn.Parameter(columns.T.contiguous())
        zeros: Any = lambda *size: nn.Parameter(torch.zeros(*size, dtype=self.dtype, device=self.device))  # noqa: E731
        self.b_enc, self.b_dec = zeros(cfg.d_sae), zeros(cfg.d_out)
        if cfg.skip:
            self.W_skip = zeros(cfg.d_out, cfg.d_read)

    def _drawn(self, width: int, norm: float | None) -> Float[Tensor, "d_sae width"]:
        rows = torch.empty(self.cfg.d_sae, width, dtype=self.dtype, device=self.device)
        nn.init.kaiming_uniform_(rows)
        return rows if norm is None else rows / rows.norm(dim=-1, keepdim=True) * norm

    # --- Scales ------------------------------------------------------------------------------------

    @property
    def scales(self) -> Float[Tensor, " site"]:
        """S_in and S_out, float64; 1 before the first batch and without ``normalize``."""
        widths = self.norm_sums.new_tensor([self.cfg.d_read, self.cfg.d_out])
        scales = widths.sqrt() * self.norm_tokens / self.norm_sums
        return torch.where(self.norm_sums > 0, scales, torch.ones_like(scales))

    def split(
        self, both: Float[Tensor, "*batch both"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_out"]]:
        """What is read and what is to be predicted, unscaled.

        Raises:
            ValueError: the last dimension is not ``d_in`` of the config.
        """
        if both.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"expected {self.cfg.d_read} values that are read and {self.cfg.d_out} to be predicted side by side "
                f"({self.cfg.d_in}), got shape {tuple(both.shape)}. cfg.mount(model) names the hook point."
            )
        read, target = both.to(self.dtype).split([self.cfg.d_read, self.cfg.d_out], dim=-1)
        return read, target

    @torch.no_grad()
    def _measure(self, *sites: Tensor) -> None:
        self.norm_sums += torch.stack([x.double().norm(dim=-1).sum() for x in sites])
        self.norm_tokens += sites[0].shape[:-1].numel()

    # --- A step ------------------------------------------------------------------------------------

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' step on the scaled output, predicted from the scaled input."""
        read, target = self.split(step_input.sae_in)
        if self.training and self.cfg.normalize and step_input.n_training_steps < self.cfg.norm_batches:
            self._measure(read, target)
        s_in, s_out = self.scales.to(self.dtype)
        with self._reading(read * s_in):
            output = super().training_forward_pass(replace(step_input, sae_in=target * s_out))
        output.metrics |= {"input_scale": s_in, "output_scale": s_out}
        return output

    @contextmanager
    def _reading(self, read: Tensor) -> Any:
        self._read = read
        try:
            yield
        finally:
            self._read = None

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """What the encoder's product takes, in place of what SAELens' code hands over."""
        assert self._read is not None
        return self.hook_sae_input(self._read)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The prediction at scale S_out; within a step with the skip connection."""
        return self._skipped(super().decode(feature_acts))

    def _skipped(self, out: Tensor) -> Tensor:
        return out + self._read @ self.W_skip.T if self.cfg.skip and self._read is not None else out

    def encode(self, x: Float[Tensor, "*batch both"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of both sites side by side (of the first of them)."""
        with self._reading(self.split(x)[0] * self.scales[0].to(self.dtype)):
            return super().encode(x)

    def forward(self, x: Float[Tensor, "*batch both"]) -> Float[Tensor, "*batch d_out"]:
        """The unscaled prediction from both sites side by side (from the first of them)."""
        acts = self.encode(x)
        s_in, s_out = self.scales.to(self.dtype)
        with self._reading(self.split(x)[0] * s_in):
            return self.decode(acts) / s_out

    # --- Saving ------------------------------------------------------------------------------------

    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Fold the scales and the decoder norms (section 3.3.4); the saved SAE takes and gives unscaled values.

        The paper's form (decoder times S_in / S_out, encoder bias over S_in, encoder as it is) has latents in
        other units; with decoder rows of norm 1 both are the same.
        """
        wide = {name: state_dict[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        s_in, s_out = self.scales
        norms = (wide["W_dec"] / s_out).norm(dim=-1).clamp_min(1e-8)
        folded = {
            "W_enc": wide["W_enc"] * s_in * norms,
            "b_enc": wide["b_enc"] * norms,
            "W_dec": wide["W_dec"] / s_out / norms[:, None],
            "b_dec": wide["b_dec"] / s_out,
        }
        if self.cfg.skip:
            folded["W_skip"] = state_dict["W_skip"].double() * s_in / s_out
        dtype = state_dict["W_dec"].dtype
        state_dict |= {name: weights.to(dtype).contiguous() for name, weights in folded.items()}
        del state_dict["norm_sums"], state_dict["norm_tokens"]

    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            "saving a transcoder folds its decoder norms; inference_form(sae) does it here"
        )


# --- TopK ------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TopKTranscoderTrainingSAEConfig(TranscoderFields, ScopeFields, TopKTrainingSAEConfig):
    """Config of :class:`TopKTranscoderTrainingSAE`: :class:`TranscoderFields`, K-annealing, SAELens' TopK fields.

    Args:
        topk_threshold_lr: as SAELens' for BatchTopK: how fast the threshold for inference follows the batches;
            0 keeps the plain mean of all.

    Raises:
        ValueError: as the fields of its bases, or a ``topk_threshold_lr`` outside 0 to 1.
    """

    init: Init = "llama_scope"
    aux_loss_coefficient: float = 0.0
    topk_threshold_lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.topk_threshold_lr
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"topk_threshold_lr must be a number from 0 to 1, got {rate!r}")

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSkipTranscoderConfig if self.skip else JumpReLUTranscoderConfig


class TopKTranscoderTrainingSAE(TranscoderTrainingSAE, KAnnealing, FastTopK, TopKTrainingSAE):
    """A TopK transcoder in training: k latents per token, chosen by activation times decoder norm (Eq. 5).

    The auxiliary loss is off by default, as the paper has it.
    """

    topk_threshold: Float[Tensor, ""]

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        threshold = torch.zeros((), dtype=torch.float64, device=self.W_dec.device)
        self.register_buffer("topk_threshold", threshold)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        if self.training:
            self.update_threshold(self.split(step_input.sae_in)[0], step_input.n_training_steps)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    @torch.no_grad()
    def update_threshold(self, read: Float[Tensor, "batch d_in"], step: int) -> None:
        """Follow the threshold above which k latents are active on average: of this batch, then a running mean.

        k is that of the config, in annealed steps too. The mean is the plain one of the first
        ``1 / topk_threshold_lr`` steps and forgets at that rate from then on.

        Args:
            read: unscaled inputs, of which the first :data:`THRESHOLD_ROWS` count.
            step: training steps done before this one.
        """
        rows = read[:THRESHOLD_ROWS]
        with torch.autocast(rows.device.type, enabled=False):
            pre = rows * self.scales[0].to(self.dtype) @ self.W_enc + self.b_enc
            if self.cfg.rescale_acts_by_decoder_norm:
                pre = pre * self.W_dec.norm(dim=-1)
            active = len(rows) * int(self.cfg.k)
            # between the last that is active and the first that is not (which may be none)
            edge = pre.relu().flatten().topk(min(active + 1, pre.numel())).values[active - 1 :]
            rate = max(self.cfg.topk_threshold_lr, 1 / (step + 1))
            self.topk_threshold.lerp_(edge.double().mean(), rate)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Any:
        if not self.cfg.aux_loss_coefficient:
            return {}  # SAELens would compute it and multiply by zero
        return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)

    def _autoencode(
        self, x: Tensor, dead: Tensor | None, scale: Tensor | None, norm: Tensor | None
    ) -> TopKOutput:
        assert self._read is not None
        code = super()._autoencode(self.hook_sae_input(self._read), dead, None, norm)
        return code._replace(out=self._skipped(code.out))

    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        threshold = state_dict.pop("topk_threshold") / self.scales[1]
        if self.cfg.rescale_acts_by_decoder_norm:
            each = threshold.expand(self.cfg.d_sae)
        else:  # latents compete in their own units, and are saved in those of the decoder norm
            each = threshold * state_dict["W_dec"].double().norm(dim=-1)
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["threshold"] = each.to(state_dict["W_dec"].dtype).contiguous()


def calibrate(
    sae: JumpReLUTranscoder,
    inputs: Callable[[], Iterable[Float[Tensor, "*token d_in"]]],
    k: int | float,
    *,
    tolerance: int | float,
) -> Threshold:
    """Give a saved TopK transcoder the one threshold above which ``k`` latents are active on average.

    Args:
        sae: a JumpReLU transcoder with decoder rows of norm 1, as saved here; its threshold is replaced.
        inputs: starts a pass over what the transcoder reads, see ``threshold.find_threshold``.
        k: latents per token.
        tolerance: largest difference of their average from ``k``.

    Raises:
        ValueError: another kind of SAE, a ``k`` or ``tolerance`` that cannot be, inputs of another width or too
            few for the tolerance (see ``threshold.check_calibration``), or no threshold does that. The transcoder
            is as before then.
    """
    if not isinstance(sae, JumpReLUTranscoder):
        raise ValueError(f"expected a JumpReLUTranscoder, got {type(sae).__name__}")

    check_level(k, tolerance, d_sae=sae.cfg.d_sae)

    def stream() -> Iterable[Tensor]:
        with torch.no_grad():
            for x in inputs():
                if x.shape[-1] != sae.cfg.d_in:
                    raise ValueError(
                        f"this transcoder reads {sae.cfg.d_in} values per token, got shape {tuple(x.shape)}"
                    )
                yield sae.process_sae_in(x) @ sae.W_enc + sae.b_enc

    found = find_threshold(stream, k, tolerance=tolerance)
    check_calibration(k, tolerance, d_sae=sae.cfg.d_sae, tokens=found.tokens)
    sae.threshold.data.fill_(found.value)
    return found


# --- Standard (ReLU, L1) -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class StandardTranscoderTrainingSAEConfig(TranscoderFields, StandardTrainingSAEConfig):
    """Config of :class:`StandardTranscoderTrainingSAE`: :class:`TranscoderFields` and SAELens' standard fields."""

    @classmethod
    def architecture(cls) -> str:
        return "standard_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return SkipTranscoderConfig if self.skip else TranscoderConfig


class StandardTranscoderTrainingSAE(TranscoderTrainingSAE, StandardTrainingSAE):
    """A ReLU transcoder in training, with SAELens' L1 penalty on latents times decoder norm."""


# --- Registration ------------------------------------------------------------------------------------

TRAINING: tuple[tuple[type[TranscoderTrainingSAE], Any], ...] = (
    (TopKTranscoderTrainingSAE, TopKTranscoderTrainingSAEConfig),
    (StandardTranscoderTrainingSAE, StandardTranscoderTrainingSAEConfig),
)
for training_class, config in TRAINING:
    register_sae_training_class(config.architecture(), training_class, config)

TRANSCODER_ARCHITECTURES: dict[str, Any] = {config.architecture(): config for _, config in TRAINING}
"""Training configs by architecture name."""
