"""Llama Scope's training and evaluation as one recipe, for single-layer, routed and cross-layer SAEs.

    python recipes/llama_scope.py --output runs/scope                           # all parts, then the report
    python recipes/llama_scope.py --output runs/scope --part positions,report   # some of them
    python recipes/llama_scope.py --output runs/scope --preset tiny             # minutes; its numbers say nothing

Parts: annealing (figure 12), positions (figure 10), conversion (figure 11), generalisation (figures 4, 5, 6),
geometry (figures 7, 8) and report. Every training is one language-model pass for all its SAEs. Each part skips what is
there already, so an interrupted command (``--minutes``, Ctrl-C; exit status 75) is continued by the same command.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from llama_scope_parts import RUN
from llama_scope_report import write_report
from llama_scope_settings import PARTS, PRESETS, Settings, mistakes, named_parts
from llama_scope_study import Study
from paper_findings import plain_name
from paper_options import block_list, positive
from rich.console import Console
from study_folder import claim, continued_later, identity


def main(
    output: Annotated[Path, typer.Option(help="Folder of this run.")],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "cpu",
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(PARTS)}; several with commas. All by default."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes.")] = None,
    dataset: Annotated[str, typer.Option(help="Training text: file, folder, hub name, 'demo'.")] = "demo",
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text; default: documents taken off the training text.")
    ] = None,
    long_dataset: Annotated[
        str | None,
        typer.Option(help="Text with long documents; default: what is not trained on of the others."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face name, local folder, or 'demo'.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Its base or instruct relative, to compare with.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Three blocks, such as 7,14,22; the middle one is the SAEs'.")
    ] = None,
    route_layers: Annotated[str | None, typer.Option(help="Blocks of the RouteSAE, such as 6:21.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Width of the SAEs, 8 x d_model by default.")] = None,
    wide: Annotated[int | None, typer.Option(help="Width of the wide SAE, 32 x d_model by default.")] = None,
    k: Annotated[int | None, typer.Option(help="Latents per token.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds with and without K-annealing.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    position_tokens: Annotated[int | None, typer.Option(help="The same, of the four positions.")] = None,
    context_size: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tokens per training step.")] = None,
    lm_batch_size: Annotated[int | None, typer.Option(help="Sequences per forward in training.")] = None,
    silent_window: Annotated[
        int | None, typer.Option(help="Training tokens without firing that make a latent silent.")
    ] = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Held-out tokens for metrics.")] = None,
    firing_tokens: Annotated[int | None, typer.Option(help="Held-out tokens for frequencies.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Tokens for the thresholds.")] = None,
    svg: Annotated[bool, typer.Option(help="Figures as SVG, too.")] = False,
) -> None:
    """Train, measure and report what Llama Scope trained, measured and claimed. Run again to continue."""
    console = Console()
    problems = positive(minutes)
    if preset not in PRESETS:
        problems.append(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    parts = named_parts(part, problems)
    given: dict[str, Any] = {
        "model": model, "base_model": base_model, "layers": block_list(layers, problems),
        "route_layers": block_list(route_layers, problems), "d_sae": d_sae, "wide": wide, "k": k, "seeds": seeds,
        "tokens": tokens, "position_tokens": position_tokens, "context_size": context_size,
        "batch_size": batch_size, "lm_batch_size": lm_batch_size, "silent_window": silent_window,
        "eval_tokens": eval_tokens, "firing_tokens": firing_tokens, "calibration_tokens": calibration_tokens,
    }  # fmt: skip
    if parts == ["report"] and not problems:
        if not (output / "settings.json").exists():
            raise typer.BadParameter(f"{output} holds no run to report")
        _say(console, write_report(output, svg=svg))
        return
    changes = {name: value for name, value in given.items() if value is not None}
    settings = replace(PRESETS.get(preset, Settings()), **changes)
    problems += mistakes(settings)
    if problems:
        raise typer.BadParameter("\n  ".join([f"{len(problems)} wrong:", *problems]))
    named = asdict(settings) | {
        "model": plain_name(settings.model),
        "base_model": None if settings.base_model is None else plain_name(settings.base_model),
    }
    texts = {"dataset": dataset, "eval_dataset": eval_dataset, "long_dataset": long_dataset}
    sources = {name: identity(source) for name, source in texts.items()}
    claim(output, {"preset": preset, **named, **sources})
    study = Study(settings, dataset, eval_dataset, long_dataset, output, console)
    with continued_later(output, console, minutes, first="about.json"):
        for name in parts:
            if name in RUN:
                RUN[name](study)
        report = write_report(output, svg=svg)
    _say(console, report)


def _say(console: Console, verdicts: dict[str, int]) -> None:
    console.print("Claims: " + (", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())))
    console.print("Written to report/: report.md, results.json, CSV files and figures")


if __name__ == "__main__":
    typer.run(main)
