"""The comparison of mixtures of experts in small: interrupted and continued, refused; its FLOPs and rules by hand."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import experts
import experts_claims as claims
import experts_findings
import experts_methods as methods
import experts_settings
import experts_study
import paper_verdicts as verdicts
import study_folder
from experts_verbs import verb_like
from paper_claims import COLUMNS

import routesae_lens as rl
from routesae_lens.analysis.activation_overlap import activation_similarity
from routesae_lens.analysis.expert_use import expert_utilisation
from routesae_lens.hook_points import layer_hook_name

pytestmark = pytest.mark.filterwarnings(
    "ignore:To copy construct", "ignore:the data holds", "ignore:end of the data"
)
MIXTURES = ("switch", "unscaled_e2", "scale_e1", "scale_e2")


@pytest.fixture(scope="module")
def options(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = tmp_path_factory.mktemp("experts") / "text.jsonl"
    rows = [
        {"text": f"The river {i} was quiet; {i * i} boats lay <b>still</b> | in harbour {i % 7}. " * 2}
        for i in range(120)
    ]
    text.write_text("\n".join(map(json.dumps, rows)))
    return {"preset": "tiny", "model": str(tiny_llama_dir), "dataset": str(text), "seeds": 2}


@pytest.fixture(scope="module")
def whole(options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped between training and redundancy of its first part, and then went on."""
    output = tmp_path_factory.mktemp("experts-run") / "whole"
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(experts_study, "redundancy", stop)
        with pytest.raises(typer.Exit) as stopped:
            experts.main(output=output, part="seeds0", **options)
        assert stopped.value.exit_code == study_folder.STOPPED
    trained = (output / "seeds0/training/run.json").stat().st_mtime_ns
    experts.main(output=output, part="report")
    report = (output / "report/report.md").read_text()
    assert "Not run, or not finished: seeds0, seeds1" in report
    experts.main(output=output, svg=True, **options)
    assert (output / "seeds0/training/run.json").stat().st_mtime_ns == trained
    return output


def test_every_sae_is_measured(whole: Path):
    runs = pd.read_csv(whole / "report/runs.csv")
    by_part = runs.groupby("part")["name"].nunique()
    assert by_part.to_dict() == {"seeds0": 19, "seeds1": 19}  # ten methods, two k but for one
    assert (runs["status"] == "evaluated").all()
    always = ["mse", "norm_mse", "kl", "delta_ce", "loss_recovered", "l0", "dead_share", "redundancy",
              "redundancy_encoder", "similarity", "similarity_verbs", "flops"]  # fmt: skip
    assert runs[always].notna().all(axis=None)
    mixed = runs[runs["experts"] > 0]
    assert (mixed["l0"] <= mixed["sparsity"]).all()
    of_experts = ["intra", "inter", "intra_mean", "inter_mean", "area_verbs", "entropy_verbs", "share_max"]
    assert mixed[of_experts].notna().all(axis=None)
    assert runs.loc[runs["experts"] == 0, of_experts].isna().all(axis=None)
    scaled = runs["scaling"].isin(["mean", "identity", "learned"])
    assert runs.loc[scaled, "omega"].notna().all() and runs.loc[~scaled, "omega"].isna().all()
    # widths: 4 x 32 for all experts together, half of that for TopK and Gated
    sheet = json.loads((whole / "seeds0/sweep.json").read_text())["about"]["saes"]
    assert {sheet[f"{one}-k2-seed0"]["d_sae"] for one in (*MIXTURES, "topk_wide")} == {128}
    assert sheet["topk-k2-seed0"]["d_sae"] == sheet["gated-l10.05-seed0"]["d_sae"] == 64
    experts_of = {one: sheet[f"{one}-k2-seed0"]["n_experts"] for one in MIXTURES}
    assert experts_of == {"switch": 2, "scale_e1": 2, "unscaled_e2": 4, "scale_e2": 4}
    assert sheet["renormalized_e2-k4-seed0"]["expert_weights"] == "renormalized"
    assert sheet["learned_e2-k4-seed0"]["feature_scaling"] == "learned"


