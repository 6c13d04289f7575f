"""How the latents of dictionaries lie to each other, by the cosine of their decoder rows (Llama Scope, 4.6).

A dictionary here is the matrix of its decoder rows, ``(d_sae, d)``, as :func:`decoder_directions` takes it from
an SAE. The norm of a row plays no part. A row of zeros (a dead decoder) has no direction: it is nobody's
neighbour and has none, and it is left out of every share.

Memory is bounded for any width: cosines are made in blocks of :data:`ROWS_AT_ONCE` by :data:`COLUMNS_AT_ONCE`,
never as a whole, and no normalised copy of a dictionary is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import TrainingSAE
from torch import Tensor
from tqdm import tqdm

from routesae_lens.hook_points import split_layers
from routesae_lens.saes.crosscoder import Crosscoded
from routesae_lens.saes.forms import inference_form

ROWS_AT_ONCE, COLUMNS_AT_ONCE = 1024, 8192
"""Size of a block of cosines: 32 MiB of float32."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of some latents, the highest cosine first."""

    cosines: Float[Tensor, "latent n"]
    """-1 to 1; 0 where there is no further neighbour."""
    latents: Int[Tensor, "latent n"]
    """Their numbers; -1 where there is no further neighbour."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of latents of two dictionaries, in no particular order."""

    rows: Int[Tensor, " pair"]
    """Latents of the first."""
    columns: Int[Tensor, " pair"]
    """Latents of the second."""


@dataclass(frozen=True)
class BestMatches:
    """For every latent of one dictionary the most similar latent of another."""

    cosines: Float[Tensor, " d_from"]
    """0 for a latent without direction."""
    latents: Int[Tensor, " d_from"]
    """-1 for a latent without direction."""

    @property
    def living(self) -> Float[Tensor, " living"]:
        """Cosines of the latents that have a direction."""
        return self.cosines[self.latents >= 0]

    def new(self, threshold: float) -> Int[Tensor, " new"]:
        """Latents that have a direction but no match of this cosine or a higher one."""
        return ((self.latents >= 0) & (self.cosines < threshold)).nonzero().squeeze(-1)


def decoder_directions(sae: Any, layer: int | None = None) -> Float[Tensor, "d_sae d"]:
    """The decoder rows of an SAE, whose cosines say how its latents lie to each other.

    ================  ==============================================================================
    single-layer SAE  ``W_dec``
    RouteSAE          ``W_dec``, in the routed space of size ``d_model``: one direction for all layers
    Crosscoder        one layer's slice with ``layer``; by default the rows of all layers joined
    ================  ==============================================================================

    A Crosscoder's joined cosine is the mean of its per-layer cosines, each weighted by the product of the two
    latents' norms there (relative to their joint norms), so layers in which neither lives do not count. Only
    Crosscoders over the same layers compare that way. Against a single-layer SAE or a RouteSAE take one layer.

    Standardised and raw activations of a layer differ per token by a scale and a mean over ``d_model``, so
    directions of the two compare but for the part along (1, ..., 1).

    Args:
        sae: any SAE of SAELens or of this package, in training or not.
        layer: a block number of a Crosscoder.

    Raises:
        ValueError: no decoder, a layer that the Crosscoder lacks, or ``layer`` for an SAE with one decoder.
    """
    W_dec = getattr(sae, "W_dec", None)
    if not isinstance(W_dec, Tensor):
        raise ValueError(f"expected an SAE with a decoder W_dec, got {type(sae).__name__}")
    if layer is None:
        return W_dec.detach()
    if not isinstance(sae, Crosscoded):
        raise ValueError(
            f"a {type(sae).__name__} has one decoder for all it reads; layer={layer!r} needs a Crosscoder"
        )
    return sae.layer_decoder(layer).detach()


def encoder_directions(sae: Any, layer: int | None = None) -> Float[Tensor, "d_sae d"]:
    """The encoder columns of an SAE as rows: what each latent reads. Otherwise as :func:`decoder_directions`.

    Of an SAE in training those of its inference form, which has feature scaling in them.

    Raises:
        ValueError: no encoder, a layer that the Crosscoder lacks, or ``layer`` for an SAE with one encoder.
    """
    if isinstance(sae, TrainingSAE):
        sae = inference_form(sae)
    W_enc = getattr(sae, "W_enc", None)
    if not isinstance(W_enc, Tensor):
        raise ValueError(f"expected an SAE with an encoder W_enc, got {type(sae).__name__}")
    rows = W_enc.detach().T
    if layer is None:
        return rows
    if not isinstance(sae, Crosscoded):
        raise ValueError(
            f"a {type(sae).__name__} has one encoder for all it reads; layer={layer!r} needs a Crosscoder"
        )
    if layer not in sae.layers:
        raise ValueError(f"this {type(sae).__name__} reads blocks {sae.layers}, not block {layer!r}")
    return split_layers(rows, sae.cfg.n_layers)[:, sae.layers.index(layer)]


