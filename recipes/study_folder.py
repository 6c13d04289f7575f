"""The folder of a long study: it belongs to one set of settings, and keeps what each stage took."""

from __future__ import annotations

import _thread
import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from paper_findings import plain_name, write_whole
from rich.console import Console

STOPPED = 75
"""Exit status (EX_TEMPFAIL): stopped before the end, to be continued."""


def identity(source: str | None) -> str | None:
    """A name without the folder, and the size: the same text may lie elsewhere on another machine."""
    if source is None or not Path(source).is_file():
        return None if source is None else plain_name(source)
    return f"{Path(source).name} ({Path(source).stat().st_size:,} bytes)"


def claim(output: Path, settings: dict[str, Any]) -> None:
    """A folder belongs to one set of settings; a run with others needs another one."""
    path, settings = output / "settings.json", json.loads(json.dumps(settings))
    if path.exists():
        before = json.loads(path.read_text())
        different = [
            f"{name} = {before.get(name)!r}"
            for name in settings | before
            if before.get(name) != settings.get(name)
        ]
        if different:
            raise typer.BadParameter(
                f"{output} holds a run with {', '.join(different)}; choose another --output"
            )
        return
    if output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} holds something else; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=1))


@contextmanager
def continued_later(
    output: Path, console: Console, minutes: float | None, first: str = "text.json"
) -> Iterator[None]:
    """Around the work of a study: Ctrl-C, SIGTERM and the end of ``minutes`` exit with :data:`STOPPED`.

    A study that fails before it wrote its ``first`` file leaves the folder free for other settings.
    """
    try:
        with _stopping_after(minutes):
            yield
    except KeyboardInterrupt:  # TrainingInterrupted is one
        console.print("[yellow]stopped; run the same command again to go on[/yellow]")
        raise typer.Exit(STOPPED) from None
    except Exception:
        if not (output / first).exists():
            (output / "settings.json").unlink()
        raise


@contextmanager
def _stopping_after(minutes: float | None) -> Iterator[None]:
    """Raises KeyboardInterrupt in the main thread after so many minutes, and on SIGTERM as on Ctrl-C.

    Training answers with a checkpoint (TrainingInterrupted). Elsewhere results are written whole, by groups of
    SAEs, so that stopping at once costs the group under way and nothing else.
    """
    timer = threading.Timer(60 * minutes, _thread.interrupt_main) if minutes else None
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        if timer:
            timer.daemon = True
            timer.start()
        yield
    finally:
        if timer:
            timer.cancel()
        if in_main:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def timed(output: Path, part: str, stage: str) -> Iterator[None]:
    """Add the time, and the memory peak of this process, to ``stages.json``; after an interruption, too."""
    path, started = output / "stages.json", time.perf_counter()
    try:
        yield
    finally:
        done = json.loads(path.read_text()) if path.exists() else []
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        if seconds > 0.5:  # (else there was nothing to do)
            done.append(
                {"part": part, "stage": stage, "seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
                | ({"gpu_peak_gib": round(gpu, 2)} if gpu else {})
            )
            write_whole(path, json.dumps(done, indent=1))
