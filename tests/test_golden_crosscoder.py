"""The authors' numbers for their Crosscoder: latents, reconstructions and metrics, through their own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from routesae_lens.saes.authors import from_authors_checkpoint
from routesae_lens.saes.crosscoder import Crosscoder

LAYERS = [1, 2, 3, 4, 5]
KINDS: dict[str, dict[str, Any]] = {"relu": {}, "infer_k4": {"k": 4}, "theta": {"theta": 1.0}}
ARCHITECTURES = {
    "relu": "crosscoder_standard",
    "infer_k4": "crosscoder_topk",
    "theta": "crosscoder_jumprelu",
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return shared / "golden" / "routesaes"


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "tensors.safetensors")


@pytest.fixture
def state(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "crosscoder_checkpoint.pt", weights_only=True)


def load(folder: Path, kind: str) -> Crosscoder:
    sae = from_authors_checkpoint(folder / "crosscoder_checkpoint.pt", layers=LAYERS, **KINDS[kind])
    assert isinstance(sae, Crosscoder)
    return sae


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@every_kind
@torch.no_grad()
def test_every_tensor_of_a_case(folder, golden, kind):
    sae = load(folder, kind)
    assert sae.cfg.architecture() == ARCHITECTURES[kind]
    stack, latents = golden["hidden"].flatten(-2), golden[f"cc.{kind}.latents"]
    recon = golden[f"cc.{kind}.recon"]
    close(sae.standardized(stack), golden["x_norm"].flatten(-2))
    close(sae.encode(stack), latents)
    close(sae.decode_layers(latents), recon)
    close(sae(stack), recon.flatten(-2))
    for i, layer in enumerate(LAYERS):
        close(sae.layer_reconstruction(stack, layer), recon[..., i, :])


@every_kind
@torch.no_grad()
def test_the_metrics_of_a_case(folder, golden, kind):
    cases = json.loads((folder / "meta.json").read_text())["crosscoder_cases"]
    (expected,) = [row for row in cases if row["case"] == kind]
    sae = load(folder, kind)
    stack = golden["hidden"].flatten(-2)
    x, latents, recon = sae.standardized(stack), sae.encode(stack), sae(stack)
    # Over the whole stack; theirs is per layer, which is the same for layers of one norm.
    norm_mse = ((recon - x).pow(2).sum(-1) / x.pow(2).sum(-1)).mean()
    assert norm_mse.item() == pytest.approx(expected["norm_mse"], abs=1e-5)
    assert (latents != 0).float().sum(-1).mean().item() == pytest.approx(expected["l0"], abs=1e-5)
    assert latents.abs().mean().item() == pytest.approx(expected["l1"], abs=1e-5)


@torch.no_grad()
def test_the_weights_and_the_metadata(folder, golden):
    sae = from_authors_checkpoint(
        folder / "crosscoder_checkpoint.pt", layers=[3, 4, 6, 7, 9], k=4, model_name="some/model"
    )
    assert isinstance(sae, Crosscoder)
    for i, layer in enumerate([3, 4, 6, 7, 9]):
        assert torch.equal(sae.layer_decoder(layer), golden[f"cc.w.decoder.{i}.weight"].T)
        assert torch.equal(sae.W_enc[24 * i : 24 * (i + 1)], golden[f"cc.w.encoder.{i}.weight"].T)
        close(sae.decoder_norms()[i], golden[f"cc.w.decoder.{i}.weight"].norm(dim=0))
    assert torch.equal(sae.b_enc, golden["cc.w.latent_bias"]) and not sae.b_dec.any()
    assert sae.cfg.metadata.hook_name == "blocks.9.hook_resid_post_stack_3to4_6to7_9"
    assert sae.cfg.metadata.model_name == "some/model"


@torch.no_grad()
def test_there_is_no_relu_after_their_topk(tmp_path, golden, state):
    """The golden case with k = 4 holds no negative latent; a bias makes some."""
    state["latent_bias"] -= 100.0
    torch.save(state, tmp_path / "x.pt")
    sae = from_authors_checkpoint(tmp_path / "x.pt", layers=LAYERS, k=4)
    acts = sae.encode(golden["hidden"].flatten(-2))
    assert (acts.min(-1).values < 0).all() and ((acts != 0).sum(-1) == 4).all()


@every_kind
@torch.no_grad()
def test_an_imported_crosscoder_survives_the_disk(folder, golden, tmp_path, kind):
    sae = load(folder, kind)
    sae.save_model(tmp_path)
    loaded = Crosscoder.load_from_disk(tmp_path)
    stack = golden["hidden"].flatten(-2)
    assert torch.equal(loaded.encode(stack), sae.encode(stack)) and torch.equal(loaded(stack), sae(stack))
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()


# --- Refusals ----------------------------------------------------------------------------------------------


def refuse(tmp_path: Path, state: Any, match: str) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=match):
        from_authors_checkpoint(tmp_path / "x.pt", layers=LAYERS, k=2)


def test_wrong_keys(tmp_path, state, folder):
    neither = "no RouteSAE checkpoint .* and no Crosscoder checkpoint"
    for missing in ("latent_bias", "encoder.0.weight", "encoder.2.weight", "decoder.4.weight"):
        refuse(tmp_path, {name: v for name, v in state.items() if name != missing}, neither)
    refuse(tmp_path, {"latent_bias": state["latent_bias"]}, neither)
    refuse(tmp_path, state | {"encoder.5.weight": state["encoder.0.weight"]}, neither)
    refuse(tmp_path, state | {"pre_bias": state["latent_bias"]}, "pre_bias")
    refuse(tmp_path, state | {0: state["latent_bias"]}, neither)
    route_sae = torch.load(folder / "routesae_checkpoint.pt", weights_only=True)
    refuse(tmp_path, state | route_sae, neither)


def test_wrong_values(tmp_path, state):
    encoder = state["encoder.0.weight"]
    for name, value in {
        "encoder.0.weight": 3,
        "encoder.3.weight": encoder[:, :-1],
        "decoder.2.weight": encoder,
        "latent_bias": encoder[0],
    }.items():
        refuse(tmp_path, state | {name: value}, f"no Crosscoder checkpoint: {name} should have the shape")


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"layers": [1, 2, 3]}, "reads 5 layers, but layers lists 3"),
        ({"layers": LAYERS, "k": 2, "theta": 0.4}, "exactly one of k and theta"),
        ({"layers": LAYERS, "theta": 0.0}, "theta must be positive"),
        ({"layers": LAYERS, "k": 97}, "k must be between 1 and d_sae = 96"),
        ({"layers": LAYERS, "aggregator": "mean"}, "has no router, so leave aggregator and routing out"),
        ({"layers": LAYERS, "routing": "soft"}, "has no router, so leave aggregator and routing out"),
    ],
)
def test_wrong_arguments(folder, kwargs, match):
    with pytest.raises(ValueError, match=match):
        from_authors_checkpoint(folder / "crosscoder_checkpoint.pt", **kwargs)
