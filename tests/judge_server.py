"""A real HTTP server that speaks OpenAI's chat completions, and misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = "Feature category: Low-level\nScore: 4\nExplanation: It fires on weekdays."


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


def completion(text: str | None, **more: Any) -> Response:
    """An answer as the protocol has it."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge-1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        **more,
    }
    return Response(body=json.dumps(body).encode(), headers={"content-type": "application/json"})


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    """An error as the protocol has it."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return Response(status, json.dumps(body).encode(), headers)


@dataclass
class JudgeServer:
    """``answer(prompt, nth)`` says what comes back to the nth request (from 0) with this prompt."""

    answer: Callable[[str, int], Response] = lambda prompt, nth: completion(GOOD)
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies, with the time under "time" and the header under "authorization"."""
    most_at_once: int = 0
    url: str = ""
    _at_once: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]

    def respond(self, body: dict[str, Any], authorization: str | None) -> Response:
        with self._lock:
            prompt = body["messages"][-1]["content"]
            nth = self.prompts.count(prompt)
            self.requests.append({**body, "time": time.monotonic(), "authorization": authorization})
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            response = self.answer(prompt, nth)
            time.sleep(response.delay)
            return response
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def judge_server(answer: Callable[[str, int], Response] | None = None) -> Iterator[JudgeServer]:
    state = JudgeServer() if answer is None else JudgeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/chat/completions":
                response = refusal(404, f"no such path {self.path}")
            else:
                response = state.respond(body, self.headers["authorization"])
            try:
                self.send_response(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(response.body)))
                self.end_headers()
                self.wfile.write(response.body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has given up or was killed

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
