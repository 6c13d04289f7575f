"""Presets: what they set, and that whatever is given explicitly wins: in ``train``, on the command line, in sweeps."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAE, TopKSAE, TopKTrainingSAEConfig
from sweeps import CONFIG, rows, run
from transformer_lens import HookedTransformer
from typer.testing import CliRunner

from routesae_lens.cli import app
from routesae_lens.saes.architectures import (
    RouteJumpReLUTrainingSAEConfig,
    RouteTopKTrainingSAEConfig,
)
from routesae_lens.saes.crosscoder import CrosscoderBatchTopKTrainingSAEConfig
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAEConfig
from routesae_lens.saes.transcoder import TopKTranscoderTrainingSAEConfig
from routesae_lens.training.positions import scope_configs
from routesae_lens.training.presets import DEFAULTS, PRESETS, Preset, find_preset
from routesae_lens.training.sweep import SweepResult
from routesae_lens.training.sweep_config import SweepConfig
from routesae_lens.training.train import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"
)
SCOPE = PRESETS["llama_scope"]


def test_without_a_preset_train_has_the_papers_settings():
    parameters = inspect.signature(train).parameters
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    assert PRESETS["paper"].settings() == DEFAULTS and PRESETS["paper"].fields_of(TopKTrainingSAEConfig) == {}


def test_llama_scopes_settings():
    """Section 3.3.2; appendix 3.1 for the special tokens."""
    assert SCOPE.settings() == DEFAULTS | {"lr": 8e-4, "schedule": "llama_scope"}
    assert SCOPE.settings(lr=1e-3)["lr"] == 1e-3
    fields = SCOPE.fields_of(AnnealedTopKTrainingSAEConfig)
    cfg = AnnealedTopKTrainingSAEConfig(d_in=32, d_sae=64, k=4, **fields)
    assert (cfg.k_anneal_steps, cfg.k_anneal, cfg.first_k) == (None, "linear", 32)
    assert (cfg.init, cfg.normalize_activations) == ("llama_scope", "expected_average_only_in")
    assert (cfg.rescale_acts_by_decoder_norm, cfg.apply_b_dec_to_input) == (True, False)
    assert cfg.aux_loss_coefficient == 0


def test_fields_that_are_given_win_and_standardised_layers_get_no_scale():
    scaled = {"normalize_activations": "expected_average_only_in"}
    for config in (RouteTopKTrainingSAEConfig, CrosscoderBatchTopKTrainingSAEConfig):
        fields = SCOPE.fields_of(config)
        assert fields == {name: value for name, value in SCOPE.sae.items() if name not in scaled}
        assert SCOPE.fields_of(config, standardize=False) == {**SCOPE.sae, "standardize": False}
        assert SCOPE.fields_of(config, **scaled) == {**fields, **scaled}
    given = {"init": "saelens", "k_anneal_steps": 7, "k": 3}
    assert SCOPE.fields_of(AnnealedTopKTrainingSAEConfig, **given) == {**SCOPE.sae, **given}


def test_a_transcoder_has_its_own_scales(tiny_hooked: HookedTransformer):
    config = TopKTranscoderTrainingSAEConfig
    cfg = config.for_model(tiny_hooked, layer=2, d_sae=64, k=4, **SCOPE.fields_of(config))
    assert (cfg.normalize, cfg.normalize_activations, cfg.k_anneal_steps) == (True, "none", None)
    assert cfg == scope_configs(tiny_hooked, [2], "TC", d_sae=64, k=4)["L2TC"]


@pytest.mark.parametrize("config", [TopKTrainingSAEConfig, RouteJumpReLUTrainingSAEConfig])
def test_an_sae_that_cannot_follow_it_is_refused(config: Any):
    name = config.architecture()
    with pytest.raises(
        ValueError, match=f"{name} does not go with this preset, it has no k_anneal_steps, init"
    ):
        SCOPE.fields_of(config)


def test_names_and_settings_that_are_none():
    with pytest.raises(ValueError, match="unknown preset 'lama'; known: paper, llama_scope"):
        find_preset("lama")
    with pytest.raises(ValueError, match="a preset does not set resume; it may set: lr, schedule"):
        Preset(train={"resume": True})


def test_train_takes_it(tiny_hooked: HookedTransformer, tmp_path: Path):
    cfg = AnnealedTopKTrainingSAEConfig(
        d_in=32, d_sae=64, k=4, **SCOPE.fields_of(AnnealedTopKTrainingSAEConfig)
    )
    cfg.metadata.hook_name = "blocks.4.hook_resid_post"
    sizes: dict[str, Any] = {"training_tokens": 640, "batch_size": 32, "context_size": 16}
    result = train(tiny_hooked, cfg, rows(), output=tmp_path / "run", **sizes, **SCOPE.train)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (about["config"]["lr"], about["options"]["schedule"]) == (8e-4, "llama_scope")
    assert result.saes["annealed_topk"].cfg.k_anneal_steps == 2
    assert type(SAE.load_from_disk(result.paths["annealed_topk"])) is TopKSAE


# --- The command line ---------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tiny_llama_dir: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"A sparse autoencoder, number {i}, reads the stream." for i in range(80)))
    sizes = ["--tokens", "640", "--batch-size", "32", "--context-size", "16", "--d-sae", "160", "--k", "4"]
    where = ["--model", str(tiny_llama_dir), "--dataset", str(text), "--output", str(tmp_path / "run")]
    return ["train", *where, *sizes, "--eval-sequences", "0", "--layers", "1:3"]


def about(output: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Of a run: SAELens' settings, this package's, and the SAE's."""
    sheet = json.loads((output / "run.json").read_text())
    return sheet["config"], sheet["options"], next(iter(sheet["config"]["saes"].values()))


