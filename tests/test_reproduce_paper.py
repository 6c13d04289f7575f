"""The paper's evaluation in small: interrupted and continued, refused, and what the report does with text."""

from __future__ import annotations

import json
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
import paper_tables
import paper_verdicts as verdicts
import reproduce_paper

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

    monkeypatch.setattr(reproduce_paper.threading, "Timer", SoonInTraining)
    assert run(minutes=60) == reproduce_paper.STOPPED
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
    assert run() == reproduce_paper.STOPPED
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


def test_text_from_data_cannot_break_the_page():
    assert paper_tables.escaped("a|b\n<script>*x*</script>[l](u)`c` $x$") == (
        r"a\|b &lt;script&gt;\*x\*&lt;/script&gt;\[l\](u)\`c\` \$x\$"
    )
    assert "\u202e" not in paper_tables.escaped("\u202eabc")


def test_a_diverged_member_is_named_and_left_out(whole: Path, tmp_path: Path):
    study = tmp_path / "study"
    shutil.copytree(whole, study, ignore=shutil.ignore_patterns("training", "feature_sets", "report"))
    path = study / "core/results/route-k3-seed1.json"
    record = json.loads(path.read_text())
    about = {key: record[key] for key in ("name", "method", "sparsity_kind", "sparsity", "seed", "versions")}
    path.write_text(json.dumps(about | {"status": "diverged at step 3"}))
    for kind in ("features", "routing", "views"):
        (study / f"core/{kind}/route-k3-seed1.json").unlink()
    report = paper_report.write_report(study)
    text = (report.folder / "report.md").read_text()
    assert "left out of everything below:** route-k3-seed1 (diverged at step 3)" in text
    claims = report.claims.set_index("claim")["verdict"]
    assert claims["RouteSAE has a lower KL than TopK"] == verdicts.ONE_SEED


def test_figure_1_shows_any_token():
    record = {
        "method": "topk", "layers": [1, 2, 3],
        "features": [
            {"id": 7, "profile": [1.0, 0.5, 0.1], "end": "early", "top": ["$5 and $6", "\u4e2d", "<b>"]},
            {"id": 8, "profile": [0.1, 0.5, 1.0], "end": "late", "top": ["a" * 99]},
        ],
    }  # fmt: skip
    import paper_plots

    figure = paper_plots.profiles([record])
    assert figure is not None
    figure.canvas.draw()
    assert paper_plots.profiles([{"features": []}]) is None
