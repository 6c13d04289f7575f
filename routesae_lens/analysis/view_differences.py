"""How a RouteSAE's layer views differ from the RouteSAE itself, measured on text.

A view (``RouteSAE.layer_view``) encodes every token at its layer, unscaled. The RouteSAE encodes a token at
the one layer that its router chooses, times p where routing is "hard". So views add tokens, and where p is
not 1 they give other latents even on the tokens that are routed to their layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.stream import read_batches, subjects_of
from routesae_lens.hook_points import check_layers, split_layers
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.router import Route


@dataclass
class ViewDifference:
    """One layer's view against the RouteSAE. Errors are in standardised, unscaled space, as in ``Evaluation``.

    "Here" are the tokens that the router sends to this layer, "elsewhere" the others. None: no such token.
    """

    layer: int
    tokens: int
    """Kept tokens; the view encodes all of them."""
    tokens_here: int
    share_elsewhere: float
    """Share of tokens that the view encodes although they are routed elsewhere."""
    mean_p: float | None
    """Mean factor by which the RouteSAE scales its input here; 1 where its routing rule scales nothing."""
    cosine: float | None
    """Mean cosine of the two latent vectors of a token, here."""
    cosine_min: float | None
    same_latents: float | None
    """Active latents in common / active in either, mean over the tokens here."""
    l0_routed: float | None
    """Active latents per token here, as the RouteSAE has them."""
    l0_view: float | None
    max_difference: float | None
    """Largest difference of a latent here, in units of p = 1: routed latents are divided by the token's p."""
    norm_mse_routed: float | None
    """Mean ||z - z_hat||^2 / ||z||^2 here, of the RouteSAE with p undone."""
    norm_mse_view: float | None
    reconstruction_difference: float | None
    """Mean ||z_hat of the view - z_hat of the RouteSAE||^2 / ||z||^2 here."""
    l0_elsewhere: float | None
    """Active latents per token of the view on the tokens that are routed elsewhere ..."""
    norm_mse_elsewhere: float | None
    """... and its error on them."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compare_views(
    sae: SAE[Any],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> list[ViewDifference]:
    """Compare the views of ``layers`` (all by default) with the RouteSAE on the same clean activations.

    An MLSAE (``routing="every"``) reads every token at every layer, so nothing is "elsewhere". With mixing
    rules ("soft", "top2") "here" means the layer of the largest weight, and the routed latents are those of
    the mixture.

    Args:
        sae: an inference RouteSAE.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: token ids, see ``held_out_tokens``.
        layers: block numbers.
        batch_size: sequences per forward.
        exclude_special_tokens: see ``read_batches``.
        exclude_first_position: see ``read_batches``.
        progress: show a progress bar.

    Raises:
        ValueError: not a RouteSAE, a layer that it does not route, or as ``layer_view`` and ``read_batches``.
    """
    if not isinstance(sae, RouteSAE):
        raise ValueError(f"expected an inference RouteSAE, got {type(sae).__name__} (inference_form(sae)?)")
    chosen = sae.layers if layers is None else check_layers(layers)
    tallies = {layer: _Tally(sae, sae.layer_view(layer)) for layer in chosen}
    subjects = subjects_of({"sae": sae}, model)
    batches = read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        progress="layer views" if progress else None,
    )
    for batch in batches:
        stack = batch.activations[subjects["sae"].point]
        if not batch.keep.any():
            continue
        kept = split_layers(stack, len(sae.layers))[batch.keep]
        route = None
        if sae.cfg.routing != "every":
            route = Route(*(field[batch.keep] for field in sae.route(stack, draw=batch.index)))
        for layer, tally in tallies.items():
            tally.add(kept[:, sae.layers.index(layer)], route)
    return [tally.result(layer) for layer, tally in tallies.items()]


class _Tally:
    """Sums over tokens of one layer, in float64."""

    def __init__(self, sae: RouteSAE, view: SAE[Any]):
        self.sae, self.view = sae, view
        self.index = sae.layers.index(view.cfg.metadata.layer_view["layer"])
        self.factor = view.cfg.metadata.layer_view["layer_scale"]
        self.tokens = self.here = 0
        self.sums: dict[str, float] = {}
        self.cosine_min, self.max_difference = float("inf"), 0.0

    def add(self, x: Float[Tensor, "token d_model"], route: Route | None) -> None:
        """``x`` are the model's activations at this layer, ``route`` the same tokens' routes."""
        here = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if route is not None:
            here = route.layer == self.index
        self.tokens, self.here = self.tokens + len(x), self.here + int(here.sum())
        latents = self.view.encode(x)
        z, out = standardize(x).x.double(), self._standardized(x, self.view.decode(latents))
        error = (out - z).pow(2).sum(-1) / z.pow(2).sum(-1).clamp_min(1e-12)
        l0 = latents.bool().sum(-1)
        self._sum("l0_elsewhere", l0[~here])
        self._sum("norm_mse_elsewhere", error[~here])
        self._sum("l0_view", l0[here])
        self._sum("norm_mse_view", error[here])
        if here.any():
            self._add_here(x[here], z[here], latents[here], out[here], route, here)

    def _add_here(
        self,
        x: Float[Tensor, "here d_model"],
        z: Float[Tensor, "here d_model"],
        latents: Float[Tensor, "here d_sae"],
        out: Float[Tensor, "here d_model"],
        route: Route | None,
        here: Bool[Tensor, " token"],
    ) -> None:
        if route is None:
            own = standardize(x.to(self.sae.dtype)).x if self.sae.cfg.standardize else x.to(self.sae.dtype)
            scale = torch.ones_like(own[:, 0])
        else:
            own, scale = route.input[here], route.scale[here]
        routed = self.sae.encode_routed(own)
        decoded = self.sae.decode(routed) / scale[:, None]
        theirs = decoded.double() if self.sae.cfg.standardize else self._standardized(x, decoded)
        p = scale / self.factor
        unscaled = routed.double() / p.double()[:, None]
        active, active_routed = latents.bool(), routed.bool()
        either = (active | active_routed).sum(-1).double()
        common = (active & active_routed).sum(-1).double()
        cosine = torch.cosine_similarity(latents.double(), unscaled, dim=-1)
        power = z.pow(2).sum(-1).clamp_min(1e-12)
        self._sum("mean_p", p)
        self._sum("cosine", cosine)
        self._sum("same_latents", torch.where(either > 0, common / either.clamp_min(1), 1.0))
        self._sum("l0_routed", active_routed.sum(-1))
        self._sum("norm_mse_routed", (theirs - z).pow(2).sum(-1) / power)
        self._sum("reconstruction_difference", (out - theirs).pow(2).sum(-1) / power)
        self.cosine_min = min(self.cosine_min, cosine.min().item())
        self.max_difference = max(self.max_difference, (latents.double() - unscaled).abs().max().item())

    def _sum(self, name: str, values: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + values.double().sum().item()

    @staticmethod
    def _standardized(x: Tensor, out: Tensor) -> Tensor:
        """``out``, in the model's space, as ``x`` is standardised."""
        stats = standardize(x.double())
        return (out.double() - stats.mean) / stats.std

    def result(self, layer: int) -> ViewDifference:
        here, elsewhere = self.here, self.tokens - self.here

        def mean(name: str, count: int = here) -> float | None:
            return self.sums[name] / count if count else None

        return ViewDifference(
            layer=layer,
            tokens=self.tokens,
            tokens_here=here,
            share_elsewhere=elsewhere / self.tokens,
            mean_p=mean("mean_p"),
            cosine=mean("cosine"),
            cosine_min=self.cosine_min if here else None,
            same_latents=mean("same_latents"),
            l0_routed=mean("l0_routed"),
            l0_view=mean("l0_view"),
            max_difference=self.max_difference if here else None,
            norm_mse_routed=mean("norm_mse_routed"),
            norm_mse_view=mean("norm_mse_view"),
            reconstruction_difference=mean("reconstruction_difference"),
            l0_elsewhere=mean("l0_elsewhere", elsewhere),
            norm_mse_elsewhere=mean("norm_mse_elsewhere", elsewhere),
        )
