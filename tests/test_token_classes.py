"""Token classes: by text, and by id for tokenizers that write the space before a word in different ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from routesae_lens.analysis.token_classes import (
    FUNCTION_WORDS,
    TOKEN_CLASSES,
    class_table,
    texts_in_context,
    token_class,
)

WORDS = ["the", "The", "Paris", "river", ".", "42", "of", "it's"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".", "punctuation"),
        (' ("', "punctuation"),
        (" €", "punctuation"),
        (" +/-", "punctuation"),
        ("7", "digits"),
        (" 1,999.5", "digits"),
        ("½", "digits"),
        (" the", "function word"),
        (" The", "function word"),
        ("The", "function word"),  # only a word begins with a capital
        (" I", "function word"),
        ("'s", "function word"),
        ("’ll", "function word"),
        (" wasn", "function word"),
        (" US", "capitalised word"),  # not "us"
        (" Paris", "capitalised word"),
        ("Paris", "capitalised word"),
        (" Élan", "capitalised word"),
        (" river", "other word"),
        ("\nriver", "other word"),
        (" well-known", "other word"),
        (" über", "other word"),
        (" 3rd", "other word"),
        ("ing", "word piece"),
        ("the", "word piece"),  # as in ba|the
        (" ", "whitespace"),
        ("\n\n", "whitespace"),
        ("\t ", "whitespace"),
        ("", "other"),
        ("�", "other"),
        (" �", "other"),
        ("\x02", "other"),
        (".com", "other"),
        (" two words", "other"),
        ("-based", "other"),
    ],
)
def test_class_of_a_text(text: str, expected: str):
    assert expected in TOKEN_CLASSES
    assert token_class(text) == expected


def test_function_words_are_found_by_lower_case_words():
    assert all(word == word.lower() and word.replace("'", "").isalpha() for word in FUNCTION_WORDS)
    assert len(FUNCTION_WORDS) > 200
    assert not FUNCTION_WORDS & {"river", "people", "time", "said", "good", "make"}


def words_only(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are whole words; id 0 is special."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "the", "##the", "Paris", "##ing", ",", "b"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2: ▁ for a space, single bytes, and a decoder that strips the first space."""
    pieces = ["<unk>", "▁the", "the", "▁Paris", "▁", "a", ",", "<0x0A>", "▁river"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def classes(tokenizer: Any) -> list[str]:
    names, table = class_table(tokenizer)
    assert names == tuple(TOKEN_CLASSES)
    return [names[i] for i in table.tolist()]


def test_whole_words():
    assert classes(words_only()) == [
        *("special", "function word", "function word", "capitalised word", "other word"),
        *("punctuation", "digits", "function word", "function word"),
    ]


def test_word_pieces():
    assert classes(word_pieces()) == [
        *("special", "function word", "word piece", "capitalised word", "word piece"),
        *("punctuation", "other word"),
    ]


def test_sentence_pieces():
    assert classes(sentence_pieces()) == [
        *("special", "function word", "word piece", "capitalised word", "whitespace"),
        *("word piece", "punctuation", "whitespace", "other word"),
    ]


def test_byte_level_tokens_keep_their_spaces(tiny_llama_dir: Path):
    # The demo model's kind: Ġ for a space, Ċ for a line break.
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    table = dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), classes(tokenizer), strict=True))
    assert table["<s>"] == table["</s>"] == table["<pad>"] == "special"
    assert table["Ġ"] == table["Ċ"] == "whitespace"
    assert table["Ġthe"] == "function word"
    assert (table["e"], table["R"], table["7"], table["."]) == (
        *("word piece", "capitalised word", "digits", "punctuation"),
    )
    texts = texts_in_context(tokenizer, list(range(3, len(tokenizer))))
    assert texts == [tokenizer.decode([i]) for i in range(3, len(tokenizer))]


def test_chat_tokens_are_special(tiny_llama_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    before = classes(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    assert classes(tokenizer) == [*before, "special"]  # the table is made anew when the tokenizer grows


def test_ids_that_the_tokenizer_leaves_out():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "river": 4}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert classes(fast) == ["special", "function word", "other", "other", "other word"]


def test_the_table_is_made_once_per_tokenizer():
    one, other = words_only(), words_only(["river", "the"])
    assert class_table(one)[1] is class_table(one)[1]
    assert class_table(other)[1].tolist() != class_table(one)[1][:3].tolist()


def test_lookup_is_vectorised():
    names, table = class_table(words_only())
    ids = torch.tensor([[1, 4], [5, 0]])
    assert [[names[i] for i in row] for row in table[ids].tolist()] == [
        ["function word", "other word"],
        ["punctuation", "special"],
    ]


def test_bad_tokenizers():
    with pytest.raises(ValueError, match="expected a Hugging Face tokenizer, got NoneType"):
        class_table(None)
    with pytest.raises(ValueError, match="got str"):
        class_table("gpt2")
    with pytest.raises(ValueError, match="none of the tokenizer's tokens is a word"):
        class_table(words_only([".", ","]))
