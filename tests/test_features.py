"""Interpretable features against a naive heapq loop, on all backends; files, text of any kind, bad input."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from conftest import SENTENCES
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from test_contexts import HOSTILE, naive

from routesae_lens.analysis.evaluate import held_out_tokens
from routesae_lens.analysis.feature_set import FeatureSet, feature_count_curves
from routesae_lens.analysis.features import collect_features
from routesae_lens.models import BACKENDS, load_model
from routesae_lens.saes.architectures import RouteStandardSAE, RouteStandardSAEConfig
from routesae_lens.saes.crosscoder import CrosscoderTopKSAE, CrosscoderTopKSAEConfig

D_MODEL, D_SAE, LAYERS = 32, 48, [1, 2, 4]
THRESHOLD = 14.0


@torch.no_grad()
def route_sae(routing: str = "hard", **kwargs) -> RouteStandardSAE:
    torch.manual_seed(5)
    if routing == "fixed":
        kwargs["fixed_layer"] = 2
    cfg = RouteStandardSAEConfig(
        d_in=len(LAYERS) * D_MODEL, d_sae=D_SAE, layers=LAYERS, routing=routing, **kwargs
    )
    sae = RouteStandardSAE(cfg)
    if hasattr(sae, "W_router"):
        sae.W_router.mul_(0.3)  # p well below 1
    sae.W_enc.normal_(0, 0.3)
    sae.b_enc.normal_(-0.5, 0.2)
    return sae


@torch.no_grad()
def plain_sae(**kwargs) -> StandardSAE:
    torch.manual_seed(6)
    metadata = SAEMetadata(hook_name="blocks.4.hook_resid_post")
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, **kwargs))
    sae.W_enc.normal_(0, 0.3)
    sae.b_enc.normal_(-0.2, 0.1)
    return sae


def crosscoder() -> CrosscoderTopKSAE:
    torch.manual_seed(7)
    return CrosscoderTopKSAE(
        CrosscoderTopKSAEConfig(d_in=len(LAYERS) * D_MODEL, d_sae=D_SAE, k=12, layers=LAYERS)
    )


@pytest.fixture
def proxy(tiny_proxy):
    return tiny_proxy


@pytest.fixture
def tokens(tiny_proxy) -> torch.Tensor:
    return held_out_tokens(tiny_proxy, list(SENTENCES) * 2, n_sequences=9, context_size=24)


def collect(saes, model, tokens, **options):
    options = {"threshold": THRESHOLD, "progress": False, **options}
    return collect_features(saes, model, tokens, **options)


# --- the whole collection on a tiny model


@torch.no_grad()
def activations(sae, model, tokens):
    """Strengths (relative), activations in units of p = 1 and blocks of the kept tokens, by hand."""
    _, cache = model.run_with_cache(tokens)
    keep = tokens != 0
    keep[:, 0] = False
    if hasattr(sae, "route"):
        route = sae.route(torch.cat([cache[f"model.layers.{i}"] for i in LAYERS], -1))
        latents = sae.encode_routed(route.input)[keep].double() / route.scale[keep].double()[:, None]
        read = route.input[keep].double() / route.scale[keep].double()[:, None]
        layer = torch.tensor(LAYERS)[route.layer[keep]]
    else:
        x = cache["model.layers.4"][keep]
        latents, read, layer = sae.encode(x).double(), x.double(), torch.full((len(x),), 4)
    return latents * 2048**0.5 / read.norm(dim=-1, keepdim=True), latents, layer, keep


@pytest.mark.parametrize("make", [route_sae, plain_sae, lambda: route_sae("soft")])
def test_the_collection_equals_the_naive_one(proxy, tokens, make):
    sae = make()
    strength, latents, layer, keep = activations(sae, proxy, tokens)
    result = collect({"x": sae}, proxy, tokens, batch_size=2, max_contexts=None)["x"]
    text = [proxy.tokenizer.decode([i]).strip().lower() for i in tokens[keep].tolist()]
    expected = naive(strength.tolist(), text, THRESHOLD)
    assert 3 < len(expected) < D_SAE  # neither nothing nor everything
    assert [f.id for f in result.features] == list(expected)
    sequence, position = keep.nonzero(as_tuple=True)
    for feature in result.features:
        kept = expected[feature.id]
        places = [(int(sequence[t]), int(position[t])) for t, _ in kept]
        assert [(c.sequence, c.position) for c in feature.contexts] == places
        assert [c.strength for c in feature.contexts] == pytest.approx([s for _, s in kept], rel=1e-4)
        assert [c.activation for c in feature.contexts] == pytest.approx(
            [latents[t, feature.id].item() for t, _ in kept], rel=1e-4
        )
        assert [c.token_class for c in feature.contexts] == [text[t] for t, _ in kept]
        assert [c.block for c in feature.contexts] == [int(layer[t]) for t, _ in kept]
        mine = latents[:, feature.id]
        assert feature.max_activation == pytest.approx(mine.max().item(), rel=1e-4)
        assert feature.firing_frequency == pytest.approx((mine > 0).double().mean().item())
        for block, activity in feature.blocks.items():
            here = (layer == block) & (mine > 0)
            assert activity.active == int(here.sum())
            assert activity.above == int((here & (strength[:, feature.id] > THRESHOLD)).sum())
            if activity.active:
                assert activity.mean_activation == pytest.approx(mine[here].mean().item(), rel=1e-4)
    assert result.tokens == int(keep.sum()) == sum(result.layer_tokens.values())


@pytest.mark.parametrize("options", [{}, {"max_token_classes": 8, "min_contexts": 5}])
def test_a_curve_equals_separate_runs(proxy, tokens, options):
    options = {"context_tokens": 1, "max_contexts": 6, **options}
    saes = {"routed": route_sae(), "plain": plain_sae()}
    thresholds = [8, 11.5, 14.0, 18, 25]
    once = collect(saes, proxy, tokens, collect_above=8, **options)
    curves = feature_count_curves(once, thresholds)
    assert list(curves.columns) == ["sae", "threshold", "count"]
    counts = []
    for threshold in thresholds:
        alone = collect(saes, proxy, tokens, threshold=threshold, **options)
        for name in saes:
            counts.append((name, threshold, alone[name].count()))
            if threshold >= THRESHOLD:
                at = once[name].features_at(threshold)
                assert [f.id for f in at] == [f.id for f in alone[name].features]
                assert [f.contexts for f in at] == [f.contexts for f in alone[name].features]
    found = set(curves.itertuples(index=False, name=None))
    assert found == set(counts) and len({count for *_, count in counts}) > 4


@pytest.mark.parametrize("routing", ["hard", "fixed"])
def test_the_size_of_a_batch_does_not_matter(proxy, tokens, routing):
    one, four, all_ = (
        collect({"x": route_sae(routing)}, proxy, tokens, batch_size=n)["x"] for n in (1, 4, 9)
    )
    for other in (four, all_):
        same_features(one, other)


def same_features(a: FeatureSet, b: FeatureSet) -> None:
    assert len(a.features) > 3
    assert [f.id for f in a.features] == [f.id for f in b.features]
    for x, y in zip(a.features, b.features, strict=True):
        assert [(c.before, c.token, c.after, c.block, c.sequence, c.position) for c in x.contexts] == [
            (c.before, c.token, c.after, c.block, c.sequence, c.position) for c in y.contexts
        ]
        assert [c.strength for c in x.contexts] == pytest.approx([c.strength for c in y.contexts], rel=1e-3)
        assert {i: (n.active, n.above) for i, n in x.blocks.items()} == {
            i: (n.active, n.above) for i, n in y.blocks.items()
        }


def test_every_backend_gives_the_same_features(tiny_llama_dir, tokens):
    saes = {"routed": route_sae(), "plain": plain_sae()}
    results = [collect(saes, load_model(tiny_llama_dir, backend, "cpu"), tokens) for backend in BACKENDS]
    for name in saes:
        same_features(results[0][name], results[1][name])
        same_features(results[0][name], results[2][name])


def test_a_raw_threshold_is_the_scaled_relative_one_where_inputs_have_one_norm(proxy, tokens):
    sae = route_sae()
    relative = collect({"x": sae}, proxy, tokens)["x"]
    raw = collect({"x": sae}, proxy, tokens, threshold=THRESHOLD * (31 / 2048) ** 0.5, relative=False)["x"]
    assert [f.id for f in relative.features] == [f.id for f in raw.features] != []
    context = raw.features[0].contexts[0]
    assert context.strength == context.activation
    assert relative.features[0].contexts[0].strength == pytest.approx(
        context.activation * (2048 / 31) ** 0.5, rel=1e-4
    )


def test_an_sae_that_normalises_its_input_is_measured_by_what_it_encodes(proxy, tokens):
    result = collect({"x": plain_sae(normalize_activations="layer_norm")}, proxy, tokens)["x"]
    context = result.features[0].contexts[0]
    assert context.strength == pytest.approx(context.activation * (2048 / 31) ** 0.5, rel=1e-3)


def test_a_smaller_p_does_not_change_what_counts(proxy, tokens):
    """Without biases the latents of a RouteSAE are proportional to p."""
    sharp, flat = route_sae(), route_sae()
    with torch.no_grad():
        for sae in (sharp, flat):
            sae.b_enc.zero_()
            sae.b_dec.zero_()
        sharp.W_router.mul_(20)
    a, b = collect({"sharp": sharp, "flat": flat}, proxy, tokens).values()
    assert a.features[0].contexts[0].p > 0.9 and b.features[0].contexts[0].p < 0.7
    same_features(a, b)


def test_crosscoders_have_no_block_but_decoder_norms(proxy, tokens):
    sae = crosscoder()
    with torch.no_grad():
        sae.W_enc.mul_(20)
    result = collect({"x": sae}, proxy, tokens)["x"]
    feature = result.features[0]
    assert feature.blocks == {} == result.layer_tokens and feature.contexts[0].block is None
    assert feature.contexts[0].p is None
    norms = sae.decoder_norms()[:, feature.id].tolist()
    assert feature.decoder_norms == pytest.approx(dict(zip(LAYERS, norms, strict=True)))
    for context in feature.contexts:  # relative to the norm of one layer
        assert context.strength == pytest.approx(context.activation * (2048 / 31) ** 0.5)


def test_fewer_contexts_are_shown_than_counted(proxy, tokens):
    sae = route_sae()
    all_, few = (collect({"x": sae}, proxy, tokens, max_contexts=n, collect_above=5)["x"] for n in (None, 4))
    thresholds = [5, 10, 14, 20]
    assert all_.curve(thresholds) == few.curve(thresholds)
    assert max(len(f.contexts) for f in all_.features) > 4
    assert [f.contexts[:4] for f in all_.features] == [f.contexts for f in few.features]


# --- files


@pytest.mark.parametrize("name", ["features.json", "features.json.gz"])
def test_round_trip(proxy, tokens, tmp_path, name):
    saved = collect({"x": route_sae(), "cc": crosscoder()}, proxy, tokens, threshold=6)
    for key, features in saved.items():
        path = tmp_path / key / name
        path.parent.mkdir()
        features.save(path)
        loaded = FeatureSet.load(path)
        assert loaded.features == features.features
        assert (loaded.rule, loaded.name, loaded.tokens) == (features.rule, key, features.tokens)
        assert loaded.layer_tokens == features.layer_tokens
        for vector in ("firing_frequency", "max_activation", "retained_below", "crowded_below"):
            assert torch.equal(getattr(loaded, vector), getattr(features, vector))
        assert loaded.curve([2, 6, 9]) == features.curve([2, 6, 9])
        assert [p.name for p in path.parent.iterdir()] == [name]
        assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    assert saved["x"].features


def test_hostile_text_is_plain_ascii_in_the_file(proxy, tokens, tmp_path):
    features = collect({"x": route_sae()}, proxy, tokens)["x"]
    contexts = features.candidates[0].contexts
    contexts[0] = contexts[0]._replace(before=HOSTILE)
    features.save(tmp_path / "f.json")
    assert (tmp_path / "f.json").read_bytes().isascii()
    assert FeatureSet.load(tmp_path / "f.json").features[0].contexts[0].before == HOSTILE


def test_a_save_that_fails_leaves_the_old_file(proxy, tokens, tmp_path, monkeypatch):
    features = collect({"x": route_sae()}, proxy, tokens)["x"]
    path = tmp_path / "f.json"
    features.save(path)
    before = path.read_bytes()

    def no_space(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    with pytest.raises(OSError, match="no space"):
        features.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_files_that_are_none(proxy, tokens, tmp_path):
    path = tmp_path / "f.json"
    with pytest.raises(FileNotFoundError):
        FeatureSet.load(path)
    features = collect({"x": route_sae()}, proxy, tokens)["x"]
    features.save(path)
    good = json.loads(path.read_bytes())
    text = json.dumps(good).encode()

    def flipped(text: bytes) -> bytes:
        packed = bytearray(gzip.compress(text))
        packed[len(packed) // 2] ^= 0xFF
        return bytes(packed)

    for content in (b"", b"\xff\x00", text[:-20], gzip.compress(text)[:-20], b"\x1f\x8bxx", flipped(text)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"f\.json is no file of features"):
            FeatureSet.load(path)
    for content in ([], 3, {"format": "other"}, {**good, "format": "routesae_lens.features/99"}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="expected format"):
            FeatureSet.load(path)
    damages = [
        {"rule": None},
        {"rule": {"threshold": -1}},
        {"max_activation": [1.0]},
        {"max_activation": "x"},
        {"candidates": [{"id": 1}]},
        {"candidates": [{**good["candidates"][0], "id": 10**6}]},
        {"candidates": [{**good["candidates"][0], "id": 3.5}]},
        {"candidates": good["candidates"][:1] * 2},
        {"layer_tokens": {"x": 3}},
    ]
    for damage in damages:
        path.write_text(json.dumps({**good, **damage}))
        with pytest.raises(ValueError, match="damaged file of features"):
            FeatureSet.load(path)
    del good["tokens"]
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=r"damaged.*tokens"):
        FeatureSet.load(path)


# --- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": 0}, "threshold must be a positive number, got 0"),
        ({"threshold": float("nan")}, "threshold must be a positive number, got nan"),
        ({"threshold": float("inf")}, "threshold must be a positive"),
        ({"collect_above": 20}, "collect_above must be between 0 and the threshold 14.0, got 20"),
        ({"collect_above": -1}, "collect_above"),
        ({"contexts_per_token": 0}, "contexts_per_token must be an integer of 1 or more, got 0"),
        ({"min_contexts": -3}, "min_contexts"),
        ({"max_token_classes": 0}, "max_token_classes"),
        ({"max_contexts": 3}, "max_contexts must be at least min_contexts = 4, got 3"),
        ({"context_tokens": 0}, "context_tokens"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ],
)
def test_bad_options(proxy, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        collect({"x": plain_sae()}, proxy, tokens, **options)


def test_bad_saes_and_models(proxy, tokens, tiny_hooked, monkeypatch):
    with pytest.raises(ValueError, match="no SAEs"):
        collect({}, proxy, tokens)
    with pytest.raises(ValueError, match="no tokenizer"):
        collect({"x": plain_sae()}, tiny_hooked, tokens)
    with pytest.raises(ValueError, match="'all' encodes every layer"):
        collect({"x": plain_sae(), "all": route_sae("every")}, proxy, tokens)
    with pytest.raises(ValueError, match="nothing to read"):
        collect({"x": plain_sae()}, proxy, torch.zeros(2, 4, dtype=torch.long))
    sae = plain_sae()
    with torch.no_grad():
        sae.W_enc.fill_(3e38)
    with pytest.raises(ValueError, match="'big' has activations that are not finite"):
        collect({"big": sae}, proxy, tokens)


def test_an_sae_that_never_fires_has_no_features(proxy, tokens, tmp_path):
    sae = TopKSAE(
        TopKSAEConfig(
            d_in=D_MODEL, d_sae=D_SAE, k=4, metadata=SAEMetadata(hook_name="blocks.4.hook_resid_post")
        )
    )
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    result = collect({"x": sae}, proxy, tokens)["x"]
    assert result.count() == 0 and result.features == [] and result.curve([5, 50]) == [0, 0]
    result.save(tmp_path / "none.json")
    assert FeatureSet.load(tmp_path / "none.json").features == []
