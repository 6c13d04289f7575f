"""SAE stitching (Leask et al., 2025): error, L0 and KL on the way from a smaller SAE to a larger one.

Novel latents are inserted first, which should lower the error; then groups of reconstruction latents are swapped,
which should make the code sparser at about the same error; then what is left of the smaller SAE goes out. See
``latent_split.py`` for who is novel, and ``stitched_sae.py`` for the SAEs between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.analysis.insertion import Rows, check_source, encode, encoder_inputs
from routesae_lens.analysis.latent_split import THRESHOLD, LatentSplit
from routesae_lens.analysis.metrics import LayerSums
from routesae_lens.analysis.stitched_sae import Stitching
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE

MEASURES = ("l0", "norm_mse", "mse", "explained_variance", "kl", "kl_stderr", "delta_ce")


@dataclass(frozen=True)
class StitchingStep:
    """A stitched SAE and what was measured of it; see :class:`Evaluation` for the measures."""

    move: int
    """Moves behind it."""
    phase: str
    """Of the last move: "small" (none), "insert", "swap" or "rest"."""
    inserted: int
    """Novel latents in it."""
    swapped: int
    """Groups that were swapped."""
    of_small: int
    """Latents of the smaller SAE in it."""
    of_large: int
    """Latents of the larger SAE in it."""
    l0: float
    norm_mse: float
    mse: float | None
    """Squared error in the units of the model; None where a RouteSAE mixes layers."""
    explained_variance: float
    kl: float | None = None
    """None without a language model, as the next two."""
    kl_stderr: float | None = None
    """None with a single sequence, too."""
    delta_ce: float | None = None
    """None with no two kept tokens in a row, too."""

    @property
    def d_sae(self) -> int:
        """Its width."""
        return self.of_small + self.of_large


@dataclass(frozen=True)
class StitchingCurve:
    """What :func:`stitch` measured on the way from the smaller SAE to the larger one."""

    steps: list[StitchingStep]
    tokens: int
    """Tokens that were encoded and averaged over."""
    widths: tuple[int, int]
    threshold: float
    novel: int
    reconstruction: int
    groups: int
    unmatched: int
    """Latents of the smaller SAE without counterpart."""
    phase_ends: dict[str, int]
    """Moves after which each phase is over."""
    order: str
    seed: int
    reaches_large: bool
    """Whether the last step is the larger SAE (``swap=True``)."""
    split: LatentSplit = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the split, as JSON takes it (``split.to_dict()`` has that)."""
        kept = {name: value for name, value in self.__dict__.items() if name not in ("split", "steps")}
        steps = [asdict(step) | {"d_sae": step.d_sae} for step in self.steps]
        return kept | {"widths": list(self.widths), "steps": steps}


