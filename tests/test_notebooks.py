"""The notebooks: executed on a tiny model, clean, and written against the public API alone."""

from __future__ import annotations

import ast
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import routesae_lens as rl

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
NAMES = ["01_tour", "02_features", "03_steering"]
PUBLIC = ("routesae_lens", "sae_lens", "transformer_lens")
BESIDE = {"IPython", "json", "matplotlib", "numpy", "os", "pandas", "pathlib", "torch"}
"""What else a notebook may import: what comes with the extra ``notebooks``."""
METADATA = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def test_all_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


# --- executed


@pytest.fixture(scope="module")
def kernel(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NotebookClient]:
    """One kernel for all notebooks, in which the libraries are imported once."""
    no_model = tmp_path_factory.mktemp("cache")
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=300, kernel_name="python3")
    variables = {
        "ROUTESAE_LENS_TINY": str(tiny_llama_dir),
        "ROUTESAE_LENS_CACHE": str(no_model),
        "OMP_NUM_THREADS": "1",
    }
    with client.setup_kernel(env={**os.environ, **variables}):
        yield client
    assert not list(no_model.iterdir()), "the demo model was asked for"


def execute(name: str, folder: Path, kernel: NotebookClient) -> str:
    """Run a notebook in ``folder``, without the names of those before it; what it printed."""
    fresh = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}")
    kernel.nb = notebook = read(next(path for path in NOTEBOOKS if path.stem == name))
    notebook.cells.insert(0, fresh)
    kernel.reset_execution_trackers()
    for index, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, index)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot was shown"
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_one_after_the_other(kernel: NotebookClient, tmp_path: Path):
    printed = [execute(name, tmp_path, kernel) for name in NAMES]
    run = tmp_path / "runs/tour"
    assert not (tmp_path / "runs/short").exists()  # 2 and 3 took the SAE of 1
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    features = rl.FeatureSet.load(run / "feature_sets/route.json.gz")
    assert features.count() > 0 and f"{features.count()} interpretable features" in printed[1]
    judged = rl.Interpretations.load(run / "interpretations/route.json")
    assert judged.asked == min(3, features.count()) and judged.summary() in printed[1]
    page = next(run.glob("report*.html")).read_text(encoding="utf-8")
    assert "nats per token between the model and the spliced model" in page  # the evaluation of 1 is on it
    examples = json.loads((run / "steering/route.json").read_text())
    assert examples["pairs"] and [row["value"] for row in examples["doses"][0]["rows"]] == [None, 1, 2, 4]


@pytest.mark.slow
def test_the_last_alone(kernel: NotebookClient, tmp_path: Path):
    execute(NAMES[2], tmp_path, kernel)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["short"]
    assert (tmp_path / "runs/short/feature_sets/route.json.gz").exists()


@pytest.mark.slow
def test_a_failing_cell_fails(kernel: NotebookClient):
    kernel.nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        kernel.execute_cell(kernel.nb.cells[0], 0)


def test_the_last_two_train_alike():
    """What is missing they make in the same way, so it is enough to execute one of them alone."""
    starts = []
    for path in NOTEBOOKS[1:]:
        code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
        starts.append(next(one.split("sae = SAE.load")[0] for one in code if "rl.train(" in one))
    assert starts[0] == starts[1] and 'Path("runs/short")' in starts[0]


# --- clean


def noise(notebook: nbformat.NotebookNode) -> list[str]:
    """What a machine or a run has left in a notebook."""
    found = []
    if notebook.metadata != METADATA:
        found.append(f"metadata: {dict(notebook.metadata)}")
    for i, cell in enumerate(notebook.cells):
        if cell.metadata:
            found.append(f"cell {i}: metadata {dict(cell.metadata)}")
        if cell.id != str(i):
            found.append(f"cell {i}: id {cell.id!r}, a random one changes with every save")
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            found.append(f"cell {i}: outputs or an execution count")
        if not cell.source.strip():
            found.append(f"cell {i}: empty")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_valid_and_clean(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert noise(notebook) == [], "`make format` strips notebooks"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    home = str(Path.home())
    assert home not in path.read_text(encoding="utf-8") and len(path.read_bytes()) < 40_000


def test_noise_is_found():
    code = nbformat.v4.new_code_cell("1 + 1", execution_count=3, metadata={"collapsed": True}, id="a1")
    code.outputs = [nbformat.v4.new_output("stream", text="2")]
    empty = nbformat.v4.new_markdown_cell(" ", id="1")
    kernel = {"kernelspec": {"display_name": "mine", "language": "python", "name": "mine"}}
    notebook = nbformat.v4.new_notebook(cells=[code, empty], metadata=kernel)
    assert [one.split(" ")[0] + one.split(" ")[1] for one in noise(notebook)] == [
        "metadata:{'kernelspec':",
        "cell0:",
        "cell0:",
        "cell0:",
        "cell1:",
    ]


# --- public names


def not_public(code: str) -> list[str]:
    """Imports and attributes in ``code`` that are not of the public API."""
    tree, wrong, aliases = ast.parse(code), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in PUBLIC:
                    aliases[alias.asname or alias.name] = alias.name
                elif alias.name.split(".")[0] not in BESIDE:
                    wrong.append(f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "."
            if module in PUBLIC:
                public = set(importlib.import_module(module).__all__)
                wrong += [f"{module}.{alias.name}" for alias in node.names if alias.name not in public]
            elif node.level or module.split(".")[0] not in BESIDE:
                wrong.append(f"from {module}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in aliases:
                module = aliases[node.value.id]
                if node.attr not in importlib.import_module(module).__all__:
                    wrong.append(f"{module}.{node.attr}")
            elif node.attr.startswith("_"):
                wrong.append(node.attr)
    return wrong


def fenced(markdown: str) -> list[str]:
    """The Python in a cell of text."""
    return [block.split("```")[0] for block in markdown.split("```python\n")[1:]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_public_names_alone(path: Path):
    code = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    shown = [
        block for cell in read(path).cells if cell.cell_type == "markdown" for block in fenced(cell.source)
    ]
    assert not_public("\n".join(code)) == []
    assert not_public("\n".join(["import routesae_lens as rl", *shown])) == []
    assert "import routesae_lens as rl" in code[0].splitlines()


def test_private_names_are_found():
    code = (
        "import routesae_lens as rl\nimport routesae_lens.saes\nfrom sae_lens import SAE, registry\n"
        "from routesae_lens.models import load_model\nimport requests\nrl.train\nrl.models.BACKENDS\nSAE._x\n"
    )
    assert not_public(code) == [
        "import routesae_lens.saes",
        "sae_lens.registry",
        "from routesae_lens.models",
        "import requests",
        "_x",
        "routesae_lens.models",
    ]
    text = "Like so:\n```python\nrl.models\n```\nor\n```python\nrl.train(\n```\n```bash\nls\n```"
    assert fenced(text) == ["rl.models\n", "rl.train(\n"]
    with pytest.raises(SyntaxError):
        not_public(fenced(text)[1])


def test_the_demo_model_is_the_default():
    """Nothing of the tiny setting is left on where its variable is not set."""
    for path in NOTEBOOKS:
        assert 'load_model(TINY or "demo"' in path.read_text(encoding="utf-8").replace('\\"', '"')
