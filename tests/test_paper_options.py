"""The presets and options of the paper's evaluation: what fits a machine, and what is refused at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import paper_presets
import paper_stages
import reproduce_paper


@pytest.fixture
def options(tiny_llama_dir: Path) -> dict[str, Any]:
    return {
        "preset": "smoke", "model": str(tiny_llama_dir), "d_sae": 48, "k": "3", "tokens": 64 * 12, "batch_size": 64,
        "context_size": 16, "lm_batch_size": 4, "kl_tokens": 100, "feature_tokens": 300,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": "0"}, "k holds 0; expected an integer, 1 or more"),
        ({"k": "500"}, "route, k = 500: more than d_sae = 48"),
        ({"tokens": 0}, "training_tokens must be an integer, 1 or more; got 0"),
        ({"tokens": 10}, "training_tokens = 10 is less than one batch of 64"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
        ({"kl_tokens": 0}, "--kl-tokens must be 1 or more, got 0"),
        ({"feature_tokens": -5}, "--feature-tokens must be 1 or more, got -5"),
        ({"batch_size": 0}, "batch_size must be an integer, 1 or more; got 0"),
        ({"context_size": 1}, "--context-size must be 2 or more, got 1"),
        ({"context_size": 100}, "--context-size is 100, but the model reads at most 64 tokens"),
        ({"lm_batch_size": 0}, "lm_batch_size must be"),
        ({"d_sae": 0}, "d_sae must be an integer, 1 or more; got 0"),
        ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
        ({"minutes": float("nan")}, "--minutes must be positive, got nan"),
        ({"layers": "4:9"}, "--layers names block 9, but the model has blocks 0 to 5"),
        ({"layers": ""}, "layers must look like"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(
    options: dict[str, Any], tmp_path: Path, monkeypatch, changes: dict[str, Any], message: str
):
    monkeypatch.setattr(paper_stages.rl, "load_model", None)
    for more in ({}, {"part": "core"}):
        with pytest.raises(typer.BadParameter, match=re.escape(message)) as refused:
            reproduce_paper.main(output=tmp_path / "none", **(options | changes | more))
        lines = str(refused.value).splitlines()
        assert lines[0] == f"{len(lines) - 1} wrong:"
        assert len(lines) == 2 or "k" in changes  # (several methods have the same k)
    assert not (tmp_path / "none").exists()


def test_all_mistakes_are_told_at_once(options: dict[str, Any], tmp_path: Path):
    changes = {"k": "0", "seeds": -1, "lr": 0.0, "kl_tokens": 0, "minutes": 0.0, "part": "core"}
    with pytest.raises(typer.BadParameter) as refused:
        reproduce_paper.main(output=tmp_path / "none", **(options | changes))
    lines = str(refused.value).splitlines()
    assert [*lines[:-1], lines[-1][:38]] == [
        "5 wrong:",
        "  --minutes must be positive, got 0.0",
        "  --seeds must be 1 or more, got -1",
        "  --kl-tokens must be 1 or more, got 0",
        "  lr must be a positive number, got 0.0",
        "  k holds 0; expected an integer, 1 or",
    ]


@pytest.mark.parametrize("name", paper_presets.PRESETS)
def test_presets_make_valid_sweeps(name: str, tmp_path: Path):
    preset = paper_presets.PRESETS[name]
    study = paper_stages.Study(preset, "demo", None, tmp_path, None)
    layers = list(preset.layers or range(6, 22))
    study.__dict__["about"] = {"layers": layers, "d_sae": preset.d_sae or 576 * preset.expansion}
    for part in paper_presets.PARTS:
        config = study.config(part)
        config.check(paper_stages.RECIPE_METHODS)
        assert config.members(paper_stages.RECIPE_METHODS)


GIB = 2**30
GPUS = {"cpu": 24, "gpu": 139, "llama-3.2-1b": 80}
"""Memory (GiB) that each preset is made for."""
DEMO = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
LLAMA = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip


@pytest.mark.parametrize("name", GPUS)
def test_every_part_of_a_preset_fits_its_machine(name: str):
    from sae_lens.load_model import HookedProxyLM
    from transformers import LlamaConfig, LlamaForCausalLM

    import routesae_lens as rl

    preset = paper_presets.PRESETS[name]
    sizes = DEMO if preset.model == "demo" else LLAMA
    with torch.device("meta"):  # sizes without numbers
        model = HookedProxyLM(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)), None)
    layers = preset.layers or rl.default_layers(sizes["num_hidden_layers"])
    d_sae = preset.d_sae or preset.expansion * sizes["hidden_size"]
    for part in paper_presets.PARTS:
        config = paper_stages.sweep_config(preset, part, layers, d_sae)
        configs = config.sae_configs(model, paper_stages.RECIPE_METHODS)
        for one in configs.values():
            one.device = "cpu" if name == "cpu" else "cuda"  # (its TopK step takes more)
        needed = rl.estimate_memory(
            model, configs, batch_size=config.batch_size, context_size=config.context_size,
            lm_batch_size=config.lm_batch_size, eval_batch_size=config.eval_batch_size, norm_estimate_batches=10,
        )  # fmt: skip
        # 5 % for what the estimate does not know of
        assert 1.05 * needed.peak < GPUS[name] * GIB, f"{part}: {needed}"
