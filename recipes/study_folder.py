"""The folder of a long study: it belongs to one set of settings, and keeps what each stage took."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from paper_findings import write_whole


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
