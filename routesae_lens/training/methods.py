"""The methods that are compared: by name, a function that makes the training config of one SAE.

All of them but the ordinary ones (``plain_topk``, ``scope_topk``) share RouteSAE's standardisation, normalised
loss and splice, so that only what the name says differs. To add a method, give it an entry in :data:`METHODS`,
or hand a mapping of your own to ``sweep(..., methods=METHODS | {...})``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sae_lens import TopKTrainingSAEConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import TrainingSAEConfig

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import check_layers, layer_hook_name
from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES
from routesae_lens.saes.crosscoder import CROSSCODER_ARCHITECTURES
from routesae_lens.saes.experts import EXPERT_ARCHITECTURES
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAEConfig
from routesae_lens.training.presets import PRESETS

MakeConfig = Callable[..., TrainingSAEConfig]
"""``(model, layers, d_sae, sparsity, seed, **given) -> training config``; ``given`` are further fields of it.

The model may be None, before it is loaded: then the config is only made to find mistakes."""

SPARSITIES = {
    "k": "latents per token",
    "l1": "coefficient of the L1 penalty",
    "l0": "coefficient of the L0 penalty",
}
"""What the sparsity number of a method can be."""

SET_ELSEWHERE = {
    **dict.fromkeys(("d_in", "device", "metadata"), "the model"),
    **{"layers": "the layers", "d_sae": "d_sae", "routing": "the method", "route_seed": "the seed"},
}
"""Config fields that no option may set, and what does. (A rule of the router is what a method is named for.)"""


TRIAL_D_MODEL = 2**20
"""Stands for a d_model that is not known yet; large, so that no k or start of K-annealing seems too large."""
TRIAL_D_SAE = 1536 * math.lcm(*range(1, 26))
"""Likewise for a d_sae that is not known yet; every usual number of experts divides it."""


class Method(NamedTuple):
    """One way to train an SAE, for a sweep: what makes its config, and what its sparsity number is."""

    make: MakeConfig
    sparsity: str = "k"
    """A key of :data:`SPARSITIES`."""
    one_layer: bool = False
    """It reads the last of the layers; ``name@7`` makes it read block 7."""
    auxiliary: bool = True
    """Its config has SAELens' ``aux_loss_coefficient``."""
    needs_model: bool = False
    """``make`` cannot take None for the model, as a sweep does to find mistakes before it is loaded."""
    config: type[TrainingSAEConfig] | None = None
    """What ``make`` makes. Options are checked against its fields; None leaves that to ``make``."""
    sets: Mapping[str, str] = {}
    """Further fields that no option may set, and what does, see :data:`SET_ELSEWHERE`."""


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
        made: TrainingSAEConfig = config(
            d_in=TRIAL_D_MODEL * len(layers), layers=layers, d_sae=d_sae, **known | given
        )
    else:
        made = config.for_model(model, layers=layers, d_sae=d_sae, **known | given)
    return made


def _on_one_layer(make: MakeConfig, model: Any, layers: list[int], *args: Any, **given: Any) -> Any:
    """A RouteSAE over one layer is an ordinary SAE with the same standardisation, loss and splice."""
    return make(model, layers[-1:], *args, **given)


def _plain(
    config: Any,
    preset: Mapping[str, Any],
    model: Any,
    layers: list[int],
    d_sae: int,
    sparsity: int | float,
    seed: int,
    **given: Any,
) -> TrainingSAEConfig:
    """An ordinary TopK SAE on the last layer's hook: SAELens' own as a check of ``topk``, or Llama Scope's.

    It is no exact twin of ``topk``: one scale for all tokens in place of standardisation of each, and a loss that
    is not divided by each token's norm.
    """
    d_in = TRIAL_D_MODEL if model is None else backend_of(model).d_model
    cfg: TrainingSAEConfig = config(d_in=d_in, d_sae=d_sae, k=int(sparsity), **{**preset, **given})
    if model is not None:
        check_layers(layers[-1:], backend_of(model).n_layers)
        cfg.metadata.hook_name = layer_hook_name(model, layers[-1], "hook_resid_post")
    return cfg


def _sets(sparsity_field: str, *fields_of_the_method: str) -> dict[str, str]:
    return {sparsity_field: "the sparsity"} | dict.fromkeys(fields_of_the_method, "the method")


def _route(**given: Any) -> Method:
    config: Any = ROUTE_ARCHITECTURES["route_topk"]
    return Method(partial(_stacked, config, "k", **given), config=config, sets=_sets("k", *given))


