"""What the multi-layer hook point must leave alone: cost, other hooks, copies, bad input."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from backends import LAYERS, TOKENS, every_backend, every_site, stack_of

from routesae_lens.hook_points import (
    LayersHookPoint,
    backend_of,
    layer_hook_name,
    mount_layers,
    mounted_points,
    unmount_layers,
)


def assert_clean(model, name: str, before: list[str]) -> None:
    assert mounted_points(model) == [] and list(model.hook_dict) == before
    root = getattr(model, "model", model)
    for path, module in root.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not [hook for hook in hooks if "hook_points" in repr(hook) or "_put" in repr(hook)], path
        assert not isinstance(module, LayersHookPoint), path
        assert not hasattr(module, name.rpartition(".")[2])


@every_backend
@every_site
def test_unmount_leaves_nothing(model, site):
    before, state = list(model.hook_dict), list(model.state_dict())
    name = mount_layers(model, LAYERS, site)
    assert list(model.state_dict()) == state
    stack_of(model, name)
    unmount_layers(model, name)
    assert_clean(model, name, before)
    assert list(model.state_dict()) == state
    with pytest.raises(ValueError, match="no multi-layer hook point"):
        unmount_layers(model, name)
    assert stack_of(model, mount_layers(model, LAYERS, site)).shape == (2, 5, 96)


# --- Costs nothing, keeps nothing ------------------------------------------------------------------------


@every_backend
@every_site
def test_it_costs_nothing_while_nobody_listens(model, site, monkeypatch):
    name = mount_layers(model, LAYERS, site)
    point = model.hook_dict[name]

    def forbidden(*args, **kwargs):
        raise AssertionError("the stack was made although nobody listens")

    monkeypatch.setattr(torch.Tensor, "new_empty", made := spy(torch.Tensor.new_empty))
    monkeypatch.setattr("routesae_lens.backends._TapInside.leave", no_transient_taps)
    monkeypatch.setattr(point, "forward", forbidden)
    model(TOKENS)
    assert not [shape for shape in made.shapes if shape[-1] == 96] and point._stack is None


def spy(make):
    def wrapped(*args, **kwargs):
        out = make(*args, **kwargs)
        wrapped.shapes.append(tuple(out.shape))
        return out

    wrapped.shapes = []
    return wrapped


def no_transient_taps(tap, *_):
    assert not tap.live


class _Abort(Exception):
    pass


def _abort(x, hook):
    raise _Abort


@every_backend
@every_site
def test_after_an_exception_nothing_stale_is_left(model, site):
    name = mount_layers(model, LAYERS, site)
    expected = stack_of(model, name)
    point = model.hook_dict[name]
    stacks = []

    def hooks_on_modules() -> int:
        return sum(len(module._forward_hooks) for module in getattr(model, "model", model).modules())

    before = hooks_on_modules()

    def abort(x, hook):
        stacks.append(weakref.ref(point._stack))
        raise _Abort

    with pytest.raises(_Abort):
        fwd_hooks = [(layer_hook_name(model, 3, "hook_resid_post"), abort), (name, lambda x, hook: None)]
        model.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
    assert len(stacks) == 1 and point._stack is None
    with pytest.raises(_Abort):
        fwd_hooks = [(layer_hook_name(model, 2, "hook_mlp_out"), _abort), (name, lambda x, hook: None)]
        model.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
    assert hooks_on_modules() == before
    assert torch.equal(stack_of(model, name), expected)


def test_stopping_too_early_leaves_nothing_for_a_later_start(tiny_hooked):
    name = mount_layers(tiny_hooked, LAYERS)
    residual, cache = tiny_hooked.run_with_cache(TOKENS, names_filter=name, stop_at_layer=2)
    assert name not in cache and tiny_hooked.hook_dict[name]._stack is None
    with pytest.raises(RuntimeError, match="start_at_layer"):
        tiny_hooked.run_with_cache(residual, names_filter=name, start_at_layer=2)
    tiny_hooked(residual, start_at_layer=2)  # nobody listens: nothing to complain about


def test_a_lasting_hook_never_gets_layers_of_two_forwards(tiny_hooked):
    name, seen = mount_layers(tiny_hooked, LAYERS), []
    tiny_hooked.add_hook(name, lambda x, hook: seen.append(x))
    tiny_hooked(TOKENS, stop_at_layer=3)  # leaves two layers of three
    with pytest.raises(RuntimeError, match="start_at_layer"):
        tiny_hooked(torch.randn(2, 5, 32), start_at_layer=2)
    with pytest.raises(RuntimeError, match="start_at_layer"):
        tiny_hooked(torch.randn(2, 5, 32), start_at_layer=3)
    assert seen == []
    tiny_hooked(TOKENS, stop_at_layer=3)
    tiny_hooked(TOKENS)
    assert torch.equal(seen[-1], stack_of(tiny_hooked, name))


def test_starting_at_the_first_layer_is_enough(tiny_hooked):
    name = mount_layers(tiny_hooked, LAYERS)
    _, cache = tiny_hooked.run_with_cache(TOKENS, names_filter=[name, "blocks.1.hook_resid_pre"])
    _, again = tiny_hooked.run_with_cache(
        cache["blocks.1.hook_resid_pre"], names_filter=name, start_at_layer=1
    )
    assert torch.equal(again[name], cache[name])


# --- Read-only -------------------------------------------------------------------------------------------

EDITS = {
    "another tensor": lambda x, hook: x + 1,
    "in place": lambda x, hook: x.mul_(2),
    "in place, returning nothing": lambda x, hook: [x[..., 0].zero_(), None][1],
}


@every_backend
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_edits_raise(model, edit, mode):
    name = mount_layers(model, LAYERS)
    with mode(), pytest.raises(RuntimeError, match="read-only"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)])
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x)])


def test_backward_hooks_are_refused(tiny_hooked):
    name = mount_layers(tiny_hooked, LAYERS)
    with pytest.raises(ValueError, match="read-only"):
        tiny_hooked.add_hook(name, lambda grad, hook: None, dir="bwd")


# --- Copies ------------------------------------------------------------------------------------------------


@every_backend
@every_site
def test_deepcopy_gives_an_independent_point(model, site):
    name = mount_layers(model, LAYERS, site)
    expected = stack_of(model, name)
    twin = copy.deepcopy(model)
    assert twin.hook_dict[name] is not model.hook_dict[name]
    seen: list[str] = []
    model.hook_dict[name].add_hook(lambda x, hook: seen.append("original"))
    twin.hook_dict[name].add_hook(lambda x, hook: seen.append("twin"))
    twin(TOKENS)
    assert seen == ["twin"]
    model(TOKENS)
    assert seen == ["twin", "original"]
    assert torch.equal(stack_of(twin, name), expected)
    unmount_layers(twin, name)
    assert mounted_points(twin) == [] and torch.equal(stack_of(model, name), expected)


# --- Bad input ---------------------------------------------------------------------------------------------

BAD_LAYERS = [[], [1, 1], [2, 1], [-1, 2], [1, 6], [True, 2], [0, False], ["1", "2"], [1.0, 2.0], 3, None]


@every_backend
@pytest.mark.parametrize("layers", BAD_LAYERS, ids=repr)
def test_bad_layers(model, layers):
    before = list(model.hook_dict)
    # (jaxtyping's check, on in the tests alone, may see a wrong type first: a TypeError)
    with pytest.raises((ValueError, TypeError)) as error:
        mount_layers(model, layers)
    assert "layers" in str(error.value)
    assert list(model.hook_dict) == before


@every_backend
def test_unknown_site(model):
    with pytest.raises(ValueError, match="known sites: hook_resid_pre"):
        mount_layers(model, LAYERS, "hook_z")


def test_unknown_model(tiny_llama_dir):
    with pytest.raises(TypeError, match="unsupported model Linear"):
        mount_layers(torch.nn.Linear(2, 2), LAYERS)
    with pytest.raises(TypeError, match="unsupported model"):
        backend_of(None)


def test_a_site_the_model_lacks():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=3, d_model=8, n_ctx=8, d_head=4, attn_only=True, d_vocab=16, seed=0, device="cpu"
    )
    model = HookedTransformer(config)
    before = list(model.hook_dict)
    with pytest.raises(ValueError, match="no hook_mlp_out in block 0"):
        mount_layers(model, [0, 1], "hook_mlp_out")
    assert_clean(model, "blocks.1.hook_mlp_out_stack_0to1", before)
