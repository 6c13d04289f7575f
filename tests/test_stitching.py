"""SAE stitching: who is novel, the SAEs between two SAEs, and what was measured on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from routed_saes import make, stacks
from sae_lens import SAE, JumpReLUSAE
from stitchable import D_MODEL, HOOK, activations, planted, sae, same_router

from routesae_lens.analysis import geometry
from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.analysis.latent_split import LatentGroup, split_latents
from routesae_lens.analysis.stitched_sae import Stitching
from routesae_lens.analysis.stitching import stitch
from routesae_lens.report.stitching_plots import plot_stitching
from routesae_lens.saes.forms import inference_form

TOKENS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))

# --- Novel and reconstruction latents -------------------------------------------------------------------


def test_a_planted_pair_is_split_exactly():
    split = split_latents(*planted(), progress=False)
    assert split.novel.tolist() == [1, 2, 6]
    assert split.reconstruction.tolist() == [0, 3, 5, 7]
    assert split.groups == (
        LatentGroup((0,), (3,)),
        LatentGroup((1,), (0, 7)),
        LatentGroup((2, 3), (5,)),
    )
    assert split.unmatched.tolist() == [4]
    assert [one.tolist() for one in split.without_direction] == [[5], [4]]
    assert split.widths == (6, 8)
    assert split.large.latents[[0, 3, 7]].tolist() == [1, 0, 1]
    torch.testing.assert_close(split.large.cosines[[0, 3, 5]], torch.tensor([0.9, 1.0, 0.5**0.5]))
    torch.testing.assert_close(split.small.cosines[:3], torch.tensor([1.0, 0.9, 0.5**0.5]))


def test_a_higher_threshold_tears_groups_apart():
    split = split_latents(*planted(), threshold=0.8, progress=False)
    assert split.groups == (LatentGroup((0,), (3,)), LatentGroup((1,), (0, 7)))
    assert split.novel.tolist() == [1, 2, 5, 6] and split.unmatched.tolist() == [2, 3, 4]


def test_every_pair_joins_and_not_the_best_match_alone():
    """(e0 + e1) / sqrt 2 is as similar to both; a chain of such rows is one component."""
    e = torch.eye(4)
    split = split_latents(e[:3], torch.stack([e[0] + e[1], e[1] + 0.99 * e[2]]), progress=False)
    assert split.groups == (LatentGroup((0, 1, 2), (0, 1)),)


def test_a_cosine_equal_to_the_threshold_is_a_reconstruction():
    split = split_latents(torch.eye(4)[:1], torch.ones(1, 4), threshold=0.5, progress=False)
    assert split.novel.tolist() == [] and split.groups == (LatentGroup((0,), (0,)),)


def test_a_split_is_ready_for_json():
    data = json.loads(json.dumps(split_latents(*planted(), progress=False).to_dict(), allow_nan=False))
    assert data["novel"] == [1, 2, 6] and data["groups"][1] == {"small": [1], "large": [0, 7]}
    assert data["best"]["large"]["latents"][4] == -1
    assert "3 are novel and 4 reconstruct" in str(split_latents(*planted(), progress=False))


def test_blocks_of_cosines_give_what_all_of_them_at_once_give(monkeypatch: pytest.MonkeyPatch):
    rows = [torch.randn(n, 4, generator=torch.Generator().manual_seed(n)) for n in (13, 31)]
    monkeypatch.setattr(geometry, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(geometry, "COLUMNS_AT_ONCE", 3)
    found = geometry.pairs_from(*rows, 0.6, progress=False)
    cosines = torch.cosine_similarity(rows[0][:, None], rows[1], dim=-1)
    expected = (cosines >= 0.6).nonzero().tolist()
    assert 20 < len(expected) < 200
    assert sorted(zip(found.rows.tolist(), found.columns.tolist(), strict=True)) == [*map(tuple, expected)]
    split = split_latents(*rows, threshold=0.6, progress=False)
    assert split.novel.tolist() == (cosines.amax(0) < 0.6).nonzero().squeeze(-1).tolist()
    assert split.unmatched.tolist() == (cosines.amax(1) < 0.6).nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.01, "0.7"])
def test_a_threshold_must_be_a_cosine_above_0(threshold: Any, unchecked: None):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        split_latents(*planted(), threshold=threshold, progress=False)


def test_dictionaries_of_different_spaces_have_no_split(unchecked: None):
    with pytest.raises(ValueError, match="rows of 32 and of 16 numbers have no cosine"):
        split_latents(torch.eye(16), torch.eye(32), progress=False)
    both = (sae("crosscoder_topk", 8, 1, k=2, d_in=64, layers=layers) for layers in ([1, 2], [1, 4]))
    with pytest.raises(ValueError, match=r"layers \[1, 2\] and \[1, 4\] write different spaces"):
        split_latents(*both, progress=False)


# --- The SAEs between ------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "relu, b_dec subtracted": ("standard", "standard", {}, {}),
    "relu to jumprelu": ("standard", "jumprelu", {"apply_b_dec_to_input": False}, {}),
    "jumprelu": ("jumprelu", "jumprelu", {}, {"apply_b_dec_to_input": False}),
    "layer norm": ("jumprelu", "standard", *[{"normalize_activations": "layer_norm"}] * 2),
    "routed": ("route_jumprelu", "route_standard", {}, {}),
    "routed, mixed": ("route_standard", "route_jumprelu", *[{"routing": "soft"}] * 2),
    "one layer": ("route_standard", "route_jumprelu", *[{"layers": [2]}] * 2),
}


def pair(name: str, dtype: str = "float64") -> tuple[Any, Any, torch.Tensor]:
    """Two random SAEs, and activations for both."""
    small, large, ours, theirs = PAIRS[name]
    one = sae(small, 20, 1, dtype=dtype, **ours)
    other = sae(large, 44, 2, dtype=dtype, **theirs)
    if hasattr(one, "W_router") and one.cfg.n_layers > 1:
        same_router(other, one)
    return one, other, activations(2, 25, d=one.cfg.d_in, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_step_is_the_small_sae_and_the_last_the_large(name: str):
    small, large, x = pair(name)
    way = Stitching(small, large, threshold=0.3, progress=False)
    assert {move.phase for move in way.moves} == {"insert", "swap", "rest"}  # so that all are walked through
    for n, whole in ((0, small), (len(way), large)):
        end = way.sae(n)
        assert end.cfg.d_sae == whole.cfg.d_sae
        torch.testing.assert_close(end(x), whole(x), rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(
            end.encode(x), whole.encode(x) * whole.W_dec.norm(dim=-1), rtol=1e-10, atol=1e-11
        )
    assert (small.W_dec.norm(dim=-1) - 1).abs().min() > 1e-3  # neither was changed


@pytest.mark.parametrize("name", PAIRS)
def test_a_step_between_is_the_sum_of_its_latents(name: str):
    small, large, x = pair(name)
    way = Stitching(small, large, threshold=0.3, progress=False)
    n = way.phase_ends["insert"] + 2
    ours, theirs = way.latents(n)
    assert 0 < len(ours) < 20 and 0 < len(theirs) < 44
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    share = 1 - len(ours) / 20
    out = (1 - share) * small.b_dec + share * large.b_dec
    for one, latents in ((small, ours), (large, theirs)):
        out = out + one.encode(x)[..., latents] @ one.W_dec[latents]
        normalised = one.cfg.normalize_activations == "layer_norm"
    if normalised:
        out = out * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    torch.testing.assert_close(way.sae(n)(x), out, rtol=1e-9, atol=1e-10)


def test_moves_insert_the_novel_swap_the_groups_and_exchange_the_rest():
    small, large = sae("standard", 6, 1), sae("jumprelu", 8, 2)
    with torch.no_grad():
        for one, rows in zip((small, large), planted(), strict=True):
            one.W_dec.copy_(rows)
    way = Stitching(small, large, order="similarity", progress=False)
    assert [move.phase for move in way.moves] == ["insert"] * 3 + ["swap"] * 3 + ["rest"] * 3
    assert {move.large for move in way.moves[:3]} == {(1,), (2,), (6,)}
    assert [(move.small, move.large) for move in way.moves[3:]] == [
        ((0,), (3,)),
        ((1,), (0, 7)),
        ((2, 3), (5,)),
        ((4,), ()),
        ((5,), ()),
        ((), (4,)),
    ]
    assert way.phase_ends == {"insert": 3, "swap": 6, "rest": 9}
    assert way.latents(5) == ([2, 3, 4, 5], [0, 1, 2, 3, 6, 7])
    torch.testing.assert_close(way.sae(3).b_dec, small.b_dec, rtol=0, atol=0)
    stitched = way.sae(5).cfg.metadata.stitched
    assert stitched["phase"] == "swap" and stitched["share_of_large_b_dec"] == pytest.approx(1 / 3)
    only = Stitching(small, large, swap=False, progress=False)
    assert len(only) == 3 and only.latents(3) == (list(range(6)), [1, 2, 6])


def test_the_random_order_is_the_seeds():
    small, large, _ = pair("jumprelu")
    first, again, other = (Stitching(small, large, seed=seed, progress=False).moves for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(map(repr, first)) == sorted(map(repr, other))


@pytest.mark.parametrize("name", ["relu to jumprelu", "layer norm", "routed"])
def test_every_step_saves_and_loads_through_saelens(name: str, tmp_path: Path):
    small, large, x = pair(name, "float32")
    way = Stitching(small, large, threshold=0.3, progress=False)
    for n in range(0, len(way) + 1, 9):
        step = way.sae(n)
        step.save_model(tmp_path / str(n))
        loaded = SAE.load_from_disk(tmp_path / str(n))
        assert type(loaded) is type(step) and isinstance(loaded, JumpReLUSAE)
        assert loaded.cfg.metadata.hook_name == small.cfg.metadata.hook_name
        assert loaded.cfg.metadata.stitched["move"] == n
        torch.testing.assert_close(loaded(x), step(x), rtol=0, atol=0)


def test_training_saes_are_taken_in_their_inference_form():
    """BatchTopK becomes JumpReLU there, as SAELens does it."""
    small, large = (make("batchtopk", seed, layers=[2]) for seed in (0, 1))
    way = Stitching(small, large, threshold=0.5, progress=False)
    x = stacks(40, n_layers=1)
    torch.testing.assert_close(way.sae(0)(x), inference_form(small)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(way.sae(len(way))(x), inference_form(large)(x), rtol=1e-4, atol=1e-5)


def test_bfloat16_saes_are_stitched_in_float32():
    small, large, x = pair("relu to jumprelu", "bfloat16")
    step = Stitching(small, large, threshold=0.3, progress=False).sae(3)
    assert step.W_enc.dtype == torch.float32 and step.cfg.dtype == "float32"
    assert step(x.float()).dtype == torch.float32


# --- What was measured on the way ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu to jumprelu", "layer norm", "routed", "routed, mixed"])
def test_activations_give_what_the_model_gives(name: str, tiny_hooked: Any):
    small, large, _ = pair(name, "float32")
    found = stitch(small, large, tiny_hooked, TOKENS, threshold=0.3, steps=4, at_once=3, progress=False)
    ends = evaluate_all({"small": small, "large": large}, tiny_hooked, TOKENS, progress=False)
    raw = [] if "mixed" in name else ["mse"]
    for step, one in ((found.steps[0], ends["small"]), (found.steps[-1], ends["large"])):
        for measure in ("l0", "norm_mse", *raw, "explained_variance", "kl", "delta_ce"):
            assert getattr(step, measure) == pytest.approx(getattr(one, measure), rel=1e-4, abs=1e-6), measure
    point = small.mount(tiny_hooked) if hasattr(small, "mount") else HOOK
    with torch.no_grad():
        stack = tiny_hooked.run_with_cache(TOKENS, names_filter=point)[1][point][:, 1:]
    alone = stitch(small, large, activations=stack, threshold=0.3, steps=4, progress=False)
    assert alone.tokens == found.tokens == 3 * 11
    assert [step.move for step in alone.steps] == [step.move for step in found.steps]
    for step, one in zip(alone.steps, found.steps, strict=True):
        assert step.kl is None and step.l0 == pytest.approx(one.l0)
        assert step.norm_mse == pytest.approx(one.norm_mse, rel=1e-4)
        assert step.mse == (pytest.approx(one.mse, rel=1e-4) if raw else None)
        assert step.explained_variance == pytest.approx(one.explained_variance, rel=1e-4)


def test_planted_novel_latents_lower_the_error_and_swapped_copies_keep_it():
    """Activations made of known directions: the larger SAE knows all of them, the smaller half of them."""
    basis = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(3)))[0]
    amounts = torch.rand(200, 12, generator=torch.Generator().manual_seed(4))
    amounts = amounts * (amounts > 0.6)
    x = amounts @ basis[:12]
    small, large = sae("standard", 6, 1), sae("standard", 12, 2)
    for one in (small, large):
        with torch.no_grad():
            one.W_dec.copy_(basis[: one.cfg.d_sae])
            one.W_enc.copy_(one.W_dec.T)
            one.b_dec.zero_()
            one.b_enc.fill_(-1e-5)  # so that what rounding leaves does not fire
    found = stitch(small, large, activations=x, steps=100, progress=False)
    assert found.novel == 6 and found.groups == 6 and found.unmatched == 0
    assert found.steps[0].mse == pytest.approx((x - small(x)).pow(2).sum(-1).mean().item(), rel=1e-5)
    errors = [step.norm_mse for step in found.steps]
    assert errors[:7] == sorted(errors[:7], reverse=True) and errors[6] < 1e-7 < errors[5]
    assert max(errors[6:]) < 1e-7  # copies are swapped for themselves
    assert [step.inserted for step in found.steps] == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6]
    assert [step.swapped for step in found.steps][6:] == [0, 1, 2, 3, 4, 5, 6]
    assert found.steps[-1].l0 == pytest.approx((amounts > 0).sum().item() / 200)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["steps"][3]["d_sae"] == 9 and data["widths"] == [6, 12] and "split" not in data


def test_the_plot_marks_the_phases(tmp_path: Path):
    small, large, x = pair("jumprelu", "float32")
    found = stitch(small, large, activations=x, threshold=0.3, steps=6, progress=False)
    written = plot_stitching(found, tmp_path / "way.svg").read_text()
    assert written.count("<svg") == 1
    with_kl = replace(found, steps=[replace(step, kl=0.1) for step in found.steps])
    assert len(plot_stitching(with_kl, tmp_path / "kl.svg").read_text()) > len(written)
    with pytest.raises(ValueError, match="written as"):
        plot_stitching(found, tmp_path / "way.gif")


def test_a_single_sequence_has_no_standard_error(tiny_hooked: Any):
    small, large, _ = pair("jumprelu", "float32")
    found = stitch(small, large, tiny_hooked, TOKENS[:1], threshold=0.3, steps=1, progress=False)
    assert found.steps[0].kl_stderr is None and (found.steps[0].kl or 0) > 0
    json.dumps(found.to_dict(), allow_nan=False)  # what the recipe writes


def test_the_title_counts_the_latents_at_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    titles: list[str] = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **_: titles.append(text))
    small, large, x = pair("jumprelu", "float32")
    for swap in (True, False):
        found = stitch(small, large, activations=x, threshold=0.3, swap=swap, steps=1, progress=False)
        plot_stitching(found, tmp_path / "way.svg")
    assert "20 latents (left)" in titles[0] and "(right, 44)" in titles[0]
    assert 0 < found.novel < 44 and f"(right, {20 + found.novel})" in titles[1]


# --- Bad input ------------------------------------------------------------------------------------------

BAD = {
    "topk": ("standard", "topk", {}, {"k": 4}, "to_jumprelu"),
    "routed topk": ("route_topk", "route_standard", {"k": 4}, {}, "to_jumprelu"),
    "crosscoder": (
        "crosscoder_topk",
        "standard",
        {"k": 4, "layers": [1, 2], "d_in": 64},
        {},
        "architectures that can: standard",
    ),
    "gated": ("gated", "standard", {}, {}, "GatedSAE .gated. cannot be stitched"),
    "width": ("standard", "standard", {}, {"d_in": 16}, "d_in: 32 and 16"),
    "normalisation": (
        "standard",
        "standard",
        {},
        {"normalize_activations": "layer_norm"},
        "normalize_activations: 'none' and 'layer_norm'",
    ),
    "an input scale": (
        "standard",
        "standard",
        *[{"normalize_activations": "expected_average_only_in"}] * 2,
        "fold it first",
    ),
    "routed and not": ("route_standard", "standard", {}, {}, "layer_view"),
    "layers": ("route_standard", "route_standard", {}, {"layers": [1, 2, 3]}, r"layers: \[1, 2, 4\]"),
    "standardisation": (
        "route_standard",
        "route_standard",
        {},
        {"standardize": False},
        "standardize: True and False",
    ),
    "rule": ("route_standard", "route_standard", {}, {"routing": "random"}, "routing: 'hard' and 'random'"),
    "router": ("route_standard", "route_standard", {}, {}, r"routers \(W_router\)"),
    "oracle": ("route_standard", "route_standard", *[{"routing": "oracle"}] * 2, "with_routing"),
}


@pytest.mark.parametrize("name", BAD)
def test_saes_that_do_not_fit_are_refused(name: str):
    small, large, ours, theirs, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        Stitching(sae(small, 8, 1, **ours), sae(large, 12, 2, **theirs), progress=False)


def test_saes_of_different_hooks_are_refused():
    small, large, _ = pair("jumprelu", "float32")
    large.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    with pytest.raises(ValueError, match=r"hook: .*blocks\.2.*blocks\.3"):
        Stitching(small, large, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "alphabetical"}, "unknown order 'alphabetical'; known: random, similarity"),
        ({"steps": 0}, "steps must be an integer, 1 or more; got 0"),
        ({"at_once": True}, "at_once must be an integer"),
        ({"activations": None}, "either a model and tokens, or activations"),
        ({"activations": torch.zeros(3, 7)}, r"shape \(token, 32\)"),
        ({"model": object()}, "either a model and tokens"),
        ({"batch_size": 2}, "batch_size go with a model"),
        (
            {"split": split_latents(torch.eye(4), torch.eye(4), progress=False)},
            r"split of SAEs with \(4, 4\)",
        ),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, unchecked: None):
    small, large, x = pair("jumprelu", "float32")
    with pytest.raises(ValueError, match=message):
        stitch(small, large, **{"activations": x, "progress": False, **options})


def test_a_split_of_other_saes_is_refused(unchecked: None):
    small, large, _ = pair("jumprelu", "float32")
    split = split_latents(small, large, progress=False)
    Stitching(small, large, split=split, progress=False)
    with pytest.raises(ValueError, match="a split of other SAEs"):
        Stitching(sae("jumprelu", 20, 9), large, split=split, progress=False)
    with pytest.raises(ValueError, match="what split_latents gives, got float"):
        Stitching(small, large, split=0.7, progress=False)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_refused():
    small, large, x = pair("jumprelu", "float32")
    x[0, 3, 1] = torch.nan
    with pytest.raises(ValueError, match="activations hold numbers that are not finite"):
        stitch(small, large, activations=x, progress=False)
    with torch.no_grad():
        large.b_enc[2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite weights: b_enc"):
        Stitching(small, large, progress=False)


def test_a_number_of_moves_beyond_the_last_is_refused():
    small, large, _ = pair("jumprelu", "float32")
    way = Stitching(small, large, progress=False)
    with pytest.raises(ValueError, match=f"from 0 to {len(way)}, got {len(way) + 1}"):
        way.sae(len(way) + 1)
