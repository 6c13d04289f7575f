"""The hook point over two sites of a block: what the MLP reads, and what it writes, on every backend."""

from __future__ import annotations

import pytest
import torch
from backends import TOKENS, every_backend, stack_of, tiny_gemma2
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from transformer_lens import HookedTransformer, HookedTransformerConfig

from routesae_lens.backends import MLP_INPUT
from routesae_lens.hook_points import (
    layer_hook_name,
    mount_layers,
    mount_sites,
    mounted_points,
    parse_stack_name,
    unmount_layers,
)

LAYER = 2


def mlp_of(model) -> torch.nn.Module:
    if type(model).__name__ == "HookedProxyLM":
        return model.model.model.layers[LAYER].mlp
    return model.blocks[LAYER].mlp


def heard(model, point: str, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The point's value, and what torch's own hooks on the MLP hear in the same forward."""
    module, seen = mlp_of(model), {}
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.update(read=args[0].clone())),
        module.register_forward_hook(lambda _, args, out: seen.update(out=out.clone())),
    ]
    try:
        value = stack_of(model, point, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return value, seen["read"], seen["out"]


@every_backend
def test_it_holds_what_the_mlp_reads_and_writes(model):
    point = mount_sites(model, LAYER)
    value, read, out = heard(model, point)
    assert value.shape == (2, 5, 64)
    assert torch.equal(value[..., :32], read) and torch.equal(value[..., 32:], out)
    assert not torch.equal(read, out)
    assert mount_sites(model, LAYER) == point and mounted_points(model) == [point]
    assert model.hook_dict[point].widths == [32, 32]


@every_backend
def test_sae_lens_stops_the_model_behind_its_block(model):
    point = mount_sites(model, LAYER)
    assert extract_stop_at_layer_from_tlens_hook_name(point) == LAYER + 1
    assert parse_stack_name(point) is None
    ran = []
    blocks = model.model.model.layers if type(model).__name__ == "HookedProxyLM" else model.blocks
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    value = stack_of(model, point, stop_at_layer=LAYER + 1)
    # (on the proxy the stop comes as soon as the point is complete, within the block)
    assert max(ran, default=0) <= LAYER
    assert torch.equal(value, stack_of(model, point))


def test_the_bridge_and_the_hugging_face_model_give_the_same(tiny_bridge, tiny_proxy):
    values = [stack_of(model, mount_sites(model, LAYER)) for model in (tiny_bridge, tiny_proxy)]
    torch.testing.assert_close(*values)


@every_backend
def test_beside_a_multi_layer_point_both_fire(model):
    sites, layers = mount_sites(model, LAYER), mount_layers(model, [1, 3])
    cache = model.run_with_cache(TOKENS, names_filter=[sites, layers])[1]
    assert cache[sites].shape == cache[layers].shape == (2, 5, 64)
    assert torch.equal(cache[sites], stack_of(model, sites))


@every_backend
def test_other_sites(model):
    point = mount_sites(model, LAYER, "hook_resid_pre", "hook_attn_out")
    value = stack_of(model, point)
    assert torch.equal(value[..., 32:], stack_of(model, layer_hook_name(model, LAYER, "hook_attn_out")))
    assert torch.equal(value[..., :32], stack_of(model, mount_layers(model, [LAYER], "hook_resid_pre")))


@pytest.mark.parametrize(
    ("site_in", "site_out", "widths"),
    [(MLP_INPUT, "mlp.hook_post", [32, 64]), ("mlp.hook_post", "hook_mlp_out", [64, 32])],
)
def test_widths_may_differ(tiny_hooked, site_in, site_out, widths):
    point = mount_sites(tiny_hooked, LAYER, site_in, site_out)
    value, read, out = heard(tiny_hooked, point)
    hidden = stack_of(tiny_hooked, f"blocks.{LAYER}.mlp.hook_post")
    expected = [read, hidden] if site_in == MLP_INPUT else [hidden, out]
    assert torch.equal(value, torch.cat(expected, dim=-1))
    assert tiny_hooked.hook_dict[point].widths == widths


def test_why_ln2_hook_normalized_is_not_the_input(tiny_hooked):
    """TransformerLens' own name for the normalised stream fires before the norm's weights."""
    with torch.no_grad():
        tiny_hooked.blocks[LAYER].ln2.w.mul_(1.5)
    value, read, _ = heard(tiny_hooked, mount_sites(tiny_hooked, LAYER))
    normalized = stack_of(tiny_hooked, f"blocks.{LAYER}.ln2.hook_normalized")
    assert torch.equal(value[..., :32], read)
    torch.testing.assert_close(read, 1.5 * normalized)


def test_it_sees_what_hooks_at_the_input_make_of_it(model):
    point = mount_sites(model, LAYER)
    name = layer_hook_name(model, LAYER, MLP_INPUT)
    assert name == f"blocks.{LAYER}.mlp.hook_in"
    before, seen = stack_of(model, point), {}
    model.run_with_hooks(
        TOKENS,
        fwd_hooks=[
            (name, lambda x, hook: x * 2),
            (point, lambda x, hook: seen.update(value=x.clone())),
        ],
    )
    assert torch.equal(seen["value"][..., :32], 2 * before[..., :32])
    assert not torch.allclose(seen["value"][..., 32:], before[..., 32:])


def test_a_hooked_transformer_that_becomes_sae_lens_keeps_its_point(tiny_hooked):
    from routesae_lens.splice.hooked import HookedRouteSAETransformer

    point = mount_sites(tiny_hooked, LAYER)
    value = stack_of(tiny_hooked, point)
    with pytest.raises(ValueError, match=r"HookedTransformer has no hook at mlp\.hook_in"):
        layer_hook_name(tiny_hooked, LAYER, MLP_INPUT)
    model = HookedRouteSAETransformer.from_model(tiny_hooked)
    assert torch.equal(stack_of(model, mount_sites(model, LAYER)), value)


def test_the_mlp_input_of_a_family_with_post_norms():
    """Gemma 2: the MLP reads the pre-norm's output; what it adds to the stream comes from the post-norm."""
    model = tiny_gemma2()
    block = model.model.model.layers[LAYER]
    value, read, out = heard(model, mount_sites(model, LAYER))
    written = stack_of(model, f"model.layers.{LAYER}.post_feedforward_layernorm")
    assert torch.equal(value[..., :32], read)
    assert torch.equal(value[..., 32:], written) and not torch.allclose(written, out)
    assert block.mlp is mlp_of(model)


@every_backend
def test_unmounting_leaves_nothing(model):
    before = list(model.hook_dict)
    point = mount_sites(model, LAYER)
    stack_of(model, point)
    unmount_layers(model, point)
    assert mounted_points(model) == [] and list(model.hook_dict) == before
    for module in mlp_of(model).modules():
        assert not [
            h
            for h in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if "_put" in repr(h)
        ]


# --- Bad input -------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9,), "layers must be between 0 and 5"),
        ((LAYER, "hook_mlp_out", "hook_mlp_out"), "expected two sites, got 'hook_mlp_out' twice"),
        ((LAYER, "hook_mlp_in", "hook_mlp_out"), "expected 'mlp.hook_in', what the MLP reads"),
        ((LAYER, MLP_INPUT, "hook_nothing"), "hook_nothing"),
    ],
)
def test_what_cannot_work_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        mount_sites(model, *arguments)
    assert mounted_points(model) == []


def test_a_model_without_mlps():
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=8, d_head=8, n_heads=2, attn_only=True, d_vocab=16, device="cpu"
    )
    for model_class in (HookedTransformer, HookedSAETransformer):
        with pytest.raises(ValueError, match=r"this model has no mlp\.hook_in in block 1"):
            mount_sites(model_class(config), 1)


@every_backend
def test_the_site_that_is_read_must_come_first(model):
    point = mount_sites(model, LAYER, "hook_mlp_out", MLP_INPUT)
    with pytest.raises(RuntimeError, match="listed site 2 of 2 ran when 0 had run before it"):
        stack_of(model, point)
