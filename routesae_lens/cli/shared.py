"""What the commands share: headings, errors in one line, counting the documents that are held out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

MODEL, SAE, DATA, RUN = "The language model", "The SAE", "The data", "The run"
"""Headings of the help page."""


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Mistakes of the user end in one clear message and exit code 2, failed computations in code 1."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except FloatingPointError as error:
        code, shown = 1, error
    except (ValueError, TypeError, OSError, MemoryError, DatasetsError) as error:
        code, shown = 2, error  # type: ignore[assignment]
    else:
        return
    if debug:
        raise shown
    notes = "".join(f"\n  {note}" for note in getattr(shown, "__notes__", []))
    typer.secho(f"Error: {shown}{notes}", fg="red", err=True)
    raise typer.Exit(code)


@contextmanager
def says_how_to_go_on() -> Iterator[None]:
    """A training that was stopped by a signal ends in the command that goes on with it, and exit code 130."""
    from routesae_lens.training.interruption import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as stop:
        again = [arg for arg in sys.argv[1:] if arg != "--resume"]
        typer.echo(f"{stop}; checkpoint: {stop.checkpoint}\nGo on with:", err=True)
        typer.echo(f"  {shlex.join(['routesae-lens', *again, '--resume'])}", err=True)
        raise typer.Exit(130) from None


class Counted(Iterator[str]):
    """``texts``, and how many of them were taken."""

    def __init__(self, texts: Iterator[str]):
        self.texts, self.count = texts, 0

    def __next__(self) -> str:
        text = next(self.texts)
        self.count += 1
        return text
