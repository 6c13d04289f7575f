"""Which contexts of a feature are kept, and what they read like (RouteSAE, section 3.3).

A context is one token on which a feature is strong enough. Contexts are grouped by the class of that token
(its text, stripped and in lower case), and the strongest few of every class are kept. The paper keeps them in
a min-heap for each class; here all activations of many batches are sorted at once, which keeps the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

PENDING_ROWS = 2**18
"""Activations that wait to be sorted in; sorting every small batch on its own would cost more time."""


class ContextRows(NamedTuple):
    """Activations above the threshold, one a row."""

    feature: Int[Tensor, " row"]
    token_class: Int[Tensor, " row"]
    strength: Float[Tensor, " row"]
    """What is compared with the threshold, float64."""
    activation: Float[Tensor, " row"]
    """In units of p = 1, float64."""
    token: Int[Tensor, " row"]
    """Place of the token in the flattened ``tokens``."""
    layer: Int[Tensor, " row"]
    """Index into the SAE's layers; -1 for an SAE that reads several at once."""
    p: Float[Tensor, " row"]
    """Probability of that layer; NaN without a router."""

    def take(self, rows: Int[Tensor, " taken"]) -> ContextRows:
        return ContextRows(*(column.index_select(0, rows) for column in self))


class TopContexts:
    """The strongest contexts of every token class of every feature, over a stream of any length.

    Of two equally strong contexts the earlier token comes first. Two contexts of one class may come from one
    sequence: the paper lets "a single sequence be associated with multiple contexts".

    Memory: at most ``n_features * per_feature`` rows are held (without ``per_feature``: ``per_class`` for
    every pair of feature and class that was met), besides one batch and :data:`PENDING_ROWS` rows in waiting.
    Dropping all but the strongest ``per_feature`` on the way loses none that belongs to the result: a context
    with that many survivors above it has them for good, for a survivor is only ever replaced, in its class,
    by a stronger one.

    Args:
        above: contexts count if their strength is greater than this, 0 or more.
        per_class: how many are kept of each class (2 in the paper).
        per_feature: how many are kept of each feature, all classes together; None for all.
    """

    def __init__(
        self, n_features: int, n_classes: int, *, above: float, per_class: int, per_feature: int | None
    ):
        self.n_classes, self.per_class, self.per_feature = n_classes, per_class, per_feature
        self.floor = torch.full((n_features,), above, dtype=torch.float64)
        """Strength that a new context of each feature must exceed; grows as better ones are found."""
        self._kept: ContextRows | None = None
        self._pending: list[ContextRows] = []

    @property
    def held(self) -> int:
        """Rows in memory."""
        rows = [self._kept, *self._pending]
        return sum(len(part.feature) for part in rows if part is not None)

    def add(self, rows: ContextRows) -> None:
        """Take in contexts, token after token and all of later tokens than before.

        Those below the floor should be left out already.
        """
        self._pending.append(rows)
        kept = 0 if self._kept is None else len(self._kept.feature)
        if self.held - kept > max(PENDING_ROWS, kept):
            self.rows()

    def rows(self) -> ContextRows | None:
        """The contexts kept, by feature, strongest first; None if nothing was added."""
        if not self._pending:
            return self._kept
        parts = [self._kept, *self._pending] if self._kept is not None else self._pending
        rows = ContextRows(*map(torch.cat, zip(*parts, strict=True)))
        # Of one feature, what is kept comes strongest first and then by token, and what is new by token: equally
        # strong contexts stay in the order of their tokens.
        order = strongest_first(rows.strength)
        pair = (rows.feature * self.n_classes + rows.token_class).index_select(0, order)
        order = order[first_of_group(pair, self.per_class)]
        feature, by_feature = rows.feature.index_select(0, order).sort(stable=True)
        order = order.index_select(0, by_feature)
        if self.per_feature is not None:
            rank = rank_in_group(feature)
            last = order[rank == self.per_feature - 1]
            self.floor = self.floor.to(rows.strength.device)
            # An equally strong context of a later token would come after it: it must be exceeded as well.
            self.floor[rows.feature[last]] = rows.strength[last]
            order = order[rank < self.per_feature]
        rows = rows.take(order)
        self._kept, self._pending = rows, []
        return rows


