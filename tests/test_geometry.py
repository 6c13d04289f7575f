"""Feature geometry: cosines worked by hand and by a naive search, random dictionaries, planted splits, the map."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import crosscoders
import pytest
import routed_saes
import torch
from report_runs import context, feature, feature_set, write_interpretations, write_run
from sae_lens import TopKSAE, TopKSAEConfig
from torch.utils._python_dispatch import TorchDispatchMode

from routesae_lens.analysis import geometry
from routesae_lens.analysis.feature_map import FeatureMap, MapPoint, feature_map
from routesae_lens.analysis.geometry import (
    best_matches,
    cosine_bound,
    decoder_directions,
    nearest_across,
    nearest_within,
    random_dictionary,
)
from routesae_lens.analysis.match_distribution import (
    MatchDistribution,
    cumulative,
    feature_splitting,
    match_distribution,
)
from routesae_lens.report.contents import gather
from routesae_lens.report.geometry_plots import map_svg, matches_svg, save_figure
from routesae_lens.report.geometry_record import GeometryRecord
from routesae_lens.report.page import render

needs_umap = pytest.mark.skipif(
    importlib.util.find_spec("umap") is None, reason="umap-learn is not installed: no map was made"
)
E = torch.eye(3)


def at(cosine: float) -> int:
    """Index of a cosine in a distribution's lists."""
    return round((cosine + 1) * 200)


