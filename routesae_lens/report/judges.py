"""What a judge is: somebody who answers prompts about features. And what an answer and a failure are."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class JudgeError(Exception):
    """No answer to this one prompt; the others may still be answered."""


class JudgeRefused(JudgeError, OSError):
    """The judge will answer no prompt at all: a refused key, an unknown model, no credit."""


@dataclass(frozen=True)
class Reply:
    """What a judge answered, as it came."""

    text: str
    prompt_tokens: int | None
    """As the judge counted; None where it did not say."""
    completion_tokens: int | None
    finish_reason: str | None


@runtime_checkable
class Judge(Protocol):
    """Anything that answers prompts; ``ask`` is called from several threads at once."""

    @property
    def concurrency(self) -> int:
        """Prompts that may be asked at once."""

    def describe(self) -> dict[str, Any]:
        """For the results: kind, model, base_url, temperature, parameters. No credentials."""

    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides the prompt, JSON; not the address it is asked at."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt, for the estimate; asks nobody."""

    def counted_by(self) -> str:
        """How ``count_tokens`` counts, in words."""

    def ask(self, prompt: str, stop: threading.Event) -> Reply:
        """Answer one prompt. Once ``stop`` is set, no further try is made.

        Raises:
            JudgeRefused: nobody's prompt would be answered.
            JudgeError: this one was not, after all tries.
        """


def check_sampling(temperature: int | float | None, max_tokens: int | None) -> None:
    """Raises ValueError for a temperature below 0 or no finite number, or for no room to answer."""
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of 0 or more, got {temperature!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be 1 or more, got {max_tokens!r}")
