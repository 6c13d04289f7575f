"""The two recipes about routers, on a tiny sweep."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from recipe_modules import recipe
from safetensors.torch import load_file, save_file

import routesae_lens as rl

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct", "ignore:the data holds", "ignore:end of")
LAYERS = (1, 2, 4)


def documents(seed: int, n: int) -> list[str]:
    """Words of random letters: no passage of one document is in another."""
    letters = random.Random(seed)
    return [" ".join("".join(letters.choices("abcdefghijklmnop", k=5)) for _ in range(20)) for _ in range(n)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in documents(0, 60)))
    return path


@pytest.fixture(scope="module")
def runs(tiny_llama_dir: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study's folder with two sweeps: with RouteSAEs, and without."""
    study = tmp_path_factory.mktemp("study")
    model = rl.load_model(tiny_llama_dir, device="cpu")
    held_out = rl.held_out_tokens(model, documents(1, 20), n_sequences=12, context_size=16)
    save_file({"tokens": held_out}, study / "held_out.safetensors")
    found = {}
    for name, methods in (("core", ("route", "distilled", "random")), ("other", ("topk",))):
        config = rl.SweepConfig(
            methods=methods, k=(3,), seeds=(0, 1), layers=LAYERS, d_sae=48, training_tokens=64 * 6,
            context_size=16, batch_size=64, lm_batch_size=4, lr=1e-2, held_out_sequences=12,
            options={"route": {"aggregator": "mean", "loss": "mse"}} if name == "core" else {},
        )  # fmt: skip
        rl.sweep(model, config, text, held_out, study / name, progress=False)
        found[name] = study / name
    return found


# --- router_gradients ---------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_trained_route_members_alone(
    runs: dict[str, Path], tiny_llama_dir: Path, text: Path, tmp_path: Path
):
    gradients = recipe("router_gradients")
    written = tmp_path / "gradients.json"
    options = {"model": str(tiny_llama_dir), "dataset": str(text), "tokens": 100, "d_sae": 48, "k": 3}
    gradients.main(run=runs["core"], **options, seeds=1, output=written)
    results = json.loads(written.read_text())["results"]
    after = {way: found for way, found in results.items() if "after training" in way}
    # two seeds of route; the distilled and random ones, which are RouteSAEs as well, are left out
    assert [(way, len(found)) for way, found in after.items()] == [
        ("route-k3 (mean, mse): after training", 2)
    ]
    assert len(results) == len(gradients.WAYS) + 1

    # and the numbers are those of an SAE with this aggregator, loss and router, on the sweep's layers
    model = rl.load_model(tiny_llama_dir, device="cpu")
    stack = gradients.activations(model, list(LAYERS), str(text), 100)
    trained = rl.SweepResult.read(runs["core"]).load("route-k3-seed0")
    x = trained.split(stack)
    p, layer = torch.softmax(x.mean(1) @ trained.W_router.T, -1).max(-1)  # (x is standardised)
    measured = after["route-k3 (mean, mse): after training"][0]
    assert measured["mean_p"] == pytest.approx(p.mean().item(), rel=1e-5)
    assert measured["largest_share"] == pytest.approx(torch.bincount(layer).max().item() / 100)
    assert measured["router"] > 0


def test_gradients_of_a_run_without_routes_are_refused(runs: dict[str, Path], tmp_path: Path):
    main = recipe("router_gradients").main
    with pytest.raises(typer.BadParameter, match="no trained member of method route; it has: topk-k3-seed0"):
        main(run=runs["other"])
    with pytest.raises(typer.BadParameter, match="holds no sweep"):
        main(run=runs["core"] / "training")  # what the recipe used to want, and then found nothing in


# --- router_on_kl -------------------------------------------------------------------------------------------


def on_kl(runs: dict[str, Path], **changes: Any) -> None:
    options = {"run": runs["core"], "k": 3, "test_tokens": 60, "fit_tokens": 300, "ridge": 1.0}
    recipe("router_on_kl").main(**(options | changes))


def test_routers_on_kl_are_kept_by_their_settings(
    runs: dict[str, Path], tiny_llama_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]
):
    given = {"model": str(tiny_llama_dir), "dataset": str(text)}
    on_kl(runs, **given)
    folder = runs["core"] / "router_on_kl"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["random-k3-seed0.json", "random-k3-seed1.json"]
    [first] = json.loads((folder / files[0]).read_text())
    rules = first["rules"]
    # the fitted router and the oracle, from KL and error of every layer by itself
    model = rl.load_model(tiny_llama_dir, device="cpu")
    sae = rl.SweepResult.read(runs["core"]).load("random-k3-seed0")
    tokens = load_file(runs["core"].parent / "held_out.safetensors")["tokens"][:4]
    oracle = rl.evaluate(rl.with_routing(sae, "oracle"), model, tokens, progress=False)
    assert rules["oracle: least error"]["kl"] == pytest.approx(oracle.kl, rel=1e-4)
    assert rules["oracle: least error"]["tokens"] == oracle.tokens
    assert 280 < first["fitted_on_tokens"] <= 300  # (BOS between documents does not count)
    assert set(rules["linear router fitted to KL"]["layer_share"]) == {"1", "2", "4"}

    before = [(folder / name).stat().st_mtime_ns for name in files]
    capsys.readouterr()
    on_kl(runs, **given)
    assert [(folder / name).stat().st_mtime_ns for name in files] == before
    assert "(2 seeds)" in capsys.readouterr().out
    # other settings are measured anew, beside the first; other methods are not in this call's mean
    on_kl(runs, **given, **{"ridge": 5.0})
    records = json.loads((folder / files[0]).read_text())
    assert [one["settings"]["ridge"] for one in records] == [1.0, 5.0] and records[0] == first
    capsys.readouterr()
    on_kl(runs, **given, **{"method": "route"})
    assert "(2 seeds)" in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 4


def test_no_held_out_document_is_fitted_on(runs: dict[str, Path], tiny_llama_dir: Path, tmp_path: Path):
    recipe_ = recipe("router_on_kl")
    tokenizer = rl.load_model(tiny_llama_dir, device="cpu").tokenizer
    held_out = load_file(runs["core"].parent / "held_out.safetensors")["tokens"]
    texts = [*documents(2, 3), "short", documents(1, 1)[0], "Something before. " + documents(1, 2)[1]]
    assert list(recipe_.unseen(texts, tokenizer, held_out)) == texts[:3]
    # only held-out text: refused, and nothing is written
    path = tmp_path / "same.jsonl"
    path.write_text("\n".join(json.dumps({"text": one}) for one in documents(1, 1)))
    with pytest.raises(ValueError, match="the text gives 0 sequences of 16 tokens"):
        on_kl(runs, model=str(tiny_llama_dir), dataset=str(path), output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_default_text_works_and_ends_with_what_was_trained_on():
    found = list(recipe("router_on_kl").fitting_text("demo", 0))
    order = [row["text"] for row in rl.load_text("demo").shuffle(seed=0)]
    assert found == order[::-1] and len(found) > 1000


def test_wrong_options_of_router_on_kl_are_refused(runs: dict[str, Path], tmp_path: Path):
    with pytest.raises(typer.BadParameter, match="has no random with k = 4; it has:"):
        on_kl(runs, k=4)
    with pytest.raises(typer.BadParameter, match=r"--test-tokens must be 1 or more, got 0; --fit-tokens"):
        on_kl(runs, test_tokens=0, fit_tokens=-1)
    with pytest.raises(typer.BadParameter, match=r"expected .*sweep.json"):
        on_kl(runs, run=tmp_path)
