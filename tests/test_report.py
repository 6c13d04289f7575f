"""The page of a run: what is gathered, what is refused, and that no text of data or models gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import LAYERS, context, feature, feature_set, many_features, write_interpretations, write_run
from sweeps import run as run_sweep
from typer.testing import CliRunner

from routesae_lens.cli import app
from routesae_lens.report import page
from routesae_lens.report.contents import gather
from routesae_lens.report.feature_rows import feature_details, feature_rows, histogram, layer_rows, main_layer
from routesae_lens.report.neighbours import nearest_by_cosine
from routesae_lens.report.page import render, write_report
from routesae_lens.report.steering_examples import SteeringExamples
from routesae_lens.report.visible import visible

HOSTILE = [
    "<script>alert(1)</script>",
    "</td>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    "\u202eevil\u202c",
    "&lt;b&gt;",
    "a\u2028b",
    "<!--",
]


def hostile_features() -> list[Any]:
    contexts = [context(t, 30.0 - i, before=t, after=f"{t}\n") for i, t in enumerate(HOSTILE)]
    return [feature(3, contexts), *many_features(2)]


class Elements(HTMLParser):
    """Every element with its attributes, and the text of the scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data


def test_the_layers_of_a_feature():
    one = feature(4, [context("x", 9.0)], active=(0, 30, 10))
    one.blocks[5] = replace(one.blocks[5], mean_activation=6.0)
    # Sums of activation: 0, 30 * 2 = 60 and 10 * 6 = 60; rates: 30 of 500 routed there, 10 of 200.
    assert layer_rows(one, {2: 0, 3: 500, 5: 200}) == [
        [2, 0.0, 0, None, 0],
        [3, 0.5, 30, 0.06, 2],
        [5, 0.5, 10, 0.05, 6],
    ]
    assert main_layer(one) == 3
    one.blocks[5] = replace(one.blocks[5], mean_activation=7.0)
    assert main_layer(one) == 5
    silent = replace(one, blocks={}, decoder_norms={})
    assert (layer_rows(silent, {}), main_layer(silent)) == ([], None)
    crosscoder = replace(one, blocks={}, decoder_norms={5: 3.0, 2: 1.0})
    assert layer_rows(crosscoder, {}) == [[2, 0.25, None, None, None], [5, 0.75, None, None, None]]
    assert main_layer(crosscoder) == 5


def test_the_histogram_counts_from_zero_to_the_largest():
    assert histogram([12.0, 11.0, 0.5, 6.0, 5.99], 12.0) == [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 2]


def test_the_nearest_features_are_those_of_a_naive_search():
    W_dec = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 31)[:, None]
    among = torch.ones(30, dtype=torch.bool)
    among[[2, 9]] = False
    found = nearest_by_cosine(W_dec, [4, 9], among, 3)
    for latent in (4, 9):
        cosines = {
            other: torch.cosine_similarity(W_dec[latent], W_dec[other], dim=0).item()
            for other in range(30)
            if other != latent and among[other]
        }
        expected = sorted(cosines, key=cosines.__getitem__, reverse=True)[:3]
        assert [other for other, _ in found[latent]] == expected
        assert [cosine for _, cosine in found[latent]] == pytest.approx([cosines[i] for i in expected])
    assert [len(near) for near in nearest_by_cosine(W_dec[:3], [0], among[:3], 5).values()] == [1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "my-run", ("route", "topk", "third"))
    (folder / "feature_sets").mkdir()
    feature_set(hostile_features()).save(folder / "feature_sets" / "route.json.gz")
    return folder


def test_what_is_gathered_of_a_run(run: Path):
    shares = {"2": 0.6, "3": 0.3, "5": 0.1}
    (run / "routing").mkdir()
    (run / "routing" / "route.json").write_text(json.dumps({"layer_share": shares, "mean_p": None}))
    contents = gather(run, sae="route", neighbours=2)
    assert (contents.run, contents.sae, contents.saes) == ("my-run", "route", ["route", "topk", "third"])
    assert contents.training["model"] == "tiny-model"  # the name, not where it lies on this machine
    assert contents.evaluation["kl"] == 0.5 and contents.evaluation["layer_share"]["3"] == 1 / 3
    assert contents.routing == {"layer_share": {2: 0.6, 3: 0.3, 5: 0.1}}  # before the evaluation's
    assert [(one["name"], one["kl"], one["l0"]) for one in contents.others] == [
        ("route", 0.5, 4.0),
        ("topk", 0.6, 5.0),
        ("third", 0.7, 6.0),
    ]
    assert contents.curves["losses/overall_loss"].dropna().tolist() == [3.0 / step for step in range(1, 21)]
    assert "metrics/route_entropy" not in contents.curves  # not logged
    assert contents.training_shares is not None
    assert contents.training_shares[LAYERS].iloc[-1].tolist() == [0.5, 0.25, 0.25]
    assert set(contents.neighbours) == {3, 0, 1} and all(len(n) == 2 for n in contents.neighbours.values())


