"""Asking a judge over a real socket: faults, concurrency, what is paid, what happens to the key."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from feature_sets import feature_set
from judge_server import GOOD, Response, completion, judge_server, refusal
from typer.testing import CliRunner

from routesae_lens.cli import app
from routesae_lens.report import interpret as module
from routesae_lens.report.answers import AnswerCache
from routesae_lens.report.endpoint_judge import EndpointJudge
from routesae_lens.report.interpret import estimate_interpretation, feature_prompts, interpret
from routesae_lens.report.interpretations import Interpretations, Usage
from routesae_lens.report.judges import JudgeError, JudgeRefused
from routesae_lens.report.prompt import Interpretation

SECRET = "sk-not-for-anyone-0123456789"
SAID = Interpretation("low-level", 4, "It fires on weekdays.")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("ROUTESAE_LENS_CACHE", str(tmp_path / "cache"))


def judge(url: str, **kwargs: Any) -> EndpointJudge:
    return EndpointJudge("judge-1", url, **{"backoff": 0.01, "timeout": 5.0, **kwargs})


def ask(judge: EndpointJudge, prompt: str = "Hello?"):
    return judge.ask(prompt, threading.Event())


def test_a_sample_is_asked_once_and_the_result_is_written(tmp_path: Path):
    features = feature_set(6)
    with judge_server() as server:
        result = interpret(features, judge(server.url), n=4, output=tmp_path, progress=False)
        assert len(server.requests) == 4
        assert sorted(server.prompts) == sorted(feature_prompts(features, 4).values())
        again = interpret(features, judge(server.url), n=4, output=tmp_path, progress=False)
        assert len(server.requests) == 4  # nothing is paid twice
        larger = interpret(features, judge(server.url), n=6, output=tmp_path, progress=False)
        assert len(server.requests) == 6  # a larger sample contains the smaller one
    assert result.features == dict.fromkeys(feature_prompts(features, 4), SAID)
    assert (result.paid, result.usage) == (Usage(400, 40, 4), Usage(400, 40, 4))
    assert (again, again.paid) == (result, Usage())
    assert (larger.paid, larger.usage) == (Usage(200, 20, 2), Usage(600, 60, 6))
    assert Interpretations.load(tmp_path / "route.json") == larger
    request = server.requests[0]
    assert request["authorization"] == f"Bearer {SECRET}"
    assert {"model": "judge-1", "temperature": 0.0, "max_tokens": 500}.items() <= request.items()


def test_answers_belong_to_prompt_model_and_parameters_not_to_the_address():
    features = feature_set(1)
    with judge_server() as server, judge_server() as elsewhere:
        for one in (
            judge(server.url),
            judge(server.url, temperature=1.0),
            judge(server.url, max_tokens=None, temperature=None),
            judge(server.url, parameters={"seed": 3}),
            replace(judge(server.url), model="judge-2"),
        ):
            interpret(features, one, progress=False)
        interpret(features, judge(server.url), max_contexts=2, progress=False)
        interpret(features, judge(elsewhere.url), progress=False)
    assert (len(server.requests), len(elsewhere.requests)) == (6, 0)
    assert "temperature" not in server.requests[2] and "max_tokens" not in server.requests[2]
    assert server.requests[3]["seed"] == 3


FAULTS = {
    "429": refusal(429, "slow down", Retry_After="0"),
    "500": Response(500, b"<html>Internal Server Error</html>", {"content-type": "text/html"}),
    "time-out": Response(delay=0.6),
    "garbage": Response(body=b"\x89PNG\r\n\x00\xff", headers={"content-type": "image/png"}),
    "invalid JSON": Response(body=b'{"choices": [', headers={"content-type": "application/json"}),
    "other JSON": Response(body=b"[1, 2]", headers={"content-type": "application/json"}),
    "no choices": completion("x", choices=[]),
    "numbers for text": completion(7),  # type: ignore[arg-type]
    "empty": Response(headers={"content-type": "application/json"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_tried_again_until_they_pass(fault: str):
    with judge_server(lambda _, nth: FAULTS[fault] if nth < 2 else completion(GOOD)) as server:
        assert ask(judge(server.url, timeout=0.3)).text == GOOD
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_stay_are_a_failure_after_all_tries(fault: str):
    with judge_server(lambda *_: FAULTS[fault]) as server:
        with pytest.raises(JudgeError) as caught:
            ask(judge(server.url, timeout=0.3, tries=2))
        assert len(server.requests) == 2
    assert not isinstance(caught.value, JudgeRefused)
    assert len(str(caught.value)) < 320 and str(caught.value).isprintable()


def test_retry_after_is_obeyed_as_seconds_and_as_a_date():
    not_before = int(time.time()) + 2
    for header, least in (("0.4", 0.4), (formatdate(not_before, usegmt=True), 0.0), ("nonsense", 0.0)):
        fault = refusal(429, "slow down", Retry_After=header)
        with judge_server(lambda _, nth, fault=fault: fault if nth == 0 else completion(GOOD)) as server:
            ask(judge(server.url))
        first, second = (request["time"] for request in server.requests)
        assert second - first >= least, header
        if header.endswith("GMT"):
            assert time.time() >= not_before  # (however long the machine took until the first answer)


def test_waiting_for_another_try_ends_when_the_run_stops():
    stop = threading.Event()

    def busy(*_: object) -> Response:
        threading.Timer(0.3, stop.set).start()
        return refusal(500, "down", Retry_After="30")

    with judge_server(busy) as server:
        with pytest.raises(JudgeError, match="HTTP 500"):
            judge(server.url).ask("Hello?", stop)
        assert time.monotonic() - server.requests[0]["time"] < 10 and len(server.requests) <= 2


def test_waits_grow_up_to_the_longest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr("routesae_lens.report.endpoint_judge.LONGEST_WAIT", 0.5)
    with judge_server(lambda _, nth: refusal(503, "busy") if nth < 4 else completion(GOOD)) as server:
        ask(judge(server.url, backoff=0.15))
    times = [request["time"] for request in server.requests]
    waits = [later - earlier for earlier, later in pairwise(times)]
    for wait, least in zip(waits, (0.15, 0.3, 0.5, 0.5), strict=True):
        assert least <= wait < least + 0.4


def test_a_dead_address_is_a_failure_that_names_the_reason():
    with pytest.raises(JudgeError, match="ConnectError"):
        ask(judge("http://127.0.0.1:9/v1", tries=2))


@pytest.mark.parametrize(
    "answer",
    [
        refusal(401, f"Incorrect API key provided: {SECRET}"),
        refusal(402, "no credit"),
        refusal(404, "no such model"),
        refusal(429, "You exceeded your quota", code="insufficient_quota"),
    ],
)
def test_a_refused_key_model_or_quota_ends_the_run_at_once(answer: Response):
    with judge_server(lambda *_: answer) as server:
        with pytest.raises(JudgeRefused, match=f"HTTP {answer.status}"):
            interpret(feature_set(20), judge(server.url, concurrency=2), progress=False)
        assert len(server.requests) <= 4  # none was tried again, few were on the way


def test_nothing_but_failures_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FAILURES_IN_A_ROW", 3)
    with judge_server(lambda *_: refusal(400, "no such parameter: max_tokens")) as server:
        with pytest.raises(JudgeRefused, match=r"3 requests in a row failed.*no such parameter"):
            interpret(feature_set(30), judge(server.url, concurrency=1), progress=False)
        assert len(server.requests) <= 4


def test_failures_are_asked_again_and_unparsed_answers_only_on_demand(tmp_path: Path):
    features = feature_set(3)
    prompts = feature_prompts(features)
    bad, prose, good = prompts
    answers = {
        prompts[bad]: refusal(400, "content filter"),
        prompts[prose]: completion("Weekdays, I should think."),
        prompts[good]: completion(GOOD),
    }
    with judge_server(lambda prompt, _: answers[prompt]) as server:
        result = interpret(features, judge(server.url), output=tmp_path, progress=False)
        assert (list(result.features), result.unparsed) == ([good], {prose: "Weekdays, I should think."})
        assert "content filter" in result.failed[bad]
        assert "1 unparsed, 1 failed" in result.summary()
        assert Interpretations.load(tmp_path / "route.json") == result
        answers = dict.fromkeys(prompts.values(), completion(GOOD))
        server.requests.clear()
        second = interpret(features, judge(server.url), output=tmp_path, progress=False)
        assert server.prompts == [prompts[bad]]
        assert (sorted(second.features), list(second.unparsed)) == (sorted([good, bad]), [prose])
        server.requests.clear()
        third = interpret(features, judge(server.url), retry_unparsed=True, progress=False)
        assert server.prompts == [prompts[prose]] and len(third.features) == 3


def test_an_answer_without_counts_or_content_is_no_failure():
    features = feature_set(1)
    with judge_server(lambda *_: completion(None, usage=None)) as server:
        result = interpret(features, judge(server.url), progress=False)
    assert result.unparsed == {1: ""} and result.usage == Usage(0, 0, 1, 1)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_once_than_allowed(concurrency: int):
    with judge_server(lambda *_: replace(completion(GOOD), delay=0.05)) as server:
        interpret(feature_set(12), judge(server.url, concurrency=concurrency), progress=False)
    assert server.most_at_once == concurrency


def test_a_damaged_answer_is_asked_again():
    features = feature_set(1)
    with judge_server() as server:
        interpret(features, judge(server.url), progress=False)
        (file,) = module.default_answers().rglob("*.json")
        for damage in ("", "{}", "[1]", json.dumps({**json.loads(file.read_text()), "prompt": "another"})):
            file.write_text(damage)
            with pytest.warns(UserWarning, match="asked again"):
                interpret(features, judge(server.url), progress=False)
        assert len(server.requests) == 5


def test_what_another_judge_said_is_not_written_over(tmp_path: Path):
    with judge_server() as server:
        interpret(feature_set(1), judge(server.url), output=tmp_path, progress=False)
        with pytest.raises(ValueError, match="holds interpretations with judge"):
            interpret(feature_set(1), judge(server.url, temperature=1.0), output=tmp_path, progress=False)
        with pytest.raises(ValueError, match="with seed 0, not 1"):
            interpret(feature_set(1), judge(server.url), seed=1, output=tmp_path, progress=False)
        assert len(server.requests) == 1


# Stopped runs, in a process of their own.

SLOW = replace(completion(GOOD), delay=0.25)


def command(features: Path, server_url: str, folder: Path, *more: str) -> list[str]:
    where = ["--output", str(folder / "out"), "--answers", str(folder / "answers"), "--base-url", server_url]
    return ["interpret", str(features), "--model", "judge-1", *where, "--concurrency", "2", *more]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    feature_set(12).save(tmp_path / "route.json.gz")
    return tmp_path / "route.json.gz"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_and_pays_for_the_rest_only(number: int, saved: Path, tmp_path: Path):
    with judge_server(lambda *_: SLOW) as server:
        arguments = command(saved, server.url, tmp_path)
        program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        program += "import routesae_lens; from routesae_lens.cli import app\n"
        program += "assert 'openai' not in sys.modules\napp()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while len(server.requests) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0].decode()
        first = len(server.requests)
        kept = len(list((tmp_path / "answers").rglob("*.json")))
        assert 3 <= kept <= first < 12, output
        assert not (tmp_path / "out" / "route.json").exists()
        if number == signal.SIGINT:
            assert process.returncode == 130 and "the same command asks for the rest" in output
            assert kept == first  # what was on the way came in and was kept
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert len(server.requests) == first + 12 - kept
    assert len(Interpretations.load(tmp_path / "out" / "route.json").features) == 12
    assert SECRET not in output + done.output


def test_the_dry_run_prints_prompts_and_cost_and_asks_nobody(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(EndpointJudge, "_encoding", None)
    prompts = feature_prompts(feature_set(12), 3)
    with judge_server() as server:
        prices = ["--input-price", "2.5", "--output-price", "10", "--n", "3"]
        monkeypatch.delenv("OPENAI_API_KEY")
        done = CliRunner().invoke(app, command(saved, server.url, tmp_path, "--dry-run", *prices))
        assert done.exit_code == 0, done.output
        assert (
            server.requests == [] and not (tmp_path / "answers").exists() and not (tmp_path / "out").exists()
        )
        assert all(prompt in done.stdout for prompt in prompts.values())
        tokens = sum(-(-len(prompt.encode()) // 4) for prompt in prompts.values())
        cost = (tokens * 2.5 + 3 * 500 * 10) / 1e6
        assert f"to ask: 3, {tokens:,} tokens" in done.stdout and f"{cost:.4f}" in done.stdout
        done = CliRunner().invoke(app, command(saved, server.url, tmp_path, *prices))
        assert f"asked now: 3 answers, 300 + 30 tokens, cost {(300 * 2.5 + 30 * 10) / 1e6:.4f}" in done.stdout
        known = estimate_interpretation(feature_set(12), judge(server.url), n=4, answers=tmp_path / "answers")
        assert (known.prompts, known.known, known.completion_tokens) == (4, 3, 500)


def test_tokens_are_counted_by_tiktoken_where_it_works_and_else_estimated(monkeypatch: pytest.MonkeyPatch):
    fake = SimpleNamespace(encode=lambda text, disallowed_special: text.split())
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(encoding_for_model=lambda name: fake))
    counting = judge("http://127.0.0.1:9/v1")
    assert (counting.count_tokens("one two <|endoftext|>"), counting.counted_by()) == (3, "tiktoken")

    def no_network(name: str):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(encoding_for_model=no_network))
    counting = judge("http://127.0.0.1:9/v1")
    assert (counting.count_tokens("Grüße"), counting.counted_by()[:8]) == (2, "estimate")  # 7 bytes


def echo_of_the_key(_: str, nth: int) -> Response:
    """A server that sends the key back wherever it can."""
    leak = f"Feature category: High-level\nScore: 3\nExplanation: your key is {SECRET}."
    faults = [
        refusal(500, f"down for {SECRET}"),
        Response(body=("x" * 290 + SECRET).encode(), headers={"content-type": "text/plain"}),
        Response(body=b'{"a": "' + SECRET.encode() + b'"}', headers={"content-type": "application/json"}),
        completion(leak),
    ]
    return faults[min(nth, 3)]


def test_the_key_is_in_no_file_and_no_output(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG")
    monkeypatch.setattr("routesae_lens.report.endpoint_judge.LONGEST_WAIT", 0.01)
    outputs = []
    answers: list[Any] = [
        echo_of_the_key,
        lambda *_: echo_of_the_key("", 0),
        lambda *_: echo_of_the_key("", 1),
        lambda *_: refusal(401, f"bad key {SECRET}"),
        lambda *_: refusal(400, f"{'y' * 280}{SECRET}"),
    ]
    for i, answer in enumerate(answers):
        with judge_server(answer) as server:
            more = ["--n", "2", "--debug", "--timeout", "5"]
            done = CliRunner().invoke(app, command(saved, server.url, tmp_path / str(i), *more))
            assert server.requests
            outputs += [done.output, str(done.exception), repr(judge(server.url))]
    files = [file.read_text() for file in tmp_path.rglob("*.json")]
    found = Interpretations.load(tmp_path / "0" / "out" / "route.json")
    assert {one.explanation for one in found.features.values()} == {"your key is [key]."}
    assert len(files) > 4 and len(outputs) == 15
    everything = "\n".join([*outputs, *files, caplog.text])
    assert SECRET not in everything and SECRET[:12] not in everything


def test_a_key_must_be_named_where_one_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(JudgeRefused, match="OPENAI_API_KEY is not set"):
        ask(EndpointJudge("judge-1"))
    with judge_server() as server:
        assert ask(judge(server.url)).text == GOOD  # a server of one's own may need none
        with pytest.raises(JudgeRefused, match="MY_KEY is not set"):
            ask(judge(server.url, key_env="MY_KEY"))
        monkeypatch.setenv("MY_KEY", "another-key")
        assert ask(judge(server.url, key_env="MY_KEY")).text == GOOD
        assert server.requests[-1]["authorization"] == "Bearer another-key"


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"base_url": f"https://user:{SECRET}@host/v1"}, "no user, password"),
        ({"base_url": f"https://host/v1?key={SECRET}"}, "no user, password"),
        ({"base_url": "host/v1"}, "http"),
        ({"key_env": SECRET}, "not the key itself"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"concurrency": 0}, "concurrency"),
        ({"tries": 0}, "tries"),
        ({"timeout": 0.0}, "timeout"),
        ({"parameters": {"messages": []}}, "messages"),
        ({"parameters": {"seed": float("nan")}}, "JSON"),
    ],
)
def test_bad_arguments_of_an_endpoint_are_refused_without_secrets(kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        EndpointJudge("judge-1", **kwargs)
    assert SECRET not in str(caught.value)


def test_the_cache_names_answers_by_all_they_depend_on():
    identity = {"model": "a", "parameters": {"x": 1, "y": 2}}
    same = {"parameters": {"y": 2, "x": 1}, "model": "a"}
    assert AnswerCache.key("p", identity) == AnswerCache.key("p", same)
    assert (
        len({AnswerCache.key("p", identity), AnswerCache.key("q", identity), AnswerCache.key("p", {})}) == 3
    )
