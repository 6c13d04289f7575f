"""What inserting one latent of a larger SAE does to the error of a smaller one, and the threshold that follows.

Leask et al. (2025) call a latent novel where inserting it into the smaller SAE lowers the error, and found that its
best decoder cosine to the smaller SAE foretells that: of their SAEs the cosine 0.7 told the two kinds apart best.

One pass serves all latents. With r the residual of the smaller SAE and a the activation of latent j, an insertion
turns ||r||^2 into ||r - a d_j||^2, so that the squared error changes by -2 a (r . d_j) + a^2 ||d_j||^2. That is exact
where latents fire independently of each other: ReLU and JumpReLU, not TopK (``stitched_sae.py``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.geometry import BestMatches
from routesae_lens.analysis.stitched_sae import stitchable_pair
from routesae_lens.analysis.stream import read_batches, subjects_of
from routesae_lens.hook_points import split_layers
from routesae_lens.saes.route_sae import RouteSAE

ROWS_AT_ONCE = 2048
"""Tokens encoded together."""
STEPS = 100
"""Steps between the thresholds 0 and 1 that are tried."""


@dataclass(frozen=True)
class InsertionEffects:
    """How each insertion, alone, changes the error of the smaller SAE.

    Errors are in the space that the SAEs read: the model's activation, or a RouteSAE's routed input (standardised,
    and times p where routing is hard).
    """

    tokens: int
    mse: float
    """Of the smaller SAE: mean over tokens of the squared error, summed over dimensions."""
    latents: Int[Tensor, " sampled"] = field(repr=False)
    """Latents of the larger SAE that were tried, ascending."""
    change: Float[Tensor, " sampled"] = field(repr=False)
    """By how much inserting each changes ``mse``, float64. Below 0 it improves."""
    fires: Int[Tensor, " sampled"] = field(repr=False)
    """Tokens on which each fires."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return {
            "tokens": self.tokens,
            "mse": self.mse,
            **{name: getattr(self, name).tolist() for name in ("latents", "change", "fires")},
        }


@dataclass(frozen=True)
class ThresholdChoice:
    """How well a cosine tells insertions that lower the error from those that raise it."""

    threshold: float | None
    """The best of ``thresholds``, of equally good ones the middle one. None where all insertions lower the error, or
    all raise it: nothing is to be told apart then."""
    balanced_accuracy: float | None
    """Of that threshold: the mean of the shares of lowering and of raising latents that are foretold."""
    thresholds: list[float]
    accuracies: list[float]
    """Balanced accuracy of each threshold, where a latent below it is foretold to lower the error; 0.5 is chance."""
    lowering: int
    raising: int
    left_out: int
    """Latents tried that never fired, have no direction, or change nothing."""
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)


class Rows(NamedTuple):
    """Some tokens as an SAE's encoder reads them."""

    x: Float[Tensor, "token d"]
    layer: Int[Tensor, " token"]
    """Index of the layer that a RouteSAE read; 0 for an ordinary SAE."""
    target: Float[Tensor, "token d"] | None
    """The model's own activation behind ``x``; None where a RouteSAE mixes layers."""


def encoder_inputs(
    sae: SAE[Any],
    model: Any = None,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    activations: Float[Tensor, "*token d_in"] | None = None,
    *,
    progress: str | None = None,
    **options: Any,
) -> Iterator[Rows]:
    """What the encoder of ``sae`` reads, from a language model or from activations that are at hand.

    Args:
        sae: an inference SAE that reads one layer of each token.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM; with ``tokens``.
        tokens: token ids, see ``held_out_tokens``.
        activations: in their place, what the SAE's hook point gives: for a RouteSAE the stack of its layers.
        progress: caption of the progress bar, none without.
        options: go to ``read_batches``.

    Raises:
        ValueError: neither or both of text and activations, or what does not fit the SAE; at once.
    """
    check_source(sae, model, tokens, activations, options)
    if activations is not None:
        return _of_activations(sae, activations, progress)
    subjects = subjects_of({"sae": sae}, model)
    assert tokens is not None
    batches = read_batches(subjects, model, tokens, progress=progress, **options)
    return (_of_batch(batch.read(subjects["sae"]), batch.keep) for batch in batches)


def check_source(sae: Any, model: Any, tokens: Any, activations: Any, options: dict[str, Any]) -> None:
    """Raise a ValueError unless there is an SAE, and either a model with tokens or fitting activations."""
    if not isinstance(sae, SAE):
        raise ValueError(f"expected an SAE, got {type(sae).__name__}")
    if (activations is None) == (model is None and tokens is None) or (model is None) != (tokens is None):
        raise ValueError("expected either a model and tokens, or activations")
    if activations is None:
        return
    if options:
        raise ValueError(f"{', '.join(options)} go with a model and tokens, not with activations")
    if not isinstance(activations, Tensor):
        raise ValueError(f"expected activations as a tensor, got {type(activations).__name__}")
    if activations.ndim < 2 or activations.shape[-1] != sae.cfg.d_in or not activations.numel():
        raise ValueError(
            f"expected activations of shape (token, {sae.cfg.d_in}) for this {type(sae).__name__}, got "
            f"{tuple(activations.shape)}"
        )
    if not torch.isfinite(activations).all():
        raise ValueError("the activations hold numbers that are not finite")


def _of_activations(sae: SAE[Any], activations: Tensor, progress: str | None) -> Iterator[Rows]:
    parts = activations.flatten(0, -2).split(ROWS_AT_ONCE)
    for draw, part in enumerate(tqdm(parts, desc=progress, unit="batch", disable=progress is None)):
        part = part.to(sae.W_dec.device, sae.dtype)
        if isinstance(sae, RouteSAE):
            route = sae.route(part, draw=draw)
            own = split_layers(part, sae.cfg.n_layers)[
                torch.arange(len(part), device=part.device), route.layer
            ]
            mixed = sae.cfg.routing in ("soft", "top2")
            yield Rows(route.input, route.layer, None if mixed else own)
        else:
            yield Rows(part, torch.zeros(len(part), dtype=torch.long, device=part.device), part)


