"""Is a RouteSAE's feature space unified? Its dictionary against SAEs of single layers (stitching's measure, by layer).

A latent of a layer's SAE is covered where the RouteSAE has one like it, novel where it has not, as in SAE stitching
(``latent_split.py``). A unified dictionary would cover a large share of every layer, mostly with the same latents.

Three numbers say what a share is worth: how much a random dictionary of the same second moment covers; how much the
SAE of another layer covers; and how much another seed's SAE of the very layer does, which is about as much as one SAE
can be expected to. (SAEs that start from the same weights keep some of them in a short training: seeds must differ.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.geometry import (
    best_matches,
    check_threshold,
    decoder_directions,
    random_dictionary,
    unit_rows,
)
from routesae_lens.analysis.latent_split import THRESHOLD
from routesae_lens.backends import SITES
from routesae_lens.saes.route_sae import Routed


@dataclass(frozen=True)
class CoveredLayer:
    """One layer's SAE and what the RouteSAE has of it. Dead latents are left out everywhere."""

    layer: int
    latents: int
    """Living latents of the layer's SAE."""
    dead: int
    covered: float
    """Share of them whose best cosine in the RouteSAE is the threshold or more."""
    mean_cosine: float
    """Mean best cosine of them in the RouteSAE."""
    novel: tuple[int, ...] = field(repr=False)
    """Those that the RouteSAE lacks."""
    route_latents: tuple[int, ...] = field(repr=False)
    """Latents of the RouteSAE that have their like in this layer's SAE."""
    random: tuple[float, ...]
    """``covered`` by a random dictionary in the RouteSAE's place, for each seed."""
    random_mean_cosine: tuple[float, ...]
    ceiling: float | None
    """``covered`` by another seed's SAE of this layer; None where none was given."""
    ceiling_mean_cosine: float | None
    best_other: float | None
    """``covered`` by the SAE of that other layer which covers most; None with one layer alone."""
    best_other_layer: int | None


@dataclass(frozen=True)
class LayerCoverage:
    """How much of each layer's dictionary a RouteSAE has, see :func:`layer_coverage`."""

    threshold: float
    layers: tuple[CoveredLayer, ...]
    route_latents: int
    """Living latents of the RouteSAE."""
    route_dead: int
    route_novel: tuple[int, ...] = field(repr=False)
    """Those that no layer's SAE has."""
    shared: dict[int, int]
    """How many of them have their like in the SAEs of 0, 1, 2 ... layers."""
    route_ceiling: float | None
    """Share of the RouteSAE's latents that another seed's RouteSAE has; None where none was given."""
    seeds: tuple[int, ...]
    """Of the random dictionaries."""

    @property
    def covered(self) -> float:
        """Mean over layers of the share covered."""
        return sum(one.covered for one in self.layers) / len(self.layers)

    @property
    def route_novel_share(self) -> float:
        """Share of the RouteSAE's living latents that no layer's SAE has."""
        return len(self.route_novel) / self.route_latents

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self) | {"covered": self.covered, "route_novel_share": self.route_novel_share}

    def __str__(self) -> str:
        lines = [f"{'layer':>6}{'covered':>10}{'random':>10}{'other layer':>13}{'ceiling':>10}{'latents':>9}"]
        for one in self.layers:
            chance = sum(one.random) / len(one.random)
            other, ceiling = (
                "" if share is None else f"{share:.1%}" for share in (one.best_other, one.ceiling)
            )
            lines.append(
                f"{one.layer:>6}{one.covered:>10.1%}{chance:>10.1%}{other:>13}{ceiling:>10}{one.latents:>9,}"
            )
        lines.append(
            f"{self.route_novel_share:.1%} of the RouteSAE's {self.route_latents:,} living latents are in no "
            f"layer's SAE (threshold {self.threshold:g})"
        )
        return "\n".join(lines)


