"""Checkpoints: written whole or not at all, the last two kept, nothing in them is executed on loading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA_FILE, STATE_FILE = "data.safetensors", "state.json"
KEEP = 2


@dataclass
class CheckpointState:
    """What a checkpoint holds beside SAELens' own files of each SAE (weights, optimiser, schedules)."""

    step: int
    log_size: int
    """Bytes of the training log at that step."""
    config: dict[str, Any]
    """What a run must have in common with this one to continue it."""
    data: dict[str, Tensor]
    """State of the buffer."""
    rng: dict[str, Tensor]
    """State of torch's global generators, by device."""
    diverged: dict[str, int] = field(default_factory=dict)
    """SAEs that are frozen, and the step at which each diverged."""

    def write(self, folder: Path) -> None:
        tensors = {f"data.{name}": tensor for name, tensor in self.data.items()}
        tensors |= {f"rng.{name}": tensor for name, tensor in self.rng.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / DATA_FILE)
        state = {
            "step": self.step,
            "log_size": self.log_size,
            "diverged": self.diverged,
            "config": self.config,
        }
        (folder / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> CheckpointState:
        """Raises ValueError where ``folder`` is no checkpoint of this package, or a damaged one."""
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / DATA_FILE)
            parts: dict[str, dict[str, Tensor]] = {"data": {}, "rng": {}}
            for name, tensor in tensors.items():
                part, _, key = name.partition(".")
                parts[part][key] = tensor
            return cls(
                step=state["step"],
                log_size=state["log_size"],
                config=state["config"],
                data=parts["data"],
                rng=parts["rng"],
                diverged=state.get("diverged", {}),
            )
        except Exception as error:
            raise ValueError(
                f"{folder} is no readable checkpoint: {type(error).__name__}: {error}"
            ) from error

    def check_same(self, config: dict[str, Any]) -> None:
        """Raises ValueError that lists every setting in which ``config`` differs from the checkpoint's."""
        ours, theirs = flat(json.loads(json.dumps(config))), flat(self.config)
        different = [
            f"{key}: checkpoint {theirs.get(key, 'has none')!r}, now {ours.get(key, 'none')!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if not same_setting(key, ours.get(key), theirs.get(key))
        ]
        if different:
            raise ValueError("the checkpoint belongs to another run:\n  " + "\n  ".join(different))


def flat(tree: dict[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with joined names."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        result |= flat(value, separator, f"{name}{separator}") if isinstance(value, dict) else {name: value}
    return result


def same_setting(key: str, a: Any, b: Any) -> bool:
    """Whether ``a`` and ``b`` are the same value of the setting ``key``, a name joined by :func:`flat`."""
    if key.startswith("probe.") and isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 0.01 * max(
            abs(a), abs(b)
        )  # measured, so it may differ a little between machines
    return a == b


def rng_state() -> dict[str, Tensor]:
    """State of torch's global generators: "cpu", and "cuda0", "cuda1", ... where there are GPUs."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state()} | {f"cuda{i}": state for i, state in enumerate(cuda)}


def restore_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in state:
            torch.cuda.set_rng_state(state[f"cuda{i}"], i)


class Checkpoints:
    """The folder of a run's checkpoints, ``step_00000040`` and the like."""

    def __init__(self, folder: Path):
        self.folder = folder

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step_*") if (path / STATE_FILE).exists())

    def latest(self) -> Path | None:
        return (self.all() or [None])[-1]  # type: ignore[list-item]

    def save(self, step: int, write: Callable[[str], None]) -> Path:
        """Have ``write(name)`` fill the folder ``name`` here, then give it its final name and drop old ones.

        Raises:
            OSError: no space (or another fault of the disk); the checkpoints before stay.
        """
        final = self.folder / f"step_{step:08d}"
        if final.exists():
            return final
        partial = self.folder / f".partial_{final.name}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write(partial.name)
            for file in partial.rglob("*"):
                if file.is_file():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())  # or a power cut could leave the name without the content
            partial.rename(final)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, Exception):
                error.add_note(f"while writing checkpoint {final}; last complete checkpoint: {self.latest()}")
            raise
        for old in self.all()[:-KEEP]:
            shutil.rmtree(old)
        return final
