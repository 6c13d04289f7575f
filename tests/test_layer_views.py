"""Layer views: ordinary SAELens SAEs of single layers, on disk without this package, and what they differ in."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import TOKENS
from conftest import ROOT
from routed_saes import D_MODEL, LAYERS, make, randomize
from sae_lens import SAE, ActivationsStore, GatedSAE, JumpReLUSAE, StandardSAE, TopKSAE
from safetensors.torch import load_file, save_file

from routesae_lens.analysis.view_differences import compare_views
from routesae_lens.hook_points import layer_hook_name, split_layers
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.splice.replace import reconstruct

STOCK: dict[str, type[SAE[Any]]] = {
    "topk": TopKSAE,
    "batchtopk": JumpReLUSAE,
    "matryoshka_batchtopk": JumpReLUSAE,
    "jumprelu": JumpReLUSAE,
    "gated": GatedSAE,
    "standard": StandardSAE,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "raw": {"standardize": False},
    "scaled": {"layer_scale": True},
    "scaled raw": {"layer_scale": True, "standardize": False},
}


def route_sae(architecture: str = "topk", **kwargs: Any) -> RouteSAE:
    """In float64, where equal means equal."""
    sae: Any = inference_form(make(architecture, **kwargs)).to(torch.float64)
    if sae.cfg.layer_scale:
        sae.router_log_scale.data = torch.tensor([-0.7, 0.0, 1.1], dtype=torch.float64)
    return sae


def activations(*shape: int) -> torch.Tensor:
    """As a stream has them: far from mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(5)
    return 40 * torch.randn(*shape, D_MODEL, generator=generator, dtype=torch.float64) + 7


