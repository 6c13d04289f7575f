"""The multi-layer hook point: what it shows, on every backend and site."""

from __future__ import annotations

import pytest
import torch
from backends import (
    LAYERS,
    TOKENS,
    every_backend,
    every_site,
    one_by_one,
    sae_backends,
    stack_of,
    tiny_gemma2,
)
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata

from routesae_lens.hook_points import (
    SITES,
    default_layers,
    join_layers,
    layer_hook_name,
    mount_layers,
    mounted_points,
    parse_layers,
    parse_stack_name,
    split_layers,
    stack_name,
    unmount_layers,
)


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
    assert parse_layers("6:9") == [6, 7, 8, 9] and parse_layers("1, 3:4") == [1, 3, 4]
    for text in ("", "6-9", "9:6", "2,2", "x"):
        with pytest.raises(ValueError, match="layers must"):
            parse_layers(text)
    assert default_layers(16) == [*range(3, 12)] and default_layers(30) == [*range(6, 22)]


# --- Gemma 2 and its like: what attention writes is normalised before it is added -----------------------


def test_sandwich_norms_on_hugging_face():
    model = tiny_gemma2()
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
