"""How much of a dictionary another one has: the distribution of best matches (Llama Scope, 4.6 and figure 8)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from routesae_lens.analysis.geometry import (
    BestMatches,
    best_matches,
    check_pair,
    cosine_bound,
    count_living,
    random_dictionary,
)

STEPS = 400
"""Steps of the cosines from -1 to 1 at which a cumulative distribution is kept."""


@dataclass(frozen=True)
class FeatureSplitting:
    """How the latents of a wide dictionary spread over those of a narrow one, each counted at its best match."""

    threshold: float
    """A cosine from here on is a match."""
    new: float
    """Share of the wide dictionary's living latents that match none: features that the narrow one lacks."""
    children: dict[int, int]
    """How many of the narrow dictionary's latents are the best match of 0, 1, 2 ... wide ones.

    Two or more is a feature that split; 0 one that the wide dictionary lost, or that has no direction.
    """


@dataclass(frozen=True)
class MatchDistribution:
    """Cumulative distribution of best matches, beside that of random dictionaries (Llama Scope, figure 8).

    It is one-sided: every latent of the first dictionary looks for its match in the second.
    """

    names: tuple[str, str]
    widths: tuple[int, int]
    dead: tuple[int, int]
    """Latents of each that have no direction; they are left out."""
    d: int
    """Length of the rows, D in the paper."""
    cosine: list[float]
    """:data:`STEPS` + 1 cosines from -1 to 1."""
    share: list[float]
    """Share of the first dictionary's latents whose best match is at most this similar."""
    random: list[list[float]]
    """The same of random dictionaries with as many rows, one list for each seed."""
    seeds: list[int]
    bound: float
    """:func:`cosine_bound` of the wider dictionary; from 1 on it says nothing."""
    quantile: float
    random_quantile: list[float]
    """This quantile of the random best matches, for each seed."""
    at_bound: FeatureSplitting
    at_random: FeatureSplitting
    """Splitting with the bound as threshold (from 1 on every latent is new), and with the mean random quantile."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MatchDistribution:
        """What :meth:`to_dict` gave, also after JSON made its keys text.

        Raises:
            ValueError: a field is missing, or lists that belong together differ in length.
        """
        missing = [name for name in cls.__dataclass_fields__ if name not in data]
        if missing:
            raise ValueError(f"a match distribution lacks {', '.join(missing)}")
        values = {name: data[name] for name in cls.__dataclass_fields__}
        for name, kind in (("names", str), ("widths", int), ("dead", int)):
            values[name] = tuple(map(kind, values[name]))
            if len(values[name]) != 2:
                raise ValueError(f"{name} must be of two dictionaries, got {data[name]!r}")
        for name in ("at_bound", "at_random"):
            one = dict(values[name])
            children = {int(n): int(count) for n, count in one["children"].items()}
            values[name] = FeatureSplitting(float(one["threshold"]), float(one["new"]), children)
        for name in ("cosine", "share", "random_quantile"):
            values[name] = [float(value) for value in values[name]]
        values["random"] = [[float(value) for value in curve] for curve in values["random"]]
        lists = [values["cosine"], values["share"], values["random_quantile"], *values["random"]]
        if not all(math.isfinite(value) for one in lists for value in one):
            raise ValueError("a match distribution holds a number that is not finite")
        values |= {"bound": float(data["bound"]), "quantile": float(data["quantile"])}
        lengths = {len(values["cosine"]), len(values["share"]), *map(len, values["random"])}
        if (
            len(lengths) > 1
            or len({len(values[name]) for name in ("random", "seeds", "random_quantile")}) > 1
        ):
            raise ValueError("lists of a match distribution differ in length")
        return cls(**values)


def match_distribution(
    W_from: Float[Tensor, "d_from d"],
    W_to: Float[Tensor, "d_to d"],
    *,
    names: tuple[str, str] = ("from", "to"),
    matches: BestMatches | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    quantile: float = 0.99,
    progress: bool = True,
) -> MatchDistribution:
    """How similar the best matches are, beside random dictionaries of the same size (Llama Scope, figure 8).

    The paper matches every latent of one dictionary (L15R-8x-TopK) with another of its width
    (L15R-8x-Vanilla); with a wide dictionary first and a narrow one second the same numbers say how much of
    the wide one is new. That share is ours: the paper shows new features by example only.

    Args:
        W_from: the dictionary whose latents look for a match, the wide one.
        W_to: the dictionary they look in.
        names: what the two are called.
        matches: of :func:`best_matches`, where known already.
        seeds: one pair of random dictionaries for each, with as many rows as the two have living latents. Their
            memory is that of the two dictionaries.
        quantile: of the random best matches, the second threshold for a match beside :func:`cosine_bound`.
        progress: show progress bars.

    Raises:
        ValueError: rows of different length, a dictionary without living latents, fewer than 2 latents in the
            wider one, no seeds or a repeated one, a quantile outside 0 to 1, other than two names, or
            ``matches`` of another width.
    """
    if isinstance(names, str) or len(names) != 2:
        raise ValueError(f"names must be of two dictionaries, got {names!r}")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must lie between 0 and 1, got {quantile}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different numbers from 0, one or more, got {list(seeds)}")
    check_pair(W_from, W_to)
    widths, d = (len(W_from), len(W_to)), W_from.shape[1]
    bound = cosine_bound(max(widths), d)
    living = (count_living(W_from), count_living(W_to))
    if 0 in living:
        raise ValueError(f"a dictionary without any living latent: {living} of {widths} rows are not zero")
    matches = best_matches(W_from, W_to, progress=progress) if matches is None else matches
    if len(matches.cosines) != widths[0]:
        raise ValueError(f"matches of {len(matches.cosines)} latents, the dictionary has {widths[0]}")
    curves, tails = [], []
    for seed in seeds:
        # Two seeds of their own, so that one dictionary is no copy of the other.
        rows, columns = (random_dictionary(n, d, 2 * seed + i) for i, n in enumerate(living))
        cosines = best_matches(rows.to(W_from.device), columns.to(W_from.device), progress=progress).cosines
        curves.append(cumulative(cosines))
        tails.append(_quantile(cosines, quantile))
    at_random = feature_splitting(matches, widths[1], math.fsum(tails) / len(tails))
    return MatchDistribution(
        names=names,
        widths=widths,
        dead=(widths[0] - living[0], widths[1] - living[1]),
        d=d,
        cosine=[-1 + 2 * i / STEPS for i in range(STEPS + 1)],
        share=cumulative(matches.living),
        random=curves,
        seeds=list(seeds),
        bound=bound,
        quantile=quantile,
        random_quantile=tails,
        at_bound=feature_splitting(matches, widths[1], bound),
        at_random=at_random,
    )


def feature_splitting(matches: BestMatches, d_to: int, threshold: float) -> FeatureSplitting:
    """Which latents are new and how many share a match, with cosines from ``threshold`` on as matches.

    Raises:
        ValueError: no latent has a direction, or a match beyond the ``d_to`` latents.
    """
    if not len(matches.living):
        raise ValueError("none of the latents has a direction")
    if int(matches.latents.max()) >= d_to:
        raise ValueError(f"a match is latent {int(matches.latents.max())}, but there are {d_to}")
    matched = matches.latents[(matches.latents >= 0) & (matches.cosines >= threshold)]
    children = Counter(torch.bincount(matched, minlength=d_to).tolist())
    new = len(matches.new(threshold)) / len(matches.living)
    return FeatureSplitting(threshold, new, dict(sorted(children.items())))


def cumulative(cosines: Float[Tensor, " latent"]) -> list[float]:
    """Share of ``cosines`` at or below each of the :data:`STEPS` + 1 cosines from -1 to 1.

    Raises:
        ValueError: no cosines.
    """
    if not len(cosines):
        raise ValueError("the distribution of no cosines was asked for")
    ordered = cosines.double().cpu().sort().values
    grid = torch.tensor([-1 + 2 * i / STEPS for i in range(STEPS + 1)], dtype=torch.float64)
    return (torch.searchsorted(ordered, grid, right=True).double() / len(ordered)).tolist()


def _quantile(cosines: Tensor, q: float) -> float:
    """The smallest cosine with a share ``q`` at or below it. (torch.quantile takes no more than 2^24 values.)"""
    ordered = cosines.double().sort().values
    return float(ordered[math.ceil(q * len(ordered)) - 1])