def naive(W_from: torch.Tensor, W_to: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(W_from[:, None].double(), W_to[None].double(), dim=-1)


# Neighbours


def test_neighbours_worked_by_hand():
    # Directions at 0, 30, 90 and 170 degrees, of norms that must not matter.
    angles = torch.tensor([0.0, 30.0, 90.0, 170.0]).deg2rad()
    W_dec = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [50.0], [0.01], [3.0]])
    found = nearest_within(W_dec, 2)
    assert found.latents.tolist() == [[1, 2], [0, 2], [1, 3], [2, 1]]
    # cosines of 30, 60, 80, 140 and 170 degrees
    c30, c60, c80, c140, c170 = 0.8660254, 0.5, 0.1736482, -0.7660444, -0.9848078
    expected = torch.tensor([[c30, 0.0], [c30, c60], [c60, c80], [c80, c140]])
    torch.testing.assert_close(found.cosines, expected, atol=1e-6, rtol=0)
    across = nearest_across(W_dec[[1, 3]], W_dec[[0, 2]], 5)  # only two there are
    assert across.latents.tolist() == [[0, 1], [1, 0]]
    torch.testing.assert_close(across.cosines, torch.tensor([[c30, c60], [c80, c170]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [1, 4, 9, 31, 40])
@pytest.mark.parametrize("block", [(5, 7), (1, 1), (23, 31), (100, 100)])
def test_blocks_give_what_a_naive_search_gives(
    n: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(geometry, "ROWS_AT_ONCE", block[0])
    monkeypatch.setattr(geometry, "COLUMNS_AT_ONCE", block[1])
    W_from, W_to = random_dictionary(23, 6, 0), random_dictionary(31, 6, 1) * 7
    values, latents = naive(W_from, W_to).topk(min(n, 31), dim=-1)
    found = nearest_across(W_from, W_to, n)
    assert found.latents.tolist() == latents.tolist()
    torch.testing.assert_close(found.cosines, values.float(), atol=1e-6, rtol=1e-5)

    among = torch.arange(31) % 3 > 0
    cosines = naive(W_to, W_to).fill_diagonal_(-math.inf)
    cosines[:, ~among] = -math.inf
    found = nearest_within(W_to, n, latents=[30, 2, 7, 2], among=among)
    for row, latent in enumerate([30, 2, 7, 2]):
        there = int((cosines[latent] > -math.inf).sum())
        order = cosines[latent].argsort(descending=True)[: min(n, there)].tolist()
        assert found.latents[row].tolist() == order + [-1] * (min(n, 31) - len(order))
        assert (found.cosines[row, len(order) :] == 0).all()


def test_no_block_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.numbers = max(Largest.numbers, out.numel())
            return out

    monkeypatch.setattr(geometry, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(geometry, "COLUMNS_AT_ONCE", 32)
    W_from, W_to = random_dictionary(300, 4, 0), random_dictionary(500, 4, 1)
    with Largest():
        nearest_across(W_from, W_to, 3)
    assert 16 * 32 <= Largest.numbers <= 500 * 4  # of 150,000 cosines


def test_rows_of_zeros_are_nobodys_neighbours():
    W_dec = torch.stack([E[0], 0 * E[0], -E[0], E[1]])
    found = nearest_within(W_dec, 3)
    assert sorted(found.latents[0].tolist()) == [-1, 2, 3] and found.latents[1].tolist() == [-1, -1, -1]
    assert found.cosines.isfinite().all() and found.cosines[1].tolist() == [0.0, 0.0, 0.0]
    assert found.latents[2].tolist()[0] == 3  # at 0, before latent 0 at -1
    nothing = nearest_across(W_dec, torch.zeros(2, 3), 1)
    assert nothing.latents.tolist() == [[-1]] * 4 and nothing.cosines.tolist() == [[0.0]] * 4
    # A tiny row is no row of zeros.
    tiny = nearest_within(torch.stack([E[0] * 1e-38, E[0] + E[1], E[2]]), 1)
    assert tiny.latents.tolist() == [[1], [0], [0]] or tiny.latents.tolist() == [[1], [0], [1]]
    assert tiny.cosines[:2].flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_half_precision_and_parameters_are_taken():
    W_dec = torch.nn.Parameter(random_dictionary(9, 5, 0).bfloat16())
    found = nearest_within(W_dec, 2)
    assert found.latents.tolist() == nearest_within(W_dec.detach().float(), 2).latents.tolist()
    assert found.cosines.dtype == torch.float32 and not found.cosines.requires_grad


NAN = torch.tensor([[1.0, math.nan, 0.0]])
BAD_SEARCHES = {
    "n": (lambda: nearest_within(E, 0), "n must be 1 or more, got 0"),
    "latent": (lambda: nearest_within(E, 1, latents=[3]), r"latents must be 0 to 2, got \[3\]"),
    "negative": (lambda: nearest_across(E, E, 1, latents=[-1]), r"latents must be 0 to 2, got \[-1\]"),
    "none asked": (lambda: nearest_within(E, 1, latents=[]), "no latents"),
    "width": (lambda: nearest_across(E, torch.eye(4)), "rows of 3 and of 4 numbers have no cosine"),
    "empty": (lambda: nearest_within(torch.zeros(0, 3)), r"one or more, got shape \(0, 3\)"),
    "nan": (lambda: nearest_across(E, NAN), "not finite"),
    "an SAE": (lambda: best_matches(torch.nn.Linear(2, 2), E), r"a tensor, got Linear; decoder_directions\(sae\)"),  # type: ignore[arg-type]
    "half a latent": (lambda: nearest_within(E, 1, latents=[1.5]), r"latents must be 0 to 2, got \[1.5\]"),  # type: ignore[list-item]
    "numbers of latents": (lambda: nearest_within(E, 1, among=torch.arange(3)), "of 3 latents, got torch.int64"),
    "no number": (lambda: cosine_bound(float("nan"), 4), "2 or more features"),  # type: ignore[arg-type]
    "names": (lambda: match_distribution(E, E, names=("a",)), r"names must be of two dictionaries, got \('a',\)"),  # type: ignore[arg-type]
    "bound": (lambda: cosine_bound(1, 10), "2 or more features in 1 or more dimensions, got 1 in 10"),
    "no cosines": (lambda: cumulative(torch.zeros(0)), "of no cosines"),
    "dead": (lambda: match_distribution(E, 0 * E, progress=False), r"without any living latent: \(3, 0\)"),
    "quantile": (lambda: match_distribution(E, E, quantile=1.0), "quantile must lie between 0 and 1, got 1.0"),
    "no seeds": (lambda: match_distribution(E, E, seeds=[]), r"one or more, got \[\]"),
    "twice": (lambda: match_distribution(E, E, seeds=[1, 1]), r"different numbers from 0, one or more, got \[1, 1\]"),
    "other width": (lambda: match_distribution(E, torch.eye(4)), "rows of 3 and of 4 numbers"),
    "other matches": (
        lambda: match_distribution(E, E, matches=best_matches(E[:2], E)), "matches of 2 latents, the dictionary has 3",
    ),
    "beyond": (lambda: feature_splitting(best_matches(E, E), 2, 0.5), "a match is latent 2, but there are 2"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", BAD_SEARCHES)
def test_bad_input_is_refused(bad: str):
    call, message = BAD_SEARCHES[bad]
    with pytest.raises(ValueError, match=message):
        call()


# The directions of an SAE


def test_directions_of_every_kind_of_sae():
    route = routed_saes.make("topk")
    assert decoder_directions(route).shape == (routed_saes.D_SAE, routed_saes.D_MODEL)
    assert not decoder_directions(route).requires_grad
    single = TopKSAE(TopKSAEConfig(d_in=10, d_sae=24, k=3))
    assert decoder_directions(single) is not single.W_dec
    torch.testing.assert_close(decoder_directions(single), single.W_dec.detach())

    crosscoder = crosscoders.make("topk")
    joined = decoder_directions(crosscoder)
    layers = torch.stack([decoder_directions(crosscoder, layer) for layer in routed_saes.LAYERS])
    torch.testing.assert_close(layers[1], joined[:, 10:20])
    # The joined cosine: per-layer cosines weighted by the two latents' norms there.
    norms = layers.norm(dim=-1)
    cosines = torch.stack([naive(one, one) for one in layers]).float()
    weights = norms[:, :, None] * norms[:, None] / (joined.norm(dim=-1)[:, None] * joined.norm(dim=-1))
    torch.testing.assert_close((weights * cosines).sum(0), naive(joined, joined).float())

    with pytest.raises(ValueError, match="layer=3 needs a Crosscoder"):
        decoder_directions(route, 3)
    with pytest.raises(ValueError, match="2"):
        decoder_directions(crosscoder, 2)
    with pytest.raises(ValueError, match="expected an SAE with a decoder W_dec, got Linear"):
        decoder_directions(torch.nn.Linear(2, 2))


# Best matches


def test_the_bound_of_the_paper():
    # (section 4.6: 0.174 of 8x, which is 0.1745 cut off, and 0.186 of 32x, over 4096 dimensions)
    assert cosine_bound(8 * 4096, 4096) == pytest.approx(0.17453, abs=1e-5)
    assert cosine_bound(32 * 4096, 4096) == pytest.approx(0.18580, abs=1e-5)


def test_random_directions_stay_below_the_bound():
    F, D = 2000, 256
    largest = nearest_within(random_dictionary(F, D, 0)).cosines.max()
    assert 0.85 < largest / math.sqrt(4 * math.log(F) / D) < 1.0
    assert largest < cosine_bound(F, D)


def test_a_distribution_worked_by_hand():
    W_from = torch.stack([3 * E[0], 2 * E[0] + E[1], -E[0], 0 * E[0]])
    W_to = torch.stack([E[0], 5 * E[1], 0 * E[0]])
    matches = best_matches(W_from, W_to)
    assert matches.latents.tolist() == [0, 0, 1, -1]
    assert matches.cosines.tolist() == pytest.approx([1.0, 2 / math.sqrt(5), 0.0, 0.0])  # 0.894
    assert matches.new(0.5).tolist() == [2] and matches.new(0.9).tolist() == [1, 2]
    found = match_distribution(W_from, W_to, names=("a", "b"), progress=False)
    assert (found.widths, found.dead, found.d, found.names) == ((4, 3), (1, 1), 3, ("a", "b"))
    shares = [found.share[at(c)] for c in (-0.005, 0.0, 0.89, 0.895, 0.995, 1.0)]
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert [found.cosine[at(c)] for c in (-1, 0.0, 0.895, 1)] == pytest.approx([-1, 0, 0.895, 1])
    assert found.bound == cosine_bound(4, 3) and found.at_bound.new == 1.0  # 2.4: it says nothing
    splitting = feature_splitting(matches, 3, 0.5)
    assert splitting.new == pytest.approx(1 / 3)
    assert splitting.children == {0: 2, 2: 1}  # latent 0 has two, latents 1 and 2 none


def test_the_random_baseline_is_that_of_two_dictionaries_of_the_same_size():
    W_from, W_to = random_dictionary(50, 8, 100), random_dictionary(21, 8, 101)
    W_from[7] = 0
    found = match_distribution(W_from, W_to, seeds=(0, 4), quantile=0.9, progress=False)
    again = match_distribution(W_from, W_to, seeds=(4, 0), quantile=0.9, progress=False)
    assert found.random == again.random[::-1] and found.random[0] != found.random[1]
    for curve, tail, seed in zip(found.random, found.random_quantile, (0, 4), strict=True):
        best = naive(random_dictionary(49, 8, 2 * seed), random_dictionary(21, 8, 2 * seed + 1)).amax(-1)
        assert curve[at(0.5)] == pytest.approx(float((best <= 0.5).double().mean()))
        assert tail == pytest.approx(float(best.sort().values[44]))  # ceil(0.9 * 49) = 45 are at or below it
    assert found.at_random.threshold == pytest.approx(sum(found.random_quantile) / 2)
    # Dictionaries that are random themselves look like the baseline.
    gaps = [abs(a - b) for a, b in zip(found.share, found.random[0], strict=True)]
    assert max(gaps) < 0.3


def test_planted_features_are_found():
    """A wide dictionary with latents 0 to 9 of a narrow one, 10 to 14 split in three, and 40 new ones."""
    D = 400
    narrow = random_dictionary(30, D, 0)
    splits = narrow[10:15].repeat_interleave(3, dim=0) + 0.5 * random_dictionary(15, D, 1)
    wide = torch.cat([narrow[:10] * 2, splits, random_dictionary(40, D, 2)])
    matches = best_matches(wide, narrow)
    assert matches.latents[:25].tolist() == [*range(10), *(i for i in range(10, 15) for _ in range(3))]
    found = match_distribution(wide, narrow, matches=matches, progress=False)
    assert found.bound == pytest.approx(math.sqrt(12 * math.log(65) / D)) and found.bound < 0.4
    assert found.at_bound.new == 40 / 65 and matches.new(found.bound).tolist() == list(range(25, 65))
    assert found.at_bound.children == {0: 15, 1: 10, 3: 5}
    assert 35 / 65 <= found.at_random.new <= 40 / 65  # one in a hundred random ones passes for a match
    # From the narrow one's side, 15 latents are lost and none is split.
    back = match_distribution(narrow, wide, progress=False)
    assert back.at_bound.new == 0.5 and set(back.at_bound.children) == {0, 1}


def test_a_distribution_comes_back_from_json():
    found = match_distribution(random_dictionary(9, 30, 0), random_dictionary(5, 30, 1), progress=False)
    data = json.loads(json.dumps(found.to_dict()))
    assert MatchDistribution.from_dict(data) == found
    for change, message in (
        ({"share": data["share"][:-1]}, "differ in length"),
        ({"names": ["a"]}, "names must be of two"),
        ({"random_quantile": [0.1]}, "differ in length"),
        ({"share": [math.nan] * 401}, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            MatchDistribution.from_dict(data | change)
    del data["bound"]
    with pytest.raises(ValueError, match="lacks bound"):
        MatchDistribution.from_dict(data)


# The map


def dictionaries() -> dict[str, torch.Tensor]:
    narrow = random_dictionary(40, 32, 0)
    narrow[3] = 0
    vanilla = narrow + 0.5 * random_dictionary(40, 32, 1)
    wide = narrow.repeat(4, 1) + 0.7 * random_dictionary(160, 32, 2)
    return {"8x TopK": narrow, "8x vanilla": vanilla, "32x TopK": wide}


PAPER = {"8x vanilla": 6, "8x TopK": 6, "32x TopK": 24}


@needs_umap
@pytest.mark.slow
def test_the_map_has_the_neighbours_and_is_the_same_again():
    found = feature_map(dictionaries(), PAPER, dictionary="8x TopK", latent=5)
    first, *others = found.points
    assert (first.dictionary, first.latent, first.cosine) == ("8x TopK", 5, 1.0)
    assert len(others) == 36  # as many as in figure 7, and the feature itself
    for name, n in PAPER.items():
        cosines = naive(dictionaries()["8x TopK"][[5]], dictionaries()[name])[0]
        cosines[cosines != cosines] = -math.inf
        if name == "8x TopK":
            cosines[5] = -math.inf
        values, latents = cosines.topk(n)
        here = [point for point in others if point.dictionary == name]
        assert [point.latent for point in here] == latents.tolist()
        assert [point.cosine for point in here] == pytest.approx(values.tolist(), abs=1e-6)
    rows = torch.stack([dictionaries()[point.dictionary][point.latent] for point in found.points])
    assert found.smallest_cosine == pytest.approx(float(naive(rows, rows).min()), abs=1e-6)
    assert all(math.isfinite(point.x) and math.isfinite(point.y) for point in found.points)
    assert feature_map(dictionaries(), PAPER, dictionary="8x TopK", latent=5) == found
    assert feature_map(dictionaries(), PAPER, dictionary="8x TopK", latent=5, seed=1).points != found.points
    assert FeatureMap.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@needs_umap
@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 6])
def test_a_map_of_few_points(n: int):
    found = feature_map(dictionaries(), {"8x TopK": n}, dictionary="8x TopK", latent=5)
    assert len({(point.x, point.y) for point in found.points}) == n + 1 and found.n_neighbors == n


@needs_umap
@pytest.mark.slow
def test_a_map_takes_all_of_a_dictionary_that_has_fewer():
    found = feature_map(dictionaries(), {"8x TopK": 99}, dictionary="8x TopK", latent=5)
    assert len(found.points) == 39  # but for the row of zeros


BAD_MAPS: dict[str, tuple[dict[str, Any], str]] = {
    "home": ({"dictionary": "16x"}, "there is no dictionary '16x'; there are 8x TopK, 8x vanilla, 32x TopK"),
    "others": ({"neighbours": {"16x": 2}}, "not there: 16x"),
    "negative": ({"neighbours": {"8x TopK": -1}}, "must be 0 or more of each"),
    "latent": ({"latent": 40}, "latent must be 0 to 39 in '8x TopK', got 40"),
    "zeros": ({"latent": 3}, "latent 3 of '8x TopK' is a row of zeros"),
    "few": ({"neighbours": {"8x TopK": 2}}, "a map needs 4 points or more, got 3"),
    "n_neighbors": ({"n_neighbors": 1}, "n_neighbors of 2 or more"),
    "min_dist": ({"min_dist": -0.1}, "min_dist from 0 to 1, got 15 and -0.1"),
    "min_dist beyond": ({"min_dist": 3.0}, "min_dist from 0 to 1"),
    "min_dist nan": ({"min_dist": float("nan")}, "min_dist from 0 to 1"),
    "width": (
        {"dictionaries": dictionaries() | {"32x TopK": torch.eye(9)}},
        "rows of 32 and of 9 numbers have no cosine",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", BAD_MAPS)
def test_a_map_of_bad_input_is_refused(bad: str, monkeypatch: pytest.MonkeyPatch):
    class NoUMAP:
        """Nothing is laid out before the input is checked."""

    monkeypatch.setitem(sys.modules, "umap", NoUMAP)  # type: ignore[arg-type]
    change, message = BAD_MAPS[bad]
    given: dict[str, Any] = {"neighbours": PAPER, "dictionary": "8x TopK", "latent": 5}
    given |= {"dictionaries": dictionaries()} | change
    with pytest.raises(ValueError, match=message):
        feature_map(given.pop("dictionaries"), given.pop("neighbours"), **given)


def test_without_umap_the_map_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"pip install 'routesae-lens\[geometry\]'"):
        feature_map(dictionaries(), PAPER, dictionary="8x TopK", latent=5)


# Figures and the page


def a_map(names: tuple[str, str] = ("narrow", "wide")) -> FeatureMap:
    points = [MapPoint(names[0], 7, 1.0, 0.0, 0.0)]
    points += [MapPoint(names[0], i, 0.5 - i / 100, 1.0 + i, 0.5 * i) for i in range(3)]
    points += [MapPoint(names[1], i, 0.4 - i / 100, -1.0 - i, 0.7 * i) for i in range(5)]
    return FeatureMap(names[0], 7, points, 0.21, 8, 0.1, 0)


def a_distribution(names: tuple[str, str] = ("wide", "narrow")) -> MatchDistribution:
    narrow = random_dictionary(20, 200, 0)
    wide = torch.cat([narrow, narrow + random_dictionary(20, 200, 1), random_dictionary(10, 200, 2)])
    return match_distribution(wide, narrow, names=names, progress=False)


def drawn_points(svg: str) -> dict[str, int]:
    """Markers in each group of the drawing that has a name of ours."""
    found = {}
    for group in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        name = group.get("id", "")
        if "map-" in name:
            found[name[name.rindex("map-") :]] = len(list(group.iter("{http://www.w3.org/2000/svg}use")))
    return found


def test_a_figure_as_a_file_has_every_point(tmp_path: Path):
    path = save_figure(a_map(), tmp_path / "map.svg")
    assert drawn_points(path.read_text()) == {"map-0": 4, "map-1": 5, "map-chosen": 1}
    light = save_figure(a_distribution(), tmp_path / "matches.png").read_bytes()
    dark = save_figure(a_distribution(), tmp_path / "dark.png", dark=True).read_bytes()
    assert light.startswith(b"\x89PNG") and light != dark
    assert sorted(one.name for one in tmp_path.iterdir()) == ["dark.png", "map.svg", "matches.png"]
    first = (save_figure(a_map(), tmp_path / "map.svg")).read_bytes()
    assert first == save_figure(a_map(), tmp_path / "map.svg").read_bytes()
    with pytest.raises(ValueError, match=r"as \.svg, \.png or \.pdf, got 'map\.gif'"):
        save_figure(a_map(), tmp_path / "map.gif")
    with pytest.raises(ValueError, match="there is no folder"):
        save_figure(a_map(), tmp_path / "no" / "map.svg")


def test_figures_of_the_page_take_its_colours():
    one, other = str(map_svg(a_map(), "one")), str(matches_svg(a_distribution(), "other"))
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    assert namespace in one and drawn_points(one) == {"map-0": 4, "map-1": 5, "map-chosen": 1}
    for svg in (one, other):
        assert "var(--plot-1)" in svg and "var(--plot-2)" in svg and "var(--ink)" in svg
        assert "#000a0" not in svg and "#000b0" not in svg
    assert "bound 0.484" in other  # sqrt(12 ln 50 / 200)
    flat = replace(a_distribution(), bound=1.2)
    assert "bound" not in str(matches_svg(flat, "other"))


HOSTILE = ("<script>alert(1)</script> $x_1$", "</text>&lt;\u202e'\"")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    latents = [feature(7, [context("x", 9.0), context("y", 8.0)])]
    (folder / "feature_sets").mkdir()
    feature_set(latents).save(folder / "feature_sets" / "route.json.gz")
    told = {"7": {"category": "low-level", "score": 3, "explanation": "<b>wars</b>"}}
    write_interpretations(folder, told)
    return folder


def test_the_page_shows_geometry(run: Path):
    record = GeometryRecord(
        [a_distribution(), a_distribution(HOSTILE)], [a_map(("route", "wide")), a_map(HOSTILE)]
    )
    path = record.save(run, "route")
    assert path == run / "geometry" / "route.json" and [one.name for one in path.parent.iterdir()] == [
        path.name
    ]
    contents = gather(run)
    assert contents.geometry == record
    page = render(contents)
    section = page[page.index('<section id="geometry"') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg ") == 4 and section.count("<figcaption>") == 4
    assert "<script" not in section and "&lt;script&gt;alert(1)" in section and "‹U+202E›" in section
    ids = [part.split('"')[0] for part in section.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    # 10 of 50 latents are new, and 20 of 20 are the match of two.
    assert "20.0% have none at the bound of 0.484" in section
    assert "20 of the 20 latents of narrow are the match of two or more" in section
    assert "have a cosine of 0.210 or more" in section
    assert "<td>&lt;b&gt;wars&lt;/b&gt;</td>" in section  # the page's own SAE's latents are explained
    assert '<a href="#geometry">Geometry</a>' in page


def test_a_page_without_geometry_has_no_such_section(run: Path):
    contents = gather(run)
    assert contents.geometry == GeometryRecord()
    assert 'id="geometry"' not in render(contents)


BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "other/1"}, "is 'other/1' of 'route'"),
    "another SAE": ({"sae": "topk"}, "of 'topk', expected .* of 'route'"),
    "maps": ({"maps": 3}, "is damaged"),
    "map": ({"maps": [{"dictionary": "a"}]}, "is damaged: ValueError: a feature map lacks latent"),
    "points": ({"maps": [a_map().to_dict() | {"points": []}]}, "the first point of the map is not latent 7"),
    "not finite": (
        {"maps": [replace(a_map(), points=[MapPoint("narrow", 7, 1.0, math.nan, 0.0)]).to_dict()]}, "not finite",
    ),
    "distribution": ({"distributions": [{}]}, "is damaged: ValueError: a match distribution lacks names"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_a_damaged_record_is_named(bad: str, run: Path):
    path = GeometryRecord([a_distribution()], [a_map()]).save(run, "route")
    change, message = BAD_RECORDS[bad]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        gather(run)
    assert str(path) in str(error.value)


def test_a_record_is_saved_in_a_run_under_a_file_name(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no folder"):
        GeometryRecord().save(tmp_path / "no", "route")
    with pytest.raises(ValueError, match=r"must be a file name, got '\.\./route'"):
        GeometryRecord().save(tmp_path, "../route")
