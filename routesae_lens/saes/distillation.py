"""What trains a router beside the reconstruction: an oracle to imitate, and losses on its probabilities.

The oracle of a token is the layer whose activation the shared SAE reconstructs with the least normalised
error. A router of the paper's form (linear on the sum of layers) learns by cross-entropy to name it, while the
SAE trains on the layers that are chosen. Asking the oracle costs one encoding per layer, so it is asked on a
part of each batch only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from routesae_lens.saes.layers import Layers
from routesae_lens.saes.router import Route, uniform_layers

if TYPE_CHECKING:
    from routesae_lens.saes.route_sae import RouteTrainingSAE


class Lesson(NamedTuple):
    """What one step of distillation gives."""

    route: Route
    """What the shared SAE is trained on."""
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]


def distill(sae: RouteTrainingSAE, x: Layers, step: int) -> Lesson:
    """One step of a router that imitates the oracle.

    Args:
        sae: its config says for how long layers are uniform, how many tokens explore, and how many ask the oracle.
        x: activations of every layer, ``(batch, layer, d_model)``. The oracle is asked on the first tokens of
            the batch, which is shuffled.
        step: training steps done.
    """
    cfg, (n, n_layers, _) = sae.cfg, x.shape
    probs = sae._probs(x)
    asked = ceil(cfg.oracle_fraction * n)
    layer, losses, metrics = probs.argmax(-1), {}, {}
    if asked:
        best = sae.layer_errors(x[:asked]).argmin(-1)
        losses["distillation_loss"] = nn.functional.nll_loss(probs[:asked].clamp_min(1e-20).log(), best)
        metrics["oracle_agreement"] = (layer[:asked] == best).float().mean()
        layer = torch.cat([best, layer[asked:]])
    random = uniform_layers((n,), n_layers, cfg.route_seed, draw=2 * step, device=probs.device)
    coin = uniform_layers((n,), 2**20, cfg.route_seed, draw=2 * step + 1, device=probs.device) / 2**20
    explore = coin < (1.0 if step < (cfg.uniform_steps or 0) else cfg.explore)
    layer = torch.where(explore, random, layer)
    return Lesson(sae.read_layers(x, probs, layer, torch.ones_like(probs[..., 0])), losses, metrics)


def router_losses(route: Route, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    """Load balancing (Fedus et al. 2022, Eq. 4) and entropy, each times its coefficient where it has one."""
    losses, probs = {}, route.probs.flatten(0, -2)
    if balance := coefficients.get("balance"):
        # (the router's own choice; distillation also reads the oracle's layers and random ones)
        share = nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype).mean(0)
        losses["balance_loss"] = balance * probs.shape[-1] * (share * probs.mean(0)).sum()
    if entropy := coefficients.get("entropy"):
        losses["entropy_loss"] = entropy * torch.special.entr(probs.clamp_min(1e-20)).sum(-1).mean()
    return losses


def route_metrics(route: Route, layers: Sequence[int]) -> dict[str, Tensor]:
    """Collapse metrics of one batch: mean p of the chosen layer, entropy of probs (nats), and for each layer the
    share of tokens that read it and its mean probability."""
    probs = route.probs.detach().float().flatten(0, -2)
    entropy = torch.special.entr(probs).sum(-1).mean()
    chosen = nn.functional.one_hot(route.layer.flatten(), len(layers)).float().mean(0)
    metrics = {
        "route_mean_p": probs.gather(-1, route.layer.flatten()[:, None]).mean(),
        "route_entropy": entropy,
    }
    for i, layer in enumerate(layers):
        metrics |= {f"layer_share/{layer}": chosen[i], f"layer_weight/{layer}": probs[:, i].mean()}
    return metrics
