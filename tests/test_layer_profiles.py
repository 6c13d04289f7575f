"""Layer profiles: naive loops over a tiny model, and the choice of features."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from alike import assert_alike
from spliced import make_sae, ordinary_sae

from routesae_lens.analysis.layer_profiles import LayerProfiles, _earliest_and_latest, layer_profiles
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.saes.crosscoder import CrosscoderTopKSAE, CrosscoderTopKSAEConfig
from routesae_lens.saes.layers import standardize

BLOCKS = [1, 2, 4]


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))


def activations(sae: Any, model: Any, tokens: torch.Tensor, layers: list[int]) -> torch.Tensor:
    """Kept tokens' activations by another way: (layer, token, d_sae)."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        return torch.stack(
            [
                sae.encode_routed(standardize(cache[f"blocks.{i}.hook_resid_post"][:, 1:].flatten(0, 1)).x)
                for i in layers
            ]
        )


@pytest.mark.parametrize("layers", [None, [0, 1, 5]])
def test_profiles_against_a_naive_loop(tiny_hooked, tokens, layers):
    sae = make_sae()
    result = layer_profiles(sae, tiny_hooked, tokens, range(48), layers=layers, batch_size=2, progress=False)
    assert result.layers == (layers or BLOCKS) and result.tokens == 55
    assert (result.features, result.low, result.high) == (list(range(48)), [], [])
    acts = activations(sae, tiny_hooked, tokens, result.layers)
    for feature in range(48):
        of_layers = acts[:, :, feature]
        on = [t for t in range(55) if any(of_layers[i, t] > 0 for i in range(3))]
        assert result.active_tokens[feature] == len(on)
        means = [sum(float(of_layers[i, t]) for t in on) / max(len(on), 1) for i in range(3)]
        assert result.mean_activation[feature] == pytest.approx(means, rel=1e-4, abs=1e-6)
        if on:
            assert result.profile[feature] == pytest.approx([m / max(means) for m in means], rel=1e-4)
            assert result.peak[feature] == result.layers[means.index(max(means))]
        else:
            assert result.profile[feature] == [0, 0, 0] and result.peak[feature] is None
    assert 0 in result.active_tokens and max(result.active_tokens) > 20


def test_negative_latents_are_not_activations(tiny_hooked, tokens):
    sae = make_sae(relu=False, k=32)  # more than are positive
    result = layer_profiles(sae, tiny_hooked, tokens, range(48), progress=False)
    acts = activations(sae, tiny_hooked, tokens, BLOCKS)
    assert (acts < 0).any()
    assert result.active_tokens == (acts > 0).any(0).sum(0).tolist()
    sums = acts.clamp_min(0).double().sum(1).T / torch.tensor(result.active_tokens)[:, None].clamp_min(1)
    torch.testing.assert_close(torch.tensor(result.mean_activation).double(), sums, rtol=1e-4, atol=1e-6)


