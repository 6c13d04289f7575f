"""The paper's evaluation in small: interrupted and continued, refused, and what its report says of SAEs that failed."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import paper_claims
import paper_findings
import paper_presets
import paper_report
import paper_stages
import paper_verdicts as verdicts
import reproduce_paper
import study_folder

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"
)
ABOUT = ["name", "method", "kind", "sparsity", "seed"]


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [
        {"text": f"The river {i} was quiet; {i * i} boats lay <b>still</b> | in harbour {i % 7}. " * 3}
        for i in range(80)
    ]
    text.write_text("\n".join(map(json.dumps, rows)))
    return {
        "preset": "smoke", "model": str(tiny_llama_dir), "dataset": str(text), "d_sae": 48, "k": "3",
        "tokens": 64 * 12, "batch_size": 64, "context_size": 16, "lm_batch_size": 4, "kl_tokens": 100,
        "feature_tokens": 300,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a study that nothing interrupted."""
    output = tmp_path_factory.mktemp("paper") / "whole"
    reproduce_paper.main(output=output, **options)
    return output


def core(output: Path) -> dict[str, pd.DataFrame]:
    found = {}
    for name in ("results", "features", "routing", "views"):
        table = pd.read_csv(output / f"report/{name}.csv")
        found[name] = table[table["part"] == "core"].reset_index(drop=True).dropna(axis=1, how="all")
    return found


# --- The recipe -------------------------------------------------------------------------------------------


def test_every_part_is_trained_measured_and_reported(whole: Path):
    results = pd.read_csv(whole / "report/results.csv").set_index("name")
    assert set(results["part"]) == set(paper_presets.PARTS)
    assert set(results["method"]) == {
        *(m for methods in paper_presets.PARTS.values() for m in methods if m != "topk@*"),
        "topk@0", "topk@1", "topk@2", "topk@3",
    }  # fmt: skip
    assert (results["status"] == "evaluated").all() and results["kl"].notna().all()
    assert (results.loc[["route-k3-seed0", "crosscoder_topk-k3-seed1", "mlsae-k3-seed0"], "l0"] <= 3).all()
    assert results["features"].notna().all()
    # routes only where there is a choice of layers
    routed = results[results["effective_layers"].notna()]["method"]
    choosing = {
        "route",
        "random",
        "distilled",
        "distilled_mean",
        "route_soft",
        "route_attention",
        "random_batch",
    }
    assert set(routed) == choosing | set(paper_presets.PARTS["routers"])
    # an SAE's KL under its own rule is that of the view with this rule
    views = pd.read_csv(whole / "report/views.csv").set_index(["name", "rule"])
    assert views.loc[("mlsae-k3-seed1", "fixed 3"), "kl"] == pytest.approx(
        results.loc["mlsae-k3-seed1", "kl"]
    )
    assert set(views.reset_index()["method"]) == {"random", "distilled", "distilled_mean", "mlsae"}
    best = views.loc[("random-k3-seed0", "oracle"), "norm_mse"]
    assert best < views.loc[("random-k3-seed0", "fixed 3"), "norm_mse"]


