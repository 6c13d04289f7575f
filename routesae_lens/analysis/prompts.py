"""Prompts as token ids: texts, and chats through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Prompt = str | Sequence[Mapping[str, str]]
"""A text, or the turns of a chat: ``[{"role": "user", "content": "Hello"}]``."""


def prompt_tokens(model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Int[Tensor, " prompt"]]:
    """Token ids of each prompt, with one BOS where the model expects one.

    A chat begins as its template says.

    Raises:
        ValueError: no prompts, one without tokens, one that leaves no room for ``max_new_tokens``, a chat
            without turns or without a template, or a model without a tokenizer.
        TypeError: prompts of another type.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: prompts cannot be read, nor completions written")
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise TypeError(f"expected a list of prompts, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("no prompts given")
    if isinstance(prompts[0], Mapping):
        raise TypeError("got the turns of one chat as the list of prompts; give a list of chats: [turns]")
    tokens = [
        _text_tokens(model, prompt, number)
        if isinstance(prompt, str)
        else _chat_tokens(tokenizer, prompt, number)
        for number, prompt in enumerate(prompts)
    ]
    context = getattr(model.cfg, "n_ctx", None)
    for number, ids in enumerate(tokens):
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
                f"model's context of {context}"
            )
    device = next(model.parameters()).device
    return [torch.tensor(ids, device=device) for ids in tokens]


def _text_tokens(model: Any, text: str, number: int) -> list[int]:
    if not model.tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise ValueError(f"prompt {number} is empty")
    bos = model.tokenizer.bos_token
    has_one = bos is not None and text.startswith(bos)
    return model.to_tokens(text, prepend_bos=False if has_one else None, truncate=False)[0].tolist()


def _chat_tokens(tokenizer: Any, turns: Any, number: int) -> list[int]:
    from jinja2 import TemplateError

    if not isinstance(turns, Sequence) or not turns:
        raise ValueError(f"prompt {number}: expected a text or the turns of a chat, got {turns!r}")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f'prompt {number}: expected turns such as {{"role": "user", "content": "Hello"}}, got {turn!r}'
            )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"prompt {number} is a chat, and this model's tokenizer has no chat template: give a text"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(
            f"prompt {number}: the chat template refuses these turns: {error.message}"
        ) from error
    # The template writes the special tokens itself.
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"prompt {number} is empty once rendered by the chat template")
    return ids
