"""Steering: the arithmetic of every edit against hooks written by hand, and where it applies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spliced import (
    D_MODEL,
    D_SAE,
    TOKENS,
    acts_name,
    assert_clean,
    left_padded,
    make_sae,
    ordinary_sae,
    state_of,
)
from spliced_crosscoders import clean_layers, make_crosscoder

from routesae_lens.hook_points import layer_hook_name, unmount_layers
from routesae_lens.splice.edits import Ablate, Add, Scale, Set

POINT = "blocks.3.hook_resid_post"
EDITS: dict[str, Any] = {
    "set": (Set(6.0), lambda f: torch.full_like(f, 6.0)),
    "add": (Add(-2.5), lambda f: f - 2.5),
    "scale": (Scale(3.0), lambda f: 3 * f),
    "ablate": (Ablate(), torch.zeros_like),
}


def route_sae(**fields: Any) -> Any:
    return make_sae(**fields).to(torch.float64)


def ordinary() -> Any:
    sae = ordinary_sae(POINT)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.2)
    return sae.to(torch.float64)


def active_latent(model: Any, sae: Any) -> int:
    """The latent that most tokens have, so that scaling and ablating it does something."""
    route = route_of(model, sae)
    return int((sae.encode_routed(route.input) > 0).sum((0, 1)).argmax())


@torch.no_grad()
def route_of(model: Any, sae: Any, tokens: torch.Tensor = TOKENS, **options: Any) -> Any:
    point = sae.mount(model)
    _, cache = model.run_with_cache(tokens, names_filter=point, **options)
    unmount_layers(model, point)
    return sae.route(cache[point])


def steered_by_hand(
    model: Any,
    sae: Any,
    changes: dict[int, Any],
    where: torch.Tensor | None = None,
    *,
    layers: list[int] | None = None,
    error: bool = True,
    tokens: torch.Tensor = TOKENS,
    **options: Any,
) -> torch.Tensor:
    """Logits with routes from a clean pass and one hook per layer; the standardisation written out."""
    route = route_of(model, sae, tokens, **options)
    where = torch.ones_like(tokens, dtype=torch.bool) if where is None else where
    p = route.scale[..., None]

    def at(index: int) -> Any:
        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-6
            f = sae.encode_routed((x - mean) / std * p)
            edited = f.clone()
            for latent, change in changes.items():
                edited[..., latent] = torch.where(where, change(f[..., latent]), f[..., latent])
            replaced = (edited @ sae.W_dec + sae.b_dec) / p * std + mean
            y = x + (edited - f) @ sae.W_dec / p * std if error else replaced
            here = route.layer == index if layers is None else torch.ones_like(where)
            real = options.get("attention_mask", torch.ones_like(tokens)).bool()
            return torch.where((here & real)[..., None], y, x)

        return hook

    hooks = [
        (layer_hook_name(model, layer), at(index))
        for index, layer in enumerate(sae.layers)
        if layers is None or layer in layers
    ]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks, **options)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- Arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_every_edit_by_hand(exact: Any, name: str, error: bool):
    sae = route_sae()
    latent = active_latent(exact, sae)
    edit, change = EDITS[name]
    expected = steered_by_hand(exact, sae, {latent: change}, error=error)
    before = state_of(exact)
    with torch.no_grad(), exact.steer(sae, {latent: edit}, use_error_term=error):
        logits = exact(TOKENS)
    close(logits, expected)
    plain = before["logits"] if error else exact.run_with_saes(TOKENS, saes=sae)
    assert not torch.allclose(logits, plain, atol=1e-3)
    assert_clean(exact, before)


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("layers", [2, [1, 4], "all", "routed", None])
def test_layers(exact: Any, layers: Any, error: bool):
    sae = route_sae()
    by_hand = {2: [2], "all": [1, 2, 4], "routed": None, None: None}
    listed = layers if isinstance(layers, list) else by_hand[layers]
    changes = {5: lambda f: f + 4, 9: torch.zeros_like}
    expected = steered_by_hand(exact, sae, changes, layers=listed, error=error)
    with torch.no_grad(), exact.steer(sae, {5: Add(4.0), 9: Ablate()}, layers=layers, use_error_term=error):
        close(exact(TOKENS), expected)
        assert list(exact.acts_to_saes) == [f"blocks.{i}.hook_resid_post" for i in listed or sae.layers]


PLACES = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
POSITIONS: dict[str, tuple[Any, torch.Tensor]] = {
    "all": ("all", PLACES >= 0),
    "prompt": ("prompt", PLACES >= 0),
    "generated": ("generated", PLACES < 0),
    "slice": (slice(2, 7, 2), (PLACES == 2) | (PLACES == 4) | (PLACES == 6)),
    "from the end": (slice(-3, None), PLACES >= 6),
    "up to the end": (slice(None, -2), PLACES < 7),
    "step from the end": (slice(-4, None, 3), (PLACES == 5) | (PLACES == 8)),
    "longer than the prompt": (slice(-20, 2), PLACES < 2),
    "ids": ([int(TOKENS[0, 3]), int(TOKENS[1, 5])], torch.isin(TOKENS, TOKENS[[0, 1], [3, 5]])),
    "predicate": (lambda tokens: tokens > 30, TOKENS > 30),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(exact: Any, name: str):
    positions, where = POSITIONS[name]
    sae = route_sae()
    expected = steered_by_hand(exact, sae, {5: lambda f: f * 0 + 8}, where)
    with torch.no_grad(), exact.steer(sae, {5: Set(8.0)}, positions=positions):
        close(exact(TOKENS), expected)


@pytest.mark.parametrize(
    "positions", ["all", slice(0, 1), slice(-2, -1), slice(1, None), slice(None, None, 2)]
)
def test_positions_count_without_left_padding(exact: Any, positions: Any):
    rows = [[5, 17, 33, 8, 9], [44, 9], [100, 101, 102]]
    tokens, mask = left_padded(rows)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(rows):
        chosen = range(len(row))[slice(None) if positions == "all" else positions]
        for place in chosen:
            where[index, tokens.shape[1] - len(row) + place] = True
    sae = route_sae()
    expected = steered_by_hand(exact, sae, {5: lambda f: f + 8}, where, tokens=tokens, attention_mask=mask)
    with torch.no_grad(), exact.steer(sae, {5: Add(8.0)}, positions=positions):
        logits = exact(tokens, attention_mask=mask)
    close(logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", slice(-1, None), slice(0, -2)])
def test_positions_count_without_the_padding_of_texts(exact: Any, positions: Any, side: str):
    texts = ["The quick brown fox", "A", "In the morning the"]
    with torch.no_grad(), exact.steer(route_sae(), {5: Add(8.0)}, positions=positions):
        together = exact(texts, padding_side=side)
        for row, text in zip(together, texts, strict=True):
            alone = exact(text)[0]
            close(row[: len(alone)] if side == "right" else row[-len(alone) :], alone)


@pytest.mark.parametrize("form", ["dict", "tensor"])
def test_relative_strengths_are_in_units_of_the_maximum_at_p_1(exact: Any, form: str):
    sae = route_sae()
    maxima: Any = {5: 4.0, 9: 2.5}
    if form == "tensor":
        maxima = torch.full((D_SAE,), 7.0)
        maxima[5], maxima[9] = 4.0, 2.5
    p = route_of(exact, sae).scale
    assert p.std() > 0.01
    changes = {5: lambda f: f * 0 + 2 * 4.0 * p, 9: lambda f: f - 0.5 * 2.5 * p}
    expected = steered_by_hand(exact, sae, changes)
    edits = {5: Set(2.0, relative=True), 9: Add(-0.5, relative=True)}
    with torch.no_grad(), exact.steer(sae, edits, maxima=maxima):
        close(exact(TOKENS), expected)
    other = ordinary()
    with torch.no_grad(), exact.steer(other, edits, maxima=maxima):
        relative = exact(TOKENS)
    with torch.no_grad(), exact.steer(other, {5: Set(8.0), 9: Add(-1.25)}):
        close(exact(TOKENS), relative)


# --- Other SAEs, and several -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [True, False])
def test_an_ordinary_sae(exact: Any, error: bool):
    sae = ordinary()

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        f = sae.encode(x)
        edited = f.clone()
        edited[..., 5] = f[..., 5] + 8
        return x + 8 * sae.W_dec[5] if error else sae.decode(edited)

    with torch.no_grad():
        expected = exact.run_with_hooks(TOKENS, fwd_hooks=[(layer_hook_name(exact, 3), hook)])
        with exact.steer(sae, {5: Add(8.0)}, use_error_term=error):
            close(exact(TOKENS), expected)
        assert exact.acts_to_saes == {}


@pytest.mark.parametrize("chosen", [None, 2, [1, 4]])
def test_a_crosscoder_adds_the_difference_at_each_layer(exact: Any, chosen: Any):
    sae = make_crosscoder().to(torch.float64)
    f = sae.encode(clean_layers(exact, sae).flatten(-2))
    difference = ((8 - f[..., 5, None]) * sae.W_dec[5]).unflatten(-1, (3, D_MODEL))

    def at(index: int) -> Any:
        return lambda x, hook: x + difference[:, :, index] * (x.std(-1, keepdim=True) + 1e-6)

    listed = [chosen] if isinstance(chosen, int) else chosen or sae.layers
    hooks = [(layer_hook_name(exact, i), at(sae.layers.index(i))) for i in listed]
    with torch.no_grad():
        expected = exact.run_with_hooks(TOKENS, fwd_hooks=hooks)
        with exact.steer(sae, {5: Set(8.0)}, layers=chosen):
            close(exact(TOKENS), expected)


def test_two_saes_at_once(exact: Any):
    sae, other = route_sae(), ordinary()
    shift = [(layer_hook_name(exact, 3), lambda x, hook: x - 5 * other.W_dec[7])]
    with torch.no_grad():
        with exact.hooks(fwd_hooks=shift):  # the routing pass sees it too
            expected = steered_by_hand(exact, sae, {5: lambda f: f + 8})
        with exact.steer(sae, {5: Add(8.0)}), exact.steer(other, {7: Add(-5.0)}):
            close(exact(TOKENS), expected)
        with exact.steer(other, {7: Add(-5.0)}), exact.steer(sae, {5: Add(8.0)}):
            close(exact(TOKENS), expected)


def test_nested_on_the_same_sae_in_the_order_of_the_blocks(exact: Any):
    sae = route_sae()
    before = state_of(exact)
    alone = steered_by_hand(exact, sae, {5: lambda f: f + 8})
    both = steered_by_hand(exact, sae, {5: lambda f: (f + 8) * 2})
    with torch.no_grad(), exact.steer(sae, {5: Add(8.0)}):
        with exact.steer(sae, {5: Scale(2.0)}):
            close(exact(TOKENS), both)
        close(exact(TOKENS), alone)
    assert not torch.allclose(alone, both, atol=1e-3)
    assert_clean(exact, before)


@pytest.mark.parametrize("error", [True, False])
def test_an_sae_that_is_attached_keeps_its_way(exact: Any, error: bool):
    sae = route_sae()
    with torch.no_grad():
        expected = steered_by_hand(exact, sae, {5: lambda f: f + 8}, layers=[2], error=error)
        exact.add_sae(sae, use_error_term=error, splice_layers=[2])
        attached = exact(TOKENS)
        with exact.steer(sae, {5: Add(8.0)}):
            close(exact(TOKENS), expected)
        torch.testing.assert_close(exact(TOKENS), attached, rtol=0, atol=0)
        assert list(exact.route_saes.values()) == [sae]


# --- Beside hooks and gradients ----------------------------------------------------------------------


def test_hooks_of_others_on_the_latents(exact: Any):
    """In the order in which they were added, whichever side of the steering's."""
    sae = route_sae()

    def double(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., 5] *= 2
        return acts

    after = steered_by_hand(exact, sae, {5: lambda f: (f + 8) * 2})
    first = steered_by_hand(exact, sae, {5: lambda f: f * 2 + 8})
    with torch.no_grad():
        with exact.steer(sae, {5: Add(8.0)}):
            hooks = [(acts_name(exact, sae, layer), double) for layer in sae.layers]
            close(exact.run_with_hooks(TOKENS, fwd_hooks=hooks), after)
            _, cache = exact.run_with_cache(TOKENS)
            [route] = exact.last_routes.values()
            seen = sum(cache[name][..., 5] for name, _ in hooks)
            assert (seen >= 8 - 1e-9).all() and len(route.layer.unique()) > 1
        exact.add_sae(sae, use_error_term=True)
        with exact.hooks(fwd_hooks=hooks), exact.steer(sae, {5: Add(8.0)}):
            close(exact(TOKENS), first)
        exact.reset_saes()