@torch.no_grad()
def layer_coverage(
    route_sae: SAE[Any],
    layer_saes: Mapping[int, SAE[Any]],
    threshold: float = THRESHOLD,
    *,
    ceilings: Mapping[int, SAE[Any]] | None = None,
    route_ceiling: SAE[Any] | None = None,
    route_fires: Tensor | None = None,
    layer_fires: Mapping[int, Tensor] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = True,
) -> LayerCoverage:
    """Which latents of single layers a RouteSAE has, layer by layer, and which latents no layer has.

    Decoder rows are compared, in the standardised space where the RouteSAE has one. The rows of an SAE on raw
    activations compare with them but for the part along (1, ..., 1).

    Args:
        route_sae: a RouteSAE, in training or not.
        layer_saes: an SAE for each of some of its layers, best a RouteSAE over that layer alone (the method
            ``topk@7``) with other initial weights.
        threshold: cosine from which on a latent is covered.
        ceilings: for some of these layers an SAE of another seed.
        route_ceiling: a RouteSAE like ``route_sae`` of another seed.
        route_fires: how often each latent of ``route_sae`` fires (``firing_frequencies(...)["x"].counts``,
            ``Evaluation.firing_frequency``); those that never do are left out.
        layer_fires: likewise for ``layer_saes``. Of the ceilings all latents count, as candidates for a match.
        seeds: of the random dictionaries: Gaussian rows with the second moment of the RouteSAE's.
        progress: show a progress bar.

    Raises:
        ValueError: no RouteSAE, no layer SAEs, layers that are not routed, SAEs of other layers, sites, widths
            or standardisation, firing counts of another width, nothing alive, no seeds or repeated ones, or a threshold
            out of range.
    """
    if not isinstance(route_sae, Routed):
        raise ValueError(f"expected a RouteSAE, got {type(route_sae).__name__}")
    if not isinstance(layer_saes, Mapping):
        raise ValueError(f"expected SAEs by their layer, {{layer: sae}}, got {type(layer_saes).__name__}")
    if not layer_saes:
        raise ValueError("no SAEs of single layers were given")
    check_threshold(threshold)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different, one or more, got {list(seeds)}")
    ceilings, layer_fires = ceilings or {}, layer_fires or {}
    for what, some in (("ceilings", ceilings), ("layer_fires", layer_fires)):
        if unknown := sorted(some.keys() - layer_saes.keys()):
            raise ValueError(f"{what} of layers {unknown}, SAEs were given of {sorted(layer_saes)}")
    for layer, sae in (*layer_saes.items(), *ceilings.items()):
        _check_layer(route_sae, layer, sae)
    if route_ceiling is not None and not (
        isinstance(route_ceiling, Routed) and _space(route_ceiling) == _space(route_sae)
    ):
        raise ValueError(
            f"route_ceiling must be a RouteSAE over layers {route_sae.layers} with the same site, width and "
            "standardisation as the RouteSAE"
        )
    order = sorted(layer_saes)
    route_alive = _alive(route_sae, route_fires, "the RouteSAE")
    alive = {layer: _alive(layer_saes[layer], layer_fires.get(layer), f"layer {layer}") for layer in order}
    route = decoder_directions(route_sae)[route_alive]
    rows = {layer: decoder_directions(layer_saes[layer])[alive[layer]] for layer in order}
    chance = [_alike(route, seed) for seed in seeds]
    found = []
    times = torch.zeros(len(route), dtype=torch.long)
    for layer in tqdm(order, desc="coverage", unit="layer", disable=not progress):
        matches = best_matches(rows[layer], route, progress=False)
        back = best_matches(route, rows[layer], progress=False).cosines >= threshold
        times += back
        random = [best_matches(rows[layer], one, progress=False).cosines for one in chance]
        ceiling = None
        if layer in ceilings:
            ceiling = best_matches(rows[layer], decoder_directions(ceilings[layer]), progress=False).cosines
        others = {
            other: _share(best_matches(rows[layer], rows[other], progress=False).cosines, threshold)
            for other in order
            if other != layer
        }
        best = max(others, key=others.__getitem__, default=None)
        ids, route_ids = alive[layer].nonzero().squeeze(-1).cpu(), route_alive.nonzero().squeeze(-1).cpu()
        found.append(
            CoveredLayer(
                layer=layer,
                latents=len(ids),
                dead=len(alive[layer]) - len(ids),
                covered=_share(matches.cosines, threshold),
                mean_cosine=matches.cosines.double().mean().item(),
                novel=tuple(ids[matches.cosines < threshold].tolist()),
                route_latents=tuple(route_ids[back].tolist()),
                random=tuple(_share(one, threshold) for one in random),
                random_mean_cosine=tuple(one.double().mean().item() for one in random),
                ceiling=None if ceiling is None else _share(ceiling, threshold),
                ceiling_mean_cosine=None if ceiling is None else ceiling.double().mean().item(),
                best_other=None if best is None else others[best],
                best_other_layer=best,
            )
        )
    twin = None
    if route_ceiling is not None:
        twin = _share(
            best_matches(route, decoder_directions(route_ceiling), progress=False).cosines, threshold
        )
    return LayerCoverage(
        threshold=threshold,
        layers=tuple(found),
        route_latents=len(route),
        route_dead=len(route_alive) - len(route),
        route_novel=tuple(route_ids[times == 0].tolist()),
        shared=dict(sorted(Counter(times.tolist()).items())),
        route_ceiling=twin,
        seeds=tuple(seeds),
    )


