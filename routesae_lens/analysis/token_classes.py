"""What kind of token is it? A few classes by the token's own text, for shares of anything by class.

A class is a property of the token id alone, so that one lookup table per tokenizer classifies any number
of tokens. The price: ``" May"`` is one class in every sentence, and what a tokenizer writes without a space
can only be judged by its form (see ``word piece``). The list of function words is English.
"""

from __future__ import annotations

import unicodedata
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from sae_lens.util import get_special_token_ids
from torch import Tensor

TOKEN_CLASSES: dict[str, str] = {
    "punctuation": "punctuation and symbols only",
    "digits": "numbers: digits, perhaps with punctuation, no letters",
    "function word": "an English function word (FUNCTION_WORDS) that begins a word, or a clitic such as 's",
    "capitalised word": "any other word, or beginning of one, whose first letter is a capital",
    "other word": "any other word, or beginning of one",
    "word piece": "letters without a space before them or a capital at their start: the rest of a word",
    "whitespace": "spaces, tabs and line breaks only",
    "special": "a special token of the tokenizer",
    "other": "anything else: letters mixed with symbols, parts of a character, control characters, nothing",
}
"""Every class and what it holds. A lower-case word after a quotation mark or at the very start of a text has
no space before it and counts as a word piece, a capital within a word (``Mc|Donald``) as the start of one."""

_CLOSED_CLASSES = {
    "articles, demonstratives, quantifiers": (
        "a an the this that these those some any each every either neither no all both half several many much few "
        "more most less least enough such another other what which whose"
    ),
    "pronouns and possessives": (
        "i me my mine myself we us our ours ourselves you your yours yourself yourselves thou thee thy thine ye "
        "he him his himself she her hers herself it its itself they them their theirs themselves one oneself "
        "who whom whoever whomever whatever whichever somebody someone something anybody anyone anything "
        "nobody none nothing everybody everyone everything"
    ),
    "prepositions": (
        "about above across after against along amid amidst among amongst around as at before behind below beneath "
        "beside besides between beyond by concerning despite down during except for from in inside into like near of "
        "off on onto out outside over past per regarding round since than through throughout till to toward towards "
        "under underneath until unto up upon via with within without"
    ),
    "conjunctions and question words": (
        "and or but nor so yet if unless although though because while whereas whether when whenever where wherever "
        "why how however lest once"
    ),
    "auxiliaries": (
        "am is are was were be been being do does did doing done have has had having can could may might must "
        "shall should will would ought need dare cannot"
    ),
    "adverbs of place, time, degree and negation": (
        "not never also too very just only then there here thus hence therefore again even still"
    ),
    "contractions in one token, and what is left of one before 't": (
        "didn doesn isn aren wasn weren hasn hadn wouldn couldn shouldn mustn "
        "don't doesn't didn't isn't aren't wasn't weren't hasn't haven't hadn't won't wouldn't can't couldn't "
        "shouldn't mustn't i'm i've i'll i'd you're you've you'll you'd he's he'll he'd she's she'll she'd it's "
        "it'll we're we've we'll we'd they're they've they'll they'd that's there's who's what's let's"
    ),
}
FUNCTION_WORDS = frozenset(word for words in _CLOSED_CLASSES.values() for word in words.split())
"""English words of the closed classes, lower case."""

CLITICS = frozenset({"'s", "'t", "'re", "'ve", "'ll", "'d", "'m", "n't"})
"""What a tokenizer cuts off a contraction; it follows its word without a space."""


def token_class(text: str) -> str:
    """The class of a token by its text as it stands in running text, with the space before it if it has one.

    Returns:
        One of :data:`TOKEN_CLASSES` but ``special``, which no text tells; see :func:`class_table`.
    """
    stripped = text.strip().replace("’", "'")
    if not stripped:
        return "whitespace" if text else "other"
    lower = stripped.lower()
    if lower in CLITICS:
        return "function word"
    kinds = {unicodedata.category(character)[0] for character in stripped}
    if "�" in stripped or kinds & {"C", "Z"}:  # half a character, control characters, words with a gap
        return "other"
    if "L" not in kinds:
        return "digits" if "N" in kinds else "punctuation" if kinds <= {"P", "S"} else "other"
    if not all(unicodedata.category(c)[0] in "LMN" or c in "'-" for c in stripped) or stripped[0] in "'-":
        return "other"
    if not (text[0].isspace() or stripped[0].isupper()):
        return "word piece"
    if lower in FUNCTION_WORDS and stripped in (lower, lower.capitalize()):  # not US, WHO, IT
        return "function word"
    return "capitalised word" if stripped[0].isupper() else "other word"


def class_table(tokenizer: Any) -> tuple[tuple[str, ...], Int[Tensor, " vocab"]]:
    """The class of every token id: ``names[table[ids]]`` in effect, vectorised.

    Made once per tokenizer and remembered for as long as the tokenizer lives and does not grow. Do not
    write to the table.

    Args:
        tokenizer: a Hugging Face tokenizer of any kind (byte-level BPE, SentencePiece, WordPiece, words).

    Returns:
        The names of :data:`TOKEN_CLASSES` in order, and an index into them for each id. A model may have
        more rows than its tokenizer has ids; those belong to ``other``.

    Raises:
        ValueError: there is no tokenizer, or none of its tokens is text.
    """
    if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
        raise ValueError(f"expected a Hugging Face tokenizer, got {type(tokenizer).__name__}")
    size, table = _tables.get(tokenizer, (0, None))
    if table is None or size != len(tokenizer):
        table = _classify(tokenizer, sorted(tokenizer.get_vocab().values()))
        _tables[tokenizer] = len(tokenizer), table
    return tuple(TOKEN_CLASSES), table


_tables: WeakKeyDictionary[Any, tuple[int, Tensor]] = WeakKeyDictionary()


def _classify(tokenizer: Any, ids: list[int]) -> Tensor:
    names = list(TOKEN_CLASSES)
    table = torch.full((ids[-1] + 1,), names.index("other"))
    special = _special_ids(tokenizer)
    ordinary = [i for i in ids if i not in special]
    for i, text in zip(ordinary, texts_in_context(tokenizer, ordinary), strict=True):
        table[i] = names.index(token_class(text))
    table[[i for i in special if i <= ids[-1]]] = names.index("special")
    return table


def _special_ids(tokenizer: Any) -> set[int]:
    # SAELens' list leaves out what chat templates add, the tokenizer's own leaves out unset ones.
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {i for i, token in added.items() if getattr(token, "special", False)}
    return marked | set(tokenizer.all_special_ids) | set(get_special_token_ids(tokenizer))


def texts_in_context(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token as it follows another one, with the space that the tokenizer puts before it.

    (Decoded alone, tokens of SentencePiece, WordPiece and word-level tokenizers have no space: it is only
    written between tokens.)
    """

    def decode(several: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(several, clean_up_tokenization_spaces=False, skip_special_tokens=False)

    alone = decode([[i] for i in ids])
    # A letter or digit to follow: a token in its own right for every tokenizer, and no space in the way.
    anchor = next((i for i, text in zip(ids, alone, strict=True) if text.isascii() and text.isalnum()), None)
    if anchor is None:
        raise ValueError("none of the tokenizer's tokens is a word, a letter or a digit")
    before = alone[ids.index(anchor)]
    pairs = decode([[anchor, i] for i in ids])
    return [
        pair[len(before) :] if pair.startswith(before) else text
        for pair, text in zip(pairs, alone, strict=True)
    ]
