"""Small routed SAEs of every architecture, for the tests of RouteSAE."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from routesae_lens.saes.route_sae import RouteTrainingSAE

LAYERS = [1, 3, 4]
D_MODEL, D_SAE = 10, 24
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3.0},
    "matryoshka_batchtopk": {"k": 3.0, "matryoshka_widths": [6, 12, 24]},
    "jumprelu": {"jumprelu_init_threshold": 0.05},
    "gated": {},
    "standard": {},
}


def make(architecture: str, seed: int = 0, layers: list[int] = LAYERS, **kwargs: Any) -> RouteTrainingSAE:
    """A training SAE with random weights and biases."""
    torch.manual_seed(seed)
    sae_class, config = get_sae_training_class(f"route_{architecture}")
    fields = {"d_in": len(layers) * D_MODEL, "d_sae": D_SAE, "layers": layers, **ARCHITECTURES[architecture]}
    if kwargs.get("routing") == "fixed":
        fields["fixed_layer"] = layers[-1]
    sae: Any = sae_class(config(**{**fields, **kwargs}))
    return randomize(sae)


@torch.no_grad()
def randomize(sae: Any) -> Any:
    """Weights as after some training: nothing is zero, of unit norm, or the transpose of something else."""
    for name, parameter in sae.named_parameters():
        if name == "threshold":
            parameter.uniform_(0.1, 0.5)
        elif name in ("W_enc", "W_dec", "W_router", "router_query"):
            parameter.normal_(0, 0.4)
        else:
            parameter.normal_(0, 0.1)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.7)
    return sae


@torch.no_grad()
def zero_biases(sae: Any) -> Any:
    for name, parameter in sae.named_parameters():
        if name.startswith("b_"):
            parameter.zero_()
    return sae


def stacks(*shape: int, n_layers: int = len(LAYERS), seed: int = 1) -> torch.Tensor:
    """Stacks whose layers differ in mean and scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, n_layers, D_MODEL, generator=generator)
    scale = torch.linspace(1, 4, n_layers)[:, None]
    return (x * scale + 0.3 * scale).flatten(-2)


def step(
    sae: TrainingSAE[Any], sae_in: torch.Tensor, dead: list[int] | None = None, n: int = 0
) -> TrainStepOutput:
    """One training forward pass; ``dead`` latents are those the auxiliary losses revive."""
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[dead or []] = True
    return sae.training_forward_pass(
        TrainStepInput(
            sae_in=sae_in,
            coefficients={"l1": 0.3, "l0": 0.2},
            dead_neuron_mask=mask,
            n_training_steps=n,
            is_logging_step=True,
        )
    )
