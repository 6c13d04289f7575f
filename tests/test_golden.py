"""The authors' numbers: routing, latents and reconstructions of their code, through their own checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from routesae_lens.saes.authors import from_authors_checkpoint
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE

LAYERS = [1, 2, 3, 4, 5]  # start_layer 2 ... in hidden states is block 1 ...
KINDS: dict[str, dict[str, Any]] = {"topk": {"k": 6}, "infer_k2": {"k": 2}, "theta": {"theta": 0.4}}
CASES = [
    f"{agg}.{routing}.{kind}" for agg in ("sum", "mean") for routing in ("hard", "soft") for kind in KINDS
]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    return load_file(shared / "golden" / "routesaes" / "tensors.safetensors")


@pytest.fixture(scope="module")
def meta(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden" / "routesaes" / "meta.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(shared: Path) -> Path:
    return shared / "golden" / "routesaes" / "routesae_checkpoint.pt"


def load(checkpoint: Path, case: str) -> RouteSAE:
    aggregator, routing, kind = case.split(".")
    return from_authors_checkpoint(
        checkpoint, layers=LAYERS, aggregator=aggregator, routing=routing, **KINDS[kind]
    )


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_standardisation(golden):
    x, mean, std = standardize(golden["hidden"])
    close(x, golden["x_norm"])
    close(mean, golden["mean"])
    close(std, golden["std"])
    close(x * std + mean, golden["hidden"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_tensor_of_a_case(golden, checkpoint, case):
    sae = load(checkpoint, case)
    stack = golden["hidden"].flatten(-2)
    route = sae.route(stack)
    close(route.probs, golden[f"{case}.router_probs"])
    one_hot = (route.weights != 0).float() if ".hard." in case else route.weights
    close(one_hot, golden[f"{case}.layer_weights"])
    assert torch.equal(route.layer, golden[f"{case}.layer_weights"].argmax(-1))
    close(route.input, golden[f"{case}.routed"])
    close(sae.encode(stack), golden[f"{case}.latents"])
    close(sae.decode(golden[f"{case}.latents"]), golden[f"{case}.recon"])
    close(sae(stack), golden[f"{case}.recon"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_metrics_of_a_case(golden, meta, checkpoint, case):
    (expected,) = [row for row in meta["routesae_cases"] if row["case"] == case]
    sae = load(checkpoint, case)
    stack = golden["hidden"].flatten(-2)
    x, latents, recon = sae.route(stack).input, sae.encode(stack), sae(stack)
    norm_mse = ((recon - x).pow(2).sum(-1) / x.pow(2).sum(-1)).mean()
    assert norm_mse.item() == pytest.approx(expected["norm_mse"], abs=1e-5)
    assert (latents != 0).float().sum(-1).mean().item() == pytest.approx(expected["l0"], abs=1e-5)


@torch.no_grad()
def test_the_unscaled_splice(golden, checkpoint):
    """What the authors write back at each layer: the shared SAE on that layer, un-standardised."""
    sae = load(checkpoint, "sum.hard.topk")
    z, mean, std = standardize(golden["hidden"])
    written = sae.decode(sae.encode_routed(z)) * std + mean
    for i in range(len(LAYERS)):
        close(written[..., i, :], golden[f"splice.layer{i}"])


def test_the_weights_and_the_metadata(golden, checkpoint):
    sae = from_authors_checkpoint(checkpoint, layers=[3, 4, 6, 7, 9], k=6, model_name="some/model")
    assert torch.equal(sae.W_router, golden["w.router.weight"])
    assert torch.equal(sae.W_enc, golden["w.sae.encoder.weight"].T)
    assert torch.equal(sae.W_dec, golden["w.sae.decoder.weight"].T)
    assert torch.equal(sae.b_enc, golden["w.sae.latent_bias"])
    assert torch.equal(sae.b_dec, golden["w.sae.pre_bias"])
    assert sae.cfg.metadata.hook_name == "blocks.9.hook_resid_post_stack_3to4_6to7_9"
    assert sae.cfg.metadata.model_name == "some/model"


@pytest.mark.parametrize("case", ["mean.soft.topk", "sum.hard.theta"])
def test_an_imported_sae_survives_the_disk(golden, checkpoint, tmp_path, case):
    sae = load(checkpoint, case)
    sae.save_model(tmp_path)
    loaded = RouteSAE.load_from_disk(tmp_path)
    stack = golden["hidden"].flatten(-2)
    assert torch.equal(loaded.encode(stack), sae.encode(stack)) and torch.equal(loaded(stack), sae(stack))
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()


# --- Refusals ----------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "checkpoint.pt"
    torch.save({"router.weight": torch.zeros(5, 4), "sae.pre_bias": Malicious(marker)}, path)
    with pytest.raises(ValueError, match=r"no file of plain tensors .*nothing in it was run"):
        from_authors_checkpoint(path, layers=LAYERS, k=2)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the file does what it says where it is let


@pytest.fixture
def state(checkpoint) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)


def refuse(tmp_path: Path, state: Any, match: str) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=match):
        from_authors_checkpoint(tmp_path / "x.pt", layers=LAYERS, k=2)


def test_wrong_keys(tmp_path, state):
    refuse(tmp_path, {k: v for k, v in state.items() if k != "router.weight"}, "no RouteSAE checkpoint")
    refuse(tmp_path, state | {"extra": torch.zeros(1)}, "extra")
    refuse(tmp_path, {"model": state}, r"found \{'model'\}")
    refuse(tmp_path, [state], "found list")


def test_wrong_values(tmp_path, state):
    refuse(tmp_path, state | {"router.weight": 3}, "no RouteSAE checkpoint")
    refuse(tmp_path, state | {"sae.decoder.weight": state["sae.encoder.weight"]}, "sae.decoder.weight")
    refuse(tmp_path, state | {"sae.latent_bias": state["sae.pre_bias"]}, "sae.latent_bias")
    refuse(tmp_path, state | {"router.weight": state["router.weight"][0]}, "router.weight")


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"layers": [1, 2, 3], "k": 2}, "routes 5 layers, but layers lists 3"),
        ({"layers": [1, 2, 3, 5, 4], "k": 2}, "strictly increasing"),
        ({"layers": LAYERS}, "exactly one of k and theta"),
        ({"layers": LAYERS, "k": 2, "theta": 0.4}, "exactly one of k and theta"),
        ({"layers": LAYERS, "theta": -1.0}, "theta must be positive"),
        ({"layers": LAYERS, "k": 97}, "k must be between 1 and d_sae = 96"),
        ({"layers": LAYERS, "k": 2, "aggregator": "attention"}, "aggregator 'sum' or 'mean'"),
        ({"layers": LAYERS, "k": 2, "routing": "random"}, "routing 'hard' or 'soft'"),
    ],
)
def test_wrong_arguments(checkpoint, kwargs, match):
    with pytest.raises(ValueError, match=match):
        from_authors_checkpoint(checkpoint, **kwargs)
