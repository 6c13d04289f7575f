"""Import of checkpoints trained with the RouteSAE authors' code: RouteSAEs and Crosscoders."""

from __future__ import annotations

import re
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
from routesae_lens.saes.crosscoder import (
    Crosscoder,
    CrosscoderJumpReLUSAE,
    CrosscoderJumpReLUSAEConfig,
    CrosscoderStandardSAE,
    CrosscoderStandardSAEConfig,
    CrosscoderTopKSAE,
    CrosscoderTopKSAEConfig,
)
from routesae_lens.saes.route_sae import RouteSAE

_ROUTESAE_KEYS = {
    "router.weight",
    "sae.pre_bias",
    "sae.latent_bias",
    "sae.encoder.weight",
    "sae.decoder.weight",
}


def from_authors_checkpoint(
    path: str | Path,
    *,
    layers: Sequence[int],
    k: int | None = None,
    theta: float | None = None,
    aggregator: str = "sum",
    routing: str = "hard",
    model_name: str | None = None,
) -> RouteSAE | Crosscoder:
    """Load a state dict (``.pt``) of the authors' code, a RouteSAE or a Crosscoder by the tensors in it.

    No code in the file is executed.

    Args:
        path: the ``.pt`` file, a dict of tensors.
        layers: block numbers it was trained on. (Their ``start_layer``/``end_layer`` count Hugging Face
            hidden states, one above block numbers.)
        k: latents kept per token, their ``k`` or ``infer_k``; there is no ReLU after TopK, as theirs.
        theta: instead of ``k``, keep every latent above this value (their fixed-threshold inference).
            A Crosscoder with neither has a ReLU, as in their training.
        aggregator: of a RouteSAE: "sum" or "mean", as it was trained.
        routing: of a RouteSAE: "hard" or "soft", as it was trained.
        model_name: recorded in the metadata.

    Raises:
        ValueError: neither of the two, another number of layers, k and theta together, a RouteSAE with none
            of them, or a Crosscoder with ``aggregator`` or ``routing``.
    """
    if k is not None and theta is not None:
        raise ValueError(f"give exactly one of k and theta, got k={k}, theta={theta}")
    if theta is not None and theta <= 0:
        raise ValueError(f"theta must be positive, got {theta}")
    if aggregator not in ("sum", "mean") or routing not in ("hard", "soft"):
        raise ValueError(
            "the authors' RouteSAEs have aggregator 'sum' or 'mean' and routing 'hard' or 'soft', "
            f"got {aggregator!r} and {routing!r}"
        )
    layers = check_layers(layers)
    state = _load(path)
    if set(state) == _ROUTESAE_KEYS:
        if k is None and theta is None:
            raise ValueError("give exactly one of k and theta, got k=None, theta=None")
        return _route_sae(path, state, layers, k, theta, aggregator, routing, model_name)
    if (aggregator, routing) != ("sum", "hard"):
        raise ValueError(
            f"{path} is a Crosscoder: it has no router, so leave aggregator and routing out "
            f"(got {aggregator!r} and {routing!r})"
        )
    return _crosscoder(path, state, layers, k, theta, model_name)


def _load(path: str | Path) -> dict[str, Any]:
    """The state dict, with the keys of one of the two kinds."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types; torch's own text advises to load it unsafely
        raise ValueError(
            f"{path} is no file of plain tensors ({type(error).__name__}); nothing in it was run"
        ) from error
    found = set(state) if isinstance(state, dict) else type(state).__name__
    if found != _ROUTESAE_KEYS and not (isinstance(found, set) and found == _crosscoder_keys(found)):
        raise ValueError(
            f"{path} is no RouteSAE checkpoint (that has the tensors {sorted(_ROUTESAE_KEYS)}) and no Crosscoder "
            "checkpoint (latent_bias, and encoder.i.weight and decoder.i.weight for every layer i = 0, 1, ...): "
            f"found {found}"
        )
    return state


def _crosscoder_keys(found: set[Any]) -> set[str]:
    """Keys of the authors' Crosscoder of as many layers as ``found`` has encoders or decoders (at least one)."""
    numbered = [re.fullmatch(r"(encoder|decoder)\.\d+\.weight", str(key)) for key in found]
    n_layers = max(
        1, *(sum(m is not None and m[1] == kind for m in numbered) for kind in ("encoder", "decoder"))
    )
    return {"latent_bias"} | {
        f"{kind}.{i}.weight" for kind in ("encoder", "decoder") for i in range(n_layers)
    }


