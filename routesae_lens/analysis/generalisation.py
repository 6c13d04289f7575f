"""Contexts longer than those an SAE was trained on: its metrics by position (Llama Scope, section 4.5.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.evaluate import logits_with_hooks
from routesae_lens.analysis.metrics import Evaluation, Row, Tally
from routesae_lens.analysis.next_tokens import NextTokens
from routesae_lens.analysis.stream import check_context, check_tokens, kept_tokens, read_batches, subjects_of
from routesae_lens.splice.late_logits import Unembedding
from routesae_lens.splice.prefix import SharedPrefix


@dataclass(frozen=True)
class PositionBin:
    """The metrics of one SAE at the positions ``start`` to ``end`` - 1 of the sequences."""

    start: int
    end: int
    evaluation: Evaluation
    """Everything in it is about the tokens at these positions, its mean activations too; losses are those of the
    tokens predicted *from* these positions. The splice is at all positions, so the context of the later ones is
    spliced text, as in use. Nothing is zero-ablated."""


@dataclass(frozen=True)
class PositionProfile:
    """How the metrics of one SAE change along the context."""

    tokens: int
    """Kept tokens in all bins."""
    sequences: int
    length: int
    """Positions in a sequence."""
    training_length: int
    """Context size the SAE was trained with."""
    bins: tuple[PositionBin, ...]

    def rows(self) -> list[Row]:
        """One row of a table for each bin."""
        return [
            {
                "start": one.start,
                "end": one.end,
                "training_lengths": one.end / self.training_length,
                **one.evaluation.row(),
            }
            for one in self.bins
        ]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "length": self.length,
            "training_length": self.training_length,
            "bins": [{"start": one.start, "end": one.end, **one.evaluation.to_dict()} for one in self.bins],
        }


@torch.no_grad()
def evaluate_by_position(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    training_length: int | None = None,
    edges: Sequence[int] | str = "equal",
    batch_size: int = 1,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    scale_by_p: bool = True,
    progress: bool = True,
) -> dict[str, PositionProfile]:
    """Evaluate SAEs by splicing, apart for each range of positions, on one clean pass (Llama Scope, figure 5).

    Args:
        saes: RouteSAEs, Crosscoders (spliced at every layer) and ordinary SAELens SAEs; training SAEs are
            converted to their inference form.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: long sequences, see :func:`long_documents`.
        training_length: the context size that the SAEs were trained with; by default what they say of it.
        edges: "equal": bins of ``training_length`` positions, as in the paper; "doubling": the first
            ``training_length`` positions, then as many as all before; or the edges themselves, ascending: bin i has the
            positions from edges[i] up to, but not with, edges[i + 1].
        batch_size: sequences per forward; one, since they are long. Only random routing depends on it.
        exclude_special_tokens: leave the tokenizer's special tokens (or these ids) out of the splice and all means.
        exclude_first_position: likewise position 0.
        scale_by_p: splice consistently with training; False for the authors' unscaled splice.
        progress: show a progress bar.

    Raises:
        ValueError: sequences longer than the model's context, or without edges not longer than ``training_length``,
            edges that do not ascend or lie outside the sequences, a bin without tokens that count, SAEs that do not
            say what context size they were trained with, or say different ones; or as ``evaluate_all``.
    """
    check_tokens(tokens, model)
    subjects = subjects_of(saes, model)
    trained = _training_length(saes) if training_length is None else training_length
    bins = _bins(edges, trained, tokens.shape[1])
    keep = kept_tokens(tokens, model, exclude_special_tokens, exclude_first_position)
    for start, end in bins:
        if not keep[:, start:end].any():
            raise ValueError(f"every token at positions {start} to {end - 1} is special or at position 0")
    tallies = {name: [Tally(subject) for _ in bins] for name, subject in subjects.items()}
    prefix = SharedPrefix(model, [name for subject in subjects.values() for name in subject.replaces])
    unembedding = Unembedding(model)
    for batch in read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        logits=unembedding,
        prefix=prefix,
        progress="evaluate by position" if progress else None,
    ):
        assert batch.logits is not None
        if len(subjects) > 1:  # (what is compared several times is made once)
            batch.logits.whole()
        clean = NextTokens(batch.logits, batch.tokens, batch.keep, batch.start)
        for name, subject in subjects.items():
            reading = batch.read(subject)
            hooks = subject.splice(reading, batch.keep, scale_by_p)
            compared = clean.compare(logits_with_hooks(model, batch.tokens, prefix, unembedding, hooks))
            for (start, end), tally in zip(bins, tallies[name], strict=True):
                within = _positions(batch.keep, start, end)
                if (batch.keep & within).any():
                    tally.add_reading(reading, batch.keep & within)
                tally.add_spliced(clean, compared, within)
        del batch, clean  # (before the next batch's logits are made)
    return {
        name: PositionProfile(
            tokens=sum(tally.tokens for tally in several),
            sequences=len(tokens),
            length=tokens.shape[1],
            training_length=trained,
            bins=tuple(
                PositionBin(start, end, tally.result(scale_by_p))
                for (start, end), tally in zip(bins, several, strict=True)
            ),
        )
        for name, several in tallies.items()
    }


def _positions(like: Bool[Tensor, "batch pos"], start: int, end: int) -> Bool[Tensor, "batch pos"]:
    within = torch.zeros_like(like)
    within[:, start:end] = True
    return within


def _training_length(saes: Mapping[str, SAE[Any]]) -> int:
    said = {name: sae.cfg.metadata.context_size for name, sae in saes.items()}
    lengths = set(said.values())
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"the context size that the SAEs were trained with must be one and known; they say {said}: give "
            "training_length"
        )
    return int(lengths.pop())


def _bins(edges: Sequence[int] | str, trained: int, length: int) -> list[tuple[int, int]]:
    if trained < 1:
        raise ValueError(f"training_length must be 1 or more, got {trained}")
    if isinstance(edges, str):
        if edges not in ("equal", "doubling"):
            raise ValueError(f"edges must be 'equal', 'doubling' or a list of positions, got {edges!r}")
        if length <= trained:
            raise ValueError(
                f"sequences of {length} tokens are not longer than the training length, {trained}; give longer "
                "ones, or edges of your own"
            )
        ends = [trained]
        while ends[-1] < length:
            ends.append(ends[-1] + (trained if edges == "equal" else ends[-1]))
        ends[-1] = length
        edges = [0, *ends]
    edges = list(edges)
    ascending = all(low < high for low, high in pairwise(edges))
    if len(edges) < 2 or not ascending or edges[0] < 0 or edges[-1] > length:
        raise ValueError(
            f"edges must be two or more ascending positions between 0 and the sequences' length, {length}; got "
            f"{edges}"
        )
    return list(pairwise(edges))


@dataclass(frozen=True)
class LongDocuments:
    """The beginnings of documents that are long enough, one a row."""

    tokens: Int[Tensor, "document pos"] = field(repr=False)
    skipped: int
    """Documents that were shorter."""

    def to_dict(self) -> dict[str, int]:
        """Counts, ready for JSON."""
        return {"documents": len(self.tokens), "length": self.tokens.shape[1], "skipped": self.skipped}


def long_documents(
    model: Any,
    documents: Iterable[str | Sequence[int] | Int[Tensor, " pos"]],
    *,
    length: int,
    n_documents: int | None = None,
) -> LongDocuments:
    """Those documents that have ``length`` tokens or more, cut to that (Llama Scope, 4.5.1). None are joined.

    Args:
        model: its tokenizer reads texts, and its BOS, where it has one, comes first and counts in ``length``.
        documents: texts, or token ids, which stay as they are.
        length: tokens of a row: up to 16 times the training length, say.
        n_documents: stop after so many long ones; by default all are read.

    Raises:
        ValueError: a ``length`` beyond the model's context, texts without a tokenizer, and no document, or fewer
            than ``n_documents``, of that length, or documents that are neither text nor token ids.
    """
    if length < 2:
        raise ValueError(f"length must be 2 or more, got {length}")
    if n_documents is not None and n_documents < 1:
        raise ValueError(f"n_documents must be 1 or more, got {n_documents}")
    check_context(length, model)
    if isinstance(documents, str):
        raise ValueError("expected a list of documents, got one text")
    rows, skipped = [], 0
    for document in documents:
        ids = _read(model, document)
        if len(ids) < length:
            skipped += 1
            continue
        rows.append(ids[:length].long().cpu())
        if len(rows) == n_documents:
            break
    if len(rows) < (n_documents or 1):
        raise ValueError(
            f"{len(rows)} of {len(rows) + skipped} documents have {length} tokens or more; {n_documents or 1} are "
            "asked for"
        )
    tokens = torch.stack(rows)
    check_tokens(tokens, model)
    return LongDocuments(tokens, skipped)


def _read(model: Any, document: Any) -> Int[Tensor, " pos"]:
    if not isinstance(document, str):
        return _ids(document)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give token ids instead of text")
    # verbose=False: a text longer than the tokenizer's model_max_length is what is wanted here
    read = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return torch.tensor(read if bos is None else [bos, *read], dtype=torch.long)


def _ids(document: Any) -> Int[Tensor, " pos"]:
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"expected a text or a row of token ids as a document, got {str(document)[:100]}")
    return ids.long()
