"""RouteSAE through SAELens' trainer: planted features, half precision, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_saes import ARCHITECTURES, D_MODEL, make, stacks, step
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary
from sae_lens.training.sae_trainer import SAETrainer

from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.router import ROUTINGS

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
LAYERS, WIDTH, PER_LAYER = [2, 5, 7], 24, 8


class PlantedStacks:
    """Stacks whose layers carry features of their own: layer i the directions i * 8 ... i * 8 + 7."""

    def __init__(self, batch: int):
        torch.manual_seed(0)
        self.dictionary = FeatureDictionary(3 * PER_LAYER, WIDTH, initializer=None, seed=0)
        directions = self.dictionary.feature_vectors.data
        directions -= directions.mean(-1, keepdim=True)  # the standardisation takes the mean away
        self.directions = directions / directions.norm(dim=-1, keepdim=True)
        self.dictionary.feature_vectors.data = self.directions
        self.generator = ActivationGenerator(3 * PER_LAYER, 0.2, 0.2, 1.5)
        self.layer_of = torch.arange(3 * PER_LAYER) // PER_LAYER
        self.batch = batch

    def __iter__(self):
        return self

    @torch.no_grad()
    def __next__(self) -> torch.Tensor:
        acts = self.generator(self.batch)
        layers = [self.dictionary(acts * (self.layer_of == i)) for i in range(3)]
        stack = torch.stack(layers, dim=-2)
        return (stack + 0.02 * torch.randn(stack.shape)).flatten(-2)


def train(sae: Any, data: Any, steps: int, batch: int, **kwargs: Any) -> Any:
    cfg = SAETrainerConfig(
        total_training_samples=steps * batch, train_batch_size_samples=batch, lr=5e-3, lr_end=5e-3, **kwargs
    )
    return SAETrainer(cfg, sae, data).fit()


def recovery(sae: Any, directions: torch.Tensor) -> torch.Tensor:
    """For each planted direction the largest cosine with a decoder row."""
    rows = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=-1, keepdim=True)
    return (directions @ rows.T).max(dim=-1).values


@pytest.mark.parametrize("routing, found", [("random", 0.95), ("hard", 0.7)])
def test_planted_features_are_found(routing, found):
    """All of them where every layer is read; hard routing comes to prefer a layer and finds that one's best."""
    data = PlantedStacks(batch=256)
    torch.manual_seed(1)
    sae_class, config = get_sae_training_class("route_topk")
    sae: Any = sae_class(config(d_in=3 * WIDTH, d_sae=32, layers=LAYERS, k=3, routing=routing))
    before = recovery(sae, data.directions)
    train(sae, data, steps=600, batch=256, dead_feature_window=50)
    after = recovery(sae, data.directions)
    assert before.mean() < 0.5 and after.mean() > found, after
    assert after.reshape(3, PER_LAYER).mean(-1).max() > 0.95


def test_features_of_layers_that_are_not_read_are_not_found():
    data = PlantedStacks(batch=256)
    torch.manual_seed(1)
    sae_class, config = get_sae_training_class("route_topk")
    fixed: Any = sae_class(
        config(d_in=3 * WIDTH, d_sae=32, layers=LAYERS, k=3, routing="fixed", fixed_layer=LAYERS[1])
    )
    train(fixed, data, steps=300, batch=256, dead_feature_window=50)
    found = recovery(fixed, data.directions).reshape(3, PER_LAYER).mean(-1)
    assert found[1] > 0.95 and found[0] < 0.6 and found[2] < 0.6


# --- Every architecture, a few steps -----------------------------------------------------------------------


class Stacks:
    def __iter__(self):
        return self

    def __next__(self) -> torch.Tensor:
        return stacks(64)


@every_architecture
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_architecture_learns(architecture, routing):
    sae = make(architecture, routing=routing)
    before = step(sae, stacks(64)).losses["mse_loss"].item()
    train(sae, Stacks(), steps=40, batch=64, dead_feature_window=5)
    assert step(sae, stacks(64)).losses["mse_loss"].item() < 0.9 * before
    assert sae.cfg.metadata.l0 is not None


@every_architecture
def test_the_trainer_folds_the_input_norm(architecture):
    sae = make(architecture, standardize=False, normalize_activations="expected_average_only_in")
    train(sae, Stacks(), steps=3, batch=64, n_batches_for_norm_estimate=2)
    assert sae.cfg.normalize_activations == "none"
    assert sae(stacks(5)).shape == (5, D_MODEL)


# --- Half precision ----------------------------------------------------------------------------------------


@every_architecture
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bfloat16(architecture, routing, tmp_path):
    sae = make(architecture, routing=routing, dtype="bfloat16")
    reference = make(architecture, routing=routing)
    out = step(sae, stacks(64), [1, 2, 3])
    expected = step(reference, stacks(64), [1, 2, 3])
    assert out.sae_in.dtype == out.sae_out.dtype == torch.bfloat16
    for name, loss in expected.losses.items():
        if routing not in ("distilled", "oracle"):  # rounding changes which layers they read
            torch.testing.assert_close(out.losses[name].float(), loss.float(), rtol=0.15, atol=0.02)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)
    sae.save_inference_model(tmp_path)
    loaded = type(inference_form(sae)).load_from_disk(tmp_path)
    assert loaded.dtype == torch.bfloat16
    if routing != "every":
        assert torch.equal(loaded(stacks(5)), inference_form(sae)(stacks(5)))


@every_architecture
@pytest.mark.parametrize("routing", ROUTINGS)
def test_autocast(architecture, routing):
    sae = make(architecture, routing=routing)
    expected = step(sae, stacks(64), [1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step(sae, stacks(64), [1, 2, 3])
    for name, loss in expected.losses.items():
        if routing not in ("distilled", "oracle"):
            torch.testing.assert_close(out.losses[name].float(), loss.float(), rtol=0.15, atol=0.02)
    train(sae, Stacks(), steps=3, batch=64, autocast=True, dead_feature_window=1)


# --- torch.compile -----------------------------------------------------------------------------------------


COMPILED = """
import torch
from routed_saes import make, stacks, step
for routing in {routings}:
    sae = make("standard", routing=routing, aggregator="attention")
    eager = [step(sae, stacks(16), n=n) for n in range(3)]
    sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="aot_eager", fullgraph=True)
    for n, expected in enumerate(eager):
        out = step(sae, stacks(16), n=n)
        torch.testing.assert_close(out.sae_in, expected.sae_in)
        torch.testing.assert_close(out.loss, expected.loss)
        for name, value in expected.metrics.items():
            torch.testing.assert_close(out.metrics[name], value)
    out.loss.backward()
    assert torch.isfinite(sae.W_enc.grad).all()
"""


def test_the_training_step_compiles_without_a_graph_break():
    # In a process of its own: here, the checks of array shapes stand in the compiler's way.
    script = COMPILED.format(routings=["hard", "random"])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
