"""K-annealing: the k of every step, in both forms of the step, over interruptions, and nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from test_fast_topk import both_steps
from test_resume import BATCH, STEPS, Stop, run, tiny_model, weights

from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES, RouteTopKTrainingSAEConfig
from routesae_lens.saes.crosscoder import CROSSCODER_ARCHITECTURES, CrosscoderTopKTrainingSAEConfig
from routesae_lens.saes.fast_topk import FEW, encode_fast
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.k_annealing import (
    AnnealedTopKTrainingSAEConfig,
    annealed_k,
)
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.memory import _step
from routesae_lens.training.record import sae_settings

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"
)

LAYERS = [1, 2, 4]
ANNEALED = [
    "annealed_topk",
    "route_topk",
    "route_batchtopk",
    "route_matryoshka_batchtopk",
    "crosscoder_topk",
    "crosscoder_batchtopk",
]


def config(architecture: str, d: int = 8, **fields: Any) -> Any:
    """Of an SAE with d_model 8 and 48 latents, 3 of them active."""
    make = get_sae_training_class(architecture)[1]
    known: dict[str, Any] = {"d_in": d, "d_sae": 48, "k": 3, "dtype": "float64"}
    if architecture != "annealed_topk":
        known |= {"d_in": d * len(LAYERS), "layers": LAYERS}
    if "batchtopk" in architecture:
        known["k"] = 3.0
    if "matryoshka" in architecture:
        known["matryoshka_widths"] = [16, 48]
    return make(**known | fields)


def make(architecture: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    cfg = config(architecture, **fields)
    return get_sae_training_class(architecture)[0](cfg)


def step_input(x: torch.Tensor, step: int, dead: torch.Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(x, {}, dead, step, False)


# --- k ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "k_start", "kind", "expected"),
    [
        (2, 10, "linear", [10, 8, 6, 4, 2, 2]),
        (3, 8, "linear", [8, 7, 6, 4, 3, 3]),  # 6.75, 5.5 (to even), 4.25
        (2.5, 10, "linear", [10, 8.125, 6.25, 4.375, 2.5, 2.5]),
        (2, 32, "exponential", [32, 16, 8, 4, 2, 2]),
        (0.5, 8, "exponential", [8, 4, 2, 1, 0.5, 0.5]),
        (4, 4, "linear", [4, 4, 4, 4, 4, 4]),
    ],
)
def test_k_by_hand(k: float, k_start: int, kind: Any, expected: list[float]):
    got = [annealed_k(k, k_start, 4, kind, step) for step in range(6)]
    assert got == pytest.approx(expected, rel=1e-12)
    assert got[4] == k and got[5] == k and all(type(one) is int for one in got if type(k) is int)
    assert annealed_k(k, k_start, 0, kind, 0) == k


@pytest.mark.parametrize("architecture", ANNEALED)
def test_a_step_keeps_the_annealed_k_and_everything_else_the_one_of_the_config(architecture: str):
    sae = make(architecture, k_anneal_steps=5)
    with torch.no_grad():
        sae.b_enc.add_(100.0)  # so that no latent is cut off at 0
    x = torch.randn(10, sae.cfg.d_in, dtype=torch.float64)

    def kept(acts: torch.Tensor) -> float:
        return (acts.to_dense() != 0).sum().item() / len(x)

    for step, k in enumerate([8, 7, 6, 5, 4, 3, 3]):  # from d_model = 8
        output = sae.training_forward_pass(step_input(x, step))
        assert kept(output.feature_acts) == k and output.metrics["k"] == k
        assert kept(sae.encode(x)) == 3
    sae.eval()
    output = sae.training_forward_pass(step_input(x, 0))
    assert kept(output.feature_acts) == 3 and "k" not in output.metrics
    sae.train()
    if "batchtopk" not in architecture:  # (a JumpReLU has a threshold)
        assert kept(inference_form(sae).encode(x)) == 3


def test_the_start_is_d_model_or_what_is_given():
    assert config("annealed_topk", k_anneal_steps=4).first_k == 8
    assert config("crosscoder_topk", k_anneal_steps=4).first_k == 8  # not 24
    assert config("annealed_topk", d=100, k_anneal_steps=4).first_k == 48  # no more than all
    assert config("annealed_topk", k_start=20, k_anneal_steps=4).k_at(1) == 16  # 15.75
    assert config("annealed_topk", k_anneal_steps=None).k_at(0) == 3  # SAELens' own runners


def test_an_error_in_a_step_leaves_no_annealed_k_behind():
    sae = make("route_topk", k_anneal_steps=5)
    with pytest.raises(ValueError, match="expected a stack of 3 layers"):
        sae.training_forward_pass(step_input(torch.randn(4, 5), 0))
    assert sae.activation_fn.k == 3


CASES: list[tuple[str, dict[str, Any]]] = [
    ("annealed_topk", {}),
    ("annealed_topk", {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}),
    ("route_topk", {"routing": "hard"}),
    ("route_topk", {"routing": "distilled", "oracle_fraction": 1.0, "explore": 0.0}),
    ("route_topk", {"relu": False, "loss": "mse"}),
    ("crosscoder_topk", {}),
]


@pytest.mark.parametrize(("architecture", "fields"), CASES)
@pytest.mark.parametrize("init", ["saelens", "llama_scope"])
def test_the_fast_and_the_dense_step_anneal_alike(
    architecture: str, fields: dict[str, Any], init: str, monkeypatch: pytest.MonkeyPatch
):
    sae = make(architecture, k_anneal_steps=10, init=init, aux_loss_coefficient=0.7, **fields)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dead = torch.arange(48) % 3 == 0
    x = torch.randn(20, sae.cfg.d_in, dtype=torch.float64)
    step = step_input(x, 3, dead)
    (fast, fast_grads), (dense, dense_grads) = both_steps(sae, step, monkeypatch)
    assert fast.metrics["k"] == dense.metrics["k"] == 6  # 8 - 0.3 * 5 = 6.5
    assert fast.feature_acts._nnz() == 6 * len(fast.feature_acts)
    torch.testing.assert_close(fast.feature_acts.to_dense(), dense.feature_acts.detach())
    torch.testing.assert_close(fast.losses, dense.losses)
    torch.testing.assert_close(fast.sae_out, dense.sae_out)
    assert fast_grads.keys() == dense_grads.keys()
    for name, theirs in dense_grads.items():
        torch.testing.assert_close(fast_grads[name], theirs, rtol=1e-9, atol=1e-12, msg=name)
    other = sae.training_forward_pass(step_input(x, 9, dead))
    assert other.metrics["k"] == 4 and other.loss != fast.loss  # 3.5


def test_the_oracle_of_a_distilled_router_sees_the_annealed_k():
    sae = make("route_topk", routing="distilled", k_anneal_steps=10)
    x = torch.randn(5, 8, dtype=torch.float64)
    with torch.no_grad(), sae._keeping(7):
        assert encode_fast(sae, x, sae.encode_routed).values.shape == (5, 7)
    with torch.no_grad():
        assert encode_fast(sae, x, sae.encode_routed).values.shape == (5, 3)


def test_an_ordinary_sae_steps_as_saelens_own_with_that_k():
    sae = make("annealed_topk", k_anneal_steps=10, aux_loss_coefficient=0.5)
    own = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=8, d_sae=48, k=5, dtype="float64", aux_loss_coefficient=0.5)
    )
    own.load_state_dict(sae.state_dict())
    x, dead = torch.randn(2, 10, 8, dtype=torch.float64), torch.arange(48) % 2 == 0
    step = step_input(x.flatten(0, 1), 6, dead)
    ours, theirs = sae.training_forward_pass(step), own.training_forward_pass(step)
    assert ours.metrics["k"] == 5 and ours.feature_acts.is_sparse and not theirs.feature_acts.is_sparse
    torch.testing.assert_close(ours.losses, theirs.losses)
    torch.testing.assert_close(ours.sae_out, theirs.sae_out)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, mine), other in zip(sae.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_activations_of_another_dtype_are_converted():
    sae = make("annealed_topk", dtype="float32", apply_b_dec_to_input=False)
    output = sae.training_forward_pass(step_input(torch.randn(6, 8, dtype=torch.bfloat16), 0))
    assert output.feature_acts.is_sparse and output.sae_out.dtype == torch.float32


def test_where_many_latents_are_kept_the_dense_step_runs_and_memory_is_counted():
    sae = make("annealed_topk", k_start=40, k_anneal_steps=10)
    x = torch.randn(6, 8, dtype=torch.float64)
    ks = {step: sae.cfg.k_at(step) for step in range(11)}
    sparse = {step: sae.training_forward_pass(step_input(x, step)).feature_acts.is_sparse for step in ks}
    assert sparse == {step: k <= FEW * 48 for step, k in ks.items()} and set(sparse.values()) == {True, False}

    def floats(**fields: Any) -> float:
        d_in = 8
        cfg = AnnealedTopKTrainingSAEConfig(d_in=d_in, d_sae=4800, k=3, aux_loss_coefficient=0.0, **fields)
        return _step(cfg, 100) / 4 / 100 - 6 * d_in  # of a token, without what is of the input's size

    assert floats() == 2 * 4800
    assert floats(k_start=1000, k_anneal_steps=9) == 4800 + 26 * 1000
    assert floats(k_start=1000, k_anneal_steps=None) == 4800 + 26 * 1000
    assert floats(k_start=4800, k_anneal_steps=9) == 7 * 4800 + 3 * 4800  # dense


# --- Runs -------------------------------------------------------------------------------------------------


def annealed(model: Any) -> dict[str, Any]:
    plain = AnnealedTopKTrainingSAEConfig(
        d_in=32,
        d_sae=160,
        k=4,
        k_anneal_steps=12,
        init="llama_scope",
        normalize_activations="expected_average_only_in",
    )
    plain.metadata.hook_name = "blocks.4.hook_resid_post"
    return {
        "plain": plain,
        "route": RouteTopKTrainingSAEConfig.for_model(model, d_sae=160, k=4, k_anneal_steps=12),
        "batch": ROUTE_ARCHITECTURES["route_batchtopk"].for_model(
            model, d_sae=160, k=4.0, k_anneal_steps=12, k_anneal="exponential"
        ),
        "crosscoder": CrosscoderTopKTrainingSAEConfig.for_model(model, d_sae=160, k=4, k_anneal_steps=None),
    }


def logged(output: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line[f"{name}/metrics/k"] for line in lines if f"{name}/metrics/k" in line]


def test_resuming_in_mid_annealing_ends_the_same_and_evaluations_see_the_true_k(tmp_path: Path):
    seen = []

    class Watch(Stop):
        def __call__(self, **given: Any) -> dict[str, float]:
            sae = given["saes"]["plain"]
            x = torch.randn(7, 32, generator=torch.Generator().manual_seed(self.calls))
            acts = sae.training_forward_pass(step_input(x, self.calls)).feature_acts
            seen.append(int((acts.to_dense() != 0).sum(-1).max()))
            return super().__call__(**given)

    options: dict[str, Any] = {"unit_norm_every": None, "log_every": 1}
    model = tiny_model()
    run(model, tmp_path / "whole", Watch(None), sae_configs=annealed(model), **options)
    assert max(seen) == 4 and len(seen) == STEPS
    # 32 - 28 step / 12, rounded
    assert logged(tmp_path / "whole", "plain")[:7] == [32, 30, 27, 25, 23, 20, 18]
    assert logged(tmp_path / "whole", "plain")[11:] == [6] + [4] * 12
    assert logged(tmp_path / "whole", "batch")[6] == pytest.approx(32 * (1 / 8) ** 0.5)
    assert logged(tmp_path / "whole", "crosscoder")[:4] == [32, 18, 4, 4]  # 10 % of 24 steps are 2

    model = tiny_model()
    with pytest.raises(TrainingInterrupted):
        run(model, tmp_path / "stopped", Watch(5), sae_configs=annealed(model), **options)
    model = tiny_model()
    run(model, tmp_path / "stopped", Watch(None), sae_configs=annealed(model), resume=True, **options)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and len(ours) > 12
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "stopped" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()

    about = json.loads((tmp_path / "whole" / "run.json").read_text())["config"]["saes"]
    assert about["crosscoder"]["k_anneal_steps"] == 2 and about["plain"]["k_anneal_steps"] == 12
    loaded = SAE.load_from_disk(tmp_path / "whole" / "plain")
    assert type(loaded) is TopKSAE and loaded.cfg.k == 4 and loaded.cfg.normalize_activations == "none"
    assert loaded.cfg.metadata.training_architecture == "annealed_topk"
    assert loaded.cfg.metadata.training_architecture_details["k_anneal_steps"] == 12
    loads_without_this_package(tmp_path / "whole" / "plain")


def loads_without_this_package(folder: Path) -> None:
    code = (
        "import sys; sys.modules['routesae_lens'] = None\n"
        "import torch; from sae_lens import SAE, TopKSAE\n"
        f"sae = SAE.load_from_disk({str(folder)!r})\n"
        "assert type(sae) is TopKSAE and sae.cfg.architecture() == 'topk'\n"
        "assert (sae.encode(torch.randn(50, 32)) != 0).sum(-1).max() == 4\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_annealing_does_not_continue_a_run(tmp_path: Path):
    model = tiny_model()
    options: dict[str, Any] = {"unit_norm_every": None}
    with pytest.raises(TrainingInterrupted):
        run(model, tmp_path / "run", Stop(5), sae_configs={"one": annealed(model)["plain"]}, **options)
    other = annealed(model)["plain"]
    other.k_anneal_steps = 8
    with pytest.raises(ValueError, match=r"saes\.one\.k_anneal_steps: checkpoint 12, now 8"):
        run(tiny_model(), tmp_path / "run", Stop(None), sae_configs={"one": other}, resume=True, **options)


def test_settings_at_their_defaults_are_those_of_older_folders():
    older = sae_settings(config("route_topk"))
    assert not older.keys() & {"k_start", "k_anneal_steps", "k_anneal", "init"}
    newer = sae_settings(config("route_topk", k_anneal_steps=3, init="llama_scope"))
    assert newer == older | {"k_anneal_steps": 3, "init": "llama_scope"}
    assert sae_settings(TopKTrainingSAEConfig(d_in=8, d_sae=48, k=3))["k"] == 3


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"k_anneal_steps": STEPS},
            {},
            "SAE 'one': k_anneal_steps = 24, but the run has 24 steps: none would",
        ),
        ({"k_anneal_steps": 100}, {}, "k_anneal_steps = 100, but the run has 24 steps"),
        ({"init": "llama_scope"}, {"unit_norm_every": 5}, "that unit_norm_every would set to 1"),
    ],
)
def test_runs_that_do_not_go_with_the_recipe_are_refused(
    fields: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
):
    model = tiny_model()
    cfg = RouteTopKTrainingSAEConfig.for_model(model, d_sae=48, k=4, **fields)
    with pytest.raises(ValueError, match=message):
        run(
            model,
            tmp_path / "run",
            Stop(None),
            sae_configs={"one": cfg},
            **{"unit_norm_every": None} | options,
        )
    assert not (tmp_path / "run").exists()


def test_train_chooses_a_tenth_of_its_steps(tmp_path: Path):
    model = tiny_model()
    cfg = RouteTopKTrainingSAEConfig.for_model(model, d_sae=48, k=4, k_anneal_steps=None)
    for n, expected in ((STEPS, 2), (4, 1), (1, 0)):
        result = run(
            model, tmp_path / str(n), Stop(None), sae_configs={"one": cfg}, training_tokens=n * BATCH
        )
        assert result.saes["one"].cfg.k_anneal_steps == expected
    assert cfg.k_anneal_steps is None  # the caller's


@pytest.mark.parametrize("architecture", ["annealed_topk", "route_topk", "crosscoder_batchtopk"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 49}, "k must be between 1 and d_sae = 48, got 49"),
        ({"k": 0}, "k must be between 1 and d_sae = 48, got 0"),
        (
            {"k_start": 2, "k_anneal_steps": 5},
            "k_start must be an integer between k = 3.* and d_sae = 48, got 2",
        ),
        ({"k_start": 49, "k_anneal_steps": 5}, "k_start must be an integer between k = 3.* and d_sae = 48"),
        ({"k_start": 4.5, "k_anneal_steps": 5}, "k_start must be an integer between"),
        ({"k_start": 20}, "k_start=20 needs k_anneal_steps"),
        ({"k_anneal_steps": -1}, "k_anneal_steps must be a number of steps, 0 or more; got -1"),
        ({"k_anneal_steps": True}, "k_anneal_steps must be a number of steps"),
        ({"k_anneal_steps": 0.1}, "k_anneal_steps must be a number of steps"),
        ({"k": 9, "k_anneal_steps": 5}, "k = 9 is more than the 8 latents .* give k_start"),
        ({"k_anneal": "cosine"}, "unknown k_anneal 'cosine'; known: linear, exponential"),
        ({"init": "zeros"}, "unknown init 'zeros'; known: saelens, llama_scope"),
        ({"init": "llama_scope", "decoder_init_norm": 0.5}, "decoder_init_norm=0.5 does not go with init="),
    ],
)
def test_configs_that_cannot_be(architecture: str, fields: dict[str, Any], message: str, unchecked: None):
    with pytest.raises(ValueError, match=message):
        config(architecture, **fields)


@pytest.mark.parametrize("architecture", sorted(ANNEALED))
@pytest.mark.parametrize(
    "fields", [{"d_sae": "48"}, {"d_sae": 48.0}, {"d_sae": 0}, {"d_in": None}, {"k": "3"}]
)
def test_wrong_types_in_configs(architecture: str, fields: dict[str, Any], unchecked: None):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} must be"):
        config(architecture, **fields)


@pytest.mark.parametrize("k", [2.5, True, "3"])
def test_the_k_of_an_ordinary_sae_is_an_integer(k: Any, unchecked: None):
    with pytest.raises(ValueError, match="k must be an integer, got"):
        config("annealed_topk", k=k)


def test_every_topk_architecture_can_be_annealed():
    topk = {name for name in ROUTE_ARCHITECTURES | CROSSCODER_ARCHITECTURES if "topk" in name}
    assert topk | {"annealed_topk"} == set(ANNEALED)
