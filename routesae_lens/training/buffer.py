"""The shuffled stream of activations, in a form that can be saved and continued exactly.

:class:`MixingBuffer` does what SAELens' ``mixing_buffer`` does (a test holds them equal, number for
number). That one is a generator, whose state nobody can save; this one is an object. Of every
activation it remembers where in the text it comes from, so that a checkpoint without the activations
can compute exactly the missing ones again.
"""

from __future__ import annotations

import threading
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.training.rows import NotFinite, Rows, RowStorage, capacity_for, forward_rows


@runtime_checkable
class TokenStore(Protocol):
    """What is used of SAELens' ``ActivationsStore`` (all of it public)."""

    device: torch.device
    context_size: int
    store_batch_size_prompts: int
    seqpos_slice: tuple[int | None, ...]
    exclude_special_tokens: Tensor | None

    def get_batch_tokens(self, *, raise_at_epoch_end: bool) -> Tensor: ...
    def get_multi_hook_activations(self, batch_tokens: Tensor) -> dict[str, Tensor]: ...


@runtime_checkable
class SavedStream(Protocol):
    """What the end of a step asks of the data: that it can be saved between two batches."""

    def consumed(self) -> None:
        """The oldest batch that was given out has been used: it no longer belongs to the state."""
        ...

    def state_dict(self, *, activations: bool = True) -> dict[str, Tensor]: ...


class TextPosition(NamedTuple):
    """How far the text was read. Every epoch reads the same token batches in the same order."""

    epoch: int = 0
    batch: int = 0
    """Token batches read in this epoch."""
    checksum: int = 0
    """CRC-32 of these token batches, to tell whether a resumed run is given the same text."""


class ActivationsNotFinite(FloatingPointError):
    """NaN or infinity at a hook."""

    def __init__(self, message: str, hook: str):
        super().__init__(message)
        self.hook = hook


