"""The splice: what it writes, the latents that hooks see, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import TopKSAE
from safetensors.torch import load_file
from spliced import (
    ARCHITECTURES,
    D_MODEL,
    D_SAE,
    TOKENS,
    acts_name,
    make_sae,
    two_passes,
)

from routesae_lens.hook_points import layer_hook_name
from routesae_lens.saes.authors import from_authors_checkpoint
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
from routesae_lens.splice.replace import reconstruct, splice_hooks

# --- What is written ---------------------------------------------------------------------------------


def test_the_splice_by_hand(model: Any):
    """Hard routing with every step of the arithmetic written out."""
    sae = make_sae()
    clean = {}

    def catch(layer: int) -> Any:
        return lambda x, hook: clean.__setitem__(layer, x)

    names = {layer: layer_hook_name(model, layer) for layer in sae.layers}
    model.run_with_hooks(TOKENS, fwd_hooks=[(names[i], catch(i)) for i in sae.layers])
    z = torch.stack([clean[i] for i in sae.layers], dim=2)
    z = (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-6)
    p, chosen = torch.softmax(z.sum(2) @ sae.W_router.T, -1).max(-1)

    def replace(index: int) -> Any:
        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
            pre = ((x - mean) / std * p[..., None] - sae.b_dec) @ sae.W_enc + sae.b_enc
            top = pre.topk(6)
            latents = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
            y = (latents @ sae.W_dec + sae.b_dec) / p[..., None] * std + mean
            return torch.where((chosen == index)[..., None], y, x)

        return hook

    expected = model.run_with_hooks(
        TOKENS, fwd_hooks=[(names[i], replace(n)) for n, i in enumerate(sae.layers)]
    )
    assert len(chosen.unique()) > 1
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=sae), expected, rtol=0, atol=1e-5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.sets(st.integers(0, 5), min_size=1, max_size=4).map(lambda s: tuple(sorted(s))),
    architecture=st.sampled_from(sorted(ARCHITECTURES)),
    routing=st.sampled_from(["hard", "soft", "random", "fixed", "straight_through"]),
    aggregator=st.sampled_from(["sum", "mean", "attention"]),
    standardize=st.booleans(),
    scale_by_p=st.booleans(),
)
def test_the_splice_equals_two_passes_with_hooks(
    hooked: HookedRouteSAETransformer,
    layers: tuple[int, ...],
    architecture: str,
    scale_by_p: bool,
    **fields: Any,
):
    sae = make_sae(layers, architecture, **fields)
    expected = two_passes(hooked, sae, scale_by_p=scale_by_p)
    logits = hooked.run_with_saes(TOKENS, saes=sae, scale_by_p=scale_by_p)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    [route] = hooked.last_routes.values()
    assert torch.equal(route.layer, expected.route.layer)
    assert not torch.allclose(logits, hooked(TOKENS), atol=1e-3)


@pytest.mark.parametrize("site", ["hook_resid_post", "hook_resid_pre", "hook_mlp_out"])
def test_both_models_equal_two_passes_with_hooks_at_every_site(model: Any, site: str):
    sae = make_sae(site=site)
    expected = two_passes(model, sae)
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae]), expected.logits, rtol=0, atol=1e-5)


def test_unscaled_is_the_authors_splice(model: Any):
    sae = make_sae()
    scaled, unscaled = (model.run_with_saes(TOKENS, saes=sae, scale_by_p=by_p) for by_p in (True, False))
    torch.testing.assert_close(unscaled, two_passes(model, sae, scale_by_p=False).logits, rtol=0, atol=1e-5)
    assert not torch.allclose(scaled, unscaled, atol=1e-3)


@pytest.mark.parametrize("layers", [[2], [1, 4]])
@pytest.mark.parametrize("scale_by_p", [True, False])
def test_splice_layers_replace_every_token_whatever_its_route(
    model: Any, layers: list[int], scale_by_p: bool
):
    sae = make_sae()
    route = two_passes(model, sae).route
    scale = route.scale if scale_by_p else torch.ones_like(route.scale)
    hooks = [(layer_hook_name(model, i), lambda x, hook: reconstruct(sae, x, scale)) for i in layers]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    logits, cache = model.run_with_cache_with_saes(
        TOKENS, saes=sae, splice_layers=layers, scale_by_p=scale_by_p
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert [i for i in sae.layers if acts_name(model, sae, i) in cache] == layers
    assert all((cache[acts_name(model, sae, i)].abs().sum(-1) > 0).all() for i in layers)
    clean = model.run_with_saes(TOKENS, saes=sae, splice_layers=layers, use_error_term=True)
    torch.testing.assert_close(clean, model(TOKENS), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"does not read: \[3\]; it reads \[1, 2, 4\]"):
        model.add_sae(sae, splice_layers=[2, 3])


def test_the_authors_reference_numbers(shared: Any):
    folder = shared / "golden" / "routesaes"
    golden = load_file(folder / "tensors.safetensors")
    sae = from_authors_checkpoint(folder / "routesae_checkpoint.pt", layers=[1, 2, 3, 4, 5], k=6)
    hidden = golden["hidden"]
    assert hidden.shape[2] == 5
    for i in range(5):
        x = hidden[..., i, :]
        written = reconstruct(sae, x, torch.ones(x.shape[:-1]))
        torch.testing.assert_close(written, golden[f"splice.layer{i}"], rtol=0, atol=1e-4)


def test_an_imported_checkpoint_keeps_negative_latents_in_the_splice(hooked: HookedRouteSAETransformer):
    sae = make_sae(relu=False, k=D_SAE)
    _, cache = hooked.run_with_cache_with_saes(TOKENS, saes=sae)
    assert min(cache[acts_name(hooked, sae, layer)].min() for layer in sae.layers) < 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_with_the_error_term_the_logits_are_clean(model: Any, architecture: str):
    sae = make_sae(architecture=architecture)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
    torch.testing.assert_close(logits, model(TOKENS), rtol=0, atol=1e-4)
    [route] = model.last_routes.values()
    for index, layer in enumerate(sae.layers):
        error = cache[acts_name(model, sae, layer).replace("acts_post", "error")]
        assert torch.equal(error.abs().sum(-1) > 0, route.layer == index)


def test_an_sae_of_another_dtype_than_the_model(hooked: HookedRouteSAETransformer):
    sae = make_sae().to(torch.float64)
    logits = hooked.run_with_saes(TOKENS, saes=sae)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hooked.run_with_saes(TOKENS, saes=make_sae()), rtol=0, atol=1e-3)
    hooked.add_sae(sae)
    sae.to(torch.float32)  # its views must notice
    torch.testing.assert_close(hooked(TOKENS), logits, rtol=0, atol=1e-3)


# --- Latents -----------------------------------------------------------------------------------------


def test_latents_are_zero_elsewhere_and_the_saes_own_where_routed(model: Any):
    sae = make_sae()
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    [route] = model.last_routes.values()
    assert len(route.layer.unique()) > 1
    for index, layer in enumerate(sae.layers):
        here = route.layer == index
        latents = cache[acts_name(model, sae, layer)]
        assert latents.shape == (*TOKENS.shape, D_SAE)
        assert torch.equal(latents.abs().sum(-1) > 0, here)
        assert cache[acts_name(model, sae, layer).replace("acts_post", "input")].shape == (
            *TOKENS.shape,
            D_MODEL,
        )
    # Below the first routed layer both passes see the same stream, so there latents are those of encode.
    first = route.layer == 0
    expected = sae.encode_routed(route.input)[first]
    assert first.any()
    torch.testing.assert_close(
        cache[acts_name(model, sae, sae.layers[0])][first], expected, rtol=0, atol=1e-5
    )


def test_the_name_of_the_latents_is_the_one_saelens_gives(bridge: RouteSAETransformerBridge):
    bridge.add_sae(make_sae((1, 3)))
    view = bridge.acts_to_saes["blocks.3.hook_resid_post"]
    assert bridge.get_sae_hook_name(view) == "blocks.3.hook_out.hook_sae_acts_post"
    assert bridge.get_sae_hook_name(view) in bridge.hook_dict


def test_a_layer_without_tokens_shows_zeros(model: Any):
    sae = make_sae(routing="fixed", fixed_layer=2)
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    for layer in sae.layers:
        latents = cache[acts_name(model, sae, layer)]
        assert latents.shape == (*TOKENS.shape, D_SAE)
        assert bool(latents.any()) == (layer == 2)


def test_only_routed_tokens_are_encoded(model: Any, monkeypatch: pytest.MonkeyPatch):
    encoded = []
    encode = TopKSAE.encode
    monkeypatch.setattr(TopKSAE, "encode", lambda self, x: (encoded.append(len(x)), encode(self, x))[1])
    model.run_with_saes(TOKENS, saes=make_sae())
    [route] = model.last_routes.values()
    assert encoded == [int((route.layer == index).sum()) for index in range(3)]


def test_editing_a_latent_changes_only_what_that_token_writes(model: Any):
    sae = make_sae((2,))
    batch, pos, latent = 1, 4, 7
    outputs = []

    def edit(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        assert acts.shape == (*TOKENS.shape, D_SAE)
        acts = acts.clone()
        acts[batch, pos, latent] = 3.0
        return acts

    with model.saes(sae):
        name = acts_name(model, sae, 2)
        out = name.replace("acts_post", "output")
        _, cache = model.run_with_cache(TOKENS, names_filter=[name, out])
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, edit), (out, lambda x, hook: outputs.append(x))])
    difference = outputs[0] - cache[out]
    [route] = model.last_routes.values()
    mean_std = std_of_layer(model, 2)[batch, pos]
    expected = (
        (3.0 - cache[name][batch, pos, latent]) * sae.W_dec[latent] / route.scale[batch, pos] * mean_std
    )
    torch.testing.assert_close(difference[batch, pos], expected, rtol=1e-4, atol=1e-4)
    difference[batch, pos] = 0
    assert difference.abs().max() == 0


def std_of_layer(model: Any, layer: int) -> torch.Tensor:
    name = layer_hook_name(model, layer)
    _, cache = model.run_with_cache(TOKENS, names_filter=name)
    return cache[name].std(-1, keepdim=True) + 1e-6


def test_the_error_term_does_not_undo_an_intervention(model: Any):
    sae = make_sae((2,))
    name = acts_name(model, sae, 2)
    outputs = []
    fired = []

    def ablate(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.append(acts)
        return acts * 0

    def catch(x: torch.Tensor, hook: Any) -> None:
        outputs.append(x)

    _, clean = model.run_with_cache(TOKENS, names_filter=layer_hook_name(model, 2))
    with model.saes(sae, use_error_term=True):
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, ablate), (name.replace("acts_post", "output"), catch)])
    [route] = model.last_routes.values()
    [latents] = fired
    lost = latents @ sae.W_dec / route.scale[..., None] * std_of_layer(model, 2)
    stream = clean[layer_hook_name(model, 2)]
    assert lost.abs().max() > 0.1
    torch.testing.assert_close(outputs[0], stream - lost, rtol=1e-4, atol=1e-4)


def test_editing_latents_of_tokens_routed_elsewhere_does_nothing(model: Any):
    sae = make_sae()
    with model.saes(sae):
        logits = model(TOKENS)
        [route] = model.last_routes.values()

        def edit(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            return torch.where((route.layer == 1)[..., None], acts, 5.0)

        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(acts_name(model, sae, 2), edit)])
    torch.testing.assert_close(edited, logits, rtol=0, atol=0)


def test_hooks_on_latents_fire_once_per_pass(model: Any):
    sae = make_sae()
    calls: list[str] = []
    names = [acts_name(model, sae, layer) for layer in sae.layers]
    hooks = [(name, lambda x, hook: calls.append(hook.name)) for name in names]
    model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=hooks)
    assert calls == names


# --- Gradients ---------------------------------------------------------------------------------------


def test_gradients_flow_through_the_splice_and_routes_are_constants(model: Any):
    sae = make_sae()
    first = layer_hook_name(model, 0)
    leaf: list[torch.Tensor] = []
    latents: list[torch.Tensor] = []

    def cut(x: torch.Tensor, hook: Any) -> torch.Tensor:
        leaf.append(x.detach().requires_grad_())
        return leaf[-1]

    def catch(x: torch.Tensor, hook: Any) -> None:
        x.retain_grad()
        latents.append(x)

    hooks = [(first, cut)] + [(acts_name(model, sae, layer), catch) for layer in sae.layers]
    logits = model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=hooks)
    logits.square().sum().backward()
    # Block 0 runs once for both passes, but on the bridge, which shares nothing while gradients are on.
    assert len(latents) == 3 and len(leaf) == (1 if isinstance(model, HookedRouteSAETransformer) else 2)
    routes = model.last_routes.copy()
    for index, acts in enumerate(latents):
        grad = acts.grad
        assert grad is not None
        [route] = routes.values()
        assert torch.equal(grad.abs().sum(-1) > 0, route.layer == index)
    assert all(x.grad is None for x in leaf[:-1])  # of the routing pass
    got = leaf[-1].grad
    assert got is not None and got.abs().max() > 0
    assert sae.W_router.grad is None and sae.W_dec.grad is not None
    assert not any(field.requires_grad for route in routes.values() for field in route)

    # The same gradient as with the routes given as plain numbers.
    leaf.clear()
    [route] = routes.values()
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    again = model.run_with_hooks(TOKENS, fwd_hooks=[(first, cut), *splice_hooks(sae, model, route, keep)])
    again.square().sum().backward()
    torch.testing.assert_close(got, leaf[0].grad, rtol=1e-4, atol=1e-4)


def test_gradients_are_the_same_with_and_without_a_shared_prefix(model: Any):
    sae = make_sae()
    gradients = []
    for share in (True, False):
        model.share_prefix = share
        model.zero_grad()
        model.run_with_saes(TOKENS, saes=sae).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 10
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-3)
