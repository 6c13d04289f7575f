"""The training log: one JSON object per line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TrainingLog:
    """Append-only ``log.jsonl``. Every line has ``step`` (steps done) and ``tokens``, and is on disk at once.

    Args:
        path: the file; made on the first line.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, tokens: int, metrics: Mapping[str, Any]) -> None:
        line = {"step": step, "tokens": tokens} | {name: plain(value) for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def size(self) -> int:
        """Bytes written so far; a checkpoint records it."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what a run that went on after its last checkpoint had logged: it will come again."""
        if self.size > size:
            os.truncate(self.path, size)

    def read(self) -> list[dict[str, Any]]:
        """All lines; empty where there is no file."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def plain(value: Any) -> Any:
    """``value`` for strict JSON, which has no NaN (for instance an explained variance of one token)."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