def test_which_sae_is_shown(run: Path):
    assert gather(run).sae == "route"  # the only one with features
    topk = feature_set(many_features(3), "topk")
    topk.save(run / "feature_sets" / "topk.json")
    assert gather(run).sae == "route"  # the lower KL of the two
    assert gather(run, features=topk).sae == "topk"
    (run / "feature_sets" / "route.json.gz").unlink()
    (run / "feature_sets" / "topk.json").unlink()
    contents = gather(run)
    assert (contents.sae, contents.features) == ("route", None)
    assert gather(write_run(run.parent / "one", ("alone",))).sae == "alone"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"run": "missing"}, "there is no folder"),
    "no run": ({"run": "."}, "is no run.*its folders my-run are runs"),
    "no such sae": ({"sae": "nobody"}, "has no SAE 'nobody'; it has: route, topk, third"),
    "another width": ({"features": feature_set(many_features(2), d_sae=41)}, "41 latents .*'route' has 40"),
    "another sae's": ({"features": feature_set(many_features(2), "topk"), "sae": "route"}, "of 'topk', another SAE"),
    "a stranger's": ({"features": feature_set(many_features(2), "stranger")}, "no SAE of .*: route, topk, third"),
    "no contexts": ({"contexts": 0}, "contexts must be 1 or more, got 0"),
    "no neighbours": ({"neighbours": -1}, "neighbours must be 0 or more, got -1"),
    "nowhere": ({"output": "no/where/page.html"}, "there is no folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str, run: Path, monkeypatch: pytest.MonkeyPatch):
    options, message = REFUSED[case]
    monkeypatch.chdir(run.parent)
    with pytest.raises(ValueError, match=message):
        write_report(**({"run": "my-run"} | options))
    assert not list(run.parent.rglob("*.html"))


def test_a_damaged_file_is_named(tmp_path: Path):
    edits: list[tuple[str, Any]] = [
        ("config", None), ("config", {"saes": ["route"]}), ("seeds", [1]), ("versions", 3),
        ("config", {"saes": {"route": {"d_sae": "big"}}}), ("config", {"saes": {"route": {"layers": [2]}}}),
        ("config", {"saes": {"route": {"d_sae": 40}}, "training_tokens": "many"}),
    ]  # fmt: skip
    for number, (name, value) in enumerate(edits):
        run = write_run(tmp_path / str(number))
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {name: value}))
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            write_report(run)
    run = write_run(tmp_path / "log")
    whole = (run / "log.jsonl").read_text()
    for line in (
        "garbage",
        '{"step": 1, "route/losses/overall_loss": 3}',
        '{"tokens": "x", "route/eval/kl": 1}',
    ):
        (run / "log.jsonl").write_text(f"{whole}{line}\n")
        with pytest.raises(ValueError, match=r"log\.jsonl is damaged"):
            write_report(run)
    (run / "log.jsonl").write_text(whole + '{"step": 21, "tok')  # a run that is being written, or was killed
    assert len(gather(run).curves) == 20 + 1
    (run / "steering.json").write_text('{"doses": {"feature": 1, "edit": "x", "rows": 5}}')
    with pytest.raises(ValueError, match=r"steering\.json is damaged"):
        write_report(run)


def test_files_of_another_sae_are_refused(run: Path):
    layers = feature_set(many_features(2))
    layers.layer_tokens = {2: 5, 4: 5}
    with pytest.raises(ValueError, match=r"on layers \[2, 4\]; 'route' reads \[2, 3, 5\]"):
        gather(run, sae="route", features=layers)
    told = {"category": "low-level", "score": 2, "explanation": "x"}
    write_interpretations(run, {"40": told})
    with pytest.raises(ValueError, match="interprets latent 40, but the SAE has 40"):
        gather(run, sae="route")
    write_interpretations(run, {"3": told}, "topk")
    (run / "interpretations" / "topk.json").replace(run / "interpretations" / "route.json")
    with pytest.raises(ValueError, match="features of 'topk', expected those of 'route'"):
        gather(run, sae="route")