def test_learned_factors_of_layers_are_applied_and_undone(tiny_hooked, tokens):
    sae = make_sae(layer_scale=True)
    with torch.no_grad():
        sae.router_log_scale.copy_(torch.tensor([0.5, 2.0, 0.25]).log())
    result = layer_profiles(sae, tiny_hooked, tokens, range(48), layers=[0, 2, 4], progress=False)
    with torch.no_grad():
        _, cache = tiny_hooked.run_with_cache(tokens)
        z = [standardize(cache[f"blocks.{i}.hook_resid_post"][:, 1:].flatten(0, 1)).x for i in (0, 2, 4)]
        acts = [sae.encode_routed(x * f) / f for x, f in zip(z, (1.0, 2.0, 0.25), strict=True)]
    sums = torch.stack(acts).double().sum(1).T / torch.tensor(result.active_tokens)[:, None].clamp_min(1)
    torch.testing.assert_close(torch.tensor(result.mean_activation).double(), sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rescale", [False, True])
def test_crosscoder_profiles_are_what_features_write(tiny_hooked, tokens, rescale):
    torch.manual_seed(0)
    cfg = CrosscoderTopKSAEConfig(
        d_in=96, d_sae=48, k=12, layers=BLOCKS, rescale_acts_by_decoder_norm=rescale
    )
    sae = CrosscoderTopKSAE(cfg)
    with torch.no_grad():
        sae.W_enc.normal_(std=0.2)
        sae.W_dec.normal_(std=0.2).mul_(torch.rand(48, 1) + 0.5)
    point = sae.mount(tiny_hooked)
    features = [0, 7, 30, 41]
    result = layer_profiles(sae, tiny_hooked, tokens, features, batch_size=2, progress=False)
    with torch.no_grad():
        stack = tiny_hooked.run_with_cache(tokens, names_filter=[point])[1][point][:, 1:].flatten(0, 1)
        acts = sae.encode(stack)
        nothing = sae.decode_layers(torch.zeros(1, 48))
        for row, feature in enumerate(features):
            on = acts[:, feature] > 0
            assert result.active_tokens[row] == on.sum()
            alone = torch.zeros_like(acts)
            alone[:, feature] = acts[:, feature]
            written = (sae.decode_layers(alone) - nothing)[on].norm(dim=-1).mean(0)
            assert result.mean_activation[row] == pytest.approx(written.tolist(), rel=1e-4)
            norms = sae.decoder_norms()[:, feature]
            assert result.profile[row] == pytest.approx((norms / norms.max()).tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="reads all of its own layers"):
        layer_profiles(sae, tiny_hooked, tokens, layers=[1, 2])


def test_earliest_and_latest_features():
    mean = torch.tensor(
        [  # layers down, features across
            [9.0, 5.0, 1.0, 0.0, 9.0, 2.0],
            [1.0, 3.0, 9.0, 1.0, 0.0, 8.0],
            [0.0, 4.0, 8.0, 9.0, 0.0, 1.0],
        ]
    ).double()
    active = torch.tensor([10, 10, 12, 10, 9, 30])
    # Peaks: 0, 0, 1, 2, (too rare), 1; the centre of mass decides between 0 and 1, and between 5 and 2.
    assert _earliest_and_latest(mean, active, 2, 10) == ([0, 1], [3, 2])
    assert _earliest_and_latest(mean, active, 1, 9) == ([4], [3])
    assert _earliest_and_latest(mean, active, 9, 11) == ([5], [2])  # never a feature on both sides
    with pytest.raises(ValueError, match=r"1 features are active on at least 13 .*the most active one on 30"):
        _earliest_and_latest(mean, active, 2, 13)


def test_the_choice_of_features(tiny_hooked, tokens):
    sae = make_sae()
    every = layer_profiles(sae, tiny_hooked, tokens, range(48), progress=False)
    chosen = layer_profiles(sae, tiny_hooked, tokens, n_each=2, min_tokens=8, progress=False)
    assert chosen.features == chosen.low + chosen.high and len(chosen.low) == len(chosen.high) == 2
    assert chosen.profile == [every.profile[feature] for feature in chosen.features]
    assert min(chosen.active_tokens) >= 8
    frequent = [feature for feature in range(48) if every.active_tokens[feature] >= 8]
    peaks = sorted(every.peak[feature] for feature in frequent)
    assert [every.peak[feature] for feature in chosen.low] == peaks[:2]
    assert [every.peak[feature] for feature in chosen.high] == peaks[:-3:-1]
    assert peaks[0] < peaks[-1]


def test_bad_profile_arguments(tiny_hooked, tokens):
    sae = make_sae()
    with pytest.raises(ValueError, match="expected a RouteSAE or a Crosscoder, got StandardSAE"):
        layer_profiles(ordinary_sae("blocks.5.hook_resid_post"), tiny_hooked, tokens)
    for features in ([], [48], [-1, 3]):
        with pytest.raises(ValueError, match="non-empty list of latents 0 to 47"):
            layer_profiles(sae, tiny_hooked, tokens, features)
    with pytest.raises(ValueError, match="n_each and min_tokens must be 1 or more, got 0 and 10"):
        layer_profiles(sae, tiny_hooked, tokens, n_each=0)
    with pytest.raises(ValueError, match="between 0 and 5"):
        layer_profiles(sae, tiny_hooked, tokens, layers=[2, 6])
    with pytest.raises(ValueError, match="features are active on at least 1000"):
        layer_profiles(sae, tiny_hooked, tokens, min_tokens=1000, progress=False)


def test_equal_profiles_on_every_backend(tiny_llama_dir, tokens):
    loaded = [load_model(tiny_llama_dir, backend, device="cpu") for backend in BACKENDS]
    first, *others = (
        layer_profiles(make_sae(), model, tokens, range(48), progress=False) for model in loaded
    )
    assert len(others) == 2 and max(first.active_tokens) > 20
    for other in others:
        assert_alike(first.to_dict(), other.to_dict(), 1e-3)


def test_batch_size_does_not_matter_to_profiles(tiny_proxy, tokens):
    one, five = (
        layer_profiles(
            make_sae(), tiny_proxy, tokens, min_tokens=2, batch_size=size, progress=False
        ).to_dict()
        for size in (1, 5)
    )
    assert_alike(one, five, 1e-5)


def test_profiles_to_json_and_back(tiny_proxy, tokens):
    profiles = layer_profiles(make_sae(), tiny_proxy, tokens, [3, 4], progress=False)
    assert LayerProfiles.from_dict(json.loads(json.dumps(profiles.to_dict(), allow_nan=False))) == profiles
