"""TopK to JumpReLU: the same latents, each active by itself (Llama Scope, sections 2.4, 3.3.4 and appendix C).

A TopK SAE lets k latents of every token through, so that one may be silent only because others are stronger.
After training, one threshold at which k latents are active *on average* takes TopK's place, and decoder norms
are folded into the encoder, so that a latent's activation is the length of what it adds to the reconstruction.

Which latents pass should depend on the quantity by which TopK ranked them, and that decides the threshold's form:

- ``rescale_acts_by_decoder_norm`` (Llama Scope's Eq. 5): TopK ranks by activation times decoder norm, which is
  the folded activation. One threshold for all latents of the folded SAE, as in the paper.
- without it (Gao et al., 2024; the RouteSAE paper): TopK ranks by the raw activation. One threshold on that is,
  in the folded SAE, the threshold times each latent's former decoder norm (SAELens' ``fold_W_dec_norm``). One
  threshold for all folded latents would rank them anew, and let others through than training did.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE, TopKSAE, TrainingSAE
from torch import Tensor

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.analysis.metrics import Evaluation
from routesae_lens.analysis.stream import check_tokens, kept_tokens, read_batches, subjects_of
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.stack import StackSAE
from routesae_lens.saes.threshold import check_calibration, find_threshold

JUMPRELU = {"topk": "jumprelu", "route_topk": "route_jumprelu", "crosscoder_topk": "crosscoder_jumprelu"}
"""Architectures that convert, and what they become."""


@dataclass
class Conversion:
    """A TopK SAE as a JumpReLU SAE, and how its threshold was found."""

    sae: SAE[Any] = field(repr=False)
    """The JumpReLU SAE: decoder rows of norm 1, ready for ``save_model`` and everything that takes an SAE."""
    topk: SAE[Any] = field(repr=False)
    """What was converted: the SAE handed in, the inference form of a training SAE, or a copy with its input
    scale folded."""
    k: int | float
    threshold: float
    unit: str
    """What the threshold is compared with: "folded" activations (in units of a decoder row of norm 1; every
    ``sae.threshold`` is the threshold) or "raw" ones (of the decoder as it was; ``sae.threshold`` is the threshold
    times the former norm of each row)."""
    l0: float
    """Active latents per token on the calibration stream."""
    tolerance: int | float
    tokens: int
    """Tokens of the calibration stream that counted."""
    passes: int
    """Passes over it: 2 where the first could not tell values near the threshold apart."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the SAEs, ready for JSON."""
        names = ("k", "threshold", "unit", "l0", "tolerance", "tokens", "passes")
        architectures = {"from": self.topk.cfg.architecture(), "to": self.sae.cfg.architecture()}
        return architectures | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return (
            f"{self.topk.cfg.architecture()} with k = {self.k:g} became {self.sae.cfg.architecture()} with a "
            f"threshold of {self.threshold:.6g} on {self.unit} activations: L0 {self.l0:.4f} on "
            f"{self.tokens:,} tokens"
        )