def test_rows_and_details(run: Path):
    write_interpretations(run, {"3": {"category": "high-level", "score": 4, "explanation": "<i>rivers</i>"}})
    contents = gather(run, sae="route", neighbours=2)
    rows = feature_rows(contents)
    classes = [token.strip().lower() for token in HOSTILE]
    assert rows[0] == [3, 0.1, 30, 3, classes, "high-level", 4, "<i>rivers</i>"]
    assert rows[1][0] == 0 and rows[1][5:] == [None, None, None]
    [details] = feature_details(contents, n_contexts=2)
    layers, (counts, largest), kept, contexts, near = details[0]
    assert [row[0] for row in layers] == LAYERS and (sum(counts), largest, kept) == (8, 30, 8)
    assert contexts == [
        [HOSTILE[0], HOSTILE[0], HOSTILE[0] + "\n", 30, 3, 0.75, 7, 11],
        [HOSTILE[1], HOSTILE[1], HOSTILE[1] + "\n", 29, 3, 0.75, 7, 11],
    ]
    assert [latent for latent, _ in near] == [latent for latent, _ in contents.neighbours[3]]


def test_no_text_leaves_its_place(run: Path):
    write_interpretations(run, {"3": {"category": "high-level", "score": 4, "explanation": HOSTILE[2]}})
    (run / "steering").mkdir()
    pair = {"prompt": HOSTILE[0], "original": {"text": HOSTILE[3]}, "steered": {"text": HOSTILE[4]}}
    (run / "steering" / "results.json").write_text(json.dumps({"latent": 3, "pairs": [pair]}))
    text = render(replace(gather(run, sae="route"), run=HOSTILE[2]), n_contexts=8)
    elements = Elements(text)
    kinds = [attributes.get("type") for tag, attributes in elements.found if tag == "script"]
    assert kinds == ["application/json", "application/json", None]
    assert "img" not in {tag for tag, _ in elements.found}
    rows, details = map(json.loads, elements.scripts[:2])
    assert rows["rows"][0][7] == HOSTILE[2]
    assert [one[1] for one in details[0][3]] == HOSTILE  # exactly, as data
    assert not re.search("[<>&\u2028]", elements.scripts[0] + elements.scripts[1])
    assert "\u202e" not in text and "‹U+202E›evil‹U+202C›" in text
    assert "&lt;/script&gt;&lt;script&gt;alert(2)" in text  # the run's name, in title and heading


def test_the_page_stands_alone(run: Path):
    text = render(gather(run, sae="route"))
    elements = Elements(text)
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "object") or attributes.get("href") == "data:,"
        assert "src" not in attributes
        assert all(not name.startswith("on") for name in attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), attributes
    assert not re.search(r"url\((?!#)|@import", text)
    # The browser is told to run this very script and no other, and to load nothing.
    digest = base64.b64encode(hashlib.sha256(elements.scripts[-1].encode()).digest()).decode()
    [policy] = [a["content"] for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src 'sha256-{digest}'" in str(policy) and "default-src 'none'" in str(policy)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert (
        "#000a0" not in text and "#000b0" not in text and "#000c" not in text
    )  # every stand-in colour is replaced


def test_the_page_is_written_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch):
    report = write_report(run, sae="route")
    assert report.path == run / "report-route.html" and report.features == 3
    before = report.path.read_text()
    assert report.size == len(before.encode())
    monkeypatch.setattr(page, "render", lambda *_: "other")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            write_report(run, sae="route")
    assert [path.read_text() for path in run.iterdir() if "report-route" in path.name] == [before]