def test_on_the_command_line(arguments: list[str], tmp_path: Path):
    done = CliRunner().invoke(app, [*arguments, "--preset", "llama_scope"])
    assert done.exit_code == 0, done.output
    config, options, sae = about(tmp_path / "run")
    assert (config["lr"], options["schedule"]) == (8e-4, "llama_scope")
    assert (sae["k_anneal_steps"], sae["init"], sae["normalize_activations"]) == (2, "llama_scope", "none")
    assert (sae["aux_loss_coefficient"], sae["apply_b_dec_to_input"]) == (0, False)


def test_on_the_command_line_what_is_given_wins(arguments: list[str], tmp_path: Path):
    more = ["--lr", "5e-4", "--sae-option", "k_anneal_steps=5", "--sae-option", "standardize=false"]
    more += ["--no-exclude-special-tokens", "--architecture", "crosscoder_topk"]
    done = CliRunner().invoke(app, [*arguments, "--preset", "llama_scope", *more])
    assert done.exit_code == 0, done.output
    config, options, sae = about(tmp_path / "run")
    assert (config["lr"], options["schedule"]) == (5e-4, "llama_scope")  # 5e-4 is the default elsewhere
    assert config["exclude_special_tokens"] is False
    assert (sae["k_anneal_steps"], sae["init"]) == (5, "llama_scope")
    assert sae["standardize"] is False


def test_without_a_preset_the_command_line_is_as_before(arguments: list[str], tmp_path: Path):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    config, options, sae = about(tmp_path / "run")
    assert (config["lr"], options["schedule"], options["unit_norm_every"]) == (5e-4, "paper", 0)
    assert config["exclude_special_tokens"] is True and config["seqpos_slice"] == [1, None]
    assert (sae["k_anneal_steps"], sae["init"], sae["apply_b_dec_to_input"]) == (0, "saelens", True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "scope"], "unknown preset 'scope'; known: paper, llama_scope"),
        (
            ["--preset", "llama_scope", "--architecture", "route_standard"],
            "route_standard does not go with this preset, it has no k_anneal_steps, init",
        ),
        (["--preset", "llama_scope", "--unit-norm-every", "10"], "unit_norm_every would set to 1"),
        (["--sae-option", "k_anneal_steps=20"], "k_anneal_steps = 20, but the run has 20 steps"),
        (
            ["--preset", "llama_scope", "--sae-option", "k_start=200"],
            "k_start must be an integer between k = 4",
        ),
    ],
)
def test_on_the_command_line_mistakes_are_found_before_the_model_loads(
    arguments: list[str], more: list[str], message: str, monkeypatch: pytest.MonkeyPatch, unchecked: None
):
    monkeypatch.setattr("routesae_lens.models.load_model", lambda *_, **__: pytest.fail("loaded"))
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


# --- Sweeps ---------------------------------------------------------------------------------------------------

SWEEP: dict[str, Any] = CONFIG | {
    **{"methods": ["route", "scope_topk", "crosscoder_topk"], "sparsities": {}, "seeds": [0], "d_sae": 160},
    "options": {"route": {"k_anneal_steps": 0, "aux_loss_coefficient": 0.25}},
}


