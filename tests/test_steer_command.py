"""``routesae-lens steer``."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import SENTENCES
from spliced import D_SAE, make_sae, ordinary_sae
from spliced_crosscoders import make_crosscoder
from typer.testing import CliRunner

from routesae_lens.analysis.completions import GenerationOptions
from routesae_lens.analysis.evaluate import held_out_tokens
from routesae_lens.analysis.feature_set import FeatureSet
from routesae_lens.analysis.features import collect_features
from routesae_lens.analysis.steering import dose_response, steer_completions
from routesae_lens.cli import app
from routesae_lens.models import load_model
from routesae_lens.saes.architectures import RouteTopKTrainingSAE, RouteTopKTrainingSAEConfig
from routesae_lens.splice.edits import Ablate, Add, Scale, Set
from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge


@pytest.fixture
def folder(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """Saved SAEs (route, crosscoder, ordinary, training), and the features of the first."""
    sae = make_sae()
    sae.save_model(tmp_path / "route")
    make_crosscoder().save_model(tmp_path / "crosscoder")
    ordinary_sae("blocks.3.hook_resid_post").save_model(tmp_path / "ordinary")
    config = RouteTopKTrainingSAEConfig(d_in=96, d_sae=D_SAE, k=4, layers=[1, 2, 4])
    RouteTopKTrainingSAE(config).save_model(tmp_path / "training")
    model = load_model(tiny_llama_dir, device="cpu")
    tokens = held_out_tokens(model, list(SENTENCES) * 2, n_sequences=8, context_size=24)
    collect_features({"route": sae}, model, tokens, threshold=1.0, progress=False)["route"].save(
        tmp_path / "features.json"
    )
    return tmp_path


def run(folder: Path, model: Path | str, *more: str, sae: str = "route") -> Any:
    base = ["steer", "--model", str(model), "--sae", str(folder / sae), "--device", "cpu"]
    return CliRunner().invoke(app, [*base, *more])


def test_the_help_explains_every_option():
    command: Any = typer.main.get_command(app)
    assert all(getattr(parameter, "help", None) for parameter in command.commands["steer"].params)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_completions_and_dose_response_are_those_of_the_package(
    folder: Path, tiny_llama_dir: Path, backend: str
):
    found = FeatureSet.load(folder / "features.json")
    latent = found.features[0].id
    prompts = ["The river", "A router"]
    edits = [
        f"--set={latent}=1.5",
        f"--add={latent + 1}=2",
        f"--scale={latent + 2}=3",
        f"--ablate={latent + 3}",
    ]
    more = ["--relative", "--features", str(folder / "features.json"), "--positions", "1:", "--layers", "1:2"]
    text = ["--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", "6", "--backend", backend]
    dose = [f"--dose={latent}=0.5,2", "--no-error-term", "--verbose", "--output", str(folder / "out")]
    done = run(folder, tiny_llama_dir, *edits, *more, *text, *dose)
    assert done.exit_code == 0, done.output

    classes = {"hooked": HookedRouteSAETransformer, "bridge": RouteSAETransformerBridge}
    model = load_model(tiny_llama_dir, backend, "cpu", model_class=classes[backend])
    given: dict[str, Any] = {
        "positions": slice(1, None),
        "layers": [1, 2],
        "use_error_term": False,
        "maxima": found.max_activation,
        "options": GenerationOptions(6),
        "progress": False,
    }
    wanted = {
        latent: Set(1.5, True),
        latent + 1: Add(2.0, True),
        latent + 2: Scale(3.0),
        latent + 3: Ablate(),
    }
    pairs = steer_completions(model, make_sae(), wanted, prompts, **given)
    response = dose_response(model, make_sae(), latent, [0.5, 2.0], prompts, relative=True, **given)
    written = json.loads((folder / "out/steering.json").read_text())
    for mine, theirs in zip(written["pairs"], pairs, strict=True):
        assert mine["steered"]["tokens"] == theirs.steered.tokens
        assert mine["original"]["tokens"] == theirs.original.tokens
        assert mine["steered"]["kl"] == pytest.approx(theirs.steered.kl, abs=1e-5)
        assert theirs.steered.mean_kl > 1e-3
    rows = list(csv.DictReader((folder / "out/dose.csv").open()))
    assert [row["value"] for row in rows] == ["", "0.5", "2.0"]
    assert [float(row["kl"]) for row in rows] == pytest.approx([row.kl for row in response.rows], abs=1e-5)
    assert sorted(one.name for one in (folder / "out").iterdir()) == [
        "dose.csv",
        "steering.json",
        "steering.txt",
    ]
    assert f"KL {pairs[0].steered.mean_kl:.4f} nats" in done.output
    assert f"Latent {latent}: maximum {found.max_activation[latent]:.2f}" in done.output
    assert len(re.findall(r"^  '.*\d\.\d{4}  [124–]$", done.output, re.M)) == sum(
        len(pair.steered.tokens) for pair in pairs
    )
    # the folder is the command's own: once more, without a dose
    assert run(folder, tiny_llama_dir, "--set=3=1", *text, "--output", str(folder / "out")).exit_code == 0
    assert not (folder / "out/dose.csv").exists()


@pytest.mark.parametrize("sae", ["crosscoder", "ordinary"])
def test_other_saes(folder: Path, tiny_llama_dir: Path, sae: str):
    more = ["--set", "5=9", "--prompt", "The river", "--max-new-tokens", "3"]
    done = run(folder, tiny_llama_dir, *more, sae=sae)
    assert done.exit_code == 0 and "Steered:" in done.output, done.output


def test_chats_and_sampling(folder: Path, tiny_llama_dir: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": "The river"}]))
    more = ["--set=5=9", "--max-new-tokens=3", "--sample", "--temperature=0.8", "--top-k=9", "--samples=2"]
    done = run(folder, tiny_llama_dir, *more, f"--chat={chat}")
    assert done.exit_code == 2 and "no chat template: give a text" in " ".join(done.output.split())
    model = tmp_path / "with-template"
    model.mkdir()
    for file in tiny_llama_dir.iterdir():
        (model / file.name).symlink_to(file)
    for file in model.iterdir():
        if file.name.startswith("tokenizer") or file.name.startswith("chat"):
            file.unlink()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:"
    tokenizer.save_pretrained(model)
    done = run(folder, model, *more, f"--chat={chat}", "--prompt=The dog")
    assert done.exit_code == 0, done.output
    assert done.output.count("Prompt:   user: The river\nbot:") == 2  # samples
    assert done.output.count("Prompt:   <s>The dog") == 2


def test_every_mistake_is_named_before_the_model_loads(folder: Path):
    (folder / "out").mkdir()
    (folder / "out/thesis.txt").write_text("mine")
    (folder / "chat.json").write_text('[{"role": "user"}]')
    more = [
        "--backend=jax", "--set=x=1", "--set=48=1", "--add=3=nan", "--scale=7=1", "--ablate=7", "--relative",
        "--dose=4", "--top-k=3", "--positions=1:2:3", "--layers=6-7", f"--output={folder / 'out'}",
        f"--chat={folder / 'chat.json'}", f"--features={folder / 'none.json'}",
    ]  # fmt: skip
    done = run(folder, "/no/such/model", *more)
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "Traceback" not in done.output
    for message in (
        "12 mistakes",
        "--backend 'jax': expected hooked or bridge",
        "--set 'x=1': expected LATENT=VALUE",
        "--add '3=nan': expected finite numbers",
        "latent 7 is edited twice",
        "--dose '4': expected LATENT=V1,V2,...",
        "top_k needs do_sample=True",
        "--positions '1:2:3'",
        "layers must look like",
        "holds something else (thesis.txt)",
        """expected turns {"role": ..., "content": ...}, got {'role': 'user'}""",
        "none.json: no such file",
        "latent 48 is out of range",
    ):
        assert message in said, message
    assert (folder / "out/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set=1=2"], "nothing to complete: give --prompt or --chat"),
        (["--prompt=The river"], "nothing to do: give --set"),
        (["--prompt=", "--set=1=2"], "a text is empty"),
        (["--prompt=a", "--set=48=2"], "latent 48 is out of range: this SAE has latents 0 to 47"),
        (["--prompt=a", "--dose=-1=2"], "latent -1 is out of range"),
        (["--prompt=a", "--set=1=2", "--relative"], "--relative needs --features"),
        (["--prompt=a", "--ablate=1", "--relative"], "--relative is for --set, --add and --dose"),
        (["--prompt=a", "--set=1=2", "--positions=some"], "unknown positions 'some'"),
        (["--prompt=a", "--set=1=2", "--max-new-tokens=0"], "max_new_tokens must be a whole number"),
    ],
)
def test_a_mistake_gives_one_message(folder: Path, more: list[str], message: str):
    done = run(folder, "/no/such/model", *more)
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ("none", "no such SAE (expected a folder with cfg.json)"),
        ("damaged", "holds no SAE in inference form"),
    ],
)
def test_folders_without_an_sae_are_refused(folder: Path, sae: str, message: str):
    (folder / "damaged").mkdir()
    (folder / "damaged/cfg.json").write_text("{}")
    done = run(folder, "/no/such/model", "--set=1=2", "--prompt=a", sae=sae)
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output


def test_a_training_sae_is_read_as_its_inference_form(folder: Path, tiny_llama_dir: Path):
    done = run(folder, tiny_llama_dir, "--set=1=2", "--prompt=a", "--max-new-tokens=2", sae="training")
    assert done.exit_code == 0, done.output
