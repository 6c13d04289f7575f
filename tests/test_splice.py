"""The splice: layer views, and the two model classes that carry RouteSAEs."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file

from routesae_lens.hook_points import layer_hook_name, mounted_points, unmount_layers
from routesae_lens.saes.architectures import (
    RouteGatedSAE,
    RouteGatedSAEConfig,
    RouteJumpReLUSAE,
    RouteJumpReLUSAEConfig,
    RouteStandardSAE,
    RouteStandardSAEConfig,
    RouteTopKSAE,
    RouteTopKSAEConfig,
    RouteTopKTrainingSAE,
    RouteTopKTrainingSAEConfig,
)
from routesae_lens.saes.authors import from_authors_checkpoint
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge
from routesae_lens.splice.layer_view import layer_view
from routesae_lens.splice.replace import reconstruct, splice_hooks

D_MODEL, D_SAE = 32, 48
ARCHITECTURES: dict[str, Any] = {
    "topk": (RouteTopKSAE, RouteTopKSAEConfig),
    "jumprelu": (RouteJumpReLUSAE, RouteJumpReLUSAEConfig),
    "gated": (RouteGatedSAE, RouteGatedSAEConfig),
    "standard": (RouteStandardSAE, RouteStandardSAEConfig),
}
TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["hooked", "bridge"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param == "hooked":
        return HookedRouteSAETransformer.from_model(request.getfixturevalue("tiny_hooked"))
    return RouteSAETransformerBridge.from_model(request.getfixturevalue("tiny_bridge"))


@pytest.fixture
def hooked(tiny_hooked: Any) -> HookedRouteSAETransformer:
    return HookedRouteSAETransformer.from_model(tiny_hooked)


@pytest.fixture
def bridge(tiny_bridge: Any) -> RouteSAETransformerBridge:
    return RouteSAETransformerBridge.from_model(tiny_bridge)


def make_sae(
    layers: tuple[int, ...] = (1, 2, 4),
    architecture: str = "topk",
    metadata: dict[str, Any] | None = None,
    **fields: Any,
) -> RouteSAE:
    """A RouteSAE with random weights (biases too) under which tokens really go to different layers."""
    sae_class, config = ARCHITECTURES[architecture]
    if architecture == "topk":
        fields = {"k": 6} | fields
    if fields.get("routing") == "fixed":
        fields = {"fixed_layer": layers[-1]} | fields
    cfg = config(
        d_in=len(layers) * D_MODEL,
        d_sae=D_SAE,
        layers=list(layers),
        metadata=SAEMetadata(**metadata or {}),
        **fields,
    )
    sae = sae_class(cfg)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise.abs() if name == "threshold" else noise)
    return sae


def ordinary_sae(hook_name: str) -> StandardSAE:
    torch.manual_seed(2)
    return StandardSAE(
        StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook_name))
    )


def acts_name(model: Any, sae: RouteSAE, layer: int) -> str:
    return f"{layer_hook_name(model, layer, sae.cfg.site)}.hook_sae_acts_post"


def two_passes(
    model: Any, sae: RouteSAE, tokens: torch.Tensor = TOKENS, keep: Any = None, **options: Any
) -> Any:
    """Routes from a clean pass, then one replacement per layer by ordinary hooks; no splice class involved."""
    assert not model.acts_to_saes
    point = sae.mount(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=point)
        route = sae.route(cache[point])
    unmount_layers(model, point)
    keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
    logits = model.run_with_hooks(tokens, fwd_hooks=splice_hooks(sae, model, route, keep, **options))
    return SimpleNamespace(logits=logits, route=route)


def assert_clean(model: Any, before: dict[str, Any]) -> None:
    """Nothing of any SAE is left on ``model``, and it computes what it did."""
    assert model.acts_to_saes == {} and model.route_saes == {} and mounted_points(model) == []
    assert set(model.hook_dict) == before["hooks"]
    torch.testing.assert_close(model(TOKENS), before["logits"], rtol=0, atol=0)


def state_of(model: Any) -> dict[str, Any]:
    return {"hooks": set(model.hook_dict), "logits": model(TOKENS).detach()}


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
    assert len(latents) == 3 and len(leaf) == 2  # both passes go through layer 0
    routes = model.last_routes.copy()
    for index, acts in enumerate(latents):
        grad = acts.grad
        assert grad is not None
        [route] = routes.values()
        assert torch.equal(grad.abs().sum(-1) > 0, route.layer == index)
    assert leaf[0].grad is None and leaf[1].grad is not None and leaf[1].grad.abs().max() > 0
    assert sae.W_router.grad is None and sae.W_dec.grad is not None
    assert not any(field.requires_grad for route in routes.values() for field in route)

    # The same gradient as with the routes given as plain numbers.
    got = leaf[1].grad
    leaf.clear()
    [route] = routes.values()
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    again = model.run_with_hooks(TOKENS, fwd_hooks=[(first, cut), *splice_hooks(sae, model, route, keep)])
    again.square().sum().backward()
    torch.testing.assert_close(got, leaf[0].grad, rtol=1e-4, atol=1e-4)


# --- Special tokens ----------------------------------------------------------------------------------


def test_special_tokens_and_positions_out_of_training_are_left_alone(model: Any):
    special = [int(TOKENS[0, 3]), int(TOKENS[1, 5])]
    sae = make_sae(metadata={"exclude_special_tokens": special, "seqpos_slice": [1, None]})
    positions = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    keep = ~torch.isin(TOKENS, torch.tensor(special)) & (positions > 0)
    assert 0 < keep.sum() < TOKENS[:, 1:].numel()
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    torch.testing.assert_close(logits, two_passes(model, sae, keep=keep).logits, rtol=0, atol=1e-5)
    active = sum(cache[acts_name(model, sae, layer)].abs().sum(-1) for layer in sae.layers) > 0
    assert torch.equal(active, keep)
    # Given explicitly, it replaces the tokens but not the positions.
    everything = model.run_with_saes(TOKENS, saes=sae, exclude_special_tokens=False)
    torch.testing.assert_close(
        everything, two_passes(model, sae, keep=positions > 0).logits, rtol=0, atol=1e-5
    )


def test_the_tokenizers_special_tokens(bridge: RouteSAETransformerBridge):
    sae = make_sae(metadata={"exclude_special_tokens": True})
    tokens = TOKENS.clone()
    tokens[0, 0] = tokens[1, 4] = bridge.tokenizer.bos_token_id
    keep = tokens != bridge.tokenizer.bos_token_id
    torch.testing.assert_close(
        bridge.run_with_saes(tokens, saes=sae),
        two_passes(bridge, sae, tokens, keep).logits,
        rtol=0,
        atol=1e-5,
    )


def test_text_is_spliced_like_its_tokens(bridge: RouteSAETransformerBridge):
    sae = make_sae(metadata={"exclude_special_tokens": True})
    text = "The quick brown fox"
    tokens = bridge.to_tokens(text)
    assert (tokens == bridge.tokenizer.bos_token_id).any()
    with bridge.saes(sae):
        torch.testing.assert_close(bridge(text), bridge(tokens), rtol=0, atol=0)
        padded = bridge([text, "A sparse autoencoder reads"])
        n = tokens.shape[1]
        torch.testing.assert_close(padded[:1, :n], bridge(tokens), rtol=0, atol=1e-4)


def test_special_tokens_that_cannot_be_told_are_refused(hooked: HookedRouteSAETransformer):
    before = state_of(hooked)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        hooked.add_sae(make_sae(), exclude_special_tokens=True)
    assert_clean(hooked, before)
    special = [int(TOKENS[0, 3])]
    with hooked.saes(make_sae(), exclude_special_tokens=special):
        logits = hooked(TOKENS)
        residual = hooked.input_to_embed(TOKENS)[0]
        with pytest.raises(ValueError, match="embeddings, not token ids"):
            hooked(residual, start_at_layer=0)
        torch.testing.assert_close(hooked(residual, start_at_layer=0, tokens=TOKENS), logits, rtol=0, atol=0)
        with pytest.raises(ValueError, match="expected \\(2, 9\\)"):
            hooked(residual, start_at_layer=0, tokens=TOKENS[:, 1:])


def test_embeddings_on_the_bridge_with_special_tokens_are_refused(bridge: RouteSAETransformerBridge):
    embeddings = torch.randn(1, 5, D_MODEL)
    with bridge.saes(make_sae()):
        assert bridge(embeddings).shape == (1, 5, 128)
    with bridge.saes(make_sae(), exclude_special_tokens=True), pytest.raises(ValueError, match="embeddings"):
        bridge(embeddings)


# --- Beside other things -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_an_ordinary_sae_at_another_layer(model: Any, layer: int):
    sae, other = make_sae((1, 2, 4)), ordinary_sae(f"blocks.{layer}.hook_resid_post")

    def apply(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return other.decode(other.encode(x))

    name = layer_hook_name(model, layer)
    point = sae.mount(model)
    stack = []
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, apply), (point, lambda x, hook: stack.append(x))])
    unmount_layers(model, point)
    route = sae.route(stack[0])
    hooks = [(name, apply), *splice_hooks(sae, model, route, torch.ones_like(TOKENS, dtype=torch.bool))]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    before = state_of(model)
    for saes in ([sae, other], [other, sae]):
        torch.testing.assert_close(model.run_with_saes(TOKENS, saes=saes), expected, rtol=0, atol=1e-5)
    assert_clean(model, before)


def test_two_routesaes_on_different_layers(model: Any):
    low, high = make_sae((0, 2)), make_sae((1, 4), "jumprelu")
    points = [low.mount(model), high.mount(model)]
    _, cache = model.run_with_cache(TOKENS, names_filter=points)
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    hooks = [
        hook
        for sae, point in zip((low, high), points, strict=True)
        for hook in splice_hooks(sae, model, sae.route(cache[point]), keep)
    ]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with model.saes([high, low]):
        assert model.route_saes == {points[0]: low, points[1]: high}
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
        model.reset_saes("blocks.2.hook_resid_post")
        assert model.route_saes == {points[1]: high}
    assert model.route_saes == {} and mounted_points(model) == sorted(points)  # they were there before


def test_user_hooks_on_the_stream_are_seen_by_router_and_splice(model: Any):
    sae = make_sae()
    shift = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3)) * 2

    def steer(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x + shift

    below, routed = layer_hook_name(model, 0), layer_hook_name(model, 2)
    for name in (below, routed):
        with model.hooks(fwd_hooks=[(name, steer)]):
            steered = model(TOKENS)
            expected = two_passes(
                model, sae
            ).logits  # the hook that is there comes before those of the splice
            with model.saes(sae):  # the hook on the layer's own HookPoint stays in force
                torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(model(TOKENS), steered, rtol=0, atol=0)  # and after the splice is gone
        assert not torch.allclose(expected, model.run_with_saes(TOKENS, saes=sae), atol=1e-2)


def test_the_model_keeps_its_parameters_and_only_one_pass_is_added(model: Any):
    sae = make_sae((1, 3))
    parameters = [id(parameter) for parameter in model.parameters()]
    names = set(model.state_dict())
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.blocks)
    ]
    with model.saes(sae):
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert set(model.state_dict()) == names
        assert not {id(p) for p in sae.parameters()} & set(parameters)
        model(TOKENS)
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_run_with_cache_shows_the_spliced_pass(model: Any):
    sae = make_sae((1, 3))
    last = layer_hook_name(model, 5)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
    torch.testing.assert_close(logits, two_passes(model, sae).logits, rtol=0, atol=1e-5)
    out = f"{layer_hook_name(model, 1)}.hook_sae_output"
    _, clean = model.run_with_cache(TOKENS)
    [route] = model.last_routes.values()
    changed = (cache[out] - clean[layer_hook_name(model, 1)]).abs().sum(-1) > 1e-6
    assert torch.equal(changed, route.layer == 0)
    assert not torch.equal(cache[last], clean[last])


# --- Attaching and detaching -------------------------------------------------------------------------


def test_attach_and_reset_by_every_name(model: Any):
    sae = make_sae((1, 3))
    before = state_of(model)
    [point] = [sae.cfg.metadata.hook_name]
    for name in (point, "blocks.1.hook_resid_post", layer_hook_name(model, 3), None):
        model.add_sae(sae)
        assert list(model.acts_to_saes) == ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
        assert not torch.allclose(model(TOKENS), before["logits"], atol=1e-3)
        model.reset_saes(name)
        assert_clean(model, before)
    model.add_sae(sae)
    with pytest.raises(
        ValueError, match=r"no SAE is attached to blocks.0.hook_resid_post; attached: \['blocks.1"
    ):
        model.reset_saes([point, "blocks.0.hook_resid_post"])
    assert model.route_saes == {point: sae}


def test_a_mounted_point_is_left_as_it_was(model: Any):
    sae = make_sae()
    point = sae.mount(model)
    model.run_with_saes(TOKENS, saes=sae)
    assert mounted_points(model) == [point]


def test_views_share_the_parameters(model: Any):
    sae = make_sae()
    model.add_sae(sae)
    for layer in sae.layers:
        view = model.acts_to_saes[f"blocks.{layer}.hook_resid_post"]
        assert type(view) is TopKSAE and view.cfg.d_in == D_MODEL
        assert view.W_dec is sae.W_dec and view.W_enc is sae.W_enc
    logits = model(TOKENS)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert not torch.allclose(model(TOKENS), logits, atol=1e-3)


def test_a_view_works_on_its_own(hooked: HookedRouteSAETransformer):
    sae = make_sae()
    view = layer_view(sae, "blocks.1.hook_resid_post")
    x = torch.randn(3, 4, D_MODEL)
    latents, cache = view.encode(x), view.run_with_cache(x)[1]
    torch.testing.assert_close(latents, sae.encode_routed(x), rtol=0, atol=0)
    torch.testing.assert_close(cache["hook_sae_acts_post"], latents, rtol=0, atol=0)
    assert view.cfg.metadata.hook_name == "blocks.1.hook_resid_post"


class Interrupted(Exception):
    pass


def test_the_model_is_clean_after_an_exception(model: Any):
    sae, other = make_sae(), ordinary_sae("blocks.3.hook_resid_post")
    before = state_of(model)
    with pytest.raises(Interrupted), model.saes([other, sae]):
        model(TOKENS)
        raise Interrupted
    assert_clean(model, before)

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise Interrupted

    for name in (
        layer_hook_name(model, 0),
        layer_hook_name(model, 5),
    ):  # in the routing pass; in the spliced one
        with pytest.raises(Interrupted):
            model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=[(name, fail)])
        assert_clean(model, before)
    with model.saes(sae):
        logits = model(TOKENS)
        with pytest.raises(Interrupted):
            model.run_with_hooks(TOKENS, fwd_hooks=[(acts_name(model, sae, 2), fail)])
        torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_attaching_is_all_or_nothing(model: Any, monkeypatch: pytest.MonkeyPatch):
    before = state_of(model)
    put, calls = type(model)._put, []

    def fail_the_second_time(self: Any, path: str, module: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise Interrupted
        put(self, path, module)

    monkeypatch.setattr(type(model), "_put", fail_the_second_time)
    with pytest.raises(Interrupted):
        model.add_sae(make_sae())
    assert_clean(model, before)


def test_what_cannot_be_attached_is_refused(model: Any):
    before = state_of(model)
    training = RouteTopKTrainingSAE(
        RouteTopKTrainingSAEConfig(d_in=3 * D_MODEL, d_sae=D_SAE, k=6, layers=[1, 2, 4])
    )
    with pytest.raises(TypeError, match=r"inference_form\(sae\)"):
        model.add_sae(training)
    with pytest.raises(ValueError, match="between 0 and 5"):
        model.add_sae(make_sae((4, 6)))
    for name in ("blocks.9.hook_resid_post", "blocks.1.hook_nowhere"):
        with pytest.raises(ValueError, match="no hook"):
            model.add_sae(ordinary_sae(name))
        with pytest.raises(ValueError, match="no hook"), model.saes([make_sae(), ordinary_sae(name)]):
            pass
    with pytest.raises(TypeError, match="scale_by_p"):
        model.add_sae(ordinary_sae("blocks.1.hook_resid_post"), scale_by_p=False)
    assert_clean(model, before)

    sae = make_sae((1, 2, 4))
    model.add_sae(sae)
    logits = model(TOKENS)
    with pytest.raises(ValueError, match="cannot share a layer"):
        model.add_sae(make_sae((0, 4)))
    with pytest.raises(ValueError, match="already attached"):
        model.add_sae(make_sae((1, 2, 4), "gated"))
    for name in ("blocks.2.hook_resid_post", layer_hook_name(model, 2)):
        with pytest.raises(ValueError, match="carries a RouteSAE"), model.saes([ordinary_sae(name)]):
            pass
    with pytest.raises(ValueError, match="read-only copy"):
        model.add_sae(ordinary_sae(sae.cfg.metadata.hook_name))
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)
    model.reset_saes()
    assert_clean(model, before)

    other = ordinary_sae("blocks.2.hook_resid_post")
    model.add_sae(other)
    with pytest.raises(ValueError, match="already carries an SAE"):
        model.add_sae(sae)
    assert model.acts_to_saes == {"blocks.2.hook_resid_post": other} and mounted_points(model) == []
    model.reset_saes("blocks.2.hook_resid_post")
    assert_clean(model, before)


def test_an_ordinary_sae_can_still_leave_special_tokens_out(
    hooked: HookedRouteSAETransformer, bridge: RouteSAETransformerBridge
):
    other = ordinary_sae("blocks.2.hook_resid_post")
    special = [int(TOKENS[0, 3])]
    _, cache = hooked.run_with_cache_with_saes(
        TOKENS, saes=other, exclude_special_tokens=special, use_error_term=True
    )
    error = cache["blocks.2.hook_resid_post.hook_sae_error"]
    assert torch.equal(error.abs().sum(-1) == 0, special[0] == TOKENS)
    for attach in (bridge.add_sae, bridge.saes(other, exclude_special_tokens=special).__enter__):
        with pytest.raises(TypeError, match="exclude_special_tokens"):
            attach(*([other, None, special] if attach == bridge.add_sae else []))
    assert bridge.acts_to_saes == {}


def test_a_deep_copy_is_a_model_of_its_own(model: Any):
    sae = make_sae()
    model.add_sae(sae)
    logits = model(TOKENS)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(TOKENS), logits, rtol=0, atol=0)
    [its_own] = twin.route_saes.values()
    assert its_own is not sae and twin.acts_to_saes["blocks.1.hook_resid_post"].W_dec is its_own.W_dec
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "mlp" in name:
                parameter.zero_()
    assert not torch.allclose(twin(TOKENS), logits, atol=1e-3)
    twin.reset_saes()
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=0)


def test_moving_the_model_leaves_the_sae_alone(hooked: HookedRouteSAETransformer):
    sae = make_sae()
    hooked.add_sae(sae)
    logits = hooked(TOKENS)
    hooked.to(torch.float64)
    assert sae.W_enc.dtype == torch.float32
    assert hooked(TOKENS).dtype == torch.float64
    torch.testing.assert_close(hooked(TOKENS).float(), logits, rtol=0, atol=1e-3)


def test_both_classes_can_be_made_directly(tiny_llama_dir: Any, tiny_hooked: Any):
    booted = RouteSAETransformerBridge.boot_transformers(str(tiny_llama_dir), device="cpu")
    assert type(booted) is RouteSAETransformerBridge
    sae = make_sae()
    assert not torch.allclose(booted.run_with_saes(TOKENS, saes=sae), booted(TOKENS), atol=1e-3)
    made = HookedRouteSAETransformer(tiny_hooked.cfg)
    made.load_state_dict(tiny_hooked.state_dict())
    expected = made.run_with_saes(TOKENS, saes=sae)
    turned = HookedRouteSAETransformer.from_model(tiny_hooked)
    torch.testing.assert_close(turned.run_with_saes(TOKENS, saes=sae), expected, rtol=0, atol=0)
    assert set(turned.hook_dict) == set(made.hook_dict)
    assert turned.blocks[0].mlp.hook_in.name == "blocks.0.mlp.hook_in"
    cached = turned.run_with_cache(TOKENS, names_filter="blocks.0.mlp.hook_in")[1]
    assert cached["blocks.0.mlp.hook_in"].shape == (*TOKENS.shape, D_MODEL)


def test_a_model_of_another_class_is_not_turned_into_ours(tiny_hooked: Any, tiny_bridge: Any):
    for model, ours in ((tiny_hooked, HookedRouteSAETransformer), (tiny_bridge, RouteSAETransformerBridge)):
        own = type("Own", (type(model),), {})
        model.__class__ = own
        with pytest.raises(TypeError, match="got Own"):
            ours.from_model(model)
        assert type(model) is own


# --- Forward's arguments and generation --------------------------------------------------------------


def test_starting_and_stopping_on_hookedtransformer(hooked: HookedRouteSAETransformer):
    sae = make_sae((1, 2, 4))
    _, clean = hooked.run_with_cache(TOKENS)
    with hooked.saes(sae):
        logits, cache = hooked.run_with_cache(TOKENS)
        for start in (0, 1):
            residual = clean[f"blocks.{start}.hook_resid_pre"]
            torch.testing.assert_close(hooked(residual, start_at_layer=start), logits, rtol=0, atol=1e-5)
        for start in (2, -1):
            with pytest.raises(ValueError, match="after layer 1"):
                hooked(clean["blocks.2.hook_resid_pre"], start_at_layer=start)
        stopped = hooked(TOKENS, stop_at_layer=3)
        torch.testing.assert_close(stopped, cache["blocks.3.hook_resid_pre"], rtol=0, atol=0)
        loss = hooked(TOKENS, return_type="loss", loss_per_token=True)
        assert torch.equal(hooked(TOKENS, "loss", True), loss)  # as HookedTransformer takes them
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, TOKENS[:, 1:], reduction="none")
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


def test_the_bridge_refuses_what_it_cannot_do(bridge: RouteSAETransformerBridge):
    sae = make_sae((1, 2, 4))
    with bridge.saes(sae):
        logits = bridge(TOKENS)
        for option in (
            {"start_at_layer": 0},
            {"stop_at_layer": 3},
            {"use_cache": True},
            {"past_key_values": ()},
        ):
            with pytest.raises(NotImplementedError, match=next(iter(option))):
                bridge(TOKENS, **option)
        with pytest.raises(RuntimeError, match="routing pass ended"):
            bridge.run_with_cache(TOKENS, stop_at_layer=3)
        for method in ("generate", "generate_stream", "hf_generate", "diffusion_generate"):
            with pytest.raises(NotImplementedError, match=method):
                getattr(bridge, method)(TOKENS)
        with pytest.raises(RuntimeError, match="no routes"):
            bridge.original_model(TOKENS)
        torch.testing.assert_close(bridge(TOKENS, "logits"), logits, rtol=0, atol=0)
    tokens = bridge.generate(
        TOKENS[:1], max_new_tokens=2, do_sample=False, verbose=False, return_type="tokens"
    )
    assert tokens.shape == (1, 11)


@pytest.mark.parametrize("routing", ["hard", "random"])
def test_uncached_generation_equals_a_forward_for_every_token(
    hooked: HookedRouteSAETransformer, routing: str
):
    sae = make_sae(routing=routing, metadata={"seqpos_slice": (1, None)})
    special = [int(TOKENS[0, 3])]
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    clean = hooked.generate(TOKENS, **options)
    with hooked.saes(sae, exclude_special_tokens=special):
        expected = TOKENS
        for _ in range(6):
            expected = torch.cat([expected, hooked(expected)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(hooked.generate(TOKENS, use_past_kv_cache=False, **options), expected)
        with pytest.raises(NotImplementedError, match="use_past_kv_cache=False"):
            hooked.generate(TOKENS, **options)
        with pytest.raises(NotImplementedError, match="use_past_kv_cache=False"):
            next(iter(hooked.generate_stream(TOKENS, max_new_tokens=2)))
        assert torch.equal(hooked.generate(TOKENS, use_past_kv_cache=False, **options), expected)
    assert not torch.equal(expected, clean)
    assert torch.equal(hooked.generate(TOKENS, **options), clean)


def test_views_are_saes_for_saelens(model: Any):
    model.add_sae(make_sae())
    assert all(isinstance(view, SAE) for view in model.acts_to_saes.values())
