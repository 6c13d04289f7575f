"""A map of a feature's neighbourhood over several dictionaries (Llama Scope, figure 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from routesae_lens.analysis.geometry import nearest_across, nearest_within

FEWEST = 4
"""UMAP's spectral start needs more points than it has dimensions, by two."""


@dataclass(frozen=True)
class MapPoint:
    dictionary: str
    latent: int
    cosine: float
    """With the feature that the map is about."""
    x: float
    y: float


@dataclass(frozen=True)
class FeatureMap:
    """Latents near a feature, in two dimensions."""

    dictionary: str
    latent: int
    points: list[MapPoint]
    """The feature itself first, then its neighbours by dictionary, the nearest first."""
    smallest_cosine: float
    """Of any two of the points; 0.28 in the paper's figure."""
    n_neighbors: int
    min_dist: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them; :meth:`from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeatureMap:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: a field is missing, there are no points, or the first is not the feature.
        """
        if missing := [name for name in cls.__dataclass_fields__ if name not in data]:
            raise ValueError(f"a feature map lacks {', '.join(missing)}")
        points = [
            MapPoint(
                str(one["dictionary"]),
                int(one["latent"]),
                *(float(one[name]) for name in ("cosine", "x", "y")),
            )
            for one in data["points"]
        ]
        if not all(math.isfinite(value) for one in points for value in (one.cosine, one.x, one.y)):
            raise ValueError("a point of the feature map is not finite")
        found = cls(
            str(data["dictionary"]), int(data["latent"]), points, float(data["smallest_cosine"]),
            int(data["n_neighbors"]), float(data["min_dist"]), int(data["seed"]),
        )  # fmt: skip
        if not points or (points[0].dictionary, points[0].latent) != (found.dictionary, found.latent):
            raise ValueError(
                f"the first point of the map is not latent {found.latent} of {found.dictionary!r}"
            )
        return found


def feature_map(
    dictionaries: Mapping[str, Float[Tensor, "_ d"]],
    neighbours: Mapping[str, int],
    *,
    dictionary: str,
    latent: int,
    n_neighbors: int = 15,
    min_dist: float = 0.1,
    seed: int = 0,
) -> FeatureMap:
    """A latent and those nearest to it in each dictionary, laid out by UMAP on the cosine.

    The paper takes 6 latents of its L15R-8x-Vanilla, 6 of L15R-8x-TopK (where the chosen feature is from) and
    24 of L15R-32x-TopK, and leaves open whether the feature is one of its own 6. Here it comes on top of them.

    Args:
        dictionaries: decoder rows by name, see ``decoder_directions``.
        neighbours: how many latents to take of each of them; all its living ones where it has fewer.
        dictionary: which of them the feature is from.
        latent: its number there.
        n_neighbors, min_dist: UMAP's; ``n_neighbors`` is lowered to the number of the other points where these
            are fewer.
        seed: of UMAP. The same seed and versions give the same map.

    Raises:
        ImportError: umap-learn is not installed.
        ValueError: unknown names or latents, a feature without direction, or fewer than :data:`FEWEST` points.
    """
    if dictionary not in dictionaries:
        raise ValueError(f"there is no dictionary {dictionary!r}; there are {', '.join(dictionaries)}")
    if unknown := sorted(neighbours.keys() - dictionaries.keys()):
        raise ValueError(
            f"neighbours of dictionaries that are not there: {', '.join(unknown)}; there are {', '.join(dictionaries)}"
        )
    if negative := {name: n for name, n in neighbours.items() if n < 0}:
        raise ValueError(f"neighbours must be 0 or more of each dictionary, got {negative}")
    if n_neighbors < 2 or not 0 <= min_dist <= 1:  # (1 is UMAP's spread)
        raise ValueError(
            f"expected n_neighbors of 2 or more and min_dist from 0 to 1, got {n_neighbors} and {min_dist}"
        )
    home = dictionaries[dictionary]
    if not 0 <= latent < len(home):
        raise ValueError(f"latent must be 0 to {len(home) - 1} in {dictionary!r}, got {latent}")
    feature = home[latent : latent + 1].detach()
    if not bool(feature.any()):
        raise ValueError(f"latent {latent} of {dictionary!r} is a row of zeros and has no neighbours")
    umap = _umap()

    found, rows = [(dictionary, latent, 1.0)], [feature.double().cpu()]
    for name, n in neighbours.items():
        if n == 0:
            continue
        if name == dictionary:
            near = nearest_within(home, n, latents=[latent], progress=False)
        else:
            near = nearest_across(feature, dictionaries[name], n, progress=False)
        pairs = zip(near.latents[0].tolist(), near.cosines[0].tolist(), strict=True)
        here = [(name, other, cosine) for other, cosine in pairs if other >= 0]
        found += here
        rows.append(dictionaries[name][[other for _, other, _ in here]].detach().double().cpu())
    if len(found) < FEWEST:
        raise ValueError(f"a map needs {FEWEST} points or more, got {len(found)}; ask for more neighbours")
    directions = torch.nn.functional.normalize(torch.cat(rows), dim=-1, eps=0)
    n_neighbors = min(n_neighbors, len(found) - 1)
    layout = umap.UMAP(
        n_components=2, n_neighbors=n_neighbors, min_dist=min_dist, metric="cosine", random_state=seed,
        n_jobs=1,  # more would give up the seed
    ).fit_transform(directions.float().numpy())  # fmt: skip
    points = [
        MapPoint(*one, x=float(x), y=float(y)) for one, (x, y) in zip(found, layout.tolist(), strict=True)
    ]
    smallest = float((directions @ directions.T).min())
    return FeatureMap(dictionary, latent, points, smallest, n_neighbors, min_dist, seed)


def _umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise ImportError(
            "the map of features needs umap-learn: pip install 'routesae-lens[geometry]'"
        ) from error
    return umap