def _check_layer(route_sae: Routed, layer: int, sae: Any) -> None:
    """Raise a ValueError unless ``sae`` reads ``layer``, a routed one, as the RouteSAE does."""
    if layer not in route_sae.layers:
        raise ValueError(f"layer {layer!r} is not among the routed blocks {route_sae.layers}")
    width = decoder_directions(sae).shape[1]
    if width != route_sae.cfg.d_model:
        raise ValueError(
            f"the SAE of layer {layer} writes {width} numbers, the RouteSAE {route_sae.cfg.d_model}"
        )
    if isinstance(sae, Routed):
        read, standardized = sae.layers, sae.cfg.standardize
        if standardized != route_sae.cfg.standardize:
            raise ValueError(
                f"the SAE of layer {layer} has standardize={standardized}, the RouteSAE "
                f"{route_sae.cfg.standardize}: they live in different spaces"
            )
    else:
        read = [int(block) for block in re.findall(r"\.(\d+)", str(sae.cfg.metadata.hook_name))[:1]]
    if read != [layer]:
        raise ValueError(f"the SAE given for layer {layer} reads {read or sae.cfg.metadata.hook_name}")
    for site in _sites(sae):  # (other names are those of other backends, or of the Hugging Face model)
        if site in SITES and site != route_sae.cfg.site:
            raise ValueError(
                f"the SAE given for layer {layer} reads or writes {site}, the RouteSAE {route_sae.cfg.site}"
            )


def _sites(sae: Any) -> list[str]:
    """What of its block an SAE reads, and what it writes."""
    if isinstance(sae, Routed):
        return [sae.cfg.site]
    hooks = (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out)
    return [hook.rpartition(".")[2] for hook in hooks if hook is not None]


def _space(sae: Routed) -> tuple[Any, ...]:
    """What RouteSAEs must share for their decoder rows to lie in one space."""
    return (sae.layers, sae.cfg.site, sae.cfg.d_model, sae.cfg.standardize)


def _alive(sae: Any, fires: Tensor | None, what: str) -> Bool[Tensor, " d_sae"]:
    """Latents that have a direction, and fire where that is known."""
    alive = unit_rows(decoder_directions(sae))[1]
    if fires is not None:
        if not isinstance(fires, Tensor) or fires.shape != alive.shape:
            given = f"have shape {tuple(fires.shape)}" if isinstance(fires, Tensor) else f"are {fires!r}"
            raise ValueError(f"firing counts of {what} {given}, it has {len(alive)} latents")
        alive = alive & (fires.to(alive.device) > 0)
    if not alive.any():
        raise ValueError(f"no latent of {what} is alive")
    return alive


def _share(cosines: Float[Tensor, " latent"], threshold: float) -> float:
    return (cosines >= threshold).double().mean().item()


def _alike(rows: Float[Tensor, "latent d"], seed: int) -> Float[Tensor, "latent d"]:
    """As many random rows whose second moment is, in expectation, that of the rows at norm 1."""
    unit = unit_rows(rows)[0].double()
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    root = vectors * values.clamp_min(0).sqrt()
    return (random_dictionary(len(rows), rows.shape[1], seed).to(root) @ root.T).float()
