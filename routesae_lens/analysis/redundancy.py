"""How often does a dictionary say the same thing twice? (Scale SAE, section 3.3.1 and figure 6a.)

Two measures on the weights alone: the share of latents that have a near copy (:func:`feature_redundancy`), and for SAEs
made of experts whether the copies sit within an expert or in others (:func:`expert_similarity`). What tokens activate
is measured in ``activation_overlap`` and ``expert_use``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.geometry import (
    BestMatches,
    best_matches,
    check_pair,
    decoder_directions,
    encoder_directions,
    nearest_within,
)

NEAR_COPY = 0.9
"""A cosine above this is a near copy: the paper's threshold."""
EDGES = tuple(i / 50 for i in range(-50, 51))
"""Cosines between the bars of a histogram of best cosines, -1 to 1."""

Part = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Redundancy:
    """How many latents of a dictionary have a near copy in it."""

    threshold: int | float
    """A best cosine strictly above this is a near copy."""
    part: Part
    layer: int | None
    """The block of a Crosscoder whose directions were compared; None for whole rows."""
    d_sae: int
    n: int
    """Latents that were judged, and among which copies were looked for."""
    left_out: int
    """Latents that were not: rows of zeros, and those that ``living`` leaves out. ``n + left_out`` is ``d_sae``."""
    redundant: int
    """Latents with a near copy."""
    share: float
    """``redundant / n``."""
    mean_best: float
    """Mean of the best cosines."""
    best: BestMatches = field(repr=False)
    """Every latent's best match among the others, cosine 0 and latent -1 for those left out."""
    histogram: tuple[int, ...]
    """Latents by best cosine, between :data:`EDGES`. A bar holds its lower edge, the last one both."""

    @property
    def near_copies(self) -> Bool[Tensor, " d_sae"]:
        """Which latents have a near copy."""
        return (self.best.latents >= 0) & (self.best.cosines > self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-latent matches, ready for strict JSON."""
        kept = {name: value for name, value in self.__dict__.items() if name != "best"}
        return kept | {"edges": list(EDGES), "histogram": list(self.histogram)}


def feature_redundancy(
    sae: Any,
    *,
    threshold: int | float = NEAR_COPY,
    part: Part = "decoder",
    layer: int | None = None,
    living: Bool[Tensor, " d_sae"] | None = None,
    progress: bool = True,
) -> Redundancy:
    """The share of latents whose best cosine to another latent exceeds ``threshold`` (Scale SAE, section 3.3.1).

    Cosines come in blocks (see ``geometry``), never as a whole, in float32. The number grows with the width, since a
    wider dictionary has more candidates, and an untrained one of few dimensions has near copies by chance: compare
    at equal width and ``d``.

    Args:
        sae: any SAE of SAELens or of this package, in training or not, or a matrix of directions ``(d_sae, d)``. Of a
            RouteSAE the shared decoder, of a Crosscoder the rows of all layers joined (see ``decoder_directions``).
        threshold: -1 to 1; strictly above it is a near copy.
        part: compare decoder rows, or encoder columns.
        layer: a block number of a Crosscoder, whose directions alone are compared.
        living: latents that count, for instance ``firing.counts > 0``. By default all whose row is not zero.
        progress: show a progress bar.

    Raises:
        ValueError: a threshold outside -1 to 1, weights that are not finite, fewer than two living latents, or what
            ``decoder_directions`` raises.
    """
    _check_threshold(threshold)
    rows = _directions(sae, part, layer)
    judged = _living(rows, living)
    n = int(judged.sum())
    if n < 2:
        raise ValueError(f"a near copy needs two living latents or more, got {n} of {len(rows)}")
    best = _best_within(rows, judged, progress)
    cosines = best.living
    redundant = int((cosines > threshold).sum())
    return Redundancy(
        threshold=threshold,
        part=part,
        layer=layer,
        d_sae=len(rows),
        n=n,
        left_out=len(rows) - n,
        redundant=redundant,
        share=redundant / n,
        mean_best=cosines.double().mean().item(),
        best=best,
        histogram=_histogram(cosines),
    )


@dataclass(frozen=True)
class ExpertSimilarity:
    """Near copies within experts against near copies in other experts.

    Shares and means are means over experts (intra) and over ordered pairs of experts (inter), each counting the same.
    An expert looks for matches among ``width`` latents in either case (less itself), so the two compare.
    """

    threshold: int | float
    part: Part
    layer: int | None
    n_experts: int
    width: int
    """Latents of an expert."""
    left_out: int
    """Latents without a direction, and those that ``living`` leaves out."""
    experts_left_out: tuple[int, ...]
    """Experts with fewer than two living latents; they are in no comparison."""
    intra_share: float
    """Share of an expert's latents whose best match in the same expert exceeds the threshold."""
    intra_mean: float
    """Mean best cosine within an expert."""
    inter_share: float
    """Share of an expert's latents whose best match in one other expert exceeds the threshold."""
    inter_mean: float
    """Mean best cosine with another expert."""
    inter_share_stderr: float | None
    """What comparing only some of the pairs leaves open; 0 if all were, None with a single one. It says nothing about
    other seeds of training."""
    pairs: int
    """Ordered pairs of experts that were compared."""
    all_pairs: bool
    seed: int
    intra_shares: Float[Tensor, " n_experts"] = field(repr=False)
    """By expert, float64; NaN for experts left out."""
    pair_experts: Int[Tensor, "pair 2"] = field(repr=False)
    """The expert whose latents look for a match, and the one they look in."""
    pair_shares: Float[Tensor, " pair"] = field(repr=False)
    intra_histogram: tuple[int, ...]
    """Latents by best cosine within their expert, between :data:`EDGES`."""
    inter_histogram: tuple[int, ...]
    """Latents of all pairs by best cosine, likewise."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as strict JSON takes them, pair by pair; None for experts left out."""
        shares = [None if share != share else share for share in self.intra_shares.tolist()]
        return self.__dict__ | {
            "experts_left_out": list(self.experts_left_out),
            "intra_shares": shares,
            "pair_experts": self.pair_experts.tolist(),
            "pair_shares": self.pair_shares.tolist(),
            "edges": list(EDGES),
            "intra_histogram": list(self.intra_histogram),
            "inter_histogram": list(self.inter_histogram),
        }


def expert_similarity(
    sae: Any,
    *,
    experts: int | None = None,
    threshold: int | float = NEAR_COPY,
    pairs: int | None = None,
    seed: int = 0,
    part: Part = "decoder",
    layer: int | None = None,
    living: Bool[Tensor, " d_sae"] | None = None,
    progress: bool = True,
) -> ExpertSimilarity:
    """Intra-expert against inter-expert similarity of features (Scale SAE, section 3.3.1 and figure 6a).

    Intra: the best match of each latent among the others of its expert. Inter: its best match in *one* other expert, a
    set of the same size, averaged over pairs of experts. The paper says no more than "comparing the feature sets of
    randomly sampled experts of the same size"; all pairs are the exact mean that such a sample estimates. (The best
    match in *any* other expert would be over N - 1 times as many candidates; ``feature_redundancy`` has that of all.)

    Args:
        sae: as of :func:`feature_redundancy`. Expert i holds the latents ``i * width`` to ``(i + 1) * width - 1``.
        experts: how many equal groups; by default ``sae.cfg.n_experts``. Any dictionary can be cut so: groups of an SAE
            without experts are the null case, in which intra and inter are alike.
        threshold: -1 to 1; strictly above it is a near copy.
        pairs: compare this many of the N (N - 1) ordered pairs, drawn without repetition; by default all. (Where
            experts are left out, at most the pairs of the others.)
        seed: of that draw.
        part, layer, living, progress: as of :func:`feature_redundancy`.

    Raises:
        ValueError: no experts or a single one, a width that they do not divide, experts of one latent, pairs below one
            or more than there are, fewer than two experts with two living latents, or what ``feature_redundancy``
            raises.
    """
    _check_threshold(threshold)
    rows = _directions(sae, part, layer)
    n_experts = experts_of(sae) if experts is None else experts
    width = expert_width(len(rows), n_experts)
    _check_pairs(pairs, n_experts)
    if n_experts < 2:
        raise ValueError("a single expert has no other to compare with")
    if width < 2:
        raise ValueError(
            f"experts of one latent have no similarity within: {n_experts} of {len(rows)} latents"
        )
    judged = _living(rows, living).view(n_experts, width)
    enough = judged.sum(1) >= 2
    compared = enough.nonzero().flatten()
    if len(compared) < 2:
        raise ValueError(
            f"expected two experts or more with two living latents, got {len(compared)} of {n_experts}"
        )
    chosen = compared[drawn_pairs(len(compared), pairs, seed)]
    mask = judged.to(rows.device)

    def block(expert: int) -> Tensor:
        return rows[expert * width : (expert + 1) * width][mask[expert]]

    intra = torch.full((n_experts,), torch.nan, dtype=torch.float64)
    intra_means, within, across = [], [], []
    shares, means = torch.zeros(2, len(chosen), dtype=torch.float64)
    for expert in compared.tolist():
        cosines = nearest_within(block(expert), progress=False).cosines[:, 0]
        intra[expert] = (cosines > threshold).double().mean()
        intra_means.append(cosines.double().mean().item())
        within.append(_counts(cosines))
    # All that look in one expert at once: pair by pair, small experts would take most of the time to be set up.
    looked_in = chosen[:, 1].unique().tolist()
    for j in tqdm(looked_in, desc="similarity of experts", unit="expert", disable=not progress):
        places = (chosen[:, 1] == j).nonzero().flatten().tolist()
        looking = [block(int(chosen[place, 0])) for place in places]
        cosines = best_matches(torch.cat(looking), block(j), progress=False).cosines
        across.append(_counts(cosines))
        for place, own in zip(places, cosines.split([len(one) for one in looking]), strict=True):
            shares[place], means[place] = (own > threshold).double().mean(), own.double().mean()
    n_pairs, there = len(chosen), len(compared) * (len(compared) - 1)
    return ExpertSimilarity(
        threshold=threshold,
        part=part,
        layer=layer,
        n_experts=n_experts,
        width=width,
        left_out=int((~judged).sum()),
        experts_left_out=tuple((~enough).nonzero().flatten().tolist()),
        intra_share=intra[compared].mean().item(),
        intra_mean=float(np.mean(intra_means)),
        inter_share=shares.mean().item(),
        inter_mean=means.mean().item(),
        inter_share_stderr=_stderr(shares, there),
        pairs=n_pairs,
        all_pairs=n_pairs == there,
        seed=seed,
        intra_shares=intra,
        pair_experts=chosen,
        pair_shares=shares,
        intra_histogram=tuple(np.sum(within, axis=0).tolist()),
        inter_histogram=tuple(np.sum(across, axis=0).tolist()),
    )


def experts_of(sae: Any) -> int:
    """How many experts an SAE has.

    Raises:
        ValueError: it is made of none.
    """
    n_experts = getattr(getattr(sae, "cfg", None), "n_experts", None)
    if n_experts is None:
        raise ValueError(f"a {type(sae).__name__} has no experts (no n_experts in its config)")
    return int(n_experts)


def expert_width(d_sae: int, n_experts: int) -> int:
    """Latents of each of ``n_experts`` equal groups.

    Raises:
        ValueError: no integer, below 1, or groups that are not equal.
    """
    if isinstance(n_experts, bool) or not isinstance(n_experts, int) or n_experts < 1:
        raise ValueError(f"experts must be an integer, 1 or more; got {n_experts!r}")
    if d_sae % n_experts:
        raise ValueError(f"{n_experts} experts do not divide {d_sae} latents into equal groups")
    return d_sae // n_experts


def _check_threshold(threshold: int | float) -> None:
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not -1 <= threshold <= 1:
        raise ValueError(f"threshold is a cosine, between -1 and 1; got {threshold!r}")


def _directions(sae: Any, part: Part, layer: int | None) -> Float[Tensor, "d_sae d"]:
    if part not in ("decoder", "encoder"):
        raise ValueError(f'part must be "decoder" or "encoder", got {part!r}')
    if isinstance(sae, Tensor):
        if part != "decoder" or layer is not None:
            raise ValueError("of a matrix the rows are compared: part and layer need an SAE")
        rows = sae.detach()
    else:
        rows = (decoder_directions if part == "decoder" else encoder_directions)(sae, layer)
    check_pair(rows, rows)
    return rows


def _living(rows: Tensor, living: Tensor | None) -> Bool[Tensor, " d_sae"]:
    """Which latents count, on the CPU."""
    directed = rows.ne(0).any(dim=1).cpu()
    if living is None:
        return directed
    if not isinstance(living, Tensor):
        raise ValueError(f"living must be a mask of {len(rows)} latents, got {type(living).__name__}")
    if living.dtype != torch.bool or living.shape != (len(rows),):
        raise ValueError(
            f"living must say yes or no of {len(rows)} latents, got {living.dtype} of shape {tuple(living.shape)}"
        )
    return directed & living.cpu()


def _best_within(rows: Tensor, judged: Tensor, progress: bool) -> BestMatches:
    ids = judged.nonzero().flatten()
    asked = None if len(ids) == len(rows) else ids.tolist()
    found = nearest_within(rows, latents=asked, among=judged, progress=progress)
    cosines, latents = torch.zeros(len(rows)), torch.full((len(rows),), -1)
    cosines[ids], latents[ids] = found.cosines[:, 0], found.latents[:, 0]
    return BestMatches(cosines, latents)


def _check_pairs(pairs: int | None, n: int) -> None:
    there = n * (n - 1)
    if pairs is not None and (
        isinstance(pairs, bool) or not isinstance(pairs, int) or not 1 <= pairs <= there
    ):
        raise ValueError(f"pairs must be an integer, 1 to {there} for {n} experts; got {pairs!r}")


def drawn_pairs(n: int, pairs: int | None, seed: int) -> Int[Tensor, "pair 2"]:
    """All ordered pairs of ``n``, or as many of them as asked for and there."""
    index = torch.arange(n * (n - 1))
    if pairs is not None and pairs < len(index):
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))
        index = order[:pairs].sort().values
    first, second = index // (n - 1), index % (n - 1)
    return torch.stack([first, second + (second >= first)], dim=1)


def _stderr(drawn: Tensor, there: int) -> float | None:
    """Standard error of a mean of values drawn from ``there`` ones without repetition."""
    n = len(drawn)
    if n == there:
        return 0.0
    return None if n == 1 else drawn.std().item() * ((1 - n / there) / n) ** 0.5


def _counts(cosines: Tensor) -> np.ndarray:
    return np.histogram(cosines.double().numpy(), np.array(EDGES))[0]


def _histogram(cosines: Tensor) -> tuple[int, ...]:
    return tuple(_counts(cosines).tolist())
