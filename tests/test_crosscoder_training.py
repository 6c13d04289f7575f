"""Crosscoders in training: losses equal to formulas written by hand, and runs that find what was planted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crosscoders import OPTIONS, by_layer, every_training, make
from datasets import Dataset
from routed_saes import D_MODEL, D_SAE, LAYERS, stacks, step
from sae_lens import SAE, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from test_route_training import PER_LAYER, WIDTH, PlantedStacks

from routesae_lens.hook_points import split_layers
from routesae_lens.saes.crosscoder import CROSSCODER_ARCHITECTURES, Crosscoder
from routesae_lens.saes.forms import inference_form
from routesae_lens.training.train import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct",
    "ignore:the data holds",
    "ignore:end of the data",
    "ignore:The training dataset contains fewer",
    r"ignore:\s*This SAE has non-empty",
)

# --- Losses ----------------------------------------------------------------------------------------------------


@every_training
@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
def test_reconstruction_losses_by_hand(architecture, loss):
    sae = make(architecture, loss=loss)
    out = step(sae, stacks(9))
    xs = torch.cat(by_layer(stacks(9)), dim=-1)
    torch.testing.assert_close(out.sae_in, xs)  # what SAELens' explained variance is computed on
    terms = []
    for x, x_hat in zip(xs.tolist(), out.sae_out.tolist(), strict=True):
        squared = sum((a - b) ** 2 for a, b in zip(x_hat, x, strict=True))
        terms.append(squared / (sum(a**2 for a in x) if loss == "normalized_mse" else 1))
    assert out.losses["mse_loss"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert sum(out.losses.values()).item() == pytest.approx(out.loss.item(), rel=1e-5)


def test_normalised_is_the_default():
    assert make("topk").cfg.loss == "normalized_mse"


@pytest.mark.parametrize("loss", ["normalized_mse", "mse"])
def test_the_l1_penalty_sums_the_decoder_norms_of_the_layers(loss):
    sae = make("standard", loss=loss)
    out = step(sae, stacks(9))
    total = 0.0
    for x, acts in zip(out.sae_in, out.feature_acts, strict=True):
        penalty = 0.0
        for f in range(D_SAE):
            for i in range(len(LAYERS)):
                direction = sae.W_dec[f, D_MODEL * i : D_MODEL * (i + 1)]
                penalty += acts[f].item() * sum(w**2 for w in direction.tolist()) ** 0.5
        total += penalty / (sum(a**2 for a in x.tolist()) ** 0.5 if loss == "normalized_mse" else 1)
    # step() passes an l1 coefficient of 0.3
    assert out.losses["l1_loss"].item() == pytest.approx(0.3 * total / 9, rel=1e-4)


def test_other_powers_of_the_penalty():
    sae = make("standard", loss="mse", lp_norm=0.5)
    out = step(sae, stacks(9))
    weighted = out.feature_acts * sae.decoder_norms().sum(0)
    by_hand = weighted.sqrt().sum(-1).pow(2).mean()
    torch.testing.assert_close(out.losses["l1_loss"], 0.3 * by_hand)


def test_a_latent_pays_for_every_layer_it_is_in():
    """One direction of norm 1, in one layer or spread evenly over three: sqrt(3) times the penalty."""
    sae = make("standard", loss="mse")
    penalties = []
    for spread in ([1.0, 0.0, 0.0], [3**-0.5] * 3):
        with torch.no_grad():
            sae.W_dec.zero_()
            sae.W_dec.view(D_SAE, 3, D_MODEL)[:, :, 0] = torch.tensor(spread)
        penalties.append(step(sae, stacks(9)).losses["l1_loss"].item())
    assert penalties[1] == pytest.approx(3**0.5 * penalties[0], rel=1e-5)


@pytest.mark.parametrize(
    "architecture, options", [("topk", {}), ("topk", {"relu": False}), ("batchtopk", {})]
)
def test_the_auxiliary_loss_is_on_the_scale_of_the_reconstruction_loss(architecture, options):
    """Token by token, the normalised auxiliary loss is the plain one divided by ||x||^2."""
    dead = [0, 3, 7, 8, 13, 20]
    stack = stacks(9)
    normalized = step(make(architecture, **options), stack, dead=dead).losses["auxiliary_reconstruction_loss"]
    plain = make(architecture, loss="mse", **options)
    out = step(plain, stack, dead=dead)
    terms = []
    hidden_pre = plain.encode_with_hidden_pre(out.sae_in)[1]
    for x, x_hat, pre in zip(out.sae_in, out.sae_out, hidden_pre, strict=True):
        # fewer dead latents than d_in / 2: all of them reconstruct, scaled by their share of d_in / 2
        aux = torch.zeros_like(pre)
        aux[dead] = pre[dead] / plain.W_dec[dead].norm(dim=-1)
        squared = (aux @ plain.W_dec - (x - x_hat)).pow(2).sum()
        terms.append((squared / x.pow(2).sum()).item() * len(dead) / 15)
    assert normalized.item() == pytest.approx(sum(terms) / 9, rel=1e-4)
    assert normalized < out.losses["auxiliary_reconstruction_loss"]


@every_training
@pytest.mark.parametrize("constant", [[0], [0, 1, 2]], ids=["one layer", "all layers"])
def test_gradients_are_finite_with_a_constant_activation(architecture, constant):
    sae = make(architecture)
    stack = stacks(9)
    stack.view(9, 3, D_MODEL)[4, constant] = 2.5
    stack.requires_grad_()
    step(sae, stack, dead=[0, 3]).loss.backward()
    for parameter in (*sae.parameters(), stack):
        assert torch.isfinite(parameter.grad).all()
    assert sae.W_enc.grad.abs().max() > 0


# --- Training ------------------------------------------------------------------------------------------------


@every_training
def test_planted_features_are_found_in_their_layers(architecture):
    """Every planted feature lives in one layer; the decoder norms of the latent that finds it say which."""
    data = PlantedStacks(batch=256)
    sae_class, config = get_sae_training_class(f"crosscoder_{architecture}")
    options = {"topk": {"k": 5}, "batchtopk": {"k": 5.0}, "standard": {"l1_coefficient": 0.05}}[architecture]
    torch.manual_seed(1)
    sae: Any = sae_class(config(d_in=3 * WIDTH, d_sae=32, layers=[2, 5, 7], **options))
    cfg = SAETrainerConfig(
        total_training_samples=400 * 256,
        train_batch_size_samples=256,
        lr=5e-3,
        lr_end=5e-3,
        dead_feature_window=50,
    )
    first = step(sae, next(data)).losses["mse_loss"].item()
    SAETrainer(cfg, sae, data).fit()
    assert step(sae, next(data)).losses["mse_loss"].item() < 0.5 * first
    rows = torch.nn.functional.normalize(split_layers(sae.W_dec.detach(), 3), dim=-1)  # latent layer d
    norms = sae.decoder_norms().detach()
    share = norms.pow(2) / norms.pow(2).sum(0)
    right = 0
    for feature, direction in enumerate(data.directions):
        layer = feature // PER_LAYER
        found = (rows[:, layer] @ direction * share[layer]).argmax()
        right += bool(share[layer, found] > 0.7 and rows[found, layer] @ direction > 0.9)
    assert right >= 18, right  # of 24


def token_rows(n: int, context: int = 16) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"tokens": torch.randint(64, (n, context), generator=generator).tolist()})


def for_model(model: Any, architecture: str) -> Any:
    options = {"l1_coefficient": 0.01} if architecture == "standard" else OPTIONS[architecture]
    config = CROSSCODER_ARCHITECTURES[f"crosscoder_{architecture}"]
    return config.for_model(model, layers=LAYERS, d_sae=48, **options)


def test_a_short_run_lowers_the_loss_of_every_architecture(tiny_hooked, tmp_path: Path):
    configs = {name: for_model(tiny_hooked, name) for name in OPTIONS}
    result = train(
        tiny_hooked,
        configs,
        token_rows(200),
        output=tmp_path,
        training_tokens=80 * 32,
        context_size=16,
        batch_size=32,
        lr=3e-3,
    )
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(5))
    for name, path in result.paths.items():
        losses = [row[f"{name}/losses/mse_loss"] for row in rows if f"{name}/losses/mse_loss" in row]
        assert losses[-1] < 0.8 * losses[0], (name, losses[0], losses[-1])
        loaded = SAE.load_from_disk(path)
        assert isinstance(loaded, Crosscoder) and loaded.layers == LAYERS
        point = loaded.mount(tiny_hooked)
        stack = tiny_hooked.run_with_cache(tokens, names_filter=point)[1][point][:, 1:]
        x = loaded.standardized(stack)
        normalized = (loaded(stack) - x).pow(2).sum(-1) / x.pow(2).sum(-1)
        assert normalized.mean() < 0.9 * losses[0], name


@every_training
def test_the_stock_runner_trains_it(tiny_hooked, tmp_path: Path, architecture):
    cfg = LanguageModelSAERunnerConfig(
        sae=for_model(tiny_hooked, architecture),
        hook_name=for_model(tiny_hooked, architecture).metadata.hook_name,
        model_name="tiny",
        dataset_path="",
        is_dataset_tokenized=True,
        context_size=16,
        training_tokens=4 * 32,
        train_batch_size_tokens=32,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        device="cpu",
        output_path=str(tmp_path / "out"),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_model=tiny_hooked, override_dataset=token_rows(60))
    trained: Any = runner.run()
    loaded = SAE.load_from_disk(tmp_path / "out")
    assert isinstance(loaded, Crosscoder)
    torch.testing.assert_close(loaded(stack := torch.randn(5, 96)), inference_form(trained)(stack))
