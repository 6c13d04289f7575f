"""Answers on disk, so that none is paid twice: one JSON file each, whole or not there at all.

An answer is kept under what it depends on: the prompt, the model and its parameters, not the address asked.
Failures are not kept, so the next run asks again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from routesae_lens.report.judges import Reply

FORMAT = "routesae_lens.answer/1"


@dataclass(frozen=True)
class AnswerCache:
    """Answers in ``folder``, made when the first one is written. Several processes may share it."""

    folder: Path

    @staticmethod
    def key(prompt: str, identity: Mapping[str, Any]) -> str:
        """Name of the answer of a judge (``judge.identity()``) to a prompt."""
        asked = json.dumps([FORMAT, prompt, identity], sort_keys=True, allow_nan=False)
        return hashlib.sha256(asked.encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str, prompt: str) -> Reply | None:
        """The answer; None where there is none or, with a warning, where its file is damaged."""
        path = self.path(key)
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            data = None
        try:
            if data["format"] == FORMAT and data["prompt"] == prompt:
                reply = Reply(**data["reply"])
                if isinstance(reply.text, str):
                    return reply
        except (KeyError, TypeError):
            pass
        warnings.warn(f"{path} holds no answer to this prompt; it is asked again", stacklevel=2)
        return None

    def put(self, key: str, prompt: str, identity: Mapping[str, Any], reply: Reply) -> None:
        """Keep an answer, with the prompt and the judge for whoever looks into the folder."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"format": FORMAT, "judge": dict(identity), "prompt": prompt, "reply": asdict(reply)}
        write_whole(path, json.dumps(data, indent=1, allow_nan=False).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: a reader sees all of it or none."""
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