class MixingBuffer(Iterator[dict[str, Tensor]]):
    """Endless batches of activations ``{hook name: (batch_size, d_in)}``, shuffled over ``buffer_size`` tokens.

    Drop-in for ``store.get_multi_hook_data_loader()``. Safe under SAELens' ``PrefetchingIterator``: batches
    given out and not yet reported by :meth:`consumed` belong to the state. Activations are stored once, in a
    tensor that is allocated once (:class:`RowStorage`): where SAELens concatenates and permutes copies of the
    whole buffer, here the numbers of the rows are permuted.

    Args:
        store: SAELens' activation store, at the start of its data.
        hook_names: hooks to read, in the order they are packed.
        buffer_size: tokens that are shuffled together.
        batch_size: tokens per batch.
        mix_fraction: part of the buffer that stays for the next round; 0 turns shuffling off.
        seed: of the shuffling.
        dtype: in which activations are stored and given out; by default that of the model's activations.
        output_device: where batches are given out; by default where the buffer is.
        read_ahead: read new text as soon as there is room for it, not only when the buffer must be filled up:
            behind a prefetcher, the language model then runs all the time. The batches are the same.

    Raises:
        ValueError: a buffer smaller than a batch, or a fraction outside [0, 1].
    """

    def __init__(
        self,
        store: TokenStore,
        hook_names: Sequence[str],
        *,
        buffer_size: int,
        batch_size: int,
        mix_fraction: float = 0.5,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        output_device: torch.device | None = None,
        read_ahead: bool = False,
    ):
        if buffer_size < batch_size:
            raise ValueError(
                f"the buffer ({buffer_size} tokens) must hold at least one batch ({batch_size} tokens)"
            )
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"mix_fraction must be between 0 and 1, got {mix_fraction}")
        self.store, self.hook_names = store, list(hook_names)
        self.buffer_size, self.batch_size, self.mix_fraction = buffer_size, batch_size, mix_fraction
        self.dtype, self.output_device, self.read_ahead = dtype, output_device, read_ahead
        self.position = TextPosition()
        self._generator = torch.Generator().manual_seed(seed)
        self._storage: RowStorage | None = None
        self._order = torch.zeros(0, dtype=torch.long)  # slots of rows not yet served, in serving order
        self._fresh: list[Tensor] = []  # slots of rows that are not yet mixed, one tensor per forward
        self._left = 0  # batches to serve before what is left is mixed with new activations
        self._pending: deque[Rows] = deque()
        self._lock = threading.Lock()

    def __iter__(self) -> MixingBuffer:
        return self

    @torch.no_grad()
    def __next__(self) -> dict[str, Tensor]:
        with self._lock:
            if self._left == 0:
                self._refill()
            elif self.read_ahead:
                self._read_ahead()
            assert self._storage is not None
            rows = self._storage.take(self._order[: self.batch_size], self.output_device)
            self._order = self._order[self.batch_size :]
            self._left -= 1
            self._pending.append(rows)
            widths = self._storage.widths
        return dict(zip(widths, rows.acts.split(list(widths.values()), dim=1), strict=True))

    def consumed(self) -> None:
        """Report that the oldest batch given out was trained on: it leaves the state."""
        self._pending.popleft()

    def _lacks(self, kept: int) -> bool:
        """Whether another forward must be read before ``kept`` rows are mixed with the new ones."""
        return not self._fresh or kept + sum(map(len, self._fresh)) < self.buffer_size

    def _refill(self) -> None:
        while self._lacks(len(self._order)):
            self._read()
        order = torch.cat([self._order, *self._fresh])
        count, self._fresh = len(order), []
        self._order = order[torch.randperm(count, generator=self._generator)] if self.mix_fraction else order
        keep = int(self.buffer_size * self.mix_fraction)
        self._left = max(1, (count - keep) // self.batch_size)

    def _read_ahead(self) -> None:
        kept = len(self._order) - self._left * self.batch_size
        while (
            self._lacks(kept) and self._storage is not None and len(self._storage.free) >= self._forward_rows
        ):
            self._read()

    @property
    def _forward_rows(self) -> int:
        store = self.store
        return forward_rows(store.store_batch_size_prompts, store.context_size, store.seqpos_slice)

    def _read(self) -> None:
        """Store the activations of the next token batch, from the next epoch where the data is at its end."""
        try:
            tokens = self.store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            if self.position.batch == 0:
                raise ValueError(
                    f"the data does not fill one forward of {self.store.store_batch_size_prompts} sequences of "
                    f"{self.store.context_size} tokens"
                ) from None
            self.position = TextPosition(self.position.epoch + 1)
            warnings.warn(f"end of the data; epoch {self.position.epoch + 1} begins", stacklevel=2)
            return self._read()
        kept = self._kept(tokens)
        epoch, batch, checksum = self.position
        storage = self._write(tokens, batch, kept)
        slots, storage.free = storage.free[: len(kept)], storage.free[len(kept) :]
        storage.origin[slots] = torch.stack([torch.full((len(kept),), batch), torch.arange(len(kept))], dim=1)
        self._fresh.append(slots)
        self.position = TextPosition(epoch, batch + 1, _checksum(tokens, checksum))

    def _kept(self, tokens: Int[Tensor, "sequence pos"]) -> Int[Tensor, "row 2"]:
        """Sequence and position (among those that are read) of the tokens that are trained on."""
        ids, excluded = tokens[:, slice(*self.store.seqpos_slice)], self.store.exclude_special_tokens
        keep = torch.ones_like(ids, dtype=torch.bool)
        if excluded is not None:
            keep = ~torch.isin(ids, excluded.to(ids.device))
        return keep.nonzero()

    def _write(
        self,
        tokens: Int[Tensor, "sequence pos"],
        batch: int,
        kept: Int[Tensor, "row 2"],
        slots: Tensor | None = None,
        n_slots: int = 0,
    ) -> RowStorage:
        """Store the activations of the ``kept`` tokens of one forward, in the first free slots or in ``slots`` of
        ``n_slots`` or more.

        Raises:
            ActivationsNotFinite: naming the hook and the token batch.
        """
        by_hook = self.store.get_multi_hook_activations(tokens)
        read = {hook: by_hook[hook] for hook in self.hook_names}
        if self._storage is None:
            widths = {hook: acts.shape[-1] for hook, acts in read.items()}
            dtypes = [acts.dtype for acts in read.values()]
            self._storage = self._allocate(widths, self.dtype or reduce(torch.promote_types, dtypes), n_slots)
        try:
            self._storage.write(self._storage.free[: len(kept)] if slots is None else slots, read, kept)
        except NotFinite as error:
            raise ActivationsNotFinite(
                f"activations at {error.hook} are NaN or infinite for {error.bad} of {len(kept)} tokens, in token "
                f"batch {batch} of epoch {self.position.epoch + 1}",
                error.hook,
            ) from None
        return self._storage

    def _allocate(self, widths: dict[str, int], dtype: torch.dtype, at_least: int = 0) -> RowStorage:
        capacity = capacity_for(self.buffer_size, self.batch_size, self._forward_rows, self.mix_fraction)
        return RowStorage(max(capacity, at_least), widths, dtype, self.store.device)

    def state_dict(self, *, activations: bool = True) -> dict[str, Tensor]:
        """Everything that a run needs to go on from the batches consumed so far.

        Args:
            activations: with the buffer's activations, where it is on the CPU as a view of it: write them
                before the next batch is drawn. Without them :meth:`load_state_dict` computes exactly these
                again from the text (16 bytes a token stay).
        """
        with self._lock:
            fresh = torch.cat(self._fresh) if self._fresh else self._order[:0]
            state = {
                "position": torch.tensor(self.position, dtype=torch.long),
                "generator": self._generator.get_state(),
                "left": torch.tensor(len(self._pending) + self._left),
                "fresh": torch.tensor([len(fresh), len(self._fresh)]),  # rows and forwards
            }
            if self._storage is None:
                return state
            storage, pending = self._storage, [*self._pending]
            order = storage.compact(torch.cat([self._order, fresh]))
            self._order = order[: len(self._order)]
            self._fresh = list(order[len(self._order) :].split([len(part) for part in self._fresh]))
            state["widths"] = torch.tensor(list(storage.widths.values()))
            state["origin"] = torch.cat([*(rows.origin for rows in pending), storage.origin[order]])
            if activations:
                state["acts"], state["order"] = storage.acts[: len(order)].cpu(), order
                if pending:
                    state["pending"] = torch.cat([rows.acts.cpu() for rows in pending])
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], *, progress: bool = True) -> None:
        """Continue from ``state``: skip the text already read, with a bar; no language model runs for that.

        Raises:
            ValueError: the data is shorter than what the checkpoint has read, or another text.
        """
        position = TextPosition(*state["position"].tolist())
        self._generator.set_state(state["generator"])
        self._left, self._pending, self._storage = int(state["left"]), deque(), None
        wanted = state["origin"] if "origin" in state and "acts" not in state else None
        self._replay(position, wanted, progress)
        self.position = position
        if "origin" not in state:
            return
        n = len(state["origin"])
        if "acts" in state:
            self._restore(state, n)
        assert self._storage is not None
        self._storage.origin[:n] = state["origin"]
        self._storage.free = torch.arange(n, len(self._storage))
        n_fresh, forwards = state["fresh"].tolist() if "fresh" in state else (0, 0)
        self._order, fresh = torch.arange(n).split([n - n_fresh, n_fresh])
        self._fresh = [fresh] if forwards else []

    def _restore(self, state: dict[str, Tensor], n: int) -> None:
        """Storage with the activations of ``state`` in serving order."""
        acts = state["acts"]
        widths = dict(zip(self.hook_names, state["widths"].tolist(), strict=True))
        self._storage = self._allocate(widths, acts.dtype, n)
        ahead = n - len(acts)
        if ahead:
            self._storage.acts[:ahead] = state["pending"].to(self._storage.acts.device)
        slots = state.get("order", torch.arange(len(acts)))  # (checkpoints of older versions are in order)
        for index, part in zip(slots.split(1024), self._storage.acts[ahead:n].split(1024), strict=True):
            part.copy_(acts[index])

    def _replay(self, position: TextPosition, wanted: Tensor | None, progress: bool) -> None:
        """Bring the store to ``position``; on the way, compute the activations of the ``wanted`` origins, into
        the first slots."""
        needed = set() if wanted is None else set(wanted[:, 0].tolist())
        checksum = 0
        n_read = max([position.batch, *(batch + 1 for batch in needed)])
        bar = tqdm(
            range(n_read), desc="skipping to the checkpoint", unit="batch", disable=not progress, leave=False
        )
        for batch in bar:
            tokens = self._replayed_tokens(batch, position)
            if batch < position.batch:
                checksum = _checksum(tokens, checksum)
            if wanted is not None and batch in needed:
                rows = (wanted[:, 0] == batch).nonzero().squeeze(1)
                kept = self._kept(tokens)
                self._write(tokens, batch, kept[wanted[rows, 1].to(kept.device)], rows, len(wanted))
        if checksum != position.checksum:
            raise ValueError("the data is not the text that the checkpoint was trained on")
        if n_read > position.batch:  # the buffer held tokens from further on in the epoch before
            self._finish_epoch()
            for batch in range(position.batch):
                self._replayed_tokens(batch, position)

    def _replayed_tokens(self, batch: int, position: TextPosition) -> Tensor:
        try:
            return self.store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            raise ValueError(
                f"the data ends after {batch} token batches, but the checkpoint has read more "
                f"({position.batch} in epoch {position.epoch + 1}): is it the same data?"
            ) from None

    def _finish_epoch(self) -> None:
        while True:
            try:
                self.store.get_batch_tokens(raise_at_epoch_end=True)
            except StopIteration:
                return


def _checksum(tokens: Tensor, start: int) -> int:
    return zlib.crc32(tokens.cpu().numpy().tobytes(), start)


class TrainingBatches(Iterator[dict[str, Tensor]]):
    """What the trainer draws from: reports to the buffer what was used, and can be paused for an evaluation.

    Args:
        source: the buffer itself, or SAELens' PrefetchingIterator around it.
        buffer: the buffer.
    """

    def __init__(self, source: Iterator[dict[str, Tensor]], buffer: SavedStream):
        self.source, self.buffer = source, buffer
        self._paused = False

    def __next__(self) -> dict[str, Tensor]:
        if self._paused:
            raise RuntimeError(
                "an evaluator must not draw from the training data (the run would skip that text, and a paused "
                "prefetcher would block); give it tokens of its own"
            )
        batch = next(self.source)
        self.buffer.consumed()
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No batch is produced or drawn inside; may be nested."""
        if self._paused:
            yield
            return
        pause: Any = getattr(self.source, "paused", nullcontext)
        with ExitStack() as stack:
            held: AbstractContextManager[None] = pause()
            stack.enter_context(held)
            self._paused = True
            try:
                yield
            finally:
                self._paused = False
