"""Rules of the house: which module may import which, and what the top-level files promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = "routesae_lens"

# A module imports from its own row and from earlier ones, never from a later one.
ROWS = (
    "demo",
    "models",
    "backends",
    "hook_points",
    "saes",
    "splice",
    "analysis",
    "training",
    "report",
    "cli",
)


def test_imports_run_one_way():
    assert wrong_imports(ROOT / PACKAGE) == []


def wrong_imports(package: Path) -> list[str]:
    """Every import under ``package`` that goes against ``ROWS``, and every file that has no row there."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        row, where = parts[0], file.relative_to(package).as_posix()
        if row == "__init__":
            continue  # the top package gathers the public names
        if row not in ROWS:
            wrong.append(f"{where}: no row {row!r}; give it its place in ROWS")
            continue
        for line, target in imported_rows(ast.parse(file.read_text(encoding="utf-8")), parts[:-1]):
            if target not in ROWS:
                wrong.append(f"{where}:{line}: imports {target!r}, which is no row")
            elif ROWS.index(target) > ROWS.index(row):
                wrong.append(f"{where}:{line}: {row} imports {target}, which comes later")
    return wrong


def imported_rows(tree: ast.Module, folder: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and row of every import of this package, those in functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(tree):
        names: list[list[str]] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = (PACKAGE, *folder)
            base = [*here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names]
        for name in names:
            if name[0] == PACKAGE and name != [PACKAGE, "__version__"]:
                # A bare `import routesae_lens` reaches everything, so it is no row and gets reported.
                yield node.lineno, name[1] if len(name) > 1 else PACKAGE


BAD_FILES = {
    "__init__.py": "from .cli import app",
    "demo.py": "def f():\n    from .saes.route import A",
    "models.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import routesae_lens.cli as c",
    "saes/__init__.py": "from .route import A\nfrom ..hook_points import B",
    "saes/route.py": "from .. import demo, training\nfrom . import other\nimport torch.training",
    "saes/deep/own.py": "from ...splice import C\nfrom ..route import A",
    "analysis.py": "import routesae_lens\nfrom routesae_lens import RouteSAE, __version__, saes",
    "cli.py": "from routesae_lens import training\nfrom routesae_lens.report import R",
    "misc.py": "",
}


def test_the_import_checker_finds_wrong_imports(tmp_path: Path):
    for name, text in BAD_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert wrong_imports(tmp_path) == [
        "analysis.py:1: imports 'routesae_lens', which is no row",
        "analysis.py:2: imports 'RouteSAE', which is no row",
        "demo.py:2: demo imports saes, which comes later",
        "misc.py: no row 'misc'; give it its place in ROWS",
        "models.py:3: models imports cli, which comes later",
        "saes/deep/own.py:1: saes imports splice, which comes later",
        "saes/route.py:1: saes imports training, which comes later",
    ]


@pytest.mark.parametrize("folder", [PACKAGE, "recipes", "tests"])
def test_no_file_is_called_utils(folder: str):
    assert (ROOT / folder).is_dir()
    assert list((ROOT / folder).rglob("utils.py")) == []


def test_the_pinned_versions_are_within_the_declared_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(one for extra in extras for one in extra if "[" not in one)]
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for requirement in map(Requirement, declared):
        if requirement.name == "pip":
            continue  # the installer itself comes with the environment
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_package_says_that_it_is_typed():
    assert (ROOT / PACKAGE / "py.typed").is_file()


def test_the_readme_names_make_targets_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, re.S))  # not "make sure" in a sentence
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", code))
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert named and named <= targets


def test_the_package_imports_without_what_only_plots_need():
    blocked = "import sys; sys.modules |= dict.fromkeys(('matplotlib', 'umap'), None)\n"
    subprocess.run([sys.executable, "-c", blocked + "import routesae_lens, routesae_lens.cli"], check=True)
