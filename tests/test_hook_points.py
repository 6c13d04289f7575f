"""The multi-layer hook point: what it shows, on every backend and site, and what it must leave alone."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata

from routesae_lens.hook_points import (
    SITES,
    LayersHookPoint,
    backend_of,
    default_layers,
    join_layers,
    layer_hook_name,
    mount_layers,
    mounted_points,
    parse_stack_name,
    split_layers,
    stack_name,
    unmount_layers,
)

LAYERS = [1, 2, 4]
TOKENS = torch.tensor([[0, 5, 17, 33, 8], [0, 44, 3, 3, 61]])
BACKENDS = ["tiny_hooked", "tiny_bridge", "tiny_proxy"]
PROXY_HOOKS = {
    "hook_resid_pre": lambda i: f"model.layers.{i - 1}",
    "hook_resid_post": lambda i: f"model.layers.{i}",
    "hook_attn_out": lambda i: f"model.layers.{i}.self_attn",
    "hook_mlp_out": lambda i: f"model.layers.{i}.mlp",
}


@pytest.fixture
def model(request: pytest.FixtureRequest):
    return request.getfixturevalue(request.param)


@pytest.fixture
def sae_model(request: pytest.FixtureRequest):
    """The two model classes that splice SAEs."""
    model = request.getfixturevalue(request.param)
    if request.param == "tiny_hooked":
        spliced = HookedSAETransformer(model.cfg).eval()
        spliced.load_state_dict(model.state_dict())
        return spliced
    return SAETransformerBridge.boot_transformers(
        str(request.getfixturevalue("tiny_llama_dir")), device="cpu"
    ).eval()


every_backend = pytest.mark.parametrize("model", BACKENDS, indirect=True)
sae_backends = pytest.mark.parametrize("sae_model", BACKENDS[:2], indirect=True)
every_site = pytest.mark.parametrize("site", SITES)


def stack_of(model, name: str, **kwargs) -> torch.Tensor:
    return model.run_with_cache(TOKENS, names_filter=[name], **kwargs)[1][name]


def one_by_one(model, site: str, layers=LAYERS) -> torch.Tensor:
    """The single layers' activations by the backend's own hooks, one run for each layer."""
    if type(model).__name__ == "HookedProxyLM":
        if site == "hook_resid_mid":  # no module puts it out: what attention adds to the block's input
            parts = zip(one_by_one(model, "hook_resid_pre"), one_by_one(model, "hook_attn_out"), strict=True)
            return torch.stack([resid + attention for resid, attention in parts])
        hooks = [PROXY_HOOKS[site](i) for i in layers]
    else:
        hooks = [f"blocks.{i}.{site}" for i in layers]
    return torch.cat([stack_of(model, hook) for hook in hooks], dim=-1)


def assert_clean(model, name: str, before: list[str]) -> None:
    assert mounted_points(model) == [] and list(model.hook_dict) == before
    root = getattr(model, "model", model)
    for path, module in root.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not [hook for hook in hooks if "hook_points" in repr(hook) or "_put" in repr(hook)], path
        assert not isinstance(module, LayersHookPoint), path
        assert not hasattr(module, name.rpartition(".")[2])


# --- What it shows -------------------------------------------------------------------------------------


@every_backend
@every_site
def test_the_stack_is_the_layers_captured_one_by_one(model, site):
    name = mount_layers(model, LAYERS, site)
    expected = one_by_one(model, site)
    stack = stack_of(model, name)
    assert stack.shape == (*TOKENS.shape, 3 * 32)
    assert torch.equal(stack, expected)
    assert torch.equal(join_layers(split_layers(stack, 3)), stack)
    assert torch.equal(stack_of(model, name, stop_at_layer=LAYERS[-1] + 1), expected)
    with torch.inference_mode():
        assert torch.equal(stack_of(model, name), expected)


@every_backend
def test_first_and_last_layers_of_the_model(model):
    name = mount_layers(model, [0, 5])
    assert torch.equal(stack_of(model, name), one_by_one(model, "hook_resid_post", [0, 5]))


@every_backend
def test_it_fires_once_per_forward(model):
    name = mount_layers(model, LAYERS)
    seen = []
    model.hook_dict[name].add_hook(lambda x, hook: seen.append(x.shape))
    for runs in (1, 2, 3):
        model(TOKENS)
        assert seen == [(*TOKENS.shape, 96)] * runs


@every_backend
def test_sites_add_up(model):
    """resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post: each site is what it is called."""
    pre, mid, post, attention, mlp = (stack_of(model, mount_layers(model, LAYERS, site)) for site in SITES)
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)


@every_backend
@every_site
def test_it_sees_what_user_hooks_leave(model, site):
    if site == "hook_resid_mid" and type(model).__name__ != "HookedTransformer":
        pytest.skip("no hook changes resid_mid in the stream of this backend")
    name = mount_layers(model, LAYERS, site)
    seen = []

    def double(x, hook):
        return 2 * x

    clean = stack_of(model, name)
    model.run_with_hooks(
        TOKENS,
        fwd_hooks=[(layer_hook_name(model, 2, site), double), (name, lambda x, hook: seen.append(x))],
    )
    before, changed, after = split_layers(seen[0], 3).unbind(-2)
    clean_before, clean_changed, clean_after = split_layers(clean, 3).unbind(-2)
    assert torch.equal(before, clean_before)
    assert torch.equal(changed, 2 * clean_changed)
    assert not torch.allclose(after, clean_after)


def stock_sae(hook_name: str, scale: float = 3.0) -> StandardSAE:
    torch.manual_seed(1)
    metadata = SAEMetadata(hook_name=hook_name, model_name="tiny")
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, metadata=metadata))
    sae.W_dec.data *= scale
    return sae


@sae_backends
@every_site
def test_it_sees_spliced_saes_and_survives_them(sae_model, site):
    model, hook_name = sae_model, f"blocks.2.{site}"
    name = mount_layers(model, LAYERS, site)
    clean = split_layers(stack_of(model, name), 3)
    sae = stock_sae(hook_name)
    for _ in range(2):
        model.add_sae(sae)
        spliced = split_layers(stack_of(model, name), 3)
        torch.testing.assert_close(spliced[..., 1, :], sae(clean[..., 1, :]))
        assert torch.equal(spliced[..., 0, :], clean[..., 0, :])
        # Changed in the middle of a block on the bridge, nothing flows on: hook_in only feeds the norm.
        if not (site == "hook_resid_mid" and hasattr(model, "adapter")):
            assert not torch.allclose(spliced[..., 2, :], clean[..., 2, :])
        model.reset_saes()
        assert torch.equal(split_layers(stack_of(model, name), 3), clean)


@every_backend
@every_site
def test_it_survives_reset_hooks_and_setup(model, site):
    name = mount_layers(model, LAYERS, site)
    expected = one_by_one(model, site)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(stack_of(model, name), expected)
    if type(model).__name__ == "HookedTransformer":
        model.setup()
        assert torch.equal(stack_of(model, name), expected)


def test_generate_shows_every_step(tiny_hooked):
    name = mount_layers(tiny_hooked, LAYERS)
    shapes = []
    with tiny_hooked.hooks(fwd_hooks=[(name, lambda x, hook: shapes.append(tuple(x.shape)))]):
        tiny_hooked.generate(TOKENS, max_new_tokens=3, eos_token_id=63, verbose=False, do_sample=False)
    assert shapes[0] == (2, 5, 96)
    assert shapes[1:] == [(2, 1, 96)] * 2


def test_the_names_saelens_parses():
    from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name

    name = stack_name([1, 2, 3, 7, 10, 11], "hook_mlp_out", "model.layers")
    assert name == "model.layers.11.hook_mlp_out_stack_1to3_7_10to11"
    assert extract_stop_at_layer_from_tlens_hook_name(name) == 12
    assert parse_stack_name(name) == ([1, 2, 3, 7, 10, 11], "hook_mlp_out")
    assert parse_stack_name("blocks.3.hook_resid_post") is None
    assert default_layers(16) == [*range(3, 12)] and default_layers(30) == [*range(6, 22)]


# --- Gemma 2 and its like: what attention writes is normalised before it is added -----------------------


def test_sandwich_norms_on_hugging_face():
    from sae_lens.load_model import HookedProxyLM
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        num_hidden_layers=3,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
    )
    torch.manual_seed(0)
    model = HookedProxyLM(Gemma2ForCausalLM(config).eval(), None)  # type: ignore[arg-type]
    with torch.no_grad():
        for path, weight in model.model.named_parameters():
            if "norm" in path:
                weight.uniform_(-0.5, 0.5)
    pre, mid, post, attention, mlp = (stack_of(model, mount_layers(model, [0, 2], site)) for site in SITES)
    torch.testing.assert_close(pre + attention, mid)
    torch.testing.assert_close(mid + mlp, post)


# --- Two points, one point -----------------------------------------------------------------------------


@every_backend
def test_the_same_list_twice_is_one_point_and_same_last_layer_two(model):
    one = mount_layers(model, [1, 4])
    assert mount_layers(model, range(1, 5, 3)) == one
    other = mount_layers(model, [1, 2, 3, 4])
    mid = mount_layers(model, [1, 4], "hook_mlp_out")
    assert mounted_points(model) == sorted({one, other, mid}) and len({one, other, mid}) == 3
    _, cache = model.run_with_cache(TOKENS, names_filter=[one, other])
    assert torch.equal(cache[one][..., :32], cache[other][..., :32])
    assert torch.equal(cache[one][..., 32:], cache[other][..., -32:])
    unmount_layers(model, other)
    assert torch.equal(stack_of(model, one), cache[one])


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

    monkeypatch.setattr("routesae_lens.hook_points.torch.cat", cat := spy(torch.cat))
    monkeypatch.setattr("routesae_lens.hook_points._TapInside.leave", no_transient_taps)
    monkeypatch.setattr(point, "forward", forbidden)
    model(TOKENS)
    assert not [shape for shape in cat.shapes if shape[-1] == 96] and point._parts == {}


def spy(cat):
    def wrapped(*args, **kwargs):
        out = cat(*args, **kwargs)
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
    parts = []

    def hooks_on_modules() -> int:
        return sum(len(module._forward_hooks) for module in getattr(model, "model", model).modules())

    before = hooks_on_modules()

    def abort(x, hook):
        parts.extend(weakref.ref(part) for part in point._parts.values())
        raise _Abort

    with pytest.raises(_Abort):
        fwd_hooks = [(layer_hook_name(model, 3, "hook_resid_post"), abort), (name, lambda x, hook: None)]
        model.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
    assert len(parts) == 2 and point._parts == {}
    with pytest.raises(_Abort):
        fwd_hooks = [(layer_hook_name(model, 2, "hook_mlp_out"), _abort), (name, lambda x, hook: None)]
        model.run_with_hooks(TOKENS, fwd_hooks=fwd_hooks)
    assert hooks_on_modules() == before
    assert torch.equal(stack_of(model, name), expected)


def test_stopping_too_early_leaves_nothing_for_a_later_start(tiny_hooked):
    name = mount_layers(tiny_hooked, LAYERS)
    residual, cache = tiny_hooked.run_with_cache(TOKENS, names_filter=name, stop_at_layer=2)
    assert name not in cache and tiny_hooked.hook_dict[name]._parts == {}
    with pytest.raises(RuntimeError, match="start_at_layer"):
        tiny_hooked.run_with_cache(residual, names_filter=name, start_at_layer=2)
    tiny_hooked(residual, start_at_layer=2)  # nobody listens: nothing to complain about


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


@pytest.mark.parametrize("model", BACKENDS, indirect=True)
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