def nearest_within(
    W_dec: Float[Tensor, "d_sae d"],
    n: int = 1,
    *,
    latents: Sequence[int] | None = None,
    among: Bool[Tensor, " d_sae"] | None = None,
    progress: bool = True,
) -> Neighbours:
    """The ``n`` most similar other latents of the same dictionary; of equal ones any.

    Args:
        W_dec: decoder rows.
        n: how many; of a narrower dictionary all there are.
        latents: whose neighbours are looked for, by default everybody's.
        among: who may be a neighbour, by default everybody.
        progress: show a progress bar.

    Raises:
        ValueError: n below 1, latents that are not there, rows that are not finite, or no rows.
    """
    return _nearest(W_dec, W_dec, n, latents, among, progress, within=True)


def nearest_across(
    W_from: Float[Tensor, "d_from d"],
    W_to: Float[Tensor, "d_to d"],
    n: int = 1,
    *,
    latents: Sequence[int] | None = None,
    among: Bool[Tensor, " d_to"] | None = None,
    progress: bool = True,
) -> Neighbours:
    """The ``n`` latents of ``W_to`` most similar to each of ``W_from``; otherwise as :func:`nearest_within`.

    Raises:
        ValueError: rows of different length, and what ``nearest_within`` raises.
    """
    return _nearest(W_from, W_to, n, latents, among, progress, within=False)


def best_matches(
    W_from: Float[Tensor, "d_from d"], W_to: Float[Tensor, "d_to d"], *, progress: bool = True
) -> BestMatches:
    """For every latent of ``W_from`` the most similar one of ``W_to``.

    Raises:
        ValueError: as :func:`nearest_across`.
    """
    found = nearest_across(W_from, W_to, progress=progress)
    return BestMatches(found.cosines[:, 0], found.latents[:, 0])


@torch.no_grad()
def pairs_from(
    W_from: Float[Tensor, "d_from d"],
    W_to: Float[Tensor, "d_to d"],
    threshold: float,
    *,
    progress: bool = True,
) -> Pairs:
    """All pairs whose cosine is ``threshold`` or more, in the same blocks as :func:`best_matches`.

    Memory grows with the number of pairs: all of them where ``threshold`` is low.

    Raises:
        ValueError: as :func:`nearest_across`, or a threshold that is not above 0 and at most 1.
    """
    check_pair(W_from, W_to)
    check_threshold(threshold)
    rows, columns = [], []
    for start in tqdm(
        range(0, len(W_from), ROWS_AT_ONCE),
        desc=f"pairs of {len(W_from):,} latents with {len(W_to):,}",
        unit="block",
        disable=not progress,
    ):
        ours, _ = unit_rows(W_from[start : start + ROWS_AT_ONCE])
        for first in range(0, len(W_to), COLUMNS_AT_ONCE):
            theirs, _ = unit_rows(W_to[first : first + COLUMNS_AT_ONCE].to(ours.device))
            row, column = ((ours @ theirs.T).clamp_(-1, 1) >= threshold).nonzero(as_tuple=True)
            rows.append(row.cpu() + start)
            columns.append(column.cpu() + first)
    return Pairs(torch.cat(rows), torch.cat(columns))


def check_threshold(threshold: int | float) -> None:
    """Raise a ValueError unless ``threshold`` is a cosine from which on two rows can be called alike."""
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 < threshold <= 1:
        raise ValueError(f"a threshold on cosines must be above 0 and at most 1, got {threshold!r}")


def cosine_bound(n_features: int, d: int) -> float:
    """The cosine sqrt(12 ln F / D) that hardly any pair of F random directions exceeds (Llama Scope, 4.6).

    By the Johnson-Lindenstrauss lemma for inner products, a pair's cosine exceeds e with a probability of at
    most about 4 exp(-e^2 D / 4) = 4 / F^3, so some pair of F(F-1)/2 does with about 2 / F. It is generous: the
    largest cosine seen is about sqrt(4 ln F / D). From 1 on (small D) it says nothing.

    Raises:
        ValueError: fewer than 2 features or no dimension.
    """
    if not (2 <= n_features < math.inf and 1 <= d < math.inf):
        raise ValueError(f"expected 2 or more features in 1 or more dimensions, got {n_features} in {d}")
    return math.sqrt(12 * math.log(n_features) / d)


