"""How much memory a sweep takes, and that it is refused where there is less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import run

from routesae_lens.training.memory import estimate_memory
from routesae_lens.training.methods import make_config
from routesae_lens.training.sweep_config import SweepConfig


def test_a_sweep_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path):
    with pytest.raises(
        MemoryError, match=r"the sweep needs 0.0\d GiB .*weights 0.00, moments 0.00.*0.00 GiB are"
    ):
        run(tmp_path / "sweep", memory=100_000)
    assert not (tmp_path / "sweep").exists()


def smollm2() -> Any:
    """A model of SmolLM2-135M's shape, without its weights."""
    from sae_lens.load_model import HookedProxyLM
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        **{"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    }
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    return HookedProxyLM(model, None, hook_names=[f"model.layers.{i}" for i in range(30)])


def test_24_saes_fit_in_24_gib_at_smollm2_size():
    model = smollm2()
    coefficients = {name: [1, 2, 3] for name in ("relu", "gated", "jumprelu", "crosscoder_relu")}
    config = SweepConfig.from_dict(
        {
            "methods": ["route", "random", "topk", "crosscoder_topk", *coefficients],
            **{"k": [16, 32, 64], "sparsities": coefficients, "d_sae": 4608, "training_tokens": 10**6},
        }
    )
    configs = config.sae_configs(model)
    assert len(configs) == 24
    estimate = estimate_memory(model, configs, batch_size=2048)
    routed, crosscoder = 2 * 576 * 4608, 2 * 16 * 576 * 4608
    assert estimate.weights == pytest.approx(4 * (18 * routed + 6 * crosscoder), rel=0.01)
    assert estimate.moments == 2 * estimate.weights
    # (a dense step's beside what is kept of the last fast step's)
    assert estimate.gradient == pytest.approx(2 * 4 * crosscoder, rel=0.01)
    alike = {name: cfg for name, cfg in configs.items() if "relu" not in name and "gated" not in name}
    alike = {name: cfg for name, cfg in alike.items() if "jumprelu" not in name}
    fast = estimate_memory(model, alike, batch_size=2048)
    assert fast.gradient == pytest.approx(4 * crosscoder, rel=0.01)
    assert estimate.buffer == 4 * (16 + 1) * 576 * (8192 + 2048 - 1)
    assert estimate.batches == 4 * (16 + 1) * 576 * 2048
    small = estimate_memory(model, configs, batch_size=2048, buffer_dtype="bfloat16", prefetch=3)
    assert small.buffer == estimate.buffer / 2 and small.batches == estimate.batches / 2 * 5
    apart = estimate_memory(model, configs, batch_size=2048, buffer_apart=True)
    assert (apart.buffer, apart.host_buffer) == (0, estimate.buffer)
    assert apart.training == estimate.training - estimate.buffer
    assert "0.37 GiB of main memory" in str(apart)
    assert 8 * 2**30 < estimate.peak < 12 * 2**30


def test_only_the_rule_that_trains_on_every_layer_multiplies_the_step(tiny_hooked: Any):
    def step(method: str) -> int:
        config = make_config(method, tiny_hooked, [1, 2, 4], 4096, 4, 0)
        return estimate_memory(tiny_hooked, {method: config}, batch_size=512).step

    stack, read = 4 * 512 * 3 * 32, 4 * 512 * 32  # batch x d_in, batch x d_model
    one_layer = 4 * 512 * 2 * 4096  # two of batch x d_sae
    assert step("route") == step("distilled") == step("oracle") == one_layer + stack + 5 * read
    assert step("route_soft") == step("route_attention") == one_layer + 6 * stack
    assert step("mlsae") == 3 * one_layer + 6 * stack


MEASURED = """
import re, sys, tempfile, warnings
from pathlib import Path
import psutil, torch
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import sweeps
from routesae_lens.training.memory import estimate_memory
from routesae_lens.training.sweep_config import SweepConfig
torch.set_num_threads(1)
changes = {"methods": ["route", "topk", "relu", "distilled"], "k": [2, 4], "sparsities": {"relu": [1]},
           "batch_size": 256, "training_tokens": 512}
sweeps.run(Path(tempfile.mkdtemp()), **changes, d_sae=16)
before = psutil.Process().memory_info().rss
config = SweepConfig.from_dict(sweeps.CONFIG | changes | {"d_sae": 16384})
model = sweeps.tiny_model()
estimate = estimate_memory(model, config.sae_configs(model), batch_size=256, context_size=16)
sweeps.run(Path(tempfile.mkdtemp()), **changes, d_sae=16384)
# (not ru_maxrss, which begins at what the process that started this one had)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(estimate.needed, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_estimate_is_what_a_process_takes():
    # glibc would keep what was freed, in amounts that differ from run to run
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(Path(__file__).parent)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    estimated, measured = map(int, done.stdout.split())
    assert estimated > 150 * 2**20
    assert measured / 1.5 < estimated < measured * 1.5