def _experts(*, one_layer: bool = False, **given: Any) -> Method:
    config: Any = EXPERT_ARCHITECTURES["route_scale"]
    make = partial(_stacked, config, "k", **given)
    make = partial(_on_one_layer, make) if one_layer else make
    return Method(make, one_layer=one_layer, config=config, sets=_sets("k", *given))


def _single(architecture: str, sparsity_field: str, **about: Any) -> Method:
    config: Any = ROUTE_ARCHITECTURES[architecture]
    make = partial(_on_one_layer, partial(_stacked, config, sparsity_field))
    return Method(make, one_layer=True, config=config, sets=_sets(sparsity_field), **about)


def _ordinary(config: Any, preset: Mapping[str, Any], *sets: str) -> Method:
    """``preset`` holds fields that options override, unless the method ``sets`` them."""
    return Method(partial(_plain, config, preset), one_layer=True, config=config, sets=_sets("k", *sets))


def _crosscoder(architecture: str, sparsity_field: str, **about: Any) -> Method:
    config: Any = CROSSCODER_ARCHITECTURES[architecture]
    make = partial(_stacked, config, sparsity_field)
    return Method(make, config=config, sets=_sets(sparsity_field), **about)


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
    "plain_topk": _ordinary(TopKTrainingSAEConfig, {"normalize_activations": "expected_average_only_in"}),
    # Llama Scope's SAE; and with one k throughout (its figure 12)
    "scope_topk": _ordinary(AnnealedTopKTrainingSAEConfig, PRESETS["llama_scope"].sae),
    "scope_topk_fixed_k": _ordinary(
        AnnealedTopKTrainingSAEConfig, {**PRESETS["llama_scope"].sae, "k_anneal_steps": 0}, "k_anneal_steps"
    ),
    "mlsae": _route(routing="every"),
    # Mixtures of experts; their numbers are options (n_experts, active_experts)
    "switch": _experts(one_layer=True, active_experts=1, feature_scaling="none"),
    "scale": _experts(one_layer=True),
    "scale_unscaled": _experts(one_layer=True, feature_scaling="none"),
    "route_scale": _experts(),
    # One code for all layers together
    "crosscoder_topk": _crosscoder("crosscoder_topk", "k"),
    "crosscoder_batchtopk": _crosscoder("crosscoder_batchtopk", "k"),
    "crosscoder_relu": _crosscoder("crosscoder_standard", "l1_coefficient", sparsity="l1", auxiliary=False),
}
"""The methods of a sweep by name; ``METHODS | {...}`` adds yours."""


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

    Raises:
        ValueError: no such method, fields that it does not have or that its name, sparsity or seed sets, or
            values that cannot be.
    """
    method, block = find_method(name, methods)
    if problems := option_problems(method, given):
        raise ValueError("; ".join(problems))
    if method.auxiliary:
        given = {"aux_loss_coefficient": aux_loss_coefficient, **given}
    return method.make(model, layers if block is None else [block], d_sae, sparsity, seed, **given)


def option_problems(method: Method, options: Mapping[str, Any]) -> list[str]:
    """Every field of ``options`` that ``method`` does not take, and every value of a wrong type."""
    elsewhere = SET_ELSEWHERE | dict(method.sets)
    known: dict[str, Any] = {}
    if method.config is not None:
        hints = get_type_hints(method.config)
        known = {field.name: hints[field.name] for field in fields(method.config)}
    found = []
    if known and (unknown := [name for name in options if name not in known and name not in elsewhere]):
        takes = ", ".join(sorted(known.keys() - elsewhere))
        found.append(f"there is no field {', '.join(unknown)}; fields: {takes}")
    for name, value in options.items():
        if name in elsewhere:
            found.append(f"{name} is set by {elsewhere[name]}, it cannot be an option")
        elif name == "dtype" and value not in list(DTYPE_MAP):
            found.append(f"unknown dtype {value!r}; known: {', '.join(DTYPE_MAP)}")
        elif name in known and get_origin(known[name]) is Literal and value not in get_args(known[name]):
            found.append(f"unknown {name} {value!r}; known: {', '.join(map(str, get_args(known[name])))}")
        elif name in known and not _fits(value, known[name]):
            expected = getattr(known[name], "__name__", None) if isinstance(known[name], type) else None
            found.append(f"{name} must be {expected or known[name]}, got {value!r}")
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what a config's field says; an int may stand for a float, as in a TOML file."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return value in args
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(one, args[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True
