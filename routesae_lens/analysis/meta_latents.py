"""What the latents of an SAE are made of, by a meta-SAE: an SAE of its decoder rows.

Leask et al. 2025, "Sparse autoencoders do not find canonical units of analysis" (first shown in Bussmann et al.
2024, "Showing SAE latents are not atomic using meta-SAEs"): the decoder directions of a large SAE are sparse sums of
fewer directions, the meta-latents, which many latents share. ``training/meta_sae.py`` trains a meta-SAE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor
from tqdm import tqdm

from routesae_lens.analysis.geometry import check_pair, decoder_directions, unit_rows
from routesae_lens.saes.forms import inference_form

ROWS_AT_ONCE = 2048
UNIT_ROWS = "unit_rows"
"""Name in a meta-SAE's metadata: whether it was trained on rows of norm 1."""


@dataclass(frozen=True, eq=False)
class MetaLatents:
    """The meta-latents of each latent, and the latents of each meta-latent.

    A meta-SAE takes a latent's decoder row apart into a bias and a few meta-latents' decoder directions, each times its
    activation. With rows of norm 1 an activation is the norm of that part, in units of the latent's own direction.
    """

    d_sae: int
    """Latents of the SAE, analysed or not."""
    d_meta: int
    """Meta-latents."""
    latents: Int[Tensor, " latent"]
    """The latents that were analysed, ascending."""
    explained_variance: float
    """1 - sum of |row - reconstruction|^2 / sum of |row - mean row|^2, over the analysed rows as the meta-SAE reads
    them (of norm 1, if it was trained so)."""
    l0: float
    """Meta-latents of a latent, mean."""
    starts: Int[Tensor, " latent_and_end"]
    """Where each analysed latent's part of the next two begins; at the end their length."""
    meta: Int[Tensor, " active"]
    """Numbers of the meta-latents, the strongest of each latent first."""
    activations: Float[Tensor, " active"]
    """Their activations, above 0, float32."""

    def of(self, latent: int) -> list[tuple[int, float]]:
        """The meta-latents of a latent and their activations, strongest first; empty where it has none.

        Raises:
            ValueError: a latent that was not analysed.
        """
        place = self._places.get(latent)
        if place is None:
            raise ValueError(
                f"latent {latent!r} was not analysed; {len(self.latents)} of the {self.d_sae} latents were"
            )
        part = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return list(zip(self.meta[part].tolist(), self.activations[part].tolist(), strict=True))

    def latents_of(self, meta_latent: int) -> list[tuple[int, float]]:
        """The latents that have a meta-latent and its activation in each, strongest first.

        Raises:
            ValueError: no such meta-latent.
        """
        self._check_meta(meta_latent)
        return self._latents_of[meta_latent]

    def shared(self, latent: int, other: int) -> list[tuple[int, float, float]]:
        """The meta-latents that two latents have in common, with the activation in each; largest product first.

        Raises:
            ValueError: a latent that was not analysed.
        """
        theirs = dict(self.of(other))
        both = [(meta, ours, theirs[meta]) for meta, ours in self.of(latent) if meta in theirs]
        return sorted(both, key=lambda one: -one[1] * one[2])

    def sharing(self, latent: int, n: int = 10) -> list[tuple[int, int, float]]:
        """The ``n`` latents that share most meta-latents with one: latent, how many are shared, overlap.

        The overlap is the sum over the shared meta-latents of the product of both activations; it orders those
        that share equally many.

        Raises:
            ValueError: a latent that was not analysed, or n below 1.
        """
        if n < 1:
            raise ValueError(f"n must be 1 or more, got {n}")
        found: dict[int, tuple[int, float]] = {}
        for meta, ours in self.of(latent):
            for other, theirs in self._latents_of[meta]:
                if other != latent:
                    count, overlap = found.get(other, (0, 0.0))
                    found[other] = (count + 1, overlap + ours * theirs)
        ranked = sorted(found.items(), key=lambda one: (-one[1][0], -one[1][1], one[0]))
        return [(other, count, overlap) for other, (count, overlap) in ranked[:n]]

    @cached_property
    def counts(self) -> Int[Tensor, " d_meta"]:
        """How many latents have each meta-latent."""
        return torch.bincount(self.meta, minlength=self.d_meta)

    @property
    def dead(self) -> Int[Tensor, " dead"]:
        """Meta-latents that no analysed latent has."""
        return (self.counts == 0).nonzero().squeeze(-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as :meth:`from_dict` reads it."""
        return {
            "d_sae": self.d_sae,
            "d_meta": self.d_meta,
            "explained_variance": self.explained_variance,
            "l0": self.l0,
            **{name: getattr(self, name).tolist() for name in _LISTS},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MetaLatents:
        """What :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: values that do not fit each other, or are missing.
        """
        lists = {name: torch.tensor(values[name], dtype=dtype) for name, dtype in _LISTS.items()}
        d_sae, d_meta = values["d_sae"], values["d_meta"]
        whole = [d_sae, d_meta, *values["latents"], *values["starts"], *values["meta"]]
        if not all(type(one) is int for one in whole):
            raise ValueError("d_sae, d_meta, latents, starts and meta must be whole numbers")
        latents, starts, meta = lists["latents"], lists["starts"], lists["meta"]
        fits = (
            all(one.ndim == 1 for one in lists.values())
            and len(starts) == len(latents) + 1
            and int(starts[0]) == 0
            and int(starts[-1]) == len(meta) == len(lists["activations"])
            and bool((starts.diff() >= 0).all())
            and bool((latents.diff() > 0).all())
            and _within(latents, d_sae)
            and _within(meta, d_meta)
            and bool(lists["activations"].isfinite().all())
        )
        if not fits:
            raise ValueError("the lists latents, starts, meta and activations do not fit each other")
        return cls(
            d_sae=d_sae,
            d_meta=d_meta,
            explained_variance=float(values["explained_variance"]),
            l0=float(values["l0"]),
            **lists,
        )

    @cached_property
    def _places(self) -> dict[int, int]:
        return {latent: place for place, latent in enumerate(self.latents.tolist())}

    @cached_property
    def _latents_of(self) -> list[list[tuple[int, float]]]:
        owners = self.latents.repeat_interleave(self.starts.diff())
        found: list[list[tuple[int, float]]] = [[] for _ in range(self.d_meta)]
        order = self.activations.argsort(descending=True, stable=True)
        parts = (self.meta[order].tolist(), owners[order].tolist(), self.activations[order].tolist())
        for meta, latent, activation in zip(*parts, strict=True):
            found[meta].append((latent, activation))
        return found

    def _check_meta(self, meta_latent: int) -> None:
        if not isinstance(meta_latent, Integral) or not 0 <= meta_latent < self.d_meta:
            raise ValueError(f"expected a meta-latent, 0 to {self.d_meta - 1}, got {meta_latent!r}")


_LISTS = {
    "latents": torch.long,
    "starts": torch.long,
    "meta": torch.long,
    "activations": torch.float32,
}


def _within(numbers: Tensor, n: int) -> bool:
    return not len(numbers) or 0 <= int(numbers.min()) <= int(numbers.max()) < n


@torch.no_grad()
def meta_latents(
    sae: Any,
    meta_sae: SAE[Any] | TrainingSAE[Any],
    *,
    latents: Tensor | Sequence[int] | None = None,
    progress: bool = True,
) -> MetaLatents:
    """Take the decoder rows of an SAE apart with a meta-SAE.

    Args:
        sae: any SAE of SAELens or of this package, see ``decoder_directions``.
        meta_sae: as ``train_meta_sae`` returns or saves it. One in training form is first turned into its inference
            form, whose result for a row does not depend on the other rows.
        latents: whose rows, see :func:`decoder_rows`; give what was given in training.
        progress: show a progress bar.

    Raises:
        ValueError: rows of another length than the meta-SAE reads, rows that are all equal (there is no variance to
            explain), or latents that are not there.
    """
    if isinstance(meta_sae, TrainingSAE):
        meta_sae = inference_form(meta_sae)
    unit = bool(meta_sae.cfg.metadata.get(UNIT_ROWS, True))
    numbers, rows = decoder_rows(sae, latents, unit=unit)
    if rows.shape[1] != meta_sae.cfg.d_in:
        raise ValueError(
            f"the decoder rows have {rows.shape[1]} numbers, the meta-SAE reads {meta_sae.cfg.d_in}: it was trained on "
            "another SAE"
        )
    mean = rows.mean(dim=0, dtype=torch.float64)
    error = variance = 0.0
    counts, found, values = [], [], []
    bar = tqdm(total=len(rows), desc="meta-latents", unit="row", disable=not progress)
    for part in rows.split(ROWS_AT_ONCE):
        acts = meta_sae.encode(part.to(meta_sae.device, meta_sae.dtype))
        reconstructed = meta_sae.decode(acts).cpu().double()
        part = part.double()
        error += (part - reconstructed).square().sum().item()
        variance += (part - mean).square().sum().item()
        acts = acts.float().cpu()
        active = acts > 0
        n = active.sum(dim=-1)
        strongest, who = acts.topk(max(1, int(n.max())), dim=-1)
        kept = strongest > 0
        counts.append(n)
        found.append(who[kept])
        values.append(strongest[kept])
        bar.update(len(part))
    bar.close()
    if variance <= 1e-12 * len(rows):
        raise ValueError("the decoder rows are all equal: there is no variance to explain")
    n = torch.cat(counts)
    return MetaLatents(
        d_sae=len(decoder_directions(sae)),
        d_meta=int(meta_sae.cfg.d_sae),
        latents=numbers,
        explained_variance=1 - error / variance,
        l0=n.double().mean().item(),
        starts=torch.cat([n.new_zeros(1), n.cumsum(0)]),
        meta=torch.cat(found),
        activations=torch.cat(values),
    )


@torch.no_grad()
def decoder_rows(
    sae: Any, latents: Tensor | Sequence[int] | None = None, *, unit: bool = True
) -> tuple[Int[Tensor, " latent"], Float[Tensor, "latent d"]]:
    """What a meta-SAE reads: numbers of latents and their decoder rows, in float32 on the CPU.

    Of a RouteSAE the rows are those of the shared SAE, of a Crosscoder the rows of all layers side by side. Rows of
    zeros (dead decoders) have no direction and are always left out.

    Args:
        sae: any SAE of SAELens or of this package.
        latents: a mask over all latents, for instance ``features.firing_frequency > 0`` to leave out those that never
            fired, or their numbers; all by default.
        unit: scale rows to norm 1.

    Raises:
        ValueError: no decoder, rows that are not finite, a mask of another length, numbers that are not there or
            there twice, or no latent left.
    """
    W_dec = decoder_directions(sae)
    check_pair(W_dec, W_dec)
    numbers = _chosen(latents, len(W_dec))
    rows = W_dec[numbers.to(W_dec.device)].float().cpu()
    scaled, alive = unit_rows(rows)
    if not bool(alive.any()):
        raise ValueError("no latent is left whose decoder row is not zero")
    return numbers[alive], (scaled if unit else rows)[alive]


def _chosen(latents: Tensor | Sequence[int] | None, d_sae: int) -> Tensor:
    """Ascending numbers of the latents asked for."""
    if latents is None:
        return torch.arange(d_sae)
    asked = torch.as_tensor(latents).cpu()
    if asked.ndim != 1 or asked.is_floating_point() or asked.is_complex():
        raise ValueError(
            f"latents must be a mask or whole numbers in one dimension, got {asked.dtype} of shape "
            f"{tuple(asked.shape)} (of firing frequencies: frequency > 0)"
        )
    if asked.dtype == torch.bool:
        if len(asked) != d_sae:
            raise ValueError(f"the mask has {len(asked)} entries, the SAE {d_sae} latents")
        return asked.nonzero().squeeze(-1)
    numbers = asked.long().unique()
    if not len(numbers) or not _within(numbers, d_sae) or len(numbers) < len(asked):
        raise ValueError(f"latents must be different numbers of 0 to {d_sae - 1}, one or more, got {latents}")
    return numbers
