"""Expert SAEs find planted experts; they train, resume, load, splice and are evaluated like the others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from test_resume import Stop, run, tiny_model, token_rows, weights
from test_stock_runners import COMMON

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.analysis.features import collect_features
from routesae_lens.hook_points import mount_layers
from routesae_lens.saes import fast_topk
from routesae_lens.saes.experts import (
    RouteScaleSAE,
    RouteScaleTrainingSAEConfig,
    ScaleSAE,
    ScaleTrainingSAE,
    ScaleTrainingSAEConfig,
    SwitchSAE,
    SwitchTrainingSAE,
    SwitchTrainingSAEConfig,
)
from routesae_lens.saes.forms import inference_form
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.memory import estimate_memory
from routesae_lens.training.methods import make_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"
)

# --- Planted experts --------------------------------------------------------------------------------------

D, CLUSTERS, WIDTH = 24, 4, 12


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of four clusters, each with a mean and twelve features of its own, two of them active."""
    fixed = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(CLUSTERS, WIDTH, D, generator=fixed), dim=-1)
    means = 4 * torch.nn.functional.normalize(torch.randn(CLUSTERS, D, generator=fixed), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(CLUSTERS, (n,), generator=generator)
    active = torch.rand(n, WIDTH, generator=generator).topk(2).indices
    amount = 1 + torch.rand(n, 2, 1, generator=generator)
    return (features[cluster[:, None], active] * amount).sum(1) + means[cluster], cluster


def learn(sae: Any, steps: int = 250) -> float:
    """Mean squared error on new tokens after some training."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for i in range(steps):
        x, _ = planted(256, i + 1)
        sae.training_forward_pass(TrainStepInput(x, {}, None, i, False)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    x, _ = planted(2000, 0)
    with torch.no_grad():
        return float((sae(x) - x).pow(2).sum(-1).mean())


def test_experts_partition_planted_clusters():
    known: dict[str, Any] = {"d_in": D, "k": 3, "aux_loss_coefficient": 0.0}
    torch.manual_seed(0)
    dense = TopKTrainingSAE(TopKTrainingSAEConfig(d_sae=WIDTH, **known))  # computes what one expert does
    known |= {"d_sae": CLUSTERS * WIDTH, "n_experts": CLUSTERS, "expert_balance_coefficient": 1.0}
    switch = SwitchTrainingSAE(SwitchTrainingSAEConfig(**known))
    assert learn(switch) < 0.85 * learn(dense)
    x, cluster = planted(2000, 0)
    expert = switch.choose_experts(x).chosen[:, 0]
    counts = torch.zeros(CLUSTERS, CLUSTERS).index_put((cluster, expert), torch.ones(2000), accumulate=True)
    assert sorted(counts.argmax(1).tolist()) == list(range(CLUSTERS))  # each has one of its own
    assert counts.amax(1).sum() > 0.97 * 2000


def test_omega_is_learned():
    torch.manual_seed(0)
    fields: dict[str, Any] = {"d_in": D, "k": 3, "d_sae": CLUSTERS * WIDTH, "n_experts": CLUSTERS}
    sae = ScaleTrainingSAE(ScaleTrainingSAEConfig(**fields))
    first, last = learn(sae, 1), learn(sae, 60)
    assert last < 0.5 * first and (sae.expert_scale.abs() > 1e-3).all()
    assert torch.equal(inference_form(sae).expert_scale, sae.expert_scale)


# --- With a language model -----------------------------------------------------------------------------


def configs(model: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"d_sae": 48, "k": 4, "n_experts": 4}
    made = {
        "scale": ScaleTrainingSAEConfig(
            d_in=32, normalize_activations="expected_average_only_in", feature_scaling="learned", **sizes
        ),
        "switch": SwitchTrainingSAEConfig(d_in=32, **sizes),
        "route": RouteScaleTrainingSAEConfig.for_model(model, **sizes),
    }
    for name in ("scale", "switch"):
        made[name].metadata.hook_name = "blocks.4.hook_resid_post"
    return made


def test_an_interrupted_run_ends_like_a_whole_one_and_loads(tmp_path: Path):
    model = tiny_model()
    run(model, tmp_path / "whole", Stop(None), sae_configs=configs(model))
    model = tiny_model()
    with pytest.raises(TrainingInterrupted):
        run(model, tmp_path / "stopped", Stop(10), sae_configs=configs(model))
    model = tiny_model()
    result = run(model, tmp_path / "stopped", Stop(None), sae_configs=configs(model), resume=True)
    ours, theirs = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and {"scale.expert_scale", "route.W_expert"} <= ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    assert log == (tmp_path / "stopped" / "log.jsonl").read_text()
    assert "route/metrics/expert_scale_max" in log and "switch/losses/expert_balance_loss" in log
    x = torch.randn(20, 32)
    for name, kind in {"scale": ScaleSAE, "switch": SwitchSAE}.items():
        loaded = SAE.load_from_disk(result.paths[name])
        assert type(loaded) is kind
        torch.testing.assert_close(loaded(x), inference_form(result.saes[name])(x))
    assert type(SAE.load_from_disk(result.paths["route"])) is RouteScaleSAE


@pytest.mark.parametrize("name", ["scale", "route"])
def test_saelens_own_runner(tiny_hooked: Any, name: str, tmp_path: Path):
    sae = configs(tiny_hooked)[name]
    hook_name = mount_layers(tiny_hooked, sae.layers) if name == "route" else sae.metadata.hook_name
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=hook_name,
        output_path=str(tmp_path),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **COMMON,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=token_rows(80), override_model=tiny_hooked)
    before = {key: value.clone() for key, value in runner.sae.state_dict().items()}
    trained = runner.run()
    changed = {key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])}
    assert {"W_enc", "W_dec", "W_expert", "b_expert", "expert_scale"} <= changed
    loaded, x = SAE.load_from_disk(tmp_path), torch.randn(7, sae.d_in)
    torch.testing.assert_close(loaded(x), inference_form(trained)(x))


def untrained(cfg: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    cfg.normalize_activations = "none"
    sae: Any = get_sae_training_class(cfg.architecture())[0](cfg)
    torch.nn.init.normal_(sae.b_enc, 0, 0.1)
    return inference_form(sae)


def test_evaluations_and_features_are_those_of_the_dense_form(bridge: Any, monkeypatch: pytest.MonkeyPatch):
    saes = {name: untrained(cfg) for name, cfg in configs(bridge).items()}
    tokens = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for fast in (True, False):
        with monkeypatch.context() as patch:
            if not fast:
                patch.setattr(fast_topk, "is_fast", lambda sae: False)
            evaluations = evaluate_all(saes, bridge, tokens)
            features = collect_features(saes, bridge, tokens, threshold=0.01, min_contexts=1)
            results.append((evaluations, features))
    (ours, our_features), (theirs, their_features) = results
    for name in saes:
        for field, value in vars(theirs[name]).items():
            if isinstance(value, float):
                assert getattr(ours[name], field) == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), (
                    field
                )
        assert len(our_features[name].features) == len(their_features[name].features) > 0
    assert ours["route"].l0 <= 4 and ours["route"].kl > 0


def test_they_are_spliced_like_saelens_own_and_like_route_saes(hooked: Any):
    cfgs, tokens = configs(hooked), torch.randint(3, 60, (2, 12))
    scale, route = untrained(cfgs["scale"]), untrained(cfgs["route"])
    plain = HookedSAETransformer(hooked.cfg)
    plain.load_and_process_state_dict(hooked.state_dict())
    name = "blocks.4.hook_resid_post"
    _, cache = plain.run_with_cache_with_saes(tokens, saes=[scale])
    activation = plain.run_with_cache(tokens, names_filter=name)[1][name]
    acts = cache[f"{name}.hook_sae_acts_post"]
    torch.testing.assert_close(acts, scale.encode(activation))
    assert (acts != 0).sum(-1).max() <= 4
    logits, cache = hooked.run_with_cache_with_saes(tokens, saes=[route])
    latents = [cache[f"blocks.{layer}.hook_resid_post.hook_sae_acts_post"] for layer in route.layers]
    _, stacks = hooked.run_with_cache(tokens)
    stack = torch.cat([stacks[f"blocks.{layer}.hook_resid_post"] for layer in route.layers], -1)
    chosen = route.route(stack).layer
    for i, one in enumerate(latents):
        assert not one[chosen != i].any()
    assert not torch.equal(logits, hooked(tokens))


# --- What a sweep takes ----------------------------------------------------------------------------------


def test_memory_counts_the_router_and_what_scaling_makes(tiny_hooked: Any):
    def estimate(method: str, **options: Any) -> Any:
        config = make_config(method, tiny_hooked, [1, 2, 4], 4096, 4, 0, **options)
        return estimate_memory(tiny_hooked, {method: config}, batch_size=64)

    topk, unscaled, scale = (estimate(name) for name in ("topk", "scale_unscaled", "scale"))
    matrix, router = 4 * 32 * 4096, 4 * (16 * 32 + 32)
    assert unscaled.weights == topk.weights + router and unscaled.step == topk.step
    assert scale.weights == unscaled.weights + 4 * 16
    learned, identity = (estimate("scale", feature_scaling=name) for name in ("learned", "identity"))
    assert learned.weights == scale.weights + matrix
    steps = [one.step for one in (unscaled, scale, learned, identity)]
    assert [after - before for before, after in pairwise(steps)] == [matrix, 2 * matrix, matrix]
    revived = estimate("scale", aux_loss_coefficient=1.0).step - scale.step
    assert revived == 4 * 64 * 26 * 16  # half of d_model, with 26 numbers each