@dataclass
class Comparison:
    """A TopK SAE and its JumpReLU form on the same held-out tokens."""

    before: Evaluation
    after: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Both evaluations, ready for JSON."""
        return {"before": self.before.to_dict(), "after": self.after.to_dict()}

    def __str__(self) -> str:
        rows = [f"{'':10}{'L0':>10}{'NormMSE':>10}{'KL':>10}{'delta CE':>10}"]
        for name, result in (("TopK", self.before), ("JumpReLU", self.after)):
            numbers = (result.l0, result.norm_mse, result.kl, result.delta_ce)
            rows.append(f"{name:10}" + "".join(f"{number:10.4f}" for number in numbers))
        return "\n".join(rows)


@torch.no_grad()
def to_jumprelu(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    k: int | float | None = None,
    tolerance: int | float = 0.1,
    scaling_factor: int | float | None = None,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> Conversion:
    """A TopK SAE as a JumpReLU SAE with k active latents per token on average.

    SAELens' ``TopKSAE`` becomes its ``JumpReLUSAE`` (which loads without this package), a RouteSAE the routed
    JumpReLU, a Crosscoder its JumpReLU form; hook names, layers, router and standardisation are carried over.
    The SAE handed in is not changed. The result computes in float32 at least: in bfloat16 the fold would
    round weights, and many pre-activations would be equal.

    The threshold is exact on the calibration stream: pre-activations are counted, not sampled, in one pass (a
    second one only where the first cannot tell enough of them apart), in memory that does not grow with it. A
    RouteSAE's are those of its routed input, times p where routing is hard, as at inference.

    Args:
        sae: an inference TopK SAE, or a training one (its inference form is converted).
        model: the language model it reads.
        tokens: the calibration stream, token ids of text like the training's. Special tokens and position 0
            do not count, as in :func:`evaluate_all`.
        k: active latents per token, by default the SAE's own. Need not be whole.
        tolerance: largest difference between L0 on the calibration stream and ``k``. How many tokens it asks
            for, and why, is said in :func:`~routesae_lens.saes.threshold.check_calibration`: k / tolerance^2.
        scaling_factor: SAELens' input scale, where ``normalize_activations`` is "expected_average_only_in" and
            the SAE was taken from a run in progress: it is folded. What SAELens saves has it folded already.
        batch_size: sequences per forward. Only random routing depends on it.
        exclude_special_tokens: the tokenizer's special tokens (or these ids) do not count.
        exclude_first_position: nor does position 0.
        progress: show a progress bar.

    Raises:
        ValueError: before the first pass: an SAE without k, one with negative latents (``relu=False``), a
            ``k`` larger than the width, a calibration stream too short for the tolerance, tokens or an SAE
            that do not fit the model, an input scale that is not known. After it: fewer than k latents per
            token are positive, so that no threshold exists.
    """
    topk = _scale_folded(_inference_topk(sae), scaling_factor)
    k = topk.cfg.k if k is None else k
    check_tokens(tokens, model)
    counted = int(kept_tokens(tokens, model, exclude_special_tokens, exclude_first_position).sum())
    check_calibration(k, tolerance, d_sae=topk.cfg.d_sae, tokens=counted)
    jumprelu = as_jumprelu(topk, JUMPRELU[topk.cfg.architecture()])
    folded = topk.cfg.rescale_acts_by_decoder_norm
    if folded:
        jumprelu.fold_W_dec_norm()
    subjects = subjects_of({"sae": jumprelu}, model)

    def positive_activations() -> Iterator[Tensor]:
        for batch in read_batches(
            subjects,
            model,
            tokens,
            batch_size=batch_size,
            exclude_special_tokens=exclude_special_tokens,
            exclude_first_position=exclude_first_position,
            progress="calibrate" if progress else None,
        ):
            latents = subjects["sae"].encode(batch.read(subjects["sae"]), batch.keep)
            assert isinstance(latents, Tensor)  # no TopK, so dense
            yield latents

    found = find_threshold(positive_activations, k, tolerance=tolerance)
    jumprelu.threshold.fill_(found.value)
    if not folded:
        jumprelu.fold_W_dec_norm()  # the thresholds, too
    conversion = Conversion(
        sae=jumprelu,
        topk=topk,
        k=k,
        threshold=found.value,
        unit="folded" if folded else "raw",
        l0=found.l0,
        tolerance=tolerance,
        tokens=found.tokens,
        passes=found.passes,
    )
    jumprelu.cfg.metadata.converted = conversion.to_dict()
    return conversion


def compare_conversion(
    conversion: Conversion, model: Any, tokens: Int[Tensor, "sequence pos"], **options: Any
) -> Comparison:
    """L0, NormMSE, KL and everything else of :func:`evaluate_all`, before and after, on one clean pass.

    NormMSE is ``Evaluation.norm_mse``: the mean over tokens of ||z - z_hat||^2 / ||z||^2, z standardised.

    Args:
        conversion: from :func:`to_jumprelu`.
        model: the language model.
        tokens: held-out token ids, not those of the calibration.
        options: go to :func:`evaluate_all`.

    Raises:
        ValueError: no Conversion, or as :func:`evaluate_all`.
    """
    if not isinstance(conversion, Conversion):
        raise ValueError(f"expected the Conversion that to_jumprelu gives, got {type(conversion).__name__}")
    saes = {"before": conversion.topk, "after": conversion.sae}
    return Comparison(**evaluate_all(saes, model, tokens, **options))


def _inference_topk(sae: Any) -> SAE[Any]:
    """``sae`` in its inference form, if that is a TopK SAE which converts.

    Raises:
        ValueError: it is not; says why, and what to do where something can be done.
    """
    if not isinstance(sae, SAE):
        raise ValueError(f"expected a TopK SAE, got {type(sae).__name__}")
    given = type(sae).__name__
    sae = inference_form(sae) if isinstance(sae, TrainingSAE) else sae
    if hasattr(sae, "threshold"):
        raise ValueError(
            f"{given} has thresholds already, at least in its inference form: nothing to convert "
            "(routesae_lens.saes.transcoder.calibrate finds a transcoder's on given data)"
        )
    if not isinstance(sae, TopKSAE) or sae.cfg.architecture() not in JUMPRELU:
        raise ValueError(
            f"{given} ({sae.cfg.architecture()}) is no TopK SAE with a JumpReLU form; those are: {', '.join(JUMPRELU)}"
        )
    if not getattr(sae.cfg, "relu", True):
        raise ValueError(
            f"this {given} has relu=False: negative latents may be among its k, and JumpReLU has none. Train "
            "with relu=True to convert"
        )
    if isinstance(sae, RouteSAE) and sae.cfg.routing in ("oracle", "every"):
        # The oracle's layers depend on the threshold that is looked for; "every" chooses no layer.
        raise ValueError(
            f"routing={sae.cfg.routing!r} gives no input to calibrate on; convert with_routing(sae, 'random') "
            f"(or the rule it was trained with) and take with_routing(conversion.sae, {sae.cfg.routing!r})"
        )
    return sae


def _scale_folded(sae: SAE[Any], scaling_factor: int | float | None) -> SAE[Any]:
    """``sae``, or where it expects scaled inputs a copy for the model's own.

    Raises:
        ValueError: the input scale is needed and not given, given and not needed, or not a positive number.
    """
    scaled = sae.cfg.normalize_activations == "expected_average_only_in"
    if isinstance(sae, StackSAE) and sae.cfg.standardize:
        scaling_factor = 1.0 if scaled else None  # standardising undoes any scale
    if scaled != (scaling_factor is not None):
        raise ValueError(
            f"normalize_activations={sae.cfg.normalize_activations!r} and scaling_factor={scaling_factor} do not "
            "go together: 'expected_average_only_in' needs the factor of the run, nothing else has one"
        )
    if scaling_factor is not None:
        known = isinstance(scaling_factor, int | float) and not isinstance(scaling_factor, bool)
        if not known or not 0 < scaling_factor < math.inf:
            raise ValueError(f"scaling_factor must be a positive number, got {scaling_factor!r}")
        sae = copy.deepcopy(sae)
        sae.fold_activation_norm_scaling_factor(scaling_factor)
    return sae


def as_jumprelu(sae: SAE[Any], architecture: str) -> SAE[Any]:
    """A copy of ``sae``, its weights and all settings, as ``architecture``; thresholds are 0 where it has none.

    In float32 at least. Decoder norms are not folded.
    """
    cfg = copy.deepcopy(sae.cfg.to_dict()) | {"architecture": architecture, "device": "meta"}  # (no memory)
    jumprelu: SAE[Any] = SAE.from_dict(cfg)
    jumprelu.cfg.device = sae.cfg.device
    dtype = torch.promote_types(sae.W_enc.dtype, torch.float32)
    state = {name: tensor.detach().to(dtype, copy=True) for name, tensor in sae.state_dict().items()}
    state.setdefault("threshold", torch.zeros_like(state["b_enc"]))
    jumprelu.load_state_dict(state, assign=True)
    return jumprelu.to(device=sae.W_dec.device, dtype=dtype).eval()
