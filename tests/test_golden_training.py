"""The authors' 40-step training run, through SAELens' own trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from torch import Tensor

from routesae_lens.hook_points import join_layers
from routesae_lens.saes.architectures import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from routesae_lens.training.schedules import Schedule
from routesae_lens.training.trainer import set_decoder_norm

WEIGHTS = {
    "W_router": ("router.weight", False),
    "W_enc": ("sae.encoder.weight", True),
    "b_enc": ("sae.latent_bias", False),
    "W_dec": ("sae.decoder.weight", True),
    "b_dec": ("sae.pre_bias", False),
}
"""Our names: theirs, and whether theirs is transposed."""


@pytest.fixture
def tensors(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden" / "routesaes" / "tensors.safetensors")


@pytest.fixture
def meta(shared: Path) -> dict:
    return json.loads((shared / "golden" / "routesaes" / "meta.json").read_text())


def test_the_schedule_is_the_authors(meta: dict):
    expected = meta["lr_200_steps"]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule("paper", 200))
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=0, abs=1e-12)


class UnitNormBatches(Iterator[Tensor]):
    """The authors' batches; decoder norms are set before training and after steps 0, 10, 20 and 30."""

    def __init__(self, hidden: Tensor, sae: RouteTopKTrainingSAE):
        self.hidden, self.sae, self.step = hidden, sae, 0

    def __next__(self) -> Tensor:
        if self.step == 0 or (self.step - 1) % 10 == 0:
            set_decoder_norm(self.sae)
        self.step += 1
        return join_layers(self.hidden[self.step - 1]).flatten(0, 1)


def test_the_authors_run_comes_out_the_same(tensors: dict[str, Tensor], meta: dict):
    n_steps, sequences, positions, n_layers, d_model = tensors["train.hidden"].shape
    sae = RouteTopKTrainingSAE(
        RouteTopKTrainingSAEConfig(
            d_in=n_layers * d_model,
            d_sae=meta["d_sae"],
            k=meta["k"],
            layers=[1, 2, 3, 4, 5],
            relu=False,
            aux_loss_coefficient=0.0,
            rescale_acts_by_decoder_norm=False,
        )
    )
    sae.load_state_dict(
        {
            name: (
                tensors[f"train.init.{theirs}"].T if turned else tensors[f"train.init.{theirs}"]
            ).contiguous()
            for name, (theirs, turned) in WEIGHTS.items()
        }
    )
    batch = sequences * positions
    losses: list[float] = []
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=n_steps * batch,
            train_batch_size_samples=batch,
            lr=5e-4,
            lr_end=5e-5,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        UnitNormBatches(tensors["train.hidden"], sae),
    )
    Schedule("paper", n_steps).install(trainer)
    trainer._update_pbar = lambda output, bar: losses.append(output.loss.item())  # type: ignore
    trainer.fit()

    expected = meta["train_norm_mse"]
    assert losses[:23] == pytest.approx(expected[:23], rel=0, abs=1e-4)
    assert losses[23:] == pytest.approx(expected[23:], rel=0, abs=1e-2)
    for name, (theirs, turned) in WEIGHTS.items():
        final = tensors[f"train.final.{theirs}"]
        assert (getattr(sae, name) - (final.T if turned else final)).abs().max() < 5e-3, name
