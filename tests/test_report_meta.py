"""Meta-latents on the page of a run: the record, what the page's script gets, the section, the command."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import context, feature, feature_set, many_features, write_run
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from test_meta_sae import stopping_after
from test_report_browser import CHROMIUM, HOSTILE, Tab, browser  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from routesae_lens.analysis.meta_latents import MetaLatents, meta_latents
from routesae_lens.cli import app
from routesae_lens.report.contents import gather
from routesae_lens.report.meta_record import MetaRecord, meta_rows, widest
from routesae_lens.report.page import render, write_report
from routesae_lens.training.meta_sae import DecoderRows

PARTS: dict[int, list[tuple[int, float]]] = {
    0: [(2, 0.75), (0, 0.5)],
    1: [(2, 0.875)],
    2: [],
    3: [(0, 0.625), (2, 0.25), (1, 0.125)],
    39: [(1, 0.375)],
}
"""Meta-latents of the latents that were analysed; 39 is no feature of the page."""


def record(parts: dict[int, list[tuple[int, float]]] = PARTS, d_sae: int = 40, d_meta: int = 4) -> MetaRecord:
    flat = [one for latent in parts for one in parts[latent]]
    starts = [sum(len(parts[one]) for one in list(parts)[:i]) for i in range(len(parts) + 1)]
    return MetaRecord(
        MetaLatents(
            d_sae=d_sae,
            d_meta=d_meta,
            latents=torch.tensor(list(parts)),
            explained_variance=0.5547,
            l0=len(flat) / len(parts),
            starts=torch.tensor(starts),
            meta=torch.tensor([number for number, _ in flat]),
            activations=torch.tensor([x for _, x in flat]),
        )
    )


def four_features() -> list[Any]:
    tokens = [f" {token}" for token in HOSTILE]
    return [feature(i, [context(tokens[i], 20.0 - i), context(tokens[i] + "s", 19.0 - i)]) for i in range(4)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run", ("route", "topk"))
    (folder / "feature_sets").mkdir()
    feature_set(four_features()).save(folder / "feature_sets" / "route.json.gz")
    return folder


def test_a_record_of_a_run_comes_back(run: Path):
    written = record()
    assert written.found is not None
    path = written.save(run, "route")
    assert path == run / "meta" / "route.json"
    found = MetaRecord.find(run, "route").found
    assert found is not None and found.to_dict() == written.found.to_dict()
    assert MetaRecord.find(run, "topk").found is None
    assert [one.name for one in path.parent.iterdir()] == ["route.json"]
    with pytest.raises(ValueError, match=r"must be a file name, got '\.\./route'"):
        written.save(run, "../route")
    with pytest.raises(ValueError, match="there is no folder"):
        written.save(run / "no", "route")
    with pytest.raises(ValueError, match="this record holds no meta-latents"):
        MetaRecord().save(run, "route")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "other/1"}, "is 'other/1' of 'route'"),
    "another SAE": ({"sae": "topk"}, "of 'topk', expected .* of 'route'"),
    "lists": ({"meta": [1]}, "is damaged: ValueError: the lists"),
    "kind": ({"meta": "abc"}, "is damaged"),
    "ragged": ({"meta": [[1], [2, 3]]}, "is damaged"),
    "missing": ({"l0": None}, "is damaged"),
    "broken number": ({"d_meta": 4.5}, "is damaged: ValueError: .* must be whole numbers"),
    "broken latents": ({"latents": [0, 1.5, 2, 3, 39]}, "is damaged: ValueError: .* must be whole numbers"),
    "width": ({"d_sae": 41}, "meta-latents of an SAE with 41 latents; 'route' has 40"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_record_that_does_not_fit_is_named(bad: str, run: Path):
    path = record().save(run, "route")
    change, message = BAD[bad]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        gather(run, sae="route")
    assert str(run) in str(error.value)


def test_rows_and_table():
    found = record().found
    assert found is not None
    rows = meta_rows(found, feature_set(four_features()))
    assert rows == [
        [0, 2, [[3, 0.625], [0, 0.5]]],
        [1, 2, [[3, 0.125]]],
        [2, 3, [[1, 0.875], [0, 0.75], [3, 0.25]]],
    ]
    assert widest(found, rows) == [
        {"number": 2, "latents": 3, "here": 3, "named": [1, 0, 3]},
        {"number": 0, "latents": 2, "here": 2, "named": [3, 0]},
        {"number": 1, "latents": 2, "here": 1, "named": [3]},
    ]


def test_the_page_with_and_without(run: Path):
    without = render(gather(run, sae="route"))
    assert 'id="meta"' not in without and 'id="meta-data"' not in without and "#meta-" not in body_of(without)
    record().save(run, "route")
    text = render(gather(run, sae="route"))
    [data] = re.findall(r'<script type="application/json" id="meta-data">(.*?)</script>', text)
    assert json.loads(data)[2] == [2, 3, [[1, 0.875], [0, 0.75], [3, 0.25]]]
    assert "0.555" in text and "1 of them dead" in text and '<a href="#meta-2">2</a>' in text
    assert not re.search("[<>&]", data)
    for token in HOSTILE:  # the features' own text is where it was, and nowhere as an element
        assert token in ("</td>", "&amp;&#60;") or token not in body_of(text)
    (run / "feature_sets" / "route.json.gz").unlink()
    bare = render(gather(run, sae="route"))
    assert 'id="meta"' in bare and 'id="meta-data"' not in bare and "#meta-2" not in body_of(bare)


def body_of(page: str) -> str:
    """The page without the script that is our own."""
    return page[: page.rindex("<script>")]


def test_the_file_grows_with_features_not_with_their_pairs(tmp_path: Path):
    sizes = []
    for n in (200, 400):
        folder = write_run(tmp_path / str(n), d_sae=n)
        features = feature_set(many_features(n, 2), d_sae=n)
        before = write_report(folder, features=features, neighbours=0).size
        # All share one meta-latent: n * (n - 1) pairs.
        record({i: [(0, 0.5), (1 + i % 9, 0.25)] for i in range(n)}, n, 10).save(folder, "route")
        sizes.append(write_report(folder, features=features, neighbours=0).size - before)
    assert sizes[1] < 2 * sizes[0]
    assert sizes[1] - sizes[0] < 200 * 40  # bytes for each further feature


def trained_run(folder: Path, d_sae: int = 40) -> Path:
    """As :func:`write_run`, with an SAE that loads; of its latents 30 to 39 never fired."""
    write_run(folder, d_sae=d_sae)
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=12, d_sae=d_sae, k=4))
    sae.save_inference_model(folder / "route")
    (folder / "feature_sets").mkdir()
    feature_set(many_features(30, 2)).save(folder / "feature_sets" / "route.json.gz")
    return folder


def test_the_command(tmp_path: Path):
    run = trained_run(tmp_path / "run")
    words = ["meta", str(run), "--d-meta", "6", "--k", "2", "--steps", "5", "--device", "cpu"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "30 latents of route (10 that never fired left out), 6 meta-latents" in done.output
    found = MetaRecord.find(run, "route").found
    assert found is not None and found.latents.tolist() == list(range(30))
    meta = SAE.load_from_disk(run / "meta" / "route")
    again = meta_latents(SAE.load_from_disk(run / "route"), meta, latents=range(30), progress=False)
    assert again.to_dict() == found.to_dict()
    assert 'id="meta"' in write_report(run).path.read_text()
    again_done = CliRunner().invoke(app, words)
    assert again_done.exit_code == 2 and "already holds a run" in again_done.output
    for wrong, message in (
        (["meta", str(tmp_path)], "is no run"),
        (["meta", str(run), "--sae", "nobody"], "has no SAE 'nobody'"),
        (["meta", str(run), "--device", "quux"], "unknown device 'quux'"),
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2 and message in done.output


def test_the_command_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = trained_run(tmp_path / "run")
    words = ["meta", str(run), "--d-meta", "6", "--k", "2", "--steps", "5", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["routesae-lens", *words])
    with monkeypatch.context() as patch:
        patch.setattr(DecoderRows, "__next__", stopping_after(3))
        stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 130 and "stopped by SIGTERM after step 3 of 5" in stopped.output
    again = shlex.split(stopped.output.strip().splitlines()[-1])
    assert again == ["routesae-lens", *words, "--resume"]
    done = CliRunner().invoke(app, again[1:])
    assert done.exit_code == 0, done.output
    path = run / "meta" / "route.json"
    written, weights = path.read_text(), (run / "meta" / "route" / "sae_weights.safetensors").read_bytes()
    path.unlink()  # stopped between the meta-SAE and its record
    anew = CliRunner().invoke(app, again[1:])
    assert anew.exit_code == 0 and "is finished: it is read as it is" in anew.output
    assert path.read_text() == written
    assert (run / "meta" / "route" / "sae_weights.safetensors").read_bytes() == weights


@pytest.fixture
def tab(browser: Any, run: Path) -> Iterator[Any]:  # noqa: F811
    record().save(run, "route")
    opened = Tab(browser, write_report(run, sae="route", neighbours=0).path, hash="#feature-3")
    yield opened
    opened.context.close()
    assert opened.wrong == []


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: the page was not tried in a browser"
)
def test_a_feature_shows_what_it_shares(tab: Any):
    items = tab.page.locator("#detail .metas > li")
    texts = [text.split("\n")[0] for text in items.all_inner_texts()]
    assert [re.sub(r"\s+", " ", text) for text in texts] == [
        "Meta-latent 0 strength 0.63, in 2 latents; list the 2 features here",
        "Meta-latent 2 strength 0.25, in 3 latents; list the 3 features here",
        "Meta-latent 1 strength 0.13, in 2 latents; no other here",
    ]
    tokens = list(HOSTILE.values())
    assert items.nth(1).locator(".near bdi").all_inner_texts() == [tokens[1].lower(), tokens[0].lower()]
    items.nth(1).locator(".near a").first.click()
    tab.page.wait_for_function("document.querySelector('#detail h3').innerText === 'Feature 1'")
    for _ in range(2):  # the same link works again once the list shows something else
        tab.page.get_by_role("link", name="list the 3 features here").click()
        tab.page.wait_for_function("document.querySelector('#search').value === 'meta:2'")
        assert sorted(tab.latents()) == [0, 1, 3]
        tab.page.locator("#search").fill("")
        assert len(tab.latents()) == 4
        tab.page.evaluate("location.hash = '#feature-1'")
        tab.page.wait_for_function("document.querySelector('#detail h3').innerText === 'Feature 1'")
    assert tab.latents() == [0, 1, 2, 3]
    tab.page.locator("#search").fill("meta:0")
    assert sorted(tab.latents()) == [0, 3]
    # Back in the history comes to the feature, not to the list again.
    tab.page.get_by_role("link", name="list the 3 features here").click()
    tab.page.wait_for_function("location.hash === '#features'")
    tab.page.go_back()
    tab.page.wait_for_function("location.hash === '#feature-1'")
