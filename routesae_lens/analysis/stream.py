"""Held-out text through the language model once, and every SAE's reading of it.

What evaluation, feature collection and the analysis of routing share: which tokens count, one clean
forward per batch for all SAEs, and checks before the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from sae_lens import SAE
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name, get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.subjects import Reading, Subject, subject_of
from routesae_lens.backends import backend_of
from routesae_lens.splice.late_logits import Logits, Unembedding
from routesae_lens.splice.prefix import SharedPrefix


@dataclass
class Batch:
    """One clean forward over some sequences."""

    index: int
    """Number of the batch; random routing draws anew for each."""
    start: int
    """Its first sequence, a row of ``tokens``."""
    tokens: Int[Tensor, "batch pos"]
    keep: Bool[Tensor, "batch pos"]
    """Tokens that count: neither special nor at position 0."""
    activations: Any
    """What each hook point gave, by its name."""
    logits: Logits | None

    def read(self, subject: Subject) -> Reading:
        return subject.read(self.activations[subject.point], self.index)


def subjects_of(saes: Mapping[str, SAE[Any]], model: Any) -> dict[str, Subject]:
    """The SAEs ready to read this model; their multi-layer points are mounted.

    Raises:
        ValueError: no SAEs, not a mapping of them, or one that does not fit the model or is not finite.
    """
    if not isinstance(saes, Mapping):
        raise ValueError(f'expected SAEs by name, such as {{"mine": sae}}; got {type(saes).__name__}')
    if not saes:
        raise ValueError("no SAEs given")
    if attached := sorted(getattr(model, "acts_to_saes", {})):
        raise ValueError(f"SAEs are attached to the model at {attached}; call model.reset_saes() first")
    return {name: subject_of(sae, model) for name, sae in saes.items()}


@torch.no_grad()
def read_batches(
    subjects: Mapping[str, Subject],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    logits: bool | Unembedding = False,
    prefix: SharedPrefix | None = None,
    progress: str | None = None,
) -> Iterator[Batch]:
    """One clean forward per batch, shared by all subjects.

    Args:
        subjects: from :func:`subjects_of`.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: token ids, see ``held_out_tokens``.
        batch_size: sequences per forward.
        exclude_special_tokens: the tokenizer's special tokens (or these ids) do not count.
        exclude_first_position: nor does position 0, whose norm is ~100 times the median.
        logits: also compute logits (with this unembedding); otherwise the forward stops after the last layer
            that is read.
        prefix: records what the blocks below the first changed hook give, so that more forwards of a batch
            can skip them until the next batch is asked for.
        progress: caption of the progress bar, none without.

    Raises:
        ValueError: ``tokens`` are not ids of this model, or none of them counts; at once, not on the first
            iteration.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    check_tokens(tokens, model)
    keep = kept_tokens(tokens, model, exclude_special_tokens, exclude_first_position)
    if not keep.any():
        raise ValueError("every token is special or at position 0: nothing to read")
    points = sorted({subject.point for subject in subjects.values()})
    return _batches(points, model, tokens, keep, batch_size, logits, prefix, progress)


@torch.no_grad()
def _batches(
    points: list[str],
    model: Any,
    tokens: Tensor,
    keep: Tensor,
    batch_size: int,
    logits: bool | Unembedding,
    prefix: SharedPrefix | None,
    progress: str | None,
) -> Iterator[Batch]:
    device = next(model.parameters()).device
    unembedding = Unembedding(model) if logits is True else logits or None
    stop = {} if logits else _stop(points)
    activations: dict[str, Tensor] = {}

    def forward(batch: Tensor) -> Any:
        nonlocal activations
        with nullcontext() if prefix is None else prefix.recorded():
            out, activations = model.run_with_cache(batch, names_filter=points, **stop)
        return out

    starts = range(0, len(tokens), batch_size)
    for index, start in enumerate(tqdm(starts, desc=progress, unit="batch", disable=progress is None)):
        batch = tokens[start : start + batch_size].to(device)
        kept = keep[start : start + batch_size].to(device)
        if unembedding is None:
            forward(batch)
            yield Batch(index, start, batch, kept, activations, None)
        else:
            made = Batch(index, start, batch, kept, None, unembedding.logits(partial(forward, batch)))
            made.activations = activations
            yield made
            del made  # (whole logits are large)


def _stop(points: list[str]) -> dict[str, int]:
    stops = [extract_stop_at_layer_from_tlens_hook_name(point) for point in points]
    return {} if None in stops else {"stop_at_layer": max(stop for stop in stops if stop is not None)}


def kept_tokens(
    tokens: Int[Tensor, "sequence pos"],
    model: Any,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
) -> Bool[Tensor, "sequence pos"]:
    """Which tokens are encoded and counted: not special, not at position 0."""
    keep = ~torch.isin(tokens, _special_ids(tokens, model, exclude_special_tokens))
    if exclude_first_position:
        keep[:, 0] = False
    return keep


def check_tokens(tokens: Tensor, model: Any) -> None:
    """Raise a ValueError unless ``tokens`` are ids this model can read, (sequence, pos)."""
    backend_of(model)
    if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool:
        raise ValueError(
            f"expected a tensor of token ids, got {getattr(tokens, 'dtype', type(tokens).__name__)}"
        )
    if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape or tokens.shape[1] < 2:
        raise ValueError(
            "expected token ids of shape (sequence, pos) with at least 2 positions, got "
            f"{tuple(tokens.shape)} of {tokens.dtype}"
        )
    cfg = getattr(model, "cfg", None) or model.model.config
    vocabulary = getattr(cfg, "d_vocab", None) or cfg.vocab_size
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise ValueError(
            f"token ids must be between 0 and {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )
    check_context(tokens.shape[1], model)


def check_context(length: int, model: Any) -> None:
    """Raise a ValueError if the model cannot read sequences of ``length`` tokens."""
    cfg = getattr(model, "cfg", None) or model.model.config
    context = getattr(cfg, "n_ctx", None) or cfg.max_position_embeddings
    if length > context:
        raise ValueError(f"sequences of {length} tokens exceed the model's context of {context}")


def _special_ids(tokens: Tensor, model: Any, exclude: bool | list[int]) -> Tensor:
    if exclude is False:
        ids: list[int] = []
    elif exclude is True:
        tokenizer = getattr(model, "tokenizer", None)
        ids = get_special_token_ids(tokenizer) if tokenizer is not None else []
    elif isinstance(exclude, list):
        ids = exclude
    else:
        raise ValueError(
            f"exclude_special_tokens must be True, False or a list of token ids, got {exclude!r}"
        )
    return torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)
