"""The four positions of Llama Scope, trained together in one pass."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, TOKENS, one_by_one
from datasets import Dataset
from sae_lens import SAE, TopKSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.hook_points import mount_sites
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAEConfig
from routesae_lens.saes.transcoder import TopKTranscoderTrainingSAEConfig
from routesae_lens.training.interruption import TrainingInterrupted
from routesae_lens.training.memory import estimate_memory
from routesae_lens.training.positions import POSITION_SITES, scope_configs
from routesae_lens.training.train import TrainingResult, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"),
]
CONTEXT, BATCH, STEPS = 16, 32, 12
every_model = pytest.mark.parametrize("model", BACKENDS, indirect=True)
NAMES = ["L1R", "L1A", "L1M", "L1TC", "L4R", "L4A", "L4M", "L4TC"]


def rows(n: int = 60) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"tokens": torch.randint(64, (n, CONTEXT), generator=generator).tolist()})


def run(model: Any, output: Path, configs: Any, **options: Any) -> TrainingResult:
    defaults: dict[str, Any] = {
        "training_tokens": STEPS * BATCH,
        "context_size": CONTEXT,
        "batch_size": BATCH,
    }
    return train(model, configs, rows(), output=output, **defaults | options)


def read_by(model: Any, hooks: dict[str, str]) -> dict[str, torch.Tensor]:
    cache = model.run_with_cache(TOKENS, names_filter=sorted(set(hooks.values())))[1]
    return {name: cache[hook] for name, hook in hooks.items()}


@every_model
def test_all_positions_of_two_layers_in_one_pass(model, tmp_path, monkeypatch):
    configs = scope_configs(model, [1, 4], d_sae=48, k=4)
    assert list(configs) == NAMES
    passes = []
    blocks = model.model.model.layers if type(model).__name__ == "HookedProxyLM" else model.blocks
    blocks[1].register_forward_hook(lambda *_: passes.append(1))
    run(model, tmp_path / "one", {"L1R": configs["L1R"]})
    alone = len(passes)
    result = run(model, tmp_path / "run", configs)
    assert len(passes) == 2 * alone > 0  # eight SAEs take no more forwards than one
    acts = read_by(model, {name: sae.cfg.metadata.hook_name for name, sae in result.saes.items()})
    for name, path in result.paths.items():
        loaded: Any = SAE.load_from_disk(path)
        layer, position = int(name[1]), name[2:]
        if position == "TC":
            assert type(loaded) is JumpReLUTranscoder
            assert torch.equal(acts[name][..., 32:], one_by_one(model, "hook_mlp_out", [layer]))
            assert loaded(acts[name][..., :32]).shape == (2, 5, 32)
            assert loaded.cfg.metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out"
        else:
            assert type(loaded) is TopKSAE and loaded.cfg.k == 4
            assert torch.equal(acts[name], one_by_one(model, POSITION_SITES[position], [layer]))
            assert ((loaded.encode(acts[name]) > 0).sum(-1) <= 4).all()
    evaluations = evaluate_all(result.saes, model, TOKENS, progress=False)
    for name, found in evaluations.items():
        assert found.kl > 0 and found.loss_recovered is not None, name
        assert found.norm_mse > 0 and (found.l0 <= 4 or name.endswith("TC")), name
    assert (
        len({round(found.ce_zero or 0, 6) for found in evaluations.values()}) == 6
    )  # R, A and M (= TC), twice


def test_the_recipe(tiny_hooked):
    configs: dict[str, Any] = scope_configs(
        tiny_hooked, [3], d_sae=64, k=4, skip=True, k_anneal="exponential"
    )
    assert [type(cfg) for cfg in configs.values()] == 3 * [AnnealedTopKTrainingSAEConfig] + [
        TopKTranscoderTrainingSAEConfig
    ]
    for cfg in configs.values():
        assert (cfg.k, cfg.d_sae, cfg.first_k, cfg.k_anneal) == (4, 64, 32, "exponential")
        assert cfg.k_anneal_steps is None and cfg.init == "llama_scope"
        assert cfg.rescale_acts_by_decoder_norm and not cfg.apply_b_dec_to_input
        assert cfg.aux_loss_coefficient == 0
    assert [cfg.normalize_activations for cfg in configs.values()] == 3 * ["expected_average_only_in"] + [
        "none"
    ]
    assert configs["L3TC"].normalize and configs["L3TC"].skip
    assert list(scope_configs(tiny_hooked, [0, 5], ("TC", "A"), d_sae=8, k=1)) == [
        "L0TC",
        "L0A",
        "L5TC",
        "L5A",
    ]


def test_memory_counts_every_hook_once_and_both_sites(tiny_hooked):
    configs = scope_configs(tiny_hooked, [1, 4], d_sae=48, k=4)
    tokens = {"batch_size": BATCH, "context_size": CONTEXT, "buffer_tokens": 4 * BATCH}
    every = estimate_memory(tiny_hooked, configs, **tokens)
    one = estimate_memory(tiny_hooked, {"L1R": configs["L1R"]}, **tokens)
    transcoder = estimate_memory(tiny_hooked, {"L1TC": configs["L1TC"]}, **tokens)
    assert transcoder.buffer == 2 * one.buffer and every.buffer == (2 * 3 + 2 * 2) * one.buffer
    assert transcoder.weights == one.weights == 4 * (2 * 48 * 32 + 48 + 32)


def fresh() -> HookedTransformer:
    sizes: dict[str, Any] = {
        "n_layers": 6,
        "d_model": 32,
        "n_ctx": 32,
        "d_head": 8,
        "n_heads": 4,
        "d_mlp": 64,
    }
    return HookedTransformer(
        HookedTransformerConfig(d_vocab=64, act_fn="gelu", seed=0, device="cpu", **sizes)
    ).eval()


def test_all_positions_resume_exactly(tmp_path):
    def stop_now(**_: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    options: dict[str, Any] = {"eval_every": 5, "evaluator": lambda **_: {}}
    whole = run(
        fresh(),
        tmp_path / "whole",
        scope_configs(fresh(), [1, 4], d_sae=48, k=4, k_anneal_steps=8),
        **options,
    )
    configs = scope_configs(fresh(), [1, 4], d_sae=48, k=4, k_anneal_steps=8)
    with pytest.raises(TrainingInterrupted):
        run(fresh(), tmp_path / "cut", configs, **options | {"evaluator": stop_now})
    again = run(fresh(), tmp_path / "cut", configs, **options, resume=True)
    for name in NAMES:
        one, other = (load_file(r.paths[name] / "sae_weights.safetensors") for r in (whole, again))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_skip_transcoders(tiny_hooked, tmp_path):
    result = run(
        tiny_hooked, tmp_path / "run", scope_configs(tiny_hooked, [2], ["TC"], d_sae=48, k=4, skip=True)
    )
    loaded: Any = SAE.load_from_disk(result.paths["L2TC"])
    assert type(loaded) is JumpReLUSkipTranscoder and loaded.W_skip.any()


def test_a_transcoder_and_a_point_of_the_same_sites_share_the_hook(tiny_hooked):
    cfg = scope_configs(tiny_hooked, [2], ["TC"], d_sae=48, k=4)["L2TC"]
    assert cfg.metadata.hook_name == mount_sites(tiny_hooked, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([6], ("R",)), "layers must be between 0 and 5"),
        (([], ("R",)), "layers must be a non-empty list"),
        (([1], ("R", "X")), r"positions must be some of R, A, M, TC, each once; got \['R', 'X'\]"),
        (([1], ("R", "R")), "each once"),
        (([1], ()), "positions must be some of"),
        (([1], "RAM"), r"positions must be some of .* got \['RAM'\]"),
    ],
)
def test_bad_input(tiny_hooked, arguments, message):
    with pytest.raises(ValueError, match=message):
        scope_configs(tiny_hooked, *arguments, d_sae=48, k=4)


@pytest.mark.parametrize("position", ["R", "TC"])
def test_k_larger_than_the_width(tiny_hooked, position):
    with pytest.raises(ValueError, match=r"k must be .*between 1 and d_sae = 48, got 49"):
        scope_configs(tiny_hooked, [1], [position], d_sae=48, k=49)


def test_a_model_without_mlps_has_two_positions():
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, attn_only=True, d_vocab=16, device="cpu"
    )
    model = HookedTransformer(config)
    assert list(scope_configs(model, [1], ["R", "A"], d_sae=16, k=2)) == ["L1R", "L1A"]
    with pytest.raises(ValueError, match="this model has no hook_mlp_out in block 1"):
        scope_configs(model, [1], d_sae=16, k=2)
    with pytest.raises(ValueError, match=r"this model has no mlp\.hook_in in block 1"):
        scope_configs(model, [1], ["TC"], d_sae=16, k=2)
