"""What the commands share: headings, errors in one line, counting the documents that are held out."""

from __future__ import annotations

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


class Counted(Iterator[str]):
    """``texts``, and how many of them were taken."""

    def __init__(self, texts: Iterator[str]):
        self.texts, self.count = texts, 0

    def __next__(self) -> str:
        text = next(self.texts)
        self.count += 1
        return text
