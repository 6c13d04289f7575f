"""What training says about its memory, and the options that need less: number formats, fused Adam, stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import every_backend
from datasets import Dataset
from sae_lens import SAE, TopKTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from test_training import CONTEXT, config, run
from transformer_lens import HookedTransformer

from routesae_lens.analysis.evaluate import SpliceEvaluator
from routesae_lens.backends import backend_of
from routesae_lens.hook_points import mount_layers
from routesae_lens.models import load_model
from routesae_lens.training import memory, schedules, train
from routesae_lens.training.trainer import MonitoredTrainer

pytestmark = pytest.mark.filterwarnings("ignore:the data holds", "ignore:end of the data")


def test_every_run_says_what_it_needs(
    tiny_hooked: HookedTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(tiny_hooked, tmp_path / "run")
    said = capsys.readouterr().err
    assert "memory: the run needs 0.00 GiB beside the model (weights 0.00, moments" in said
    assert "evaluation 0.00" in said


def test_a_run_that_cannot_fit_is_refused_before_anything_is_made(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "available_memory", lambda device: 1000)
    with pytest.raises(
        MemoryError, match=r"the run needs .* 0\.00 GiB are available.*\(check_memory=False\)"
    ):
        run(tiny_hooked, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run(tiny_hooked, tmp_path / "run", check_memory=False)


def test_an_evaluator_and_a_buffer_elsewhere_are_counted(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[memory.MemoryEstimate] = []
    monkeypatch.setattr(train, "tell_memory", lambda estimate, *_: seen.append(estimate))
    tokens = torch.randint(64, (4, CONTEXT))
    run(tiny_hooked, tmp_path / "a")
    run(tiny_hooked, tmp_path / "b", evaluator=SpliceEvaluator(tiny_hooked, tokens), eval_every=6)
    plain, evaluating = seen
    assert (
        plain.evaluation == 0 and evaluating.evaluation > 4 * 3 * 4 * CONTEXT * 64
    )  # three times the logits
    kept = plain.weights + plain.moments + plain.buffer + plain.batches
    assert evaluating.training == kept + max(
        plain.gradient + plain.step + plain.forward, evaluating.evaluation
    )
    with pytest.raises(MemoryError, match="GiB of main memory; of main memory"):
        memory.check_memory(
            memory.MemoryEstimate(0, 0, 0, 0, 0, 0, 0, 0, 0, host_buffer=2**60), available=2**60
        )


def test_half_the_buffer_and_nearly_the_same_weights(tiny_hooked: HookedTransformer, tmp_path: Path):
    plain = TopKTrainingSAEConfig(d_in=32, d_sae=48, k=4)
    plain.metadata.hook_name = "blocks.4.hook_resid_post"
    configs = {"route": config(tiny_hooked), "plain": plain}
    full = run(tiny_hooked, tmp_path / "full", configs)
    half = run(tiny_hooked, tmp_path / "half", configs, buffer_dtype="bfloat16")
    for name, path in full.paths.items():
        ours, theirs = SAE.load_from_disk(half.paths[name]), SAE.load_from_disk(path)
        assert ours.W_enc.dtype == torch.float32
        assert not torch.equal(ours.W_enc, theirs.W_enc)
        torch.testing.assert_close(ours.W_enc, theirs.W_enc, atol=0.02, rtol=0.05)
    assert json.loads((tmp_path / "half" / "run.json").read_text())["options"]["buffer_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="unknown buffer_dtype 'int8'; known: float32, bfloat16, float16"):
        run(tiny_hooked, tmp_path / "wrong", buffer_dtype="int8")


def test_the_language_model_can_run_in_bfloat16(tiny_hooked: HookedTransformer, tmp_path: Path):
    full = run(tiny_hooked, tmp_path / "full")
    cast = run(tiny_hooked, tmp_path / "cast", autocast_lm=True)
    ours, theirs = (SAE.load_from_disk(result.paths["route_topk"]).W_enc for result in (cast, full))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.05)


# --- Adam's fused kernel ---------------------------------------------------------------------------------


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        line["route_topk/losses/overall_loss"] for line in lines if "route_topk/losses/overall_loss" in line
    ]


def test_adam_is_fused_and_its_losses_are_the_same(
    tiny_hooked: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    used: list[Any] = []
    fit = MonitoredTrainer.fit

    def spied(trainer: MonitoredTrainer) -> Any:
        groups = [group for one in trainer.trainers.values() for group in one.optimizer.param_groups]
        used.append([(group["fused"], group["foreach"]) for group in groups])
        return fit(trainer)

    monkeypatch.setattr(MonitoredTrainer, "fit", spied)
    run(tiny_hooked, tmp_path / "fused", log_every=1)
    monkeypatch.setattr("routesae_lens.training.runner.fuse_adam", lambda optimizer: None)
    run(tiny_hooked, tmp_path / "plain", log_every=1)
    assert used == [[(True, False)], [(None, None)]]
    fused, plain = losses(tmp_path / "fused"), losses(tmp_path / "plain")
    assert len(fused) == 12 and len(set(fused)) > 6
    assert fused == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("parameter", "fused"),
    [
        (torch.zeros(3), True),
        (torch.zeros(3, dtype=torch.float64), True),
        (torch.zeros(3, dtype=torch.bfloat16), True),
        (torch.zeros(3, dtype=torch.complex64), None),  # the fused kernel knows real numbers alone
        (torch.zeros(3, device="meta"), None),  # stands for a device without the kernel
    ],
)
def test_where_there_is_no_fused_kernel_adam_stays_as_it_was(parameter: torch.Tensor, fused: bool | None):
    weight = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.Adam([weight], lr=0.1)
    schedules.fuse_adam(optimizer)
    assert optimizer.param_groups[0]["fused"] is fused
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    if weight.device.type == "cpu":
        torch.testing.assert_close(weight.detach(), torch.full_like(parameter, -0.1), atol=1e-3, rtol=0)


# --- The language model's pass ---------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("several", [True, False])
def test_the_language_model_stops_after_the_last_routed_layer(model: Any, several: bool):
    """In both of SAELens' activation stores: blocks 0 to 4 run, block 5 does not."""
    name = mount_layers(model, [1, 2, 4])
    options: dict[str, Any] = {
        "dataset": Dataset.from_dict({"tokens": torch.randint(60, (4, CONTEXT)).tolist()}),
        "context_size": CONTEXT,
        "store_batch_size_prompts": 2,
        "train_batch_size_tokens": 8,
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    if several:
        blocks_path = backend_of(model).blocks_path
        plain = f"{blocks_path}.2" if type(model).__name__ == "HookedProxyLM" else "blocks.2.hook_resid_post"
        store = ActivationsStore.from_config_multi_hook(
            model, hook_names=[name, plain], hook_d_ins={name: 96, plain: 32}, **options
        )
    else:
        more: dict[str, Any] = {"prepend_bos": False, "normalize_activations": "none"}
        store = ActivationsStore(
            model, streaming=False, hook_name=name, hook_head_index=None, d_in=96, n_batches_in_buffer=2,
            total_training_tokens=64, **more, **options
        )  # fmt: skip
    ran: list[int] = []
    blocks = backend_of(model).blocks
    handles = [
        block.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)
    ]
    tokens = store.get_batch_tokens()
    acts = store.get_multi_hook_activations(tokens)[name] if several else store.get_activations(tokens)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3, 4]
    assert acts.shape == (2, CONTEXT, 96)
    assert acts.std() > 0


@pytest.mark.parametrize("backend", ["huggingface", "bridge", "hooked"])
def test_every_backend_gives_bfloat16_activations(tiny_llama_dir: Path, backend: str):
    model = load_model(tiny_llama_dir, backend, device="cpu", dtype="bfloat16")
    exact = load_model(tiny_llama_dir, backend, device="cpu")
    ids = torch.arange(10)[None]
    name = mount_layers(model, [1, 2, 4])
    mount_layers(exact, [1, 2, 4])
    got, expected = (one.run_with_cache(ids, names_filter=[name])[1][name] for one in (model, exact))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


def test_the_attention_kernel_can_be_chosen_where_there_is_a_choice(tiny_llama_dir: Path):
    assert load_model(tiny_llama_dir, device="cpu").model.config._attn_implementation == "sdpa"
    eager = load_model(tiny_llama_dir, device="cpu", attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    for backend in ("bridge", "hooked"):
        with pytest.raises(ValueError, match=f"backend '{backend}' has no attn_implementation 'sdpa'"):
            load_model(tiny_llama_dir, backend, device="cpu", attn_implementation="sdpa")
