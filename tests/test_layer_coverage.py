"""What a RouteSAE has of each layer, on dictionaries whose overlaps are planted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stitchable import D_MODEL, sae

from routesae_lens.analysis.layer_coverage import _alike, layer_coverage
from routesae_lens.report.stitching_plots import plot_layer_coverage

E = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(3)))[0]


def with_rows(architecture: str, rows: torch.Tensor, **fields: Any) -> Any:
    made = sae(architecture, len(rows), 1, **fields)
    with torch.no_grad():
        made.W_dec.copy_(rows)
    return made


def route(rows: torch.Tensor) -> Any:
    return with_rows("route_standard", rows, layers=[1, 2, 4])


def on_layer(layer: int, rows: torch.Tensor, **fields: Any) -> Any:
    return with_rows("route_topk", rows, layers=[layer], k=2, **fields)


def planted() -> tuple[Any, dict[int, Any]]:
    """The RouteSAE has e0 ... e7. Layer 1 has e0 to e3 and e10, layer 2 e0 and e11 to e13 and a dead row."""
    turned = 0.8 * E[0] + 0.6 * E[20]
    dead = torch.zeros(1, D_MODEL)
    return route(E[:8]), {
        1: on_layer(1, torch.cat([E[10:11], 3 * E[:4]])),
        2: on_layer(2, torch.cat([turned[None], E[11:14], dead])),
    }


def test_planted_overlaps_are_found():
    found = layer_coverage(*planted(), progress=False)
    first, second = found.layers
    assert (first.layer, first.latents, first.dead, second.latents, second.dead) == (1, 5, 0, 4, 1)
    assert first.covered == pytest.approx(4 / 5) and second.covered == pytest.approx(1 / 4)
    assert first.novel == (0,) and second.novel == (1, 2, 3)
    assert first.route_latents == (0, 1, 2, 3) and second.route_latents == (0,)
    assert first.mean_cosine == pytest.approx(4 / 5, abs=1e-5)
    assert second.mean_cosine == pytest.approx(0.8 / 4, abs=1e-5)
    assert found.shared == {0: 4, 1: 3, 2: 1}
    assert found.route_novel == (4, 5, 6, 7) and found.route_novel_share == 0.5
    assert found.covered == pytest.approx((4 / 5 + 1 / 4) / 2)
    assert first.ceiling is None and found.route_ceiling is None
    assert first.best_other == pytest.approx(1 / 5) and first.best_other_layer == 2
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["layers"][1]["novel"] == [1, 2, 3] and data["route_novel_share"] == 0.5
    assert "50.0% of the RouteSAE's 8 living latents are in no layer's SAE" in str(found)


def test_the_threshold_is_a_match():
    found = layer_coverage(*planted(), threshold=0.81, progress=False)
    assert [one.covered for one in found.layers] == [pytest.approx(4 / 5), 0.0]


def test_latents_that_never_fire_do_not_count():
    sae_, layers = planted()
    fires = {1: torch.tensor([4, 0, 0, 1, 2])}
    of_route = torch.tensor([9, 9, 9, 0, 9, 9, 9, 0])
    found = layer_coverage(sae_, layers, route_fires=of_route, layer_fires=fires, progress=False)
    first = found.layers[0]
    assert (first.latents, first.dead) == (3, 2) and (found.route_latents, found.route_dead) == (6, 2)
    assert first.novel == (0, 4) and first.covered == pytest.approx(1 / 3)  # e2 is covered, e3's like is dead
    assert first.route_latents == (2,) and found.route_novel == (1, 4, 5, 6)


def test_another_seed_is_the_ceiling():
    sae_, layers = planted()
    found = layer_coverage(
        sae_, layers, ceilings={1: on_layer(1, E[[0, 10, 25]])}, route_ceiling=route(E[6:12]), progress=False
    )
    first, second = found.layers
    assert first.ceiling == pytest.approx(2 / 5) and first.ceiling_mean_cosine == pytest.approx(
        2 / 5, abs=1e-5
    )
    assert second.ceiling is None and found.route_ceiling == pytest.approx(2 / 8)


def test_random_dictionaries_are_the_floor():
    """In 32 dimensions 4000 random rows come close to anything; 8 do not. The seed decides which."""
    rows = torch.randn(4000, D_MODEL, generator=torch.Generator().manual_seed(1))
    layers = {1: on_layer(1, torch.randn(60, D_MODEL, generator=torch.Generator().manual_seed(2)))}
    wide, again = (layer_coverage(route(rows), layers, threshold=0.5, progress=False) for _ in range(2))
    narrow = layer_coverage(route(rows[:8]), layers, threshold=0.5, progress=False)
    shares = wide.layers[0].random
    assert wide == again and len(shares) == 3 and min(shares) > 0.5 > max(narrow.layers[0].random)
    # a random dictionary covers what another random one does
    assert wide.layers[0].covered == pytest.approx(sum(shares) / 3, abs=0.15)
    one = layer_coverage(route(rows), layers, threshold=0.5, seeds=[2], progress=False)
    assert one.layers[0].random == shares[2:]


def test_a_random_dictionary_has_the_second_moment_of_the_real_one():
    """Rows in a plane, more along one axis than the other, whatever their lengths."""
    rows = torch.zeros(4000, 8)
    rows[:3000, 1], rows[3000:, 2] = 5.0, -0.1
    made = _alike(rows, 0)
    expected = torch.zeros(8, 8)
    expected[1, 1], expected[2, 2] = 0.75, 0.25
    torch.testing.assert_close(made.T @ made / 4000, expected, atol=0.03, rtol=0)


def test_the_plot_names_what_it_draws(tmp_path: Path):
    sae_, layers = planted()
    found = layer_coverage(sae_, layers, ceilings={1: layers[1]}, progress=False)
    written = plot_layer_coverage({"the $first": found, "second": found}, tmp_path / "coverage.svg")
    assert "<svg" in written.read_text()
    assert plot_layer_coverage(found, tmp_path / "one.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no coverage to draw"):
        plot_layer_coverage({}, tmp_path / "none.svg")


def test_a_ceiling_of_some_layers_is_drawn_there_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[Any] = []
    monkeypatch.setattr(
        "routesae_lens.report.geometry_plots.write_figure", lambda figure, path: drawn.append(figure) or path
    )
    sae_, layers = planted()
    layers[4] = on_layer(4, E[:4])
    found = layer_coverage(sae_, layers, ceilings={1: layers[1], 4: layers[4]}, progress=False)
    plot_layer_coverage(found, tmp_path / "coverage.svg")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    line = lines["another seed's SAE of the layer"]
    assert list(line.get_ydata()) == pytest.approx(
        [1.0, math.nan, 1.0], nan_ok=True
    )  # no line across layer 2
    assert line.get_marker() == "."  # what is left of a line of one point


def test_an_ordinary_sae_of_the_layer_will_do():
    plain = with_rows("standard", E[:4])  # on blocks.2.hook_resid_post
    assert layer_coverage(route(E[:8]), {2: plain}, progress=False).layers[0].covered == 1.0
    with pytest.raises(ValueError, match=r"the SAE given for layer 4 reads \[2\]"):
        layer_coverage(route(E[:8]), {4: plain}, progress=False)
    for name, hook in (("hook_name", "blocks.2.hook_resid_pre"), ("hook_name_out", "blocks.2.hook_mlp_out")):
        plain = with_rows("standard", E[:4])
        plain.cfg.metadata[name] = hook  # what another block writes, or a transcoder
        with pytest.raises(ValueError, match=r"reads or writes hook_\w+, the RouteSAE hook_resid_post"):
            layer_coverage(route(E[:8]), {2: plain}, progress=False)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no RouteSAE": ({"route_sae": with_rows("standard", E[:4])}, "expected a RouteSAE, got StandardSAE"),
    "no layers": ({"layer_saes": {}}, "no SAEs of single layers"),
    "a list": ({"layer_saes": [on_layer(1, E[:4])]}, "SAEs by their layer, .*, got list"),
    "a text": ({"threshold": "0.7"}, "above 0 and at most 1, got '0.7'"),
    "not routed": (
        {"layer_saes": {3: on_layer(3, E[:4])}},
        r"layer 3 is not among the routed blocks \[1, 2, 4\]",
    ),
    "another layer": ({"layer_saes": {1: on_layer(2, E[:4])}}, r"the SAE given for layer 1 reads \[2\]"),
    "standardisation": (
        {"layer_saes": {1: on_layer(1, E[:4], standardize=False)}},
        "standardize=False, the RouteSAE True",
    ),
    "width": (
        {"layer_saes": {1: on_layer(1, torch.eye(16)[:4], d_in=16)}},
        "writes 16 numbers, the RouteSAE 32",
    ),
    "ceilings": (
        {"ceilings": {4: on_layer(4, E[:4])}},
        r"ceilings of layers \[4\], SAEs were given of \[1, 2\]",
    ),
    "route ceiling": ({"route_ceiling": on_layer(1, E[:4])}, r"route_ceiling must be .* \[1, 2, 4\]"),
    "route ceiling's space": (
        {"route_ceiling": with_rows("route_standard", E[:4], layers=[1, 2, 4], standardize=False)},
        "the same site, width and standardisation",
    ),
    "no counts": ({"route_fires": [1] * 8}, r"counts of the RouteSAE are \[1, 1"),
    "counts": ({"layer_fires": {1: torch.ones(7)}}, r"counts of layer 1 have shape \(7,\), it has 5"),
    "dead": ({"route_fires": torch.zeros(8)}, "no latent of the RouteSAE is alive"),
    "threshold": ({"threshold": 0.0}, "above 0 and at most 1, got 0"),
    "seeds": ({"seeds": []}, "seeds must be different"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_refused(name: str, unchecked: None):
    options, message = BAD[name]
    sae_, layers = planted()
    with pytest.raises(ValueError, match=message):
        layer_coverage(**{"route_sae": sae_, "layer_saes": layers, "progress": False, **options})
