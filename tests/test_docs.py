"""The documents agree with the tree: API page, map of the house, links. Nothing is imported, so this takes no time."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "recipes/**/*.md", "notebooks/*.ipynb")
    for page in ROOT.glob(pattern)
)


@pytest.fixture
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_is_what_the_docstrings_say(make_api: ModuleType):
    written = make_api.PAGE.read_text(encoding="utf-8")
    assert written == make_api.api_page(), "docs/api.md is not up to date: run `python docs/make_api.py`"


def test_the_api_page_has_every_public_name_once(make_api: ModuleType):
    source = (ROOT / "routesae_lens" / "__init__.py").read_text(encoding="utf-8")
    (exported,) = re.findall(r"^__all__ = (\[.*?^\])", source, re.M | re.S)
    rows = re.findall(r"^\| `(\w+)` \| .+ \|$", make_api.PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(rows) == sorted(ast.literal_eval(exported))


def test_names_without_docstring_or_theme_are_reported(
    make_api: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "routesae_lens"
    (package / "saes").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from routesae_lens.demo import LIMIT, bare, told\nfrom routesae_lens.saes.new import Lost, unused\n"
        '__all__ = ["LIMIT", "Lost", "bare", "told"]\n'
    )
    (package / "demo.py").write_text(
        "def bare(): ...\n\n\ndef told():\n"
        '    """See :func:`~a.b.bare`, ``x|y``\n    and more.\n\n    Not this."""\n\n\n'
        'LIMIT: int = 3\n"""How many."""\n'
    )
    (package / "saes" / "new.py").write_text('class Lost:\n    """A class."""\n')
    monkeypatch.setattr(make_api, "ROOT", tmp_path)
    with pytest.raises(
        ValueError, match=r"(?s)bare: no docstring in routesae_lens/demo.py.*Lost: saes.new is in no"
    ):
        make_api.api_page()
    assert make_api.first_line("told", "demo") == r"See `bare`, `x\|y` and more."
    assert make_api.first_line("LIMIT", "demo") == "How many."


def test_the_map_of_the_house_has_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = []
    for file in sorted((ROOT / "routesae_lens").rglob("*.py")):
        path = file.relative_to(ROOT / "routesae_lens")
        if path.name == "__init__.py":
            continue
        row, name = (f"`{path.parts[0]}/`", path.stem) if len(path.parts) > 1 else (f"`{path}`", path.name)
        line = next(
            (line for line in text.splitlines() if line.startswith("|") and row in line.split("|")[1]), ""
        )
        if f"`{name}`" not in line:
            missing.append(path.as_posix())
    assert missing == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    assert wrong_links(page) == []


def test_the_link_checker_finds_wrong_links(tmp_path: Path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A `Name`, and *more*\n\n```bash\n# not a heading\n```\n")
    page.write_text(
        "# Here\n[a](other.md#a-name-and-more) [b](#here) [c](https://x.org/y) ![d](none.png)\n"
        "[e](other.md#not-a-heading)\n"
        "`[f](code.md)` [![g](gone.png)](lost.md) [h](#there)\n"
    )
    assert wrong_links(page) == ["none.png", "other.md#not-a-heading", "gone.png", "lost.md", "#there"]


def wrong_links(page: Path) -> list[str]:
    """Links of a page to files of the repository that are not there, or to headings that their page lacks."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", path):
            continue  # on the web
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
