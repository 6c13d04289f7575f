"""Import of checkpoints trained with the RouteSAE authors' code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata

from routesae_lens.hook_points import check_layers, stack_name
from routesae_lens.saes.architectures import (
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
    RouteTopKSAE,
    RouteTopKSAEConfig,
)
from routesae_lens.saes.route_sae import RouteSAE

_KEYS = {"router.weight", "sae.pre_bias", "sae.latent_bias", "sae.encoder.weight", "sae.decoder.weight"}


def from_authors_checkpoint(
    path: str | Path,
    *,
    layers: Sequence[int],
    k: int | None = None,
    theta: float | None = None,
    aggregator: str = "sum",
    routing: str = "hard",
    model_name: str | None = None,
) -> RouteSAE:
    """Load a RouteSAE state dict (``.pt``) of the authors' code. No code in the file is executed.

    Args:
        path: the ``.pt`` file, a dict of tensors.
        layers: block numbers it was trained on. (Their ``start_layer``/``end_layer`` count Hugging Face
            hidden states, one above block numbers.)
        k: latents kept per token, their ``k`` or ``infer_k``; there is no ReLU after TopK, as theirs.
        theta: instead of ``k``, keep every latent above this value (their fixed-threshold inference).
        aggregator: "sum" or "mean", as it was trained.
        routing: "hard" or "soft", as it was trained.
        model_name: recorded in the metadata.

    Raises:
        ValueError: not such a checkpoint, another number of layers, or not exactly one of k and theta.
    """
    if (k is None) == (theta is None):
        raise ValueError(f"give exactly one of k and theta, got k={k}, theta={theta}")
    if theta is not None and theta <= 0:
        raise ValueError(f"theta must be positive, got {theta}")
    if aggregator not in ("sum", "mean") or routing not in ("hard", "soft"):
        raise ValueError(
            "the authors' RouteSAEs have aggregator 'sum' or 'mean' and routing 'hard' or 'soft', "
            f"got {aggregator!r} and {routing!r}"
        )
    layers = check_layers(layers)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types; torch's own text advises to load it unsafely
        raise ValueError(
            f"{path} is no file of plain tensors ({type(error).__name__}); nothing in it was run"
        ) from error
    found = set(state) if isinstance(state, dict) else type(state).__name__
    if found != _KEYS:
        raise ValueError(
            f"{path} is no RouteSAE checkpoint: expected the tensors {sorted(_KEYS)}, found {found}"
        )
    _check_shapes(path, state)
    n_layers, d_model = state["router.weight"].shape
    if n_layers != len(layers):
        raise ValueError(f"{path} routes {n_layers} layers, but layers lists {len(layers)}: {layers}")

    shared: dict[str, Any] = {
        "d_in": n_layers * d_model,
        "d_sae": state["sae.encoder.weight"].shape[0],
        "layers": layers,
        "aggregator": aggregator,
        "routing": routing,
        "metadata": SAEMetadata(
            hook_name=stack_name(layers, "hook_resid_post"),
            model_name=model_name,
            context_size=512,
            prepend_bos=True,
            imported_from="authors' checkpoint",
        ),
    }
    weights = {
        "W_router": state["router.weight"],
        "W_enc": state["sae.encoder.weight"].T.contiguous(),
        "b_enc": state["sae.latent_bias"],
        "W_dec": state["sae.decoder.weight"].T.contiguous(),
        "b_dec": state["sae.pre_bias"],
    }
    sae: RouteSAE
    if k is not None:
        sae = RouteTopKSAE(RouteTopKSAEConfig(k=k, relu=False, **shared))
    else:
        assert theta is not None
        sae = RouteJumpReLUSAE(RouteJumpReLUSAEConfig(**shared))
        weights["threshold"] = torch.full_like(weights["b_enc"], theta)
    sae.load_state_dict(weights)
    return sae


def _check_shapes(path: str | Path, state: dict[str, Any]) -> None:
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    d_sae, d_model = (shapes["sae.encoder.weight"] + (0, 0))[:2]
    n_layers = (shapes["router.weight"] + (0,))[0]
    expected = {
        "router.weight": (n_layers, d_model),
        "sae.encoder.weight": (d_sae, d_model),
        "sae.decoder.weight": (d_model, d_sae),
        "sae.pre_bias": (d_model,),
        "sae.latent_bias": (d_sae,),
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{path} is no RouteSAE checkpoint: {name} should have the shape {shape}, has {shapes[name]}"
            )
