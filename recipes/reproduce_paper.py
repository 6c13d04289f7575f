"""The evaluation of the RouteSAE paper as one recipe: train every method, measure, report.

    python recipes/reproduce_paper.py --preset smoke --output runs/smoke      # minutes
    python recipes/reproduce_paper.py --preset cpu --output runs/paper --part core --minutes 110
    python recipes/reproduce_paper.py --preset cpu --output runs/paper        # all parts, then the report

Each part (see PARTS) is a sweep in a folder of its own: one language-model forward per batch trains all its SAEs.
Every stage skips what is there already, so an interrupted command (``--minutes``, Ctrl-C; exit status 75) is
continued by the same command. ``report/`` holds the report, its figures and every number as CSV.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from paper_findings import plain_name
from paper_options import block_list, mistakes, number_list, positive
from paper_presets import PARTS, PRESETS, Preset
from paper_report import Report, write_report
from paper_stages import Study, run_part
from rich.console import Console
from study_folder import claim, continued_later, identity

SHARED_TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "text"
"""Text beside the repository, for those who have it; else the text that ships with the package."""
HUB_TEXT = "Skylion007/openwebtext"


def _texts(dataset: str | None, eval_dataset: str | None, preset: str) -> tuple[str, str | None]:
    """Where to train and where to evaluate; None for the first documents of the training text."""
    if dataset is not None:
        return dataset, eval_dataset
    if preset == "llama-3.2-1b":
        return HUB_TEXT, eval_dataset
    if (SHARED_TEXT / "train.parquet").exists() and (SHARED_TEXT / "eval.parquet").exists():
        return str(SHARED_TEXT / "train.parquet"), eval_dataset or str(SHARED_TEXT / "eval.parquet")
    return "demo", eval_dataset


def main(
    output: Annotated[Path, typer.Option(help="Folder of this study.")],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "cpu",
    part: Annotated[
        str | None,
        typer.Option(help=f"Only {', '.join(PARTS)} (and the report), or report alone; default all."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Training text: file, folder, hub name, 'demo'.")
    ] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text; default: documents taken off the training text.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face name, local folder, or 'demo'.")] = None,
    layers: Annotated[str | None, typer.Option(help="Routed blocks, e.g. 6:21.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Width of the SAEs.")] = None,
    k: Annotated[str | None, typer.Option(help="Latents per token, e.g. 14,20,32.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tokens per training step.")] = None,
    context_size: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    lm_batch_size: Annotated[int | None, typer.Option(help="Sequences per forward in training.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of the 5/75/20 schedule.")] = None,
    kl_tokens: Annotated[int | None, typer.Option(help="Held-out tokens for KL.")] = None,
    feature_tokens: Annotated[
        int | None, typer.Option(help="Held-out tokens for features and routes.")
    ] = None,
    svg: Annotated[bool, typer.Option(help="Figures as SVG, too.")] = False,
) -> None:
    """Train the parts of a preset, measure them, and report every claim of the paper. Run again to continue."""
    console = Console()
    problems = positive(minutes)
    if preset not in PRESETS:
        problems.append(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if part not in (None, "report", *PARTS):
        problems.append(f"unknown part {part!r}; known: {', '.join([*PARTS, 'report'])}")
    given: dict[str, Any] = {
        "model": model, "layers": block_list(layers, problems), "d_sae": d_sae,
        "k": number_list(k, problems), "seeds": seeds, "tokens": tokens, "batch_size": batch_size,
        "context_size": context_size, "lm_batch_size": lm_batch_size, "lr": lr, "kl_tokens": kl_tokens,
        "feature_tokens": feature_tokens,
    }  # fmt: skip
    if part == "report" and not problems:
        if not (output / "settings.json").exists():
            raise typer.BadParameter(f"{output} holds no study to report")
        _say(console, write_report(output, svg=svg))
        return
    changes = {name: value for name, value in given.items() if value is not None}
    settings = replace(PRESETS.get(preset, Preset()), **changes)
    parts = list(PARTS) if part is None else [part]
    problems += mistakes(settings, [name for name in parts if name in PARTS])
    if problems:
        raise typer.BadParameter("\n  ".join([f"{len(problems)} wrong:", *problems]))
    dataset, eval_dataset = _texts(dataset, eval_dataset, preset)
    sources = {"dataset": identity(dataset), "eval_dataset": identity(eval_dataset)}
    named = asdict(settings) | {"model": plain_name(settings.model)}
    claim(output, {"preset": preset, **named, **sources})
    study = Study(settings, dataset, eval_dataset, output, console)
    with continued_later(output, console, minutes):
        _print_epochs(study)
        for name in parts:
            run_part(study, name)
        report = write_report(output, svg=svg)
    _say(console, report)


def _say(console: Console, report: Report) -> None:
    console.print(report.summary())
    console.print(f"Written to {report.folder}/: report.md, CSV files and figures")


def _print_epochs(study: Study) -> None:
    epochs = study.about["epochs"]
    known = "an unknown number of" if epochs is None else f"about {epochs:.2f}"
    study.console.print(
        f"{study.preset.tokens:,} training tokens: {known} epochs of {identity(study.dataset)}"
    )


if __name__ == "__main__":
    typer.run(main)
