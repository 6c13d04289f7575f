"""The recipe of stitching in small: interrupted, continued, refused; and its rules on made-up numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import stitch_layers
import stitch_layers_report as report
import stitch_layers_study as study
import study_folder

import routesae_lens as rl

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data", "ignore:end of"
)


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("stitch") / "text.jsonl"
    rows = [
        {"text": f"The river {i} was quiet; {i * i} boats lay still in harbour {i % 7}. " * 2}
        for i in range(60)
    ]
    text.write_text("\n".join(map(json.dumps, rows)))
    return {"preset": "tiny", "model": str(tiny_llama_dir), "dataset": str(text)}


@pytest.fixture(scope="module")
def run(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its training and then went on."""
    output = tmp_path_factory.mktemp("stitch-run") / "whole"
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setitem(study.STAGES, "evaluation", stop)
        with pytest.raises(typer.Exit) as stopped:
            stitch_layers.main(output=output, **options)
        assert stopped.value.exit_code == study_folder.STOPPED
    trained = (output / "training/run.json").stat().st_mtime_ns
    stitch_layers.main(output=output, **options)
    assert (output / "training/run.json").stat().st_mtime_ns == trained
    return output


def test_a_run_leaves_coverage_curves_and_a_report(run: Path):
    found = json.loads((run / "report/results.json").read_text())
    layers = rl.default_layers(6)
    assert (
        found["training"]["status"] == "finished"
        and len(set(found["training"]["seeds"].values())) == 2 + 4 + 1
    )
    assert found["text"]["layers"] == list(layers) and set(found["coverage"]) == {
        "route-0",
        "distilled_mean-0",
    }
    for covered in found["coverage"].values():
        assert [row["layer"] for row in covered["layers"]] == list(layers)[::2]
        assert all(row["ceiling"] is not None for row in covered["layers"])
    steps = found["stitching"]["curve"]["steps"]
    assert (
        found["stitching"]["curve"]["widths"] == [16, 64]
        and steps[0]["d_sae"] == 16
        and steps[-1]["d_sae"] == 64
    )
    assert steps[-1]["kl"] > 0 and found["stitching"]["conversions"]["small"]["to"] == "route_jumprelu"
    assert (run / "report/coverage.png").stat().st_size > 1000 < (run / "report/stitching.png").stat().st_size
    text = (run / "report/report.md").read_text()
    assert "## What was expected" in text and "768 training tokens" in text and str(run) not in text
    for step in ("small", "layer2-0"):
        assert type(rl.RouteSAE.load_from_disk(run / "jumprelu" / step)).__name__ == "RouteJumpReLUSAE"


def test_the_same_command_does_nothing_again(
    run: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    before = {path: path.stat().st_mtime_ns for path in run.glob("*.json")}
    for name in ("train", "evaluate_all", "layer_coverage", "stitch"):
        monkeypatch.setattr(rl, name, None)
    stitch_layers.main(output=run, **options)
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.json")} == before


def test_another_setting_needs_another_folder(run: Path, options: dict[str, Any]):
    with pytest.raises(typer.BadParameter, match=r"threshold = 0\.7"):
        stitch_layers.main(output=run, threshold=0.5, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; known: cpu, tiny"),
        ({"every": 0}, "--every must be 1 or more, got 0"),
        ({"small": 0}, "--small must be 1 or more, got 0"),  # (not the default in its place)
        ({"d_sae": 0}, "--d-sae must be 1 or more, got 0"),
        ({"k": 0}, "--k must be 1 or more, got 0"),
        ({"small": 64}, "--small must be from k = 4 to below the width 64, got 64"),
        ({"stitched_layer": 1}, r"--stitched-layer must be one of \[0, 2\], got 1"),
        ({"layers": "1:9"}, "--layers must be blocks from 0 to 5"),
        ({"threshold": 1.5}, "--threshold must be above 0 and at most 1"),
        ({"feature_tokens": 210}, "--feature-tokens must hold the 200 tokens of the calibration"),
        ({"context_size": 4096}, "the model reads at most 64 tokens"),
        ({"minutes": -1.0}, "--minutes must be positive"),
    ],
)
def test_wrong_options_are_refused_before_anything(
    options: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], message: str
):
    with pytest.raises(typer.BadParameter, match=message):
        stitch_layers.main(output=tmp_path / "none", **{**options, **wrong})
    assert not (tmp_path / "none").exists()