@torch.no_grad()
def stitch(
    small: SAE[Any],
    large: SAE[Any],
    model: Any = None,
    tokens: Int[Tensor, "sequence pos"] | None = None,
    *,
    activations: Float[Tensor, "*token d_in"] | None = None,
    threshold: float = THRESHOLD,
    split: LatentSplit | None = None,
    order: str = "random",
    seed: int = 0,
    swap: bool = True,
    steps: int = 20,
    at_once: int = 8,
    progress: bool = True,
    **options: Any,
) -> StitchingCurve:
    """Insert novel latents of ``large`` into ``small``, swap groups, and follow error, L0 and KL.

    Every step is measured as any other SAE, by :func:`evaluate_all`; with ``activations`` alone there is no KL,
    and the other measures are the same. To have the SAE of a step, ask ``Stitching(small, large, ...).sae(n)`` with
    the same threshold, order and seed.

    Args:
        small: a ReLU or JumpReLU SAE, or a RouteSAE of such (``to_jumprelu`` makes them of TopK ones).
        large: another on the same activations.
        model: the language model that both read; with ``tokens``.
        tokens: held-out token ids, see ``held_out_tokens``.
        activations: in their place, what the hook point of the SAEs gives.
        threshold: cosine from which on a latent is a reconstruction latent.
        split: of :func:`split_latents`, where known already.
        order: "random", or "similarity" (the most novel first, then the most similar groups first).
        seed: of "random".
        swap: go on to the larger SAE after the insertions.
        steps: about so many steps are measured, evenly spaced over the moves, beside the first and the end of
            each phase.
        at_once: SAEs in memory at a time. They share each clean pass of the language model.
        progress: show progress bars.
        options: of :func:`evaluate_all`, such as ``batch_size``. (``zero_ablation`` is off by default.)

    Raises:
        ValueError: as :class:`Stitching`, ``insertion_effects`` and :func:`evaluate_all`; nothing to measure.
    """
    for name, number in (("steps", steps), ("at_once", at_once)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer, 1 or more; got {number!r}")
    check_source(small, model, tokens, activations, options)
    way = Stitching(
        small, large, threshold=threshold, split=split, order=order, seed=seed, swap=swap, progress=progress
    )
    cuts = _cuts(way, steps)
    found: list[StitchingStep] = []
    counted = 0
    with tqdm(total=len(cuts), desc="stitch", unit="step", disable=not progress) as bar:
        for group in (cuts[i : i + at_once] for i in range(0, len(cuts), at_once)):
            saes = [way.sae(cut) for cut in group]
            if activations is None:
                measured, counted = _with_model(saes, model, tokens, options)
            else:
                measured, counted = _on_activations(saes, activations)
            found += [_step(way, cut, one) for cut, one in zip(group, measured, strict=True)]
            bar.update(len(group))
    return StitchingCurve(
        steps=found,
        tokens=counted,
        widths=way.split.widths,
        threshold=way.split.threshold,
        novel=len(way.split.novel),
        reconstruction=len(way.split.reconstruction),
        groups=len(way.split.groups),
        unmatched=len(way.split.unmatched),
        phase_ends=way.phase_ends,
        order=order,
        seed=seed,
        reaches_large=swap,
        split=way.split,
    )


def _cuts(way: Stitching, steps: int) -> list[int]:
    even = (round(len(way) * i / steps) for i in range(steps + 1))
    return sorted({*even, *way.phase_ends.values()})


def _step(way: Stitching, cut: int, measured: dict[str, Any]) -> StitchingStep:
    done = [move.phase for move in way.moves[:cut]]
    ours, theirs = way.latents(cut)
    return StitchingStep(
        move=cut,
        phase=way.phase(cut),
        inserted=done.count("insert"),
        swapped=done.count("swap"),
        of_small=len(ours),
        of_large=len(theirs),
        **measured,
    )


def _with_model(
    saes: Sequence[SAE[Any]], model: Any, tokens: Any, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], int]:
    named = {str(i): sae for i, sae in enumerate(saes)}
    found = evaluate_all(named, model, tokens, **{"zero_ablation": False, "progress": False, **options})
    measured = [{name: _known(getattr(one, name)) for name in MEASURES} for one in found.values()]
    return measured, found["0"].tokens


def _known(value: float | None) -> float | None:
    """``value``, or None where :func:`evaluate_all` has NaN: too little text for it."""
    return None if value is None or math.isnan(value) else value


def _on_activations(saes: Sequence[SAE[Any]], activations: Tensor) -> tuple[list[dict[str, Any]], int]:
    """L0, NormMSE, MSE and explained variance as :func:`evaluate_all` defines them, without a language model."""
    tallies = [_Tally(sae) for sae in saes]
    # (all read the same input: their router is the smaller SAE's)
    for rows in encoder_inputs(saes[0], activations=activations):
        for tally in tallies:
            tally.add(rows)
    return [tally.result() for tally in tallies], tallies[0].tokens


class _Tally:
    def __init__(self, sae: SAE[Any]):
        self.sae, self.tokens, self.ratio, self.fired = sae, 0, 0.0, 0
        routed = isinstance(sae, RouteSAE)
        self.sums, self.raw = (LayerSums(sae.cfg.n_layers if routed else 1) for _ in range(2))

    def add(self, rows: Rows) -> None:
        x = rows.x
        latents = encode(self.sae, x)
        out = self.sae.decode(latents)
        z = x
        if rows.target is not None:  # (standardising undoes a router's p, too)
            stats = standardize(x)
            z, out = stats.x, (out - stats.mean) / stats.std
        z = z.double()
        error = (z - out.double()).pow(2).sum(-1)
        self.sums.add(z, error, rows.layer)
        if rows.target is not None:
            scale = standardize(rows.target).std.squeeze(-1).double()
            self.raw.add(rows.target, error * scale.pow(2), rows.layer)
        self.ratio += (error / z.pow(2).sum(-1).clamp_min(1e-12)).sum().item()
        self.fired += int((latents > 0).sum())
        self.tokens += len(x)

    def result(self) -> dict[str, float | None]:
        return {
            "l0": self.fired / self.tokens,
            "norm_mse": self.ratio / self.tokens,
            "mse": None if self.raw.sum is None else self.raw.mse,
            "explained_variance": self.sums.explained(self.sums.variance, False),
        }