def test_omega_is_the_one_that_training_ended_with(whole: Path):
    runs = pd.read_csv(whole / "report/runs.csv").set_index("name")
    sae = rl.SweepResult.read(whole / "seeds1").load("scale_e2-k4-seed1")
    one = runs.loc["scale_e2-k4-seed1"]
    assert one["omega"] == pytest.approx(float(sae.expert_scale.mean()), rel=1e-5)
    assert one["omega_min"] <= one["omega"] <= one["omega_max"]
    curve = pd.read_csv(whole / "report/omega.csv")
    curve = curve[curve["name"] == "scale_e2-k4-seed1"].sort_values("step")
    assert curve["omega"].iloc[0] == 0 and curve["step"].iloc[-1] == 10


def test_mse_is_that_of_equation_a1(whole: Path, options: dict[str, Any]):
    runs = pd.read_csv(whole / "report/runs.csv").set_index("name")
    model = rl.load_model(options["model"])
    about = json.loads((whole / "text.json").read_text())
    settings = experts_settings.PRESETS["tiny"]
    study = experts_study.Study(settings, options["dataset"], None, whole, None)  # type: ignore[arg-type]
    tokens = study.held_out(settings.kl_tokens)
    name = layer_hook_name(model, about["layers"][-1], "hook_resid_post")
    x = model.run_with_cache(tokens)[1][name][:, 1:]
    x = x[tokens[:, 1:] != model.tokenizer.bos_token_id].double()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    sae = rl.SweepResult.read(whole / "seeds0").load("scale_e2-k4-seed0").double()
    z = (x - mean) / (std + 1e-6)
    code = sae.encode_routed(z)
    out = sae.decode_routed(code) if hasattr(sae, "decode_routed") else code @ sae.W_dec + sae.b_dec
    expected = (out * (std + 1e-6) + mean - x).square().mean()
    assert runs.loc["scale_e2-k4-seed0", "mse"] == pytest.approx(float(expected), rel=1e-3)


def test_one_pass_gives_what_the_packages_measures_give(whole: Path, options: dict[str, Any]):
    name = "unscaled_e2-k4-seed0"
    found = json.loads((whole / f"seeds0/redundancy/{name}.json").read_text())
    model = rl.load_model(options["model"])
    settings = experts_settings.PRESETS["tiny"]
    study = experts_study.Study(settings, options["dataset"], None, whole, None)  # type: ignore[arg-type]
    tokens = study.held_out(settings.feature_tokens)
    saes = {name: rl.SweepResult.read(whole / "seeds0").load(name)}
    for which, where in (("all", None), ("verbs", verb_like)):
        similarity = activation_similarity(saes, model, tokens, where=where, progress=False)[name]
        assert found["similarity"][which]["tokens"] == similarity.tokens > 1
        assert found["similarity"][which]["histogram"] == list(similarity.histogram)
        use = expert_utilisation(saes, model, tokens, where=where, progress=False)[name]
        assert found["use"][which]["counts"] == list(use.counts)
    assert found["similarity"]["verbs"]["tokens"] < found["similarity"]["all"]["tokens"]


def test_the_report_shows_every_section_and_figure(whole: Path):
    report = (whole / "report/report.md").read_text()
    for figure in ("frontier", "redundancy", "omega", "utilisation", "overlaps"):
        assert f"]({figure}.png)" in report
        assert (whole / f"report/{figure}.png").stat().st_size > 3000
        assert (whole / f"report/{figure}.svg").exists()
    for heading in ("Every claim", "Error and loss", "FLOPs", "Redundancy", "ω and balance", "Appendix C"):
        assert f"## {heading}" in report
    assert "Not run" not in report and " nan" not in report.lower()
    assert str(whole) not in report
    judged = pd.read_csv(whole / "report/claims.csv")
    assert judged[["claim", "verdict"]].notna().all(axis=None)
    numbers = json.loads((whole / "report/results.json").read_text())
    assert numbers["settings"]["tokens"] == 64 * 10 and numbers["versions"]["sae-lens"]
    assert len(numbers["runs"]) == 38 and len(numbers["utilisation"]) == 2 * 26


