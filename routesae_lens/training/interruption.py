"""Ctrl-C and SIGTERM end a run between two steps, never inside one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Training stopped on request, with a checkpoint. Not an ``Exception``: no ``except Exception`` hides it."""

    def __init__(self, message: str, checkpoint: Path):
        super().__init__(message)
        self.checkpoint = checkpoint


class Interruption:
    """Inside ``with Interruption() as interruption:`` the first signal only sets ``interruption.requested``.

    A second one raises KeyboardInterrupt at once. The previous handlers come back at the end. Outside the
    main thread, where Python allows no handlers, nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal, once there was one."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # (None: the handler before was not Python's)
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt(f"second signal ({signal.Signals(number).name})")
        self.requested = signal.Signals(number).name
        # os.write, because print may not be called while a print is interrupted
        os.write(
            2, f"\n{self.requested}: saving a checkpoint after this step (again: stop at once)\n".encode()
        )