def test_a_sweep_and_its_report(tmp_path: Path):
    result = run_sweep(tmp_path / "sweep", methods=["route", "topk"], sparsities={}, k=[2, 3], seeds=[0])
    found = feature_set(many_features(5), "topk-k3-seed0")
    found.layer_tokens = {4: 1000}
    contents = gather(result.output, features=found)
    assert contents.sae == "topk-k3-seed0"
    assert contents.evaluation["kl"] == result.results["topk-k3-seed0"]["kl"]
    assert {(one["name"], one["method"]) for one in contents.others} == {
        (f"{method}-k{k}-seed0", method) for method in ("route", "topk") for k in (2, 3)
    }
    assert set(contents.neighbours) == set(range(5))
    routed = gather(result.output, sae="route-k2-seed0")
    assert set(routed.routing["layer_share"]) == {1, 2, 4} and routed.training_shares is not None
    for one in (contents, routed):
        assert one.curves["losses/overall_loss"].notna().sum() > 5
        assert 'id="sparsity"' in render(one)


def test_a_run_without_evaluation_and_features(tmp_path: Path):
    folder = write_run(tmp_path / "bare", ("route",))
    (folder / "log.jsonl").unlink()
    text = render(gather(folder))
    assert "holds no evaluation" in text and "No features were collected" in text
    assert 'id="training"' not in text and 'id="sparsity"' not in text
    none = feature_set([])
    assert "No latent of this SAE has 2 contexts above 6" in render(gather(folder, features=none))


def test_unseen_characters_are_written_out():
    assert visible("a\u202eb\u200b\tc\nd é 漢 \ud800") == "a‹U+202E›b‹U+200B›‹U+0009›c\nd é 漢 ‹U+D800›"


def test_steering_examples_are_found_wherever_they_stand(tmp_path: Path):
    def pair(text: str) -> dict[str, Any]:
        return {"prompt": text, "original": {"text": "as it is"}, "steered": {"text": "steered"}}

    row = {"value": 5.0, "kl": 0.2, "activation": 1.0, "perplexity": 9.0, "changed": 0.5}
    dose = {"feature": 8, "edit": "Set", "relative": False, "rows": [row], "texts": [["first", "second"]]}
    (tmp_path / "steering.json").write_text(
        json.dumps({"7": {"pairs": [pair("one")]}, "other": {"sae": "topk", "pairs": [pair("not this")]}})
    )
    (tmp_path / "steering").mkdir()
    (tmp_path / "steering" / "route.json").write_text(json.dumps({"feature": 8, "all": [dose, pair("two")]}))
    found = SteeringExamples.find(tmp_path, "route")
    assert found.pairs == [
        {"label": label, "prompt": prompt, "original": "as it is", "steered": "steered"}
        for label, prompt in (("Feature 7", "one"), ("Feature 8", "two"))
    ]
    assert found.doses == [
        {"feature": 8, "edit": "Set", "relative": False, "rows": [row | {"text": "first"}]}
    ]
    assert SteeringExamples.find(tmp_path / "missing", "route") == SteeringExamples()


def test_steering_examples_of_the_command_and_of_the_recipe(tmp_path: Path):
    row = {"value": None, "kl": 0.0, "activation": 1.0, "perplexity": 9.0, "changed": 0.0}
    dose = {"feature": 8, "edit": "Set", "relative": True, "rows": [row], "texts": [["first"]]}
    pair = {"prompt": "one", "original": {"text": "a"}, "steered": {"text": "b"}}
    settings = {"sae": "runs/mine/route", "edits": {"8": "Set(20.0)"}}
    command = {"settings": settings, "pairs": [pair], "dose_response": dose}
    recipe = {
        "options": {"sae": "route"},
        "features": [{"feature": 8, "texts": [dose, dose | {"feature": 9}]}],
    }
    (tmp_path / "steering").mkdir()
    for name, content in (("steering", command), ("results", recipe)):
        (tmp_path / "steering" / f"{name}.json").write_text(json.dumps(content))
    found = SteeringExamples.find(tmp_path, "route")
    assert [one["label"] for one in found.pairs] == ["Feature 8: Set(20.0)"]
    assert [one["feature"] for one in found.doses] == [8, 8]  # the control, 9, is left out
    assert SteeringExamples.find(tmp_path, "topk") == SteeringExamples()


def test_the_command(run: Path, tmp_path: Path):
    output = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(run), "--sae", "route", "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert "route, 3 features" in done.output and "Feature" in output.read_text()
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "is no run" in done.output
    done = CliRunner().invoke(app, ["report", str(run), "--sae", "topk"])
    assert done.exit_code == 0 and "no features" in done.output
