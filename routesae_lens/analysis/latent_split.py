"""Which latents of a larger SAE are new, and which refine those of a smaller one (SAE stitching).

Leask et al. (2025), "Sparse autoencoders do not find canonical units of analysis": a latent of the larger SAE whose
decoder row is similar to one of the smaller is a *reconstruction* latent, any other one *novel*. Reconstruction
latents come in groups, the connected components of the graph in which similar latents of the two are joined: a
latent and those it split into, or several that share several.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from routesae_lens.analysis.geometry import BestMatches, best_matches, decoder_directions, pairs_from
from routesae_lens.saes.crosscoder import Crosscoded

THRESHOLD = 0.7
"""That of Leask et al., found from what inserting latents did to the error (see ``insertion.choose_threshold``)."""


@dataclass(frozen=True)
class LatentGroup:
    """A connected component of the similarity graph that has latents of both SAEs."""

    small: tuple[int, ...]
    """Latents of the smaller SAE, ascending."""
    large: tuple[int, ...]
    """Latents of the larger one, ascending."""


@dataclass(frozen=True)
class LatentSplit:
    """The latents of two SAEs by similarity. A cosine equal to ``threshold`` counts as similar."""

    threshold: float
    large: BestMatches = field(repr=False)
    """For every latent of the larger SAE the most similar one of the smaller, and the cosine."""
    small: BestMatches = field(repr=False)
    """For every latent of the smaller SAE the most similar one of the larger."""
    groups: tuple[LatentGroup, ...] = field(repr=False)
    """Of the reconstruction latents, by their first latent of the smaller SAE."""

    @property
    def widths(self) -> tuple[int, int]:
        """Of the smaller and the larger SAE."""
        return len(self.small.cosines), len(self.large.cosines)

    @property
    def novel(self) -> Int[Tensor, " novel"]:
        """Latents of the larger SAE whose best cosine is below the threshold."""
        return self.large.new(self.threshold)

    @property
    def reconstruction(self) -> Int[Tensor, " reconstruction"]:
        """Latents of the larger SAE whose best cosine is the threshold or more."""
        return _ids([latent for group in self.groups for latent in group.large])

    @property
    def unmatched(self) -> Int[Tensor, " unmatched"]:
        """Latents of the smaller SAE that have a direction, and none like it in the larger one."""
        grouped = {latent for group in self.groups for latent in group.small}
        return _ids(
            [i for i, match in enumerate(self.small.latents.tolist()) if match >= 0 and i not in grouped]
        )

    @property
    def without_direction(self) -> tuple[Int[Tensor, " small"], Int[Tensor, " large"]]:
        """Latents whose decoder row is zero, of the smaller and of the larger SAE: neither novel nor like another."""
        small, large = ((one.latents < 0).nonzero().squeeze(-1) for one in (self.small, self.large))
        return small, large

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        matches = {
            name: {"cosines": one.cosines.tolist(), "latents": one.latents.tolist()}
            for name, one in (("large", self.large), ("small", self.small))
        }
        return {
            "threshold": self.threshold,
            "widths": list(self.widths),
            "novel": self.novel.tolist(),
            "reconstruction": self.reconstruction.tolist(),
            "unmatched": self.unmatched.tolist(),
            "without_direction": [one.tolist() for one in self.without_direction],
            "groups": [asdict(group) for group in self.groups],
            "best": matches,
        }

    def __str__(self) -> str:
        small, large = self.widths
        largest = max((len(group.small) + len(group.large) for group in self.groups), default=0)
        return (
            f"of {large:,} latents {len(self.novel):,} are novel and {len(self.reconstruction):,} reconstruct "
            f"those of {small:,} (threshold {self.threshold:g}, {len(self.groups):,} groups, the largest of "
            f"{largest:,} latents); {len(self.unmatched):,} of the smaller SAE have no counterpart"
        )


def split_latents(
    small: Any, large: Any, threshold: float = THRESHOLD, *, progress: bool = True
) -> LatentSplit:
    """Split the latents of a larger SAE into novel ones and groups of reconstruction latents.

    A latent of ``large`` is a reconstruction latent where its best cosine to a decoder row of ``small`` is
    ``threshold`` **or more**, otherwise novel. Nothing asks that ``large`` be the wider one.

    Args:
        small: an SAE, or its decoder rows.
        large: another one that writes the same space.
        threshold: cosine from which on two latents are similar, above 0 and at most 1. (At 1, rounding decides.)
        progress: show progress bars.

    Raises:
        ValueError: a threshold out of range, no decoder, or decoders of different spaces.
    """
    both = [one for one in (small, large) if isinstance(one, Crosscoded)]
    if len(both) == 2 and both[0].layers != both[1].layers:
        raise ValueError(
            f"Crosscoders over layers {both[0].layers} and {both[1].layers} write different spaces"
        )
    rows = [one.detach() if isinstance(one, Tensor) else decoder_directions(one) for one in (small, large)]
    ours, theirs = rows
    # (first, as it checks the threshold; rows are the larger SAE's, as in its best matches: the same blocks and sums)
    pairs = pairs_from(theirs, ours, threshold, progress=progress)
    return LatentSplit(
        threshold=threshold,
        large=best_matches(theirs, ours, progress=progress),
        small=best_matches(ours, theirs, progress=progress),
        groups=_components(pairs.columns, pairs.rows, len(ours), len(theirs)),
    )


def _components(
    small: Int[Tensor, " pair"], large: Int[Tensor, " pair"], d_small: int, d_large: int
) -> tuple[LatentGroup, ...]:
    """Connected components of the bipartite graph with these edges; latents without an edge are in none."""
    n = d_small + d_large
    edges = coo_array(
        (torch.ones(len(small)).numpy(), (small.numpy(), d_small + large.numpy())), shape=(n, n)
    )
    labels = torch.from_numpy(connected_components(edges, directed=False)[1]).long()
    sides: dict[int, tuple[list[int], list[int]]] = {}
    for node in torch.cat([small.unique(), d_small + large.unique()]).tolist():
        members = sides.setdefault(int(labels[node]), ([], []))
        members[node >= d_small].append(node - d_small * (node >= d_small))
    return tuple(LatentGroup(tuple(ours), tuple(theirs)) for ours, theirs in sides.values())


def _ids(latents: list[int]) -> Tensor:
    return torch.tensor(sorted(latents), dtype=torch.long)