def by_hand(sae: RouteSAE, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and reconstruction at one layer for p = 1, by this package's own standardisation."""
    factor = sae.router_log_scale[sae.layers.index(layer)].exp() if sae.cfg.layer_scale else torch.ones(())
    z = standardize(x).x if sae.cfg.standardize else x
    return sae.encode_routed(z * factor), reconstruct(sae, x, factor.expand(x.shape[:-1]).to(x.dtype))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("architecture", STOCK)
def test_a_view_is_the_shared_sae_on_raw_activations(architecture: str, options: str):
    sae = route_sae(architecture, **OPTIONS[options])
    x = activations(3, 4)
    for layer in LAYERS:
        view = sae.layer_view(layer)
        assert type(view) is STOCK[architecture] and not view.training
        assert view.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
        assert view.cfg.d_in == D_MODEL
        latents, out = by_hand(sae, layer, x)
        assert latents.any() and not latents.all()
        torch.testing.assert_close(view.encode(x), latents, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(view(x), out, rtol=1e-6, atol=1e-4)
        # Without the standardisation nothing is left that could differ by more than rounding.
        if not sae.cfg.standardize:
            torch.testing.assert_close(view.encode(x), latents, rtol=1e-12, atol=1e-12)


def test_topk_that_counts_decoder_norms_keeps_its_latents_with_a_layer_scale():
    for options in ({}, {"layer_scale": True}):
        sae = route_sae(rescale_acts_by_decoder_norm=True, standardize=False, **options)
        with torch.no_grad():  # norms of 0.5 to 3: those that training saves are 1
            sae.W_dec.mul_(torch.linspace(0.5, 3, len(sae.W_dec))[:, None])
        for layer in LAYERS:
            latents, out = by_hand(sae, layer, activations(20))
            view = sae.layer_view(layer)
            torch.testing.assert_close(view.encode(activations(20)), latents)
            torch.testing.assert_close(view(activations(20)), out)


def test_the_epsilons_differ_by_what_the_docstring_says():
    sae = route_sae("standard")
    view = sae.layer_view(LAYERS[0])
    x = activations(50) / 400  # standard deviations around 0.1
    ours, theirs = standardize(x), view.run_time_activation_norm_fn_in(x)
    s = x.std(-1, keepdim=True)
    torch.testing.assert_close(theirs, ours.x * (s + 1e-6) / (s + 1e-5), rtol=1e-12, atol=0)
    assert ((1 - theirs / ours.x) * s - 9e-6).abs().max() < 1e-8
    back = view.run_time_activation_norm_fn_out(ours.x)  # SAELens undoes s without any epsilon
    torch.testing.assert_close(back - ours.mean, (x - ours.mean) * s / (s + 1e-6), rtol=1e-9, atol=1e-12)


def test_views_share_the_parameters_and_nothing_of_the_router():
    sae = route_sae("jumprelu")
    view = sae.layer_view(3)
    assert set(dict(view.named_parameters())) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
    for name, parameter in view.named_parameters():
        assert parameter is sae.get_parameter(name)
    before = view(activations(5))
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert not torch.allclose(view(activations(5)), before)
    view(activations(5)).sum().backward()
    assert sae.W_dec.grad is not None


def test_a_new_view_follows_to_and_loading():
    sae = route_sae()
    view = sae.layer_view(3)
    sae.to(torch.float32)
    assert view.W_dec.dtype == torch.float32 and view.dtype == torch.float64  # as documented
    assert sae.layer_view(3).dtype == torch.float32
    sae.layer_view(3).encode(activations(2))
    other = randomize(route_sae(seed=1)).to(torch.float32)
    sae.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(sae.layer_view(3).W_dec, other.W_dec) and not torch.equal(view.W_dec, other.W_dec)


def test_with_a_layer_scale_the_route_sae_is_left_alone():
    sae = route_sae(layer_scale=True)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    view = sae.layer_view(4)
    assert view.W_enc is not sae.W_enc
    assert view.cfg.normalize_activations == "layer_norm"
    assert view.cfg.metadata.layer_view["layer_scale"] == pytest.approx(math.exp(1.1))
    with torch.no_grad():
        view.W_dec.zero_()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_a_stock_class_cannot_be_is_refused(tmp_path: Path):
    signed = route_sae(relu=False)
    with pytest.raises(ValueError, match=r"relu=False.*TopKSAE"):
        signed.layer_view(3)
    with pytest.raises(ValueError, match="relu=False"):
        signed.save_layer_views(tmp_path / "views")
    assert list(tmp_path.iterdir()) == []
    for layer in (2, -1, True):
        with pytest.raises(ValueError, match=r"not among the routed blocks \[1, 3, 4\]"):
            route_sae().layer_view(layer)


def test_metadata_says_what_a_view_stands_for():
    sae = route_sae(routing="distilled")
    sae.cfg.metadata.model_class_name = "AutoModelForCausalLM"
    sae.cfg.metadata.context_size = 77
    metadata = sae.layer_view(3).cfg.metadata
    said = metadata.layer_view
    assert (said["layer"], said["layers"], said["routing"], said["p"]) == (3, LAYERS, "distilled", 1.0)
    assert said["tokens"] == "every token" and "without its router" in said["note"]
    assert metadata.context_size == 77
    assert metadata.model_class_name == "HookedTransformer"  # whose hook is named
    assert (
        sae.cfg.metadata.model_class_name == "AutoModelForCausalLM" and "layer_view" not in sae.cfg.metadata
    )
    other = sae.layer_view(3, hook_name="model.layers.3").cfg.metadata
    assert (other.hook_name, other.model_class_name) == ("model.layers.3", "AutoModelForCausalLM")


READER = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "routesae_lens":
            raise ImportError("this process has never heard of " + name)
sys.meta_path.insert(0, Refuse())
from sae_lens import SAE
from safetensors.torch import load_file
import torch
for folder, expected in json.loads(sys.argv[1]):
    sae = SAE.load_from_disk(folder)
    want = load_file(expected)
    assert type(sae).__module__.startswith("sae_lens."), type(sae)
    torch.testing.assert_close(sae.encode(want["x"]), want["latents"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae(want["x"]), want["out"], rtol=1e-12, atol=1e-12)
    print(sae.cfg.architecture(), sae.cfg.metadata.hook_name, sae.cfg.metadata.layer_view["p"])
assert not any(name.startswith("routesae_lens") for name in sys.modules)
"""


def test_saved_views_load_where_this_package_is_unknown(tmp_path: Path):
    jobs, printed = [], []
    for architecture in STOCK:
        sae = route_sae(architecture, layer_scale=True)
        folders = sae.save_layer_views(tmp_path / architecture, layers=[1, 4])
        assert sorted(folders) == [1, 4]
        for layer, folder in folders.items():
            view, x = sae.layer_view(layer), activations(6)
            expected = tmp_path / f"{architecture}-{layer}.safetensors"
            save_file({"x": x, "latents": view.encode(x).detach(), "out": view(x).detach()}, expected)
            jobs.append((str(folder), str(expected)))
            printed.append(f"{view.cfg.architecture()} blocks.{layer}.hook_resid_post 1.0")
    run = subprocess.run([sys.executable, "-c", READER, json.dumps(jobs)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[:-1] == printed


def test_saving_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sae = route_sae()
    path = tmp_path / "deep" / "views"
    stock, calls = TopKSAE.save_model, []

    def fails_second(view: Any, folder: Any) -> Any:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError("disk full")
        return stock(view, folder)

    monkeypatch.setattr(TopKSAE, "save_model", fails_second)
    with pytest.raises(OSError, match="disk full"):
        sae.save_layer_views(path)
    assert list(path.parent.iterdir()) == []
    monkeypatch.undo()

    assert list(sae.save_layer_views(path, [3])) == [3]
    more = sae.save_layer_views(path, [1, 4])  # beside what is there
    assert sorted(f.name for f in path.iterdir()) == [f"blocks.{i}.hook_resid_post" for i in LAYERS]
    assert all((folder / "sae_weights.safetensors").is_file() for folder in more.values())
    assert list(path.parent.iterdir()) == [path]
    before = (more[4] / "sae_weights.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"already there, and not overwritten: .*blocks\.4\.hook_resid_post"):
        sae.save_layer_views(path, [4])
    assert (more[4] / "sae_weights.safetensors").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        sae.save_layer_views(tmp_path / "file")


def routed_for(model: Any, **kwargs: Any) -> RouteSAE:
    """A RouteSAE that fits the tiny models (d_model 32)."""
    trained = make(**({"architecture": "topk", "d_in": 3 * 32, "d_sae": 64, "k": 6} | kwargs))
    return inference_form(trained)  # type: ignore[return-value]


def test_sae_lens_runs_a_view_like_any_sae(model: Any):
    sae = routed_for(model)
    view = sae.layer_view(3)
    clean, cache = model.run_with_cache(TOKENS)
    spliced, seen = model.run_with_cache_with_saes(TOKENS, saes=[view])
    x = cache[layer_hook_name(model, 3)]
    name = next(name for name in seen if name.endswith("hook_sae_acts_post"))
    torch.testing.assert_close(seen[name], view.encode(x))
    torch.testing.assert_close(seen[name], sae.encode_routed(standardize(x).x), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(clean, spliced)


def test_sae_lens_activation_store_reads_a_view(tiny_hooked: Any):
    from datasets import Dataset

    view = routed_for(tiny_hooked).layer_view(3)
    view.cfg.metadata.context_size = 8
    view.cfg.metadata.prepend_bos = False
    data = Dataset.from_dict({"tokens": torch.randint(3, 60, (40, 8)).tolist()})
    store = ActivationsStore.from_sae(tiny_hooked, view, dataset=data, streaming=False)
    assert store.get_activations(store.get_batch_tokens(2)).shape[-1] == 32


def test_the_export_recipe(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import runpy

    import routesae_lens

    monkeypatch.setattr(routesae_lens, "compare_views", compare_views, raising=False)
    recipe = runpy.run_path(str(ROOT / "recipes" / "export_layer_views.py"))
    saved = {"inference": routed_for(None), "checkpoint": make("topk", d_in=3 * 32, d_sae=64, k=6)}
    for name, sae in saved.items():
        sae.save_model(tmp_path / name)
        output = tmp_path / f"views of {name}"
        recipe["main"](
            tmp_path / name,
            output,
            layers="3:4",
            model=str(tiny_llama_dir),
            dataset="demo",
            sequences=3,
            context_size=16,
        )
        views = sorted(folder.name for folder in (output / "views").iterdir())
        assert views == ["blocks.3.hook_resid_post", "blocks.4.hook_resid_post"]
        assert load_file(output / "tokens.safetensors")["tokens"].shape == (3, 16)
        differences = json.loads((output / "differences.json").read_text())
        assert [one["layer"] for one in differences] == [3, 4] and differences[0]["tokens"] > 0
        assert json.loads((output / "about.json").read_text())["model"] == str(tiny_llama_dir)
    with pytest.raises(Exception, match="exists"):
        recipe["main"](tmp_path / "inference", tmp_path, model=str(tiny_llama_dir))


# --- What views differ in ------------------------------------------------------------------------------------


def naive(sae: RouteSAE, model: Any, layer: int, p_known: bool) -> dict[str, float]:
    """Token by token, from the definitions."""
    point = sae.mount(model)
    stack = model.run_with_cache(TOKENS, names_filter=[point])[1][point]
    route, view, index = sae.route(stack), sae.layer_view(layer), sae.layers.index(layer)
    sums: dict[str, list[float]] = {}

    def note(name: str, value: Any) -> None:
        sums.setdefault(name, []).append(float(value))

    for row, col in [(r, c) for r in range(TOKENS.shape[0]) for c in range(1, TOKENS.shape[1])]:
        x = split_layers(stack, 3)[row, col, index].double()
        z = (x - x.mean()) / x.std()
        here = bool(route.layer[row, col] == index)
        latents = view.encode(x.float()[None])[0].double()
        out = view(x.float()[None])[0].double()
        z_hat = (out - x.mean()) / x.std()
        error = ((z - z_hat) ** 2).sum() / (z**2).sum()
        note("share_elsewhere", not here)
        if not here:
            note("l0_elsewhere", (latents != 0).sum())
            note("norm_mse_elsewhere", error)
            continue
        p = route.probs[row, col, index].double() if p_known else torch.ones((), dtype=torch.float64)
        own = sae.encode_routed((z * p).float()[None])[0].double()
        mine = sae.decode(own.float()[None])[0].double() / p
        both = ((own != 0) & (latents != 0)).sum() / ((own != 0) | (latents != 0)).sum()
        note("mean_p", p)
        note("cosine", (own @ latents) / (own.norm() * latents.norm()))
        note("same_latents", both)
        note("l0_routed", (own != 0).sum())
        note("l0_view", (latents != 0).sum())
        note("norm_mse_routed", ((z - mine) ** 2).sum() / (z**2).sum())
        note("norm_mse_view", error)
        note("reconstruction_difference", ((mine - z_hat) ** 2).sum() / (z**2).sum())
        note("max_difference", (own / p - latents).abs().max())
    means = {name: sum(values) / len(values) for name, values in sums.items()}
    return means | {"max_difference": max(sums["max_difference"]), "cosine_min": min(sums["cosine"])}


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_the_comparison_counts_what_it_says(tiny_hooked: Any, architecture: str):
    options = {"k": 6} if architecture == "topk" else {"jumprelu_init_threshold": 0.05}
    torch.manual_seed(0)
    trained = make(architecture, d_in=3 * 32, d_sae=64, **options)
    with torch.no_grad():
        trained.W_router.mul_(0.05)  # p between 0.4 and 0.9, and every layer is chosen
    sae: Any = inference_form(trained)
    got = {one.layer: one.to_dict() for one in compare_views(sae, tiny_hooked, TOKENS, progress=False)}
    assert sum(one["tokens_here"] for one in got.values()) == got[1]["tokens"] == TOKENS[:, 1:].numel()
    compared = 0
    for layer in sae.layers:
        if not got[layer]["tokens_here"]:
            continue
        compared += 1
        for name, value in naive(sae, tiny_hooked, layer, p_known=True).items():
            # (float32 latents, and an epsilon of 1e-5 or none beside a deviation around 1)
            assert got[layer][name] == pytest.approx(value, rel=1e-3, abs=2e-4), (layer, name)
        assert got[layer]["mean_p"] < 0.95 and got[layer]["max_difference"] > 0.01
    assert compared >= 2


def test_where_p_is_one_only_the_epsilon_is_left(tiny_hooked: Any):
    sae = routed_for(tiny_hooked, routing="distilled", layer_scale=True)
    sae.router_log_scale.data = torch.tensor([-0.7, 0.2, 1.1])
    for one in compare_views(sae, tiny_hooked, TOKENS, progress=False, batch_size=1):
        if one.tokens_here:
            assert one.mean_p == pytest.approx(1, abs=1e-6)
            assert one.cosine > 1 - 1e-6 and one.same_latents == 1
            assert one.max_difference < 1e-2 and one.reconstruction_difference < 1e-6


def test_an_mlsae_reads_every_token_everywhere(tiny_hooked: Any):
    sae = routed_for(tiny_hooked, routing="every")
    for one in compare_views(sae, tiny_hooked, TOKENS, [1, 4], progress=False):
        assert one.share_elsewhere == 0 and one.norm_mse_elsewhere is None
        assert one.tokens_here == one.tokens and one.cosine > 1 - 1e-6


def test_a_layer_that_no_token_reaches(tiny_hooked: Any):
    sae = routed_for(tiny_hooked, routing="fixed")
    first, _, last = compare_views(sae, tiny_hooked, TOKENS, progress=False)
    assert (first.share_elsewhere, first.cosine, first.max_difference) == (1.0, None, None)
    assert first.norm_mse_elsewhere > 0 and last.share_elsewhere == 0
    with pytest.raises(ValueError, match="not among the routed blocks"):
        compare_views(sae, tiny_hooked, TOKENS, [2], progress=False)
    with pytest.raises(ValueError, match="expected an inference RouteSAE, got RouteTopKTrainingSAE"):
        compare_views(make("topk"), tiny_hooked, TOKENS)
