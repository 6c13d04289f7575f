"""Features asked about, one by one: drawing a sample, what it will cost, asking, going on after a stop."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from routesae_lens.analysis.feature_set import Feature, FeatureSet
from routesae_lens.demo import cache_dir
from routesae_lens.report.answers import AnswerCache
from routesae_lens.report.interpretations import Interpretations, Usage, result_path
from routesae_lens.report.judges import Judge, JudgeError, JudgeRefused, Reply
from routesae_lens.report.prompt import PROMPT_SHA256, build_prompt, one_line, parse_answer

FAILURES_IN_A_ROW = 10
"""So many failures without an answer in between end a run: the endpoint is down, or asked wrongly."""


def sample_features(features: FeatureSet, n: int | None = 100, seed: int = 0) -> list[Feature]:
    """``n`` of the interpretable features, drawn at random (paper: 100), or all where there are fewer.

    With the same seed a larger sample contains the smaller one, so that answers are not paid again.

    Raises:
        ValueError: n below 1, or no interpretable features.
    """
    if n is not None and n < 1:
        raise ValueError(f"n must be 1 or more, or none for all, got {n}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    by_id = {feature.id: feature for feature in features.features}
    if not by_id:
        raise ValueError(f"{features.name!r} has no interpretable features to ask about")
    drawn = np.random.default_rng(seed).permutation(sorted(by_id))[:n]
    return [by_id[int(latent)] for latent in drawn]


def feature_prompts(
    features: FeatureSet, n: int | None = 100, seed: int = 0, max_contexts: int | None = None
) -> dict[int, str]:
    """The prompt of every drawn feature by latent, with its strongest ``max_contexts`` contexts.

    Raises:
        ValueError: as ``sample_features``; max_contexts below 1.
    """
    if max_contexts is not None and max_contexts < 1:
        raise ValueError(f"max_contexts must be 1 or more, or none for all, got {max_contexts}")
    return {
        feature.id: build_prompt(feature.contexts[:max_contexts])
        for feature in sample_features(features, n, seed)
    }


@dataclass(frozen=True)
class Estimate:
    """What asking will take. Nothing is asked to know it."""

    prompts: int
    known: int
    """Prompts with an answer in the cache."""
    prompt_tokens: int
    """Of the prompts without one."""
    completion_tokens: int | None
    """At most, of the answers to them; None where the judge has no limit."""
    counted_by: str

    def __str__(self) -> str:
        longest = "no limit" if self.completion_tokens is None else f"at most {self.completion_tokens:,}"
        return (
            f"{self.prompts} prompts, {self.known} answered already; to ask: {self.prompts - self.known}, "
            f"{self.prompt_tokens:,} tokens ({self.counted_by}), answers {longest} tokens"
        )

    def cost(self, input_price: int | float, output_price: int | float) -> float | None:
        """At most, in the unit of the prices per million tokens; None where answers have no limit."""
        if self.completion_tokens is None:
            return None
        return Usage(self.prompt_tokens, self.completion_tokens).cost(input_price, output_price)


def default_answers() -> Path:
    """Folder of the answers: ``answers`` in ``$ROUTESAE_LENS_CACHE`` or in the user's cache."""
    return cache_dir() / "answers"


def estimate_interpretation(
    features: FeatureSet,
    judge: Judge,
    *,
    n: int | None = 100,
    seed: int = 0,
    max_contexts: int | None = None,
    answers: str | Path | None = None,
    retry_unparsed: bool = False,
) -> Estimate:
    """How many requests and tokens ``interpret`` with the same arguments takes."""
    prompts = feature_prompts(features, n, seed, max_contexts)
    identity, cache = judge.identity(), AnswerCache(Path(answers or default_answers()))
    open_prompts = {
        prompt for prompt in prompts.values() if _known(cache, prompt, identity, retry_unparsed) is None
    }
    longest = judge.describe()["parameters"].get("max_tokens")
    return Estimate(
        prompts=len(prompts),
        known=sum(prompt not in open_prompts for prompt in prompts.values()),
        prompt_tokens=sum(map(judge.count_tokens, open_prompts)),
        completion_tokens=None if longest is None else longest * len(open_prompts),
        counted_by=judge.counted_by(),
    )