def test_a_finished_run_is_only_reported_again(
    whole: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is left to measure")

    monkeypatch.setattr(experts_study, "redundancy", never)
    monkeypatch.setattr(rl, "sweep", never)
    monkeypatch.setattr(rl, "load_model", never)
    experts.main(output=whole, **options)
    shutil.copytree(whole, whole.parent / "copy")
    shutil.rmtree(whole.parent / "copy/report")
    experts.main(output=whole.parent / "copy", part="report")
    assert (whole.parent / "copy/report/report.md").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preset": "huge"}, "unknown preset 'huge'; known: cpu, tiny"),
        ({"part": "seeds7"}, "unknown part 'seeds7'; known: seeds0, seeds1, report"),
        ({"experts": "1,3"}, "the width 128 is not divided by 6 experts (--per-active x 3)"),
        ({"experts": "0,1"}, "--experts must be numbers of 1 or more, got [0, 1]"),
        ({"experts": "two"}, "got 'two'"),
        ({"k": "2,65"}, "--k is 65, but 64 latents are computed for a token"),
        ({"layer": 6}, "--layer is 6, but the model has blocks 0 to 5"),
        ({"gated": "0.1,x"}, "expected coefficients such as 0.2,0.25,0.3, got '0.1,x'"),
        ({"context_size": 65}, "--context-size is 65, but the model reads at most 64 tokens"),
        ({"balance": -1.0}, "--balance must be 0 or more, got -1"),
        ({"tokens": 10}, "training_tokens = 10 is less than one batch of 64 tokens"),
        ({"minutes": -1.0}, "--minutes must be positive"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    options: dict[str, Any], given: dict[str, Any], said: str, tmp_path: Path
):
    with pytest.raises(typer.BadParameter) as error:
        experts.main(output=tmp_path / "new", **options | given)
    assert said in str(error.value)
    assert not (tmp_path / "new").exists()


def test_other_settings_are_refused(options: dict[str, Any], whole: Path, tmp_path: Path):
    with pytest.raises(typer.BadParameter, match="holds a run with k = "):
        experts.main(output=whole, **options, k="3")
    with pytest.raises(typer.BadParameter, match="holds no run to report"):
        experts.main(output=tmp_path / "none", part="report")


# --- FLOPs, verbs, parts ----------------------------------------------------------------------------------


def test_flops_are_matched():
    kinds = {kind.name: kind for kind in methods.main_kinds((1, 2), 8, 0.01, wide=True)}
    # d_model 10, 80 latents: every SAE but the wide one computes 10 of them, 2 x 10 x 10 = 200
    topk, switch, two, wide = (
        methods.flops(kinds[name], 10, 80, 3.0) for name in ("topk", "switch", "scale_e2", "topk_wide")
    )
    assert (topk.encoder, topk.router, topk.decoder, topk.dense_decoder) == (200, 0, 60, 200)
    assert (switch.encoder, switch.router, switch.decoder) == (200, 160, 60)  # 8 experts
    assert (two.encoder, two.router, two.dense_decoder) == (200, 320, 200)  # 16 of them
    assert (wide.encoder, wide.dense_decoder) == (1600, 1600)
    assert topk.total == 260 and two.dense_total == 720


def test_switch_is_the_unscaled_mixture_of_one_expert():
    kinds = {kind.name: kind for kind in methods.main_kinds((1, 4), 8, 0.5, wide=False)}
    assert list(kinds) == ["topk", "gated", "switch", "unscaled_e4", "scale_e1", "scale_e4"]
    assert dict(kinds["switch"].given) == {
        "n_experts": 8, "active_experts": 1, "feature_scaling": "none", "expert_balance_coefficient": 0.5,
    }  # fmt: skip
    assert kinds["scale_e4"].experts == 32 and kinds["scale_e4"].computed == 1 / 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" walked", True), (" went", True), ("walked", False), (" Walked", False), (" need", False), (" red", False),
     (" bed", False), (" walks", False), (" used", True), (" ed", False), (" walk3d", False)],
)  # fmt: skip
def test_verbs_are_told_by_their_text(text: str, expected: bool):
    assert verb_like(text) is expected


