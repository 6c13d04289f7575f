"""Small Crosscoders of every architecture, for their tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routed_saes import D_MODEL, D_SAE, LAYERS, randomize
from sae_lens.registry import get_sae_class, get_sae_training_class
from torch import Tensor

OPTIONS: dict[str, dict[str, Any]] = {"topk": {"k": 3}, "batchtopk": {"k": 3.0}, "standard": {}}
INFERENCE: dict[str, dict[str, Any]] = {"topk": {"k": 3}, "jumprelu": {}, "standard": {}}
every_training = pytest.mark.parametrize("architecture", OPTIONS)
every_inference = pytest.mark.parametrize("architecture", INFERENCE)


def make(architecture: str, layers: list[int] = LAYERS, **kwargs: Any) -> Any:
    """A Crosscoder in training, with random weights and biases."""
    torch.manual_seed(0)
    sae_class, config = get_sae_training_class(f"crosscoder_{architecture}")
    fields = {"d_in": len(layers) * D_MODEL, "d_sae": D_SAE, "layers": layers, **OPTIONS[architecture]}
    return randomize(sae_class(config(**{**fields, **kwargs})))


def make_inference(architecture: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    sae_class, config = get_sae_class(f"crosscoder_{architecture}")
    fields = {"d_in": len(LAYERS) * D_MODEL, "d_sae": D_SAE, "layers": LAYERS, **INFERENCE[architecture]}
    return randomize(sae_class(config(**{**fields, **kwargs})))


def by_layer(stack: Tensor, n_layers: int = len(LAYERS)) -> list[Tensor]:
    """Each layer's activation, standardised by torch's own mean and std."""
    layers = stack.unflatten(-1, (n_layers, -1)).unbind(-2)
    return [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) for x in layers]