def interpret(
    features: FeatureSet,
    judge: Judge,
    *,
    n: int | None = 100,
    seed: int = 0,
    max_contexts: int | None = None,
    answers: str | Path | None = None,
    output: str | Path | None = None,
    retry_unparsed: bool = False,
    progress: bool = True,
) -> Interpretations:
    """Ask a judge about a sample of an SAE's interpretable features (RouteSAE, section 3.4).

    Every answer is on disk as soon as it is there. Stopped at any point, the same call asks for the rest only;
    what failed is asked again, what could not be read only with ``retry_unparsed``.

    Args:
        features: from ``collect_features`` or ``FeatureSet.load``.
        judge: ``EndpointJudge``, ``LocalJudge`` or anything that is a ``Judge``.
        n: features to draw; None for all.
        seed: of the drawing.
        max_contexts: contexts shown of each feature, strongest first; None for all that were kept.
        answers: folder of the answers, shared by all runs; see ``default_answers``.
        output: folder for ``<sae>.json``; None writes no file.
        retry_unparsed: ask again where the answer could not be read.
        progress: show a bar.

    Raises:
        ValueError: a bad argument; a file of another judge, prompt or seed at the place of the result.
        JudgeRefused: the key or the model is refused, or nothing but failures comes back.
        KeyboardInterrupt: Ctrl-C, once the answers on the way have come in (a second one: at once).
    """
    prompts = feature_prompts(features, n, seed, max_contexts)
    result = Interpretations(
        features.name, judge.describe(), PROMPT_SHA256, seed, max_contexts, len(features.features), {}
    )
    if output is not None:
        _refuse_to_replace(result_path(output, features.name), result)
    identity, cache = judge.identity(), AnswerCache(Path(answers or default_answers()))
    replies = {prompt: _known(cache, prompt, identity, retry_unparsed) for prompt in prompts.values()}
    missing = [prompt for prompt, reply in replies.items() if reply is None]
    with tqdm(
        total=len(replies),
        initial=len(replies) - len(missing),
        desc=one_line(features.name),
        disable=not progress,
    ) as bar:
        outcomes = _ask_all(judge, missing, cache, identity, bar)
    for prompt, outcome in outcomes.items():
        if isinstance(outcome, Reply):
            replies[prompt] = outcome
            result.paid += _usage(outcome)

    for latent, prompt in prompts.items():
        reply = replies[prompt]
        if reply is None:
            result.failed[latent] = str(outcomes[prompt])
            continue
        said = parse_answer(reply.text)
        if said is None:
            result.unparsed[latent] = reply.text
        else:
            result.features[latent] = said
    for reply in replies.values():
        result.usage += Usage() if reply is None else _usage(reply)
    if output is not None:
        result.save(output)
    return result


def _known(cache: AnswerCache, prompt: str, identity: dict, retry_unparsed: bool) -> Reply | None:
    reply = cache.get(cache.key(prompt, identity), prompt)
    if reply is not None and retry_unparsed and parse_answer(reply.text) is None:
        return None
    return reply


def _usage(reply: Reply) -> Usage:
    if reply.prompt_tokens is None or reply.completion_tokens is None:
        return Usage(answers=1, answers_without_usage=1)
    return Usage(reply.prompt_tokens, reply.completion_tokens, answers=1)


def _refuse_to_replace(path: Path, planned: Interpretations) -> None:
    """What another judge said is not written over; a larger or smaller sample of the same is."""
    if not path.exists():
        return
    found = Interpretations.load(path)
    for name in ("sae", "judge", "prompt_sha256", "seed", "max_contexts"):
        there, now = getattr(found, name), getattr(planned, name)
        if name == "judge":  # the same model at another address is the same judge
            there, now = ({**judge, "base_url": None} for judge in (there, now))
        if there != now:
            raise ValueError(
                f"{path} holds interpretations with {name} {there!r}, not {now!r}; give another output folder"
            )


def _ask_all(
    judge: Judge, prompts: list[str], cache: AnswerCache, identity: dict, bar: tqdm
) -> dict[str, Reply | JudgeError]:
    """Answers and failures by prompt, asked ``judge.concurrency`` at once."""
    stop = threading.Event()

    def ask(prompt: str) -> Reply:
        if stop.is_set():
            raise JudgeError("stopped")  # taken from the queue just before it was emptied
        reply = judge.ask(prompt, stop)
        # Here, not in the main thread: an answer that comes in while the run ends is kept as well.
        cache.put(cache.key(prompt, identity), prompt, identity, reply)
        return reply

    outcomes: dict[str, Reply | JudgeError] = {}
    in_a_row = unparsed = failed = 0
    with _draining(judge.concurrency, stop) as pool:
        futures: dict[Future[Reply], str] = {pool.submit(ask, prompt): prompt for prompt in prompts}
        for future in as_completed(futures):
            try:
                reply = future.result()
                outcomes[futures[future]] = reply
                unparsed, in_a_row = unparsed + (parse_answer(reply.text) is None), 0
            except JudgeRefused:
                raise
            except JudgeError as error:
                outcomes[futures[future]] = error
                failed, in_a_row = failed + 1, in_a_row + 1
                if in_a_row == FAILURES_IN_A_ROW:
                    raise JudgeRefused(
                        f"{in_a_row} requests in a row failed, the last one with: {error}"
                    ) from None
            bar.set_postfix(unparsed=unparsed, failed=failed, refresh=False)
            bar.update()
    return outcomes


@contextmanager
def _draining(workers: int, stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """A pool that, when the block is left early, starts nothing new and waits for what is on the way."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
    try:
        yield pool
    except BaseException as error:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt):
            note = "\nStopping: waiting for the answers on the way (again: leave at once)"
            print(note, file=sys.stderr, flush=True)
        raise
    finally:
        pool.shutdown(wait=True)