@pytest.mark.parametrize("kind", ["route", "crosscoder", "ordinary"])
def test_reset_hooks_inside_does_not_end_it(exact: Any, kind: str):
    sae = {"route": make_sae, "crosscoder": make_crosscoder, "ordinary": ordinary}[kind]().to(torch.float64)
    before = state_of(exact)
    with torch.no_grad(), exact.steer(sae, {5: Add(8.0)}):
        logits = exact(TOKENS)
        exact.reset_hooks()
        torch.testing.assert_close(exact(TOKENS), logits, rtol=0, atol=0)
        exact.reset_hooks(including_permanent=True)  # those of steering too: its end must bear it
    assert_clean(exact, before)
    assert not sae.hook_sae_acts_post.fwd_hooks


def test_run_with_hooks_and_run_with_cache(exact: Any):
    sae = route_sae()
    with torch.no_grad(), exact.steer(sae, {5: Add(8.0)}):
        logits = exact(TOKENS)
        seen: list[str] = []
        name = layer_hook_name(exact, 5)
        close(
            exact.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: seen.append(hook.name))]), logits
        )
        close(exact.run_with_cache(TOKENS)[0], logits)
        torch.testing.assert_close(exact(TOKENS), logits, rtol=0, atol=0)
        assert len(seen) == 1


@pytest.mark.parametrize("share", [True, False])
def test_gradients_flow_through_a_steered_forward(exact: Any, share: bool):
    sae = route_sae()
    exact.share_prefix = share
    with exact.steer(sae, {5: Add(8.0)}):
        exact(TOKENS)[:, -1].square().sum().backward()
    assert sae.W_dec.grad[5].abs().max() > 0
    block = exact.blocks[0]
    grads = [p.grad for p in block.parameters() if p.requires_grad]
    assert any(g is not None and g.abs().max() > 0 for g in grads)


def test_steering_alone_leaves_the_sae_itself_alone(exact: Any):
    """Used by itself inside the block, an ordinary SAE encodes as ever."""
    other = ordinary()
    x = torch.randn(2, 3, D_MODEL, dtype=torch.float64)
    plain = other.encode(x)
    with exact.steer(other, {5: Add(8.0)}):
        torch.testing.assert_close(other.encode(x), plain, rtol=0, atol=0)