def random_dictionary(d_sae: int, d: int, seed: int) -> Float[Tensor, "d_sae d"]:
    """Rows that point anywhere alike: isotropic Gaussian, on the CPU."""
    return torch.randn(d_sae, d, generator=torch.Generator().manual_seed(seed))


def count_living(W_dec: Float[Tensor, "d_sae d"]) -> int:
    """How many rows are not zero."""
    return sum(int((rows.float() != 0).any(dim=-1).sum()) for rows in W_dec.detach().split(COLUMNS_AT_ONCE))


@torch.no_grad()
def _nearest(
    W_from: Tensor,
    W_to: Tensor,
    n: int,
    latents: Sequence[int] | None,
    among: Tensor | None,
    progress: bool,
    within: bool,
) -> Neighbours:
    check_pair(W_from, W_to)
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    if latents is not None and not all(
        isinstance(latent, Integral) and 0 <= latent < len(W_from) for latent in latents
    ):
        raise ValueError(f"latents must be 0 to {len(W_from) - 1}, got {list(latents)}")
    if latents is not None and not len(latents):
        raise ValueError("no latents were given whose neighbours to look for")
    if among is not None and (among.dtype != torch.bool or among.shape != (len(W_to),)):
        raise ValueError(
            f"among must say yes or no of {len(W_to)} latents, got {among.dtype} of shape {tuple(among.shape)}"
        )
    device = W_from.device
    asked = torch.arange(len(W_from)) if latents is None else torch.tensor(list(latents), dtype=torch.long)
    among = torch.ones(len(W_to), dtype=torch.bool) if among is None else among
    cosines, numbers = [], []
    for ids in tqdm(
        asked.to(device).split(ROWS_AT_ONCE),
        desc=f"cosines of {len(asked):,} latents with {len(W_to):,}",
        unit="block",
        disable=not progress,
    ):
        rows, alive = unit_rows(W_from[ids])
        best = rows.new_full((len(ids), 0), -torch.inf)
        who = ids.new_full((len(ids), 0), -1)
        for start in range(0, len(W_to), COLUMNS_AT_ONCE):
            columns, candidates = unit_rows(W_to[start : start + COLUMNS_AT_ONCE].to(device))
            block = (rows @ columns.T).clamp_(-1, 1)
            block[:, ~(candidates & among[start : start + COLUMNS_AT_ONCE].to(device))] = -torch.inf
            block[~alive] = -torch.inf
            numbered = torch.arange(start, start + len(columns), device=device).expand(len(ids), -1)
            if within:
                block.masked_fill_(numbered == ids[:, None], -torch.inf)
            values, at = block.topk(min(n, len(columns)), dim=-1)
            best, who = torch.cat([best, values], -1), torch.cat([who, numbered.gather(-1, at)], -1)
            best, at = best.topk(min(n, best.shape[-1]), dim=-1)
            who = who.gather(-1, at)
        none = best == -torch.inf
        cosines.append(best.masked_fill(none, 0.0).cpu())
        numbers.append(who.masked_fill(none, -1).cpu())
    return Neighbours(torch.cat(cosines), torch.cat(numbers))


def unit_rows(rows: Float[Tensor, "row d"]) -> tuple[Float[Tensor, "row d"], Bool[Tensor, " row"]]:
    """Rows of norm 1 in float32, and which are not zero; rows of zeros stay zero."""
    rows = rows.float()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    alive = largest.squeeze(-1) > 0
    rows = rows / largest.masked_fill(largest == 0, 1.0)  # so that the norm of a tiny row is not lost
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1.0), alive


def check_pair(W_from: Float[Tensor, "_ _"], W_to: Float[Tensor, "_ _"]) -> None:
    """Refuse dictionaries that have no cosines, before long work.

    Raises:
        ValueError: no tensors, no rows, numbers that are not finite, or rows of different length.
    """
    for W_dec in (W_from,) if W_from is W_to else (W_from, W_to):
        if not isinstance(W_dec, Tensor):
            raise ValueError(
                f"expected decoder rows as a tensor, got {type(W_dec).__name__}; decoder_directions(sae) takes those "
                "of an SAE"
            )
        if W_dec.ndim != 2 or 0 in W_dec.shape:
            raise ValueError(f"expected decoder rows (d_sae, d), one or more, got shape {tuple(W_dec.shape)}")
        for rows in W_dec.detach().split(COLUMNS_AT_ONCE):
            if not bool(rows.float().isfinite().all()):
                raise ValueError("the directions hold numbers that are not finite")
    if W_from.shape[1] != W_to.shape[1]:
        raise ValueError(
            f"rows of {W_from.shape[1]} and of {W_to.shape[1]} numbers have no cosine: both dictionaries must "
            "write the same space"
        )