def strongest_first(strength: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The order of positive float64 numbers, largest first; equal ones stay in the order they are in.

    The bits of positive numbers, read as integers, are in the order of the numbers, and a CPU sorts integers four
    times as fast.
    """
    return (~strength.view(torch.int64)).argsort(stable=True)


def first_of_group(key: Tensor, n: int) -> Tensor:
    """Mask of the first ``n`` rows of every key."""
    together, order = key.sort(stable=True)
    mask = torch.empty_like(key, dtype=torch.bool)
    mask[order] = rank_in_group(together) < n
    return mask


def rank_in_group(key: Tensor) -> Tensor:
    """Number of rows before each one that have its key; equal keys lie side by side."""
    place = torch.arange(len(key), device=key.device)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return place - torch.where(first, place, 0).cummax(0).values


def token_texts(tokens: Int[Tensor, "*batch"], tokenizer: Any) -> dict[int, str]:
    """The text of each token id that occurs, decoded on its own."""
    return {token_id: _decode(tokenizer, [token_id]) for token_id in tokens.unique().tolist()}


class TextClasses:
    """The class of every token: its text (of :func:`token_texts`), stripped and in lower case (the authors' rule).

    White space alone is the class "", and tokens that hold a part of a character are together the class "�".
    """

    def __init__(self, texts: Mapping[int, str]):
        classes = [text.strip().lower() for text in texts.values()]
        self.names = sorted(set(classes))
        number = {name: i for i, name in enumerate(self.names)}
        self.table = torch.zeros(max(texts) + 1, dtype=torch.long)
        self.table[list(texts)] = torch.tensor([number[name] for name in classes])

    def __call__(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        self.table = self.table.to(tokens.device)
        return self.table[tokens.long()]


class Context(NamedTuple):
    """One activation of a feature, with the text around it: ``before + token + after`` is the text."""

    before: str
    token: str
    """The activated token; the whole character where the token holds only some of its bytes."""
    after: str
    document: int
    """Documents are counted from 0 in the flattened tokens; each BOS begins one, so a document that the
    end of a sequence cuts counts on as the next one (as the model sees it). Without BOS tokens every
    sequence is a document."""
    document_position: int
    """Tokens since the document's first, the BOS."""
    token_class: str
    """The token's text, stripped and in lower case: contexts are grouped by it."""
    token_id: int
    activation: float
    """In units of p = 1 (divided by the token's routing weight)."""
    strength: float
    """What is compared with the threshold: the activation itself, or scaled to an input of norm sqrt(2048)."""
    block: int | None
    """The block that the token was routed to; None for an SAE that reads several at once."""
    p: float | None
    """The router's probability of that block."""
    sequence: int
    """Row of ``tokens``."""
    position: int


class Passages(NamedTuple):
    """Text around tokens, one a row: the columns of a :class:`Context` that have these names."""

    before: list[str]
    token: list[str]
    after: list[str]
    document: list[int]
    document_position: list[int]


class PassageReader:
    """Text around tokens: up to ``context_tokens`` tokens, half of them before, never past the document.

    At most three tokens more where the first or last one holds only a part of a character. ``texts`` are those of
    :func:`token_texts`.
    """

    def __init__(
        self,
        tokens: Int[Tensor, "sequence pos"],
        tokenizer: Any,
        texts: Mapping[int, str],
        context_tokens: int,
    ):
        self.tokens, self.tokenizer, self.texts = tokens.cpu(), tokenizer, texts
        self.n_before = context_tokens // 2
        self.n_after = context_tokens - 1 - self.n_before
        bos = tokenizer.bos_token_id
        is_bos = self.tokens == (-1 if bos is None else bos)
        begins = is_bos.clone()
        begins[0 if is_bos.any() else slice(None), 0] = True
        self.starts = begins.flatten().nonzero().squeeze(-1)
        self.ends = torch.cat([self.starts[1:], torch.tensor([tokens.numel()])])
        self.begins_with_bos = is_bos[begins]

    def read(self, places: Int[Tensor, " row"], progress: str | None = None) -> Passages:
        """The passages around the tokens at these places of the flattened tokens.

        Args:
            progress: caption of the progress bars; none without.
        """
        places, row = places.unique(return_inverse=True)  # several features fire on one token
        length = self.tokens.shape[1]
        sequence, document = places // length, torch.searchsorted(self.starts, places, right=True) - 1
        start = self.starts[document]
        # A BOS begins the document and is no part of its text, unless it is the activated token itself.
        first = torch.maximum(sequence * length, start + (self.begins_with_bos[document] & (places != start)))
        last = torch.minimum((sequence + 1) * length, self.ends[document])
        low = torch.maximum(first, places - self.n_before)
        high = torch.minimum(last, places + 1 + self.n_after)

        needed, index = sequence.unique_consecutive(return_inverse=True)
        joined = _join(self.tokens[needed], self.tokenizer, self.texts, progress)
        shift = (index - sequence) * length  # from places in all sequences to those in the needed ones
        cuts = torch.stack([low, places, places + 1, high]) + shift
        low_end, begin, end, high_end = joined.ends[cuts].tolist()
        before = [joined.text[i:j] for i, j in zip(low_end, begin, strict=True)]
        token = [joined.text[i:j] for i, j in zip(begin, end, strict=True)]
        after = [joined.text[i:j] for i, j in zip(end, high_end, strict=True)]

        # (the token after the passage may be the rest of a character that is no character)
        unsafe = joined.unsafe[torch.minimum(high + 1, last) + shift] > joined.unsafe[low + shift]
        asked = (unsafe | joined.inside[cuts].any(0)).nonzero().squeeze(-1)
        columns = [asked, *(column[asked] for column in (first, last, places))]
        of_each = list(zip(*(column.tolist() for column in columns), strict=True))
        for i, first_place, end_place, place in tqdm(
            of_each, progress, unit="passage", disable=progress is None or not of_each
        ):
            ids = self.tokens.flatten()[first_place:end_place].tolist()
            before[i], token[i], after[i] = self._split(ids, place - first_place)
        rows = row.tolist()
        return Passages(
            [before[i] for i in rows],
            [token[i] for i in rows],
            [after[i] for i in rows],
            document[row].tolist(),
            (places - start)[row].tolist(),
        )

    def _split(self, ids: list[int], at: int) -> tuple[str, str, str]:
        low, high = max(0, at - self.n_before), min(len(ids), at + 1 + self.n_after)

        def text(end: int) -> str:
            return _decode(self.tokenizer, ids[low:end])

        def inside_a_character(
            i: int,
        ) -> bool:  # (four tokens hold a whole one: UTF-8 has at most four bytes)
            return 0 < i < len(ids) and _decode(self.tokenizer, ids[i : i + 4]).startswith("�")

        low = next(i for i in range(low, low - 4, -1) if i == low - 3 or not inside_a_character(i))
        high = next(i for i in range(high, high + 4) if i == high + 3 or not inside_a_character(i))
        # Decoded as a whole, and cut where the first tokens on their own decode to the same beginning:
        # elsewhere the cut would go through a character.
        whole = text(high)

        def length(end: int) -> int | None:
            begin = text(end)
            return len(begin) if whole.startswith(begin) and not begin.endswith("�") else None

        def cut(ends: range) -> int:
            found = (n for n in map(length, ends) if n is not None)
            return next(found, len(text(ends[0])))

        begin = cut(range(at, max(low, at - 3) - 1, -1))
        end = max(begin, cut(range(at + 1, min(high, at + 4) + 1)))
        return whole[:begin], whole[begin:end], whole[end:]


class _Joined(NamedTuple):
    text: str
    """That of all tokens, one after the other."""
    ends: Int[Tensor, " tokens+1"]
    """Where in it each token ends; before them a 0."""
    unsafe: Int[Tensor, " tokens+1"]
    """How many tokens up to there are not known to read like that."""
    inside: Bool[Tensor, " tokens+1"]
    """Whether the token ends within a character."""


def _join(
    tokens: Int[Tensor, "sequence pos"], tokenizer: Any, texts: Mapping[int, str], progress: str | None
) -> _Joined:
    """The text of sequences, put together from those of their tokens where that is what the tokenizer makes of them.

    Neighbours that hold parts of characters are decoded together. To ask the tokenizer for every passage would
    take ten times as long.
    """
    ids, length = tokens.flatten().tolist(), tokens.shape[1]
    pieces = [texts[token_id] for token_id in ids]
    unsafe, inside = torch.zeros(2, len(ids) + 1, dtype=torch.bool)
    starts = range(0, len(ids), length)
    for start in tqdm(starts, progress, unit="sequence", disable=progress is None):
        end = start + length
        whole = _decode(tokenizer, ids[start:end])
        if "".join(pieces[start:end]) == whole:
            continue
        for is_part, group in groupby(range(start, end), lambda i: pieces[i] == "" or "�" in pieces[i]):
            begin, *_, last = [*group] * 2
            text = _decode(tokenizer, ids[begin : last + 1])
            if is_part:
                pieces[begin : last + 1] = [text] + [""] * (last - begin)
                inside[begin + 1 : last + 1] = True
            unsafe[begin + 1 : last + 2] = "�" in text or text != "".join(pieces[begin : last + 1])
        if "".join(pieces[start:end]) != whole:
            unsafe[start + 1 : end + 1] = True
    ends = torch.tensor([0, *accumulate(map(len, pieces))])
    return _Joined("".join(pieces), ends, unsafe.cumsum(0), inside)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Cleaning up would move spaces, and the text before a token would no longer begin the whole text.
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
