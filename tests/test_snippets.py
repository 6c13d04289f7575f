"""Every snippet of README.md and docs/ runs, in the order of its page, without a network.

The names stay what they are for a reader: ``demo`` is a random Llama, the judge and the hub are
servers of the tests. Only sizes are made smaller, by ``SMALLER``. Python runs in one namespace per page;
``routesae-lens`` runs, too; of recipes, which take long, the options are parsed. What is none of these fails.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from judge_server import judge_server
from recipe_modules import RECIPES, recipe
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from test_hub import hub  # noqa: F401  (a fixture)
from typer.testing import CliRunner

from routesae_lens.cli import app
from routesae_lens.demo import demo_text_path
from routesae_lens.training.sweep_config import SweepConfig

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}

SMALLER = {
    "200_000": "4_096",
    "10_000_000": "4_096",
    "--tokens 200000": "--tokens 8192",
    "d_sae=4608": "d_sae=256",
    "seeds = [0, 1, 2]": "seeds = [0]",
    "k = [16, 32]": "k = [16]",
    "d_sae = 2304": "d_sae = 64\nheld_out_sequences = 4",
    "n_sequences=400": "n_sequences=16",
    "model, tokens, threshold=5)": "model, tokens, threshold=0.25, collect_above=0.25, max_contexts=4)",
    "max_new_tokens=40": "max_new_tokens=6",
    "--output runs/mine/steering": "--output runs/mine/steering --max-new-tokens 6",
    "--samples 3": "--samples 2 --max-new-tokens 6",
    "n_batches_in_buffer=64": "n_batches_in_buffer=20",
    '"Skylion007/openwebtext"': repr(str(demo_text_path().parent)),
    'HookedRouteSAETransformer.from_pretrained_no_processing("gpt2")': (
        '__import__("routesae_lens").load_model("demo", "hooked", model_class=HookedRouteSAETransformer)'
    ),
}
"""What a snippet says, and what is run in its place."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:the data holds", "ignore:end of the data"),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(
    page: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if page == "README.md":  # begins at the beginning
        request.getfixturevalue("demo")
        return run_page(PAGES[page], tmp_path / "page", monkeypatch)
    if page == "docs/train.md":
        return request.getfixturevalue("trained")
    if page == "docs/interpret.md":
        return request.getfixturevalue("interpreted")
    if page == "docs/export.md":
        request.getfixturevalue("hub")
    if snippets(PAGES[page]):
        shutil.copytree(request.getfixturevalue("interpreted"), tmp_path / "page")
        run_page(PAGES[page], tmp_path / "page", monkeypatch)


@pytest.fixture(scope="session")
def demo(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo model: a random Llama, deep enough for the blocks that the pages name, for prompts of any length."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    cache = tmp_path_factory.mktemp("cache")
    config: Any = AutoConfig.from_pretrained(tiny_llama_dir)
    config.num_hidden_layers, config.max_position_embeddings = 24, 16384
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(cache / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.save_pretrained(cache / "SmolLM2-135M-Instruct")
    with pytest.MonkeyPatch.context() as patch, judge_server() as judge:
        patch.setenv("ROUTESAE_LENS_CACHE", str(cache))
        patch.setenv("OPENAI_BASE_URL", judge.url)
        yield


@pytest.fixture(scope="session")
def trained(demo: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that docs/train.md leaves: other pages go on from there."""
    folder = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        run_page(PAGES["docs/train.md"], folder, patch)
    return folder


@pytest.fixture(scope="session")
def interpreted(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """... and with the features that docs/interpret.md adds."""
    folder = tmp_path_factory.mktemp("interpret") / "page"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        run_page(PAGES["docs/interpret.md"], folder, patch)
    return folder


def snippets(page: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> list[Example]:
    parsers: list[Any] = [PythonCodeBlockParser()]
    parsers += [CodeBlockParser("bash", shell(monkeypatch)), CodeBlockParser("toml", sweep_file)]
    return list(Sybil(parsers).parse(page).examples())


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    text = page.read_text(encoding="utf-8")
    for said, smaller in SMALLER.items():
        text = text.replace(said, smaller)
    copy = folder / page.name
    copy.write_text(text, encoding="utf-8")
    for example in snippets(copy, monkeypatch):
        example.evaluate()


def sweep_file(example: Example) -> None:
    """Written under the name that its first line says."""
    first = example.parsed.split("\n", 1)[0]
    assert re.fullmatch(r"# [\w.]+\.toml", first), f"line {example.line}: no name of a file in the first line"
    SweepConfig.from_dict(tomllib.loads(example.parsed))
    Path(first[2:]).write_text(example.parsed, encoding="utf-8")


def shell(monkeypatch: pytest.MonkeyPatch | None) -> Callable[[Example], None]:
    commands: dict[str, Callable[[list[str]], None]] = {
        "routesae-lens": routesae_lens,
        "python": python,
        "pip": pip,
        "make": make,
        "export": lambda words: [monkeypatch.setenv(*word.split("=", 1)) for word in words] and None,  # type: ignore
    }

    def run(example: Example) -> None:
        for line in example.parsed.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                assert words[0] in commands, (
                    f"line {example.line}: the tests do not know how to check {line!r}"
                )
                commands[words[0]](words[1:])

    return run


def routesae_lens(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"routesae-lens {shlex.join(words)}\n{done.output}"


def python(words: list[str]) -> None:
    script = Path(words[0])
    assert (ROOT / script).is_file(), script
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))  # a recipe finds its own modules beside it
        main = recipe(script.with_suffix("").relative_to("recipes").as_posix()).main
    command = typer.Typer()
    command.command()(main)
    if "--help" not in words:
        typer.main.get_command(command).make_context(script.name, words[1:])


def pip(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install" and words[-2] == "-e", words
    named = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[-1])
    assert named, words
    assert {*(named[1] or "").split(",")} <= {"", *extras}
    assert words[1:-2] in ([], ["-c", "constraints.txt"]) and (ROOT / "constraints.txt").is_file()


def make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {*words} <= {*targets}, words


def test_nothing_is_left_out():
    """No block in a language that is not run, no number that is made smaller without being there."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    assert {*re.findall(r"^ *```(.+)$", text, re.M)} <= {"python", "bash", "toml", "text"}
    assert [said for said in SMALLER if said not in text] == []
    fences = {
        name: len(re.findall(r"^ *```(?:python|bash|toml)$", page.read_text(), re.M))
        for name, page in PAGES.items()
    }
    assert {name: len(snippets(page)) for name, page in PAGES.items()} == fences