def test_in_a_sweeps_file(tmp_path: Path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        'preset = "llama_scope"\nmethods = ["route", "scope_topk@2"]\nk = [4]\ntraining_tokens = 40960\n'
        "exclude_first_position = false\n[options.scope_topk]\nk_start = 12\n"
    )
    config = SweepConfig.from_file(path)
    assert (config.lr, config.schedule, config.exclude_first_position) == (8e-4, "llama_scope", False)
    assert SweepConfig.from_dict(config.to_dict()) == config and config.to_dict()["preset"] == "llama_scope"
    same = SweepConfig(
        preset="llama_scope",
        methods=("route", "scope_topk@2"),
        k=(4,),
        training_tokens=40960,
        exclude_first_position=False,
        options={"scope_topk": {"k_start": 12}},
    )
    assert same == config
    assert SweepConfig.from_dict(config.to_dict() | {"lr": 5e-4}).lr == 5e-4


def test_a_sweep_without_a_preset_is_the_sweep_it_was():
    config = SweepConfig(methods=("route",), k=(4,), training_tokens=40960)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert "preset" not in config.to_dict()


def test_the_preset_goes_into_every_methods_config(tiny_hooked: HookedTransformer):
    configs = SweepConfig.from_dict(SWEEP | {"preset": "llama_scope"}).sae_configs(tiny_hooked)
    route, scope, crosscoder = configs.values()
    assert (route.k_anneal_steps, route.init, route.aux_loss_coefficient) == (0, "llama_scope", 0.25)
    assert (crosscoder.k_anneal_steps, crosscoder.init) == (None, "llama_scope")
    assert (scope.k_anneal_steps, scope.normalize_activations) == (None, "expected_average_only_in")
    without = SweepConfig.from_dict(SWEEP).sae_configs(tiny_hooked)
    route, scope, crosscoder = without.values()
    assert (route.init, crosscoder.k_anneal_steps) == ("saelens", 0)
    assert (scope.k_anneal_steps, scope.init) == (None, "llama_scope")  # the method's own
    fixed = SWEEP | {"methods": ["scope_topk_fixed_k"], "options": {}, "preset": "llama_scope"}
    (one,) = SweepConfig.from_dict(fixed).sae_configs(tiny_hooked).values()
    assert (one.k_anneal_steps, one.init) == (0, "llama_scope")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "scope"}, "unknown preset 'scope'; known: paper, llama_scope"),
        ({"preset": ["llama_scope"]}, "unknown preset"),
        (
            {"preset": "llama_scope", "methods": ["plain_topk"]},
            "plain_topk, k = 2: topk does not go with this preset",
        ),
        (
            {"preset": "llama_scope", "methods": ["relu"], "sparsities": {"relu": [1]}},
            "relu, l1 = 1: route_standard does not go with this preset",
        ),
        (
            {"options": {"route": {"k_anneal_steps": 14}}, "methods": ["route"]},
            "route, k = 2: k_anneal_steps = 14, but the run has 14 steps",
        ),
        (
            {"preset": "llama_scope", "unit_norm_every": 10, "methods": ["route"]},
            "route, k = 2: init='llama_scope' gives decoder rows a norm that unit_norm_every would",
        ),
        (
            {"options": {"scope_topk_fixed_k": {"k_anneal_steps": 3}}, "methods": ["scope_topk_fixed_k"]},
            "k_anneal_steps is set by the method",
        ),
        (
            {"options": {"route": {"init": "x"}}, "methods": ["route"]},
            "unknown init 'x'; known: saelens, llama",
        ),
    ],
)
def test_mistakes_in_a_sweep(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        SweepConfig.from_dict(SWEEP | {"options": {}} | changes)
    assert message in str(error.value)


def test_a_sweep_trains_with_it_and_is_another_sweep_without(tmp_path: Path):
    changes = {name: value for name, value in SWEEP.items() if CONFIG.get(name) != value}
    result = run(tmp_path / "sweep", preset="llama_scope", **changes)
    config, options, _ = about(tmp_path / "sweep" / "training")
    assert (config["lr"], options["schedule"]) == (8e-4, "llama_scope")
    steps = {name: sae["k_anneal_steps"] for name, sae in config["saes"].items()}
    assert steps == {"route-k2-seed0": 0, "scope_topk-k2-seed0": 1, "crosscoder_topk-k2-seed0": 1}
    assert {record["status"] for record in result.results.values()} == {"evaluated"}
    assert type(SweepResult.read(tmp_path / "sweep").load("scope_topk-k2-seed0")) is TopKSAE
    with pytest.raises(FileExistsError, match=r"config\.preset: there 'llama_scope', now 'none'"):
        run(tmp_path / "sweep", **changes)