def test_the_area_under_a_cdf():
    assert experts_findings.area([0.25, 0.5, 0.75, 1.0]) == 0.5
    assert experts_findings.area([1.0, 1.0]) == 0.75  # (0.5 + 1) / 2


def test_seeds_share_a_pass_where_they_are_asked_to():
    settings = experts_settings.Settings(seeds=3, seeds_at_once=2)
    assert experts_settings.parts_of(settings) == {"seeds0_1": (0, 1), "seeds2": (2,)}
    config = experts_settings.sweep_of(settings, "seeds0_1", 21, 9216)
    assert config.seeds == (0, 1) and config.layers == (21,)


# --- Claims -----------------------------------------------------------------------------------------------

KINDS = {kind.label: kind for kind in methods.main_kinds((1, 2, 4), 8, 0.01, wide=False)}
KINDS |= {kind.label: kind for kind in methods.appendix_kinds(2, 8, 0.01)}
JITTER = (0.0, 0.001, -0.001)


def made(**changes: dict[str, float]) -> pd.DataFrame:
    """Results of three seeds in which every claim holds; ``changes`` by metric are factors of some methods' values."""
    rows = []
    for label, kind in KINDS.items():
        e, scaled, dense = kind.active, kind.scaling != "none", not kind.experts
        good = {"identity": 1.6, "learned": 1.02}.get(kind.scaling, 1.0) * (
            0.5 if "expert_weights" in kind.given else 1
        )
        for k in (16, 32, 64):
            for seed, noise in enumerate(JITTER):
                mse = (2.0 if dense else 2.2 if e == 1 else 1.0 * good) * (1 if dense or scaled else 1.1)
                values = {
                    "mse": mse, "loss_recovered": 0.9 - mse / 10, "kl": mse, "norm_mse": mse,
                    "redundancy": 0.4 if e == 1 and not scaled else 0.003 if scaled else 0.1,
                    "omega": 0.1 * e if kind.scaling == "mean" else None, "intra_minus_inter": 0.2,
                    "inter_mean": 0.5 if e == 1 else 0.2, "area_verbs": 0.5 + e / 20,
                    "similarity_verbs": (0.1 + (0.1 if e > 1 else 0)) * (1 + (0.1 if e == 1 else -0.1) * scaled),
                }  # fmt: skip
                if label == claims.GATED:
                    values |= {"mse": 3.0, "loss_recovered": 0.2}
                values = {name: value * (1 + noise) for name, value in values.items() if value is not None}
                for name in changes.keys() & values.keys():
                    values[name] *= changes[name].get(label, 1.0)
                rows.append(
                    {"method": label, "kind": "l1" if label == claims.GATED else "k", "seed": seed, "l0": float(k),
                     "sparsity": 1 / k if label == claims.GATED else float(k), "status": "evaluated", **values}
                )  # fmt: skip
    return pd.DataFrame(rows)


def judged(runs: pd.DataFrame) -> pd.DataFrame:
    return claims.judged(runs, KINDS, (16, 32, 64), "seeds0")


