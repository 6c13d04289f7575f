"""The Llama Scope recipe in small: interrupted and continued, refused; and its rules on made-up numbers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import llama_scope
import llama_scope_claims as claims
import llama_scope_parts
import llama_scope_report
import llama_scope_settings
import llama_scope_verdicts as verdicts
import study_folder

import routesae_lens.analysis.feature_map

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data", "ignore:n_jobs"
)
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("scope")
    text, model = folder / "text.jsonl", folder / "model"
    rows = [
        {"text": f"The river {i} was quiet; {i * i} boats lay <b>still</b> | in harbour {i % 7}. " * 2}
        for i in range(60)
    ]
    text.write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(tiny_llama_dir, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return {"preset": "tiny", "model": str(model), "dataset": str(text)}


class FlatMap:
    """In UMAP's place, which compiles for half a minute: the first two columns."""

    def __init__(self, **_: Any):
        pass

    def fit_transform(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, :2]


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped within its first part, then ended after it, and then went on."""
    output = tmp_path_factory.mktemp("scope-run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routesae_lens.analysis.feature_map, "_umap", lambda: SimpleNamespace(UMAP=FlatMap))
        evaluate = llama_scope.Study.evaluate

        def stop(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(llama_scope.Study, "evaluate", stop)  # the training is done, the part is not
        with pytest.raises(typer.Exit) as stopped:
            llama_scope.main(output=output, **options)
        assert stopped.value.exit_code == study_folder.STOPPED
        patch.setattr(llama_scope.Study, "evaluate", evaluate)
        trained = (output / "annealing/run.json").stat().st_mtime_ns
        assert not (output / "annealing.json").exists()
        llama_scope.main(output=output, part=["annealing"], **options)
        assert (output / "annealing/run.json").stat().st_mtime_ns == trained
        assert pd.read_csv(output / "report/results.csv")["measured"].unique().tolist() == ["annealing"]
        assert (
            "Not run, or not finished: generalisation, positions, conversion, geometry"
            in (output / "report/report.md").read_text()
        )
        before = {
            path: path.stat().st_mtime_ns
            for path in [*output.glob("annealing*"), *output.glob("annealing/*")]
        }
        llama_scope.main(output=output, svg=True, **options)
        assert before == {path: path.stat().st_mtime_ns for path in before}
    return output


def test_every_part_is_measured_and_reported(whole: Path):
    results = pd.read_csv(whole / "report/results.csv")
    saes = {"annealed-seed0", "annealed-seed1", "fixed-seed0", "fixed-seed1", "wide-seed100", "route-seed100",
            "crosscoder-seed100"}  # fmt: skip
    by_kind = {kind: rows.set_index("name") for kind, rows in results.groupby("measured")}
    assert set(by_kind["annealing"].index) == set(by_kind["JumpReLU"].index) == saes
    assert (by_kind["annealing"]["l0"] <= 4).all()
    positions = by_kind["positions"]
    assert set(positions.index) == {f"L{n}{p}" for n in (1, 2, 4) for p in ("R", "A", "M", "TC")}
    assert positions[["l0", "norm_mse", "delta_ce", "kl"]].notna().all(axis=None)
    tokens = set(results.loc[results["measured"].isin(["annealing", "JumpReLU", "positions"]), "tokens"])
    assert len(tokens) == 1 and tokens.pop() >= 120
    # thresholds let k = 4 through on the calibration text, and those of transcoders are set
    thresholds = {name: json.loads((whole / f"conversion/{name}.json").read_text()) for name in saes}
    assert all(abs(one["l0"] - 4) <= 0.1 and one["tokens"] >= 450 for one in thresholds.values())
    told = json.loads((whole / "positions.json").read_text())["thresholds"]
    assert set(told) == {"L1TC", "L2TC", "L4TC"} and all(abs(one["l0"] - 4) <= 0.1 for one in told.values())
    long = json.loads((whole / "generalisation/long.json").read_text())
    assert not long["joined"] and long["long_documents"] > 0 and long["rows"] == 2
    ends = [one["end"] for one in long["saes"]["wide-seed100"]["bins"]]
    assert ends == [16, 32, 48, 64] and set(long["saes"]) == saes - {"fixed-seed0", "fixed-seed1"}
    chat = json.loads((whole / "generalisation/chat.json").read_text())
    assert set(chat["chat"]) == set(chat["plain"]) == set(long["saes"])
    # what geometry compares did not start from the same decoder rows (the wide one's would begin with the narrow one's)
    seeds = json.loads((whole / "annealing/run.json").read_text())["seeds"]
    assert {name: seeds[name] for name in saes} == {name: int(name.partition("seed")[2]) for name in saes}
    matches = pd.read_csv(whole / "report/matches.csv")
    assert set(matches["from"]) == saes - {"annealed-seed0", "fixed-seed0"}
    numbers = json.loads((whole / "report/results.json").read_text())
    assert numbers["settings"]["tokens"] == 64 * 24 and numbers["versions"]["sae-lens"]


def test_the_report_shows_every_section_and_figure(whole: Path):
    report = (whole / "report/report.md").read_text()
    for figure in ("annealing", "positions", "conversion", "firing", "long", "matches_wide", "map"):
        assert f"]({figure}.png)" in report
        assert (whole / f"report/{figure}.png").stat().st_size > 3000
        assert (whole / f"report/{figure}.svg").exists()
    assert "Not run" not in report and "nan" not in report.lower().replace("annealing", "")
    assert "Not measured: no --base-model was given." in report
    assert str(whole) not in report
    judged = pd.read_csv(whole / "report/claims.csv")
    assert judged[["claim", "rule", "verdict"]].notna().all(axis=None)
    assert (
        judged.loc[judged["claim"].str.contains("RouteSAE|wide SAE|Crosscoder"), "verdict"]
        == verdicts.ONE_SEED
    ).all()


def test_curves_have_the_annealed_k_and_one_line_a_step(whole: Path):
    curves = pd.read_csv(whole / "report/curves.csv")
    annealed = curves[curves["name"] == "annealed-seed1"]
    assert annealed["step"].tolist() == list(range(1, 25))
    assert (
        annealed["k"].tolist()[:3] == [32, 18, 4] and (annealed["k"][3:] == 4).all()
    )  # 10 % of 24 steps are 2
    assert (curves.loc[curves["group"] == "fixed", "k"] == 4).all()
    assert curves["share"].max() == 1 and curves["silent"].between(0, 1).all()
    log = (whole / "annealing/log.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in log if "wide-seed100/losses/overall_loss" in line][-1]
    row = curves[curves["name"] == "wide-seed100"].iloc[-1]
    assert row["silent"] == pytest.approx(last["wide-seed100/sparsity/dead_features"] / 128)
    assert row["loss"] == pytest.approx(last["wide-seed100/losses/overall_loss"] / 32)


def test_a_finished_run_is_only_reported_again(
    whole: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to measure")

    for name in ("evaluate", "train", "load", "model"):
        monkeypatch.setattr(llama_scope.Study, name, never)
    llama_scope.main(output=whole, **options)
    shutil.rmtree(whole / "report")
    llama_scope.main(output=whole, part=["report"])
    assert (whole / "report/report.md").exists()


def test_without_umap_the_map_is_left_out(
    options: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def missing() -> Any:
        raise ImportError("the map of features needs umap-learn")

    monkeypatch.setattr(routesae_lens.analysis.feature_map, "_umap", missing)
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy/geometry.json").unlink()
    llama_scope.main(output=tmp_path / "copy", part=["geometry"], **options)
    report = (tmp_path / "copy/report/report.md").read_text()
    assert "No map: the map of features needs umap-learn." in report and "(matches_wide.png)" in report


def test_short_documents_and_no_template_are_said(
    options: dict[str, Any], whole: Path, tiny_llama_dir: Path, tmp_path: Path
):
    output = tmp_path / "short"
    shutil.copytree(whole, output)
    settings = json.loads((output / "settings.json").read_text())
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(json.dumps({"text": f"Boat {i}."}) for i in range(40)))
    settings |= {
        "long_dataset": f"short.jsonl ({short.stat().st_size:,} bytes)",
        "model": tiny_llama_dir.name,
    }
    (output / "settings.json").write_text(json.dumps(settings))
    for name in ("long", "chat"):
        (output / f"generalisation/{name}.json").unlink()
    llama_scope.main(
        output=output,
        part=["generalisation"],
        long_dataset=str(short),
        **options | {"model": str(tiny_llama_dir)},
    )
    report = (output / "report/report.md").read_text()
    assert "No document of short.jsonl" in report and "joined by BOS" in report
    assert "Not measured: the tokenizer has no chat template." in report


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; known: cpu, tiny"),
        ({"part": ["annealing,posit"]}, "unknown part 'posit'"),
        ({"k": 40}, "--k is 40, more than the width 64 or the 32"),
        ({"wide": 64}, "--wide is 64, no wider than the other dictionaries"),
        ({"layers": "1,2"}, "--layers must name three blocks"),
        ({"layers": "1,2,6"}, "blocks from 0 to 5"),
        ({"tokens": 64}, "--tokens must be 1280 or more, got 64 (20 training steps)"),
        ({"calibration_tokens": 100}, "--calibration-tokens must be 400 or more for k = 4"),
        ({"context_size": 32}, "is 128, but the model reads at most 64 tokens"),
        ({"minutes": -1.0}, "--minutes must be positive"),
        ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    options: dict[str, Any], given: dict[str, Any], said: str, tmp_path: Path
):
    with pytest.raises(typer.BadParameter) as error:
        llama_scope.main(output=tmp_path / "new", **options | given)
    assert said in str(error.value)
    assert not (tmp_path / "new").exists()


def test_all_mistakes_are_listed_at_once(options: dict[str, Any], tmp_path: Path):
    with pytest.raises(typer.BadParameter) as error:
        llama_scope.main(output=tmp_path / "new", **options, seeds=0, tokens=1, k=99)
    assert "4 wrong" in str(error.value)


def test_other_settings_and_other_folders_are_refused(options: dict[str, Any], whole: Path, tmp_path: Path):
    with pytest.raises(typer.BadParameter, match="holds a run with k = 4"):
        llama_scope.main(output=whole, **options, k=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(typer.BadParameter, match="holds something else"):
        llama_scope.main(output=tmp_path, **options)
    with pytest.raises(typer.BadParameter, match="holds no run to report"):
        llama_scope.main(output=tmp_path / "none", part=["report"])


def test_parts_come_after_what_they_need():
    problems: list[str] = []
    assert llama_scope_settings.named_parts(["geometry,report"], problems) == [
        "annealing", "conversion", "geometry", "report",
    ]  # fmt: skip
    assert llama_scope_settings.named_parts(None, problems) == list(llama_scope_settings.PARTS)
    assert not problems and set(llama_scope_parts.RUN) == set(llama_scope_settings.PARTS) - {"report"}


# --- Rules ----------------------------------------------------------------------------------------------


def curve(loss: list[float], silent: list[float], k: list[int] | None = None) -> pd.DataFrame:
    n = len(loss)
    steps = list(range(1, n + 1))
    return pd.DataFrame(
        {"step": steps, "share": [i / n for i in steps], "loss": loss, "silent": silent, "k": k or [50] * n}
    )


def test_signed():
    assert verdicts.signed([-0.2, -0.21, -0.19], -1) == verdicts.REPRODUCED
    assert verdicts.signed([-0.2, -0.21, -0.19], 1) == verdicts.OPPOSITE
    assert verdicts.signed([-0.2, 0.3, 0.1], 1) == verdicts.NO_DIFFERENCE
    assert verdicts.signed([0.0, 0.0], 1) == verdicts.NO_DIFFERENCE
    assert verdicts.signed([0.3], 1) == verdicts.ONE_SEED
    assert verdicts.signed([], 1) == verdicts.NOT_RUN


def test_within():
    near, far, wide = [0.001, 0.002, 0.0], [0.05, 0.051, 0.052], [0.0, 0.05, -0.05]
    found = [verdicts.within(one, -0.02, 0.02, verdicts.UNEQUAL) for one in (near, far, wide, [0.0])]
    assert found == [verdicts.REPRODUCED, verdicts.UNEQUAL, verdicts.WIDE, verdicts.ONE_SEED]
    assert verdicts.within([-0.5, -0.51], -float("inf"), 0.1, verdicts.OPPOSITE) == verdicts.REPRODUCED


def test_silence_is_judged_after_the_first_window_and_for_good():
    one = curve([1.0] * 10, [0.0, 0.0, 0.5, 0.05, 0.3, 0.2, 0.1, 0.1, 0.05, 0.0])
    found = verdicts.summary(one, window=2)
    assert found["largest_silent"] == 0.5 and found["last_silent"] == 0.0
    assert found["awake_from"] == 0.7  # 10 % is few; the 5 % of step 4 did not last
    assert verdicts.awake_from(curve([1.0] * 4, [0.0, 0.1, 0.0, 0.1])) == 0.0
    assert verdicts.awake_from(curve([1.0] * 4, [0.0, 0.1, 0.0, 0.2])) == 1.0


def test_convergence_counts_from_the_end_of_the_annealing_and_ignores_a_spike():
    k = [576, 300, *[50] * 18]
    annealed = curve([0.1, 0.1, 2.0, 1.2, 1.0, 1.0, 90.0, *[1.0] * 13], [0.0] * 20, k)
    fixed = curve([4.0, 3.0, 2.8, 2.4, 2.0, 1.8, 90.0, 1.6, 1.5, 1.4, 1.3, 1.25, 1.2, *[1.0] * 7], [0.0] * 20)
    found = verdicts.convergence(annealed, fixed)
    # running medians of 5: of the annealed (0.1, 0.1, 2, 1.2, 1) is 1.0 in step 5, but (0.1, 0.1, 2) is 0.1 in step 3
    assert found["annealed"] == 3 / 20
    assert found["fixed"] == 16 / 20  # (1.25, 1.2, 1, 1, 1)
    ratios = sorted(
        [2 / 2.8, 1.2 / 2.4, 0.5, 1 / 1.8, 1, 1 / 1.6, 1 / 1.5, 1 / 1.4, 1 / 1.3, 0.8, 1 / 1.2, *[1.0] * 7]
    )
    assert found["ratio"] == pytest.approx((ratios[8] + ratios[9]) / 2 - 1)
    assert found["first_ratio"] == pytest.approx(2 / 2.8 - 1)


def test_annealing_claims():
    def run(alive: bool, loss: float) -> pd.DataFrame:
        silent = [0.0] * 2 + [0.01 if alive else 0.6] * 6 + [0.01] * 12
        return curve([3 * loss] * (6 if alive else 12) + [loss] * (14 if alive else 8), silent)

    curves = {
        f"{kind}-seed{i}": run(kind == "annealed", 1 + i / 10)
        for i in range(3)
        for kind in ("annealed", "fixed")
    }
    final = {name: 0.2 + 0.0001 * i for i, name in enumerate(curves)}
    found = [one.verdict for one in claims.annealing_claims(curves, 2, final)]
    assert found == [
        verdicts.REPRODUCED,
        verdicts.REPRODUCED,
        verdicts.REPRODUCED,
        verdicts.REPRODUCED,
        verdicts.NO_DIFFERENCE,
    ]
    curves["annealed-seed1"] = run(False, 1.1)
    found = [one.verdict for one in claims.annealing_claims(curves, 2, final)]
    assert found[0] == verdicts.NOT_ALL
    alone = {name: one for name, one in curves.items() if name.endswith("-seed0")}
    assert {one.verdict for one in claims.annealing_claims(alone, 2, final)} == {verdicts.ONE_SEED}


def test_conversion_and_position_claims():
    def one(after: float) -> dict[str, Any]:
        return {"before": {"norm_mse": 0.2, "l0": 50.0}, "after": {"norm_mse": 0.2, "l0": after}}

    found = claims.conversion_claims(
        {
            "annealed-seed0": one(55),
            "annealed-seed1": one(56),
            "annealed-seed2": one(55.5),
            "wide-seed100": one(99),
        }
    )
    assert [c.verdict for c in found] == [verdicts.REPRODUCED, verdicts.UNEQUAL]
    metric = "explained_variance_raw_uncentered"
    shares = {"L1R": 0.9, "L1A": 0.5, "L2R": 0.4, "L2A": 0.6}
    told = claims.position_claims({name: {metric: value} for name, value in shares.items()}, [1, 2])
    assert [c.verdict for c in told] == [verdicts.ONE_SEED] and "in 1 of 2 blocks" in told[0].measured


def test_a_report_over_nothing_names_what_is_missing(tmp_path: Path):
    (tmp_path / "settings.json").write_text(
        json.dumps(
            {"preset": "tiny", "dataset": "demo", "eval_dataset": None, "long_dataset": None, "model": "demo",
             "batch_size": 64, "tokens": 640, "position_tokens": 640, "silent_window": 64, "k": 4, "seeds": 1,
             "context_size": 16}
        )
    )  # fmt: skip
    assert llama_scope_report.write_report(tmp_path) == {}
    assert "Not run, or not finished" in (tmp_path / "report/report.md").read_text()
