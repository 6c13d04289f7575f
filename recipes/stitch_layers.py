"""Is a RouteSAE's feature space unified? Its dictionary against SAEs of single layers, and one SAE stitched to another.

    python recipes/stitch_layers.py --output runs/stitch_layers                  # about 10 minutes on two cores
    python recipes/stitch_layers.py --output runs/stitch_tiny --preset tiny      # its numbers say nothing

One language-model pass trains the paper's RouteSAE and the distilled one (mean of layers), two TopK SAEs for every
third routed layer (the second is the ceiling: what another seed of the same SAE has), and a small SAE of one layer.
Then:

- coverage: the share of each layer's latents that each RouteSAE has, beside chance, other layers and the ceiling;
- stitching (Leask et al., 2025): from the small SAE to the larger one of its layer, by error, L0 and KL, and which
  threshold on the cosine tells latents that lower the error from those that raise it.

Stages skip what is there already, so an interrupted command (``--minutes``, Ctrl-C; exit status 75) is continued by the
same command. The report says which of the expectations, fixed before the run, hold.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from paper_findings import plain_name
from paper_options import block_list, positive
from rich.console import Console
from stitch_layers_report import write_report
from stitch_layers_study import PRESETS, Settings, Study, mistakes, run_stages
from study_folder import claim, continued_later, identity


def main(
    output: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/stitch_layers"),
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "cpu",
    minutes: Annotated[float | None, typer.Option(help="Stop cleanly after so many minutes.")] = None,
    dataset: Annotated[str, typer.Option(help="Training text: file, folder, hub name, 'demo'.")] = "demo",
    eval_dataset: Annotated[
        str | None, typer.Option(help="Held-out text; default: documents taken off the training text.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face name, local folder, or 'demo'.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks of the RouteSAEs, such as 6:21.")] = None,
    every: Annotated[
        int | None, typer.Option(help="Every so many-th of them has SAEs of its own; 1 for all.")
    ] = None,
    d_sae: Annotated[int | None, typer.Option(help="Width of the SAEs, 2 x d_model by default.")] = None,
    small: Annotated[int | None, typer.Option(help="Width of the small SAE, a quarter by default.")] = None,
    stitched_layer: Annotated[int | None, typer.Option(help="Its block, the middle one by default.")] = None,
    k: Annotated[int | None, typer.Option(help="Latents per token.")] = None,
    route_seeds: Annotated[int | None, typer.Option(help="Seeds of each kind of RouteSAE.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens.")] = None,
    context_size: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tokens per training step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    kl_tokens: Annotated[int | None, typer.Option(help="Held-out tokens for splices.")] = None,
    feature_tokens: Annotated[int | None, typer.Option(help="... on which firings are counted.")] = None,
    effect_tokens: Annotated[int | None, typer.Option(help="... for the effect of insertions.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Cosine from which on latents are alike.")] = None,
    steps: Annotated[int | None, typer.Option(help="Stitched SAEs that are measured, about.")] = None,
) -> None:
    """Train, compare and stitch. Run again to continue."""
    console = Console()
    problems = positive(minutes)
    if preset not in PRESETS:
        problems.append(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    given: dict[str, Any] = {
        "model": model, "layers": block_list(layers, problems), "every": every, "d_sae": d_sae, "small": small,
        "stitched_layer": stitched_layer, "k": None if k is None else (k,), "route_seeds": route_seeds,
        "tokens": tokens, "context_size": context_size, "batch_size": batch_size, "lr": lr, "kl_tokens": kl_tokens,
        "feature_tokens": feature_tokens, "effect_tokens": effect_tokens, "threshold": threshold, "steps": steps,
    }  # fmt: skip
    changes = {name: value for name, value in given.items() if value is not None}
    settings = replace(PRESETS.get(preset, Settings()), **changes)
    problems = problems or mistakes(settings)
    if problems:
        raise typer.BadParameter("\n  ".join([f"{len(problems)} wrong:", *problems]))
    sources = {"dataset": identity(dataset), "eval_dataset": identity(eval_dataset)}
    named = asdict(settings) | {"model": plain_name(settings.model), **sources}
    claim(output, {"preset": preset, **named})
    study = Study(settings, dataset, eval_dataset, output, console)
    with continued_later(output, console, minutes):
        run_stages(study)
        verdicts = write_report(output)
    for one in verdicts:
        console.print(f"{one.claim}: {one.measured}: {one.verdict}", markup=False)
    console.print("Written to report/: report.md, results.json and figures")


if __name__ == "__main__":
    typer.run(main)
