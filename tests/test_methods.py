"""The table of methods: what each name makes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from transformer_lens import HookedTransformer

from routesae_lens.saes.experts import EXPERT_ARCHITECTURES
from routesae_lens.training.methods import (
    METHODS,
    SPARSITIES,
    Method,
    find_method,
    make_config,
    option_problems,
)
from routesae_lens.training.train import train

LAYERS = [1, 2, 4]
SPARSITY = {"k": 4, "l1": 0.5, "l0": 0.5}


def made(model: Any, name: str, **options: Any) -> Any:
    if METHODS[name.partition("@")[0]].config is EXPERT_ARCHITECTURES["route_scale"]:
        options = {
            "n_experts": 4,
            **options,
        }  # with the default of 16 one expert of 48 latents has less than k
    sparsity = SPARSITY[find_method(name)[0].sparsity]
    return make_config(name, model, LAYERS, 48, sparsity, 7, **options)


EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "route": ("route_topk", {"routing": "hard", "k": 4, "route_seed": 7, "aggregator": "sum"}),
    "route_soft": ("route_topk", {"routing": "soft"}),
    "route_straight_through": ("route_topk", {"routing": "straight_through"}),
    "route_mean": ("route_topk", {"routing": "hard", "aggregator": "mean"}),
    "route_attention": ("route_topk", {"routing": "hard", "aggregator": "attention"}),
    "route_mse": ("route_topk", {"routing": "hard", "loss": "mse"}),
    "route_balanced": ("route_topk", {"routing": "hard", "balance_coefficient": 0.1}),
    "route_entropy": ("route_topk", {"routing": "hard", "entropy_coefficient": -0.1}),
    "route_straight_through_balanced": (
        "route_topk",
        {"routing": "straight_through", "balance_coefficient": 0.1},
    ),
    "route_top2": ("route_topk", {"layers": LAYERS, "routing": "top2"}),
    "route_layer_scale": ("route_topk", {"routing": "hard", "layer_scale": True}),
    "random": ("route_topk", {"routing": "random", "random_per": "token", "route_seed": 7}),
    "random_batch": ("route_topk", {"routing": "random", "random_per": "batch"}),
    "topk": ("route_topk", {"layers": [4], "loss": "normalized_mse", "standardize": True}),
    "relu": ("route_standard", {"layers": [4], "l1_coefficient": 0.5}),
    "gated": ("route_gated", {"layers": [4], "l1_coefficient": 0.5}),
    "jumprelu": ("route_jumprelu", {"layers": [4], "l0_coefficient": 0.5}),
    "plain_topk": ("topk", {"k": 4, "normalize_activations": "expected_average_only_in"}),
    "scope_topk": (
        "annealed_topk",
        {"k": 4, "k_anneal_steps": None, "init": "llama_scope", "apply_b_dec_to_input": False},
    ),
    "scope_topk_fixed_k": ("annealed_topk", {"k": 4, "k_anneal_steps": 0, "init": "llama_scope"}),
    "switch": ("route_scale", {"layers": [4], "active_experts": 1, "feature_scaling": "none", "k": 4}),
    "scale": ("route_scale", {"layers": [4], "active_experts": 2, "feature_scaling": "mean"}),
    "scale_unscaled": ("route_scale", {"layers": [4], "active_experts": 2, "feature_scaling": "none"}),
    "route_scale": ("route_scale", {"layers": LAYERS, "routing": "hard", "feature_scaling": "mean"}),
    "mlsae": ("route_topk", {"layers": LAYERS, "routing": "every", "k": 4}),
    "distilled": ("route_topk", {"layers": LAYERS, "routing": "distilled", "k": 4}),
    "distilled_mean": ("route_topk", {"routing": "distilled", "aggregator": "mean"}),
    "oracle": ("route_topk", {"layers": LAYERS, "routing": "oracle", "k": 4}),
    "crosscoder_topk": ("crosscoder_topk", {"layers": LAYERS, "k": 4, "d_in": 96}),
    "crosscoder_batchtopk": ("crosscoder_batchtopk", {"layers": LAYERS, "k": 4.0}),
    "crosscoder_relu": ("crosscoder_standard", {"layers": LAYERS, "l1_coefficient": 0.5}),
}


def test_every_method_has_its_row_here_and_a_known_sparsity():
    assert EXPECTED.keys() == METHODS.keys()
    assert {method.sparsity for method in METHODS.values()} == set(SPARSITIES)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_the_config_its_name_says(tiny_hooked: HookedTransformer, name: str):
    architecture, fields = EXPECTED[name]
    config = made(tiny_hooked, name)
    assert config.architecture() == architecture
    assert {field: getattr(config, field) for field in fields} == fields
    assert config.d_sae == 48
    if METHODS[name].auxiliary:
        assert config.aux_loss_coefficient == 0
        assert made(tiny_hooked, name, aux_loss_coefficient=0.25).aux_loss_coefficient == 0.25
    assert made(tiny_hooked, name).metadata.hook_name.startswith("blocks.4.hook_resid_post")
    assert made(None, name).architecture() == architecture  # a trial, without a model


@pytest.mark.parametrize("layer", [0, 1, 5])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.one_layer])
def test_a_method_of_one_layer_can_read_any(tiny_hooked: HookedTransformer, name: str, layer: int):
    config = made(tiny_hooked, f"{name}@{layer}")
    assert config.d_in == 32
    assert config.metadata.hook_name.startswith(f"blocks.{layer}.hook_resid_post")
    with pytest.raises(ValueError, match="between 0 and 5"):
        made(tiny_hooked, f"{name}@6")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rout", "unknown method 'rout'; known: route, route_soft"),
        ("rout@3", "unknown method 'rout@3'"),
        ("route@3", "'route@3': route reads several layers; @ goes with topk, relu"),
        ("topk@", "expected a block number after @"),
        ("topk@-1", "expected a block number after @"),
    ],
)
def test_names_that_are_no_method(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        find_method(name)


@pytest.mark.parametrize(
    ("name", "options", "messages"),
    [
        ("route", {"k": 16}, ["k is set by the sparsity"]),
        ("relu", {"l1_coefficient": 3.0}, ["l1_coefficient is set by the sparsity"]),
        ("plain_topk", {"k": 16}, ["k is set by the sparsity"]),
        ("route", {"routing": "soft"}, ["routing is set by the method"]),
        ("distilled", {"routing": "soft"}, ["routing is set by the method"]),
        ("route_mean", {"aggregator": "sum"}, ["aggregator is set by the method"]),
        ("random", {"route_seed": 3}, ["route_seed is set by the seed"]),
        ("route", {"metadata": {}, "layers": [1]}, ["metadata is set by the model", "layers is set by"]),
        ("topk", {"los": 1, "lss": 2}, ["no field los, lss; fields: aggregator, apply_b_dec_to_input, aux"]),
        ("relu", {"aux_loss_coefficient": 1.0}, ["no field aux_loss_coefficient"]),
        ("switch", {"active_experts": 2}, ["active_experts is set by the method"]),
        ("scale_unscaled", {"feature_scaling": "mean"}, ["feature_scaling is set by the method"]),
        ("scale", {"feature_scaling": "low"}, ["unknown feature_scaling 'low'; known: none, mean, identity"]),
        ("route", {"balance_coefficient": "x"}, ["balance_coefficient must be float, got 'x'"]),
        ("route", {"relu": 1}, ["relu must be bool, got 1"]),
        ("route", {"dtype": "float99"}, ["unknown dtype 'float99'; known: float32"]),
        ("route", {"decoder_init_norm": "big"}, ["decoder_init_norm must be float | None, got 'big'"]),
    ],
)
def test_options_that_a_method_does_not_take(name: str, options: dict[str, Any], messages: list[str]):
    found = option_problems(METHODS[name], options)
    assert len(found) == len(messages)
    for message, problem in zip(messages, found, strict=True):
        assert message in problem
    if not options.keys() & {"aux_loss_coefficient", "layers"}:  # (arguments of make_config's own)
        with pytest.raises(ValueError, match=re.escape(messages[0])):
            made(None, name, **options)


def test_options_that_a_method_takes(tiny_hooked: HookedTransformer):
    options = {"loss": "mse", "decoder_init_norm": None, "balance_coefficient": 1.0, "dtype": "bfloat16"}
    config = made(tiny_hooked, "route", **options)
    assert {name: getattr(config, name) for name in options} == options
    assert made(tiny_hooked, "route", aggregator="mean").aggregator == "mean"
    assert option_problems(METHODS["crosscoder_batchtopk"], {"aux_loss_coefficient": 1}) == []  # as in TOML


def test_a_recipe_may_add_its_own(tiny_hooked: HookedTransformer):
    def make(model: Any, layers: list[int], *args: Any, **given: Any) -> Any:
        return METHODS["route"].make(model, layers[:2], *args, **given)

    own = METHODS | {"two": Method(make)}
    assert make_config("two", tiny_hooked, LAYERS, 48, 4, 0, methods=own).layers == [1, 2]
    assert "two" not in METHODS


@pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of the data")
def test_all_methods_train_together_and_load(tiny_hooked: HookedTransformer, tmp_path: Any):
    generator = torch.Generator().manual_seed(0)
    rows = Dataset.from_dict({"tokens": torch.randint(64, (60, 16), generator=generator).tolist()})
    configs = {name: made(tiny_hooked, name) for name in METHODS}
    result = train(
        tiny_hooked, configs, rows, output=tmp_path, training_tokens=320, context_size=16, batch_size=32
    )
    assert result.saes.keys() == METHODS.keys()
    for name, path in result.paths.items():
        loaded = SAE.load_from_disk(path)
        assert all(torch.isfinite(tensor).all() for tensor in loaded.state_dict().values()), name