def _route_sae(
    path: str | Path,
    state: dict[str, Any],
    layers: list[int],
    k: int | None,
    theta: float | None,
    aggregator: str,
    routing: str,
    model_name: str | None,
) -> RouteSAE:
    d_sae, d_model = _two(state["sae.encoder.weight"])
    n_layers = _two(state["router.weight"])[0]
    _check_shapes(
        f"{path} is no RouteSAE checkpoint",
        state,
        {
            "router.weight": (n_layers, d_model),
            "sae.encoder.weight": (d_sae, d_model),
            "sae.decoder.weight": (d_model, d_sae),
            "sae.pre_bias": (d_model,),
            "sae.latent_bias": (d_sae,),
        },
    )
    if n_layers != len(layers):
        raise ValueError(f"{path} routes {n_layers} layers, but layers lists {len(layers)}: {layers}")
    shared: dict[str, Any] = {
        "d_in": n_layers * d_model,
        "d_sae": d_sae,
        "layers": layers,
        "aggregator": aggregator,
        "routing": routing,
        "metadata": _metadata(layers, model_name),
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


def _crosscoder(
    path: str | Path,
    state: dict[str, Any],
    layers: list[int],
    k: int | None,
    theta: float | None,
    model_name: str | None,
) -> Crosscoder:
    d_sae, d_model = _two(state["encoder.0.weight"])
    n_layers = len(state) // 2
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(n_layers):
        shapes |= {f"encoder.{i}.weight": (d_sae, d_model), f"decoder.{i}.weight": (d_model, d_sae)}
    _check_shapes(f"{path} is no Crosscoder checkpoint", state, shapes | {"latent_bias": (d_sae,)})
    if n_layers != len(layers):
        raise ValueError(f"{path} reads {n_layers} layers, but layers lists {len(layers)}: {layers}")
    encoders, decoders = (
        torch.cat([state[f"{kind}.{i}.weight"] for i in range(n_layers)], dim=dim)
        for kind, dim in (("encoder", 1), ("decoder", 0))
    )
    weights = {
        "W_enc": encoders.T.contiguous(),  # the sum of one product per layer is one product of the stack
        "b_enc": state["latent_bias"],
        "W_dec": decoders.T.contiguous(),
        "b_dec": encoders.new_zeros(n_layers * d_model),  # theirs has none
    }
    shared: dict[str, Any] = {
        "d_in": n_layers * d_model,
        "d_sae": d_sae,
        "layers": layers,
        "metadata": _metadata(layers, model_name),
    }
    sae: Crosscoder
    if k is not None:
        sae = CrosscoderTopKSAE(CrosscoderTopKSAEConfig(k=k, relu=False, **shared))
    elif theta is not None:
        sae = CrosscoderJumpReLUSAE(CrosscoderJumpReLUSAEConfig(**shared))
        weights["threshold"] = torch.full_like(weights["b_enc"], theta)
    else:
        sae = CrosscoderStandardSAE(CrosscoderStandardSAEConfig(**shared))
    sae.load_state_dict(weights)
    return sae


def _metadata(layers: list[int], model_name: str | None) -> SAEMetadata:
    return SAEMetadata(
        hook_name=stack_name(layers, "hook_resid_post"),
        model_name=model_name,
        context_size=512,
        prepend_bos=True,
        imported_from="authors' checkpoint",
    )


def _two(value: Any) -> tuple[int, int]:
    """The first two sizes, 0 for what is missing (which no expected shape then agrees with)."""
    first, second = (*getattr(value, "shape", ()), 0, 0)[:2]
    return first, second


def _check_shapes(what: str, state: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        found = tuple(getattr(state[name], "shape", ()))
        if found != shape:
            raise ValueError(f"{what}: {name} should have the shape {shape}, has {found}")
