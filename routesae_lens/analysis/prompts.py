"""Prompts as token ids: texts, and chats through the tokenizer's template; whole conversations to evaluate on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.util import get_special_token_ids
from torch import Tensor

from routesae_lens.analysis.stream import check_context

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


@dataclass(frozen=True)
class Conversations:
    """Conversations as ``evaluate`` reads them: one a row, ``evaluate(sae, model, c.tokens, c.exclude)`` in effect.

    Rows are filled up on the right, where nothing that counts can attend to the filling.
    """

    tokens: Int[Tensor, "conversation pos"] = field(repr=False)
    exclude: list[int] = field(repr=False)
    """For ``exclude_special_tokens``: every special token of the tokenizer, those that only the template writes
    and the filling included. SAELens' own list, which ``True`` stands for, names BOS, EOS, padding and the like, and
    leaves in the template's others, such as the one that begins a turn."""
    truncated: int
    """Conversations that were longer than ``context_size`` and lost their end."""
    filling: int
    """Positions that only fill up a row."""

    def to_dict(self) -> dict[str, int]:
        """Counts, ready for JSON."""
        return {
            "conversations": len(self.tokens),
            "tokens": self.tokens.numel() - self.filling,
            "truncated": self.truncated,
        }


def conversation_tokens(
    model: Any,
    conversations: Iterable[Prompt],
    *,
    context_size: int,
    n_conversations: int | None = None,
    request: str = "Write a text.",
) -> Conversations:
    """Finished conversations through the tokenizer's chat template (Llama Scope, 4.5.2).

    Args:
        model: its tokenizer has the template.
        conversations: the turns of a chat each, or a plain text, which becomes the assistant's answer to
            ``request``.
        context_size: longest row; what a conversation has beyond is left out.
        n_conversations: take so many of them; all by default.
        request: what the user asks where a plain text is the answer.

    Raises:
        ValueError: a model without tokenizer, a tokenizer without template (it is named) or without any token to fill
            rows up with, a ``context_size`` beyond the model's, fewer conversations than asked for, or
            turns that are none or that the template refuses.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: conversations cannot be read")
    if getattr(tokenizer, "chat_template", None) is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer {name!r} has no chat template: use that of an instruct model, or set "
            "tokenizer.chat_template"
        )
    if context_size < 2:
        raise ValueError(f"context_size must be 2 or more, got {context_size}")
    if n_conversations is not None and n_conversations < 1:
        raise ValueError(f"n_conversations must be 1 or more, got {n_conversations}")
    check_context(context_size, model)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    filling = next((token for token in ids if token is not None), None)
    if filling is None:
        raise ValueError(
            "the tokenizer has no padding, EOS or BOS token to fill rows up with; set its pad_token"
        )
    if isinstance(conversations, str | Mapping):
        raise ValueError(f"expected a list of conversations, got {type(conversations).__name__}")
    rows, truncated = [], 0
    for number, turns in enumerate(islice(conversations, n_conversations)):
        if isinstance(turns, str):
            turns = [{"role": "user", "content": request}, {"role": "assistant", "content": turns}]
        row = _chat_tokens(tokenizer, turns, number, what="conversation", answer_next=False)
        truncated += len(row) > context_size
        rows.append(row[:context_size])
    if len(rows) < (n_conversations or 1):
        raise ValueError(
            f"{len(rows)} conversations were given, {n_conversations or 1} or more are asked for"
        )
    longest = max(2, *map(len, rows))
    tokens = torch.full((len(rows), longest), filling)
    for row, into in zip(rows, tokens, strict=True):
        into[: len(row)] = torch.tensor(row)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if getattr(token, "special", False)}
    special |= {*tokenizer.all_special_ids, *get_special_token_ids(tokenizer)}
    return Conversations(tokens, sorted(special), truncated, tokens.numel() - sum(map(len, rows)))


def _chat_tokens(
    tokenizer: Any, turns: Any, number: int, *, what: str = "prompt", answer_next: bool = True
) -> list[int]:
    from jinja2 import TemplateError

    if not isinstance(turns, Sequence) or not turns:
        raise ValueError(f"{what} {number}: expected a text or the turns of a chat, got {turns!r}")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(
                f'{what} {number}: expected turns such as {{"role": "user", "content": "Hello"}}, got {turn!r}'
            )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"{what} {number} is a chat, and this model's tokenizer has no chat template: give a text"
        )
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answer_next
        )
    except TemplateError as error:
        raise ValueError(
            f"{what} {number}: the chat template refuses these turns: {error.message}"
        ) from error
    # The template writes the special tokens itself.
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{what} {number} is empty once rendered by the chat template")
    return ids
