"""TopK, Gated, Switch and Scale SAEs at equal FLOPs, and the claims of the Scale SAE paper.

    python recipes/experts.py --output runs/experts                    # three seeds, a pass for each, then the report
    python recipes/experts.py --output runs/experts --seeds-at-once 3  # on one pass: three times the memory and disk
    python recipes/experts.py --output runs/tiny --preset tiny         # half a minute; its numbers say nothing

A part trains all methods, e and k of its seeds on one language-model pass. Each part skips what is there already, so an
interrupted command (``--minutes``, Ctrl-C; exit status 75) is continued by the same command.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from experts_report import write_report
from experts_settings import PRESETS, Settings, mistakes, parts_of
from experts_study import Study, run_part
from paper_findings import plain_name
from paper_options import number_list, positive
from rich.console import Console
from study_folder import claim, continued_later, identity


def _numbers(text: str | None, problems: list[str]) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(sorted({float(one) for one in text.split(",")}))
    except ValueError:
        problems.append(f"expected coefficients such as 0.2,0.25,0.3, got {text!r}")
        return None


def main(
    output: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/experts"),
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "cpu",
    part: Annotated[
        str | None,
        typer.Option(help="One part (seeds0, seeds1, ...) and the report, or report alone."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes.")] = None,
    dataset: Annotated[str, typer.Option(help="Training text: file, folder, hub name, 'demo'.")] = "demo",
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text; default: documents taken off the training text.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face name, local folder, or 'demo'.")] = None,
    layer: Annotated[int | None, typer.Option(help="Block; three quarters of the depth by default.")] = None,
    d_sae: Annotated[
        int | None, typer.Option(help="Latents of an expert SAE, 8 x d_model by default.")
    ] = None,
    per_active: Annotated[int | None, typer.Option(help="Experts for each active one: N / e.")] = None,
    experts: Annotated[str | None, typer.Option(help="Active experts, e.g. 1,2,4,8.")] = None,
    k: Annotated[str | None, typer.Option(help="Latents per token, e.g. 16,32,64.")] = None,
    gated: Annotated[str | None, typer.Option(help="Gated's coefficients, e.g. 0.2,0.25,0.3.")] = None,
    wide: Annotated[bool | None, typer.Option(help="Also a TopK SAE of the full width.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds.")] = None,
    seeds_at_once: Annotated[int | None, typer.Option(help="Seeds of one part, on one pass.")] = None,
    appendix_e: Annotated[
        int | None, typer.Option(help="Active experts of appendix C; 0 leaves it out.")
    ] = None,
    balance: Annotated[float | None, typer.Option(help="Coefficient of the balancing loss.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    context_size: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tokens per training step.")] = None,
    lm_batch_size: Annotated[int | None, typer.Option(help="Sequences per forward in training.")] = None,
    kl_tokens: Annotated[int | None, typer.Option(help="Held-out tokens for the splice.")] = None,
    feature_tokens: Annotated[int | None, typer.Option(help="... for overlaps and the experts' use.")] = None,
    svg: Annotated[bool, typer.Option(help="Figures as SVG, too.")] = False,
) -> None:
    """Train, measure and report what the Scale SAE paper trained, measured and claimed. Run again to continue."""
    console = Console()
    problems = positive(minutes)
    if preset not in PRESETS:
        problems.append(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    coefficients = _numbers(gated, problems)
    given: dict[str, Any] = {
        "model": model, "layer": layer, "d_sae": d_sae, "per_active": per_active, "wide": wide, "seeds": seeds,
        "experts": number_list(experts, problems), "k": number_list(k, problems), "seeds_at_once": seeds_at_once,
        "coefficients": None if coefficients is None else {"gated": coefficients}, "appendix_e": appendix_e,
        "balance": balance, "tokens": tokens, "lr": lr, "batch_size": batch_size,
        "context_size": context_size, "lm_batch_size": lm_batch_size, "kl_tokens": kl_tokens,
        "feature_tokens": feature_tokens,
    }  # fmt: skip
    if part == "report" and not problems:
        if not (output / "settings.json").exists():
            raise typer.BadParameter(f"{output} holds no run to report")
        _say(console, write_report(output, svg=svg))
        return
    changes = {name: value for name, value in given.items() if value is not None}
    settings = replace(PRESETS.get(preset, Settings()), **changes)
    if not problems:
        problems = mistakes(settings)
    if not problems and part is not None and part not in parts_of(settings):
        problems = [f"unknown part {part!r}; known: {', '.join(parts_of(settings))}, report"]
    if problems:
        raise typer.BadParameter("\n  ".join([f"{len(problems)} wrong:", *problems]))
    sources = {"dataset": identity(dataset), "eval_dataset": identity(eval_dataset)}
    claim(output, {"preset": preset, **settings.named(), "model": plain_name(settings.model), **sources})
    study = Study(settings, dataset, eval_dataset, output, console)
    with continued_later(output, console, minutes):
        for name in [part] if part else parts_of(settings):
            run_part(study, name)
        found = write_report(output, svg=svg)
    _say(console, found)


def _say(console: Console, verdicts: dict[str, int]) -> None:
    console.print("Claims: " + (", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())))
    console.print("Written to report/: report.md, results.json, CSV files and figures")


if __name__ == "__main__":
    typer.run(main)
