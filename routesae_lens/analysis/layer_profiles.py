"""Where do features live? The layer-wise activation of single features (RouteSAE, figure 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.stream import read_batches, subjects_of
from routesae_lens.hook_points import mount_layers, split_layers
from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE


@dataclass
class LayerProfiles:
    """Layer-wise activation of features, a row for each of ``features`` and a column for each of ``layers``."""

    layers: list[int]
    """Block numbers."""
    features: list[int]
    tokens: int
    """Kept tokens that were read."""
    active_tokens: list[int]
    """Tokens on which the feature is active (above 0) in at least one layer."""
    mean_activation: list[list[float]]
    """Mean over these tokens of the activation in each layer, 0 where the feature is silent."""
    profile: list[list[float]]
    """``mean_activation`` divided by its largest value over layers; all 0 for a feature that never fired."""
    peak: list[int | None]
    """Block of the largest mean activation; None for a feature that never fired."""
    low: list[int]
    """The features that peak earliest, where :func:`layer_profiles` was to choose; else empty."""
    high: list[int]
    """... and those that peak latest, the latest first."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerProfiles:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)


@torch.no_grad()
def layer_profiles(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    features: Sequence[int] | None = None,
    *,
    layers: Sequence[int] | None = None,
    n_each: int = 3,
    min_tokens: int = 10,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> LayerProfiles:
    """How active features are in each layer, over the tokens on which they are active in any.

    A RouteSAE's shared SAE encodes every layer of every token, unscaled (p = 1), wherever its router would
    send the token. Layers that it was hardly trained on, see ``layer_share``, say little. A Crosscoder has
    one activation per token: here it is multiplied by the norm of the feature's decoder in each layer,
    which makes it the size of what the feature writes there.

    Args:
        sae: a RouteSAE (over one layer: the paper's TopK SAE of figure 1) or a Crosscoder.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: token ids, see ``held_out_tokens``.
        features: latents to follow. By default the ``n_each`` that peak earliest and the ``n_each`` that peak
            latest (ties: by the profile's centre of mass), fewer where too few fire.
        layers: blocks to read, by default those of the SAE; others only with a RouteSAE.
        n_each, min_tokens: for that choice; features active on fewer than ``min_tokens`` tokens stay out.
        batch_size, exclude_special_tokens, exclude_first_position: as for ``analyse_routing``.
        progress: show a progress bar.

    Raises:
        ValueError: an SAE of another kind, latents it does not have, layers the model does not have, fewer than
            two features to choose from, or tokens that are no ids of this model.
    """
    subject = subjects_of({"sae": sae}, model)["sae"]
    sae = subject.sae  # in its inference form
    routed = isinstance(sae, RouteSAE)
    if not isinstance(sae, RouteSAE | Crosscoder):
        raise ValueError(f"expected a RouteSAE or a Crosscoder, got {type(sae).__name__}")
    if layers is not None and not routed:
        raise ValueError(
            f"a {type(sae).__name__} reads all of its own layers; layers={layers!r} needs a RouteSAE"
        )
    if n_each < 1 or min_tokens < 1:
        raise ValueError(f"n_each and min_tokens must be 1 or more, got {n_each} and {min_tokens}")
    width = sae.cfg.d_sae
    if features is not None and (
        not len(features)
        or any(isinstance(feature, bool) or not isinstance(feature, Integral) for feature in features)
        or not all(0 <= feature < width for feature in features)
    ):
        raise ValueError(f"features must be a non-empty list of latents 0 to {width - 1}, got {features!r}")
    blocks = list(sae.cfg.layers if layers is None else layers)
    # (read_batches reads the points that its subjects name)
    subject.point, subject.layers = mount_layers(model, blocks, sae.cfg.site), blocks

    sums = torch.zeros(len(blocks), width, dtype=torch.float64)
    active_tokens = torch.zeros(width, dtype=torch.long)
    n_tokens = 0
    for batch in read_batches(
        {"sae": subject},
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        progress="layer profiles" if progress else None,
    ):
        stack = batch.activations[subject.point][batch.keep]
        active = torch.zeros(len(stack), width, dtype=torch.bool, device=stack.device)
        for row, acts in enumerate(_by_layer(sae, stack, blocks)):
            acts = acts.clamp_min(0)  # (TopK without ReLU lets negative ones through)
            sums[row] += acts.sum(0, dtype=torch.float64).cpu()
            active |= acts > 0
        # A token on which a feature is silent in every layer adds 0 to its sums, so they need no mask.
        active_tokens += active.sum(0).cpu()
        n_tokens += len(stack)

    mean = sums / active_tokens.clamp_min(1)
    low, high = (
        ([], []) if features is not None else _earliest_and_latest(mean, active_tokens, n_each, min_tokens)
    )
    chosen = [int(feature) for feature in features] if features is not None else low + high
    rows = mean.T[chosen]
    largest, at = rows.max(-1)
    return LayerProfiles(
        layers=blocks,
        features=chosen,
        tokens=n_tokens,
        active_tokens=active_tokens[chosen].tolist(),
        mean_activation=rows.tolist(),
        profile=torch.where(largest[:, None] > 0, rows / largest[:, None], 0.0).tolist(),
        peak=[blocks[i] if top > 0 else None for i, top in zip(at.tolist(), largest.tolist(), strict=True)],
        low=low,
        high=high,
    )


def _by_layer(
    sae: RouteSAE | Crosscoder, stack: Float[Tensor, "token stacked"], blocks: list[int]
) -> Iterator[Float[Tensor, "token d_sae"]]:
    """The activations of all features in one layer after the other: all at once could be too large."""
    if isinstance(sae, Crosscoder):
        acts = sae.encode(stack)
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            acts = acts / sae.W_dec.norm(dim=-1)  # they hold the norm over all layers already
        yield from (acts * norms for norms in sae.decoder_norms())
        return
    factors = {}  # learned ones, undone again like p: activations of all layers in one unit
    if sae.cfg.layer_scale:
        factors = dict(zip(sae.layers, sae.router_log_scale.exp(), strict=True))
    layers = split_layers(stack.to(sae.dtype), len(blocks)).unbind(-2)
    for block, x in zip(blocks, layers, strict=True):
        factor = factors.get(block, 1.0)
        yield sae.encode_routed((standardize(x).x if sae.cfg.standardize else x) * factor) / factor


def _earliest_and_latest(
    mean: Float[Tensor, "layer d_sae"], active_tokens: Int[Tensor, " d_sae"], n_each: int, min_tokens: int
) -> tuple[list[int], list[int]]:
    centre = torch.arange(len(mean), dtype=mean.dtype) @ mean / mean.sum(0)
    candidates = (active_tokens >= min_tokens).nonzero().flatten().tolist()
    if len(candidates) < 2:
        raise ValueError(
            f"{len(candidates)} features are active on at least {min_tokens} tokens (the most active one on "
            f"{int(active_tokens.max())}): give more tokens, a lower min_tokens, or features by number"
        )
    peak = mean.argmax(0)
    candidates.sort(key=lambda feature: (int(peak[feature]), float(centre[feature]), feature))
    n = min(n_each, len(candidates) // 2)
    return candidates[:n], candidates[::-1][:n]
