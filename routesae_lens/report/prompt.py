"""What a judge is asked about a feature, and how its answer is read (RouteSAE, section 3.4).

The wording of the prompt is the paper's. Texts of the data and of the judge are untrusted: in the prompt every
context stays on its one line, and an answer counts only where all three components are there, once, as asked.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from routesae_lens.analysis.contexts import Context

CATEGORIES = ("low-level", "high-level", "undiscernible")
SCORES = (1, 2, 3, 4, 5)

_PREFIX = """\
Background
We are analyzing the activation levels of features in a neural network, where each feature activates certain \
tokens in a text. Each token's activation value indicates its relevance to the feature, with higher values \
showing stronger association. Features are categorized as:
A. Low-level features, which are associated with word-level polysemy disambiguation (e.g., "crushed things", \
"Europe").
B. High-level features, which are associated with long-range pattern formation (e.g., "enumeration", "one of \
the [number/quantifier]")
C. Undiscernible features, which are associated with noise or irrelevant patterns.

Task description
Your task is to classify the feature as low-level, high-level or undiscernible and give this feature a \
monosemanticity score based on the following scoring rubric:
Activation Consistency
5: Clear pattern with no deviating examples
4: Clear pattern with one or two deviating examples
3: Clear overall pattern but quite a few examples not fitting that pattern
2: Broad consistent theme but lacking structure
1: No discernible pattern

Consider the following activations for a feature in the neural network.
"""
_EXAMPLE = "Token: {token} | Activation: {activation} | Context: {context}\n"
_SUFFIX = """\

Question
Provide your response in the following fixed format:
Feature category: [Low-level/High-level/Undiscernible]
Score: [5/4/3/2/1]
Explanation: [Your brief explanation]
"""

PROMPT_SHA256 = hashlib.sha256((_PREFIX + _EXAMPLE + _SUFFIX).encode()).hexdigest()
"""Names the wording, the same for all features: scores of different wordings are not comparable."""


@dataclass(frozen=True)
class Interpretation:
    """What a judge says of one feature."""

    category: str
    """One of ``CATEGORIES``."""
    score: int
    """Monosemanticity by the paper's rubric: 1 (no discernible pattern) to 5 (no deviating example)."""
    explanation: str
    """Untrusted text; people may leave it empty."""

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise ValueError(f"category must be one of {', '.join(CATEGORIES)}, got {self.category!r}")
        if type(self.score) is not int or self.score not in SCORES:
            raise ValueError(f"score must be a whole number from 1 to 5, got {self.score!r}")
        if not isinstance(self.explanation, str):
            raise ValueError(f"explanation must be text, got {type(self.explanation).__name__}")


def example_lines(contexts: Sequence[Context]) -> str:
    """One line for each context, in the order given: token, activation (in units of p = 1), text around it."""
    return "".join(
        _EXAMPLE.format(
            token=one_line(context.token.strip() or context.token),
            activation=f"{context.activation:.2f}",
            context=one_line(_text(context).strip()),
        )
        for context in contexts
    )


def build_prompt(contexts: Sequence[Context]) -> str:
    """The paper's prompt for one feature.

    Raises:
        ValueError: no contexts.
    """
    if not contexts:
        raise ValueError("a prompt needs at least one context of the feature, got none")
    return _PREFIX + example_lines(contexts) + _SUFFIX


def one_line(text: str) -> str:
    """``text`` with everything that breaks lines, turns the writing direction or cannot be encoded as escapes.

    Text of the data can then neither begin a line of a prompt, a form or a terminal, nor end one.
    """
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _DIRECTION_MARKS
        else char
        for char in text
    )


_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _text(context: Context) -> str:
    return context.before + context.token + context.after


_LABEL = re.compile(
    r"(?<![^\s*_>#\]-])(feature category|category|score|explanation)[ *_]{0,4}:", re.IGNORECASE
)
_CATEGORY = re.compile(
    r"(?:(?P<letter>[abc])[.):]? )?(?P<word>low|high|undiscernible)(?P<level>[ -]?level)?(?: features?)?",
    re.IGNORECASE,
)
_SCORE = re.compile(r"([1-5])(?: ?/ ?5)?(?: ?\(.*\)|: .*)?")
_MARKUP = " \t\r\n*_[]\"'`.,;>#-“”"


def parse_answer(text: str) -> Interpretation | None:
    """Category, score and explanation of an answer in the format asked for; None for anything else.

    Markdown around the labels, "4/5" and thoughts or chatter in front are accepted. Not accepted: a missing
    component, a score that is no whole number from 1 to 5, the template itself, and two answers that differ.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    labels = list(_LABEL.finditer(text))
    names = [label[1].lower().removeprefix("feature ") for label in labels]
    starts = [i for i in range(len(names)) if names[i : i + 3] == ["category", "score", "explanation"]]
    ends = [labels[i].start() for i in starts[1:]] + [len(text)]
    answers = []
    for i, end in zip(starts, ends[: len(starts)], strict=True):
        category, score, explanation = labels[i : i + 3]
        answers.append(
            _read(
                text[category.end() : score.start()],
                text[score.end() : explanation.start()],
                text[explanation.end() : end],
            )
        )
    same = {None if answer is None else (answer.category, answer.score) for answer in answers}
    return answers[0] if len(same) == 1 else None


def _read(category_text: str, score_text: str, explanation: str) -> Interpretation | None:
    category = _CATEGORY.fullmatch(category_text.strip(_MARKUP))
    score = _SCORE.fullmatch(score_text.strip(_MARKUP))
    explanation = "".join(
        char for char in explanation if char == "\n" or unicodedata.category(char) not in ("Cc", "Cs")
    ).strip(" \t\r\n*_")
    if category is None or score is None or not explanation:
        return None
    word = category["word"].lower()
    if (word == "undiscernible") == bool(
        category["level"]
    ):  # "high" and "undiscernible level" are no category
        return None
    name = word if category["level"] is None else f"{word}-level"
    if category["letter"] and CATEGORIES["abc".index(category["letter"].lower())] != name:
        return None
    return Interpretation(name, int(score[1]), explanation)