def test_the_numbers_are_those_of_the_package(whole: Path, tiny_proxy):
    from sae_lens import SAE
    from safetensors.torch import load_file

    import routesae_lens as rl

    sae = SAE.load_from_disk(whole / "core/training/route-k3-seed1")
    tokens = load_file(whole / "held_out.safetensors")["tokens"]
    assert tokens.shape == (-(-300 // 15), 16)
    expected = rl.evaluate(sae, tiny_proxy, tokens[: -(-100 // 15)], progress=False)
    found = core(whole)["results"].set_index("name").loc["route-k3-seed1"]
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert found["norm_mse"] == pytest.approx(expected.norm_mse, rel=1e-4)


def test_profiles_are_of_interpretable_features(whole: Path):
    from routesae_lens.analysis.feature_set import FeatureSet

    for name in ("topk-k3-seed0", "random-k3-seed0"):
        profile = json.loads((whole / f"core/profiles/{name}.json").read_text())
        known = {f.id: f for f in FeatureSet.load(whole / f"core/feature_sets/{name}.json.gz").features}
        assert len(profile["features"]) >= 2
        for feature in profile["features"]:
            assert feature["top"] == known[feature["id"]].tokens[:4]
            assert feature["peak"] == profile["layers"][feature["profile"].index(1.0)]
        peaks = {
            end: [f["peak"] for f in profile["features"] if f["end"] == end] for end in ("early", "late")
        }
        assert max(peaks["early"]) <= min(peaks["late"])


def test_held_out_documents_are_not_trained_on(whole: Path, options: dict[str, Any]):
    about = json.loads((whole / "text.json").read_text())
    assert about["documents_skipped_in_training"] == about["held_out_documents"] > 0
    assert about["epochs"] == pytest.approx(64 * 12 / about["tokens_per_epoch"])


def test_report_has_figures_tables_and_every_claim(whole: Path):
    report = (whole / "report/report.md").read_text()
    for figure in (
        "figure_1",
        "figure_4",
        "figure_5a",
        "figure_6",
        "figure_9",
        "figure_9_distilled",
        "figure_9_distilled_mean",
        "routers",
        "figure_12",
        "fixed_layers",
    ):
        assert f"({figure}.png)" in report
        assert (whole / f"report/{figure}.png").read_bytes().startswith(b"\x89PNG")
    claims = pd.read_csv(whole / "report/claims.csv")
    assert len(claims) == len(paper_claims.PAPER) + len(paper_claims.OURS) + 2
    assert not claims["verdict"].isin([verdicts.NOT_RUN, verdicts.ONE_SEED]).any()
    for heading in (
        "## Table 2",
        "## Table 3",
        "## Collapse",
        "## Blocks by token class",
        "## Other routing rules",
    ):
        assert heading in report
    # every table keeps its columns
    for block in report.split("\n\n"):
        if block.startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1


def test_interrupted_and_continued_gives_the_same(
    whole: Path, options: dict[str, Any], tmp_path: Path, monkeypatch
):
    output = tmp_path / "stopped"

    def run(**changes: Any) -> int:
        try:
            reproduce_paper.main(output=output, part="core", **(options | changes))
        except typer.Exit as stop:
            return stop.exit_code
        return 0

    class SoonInTraining(threading.Timer):
        """Goes off when the training has made two steps, whatever the time."""

        def run(self) -> None:
            log = output / "core/training/log.jsonl"
            while not self.finished.wait(0.002):
                if log.exists() and log.read_text().count("\n") >= 2:
                    self.function()
                    return

    monkeypatch.setattr(study_folder.threading, "Timer", SoonInTraining)
    assert run(minutes=60) == study_folder.STOPPED
    assert json.loads((output / "core/training/run.json").read_text())["status"] == "interrupted"
    assert not (output / "report").exists()
    # between the groups of a measurement
    real, calls = paper_stages.rl.collect_features, []

    def stopped_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(paper_stages, "GROUP", 3)
    monkeypatch.setattr(paper_stages.rl, "collect_features", stopped_at_the_second)
    assert run() == study_folder.STOPPED
    assert len(list((output / "core/features").iterdir())) == 3
    monkeypatch.setattr(paper_stages.rl, "collect_features", real)
    assert run() == 0
    for name, table in core(output).items():
        pd.testing.assert_frame_equal(table, core(whole)[name], check_like=True, check_dtype=False, rtol=1e-6)
    # the report of this part alone
    claims = pd.read_csv(output / "report/claims.csv").set_index("claim")["verdict"]
    assert claims["Soft routing has a higher KL than hard routing"] == verdicts.NOT_RUN
    assert claims["RouteSAE has a lower KL than TopK"].startswith(("reproduced", "not reproduced"))


def test_what_is_done_is_not_done_again(whole: Path, options: dict[str, Any], monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/*/*.json")}
    csv = {path.name: path.read_text() for path in (whole / "report").glob("*.csv")}
    monkeypatch.setattr(paper_stages.rl, "load_model", None)  # not even the model is loaded
    reproduce_paper.main(output=whole, **options)
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/*/*.json")} == before
    assert {path.name: path.read_text() for path in (whole / "report").glob("*.csv")} == csv


def test_wrong_options_are_refused(whole: Path, options: dict[str, Any], tmp_path: Path):
    for changes, message in (
        ({"k": "5"}, r"holds a run with k = \[3\]; choose another --output"),
        ({"preset": "cpu"}, "preset = 'smoke'"),
        ({"preset": "huge"}, "unknown preset 'huge'; known: smoke, cpu, gpu, llama-3.2-1b"),
        ({"part": "cores"}, "unknown part 'cores'"),
        ({"k": "3;4"}, "expected numbers such as 14,20,32, got '3;4'"),
        ({"seeds": 0}, "--seeds must be 1 or more, got 0"),
        ({"minutes": -1}, "--minutes must be positive"),
    ):
        with pytest.raises(typer.BadParameter, match=message):
            reproduce_paper.main(output=whole, **(options | changes))


def test_a_folder_is_free_again_where_nothing_began(options: dict[str, Any], tmp_path: Path, monkeypatch):
    text = tmp_path / "other.jsonl"
    text.write_text(json.dumps({"words": "no column text"}))
    with pytest.raises((typer.BadParameter, ValueError), match="text"):
        reproduce_paper.main(output=tmp_path / "study", **(options | {"dataset": str(text)}))
    assert not (tmp_path / "study/settings.json").exists()
    monkeypatch.setattr(reproduce_paper, "run_part", lambda study, part: None)
    reproduce_paper.main(output=tmp_path / "study", part="core", **options)  # the corrected command


def test_the_report_names_no_machine(whole: Path, options: dict[str, Any]):
    report = whole / "report"
    for path in [*report.glob("*.md"), *report.glob("*.csv"), *report.glob("*.json")]:
        text = path.read_text()
        for folder in (whole.parent, options["model"], Path(options["dataset"]).parent):
            assert str(folder) not in text, path
    settings = json.loads((report / "settings.json").read_text())
    assert settings["model"] == Path(options["model"]).name and settings["dataset"].startswith("text.jsonl (")
    assert paper_findings.plain_name("/far/away/model") == "model"
    assert paper_findings.plain_name("meta-llama/Llama-3.2-1B") == "meta-llama/Llama-3.2-1B"


def test_the_report_begins_with_a_summary(whole: Path):
    report = (whole / "report/report.md").read_text()
    short = report[report.index("## In short") : report.index("## Results")]
    assert report.index("## What was run") < report.index("## In short")
    runs = core(whole)["results"].groupby("method")
    for method in paper_presets.PARTS["core"]:
        [line] = [one for one in short.splitlines() if one.startswith(f"- {paper_presets.NAMES[method]}:")]
        mean = runs.get_group(method)["kl"].mean()
        assert f"KL {verdicts.number(mean)}" in line and "interpretable features" in line
    claims = pd.read_csv(whole / "report/claims.csv")
    paper = claims[claims["where"] != paper_presets.OWN]
    assert f"Of {len(paper)} claims of the paper:" in short
    assert f"- {(paper['verdict'] == verdicts.REPRODUCED).sum()} reproduced" in short
    assert f"- {paper['verdict'].str.startswith(verdicts.NOT_TESTABLE).sum()} not testable here\n" in short


def test_report_alone_needs_no_preset(whole: Path, tmp_path: Path):
    reproduce_paper.main(output=whole, part="report", svg=True)
    assert (whole / "report/figure_4.svg").read_text().startswith("<?xml")
    with pytest.raises(typer.BadParameter, match="holds no study to report"):
        reproduce_paper.main(output=tmp_path / "none", part="report")
    assert not (tmp_path / "none").exists()


# --- The report -------------------------------------------------------------------------------------------


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole study to change: its measurements, and how each training ended."""
    copy = tmp_path / "study"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("training", "feature_sets", "report"))
    for record in whole.glob("*/training/run.json"):
        (copy / record.relative_to(whole).parent).mkdir()
        shutil.copy(record, copy / record.relative_to(whole))
    return copy


def give_status(study: Path, part: str, name: str, status: str, **kept: Any) -> None:
    """As a sweep records a member without numbers."""
    path = study / part / "results" / f"{name}.json"
    record = json.loads(path.read_text())
    about = {key: record[key] for key in ("name", "method", "sparsity_kind", "sparsity", "seed", "versions")}
    path.write_text(json.dumps(about | {"status": status} | kept))


def rows_of(report: str, heading: str, method: str) -> list[str]:
    """Lines of a method in the tables of one section."""
    section = report.split(f"\n## {heading}")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith(f"| {method} |")]


def test_a_diverged_member_is_named_and_left_out(study: Path):
    give_status(study, "core", "route-k3-seed1", "diverged at step 3")
    for kind in ("features", "routing", "views"):
        (study / f"core/{kind}/route-k3-seed1.json").unlink()
    for seed in (0, 1):
        give_status(study, "tables", f"route_soft-k3-seed{seed}", "diverged at step 2")
    give_status(study, "layers", "topk@2-k3-seed0", "diverged at step 7")
    before = paper_findings.gather(study).runs.set_index("name")
    report = paper_report.write_report(study)
    text = (report.folder / "report.md").read_text()
    top = text[: text.index("## In short")]
    assert "- core, diverged at step 3: route-k3-seed1\n" in top
    assert "- tables, diverged at step 2: route\\_soft-k3-seed0, route\\_soft-k3-seed1\n" in top
    assert "Not run, or not finished" not in top  # nothing would change by running it again
    # in the tables: of which seeds the numbers are, and the reason
    [row] = rows_of(text, "Results", "RouteSAE")
    assert row.startswith("| RouteSAE | k 3 | 1 of 2 (seed 1: diverged at step 3) | ")
    assert f" | {verdicts.number(before.loc['route-k3-seed0', 'kl'])} | " in row
    assert rows_of(text, "Results", "RouteSAE, soft") == [
        "| RouteSAE, soft | k 3 | 0 of 2 (diverged at step 2) |" + " – |" * 6
    ]
    [row] = rows_of(text, "One block", "TopK on block 2")
    assert "| 1 of 2 (seed 0: diverged at step 7) |" in row
    assert "- core, diverged at step 3: route-k3-seed1" in text.split("## Table 2")[1].split("## Table 3")[0]
    # and where routers are judged
    [row] = rows_of(text, "Collapse", "RouteSAE")
    assert row.endswith("; seed 1: diverged at step 3 |") and "seed 0: " in row
    [row] = rows_of(text, "Collapse", "RouteSAE, soft")
    assert row.endswith("| seed 0: diverged at step 2; seed 1: diverged at step 2 |")
    assert rows_of(text, "Collapse", "TopK, last block") == []  # one block: nothing to choose
    claims = report.claims.set_index("claim")
    assert claims.loc["RouteSAE has a lower KL than TopK", "verdict"] == verdicts.ONE_SEED
    soft = claims.loc["Soft routing has a higher KL than hard routing"]
    assert (soft["verdict"], soft["needs"]) == (verdicts.NO_NUMBERS, "")


def test_a_member_whose_kl_is_not_finite_gives_no_numbers_at_all(study: Path):
    give_status(study, "core", "random-k3-seed0", "not finite", kl=None, norm_mse=123.0, l0=3.0)
    found = paper_findings.gather(
        study
    )  # its features, routes and views were measured, as those of the others
    assert (study / "core/features/random-k3-seed0.json").exists()
    [row] = found.runs[found.runs["name"] == "random-k3-seed0"].to_dict("records")
    assert row["status"] == "not finite" and math.isnan(row["norm_mse"]) and math.isnan(row["features"])
    for table in (found.features, found.routing, found.views):
        assert "random-k3-seed1" in set(found.runs["name"]) and "random-k3-seed0" not in set(table["name"])
    assert "random-k3-seed0" not in {record["name"] for record in found.profiles}
    text = (paper_report.write_report(study).folder / "report.md").read_text()
    assert "- core, KL not finite: random-k3-seed0\n" in text
    assert "seed 0: KL not finite; seed 1: " in rows_of(text, "Collapse", "Random")[0]


def test_what_is_missing_is_said_with_the_command_that_runs_it(study: Path):
    shutil.rmtree(study / "baselines")
    for path in (study / "routers/results").iterdir():
        path.unlink()
    run = study / "routers/training/run.json"
    run.write_text(json.dumps({"status": "interrupted", "diverged": {"oracle-k3-seed1": 5}}))
    (study / "all_layers/results/mlsae-k3-seed1.json").unlink()
    (study / "layers/features/topk@1-k3-seed0.json").unlink()  # KL is there, features are not
    report = paper_report.write_report(study)
    text = (report.folder / "report.md").read_text()
    top = text[: text.index("## In short")]
    assert "- routers, diverged at step 5: oracle-k3-seed1\n" in top
    assert "- routers, training not finished: oracle-k3-seed0, route\\_balanced-k3-seed0, " in top
    assert "- all\\_layers, evaluation not finished: mlsae-k3-seed1\n" in top
    assert "**Not run, or not finished: routers, baselines, all\\_layers, layers.**" in top
    assert "reproduce_paper.py --preset smoke --output FOLDER --part routers\n" in top
    assert rows_of(text, "Results", "RouteSAE, load balancing") == []  # (nothing is known of it)
    claims = report.claims.set_index("claim")
    relu = claims.loc["ReLU has a higher NormMSE than TopK"]
    assert (relu["verdict"], relu["needs"]) == (verdicts.NOT_RUN, "baselines")
    assert "| **not run**: `--part baselines` |" in rows_of(text, "Every claim", "fig. 12")[2]
    assert set(claims["needs"]) == {"", "baselines", "routers"}