def _of_batch(reading: Any, keep: Tensor) -> Rows:
    x = reading.x if reading.route is None else reading.route.input
    return Rows(x[keep], reading.layer[keep], None if reading.target is None else reading.target[keep])


def encode(sae: Any, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d_sae"]:
    """Latents of what :func:`encoder_inputs` gave."""
    latents: Tensor = getattr(sae, "encode_routed", sae.encode)(x)
    return latents


@torch.no_grad()
def insertion_effects(
    small: SAE[Any],
    large: SAE[Any],
    model: Any = None,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    *,
    activations: Float[Tensor, "*token d_in"] | None = None,
    sample: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> InsertionEffects:
    """How each latent of ``large``, inserted alone, changes the mean squared error of ``small``; one pass for all.

    Args:
        small: as :class:`~routesae_lens.analysis.stitched_sae.Stitching` takes it.
        large: likewise.
        model: the language model that both read; with ``tokens``.
        tokens: token ids, see ``held_out_tokens``.
        activations: in their place, what the hook point of the SAEs gives.
        sample: try so many latents of ``large`` alone, drawn with ``seed``; all by default.
        seed: of the sample.
        progress: show a progress bar.
        options: ``batch_size``, ``exclude_special_tokens`` and ``exclude_first_position``, as ``read_batches``.

    Raises:
        ValueError: SAEs that cannot be stitched, a sample below 1 or larger than ``large``, or a wrong source.
    """
    ours, theirs = stitchable_pair(small, large)
    width = theirs.cfg.d_sae
    if sample is not None and (
        isinstance(sample, bool) or not isinstance(sample, int) or not 1 <= sample <= width
    ):
        raise ValueError(f"sample must be 1 to the {width} latents of the larger SAE, got {sample!r}")
    chosen = torch.arange(width)
    if sample is not None:
        chosen = torch.tensor(sorted(random.Random(seed).sample(range(width), sample)))
    rows = encoder_inputs(
        ours, model, tokens, activations, progress="insertions" if progress else None, **options
    )
    directions = theirs.W_dec[chosen.to(theirs.W_dec.device)]
    count, error = 0, 0.0
    along, square, fires = (torch.zeros(len(chosen), dtype=torch.float64) for _ in range(3))
    for batch in rows:
        for x in batch.x.split(ROWS_AT_ONCE):
            unit = _output_unit(ours, x)
            residual = x - ours.decode(encode(ours, x))
            acts = encode(theirs, x)[:, chosen.to(x.device)]
            wide = acts.double() * unit.double()
            along += (wide * (residual @ directions.T).double()).sum(0).cpu()
            square += wide.pow(2).sum(0).cpu()
            fires += (acts > 0).sum(0).cpu()
            error += residual.double().pow(2).sum().item()
            count += len(x)
    norms = directions.double().pow(2).sum(-1).cpu()
    return InsertionEffects(
        tokens=count,
        mse=error / count,
        latents=chosen,
        change=(square * norms - 2 * along) / count,
        fires=fires.long(),
    )


def _output_unit(sae: SAE[Any], x: Float[Tensor, "token d"]) -> Float[Tensor, "token 1"]:
    """By how much SAELens stretches each token's reconstruction when it undoes a run-time normalisation."""
    ends = []
    for end in (torch.zeros_like(x), torch.ones_like(x)):
        sae.run_time_activation_norm_fn_in(x)  # (it leaves behind what undoing it takes away)
        ends.append(sae.run_time_activation_norm_fn_out(end))
    return (ends[1] - ends[0])[:, :1]


def choose_threshold(matches: BestMatches, effects: InsertionEffects) -> ThresholdChoice:
    """The cosine that best tells insertions that lower the error from those that raise it.

    Thresholds 0, 0.01 ... 1 are tried; a latent whose best cosine is below the threshold is foretold to lower the
    error (it is novel). Latents that never fired, have no direction or change nothing say nothing.

    Args:
        matches: of the larger SAE in the smaller: ``split_latents(small, large).large``.
        effects: of :func:`insertion_effects`.

    Raises:
        ValueError: effects of latents that ``matches`` does not know.
    """
    if int(effects.latents.max()) >= len(matches.cosines):
        raise ValueError(
            f"effects of latent {int(effects.latents.max())}, but matches of {len(matches.cosines)} latents"
        )
    cosines, alive = matches.cosines[effects.latents], matches.latents[effects.latents] >= 0
    says = alive & (effects.fires > 0) & (effects.change != 0)
    # (float32, as in the split: there a cosine of 0.7 is the threshold 0.7)
    cosines, lowers = cosines[says], effects.change[says] < 0
    lowering, raising = int(lowers.sum()), int((~lowers).sum())
    thresholds = [step / STEPS for step in range(STEPS + 1)]
    counts = {
        "lowering": lowering,
        "raising": raising,
        "left_out": int((~says).sum()),
        "tokens": effects.tokens,
    }
    if not lowering or not raising:
        return ThresholdChoice(None, None, thresholds, [], **counts)
    accuracies = [
        (((cosines < at) & lowers).sum() / lowering + ((cosines >= at) & ~lowers).sum() / raising).item() / 2
        for at in thresholds
    ]
    best = [i for i, accuracy in enumerate(accuracies) if accuracy == max(accuracies)]
    middle = best[len(best) // 2]
    return ThresholdChoice(thresholds[middle], accuracies[middle], thresholds, accuracies, **counts)
