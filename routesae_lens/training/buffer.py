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
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm


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


class Rows(NamedTuple):
    """Activations of some tokens, all hooks side by side, and where they come from."""

    acts: Float[Tensor, "row width"]
    origin: Int[Tensor, "row 2"]
    """Number of the token batch within the epoch, and of the kept token within that batch."""

    def select(self, index: Tensor) -> Rows:
        return Rows(self.acts[index.to(self.acts.device)], self.origin[index])


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
    given out and not yet reported by :meth:`consumed` belong to the state.

    Args:
        store: SAELens' activation store, at the start of its data.
        hook_names: hooks to read, in the order they are packed.
        buffer_size: tokens that are shuffled together.
        batch_size: tokens per batch.
        mix_fraction: part of the buffer that stays for the next round; 0 turns shuffling off.
        seed: of the shuffling.

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
    ):
        if buffer_size < batch_size:
            raise ValueError(
                f"the buffer ({buffer_size} tokens) must hold at least one batch ({batch_size} tokens)"
            )
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"mix_fraction must be between 0 and 1, got {mix_fraction}")
        self.store, self.hook_names = store, list(hook_names)
        self.buffer_size, self.batch_size, self.mix_fraction = buffer_size, batch_size, mix_fraction
        self.position = TextPosition()
        self._widths: list[int] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Rows | None = None
        self._order = torch.zeros(0, dtype=torch.long)  # rows not yet served, in serving order
        self._left = 0  # batches to serve before new activations are read
        self._pending: deque[Rows] = deque()
        self._lock = threading.Lock()

    def __iter__(self) -> MixingBuffer:
        return self

    @torch.no_grad()
    def __next__(self) -> dict[str, Tensor]:
        with self._lock:
            if self._left == 0:
                self._refill()
            assert self._rows is not None
            rows = self._rows.select(self._order[: self.batch_size])
            self._order = self._order[self.batch_size :]
            self._left -= 1
            self._pending.append(rows)
        return dict(zip(self.hook_names, rows.acts.split(self._widths, dim=1), strict=True))

    def consumed(self) -> None:
        """Report that the oldest batch given out was trained on: it leaves the state."""
        self._pending.popleft()

    def _refill(self) -> None:
        parts = [] if self._rows is None else [self._rows.select(self._order)]
        count = len(self._order)
        self._rows = None  # frees what was served
        while True:
            parts.append(self._read())
            count += len(parts[-1].origin)
            if count >= self.buffer_size:
                break
        self._rows = Rows(torch.cat([p.acts for p in parts]), torch.cat([p.origin for p in parts]))
        self._order = (
            torch.randperm(count, generator=self._generator) if self.mix_fraction else torch.arange(count)
        )
        keep = int(self.buffer_size * self.mix_fraction)
        self._left = max(1, (count - keep) // self.batch_size)

    def _read(self) -> Rows:
        """Activations of the next token batch, from the next epoch where the data is at its end."""
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
        acts = self._activations(tokens, self.position.batch)
        origin = torch.stack([torch.full((len(acts),), self.position.batch), torch.arange(len(acts))], dim=1)
        epoch, batch, checksum = self.position
        self.position = TextPosition(epoch, batch + 1, _checksum(tokens, checksum))
        return Rows(acts, origin)

    def _activations(self, tokens: Int[Tensor, "sequence pos"], batch: int) -> Float[Tensor, "row width"]:
        """Activations of the kept tokens of one forward, all hooks side by side.

        Raises:
            ActivationsNotFinite: naming the hook and the token batch.
        """
        store = self.store
        by_hook = store.get_multi_hook_activations(tokens)
        ids = tokens[:, slice(*store.seqpos_slice)].reshape(-1).to(store.device)
        excluded = store.exclude_special_tokens
        keep = slice(None) if excluded is None else ~torch.isin(ids, excluded)
        parts = []
        for hook in self.hook_names:
            acts = by_hook[hook].to(store.device).flatten(0, 1)[keep]
            if not torch.isfinite(acts).all():
                bad = int((~torch.isfinite(acts)).any(dim=1).sum())
                raise ActivationsNotFinite(
                    f"activations at {hook} are NaN or infinite for {bad} of {len(acts)} tokens, in token batch "
                    f"{batch} of epoch {self.position.epoch + 1}",
                    hook,
                )
            parts.append(acts)
        self._widths = [part.shape[1] for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def state_dict(self, *, activations: bool = True) -> dict[str, Tensor]:
        """Everything that a run needs to go on from the batches consumed so far.

        Args:
            activations: with the buffer's activations; without them :meth:`load_state_dict` computes
                exactly these again from the text (16 bytes a token stay).
        """
        with self._lock:
            parts = [*self._pending]
            if self._rows is not None:
                parts.append(self._rows.select(self._order))
            state = {
                "position": torch.tensor(self.position, dtype=torch.long),
                "generator": self._generator.get_state(),
                "left": torch.tensor(len(self._pending) + self._left),
            }
            if parts:
                state["origin"] = torch.cat([part.origin for part in parts])
                state["widths"] = torch.tensor(self._widths)
            if parts and activations:
                state["acts"] = torch.cat([part.acts for part in parts]).cpu()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor], *, progress: bool = True) -> None:
        """Continue from ``state``: skip the text already read, with a bar; no language model runs for that.

        Raises:
            ValueError: the data is shorter than what the checkpoint has read, or another text.
        """
        position = TextPosition(*state["position"].tolist())
        self._generator.set_state(state["generator"])
        self._left, self._pending = int(state["left"]), deque()
        wanted = state["origin"] if "origin" in state and "acts" not in state else None
        acts = self._replay(position, wanted, progress)
        self.position = position
        if "origin" in state:
            self._widths = state["widths"].tolist()
            acts = state["acts"].to(self.store.device) if acts is None else acts
            self._rows = Rows(acts, state["origin"])
            self._order = torch.arange(len(acts))

    def _replay(self, position: TextPosition, wanted: Tensor | None, progress: bool) -> Tensor | None:
        """Bring the store to ``position``; on the way, compute the activations of the ``wanted`` origins."""
        needed = set() if wanted is None else set(wanted[:, 0].tolist())
        acts: Tensor | None = None
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
                computed = self._activations(tokens, batch)
                if acts is None:
                    acts = computed.new_empty(len(wanted), computed.shape[1])
                acts[rows.to(acts.device)] = computed[wanted[rows, 1].to(acts.device)]
        if checksum != position.checksum:
            raise ValueError("the data is not the text that the checkpoint was trained on")
        if n_read > position.batch:  # the buffer held tokens from further on in the epoch before
            self._finish_epoch()
            for batch in range(position.batch):
                self._replayed_tokens(batch, position)
        return acts

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

    def __init__(self, source: Iterator[dict[str, Tensor]], buffer: MixingBuffer):
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