def test_every_claim_is_reproduced_by_results_in_which_it_holds():
    table = judged(made())
    assert list(table.columns) == COLUMNS
    told = table[~table["verdict"].str.startswith("not testable")]
    assert set(told["verdict"]) == {verdicts.REPRODUCED}, told[told["verdict"] != verdicts.REPRODUCED]
    assert {"abstract", "fig. 2", "fig. 3a", "fig. 3c", "fig. 4a", "fig. 5", "fig. 6a", "fig. 6b", "fig. 7a", "fig. 7b",
            "fig. 8a", "fig. 8b", "fig. 10", "section 2.2.2", "this project"} <= set(told["where"])  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "factors", "where", "part", "verdict"),
    [
        ("mse", {"Scale, e = 2": 3.0}, "abstract", "Scale, e = 2: 24 %", verdicts.OPPOSITE),
        ("mse", {"Scale, e = 2": 2.2}, "abstract", "Scale, e = 2: 24 %", verdicts.NOT_FAR),
        ("mse", {"Scale, e = 4": 1.6}, "fig. 3a", "Scale, e = 4: 37 %", verdicts.NOT_FAR),
        ("mse", {"Switch (e = 1, no scaling)": 0.5}, "fig. 3a", "Switch has no lower", verdicts.OPPOSITE),
        ("mse", {"Scale, e = 4": 1.5}, "fig. 4a", "e >= 2 suffices", verdicts.OPPOSITE),
        ("mse", {"no scaling, e = 2": 0.5}, "fig. 5", "lowers the MSE, e = 2", verdicts.OPPOSITE),
        ("omega", {"Scale, e = 1": -1.0}, "section 2.2.2", "e = 1", verdicts.OPPOSITE),
        ("omega", {"Scale, e = 1": 9.0}, "fig. 2", "ω grows", verdicts.OPPOSITE),
        ("redundancy", {"Scale, e = 2": 10.0}, "abstract", "Scale, e = 2: 99 %", verdicts.NOT_FAR),
        ("redundancy", {"Scale, e = 2": 200.0}, "fig. 8b", "fewer redundant features, e = 2", verdicts.OPPOSITE),
        ("similarity_verbs", {"Scale, e = 1": 0.5}, "fig. 7a", "raises", verdicts.OPPOSITE),
        ("similarity_verbs", {"Scale, e = 2": 2.0}, "fig. 7a", "lowers", verdicts.OPPOSITE),
        ("area_verbs", {"Scale, e = 1": 2.0}, "fig. 6b", "Scale, e = 4", verdicts.OPPOSITE),
        ("intra_minus_inter", {"no scaling, e = 2": -1.0}, "fig. 6a", "More similar", verdicts.OPPOSITE),
        ("mse", {"identity low-pass, e = 2": 0.1}, "fig. 10", "identity", verdicts.OPPOSITE),
        ("mse", {"learned low-pass, e = 2": 2.0}, "fig. 10", "learned low-pass part", verdicts.OPPOSITE),
    ],
)  # fmt: skip
def test_claims_fail_where_the_numbers_say_otherwise(
    metric: str, factors: dict[str, float], where: str, part: str, verdict: str
):
    table = judged(made(**{metric: factors}))
    rows = table[(table["where"] == where) & table["claim"].str.contains(part, regex=False)]
    assert rows["verdict"].iloc[0] == verdict, rows.to_dict("records")


def test_no_verdict_from_one_seed_or_nothing():
    one = made()
    alone = judged(one[one["seed"] == 0])
    assert set(alone.loc[~alone["verdict"].str.startswith("not testable"), "verdict"]) == {verdicts.ONE_SEED}
    none = judged(one.iloc[:0])
    assert set(none.loc[~none["verdict"].str.startswith("not testable"), "verdict"]) == {verdicts.NOT_RUN}
    assert set(none.loc[none["verdict"] == verdicts.NOT_RUN, "needs"]) == {"seeds0"}


def test_without_near_copies_there_is_nothing_to_reduce():
    table = judged(made(redundancy=dict.fromkeys(KINDS, 0.0)))
    about_copies = table["claim"].str.contains("redundant|fewer than half")
    assert set(table.loc[about_copies, "verdict"]) == {claims.NO_COPIES}
    assert (table.loc[~about_copies, "verdict"] != claims.NO_COPIES).all()


def test_the_next_best_is_chosen_at_each_k():
    runs = claims.with_best_baseline(
        made(mse={"Switch (e = 1, no scaling)": 0.1}), "Switch (e = 1, no scaling)"
    )
    best = runs[runs["method"] == claims.BEST]
    assert len(best) == 9 and best["mse"].max() < 0.3
