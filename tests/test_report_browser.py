"""The page of a run in a real browser: headless Chromium of the system (``apt-get install chromium``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import context, feature, feature_set, many_features, write_interpretations, write_run

from routesae_lens.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: the page was not tried in a browser"
)

N = 300
HOSTILE = {  # how each token reads on the page
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    "</td>": "</td>",
    "</script><script>alert(2)</script>": "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>": "<img src=x onerror=alert(3)>",
    "\u202eevil": "RLOevil",
    "&amp;&#60;": "&amp;&#60;",
    "a\u200bb\u0007": "aZWSPbU+0007",
}
SCORES = {i: 1 + i % 5 for i in range(0, N, 10)}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("report") / "run", ("route", "topk"), d_sae=N)
    features = many_features(N, 4)
    contexts = [context(t, 60.0 - i, before=f"</p>{t} ", after=f" {t}\nend") for i, t in enumerate(HOSTILE)]
    features[77] = feature(77, contexts, 0.4)
    told: dict[str, dict[str, Any]] = {
        str(i): {"category": "low-level", "score": score, "explanation": f"Words of group {i}."}
        for i, score in SCORES.items()
    }
    told["77"] = {"category": "high-level", "score": 5, "explanation": "<img src=x onerror=alert(4)> zebra"}
    write_interpretations(folder, told)
    return write_report(folder, sae="route", features=feature_set(features, d_sae=N)).path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page was not tried in a browser")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's does not work for root
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield opened
        opened.close()


class Tab:
    """The page in a tab, and everything that should not have happened in it."""

    def __init__(self, browser: Any, path: Path, width: int = 1200, hash: str = "", **options: Any):
        self.wrong: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on(
            "dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss())
        )
        self.url = path.as_uri()
        self.page.on("request", lambda request: self._request(request.url))
        self.page.goto(self.url + hash)
        self.page.locator("#rows tbody tr").first.wait_for(state="attached")

    def _request(self, url: str) -> None:
        if url.partition("#")[0] != self.url and not url.startswith("data:"):
            self.wrong.append(f"request: {url}")

    def latents(self, n: int | None = None) -> list[int]:
        return [int(text) for text in self.page.locator("#rows tbody a").all_inner_texts()[:n]]

    def search(self, text: str) -> list[int]:
        self.page.locator("#search").fill(text)
        found = self.latents()
        assert self.page.inner_text("#found") == f"{len(found)} of {N} features"
        return found

    @property
    def focused(self) -> str:
        return self.page.evaluate("document.activeElement.innerText")


@pytest.fixture
def tab(browser: Any, page_file: Path) -> Iterator[Tab]:
    opened = Tab(browser, page_file)
    yield opened
    opened.context.close()
    assert opened.wrong == []


def test_rows_are_made_as_the_reader_needs_them(tab: Tab):
    assert tab.page.inner_text("#found") == f"{N} features"
    assert 50 <= len(tab.latents()) < N
    for made in (150, 250):
        tab.page.locator("#rows tbody tr").last.scroll_into_view_if_needed()
        tab.page.locator("#rows tbody tr").nth(made).wait_for(state="attached")
    assert sorted(tab.latents()) == list(range(N))
    assert tab.page.locator("#rows table").get_attribute("aria-rowcount") == str(N + 1)


def test_search(tab: Tab):
    assert tab.search("zebra") == [77]
    assert tab.search("29") == sorted([29, *range(290, 300)], key=lambda i: (-(i % 17), i))
    assert tab.search("<script>alert(1)</SCRIPT>") == [77]
    assert tab.search("&amp;") == [77]
    assert tab.search("\u202eevil") == [77]
    assert tab.search("group 120") == [120]
    assert tab.search("no such word") == []
    tab.page.keyboard.press("Escape")
    assert tab.page.inner_text("#found") == f"{N} features" and len(tab.latents()) > 50


def test_sort(tab: Tab):
    top = {i: 10 + i % 17 for i in range(N)} | {77: 60}
    assert tab.latents(60) == sorted(top, key=lambda i: (-top[i], i))[:60]
    tab.page.click("#direction")
    assert tab.latents(60) == sorted(top, key=lambda i: (top[i], i))[:60]
    tab.page.click("th[data-key=frequency] button")
    frequency = {i: i * 7919 % N + 1 for i in range(N)} | {77: 0.4 * 2 * N}
    assert tab.latents(60) == sorted(frequency, key=lambda i: (-frequency[i], i))[:60]
    head = tab.page.locator("th[data-key=frequency]")
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert tab.latents(3) == sorted(frequency, key=lambda i: (frequency[i], i))[:3]
    tab.page.select_option("#sort", "score")
    scores = SCORES | {77: 5}
    assert tab.latents(31) == sorted(scores, key=lambda i: (-scores[i], i))  # those without come later
    tab.page.select_option("#sort", "layer")
    layers = [int(text) for text in tab.page.locator("td[data-name=layer]").all_inner_texts()]
    assert layers == sorted(layers) and layers[0] == 2


def test_a_feature_opens_and_its_text_does_nothing(tab: Tab):
    tab.page.locator("#rows tbody tr").first.click()
    title = tab.page.locator("#detail h3")
    title.wait_for()
    assert title.inner_text() == "Feature 77" and tab.page.url.endswith("#feature-77")
    assert tab.page.locator("#detail mark").all_inner_texts() == list(HOSTILE.values())
    first = tab.page.locator("ol.contexts li").first.inner_text()
    read = "<script>alert(1)</script>"
    assert first.startswith(f"</p>{read} {read} {read}⏎end") and "activation 60 · layer 3 · p 0.75" in first
    chips = tab.page.locator("tr.chosen .token").all_inner_texts()
    assert chips == [*HOSTILE.values()][:5]
    assert tab.page.locator("#detail .says").inner_text().strip() == "<img src=x onerror=alert(4)> zebra"
    assert tab.page.evaluate("document.querySelectorAll('img, #features b, td td').length") == 0
    assert tab.page.evaluate("[...document.scripts].filter((s) => !s.type).length") == 1
    # 30 active tokens of mean 2 in layer 3 and 5 in layer 5; 500 and 200 tokens were routed there.
    rows = [row.split() for row in tab.page.locator("table.layers tbody tr").all_inner_texts()]
    assert rows == [["3", "85.7", "%", "30", "6", "%", "2"], ["5", "14.3", "%", "5", "2.5", "%", "2"]]
    assert "Silent in layer 2." in tab.page.inner_text("#detail")
    shares = tab.page.eval_on_selector_all(
        "#detail mark", "all => all.map((m) => +m.style.getPropertyValue('--share'))"
    )
    assert shares == pytest.approx([(60 - i) / 60 for i in range(len(HOSTILE))])
    colors = tab.page.eval_on_selector_all(
        "#detail mark", "all => all.map((m) => getComputedStyle(m).backgroundColor)"
    )
    assert len(set(colors)) == len(HOSTILE)
    histogram = tab.page.locator(".histogram").get_attribute("aria-label")
    assert histogram == "Kept contexts by activation. 50 to 55: 1; 55 to 60: 6"
    near = tab.page.locator("ul.near a").first
    latent = near.inner_text()
    near.click()
    tab.page.locator("#detail h3", has_text=f"Feature {latent}").wait_for()


def test_a_link_opens_a_feature(browser: Any, page_file: Path):
    tab = Tab(browser, page_file, hash="#feature-13")
    tab.page.locator("ol.contexts li").first.wait_for()
    assert tab.page.inner_text("#detail h3") == "Feature 13"
    tab.page.evaluate("location.hash = '#feature-999'")
    tab.page.locator("#detail", has_text="not among the features").wait_for()
    assert tab.wrong == []
    tab.context.close()


def test_the_keyboard(tab: Tab):
    keys = tab.page.keyboard
    first, second, third = tab.latents(3)
    tab.page.locator("#search").focus()
    keys.press("ArrowDown")
    assert tab.focused == str(first)
    keys.press("j")
    keys.press("ArrowDown")
    assert tab.focused == str(third)
    keys.press("k")
    keys.press("Enter")
    tab.page.locator("#detail h3", has_text=f"Feature {second}").wait_for()
    assert tab.focused == f"Feature {second}"
    keys.press("j")
    tab.page.locator("#detail h3", has_text=f"Feature {third}").wait_for()
    keys.press("Escape")
    assert tab.focused == str(third) and tab.page.url.endswith("#features")
    outline = tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen


def test_the_theme_can_be_chosen(tab: Tab):
    def ground() -> str:
        return tab.page.evaluate("getComputedStyle(document.body).backgroundColor")

    button = tab.page.locator("#theme")
    grounds = [(button.inner_text(), ground())]
    for _ in range(2):
        button.click()
        grounds.append((button.inner_text(), ground()))
    light, dark = "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    assert grounds == [("Theme: as the system", light), ("Theme: light", light), ("Theme: dark", dark)]


@pytest.mark.parametrize(("width", "scheme"), [(1200, "dark"), (400, "light")])
def test_it_is_accessible(browser: Any, page_file: Path, width: int, scheme: str):
    """By axe-core, every rule of WCAG 2.1 A and AA that can be checked, contrast among them."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = Tab(browser, page_file, width, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce")
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    tab.search("77")  # a short list: the checker takes its time with each row
    for opened in (False, True):
        if opened:
            tab.page.evaluate("location.hash = '#feature-77'")
            tab.page.locator("ol.contexts li").first.wait_for()
        assert (
            tab.page.evaluate("document.documentElement.scrollWidth") <= width
        )  # nothing to scroll sideways
        found = axe.run(tab.page, options=rules).response
        assert len(found["passes"]) > 10
        broken = [
            (one["id"], node["target"], node["failureSummary"])
            for one in found["violations"]
            for node in one["nodes"]
        ]
        assert broken == []
    tab.context.close()
