"""What a sweep trains: its settings, and mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweeps import CONFIG, ids, run

from routesae_lens.training.sweep_config import SweepConfig

MISTAKES: dict[str, Any] = {
    "methods": ["rout", "topk", "topk", "relu", "route@3"],
    "k": [4, -8, 4, 2.5],
    "seeds": [0, 0],
    "layers": [3, 1],
    "training_tokens": 40,
    "batch_size": 64,
    "buffer_tokens": 2,
    "lr": "fast",
    "schedule": "cosine",
    "scedule": "paper",
    "options": {"gated": {}},
    "unscaled": 1,
}


def test_a_wrong_spec_lists_every_mistake_at_once():
    with pytest.raises(ValueError) as error:
        SweepConfig.from_dict(MISTAKES)
    message = str(error.value)
    assert message.startswith("the sweep has 16 mistakes:")
    for part in (
        "unknown setting 'scedule'; known: methods, k,",
        "unknown method 'rout'; known: route,",
        "methods holds 'topk' more than once",
        "'route@3': route reads several layers",
        "method relu has no sparsity: give sparsities.relu (coefficient of the L1 penalty",
        "k holds -8; expected an integer, 1 or more",
        "k holds 2.5; expected an integer",
        "k holds 4 more than once",
        "seeds holds 0 more than once",
        "layers must be strictly increasing, got [3, 1]",
        "training_tokens = 40 is less than one batch of 64",
        "buffer_tokens = 2 must hold at least two batches of 64",
        "lr must be a positive number, got 'fast'",
        "unknown schedule 'cosine'",
        "options are given for 'gated', which is not among the methods",
        "unscaled must be true or false, got 1",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"d_sae": 1}, ["route, k = 2: more than d_sae = 1", "topk, k = 4: more than d_sae = 1"]),
        (
            {"options": {"route": {"loss": "rmse"}, "topk": {"los": 1}}},
            [
                "unknown loss 'rmse'; known: normalized_mse, mse",
                "options.topk: there is no field los; fields: ",
            ],
        ),
        ({"methods": []}, ["methods is empty"]),
        ({"methods": "route"}, ["methods must be a list, got 'route'"]),
        ({"k": []}, ["method route has no sparsity: give sparsities.route or k"]),
        ({"sparsities": {"relu": [0, 1]}}, ["sparsities.relu holds 0; expected a positive number"]),
        ({"sparsities": {"relu": [1], "gated": [1]}}, ["sparsities are given for 'gated'"]),
        ({"options": {"route": 3}}, ["options.route must be a table of config fields"]),
        ({"training_tokens": None}, ["training_tokens must be an integer, 1 or more; got None"]),
        (
            {"methods": [["route"]], "schedule": {}},
            ["methods holds ['route']; expected a name", "schedule {}"],
        ),
        (
            {"seeds": [2**63]},
            ["seeds holds 9223372036854775808; expected an integer, 0 or more and below 2**63"],
        ),
        ({"lr": 10**400, "k": [10**400]}, ["lr must be a positive number", "k holds 1000"]),
        (
            {"methods": ["rout", "route", "topk"], "options": {"topk": {"los": 1, "lss": 2, "k": 3}}},
            [
                "unknown method 'rout'",
                "options.topk: there is no field los, lss",
                "options.topk: k is set by",
            ],
        ),
        (
            {"methods": ["rout", "route"], "seeds": [-1], "options": {"route": {"site": "hook_nowhere"}}},
            ["unknown method 'rout'", "seeds holds -1", "unknown site 'hook_nowhere'"],
        ),
        (
            {"options": {"route": {"balance_coefficient": "x", "dtype": "float99", "routing": "soft"}}},
            [
                "balance_coefficient must be float, got 'x'",
                "unknown dtype 'float99'",
                "routing is set by the",
            ],
        ),
        ({"options": {"relu": {"aux_loss_coefficient": 1}}}, ["there is no field aux_loss_coefficient"]),
    ],
)
def test_mistakes_are_found_without_a_model(changes: dict[str, Any], messages: list[str]):
    with pytest.raises(ValueError, match="the sweep has") as error:
        SweepConfig.from_dict(CONFIG | changes)
    for message in messages:
        assert message in str(error.value)


def test_a_width_that_is_not_known_yet_is_no_mistake_beside_any_number_of_experts():
    for n_experts in (6, 9, 12, 20, 24, 25):
        options = {"scale": {"n_experts": n_experts, "active_experts": 3}}
        changes = {"methods": ["scale"], "d_sae": None, "sparsities": {}, "options": options}
        SweepConfig.from_dict(CONFIG | changes)


def test_what_needs_the_model_is_listed_at_once_and_before_anything_is_written(tmp_path: Path):
    changes = {
        "layers": [1, 7],
        "context_size": 48,
        "d_sae": None,
        "k": [2, 600],
        "methods": ["route", "topk@9"],
    }
    with pytest.raises(ValueError) as error:
        run(tmp_path / "sweep", ids(3, 0), **changes, sparsities={})
    for part in (
        "the sweep has 6 mistakes:",
        "held_out_sequences = 4, but 3 were given",
        "context_size = 48, but the model reads at most 32 tokens",
        "route, k = 2: layers must be between 0 and 5, got [1, 7]",
        "route, k = 600: more than d_sae = 256",
        "topk@9, k = 2: layers must be between 0 and 5, got [9]",
        "topk@9, k = 600: more than d_sae = 256",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_a_config_survives_a_file(tmp_path: Path):
    config = SweepConfig.from_dict(CONFIG | {"options": {"route": {"loss": "mse"}}})
    assert SweepConfig.from_dict(config.to_dict()) == config
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG))
    assert SweepConfig.from_file(tmp_path / "sweep.json") == SweepConfig.from_dict(CONFIG)
    (tmp_path / "sweep.toml").write_text(
        'methods = ["relu", "topk@2"]\nk = [4]\ntraining_tokens = 9000\n[sparsities]\nrelu = [0.5, 2]\n'
    )
    read = SweepConfig.from_file(tmp_path / "sweep.toml")
    assert [member.name for member in read.members()] == [
        "relu-l10.5-seed0",
        "relu-l12-seed0",
        "topk@2-k4-seed0",
    ]
    for name, text, message in (
        ("a.yaml", "", "expected a .toml or .json file"),
        ("a.toml", "methods = [", "is no valid TOML"),
        ("a.json", "[1]", "expected settings by name, got list"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            SweepConfig.from_file(tmp_path / name)


def names(method: str, sparsities: list[float]) -> list[str]:
    config = SweepConfig(methods=(method,), sparsities={method: tuple(sparsities)}, training_tokens=1)
    return [member.name for member in config.members()]


def test_members_are_named_by_their_number_and_no_two_alike():
    assert names("route", [14, 100000]) == ["route-k14-seed0", "route-k100000-seed0"]
    assert names("relu", [0.11, 2.0, 1e-5]) == ["relu-l10.11-seed0", "relu-l12-seed0", "relu-l11e-05-seed0"]
    assert names("relu", [0.1, 0.10000001]) == ["relu-l10.1-seed0", "relu-l10.10000001-seed0"]
    assert names("route", [1234567, 1234568]) == ["route-k1234567-seed0", "route-k1234568-seed0"]


def test_options_reach_the_config_of_their_method(tiny_hooked: Any):
    options = {"topk": {"loss": "mse"}, "topk@2": {"relu": False}}
    config = SweepConfig.from_dict(
        CONFIG | {"methods": ["topk", "topk@2"], "sparsities": {}, "options": options}
    )
    configs = config.sae_configs(tiny_hooked)
    found = {name: (one.loss, one.relu) for name, one in configs.items() if name.endswith("seed0")}
    assert found == {"topk-k2-seed0": ("mse", True), "topk@2-k2-seed0": ("mse", False)}
