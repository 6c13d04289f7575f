"""The methods that are compared: by name, a function that makes the training config of one SAE.

All of them but ``plain_topk`` share RouteSAE's standardisation, normalised loss and splice, so that only
what the name says differs. To add a method, give it an entry in :data:`METHODS`, or hand a mapping of your
own to ``sweep(..., methods=METHODS | {...})``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from sae_lens import TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import check_layers, layer_hook_name
from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES
from routesae_lens.saes.crosscoder import CROSSCODER_ARCHITECTURES

MakeConfig = Callable[..., TrainingSAEConfig]
"""``(model, layers, d_sae, sparsity, seed, **given) -> training config``; ``given`` are further fields of it.

The model may be None, before it is loaded: then the config is only made to find mistakes."""

SPARSITIES = {
    "k": "latents per token",
    "l1": "coefficient of the L1 penalty",
    "l0": "coefficient of the L0 penalty",
}
"""What the sparsity number of a method can be."""


class Method(NamedTuple):
    make: MakeConfig
    sparsity: str = "k"
    """A key of :data:`SPARSITIES`."""
    one_layer: bool = False
    """It reads the last of the layers; ``name@7`` makes it read block 7."""
    auxiliary: bool = True
    """Its config has SAELens' ``aux_loss_coefficient``."""
    needs_model: bool = False
    """``make`` cannot take None for the model, as a sweep does to find mistakes before it is loaded."""


def _stacked(
    config: Any,
    sparsity_field: str,
    model: Any,
    layers: list[int],
    d_sae: int,
    sparsity: int | float,
    seed: int,
    **given: Any,
) -> TrainingSAEConfig:
    """Of an SAE on a multi-layer hook point: RouteSAEs and Crosscoders."""
    types = {field.name: field.type for field in fields(config)}
    if types[sparsity_field] in (float, "float"):
        sparsity = float(sparsity)  # SAELens' BatchTopK has such a k
    known = {sparsity_field: sparsity} | ({"route_seed": seed} if "route_seed" in types else {})
    if model is None:
        made: TrainingSAEConfig = config(d_in=8 * len(layers), layers=layers, d_sae=d_sae, **known | given)
    else:
        made = config.for_model(model, layers=layers, d_sae=d_sae, **known | given)
    return made


def _on_one_layer(make: MakeConfig, model: Any, layers: list[int], *args: Any, **given: Any) -> Any:
    """A RouteSAE over one layer is an ordinary SAE with the same standardisation, loss and splice."""
    return make(model, layers[-1:], *args, **given)


def _plain_topk(
    model: Any, layers: list[int], d_sae: int, sparsity: int | float, seed: int, **given: Any
) -> TrainingSAEConfig:
    """SAELens' own TopK SAE on the last layer's hook, as a check of ``topk``.

    It is no exact twin: one scale for all tokens in place of standardisation of each, and a loss that is
    not divided by each token's norm.
    """
    given = {"normalize_activations": "expected_average_only_in", **given}
    d_in = 8 if model is None else backend_of(model).d_model
    cfg = TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=int(sparsity), **given)
    if model is not None:
        check_layers(layers[-1:], backend_of(model).n_layers)
        cfg.metadata.hook_name = layer_hook_name(model, layers[-1], "hook_resid_post")
    return cfg


def _route(**given: Any) -> Method:
    return Method(partial(_stacked, ROUTE_ARCHITECTURES["route_topk"], "k", **given))


def _single(architecture: str, sparsity_field: str, **about: Any) -> Method:
    make = partial(_on_one_layer, partial(_stacked, ROUTE_ARCHITECTURES[architecture], sparsity_field))
    return Method(make, one_layer=True, **about)


def _crosscoder(architecture: str, sparsity_field: str, **about: Any) -> Method:
    return Method(partial(_stacked, CROSSCODER_ARCHITECTURES[architecture], sparsity_field), **about)


METHODS: dict[str, Method] = {
    # RouteSAE: the paper's, and other rules and aggregators of the router
    "route": _route(),
    "route_soft": _route(routing="soft"),
    "route_straight_through": _route(routing="straight_through"),
    "route_mean": _route(aggregator="mean"),
    "route_attention": _route(aggregator="attention"),
    "route_mse": _route(loss="mse"),  # Eq. 12 as it is written
    "route_balanced": _route(balance_coefficient=0.1),
    "route_entropy": _route(entropy_coefficient=-0.1),  # rewards entropy
    "route_straight_through_balanced": _route(routing="straight_through", balance_coefficient=0.1),
    "route_top2": _route(routing="top2"),
    "route_layer_scale": _route(layer_scale=True),
    "distilled": _route(routing="distilled"),
    "distilled_mean": _route(routing="distilled", aggregator="mean"),
    "oracle": _route(routing="oracle"),
    # No router: a random layer, one layer, every layer
    "random": _route(routing="random"),
    "random_batch": _route(routing="random", random_per="batch"),
    "topk": _single("route_topk", "k"),
    "relu": _single("route_standard", "l1_coefficient", sparsity="l1", auxiliary=False),
    "gated": _single("route_gated", "l1_coefficient", sparsity="l1", auxiliary=False),
    "jumprelu": _single("route_jumprelu", "l0_coefficient", sparsity="l0", auxiliary=False),
    "plain_topk": Method(_plain_topk, one_layer=True),
    "mlsae": _route(routing="every"),
    # One code for all layers together
    "crosscoder_topk": _crosscoder("crosscoder_topk", "k"),
    "crosscoder_batchtopk": _crosscoder("crosscoder_batchtopk", "k"),
    "crosscoder_relu": _crosscoder("crosscoder_standard", "l1_coefficient", sparsity="l1", auxiliary=False),
}


def find_method(name: str, methods: Mapping[str, Method] = METHODS) -> tuple[Method, int | None]:
    """The method ``name``, and the block number of a name such as ``topk@7``.

    Raises:
        ValueError: no such method, or a block given to one that reads several layers.
    """
    base, at, block = name.partition("@")
    if base not in methods:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(methods)}")
    method = methods[base]
    if not at:
        return method, None
    if not method.one_layer:
        single = [known for known, one in methods.items() if one.one_layer]
        raise ValueError(f"method {name!r}: {base} reads several layers; @ goes with {', '.join(single)}")
    if not re.fullmatch(r"\d+", block):
        raise ValueError(f"method {name!r}: expected a block number after @, as in {base}@7")
    return method, int(block)


def make_config(
    name: str,
    model: Any,
    layers: list[int],
    d_sae: int,
    sparsity: int | float,
    seed: int,
    *,
    methods: Mapping[str, Method] = METHODS,
    aux_loss_coefficient: int | float = 0.0,
    **given: Any,
) -> TrainingSAEConfig:
    """The training config of one SAE.

    Args:
        name: of the method, with ``@block`` for another layer than the last.
        model: HookedTransformer, TransformerBridge or HookedProxyLM; None for a trial.
        layers: routed block numbers; methods that read one layer take the last.
        d_sae: number of latents.
        sparsity: see :data:`SPARSITIES`.
        seed: of random routing. (Weights are seeded by ``train``.)
        aux_loss_coefficient: of methods that have one; the paper trains without.
        given: further fields of the config.
    """
    method, block = find_method(name, methods)
    if method.auxiliary:
        given = {"aux_loss_coefficient": aux_loss_coefficient, **given}
    return method.make(model, layers if block is None else [block], d_sae, sparsity, seed, **given)
