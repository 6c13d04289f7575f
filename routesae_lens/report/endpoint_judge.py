"""A judge behind an endpoint that speaks OpenAI's chat completions.

Of the key only the name of its environment variable is held; its value is read when the first request is made,
and taken out of every text that comes back, so that it reaches no file, no message and no ``repr``.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from time import time
from typing import Any
from urllib.parse import urlsplit

from routesae_lens.report.judges import JudgeError, JudgeRefused, Reply, check_sampling
from routesae_lens.report.prompt import one_line

OFFICIAL = "https://api.openai.com/v1"
KEY_ENV = "OPENAI_API_KEY"
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever Retry-After says."""
SHORTEST_SECRET = 8
"""Characters of a key that is taken out of what comes back."""


@dataclass
class EndpointJudge:
    """A model behind an endpoint that speaks OpenAI's chat completions, asked through the official client.

    Time-outs, lost connections, 408, 409, 429, 5xx and unreadable bodies are tried again, ``tries`` times in
    all, after random times of up to 1, 2, 4 ... times ``backoff`` seconds, or after what Retry-After says, but
    never more than a minute.

    Args:
        model: as the endpoint calls it.
        base_url: by default ``$OPENAI_BASE_URL``, or else OpenAI. A user, password or query in it is refused.
        key_env: environment variable with the key, which is sent to ``base_url``. Endpoints other than OpenAI
            may go without (the variable unset).
        temperature: None leaves it to the endpoint.
        max_tokens: longest answer; None leaves it to the endpoint.
        parameters: more of the request's body, for instance ``{"seed": 0}``; part of what an answer is kept
            under.
        concurrency: requests on the way at once.
        timeout: seconds for one try.

    Raises:
        ValueError: a bad argument.
    """

    model: str
    base_url: str | None = None
    key_env: str = KEY_ENV
    temperature: int | float | None = 0.0
    max_tokens: int | None = 500
    parameters: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    timeout: int | float = 60.0
    tries: int = 6
    backoff: int | float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model must be a name, got {self.model!r}")
        self.base_url = (self.base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL).rstrip("/")
        parts = urlsplit(self.base_url)
        if parts.username or parts.password or parts.query or parts.fragment:
            # The address is not shown: it may hold a secret.
            raise ValueError(
                f"the base URL must hold no user, password, query or fragment; put the key into ${self.key_env}"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the base URL must be http(s)://host[:port]/path, got {self.base_url!r}")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            # Whoever passes the key itself must not see it in an error message.
            raise ValueError("key_env must be the name of an environment variable, not the key itself")
        check_sampling(self.temperature, self.max_tokens)
        for name in ("concurrency", "tries"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        for name in ("timeout", "backoff"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number of seconds, got {getattr(self, name)!r}")
        reserved = {"model", "messages", "stream", "n", "temperature", "max_tokens"} & set(self.parameters)
        if reserved:
            raise ValueError(f"parameters must not hold {', '.join(sorted(reserved))}: set elsewhere")
        json.dumps(dict(self.parameters), allow_nan=False)

    def describe(self) -> dict[str, Any]:
        rest = {"max_tokens": self.max_tokens, **self.parameters}
        return {
            "kind": "endpoint",
            "model": self.model,
            "base_url": self.base_url,
            "temperature": self.temperature,
            "parameters": rest,
        }

    def identity(self) -> dict[str, Any]:
        return {name: value for name, value in self.describe().items() if name != "base_url"}

    @cached_property
    def _encoding(self) -> Any:
        try:
            import tiktoken

            return tiktoken.encoding_for_model(self.model)
        except Exception:
            # Not installed, a model it does not know, or no network for its tables (of many error types).
            return None

    def counted_by(self) -> str:
        return "tiktoken" if self._encoding is not None else "estimate: one token per 4 bytes of UTF-8"

    def count_tokens(self, prompt: str) -> int:
        if self._encoding is not None:
            return len(self._encoding.encode(prompt, disallowed_special=()))
        return math.ceil(len(prompt.encode()) / 4)

    @cached_property
    def _key(self) -> str:
        key = os.environ.get(self.key_env, "").strip()
        if not key and (self.base_url == OFFICIAL or self.key_env != KEY_ENV):
            raise JudgeRefused(f"no key: the environment variable {self.key_env} is not set")
        return key

    @cached_property
    def _client(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise JudgeRefused(
                "an endpoint is asked through the package openai: pip install 'routesae-lens[interpret]'"
            ) from error
        # max_retries=0: the tries are made here, where Ctrl-C can end the waiting between them.
        return OpenAI(
            api_key=self._key or "none", base_url=self.base_url, timeout=self.timeout, max_retries=0
        )

    def ask(self, prompt: str, stop: threading.Event) -> Reply:
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_when_event_set
        from tenacity.nap import sleep_using_event
        from tenacity.wait import wait_random_exponential

        exponential = wait_random_exponential(multiplier=self.backoff, max=LONGEST_WAIT)

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            if error.after is not None:
                return min(error.after, LONGEST_WAIT)
            return exponential(state)

        retrying = Retrying(
            retry=retry_if_exception_type(_Transient),
            wait=wait,
            stop=stop_after_attempt(self.tries) | stop_when_event_set(stop),
            sleep=sleep_using_event(stop),
            reraise=True,
        )
        return retrying(self._ask_once, prompt)

    def _ask_once(self, prompt: str) -> Reply:
        import openai

        body: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        body = {name: value for name, value in body.items() if value is not None}
        # (`from None` below: what is suppressed may hold the key, which some servers send back.)
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                extra_body=dict(self.parameters) or None,
                **body,
            )
            return self._read(answer)
        except openai.APIStatusError as error:
            message = self._shown(f"HTTP {error.status_code}: {error.message}")
            if error.status_code in (401, 402, 404) or error.code == "insufficient_quota":
                raise JudgeRefused(message) from None
            if error.status_code in (408, 409, 429) or error.status_code >= 500:
                raise _Transient(message, _retry_after(error.response.headers)) from None
            raise JudgeError(message) from None
        except openai.APIConnectionError as error:  # time-outs too
            cause = f" ({type(error.__cause__).__name__})" if error.__cause__ else ""
            raise _Transient(self._shown(f"{error}{cause}")) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise _Transient(self._shown(f"unreadable answer: {type(error).__name__}: {error}")) from None

    def _read(self, answer: Any) -> Reply:
        # The client checks nothing: a body that is no JSON arrives as text, wrong fields as they are.
        if not getattr(answer, "choices", None):
            raise ValueError(f"expected a chat completion, got {str(answer)!r}")
        choice = answer.choices[0]
        text = choice.message.content
        if text is None:
            text = getattr(choice.message, "refusal", None) or ""
        if not isinstance(text, str):
            raise ValueError(f"expected text, got {type(text).__name__}")
        counts = [getattr(answer.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        prompt_tokens, completion_tokens = (n if type(n) is int and n >= 0 else None for n in counts)
        reason = choice.finish_reason if isinstance(choice.finish_reason, str) else None
        return Reply(self._clean(text), prompt_tokens, completion_tokens, reason)

    def _clean(self, text: str) -> str:
        # Shorter ones are words such as "EMPTY" for servers that check none.
        return text.replace(self._key, "[key]") if len(self._key) >= SHORTEST_SECRET else text

    def _shown(self, text: str) -> str:
        text = one_line(self._clean(text))  # cleaned before it is cut, or half a key would remain
        return text if len(text) <= 300 else text[:300] + " ..."


class _Transient(JudgeError):
    """Worth another try."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after
        """Seconds that the server asks for."""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of the header, which is a number or a date (RFC 9110)."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