# --- Rules ------------------------------------------------------------------------------------------------


def covered(*rows: tuple[float, float, float, float], shared: dict[str, int]) -> dict[str, Any]:
    """Of (covered, random, best other, ceiling) for each layer."""
    names = ("covered", "best_other", "ceiling")
    return {
        "layers": [dict(zip(names, (a, c, d), strict=True)) | {"random": [b, b]} for a, b, c, d in rows],
        "shared": shared,
        "route_latents": sum(shared.values()),
        "route_novel_share": shared.get("0", 0) / sum(shared.values()),
    }


def verdicts(found: list[report.Verdict]) -> list[bool]:
    return [one.verdict == "holds" for one in found]


def test_every_layer_has_to_hold():
    shared = {"0": 20, "1": 30, "2": 40, "5": 10}
    good = [(0.5, 0.01, 0.3, 0.6), (0.4, 0.0, 0.2, 0.5)]
    assert verdicts(report._of_route("r", covered(*good, shared=shared))) == [True, True, True, True]
    for bad, which in (((0.04, 0.0, 0.02, 0.045), 0), ((0.3, 0.0, 0.2, 0.5), 1), ((0.5, 0.01, 0.6, 0.6), 2)):
        held = verdicts(report._of_route("r", covered(*good, bad, shared=shared)))
        assert held == [i != which for i in range(4)]
    few = report._of_route("r", covered(*good, shared={"0": 20, "1": 31, "2": 49}))
    assert verdicts(few) == [True, True, True, False] and few[3].measured == "49.0%; in none: 20.0%"


def curve(
    *steps: tuple[str, float, float, float], novel: tuple[int, int], best: float | None
) -> dict[str, Any]:
    """Of (phase, NormMSE, KL, L0) for each step."""
    names = ("phase", "norm_mse", "kl", "l0")
    return {
        "curve": {"steps": [dict(zip(names, step, strict=True)) for step in steps], "threshold": 0.7},
        "effects": {
            "novel": {"fired": novel[1], "lowering": novel[0]},
            "reconstruction": {"fired": 10, "lowering": 2},
        },
        "threshold": {"balanced_accuracy": best, "threshold": 0.6},
    }


def test_insertions_are_judged_before_the_swaps():
    way = [
        ("small", 0.5, 2.0, 30.0),
        ("insert", 0.4, 1.8, 60.0),
        ("swap", 0.6, 2.5, 40.0),
        ("rest", 0.3, 1.0, 32.0),
    ]
    assert verdicts(report._of_stitching(curve(*way, novel=(6, 10), best=0.8))) == [True] * 5
    sparser = report._of_stitching(curve(*way, novel=(6, 10), best=0.8))[2]
    assert sparser.measured == "L0 60.0 to 32.0; 40.0 after the swaps alone"
    without = report._of_stitching(curve(*way[:2], way[3], novel=(6, 10), best=0.8))[2]
    assert without.verdict == "cannot be said" and without.measured.endswith("no group to swap")
    way[1] = ("insert", 0.55, 2.2, 31.0)
    assert verdicts(report._of_stitching(curve(*way, novel=(5, 10), best=0.6))) == [False] * 5
    assert report._of_stitching(curve(*way, novel=(5, 10), best=None))[-1].verdict == "cannot be said"
    assert len(report._of_stitching(curve(*way, novel=(0, 0), best=0.6))) == 4
