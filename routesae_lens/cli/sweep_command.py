"""``routesae-lens sweep``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from routesae_lens.cli.shared import DATA, MODEL, RUN, Counted, one_line_errors


def sweep(
    config: Annotated[
        Path,
        typer.Argument(help="A .toml or .json file with the fields of SweepConfig: methods, k, seeds ..."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of this sweep; the same command continues it.")],
    dataset: Annotated[
        str,
        typer.Option(help='Text: a file, a folder, a hub name, or "demo".', rich_help_panel=DATA),
    ] = "demo",
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Text to evaluate on; by default the first documents of --dataset, held out.",
            rich_help_panel=DATA,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help='Hugging Face name, local folder, or "demo".', rich_help_panel=MODEL)
    ] = "demo",
    backend: Annotated[
        str, typer.Option(help="huggingface, bridge or hooked.", rich_help_panel=MODEL)
    ] = "huggingface",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.", rich_help_panel=MODEL)
    ] = None,
    group_size: Annotated[int, typer.Option(help="SAEs evaluated together.", rich_help_panel=RUN)] = 6,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory that may be used; what is free by default.", rich_help_panel=RUN),
    ] = None,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.", rich_help_panel=RUN)] = False,
) -> None:
    """Train and evaluate many SAEs on one pass. Stopped at any point, the same command goes on."""
    from routesae_lens.analysis.evaluate import held_out_tokens
    from routesae_lens.models import load_model
    from routesae_lens.training.data import is_tokenized, load_text
    from routesae_lens.training.interruption import TrainingInterrupted
    from routesae_lens.training.sweep import NOT_FINITE
    from routesae_lens.training.sweep import sweep as run
    from routesae_lens.training.sweep_config import SweepConfig

    with one_line_errors(debug):
        if group_size < 1:
            raise ValueError(f"--group-size must be 1 or more, got {group_size}")
        if memory_gib is not None and not 0 < memory_gib < math.inf:
            raise ValueError(f"--memory-gib must be a positive number, got {memory_gib}")
        spec = SweepConfig.from_file(config)
        text = load_text(dataset)
        other = text if held_out is None else load_text(held_out)
        if is_tokenized(other):
            raise ValueError("the text to evaluate on holds token ids; expected text: give --held-out")
        loaded = load_model(model, backend=backend, device=device)
        documents = Counted(row.get("text") or row.get("problem") for row in other)
        tokens = held_out_tokens(
            loaded, documents, n_sequences=spec.held_out_sequences, context_size=spec.context_size
        )
        if held_out is None:
            text = text.skip(documents.count)
        limit = None if memory_gib is None else int(memory_gib * 2**30)
        try:
            result = run(loaded, spec, text, tokens, output, group_size=group_size, memory=limit)
        except TrainingInterrupted as stop:
            typer.echo(f"{stop}; checkpoint: {stop.checkpoint}\nThe same command goes on.", err=True)
            raise typer.Exit(130) from None
    typer.echo(f"{result.csv}: {len(result.results)} SAEs, {len(result.diverged)} of them diverged")
    for what, names in (("diverged", list(result.diverged)), (NOT_FINITE, result.not_finite)):
        if names:
            typer.echo(f"{what}: {', '.join(names)}", err=True)
