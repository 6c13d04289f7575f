"""The steering recipe: from an SAE and its features to a report, and the rule that it judges by."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from conftest import SENTENCES
from spliced import make_sae

import routesae_lens as rl

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))  # a recipe finds its own modules beside it

import steer_verdicts  # noqa: E402
from steer_report import report  # noqa: E402


def recipe(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> dict[str, Any]:
    sae = make_sae()
    sae.save_model(tmp_path / "sae")
    model = rl.load_model(tiny_llama_dir, device="cpu")
    tokens = rl.held_out_tokens(model, list(SENTENCES) * 2, n_sequences=8, context_size=24)
    found = rl.collect_features({"route": sae}, model, tokens, threshold=1.0, progress=False)["route"]
    found.save(tmp_path / "features.json")
    named = [one.id for one in found.features if steer_verdicts.own_tokens(one)][:2]
    return {
        "sae": tmp_path / "sae", "features": tmp_path / "features.json", "latents": ",".join(map(str, named)), "n": 6,
        "strengths": "1,3", "prompt": ["The river", "A router"], "seeds": 2, "controls": 2, "max_new_tokens": 4,
        "temperature": 0.9, "top_k": 30, "seed": 0, "batch_size": 8, "model": str(tiny_llama_dir),
        "backend": "bridge", "device": "cpu", "output": tmp_path / "run",
    }  # fmt: skip


def test_the_recipe_writes_results_report_and_figure(options: dict[str, Any], capsys):
    steer = recipe("steer")
    steer.main(**options)
    output = options["output"]
    results = json.loads((output / "results.json").read_text())
    named = [int(latent) for latent in options["latents"].split(",")]
    assert [one["feature"] for one in results["features"]] == named
    for one in results["features"]:
        assert [row["value"] for row in one["rows"]] == [None, 1.0, 3.0]
        assert one["verdict"] in steer_verdicts.RULE and one["continues"] in steer_verdicts.RULE
        assert len(one["controls"]) == 2 and not {*one["controls"]} & {*named}
        assert one["rows"][2]["kl"] > one["rows"][1]["kl"] > 0 == one["rows"][0]["kl"]
        assert one["rows"][0]["firing_rise"]["mean"] == 0 and one["rows"][0]["completions"] == 4
        assert one["rows"][1]["firing"] == pytest.approx(one["rows"][1]["firing_share"])
    frame = pd.read_csv(output / "results.csv")
    assert len(frame) == 6 and frame["next_rise_stderr"].notna().all()
    assert (output / "dose_response.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "report.md").read_text()
    assert steer_verdicts.RULE in text and all(f"## Feature {latent}:" in text for latent in named)
    said = capsys.readouterr().out
    assert said.index(steer_verdicts.RULE) < said.index(f"{named[0]}: {results['features'][0]['verdict']}")

    # once more: nothing is generated again, and the results are the same
    steer.rl.complete, complete = None, steer.rl.complete
    try:
        steer.main(**options)
        assert json.loads((output / "results.json").read_text()) == results
        with pytest.raises(typer.BadParameter, match="holds a run with seeds=2; choose another --output"):
            steer.main(**options | {"seeds": 3})
    finally:
        steer.rl.complete = complete


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backend": "huggingface"}, "expected bridge or hooked"),
        ({"strengths": "1,x"}, "expected numbers separated by commas"),
        ({"strengths": "2,1"}, "positive and ascending"),
        ({"latents": "4711"}, r"\[4711\] are no interpretable features"),
        ({"n": 0}, "must be 1 or more"),
        ({"prompt": ["a"], "seeds": 1}, "one completion has no spread"),
    ],
)
def test_mistakes_are_refused_before_the_model_loads(options: dict[str, Any], wrong: dict, message: str):
    with pytest.raises(typer.BadParameter, match=message):
        recipe("steer").main(**options | {"model": "/no/such/model"} | wrong)
    assert not options["output"].exists()


# --- the choice of features ------------------------------------------------------------------------


def feature(
    id: int, block: int, above: int, active: int, frequency: float = 0.01, token: str = "word"
) -> rl.Feature:
    context = rl.Context(
        before="a ", token=f" {token}", after=" b", document=0, document_position=1, token_class=token,
        token_id=1, activation=1.0, strength=20.0, block=block, p=1.0, sequence=0, position=1,
    )  # fmt: skip
    return rl.Feature(id, [context] * 4, frequency, 9.0, {block: rl.BlockActivity(active, above, 1.0)}, {})


def test_features_are_chosen_by_selectivity_the_blocks_in_turn():
    steer = recipe("steer")
    features = [
        feature(0, block=7, above=5, active=100),
        feature(1, block=7, above=50, active=100),
        feature(2, block=7, above=20, active=100),
        feature(3, block=9, above=1, active=100),
        feature(4, block=7, above=99, active=100, frequency=0.2),  # too often
        feature(5, block=9, above=99, active=100, token="!?"),  # no word
    ]
    assert [one.id for one in steer.choose(features, 3)] == [1, 3, 2]
    assert [one.id for one in steer.choose(features, 9)] == [1, 3, 2, 0]
    with pytest.raises(typer.BadParameter, match="no interpretable feature"):
        steer.choose(features[4:], 2)


# --- the rule ---------------------------------------------------------------------------------------


def completion(words: list[str], fires: int, sample: int = 0, nll: float = 1.0) -> rl.Completion:
    n = len(words)
    acts = [1.0] * fires + [0.0] * (n - fires)
    return rl.Completion(0, sample, [1] * n, words, "", [0.0] * n, [-nll] * n, [7] * n, {0: list(acts)})


def dose(latent: int, per_row: list[list[rl.Completion]]) -> rl.DoseResponse:
    from routesae_lens.analysis.steering import dose_row

    values = [None, *map(float, range(1, len(per_row)))]
    rows = [dose_row(0, value, row, per_row[0]) for value, row in zip(values, per_row, strict=True)]
    return rl.DoseResponse(latent, "Set", True, rows, per_row)


def completions(fires: list[int], nll: float = 1.0, word: str = "x") -> list[rl.Completion]:
    return [completion([word] + ["y"] * 9, one, i, nll) for i, one in enumerate(fires)]


QUIET, LOUD = [0, 0, 1, 0], [5, 6, 5, 6]
BASE = completions(QUIET)


@pytest.mark.parametrize(
    ("ours", "control", "verdict", "at"),
    [
        ([completions(QUIET), completions(LOUD)], [completions(QUIET)] * 2, "steers", 2.0),
        (
            [completions(QUIET), completions(LOUD, 2.2)],
            [completions(QUIET)] * 2,
            "steers, but breaks fluency",
            2.0,
        ),
        ([completions(LOUD), completions(LOUD)], [completions(LOUD)] * 2, "not specific", 1.0),
        ([completions([0, 9, 0, 0]), completions(QUIET)], [completions(QUIET)] * 2, "does not steer", None),
        ([completions(QUIET, word=" Word "), completions(QUIET)], [completions(QUIET)] * 2, "steers", 1.0),
    ],
)
def test_verdicts(ours, control, verdict, at):
    judged = steer_verdicts.judged(
        feature(0, 7, 5, 9), ["z"], dose(0, [BASE, *ours]), [dose(1, [BASE, *control])]
    )
    assert (judged["verdict"], judged["at"]) == (verdict, at)
    assert judged["continues"] == "does not steer"
    assert judged["controls_that_rise"] == (verdict == "not specific")
    gain = judged["rows"][2]["firing_rise"]
    shares = [(one.firing_share(0) - base.firing_share(0)) for one, base in zip(ours[1], BASE, strict=True)]
    assert gain["mean"] == pytest.approx(sum(shares) / 4)
    assert gain["stderr"] == pytest.approx(float(torch.tensor(shares).std()) / 2, abs=1e-7)


def test_text_that_goes_on_as_expected_is_a_verdict_of_its_own():
    ours, expected = completions(QUIET, word=" z"), ["z"]
    judged = steer_verdicts.judged(
        feature(0, 7, 5, 9), expected, dose(0, [BASE, ours]), [dose(1, [BASE, BASE])]
    )
    assert judged["verdict"] == "does not steer"
    assert (judged["continues"], judged["continues_at"]) == ("steers", 1.0)
    assert judged["rows"][1]["more_frequent"] == ["z (0 → 4)"]


def test_text_of_the_model_is_escaped_in_the_report():
    evil = "<b>|`x`\n# *y*"
    ours = completions(LOUD, word=evil)
    judged = steer_verdicts.judged(
        feature(0, 7, 5, 9), [evil], dose(0, [BASE, ours]), [dose(1, [BASE, BASE])]
    )
    described = recipe("steer").described(feature(0, 7, 5, 9, token=evil), [evil])
    quotes = [{"value": 1.0, "prompt": evil, "text": evil}]
    record = {
        "features": [{**described, **judged, "quotes": quotes}], "completions": 4, "choice": "",
        "options": {
            "strengths": [1.0], "latents": None, "model": evil, "backend": "bridge", "prompts": ["a"], "seeds": 4,
            "temperature": 1.0, "top_k": 5, "max_new_tokens": 4,
        },
    }  # fmt: skip
    text = report(record)
    assert "<b>" not in text and "`x`" not in text and "*y*" not in text.replace(r"\*y\*", "")
    assert "\n# " not in text.removeprefix("# Steering")
