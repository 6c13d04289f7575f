"""Rows of activations in one tensor that is allocated once, so that a shuffled buffer needs no second copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BUFFER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""In which activations can be stored. float16 ends at 65,504, which the norms of first tokens may exceed."""

CHUNK_BYTES = 2**24
"""Rows are moved in pieces of this size, the only memory taken beside the storage."""


class Rows(NamedTuple):
    """Activations of some tokens, all hooks side by side, and where they come from."""

    acts: Float[Tensor, "row width"]
    origin: Int[Tensor, "row 2"]
    """Number of the token batch within the epoch, and of the kept token within that batch."""


class NotFinite(FloatingPointError):
    """NaN or infinity among the rows of one hook."""

    def __init__(self, hook: str, bad: int):
        super().__init__(hook)
        self.hook, self.bad = hook, bad


class RowStorage:
    """``capacity`` slots for rows. What a slot holds stays where it is: shuffling permutes slot numbers.

    Args:
        capacity: number of slots.
        widths: of the rows' parts, by hook.
        dtype: in which they are stored.
        device: where.
    """

    def __init__(
        self, capacity: int, widths: Mapping[str, int], dtype: torch.dtype, device: torch.device | str
    ):
        self.widths = dict(widths)
        self.acts = torch.empty(capacity, sum(self.widths.values()), dtype=dtype, device=device)
        self.origin = torch.zeros(capacity, 2, dtype=torch.long)
        self.free = torch.arange(capacity)
        """Slots that hold nothing."""

    def __len__(self) -> int:
        """Number of slots."""
        return len(self.acts)

    @torch.no_grad()
    def write(
        self,
        slots: Int[Tensor, " row"],
        by_hook: Mapping[str, Float[Tensor, "sequence pos _"]],
        kept: Int[Tensor, "row 2"],
    ) -> None:
        """Put the activations of the tokens ``kept`` (sequence, position) into ``slots``; a second copy is
        never made.

        Raises:
            NotFinite: a value is NaN or infinite (also, only after conversion to the storage's dtype).
        """
        start = 0
        for hook, width in self.widths.items():
            acts = by_hook[hook]
            sequence, position = kept.to(acts.device).unbind(dim=1)
            target = self.acts[:, start : start + width]
            start += width
            sums = []
            for piece in self._pieces(len(kept), width):
                rows = acts[sequence[piece], position[piece]].to(self.acts.device, self.acts.dtype)
                target.index_copy_(0, slots[piece].to(self.acts.device), rows)
                # A sum is NaN or infinite where a value is, and needs no memory.
                sums.append(rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)))
            if sums and not torch.isfinite(torch.stack(sums)).all():
                stored = (
                    target[slots[piece].to(self.acts.device)] for piece in self._pieces(len(kept), width)
                )
                bad = sum(int((~torch.isfinite(rows)).any(dim=1).sum()) for rows in stored)
                if bad:  # (finite values may have an infinite sum)
                    raise NotFinite(hook, bad)

    def take(self, slots: Int[Tensor, " row"], device: torch.device | None = None) -> Rows:
        """The rows in ``slots``, which become free; on ``device``, copied there while the caller goes on."""
        acts = self.read(slots, device)
        self.free = torch.cat([self.free, slots])
        return Rows(acts, self.origin[slots])

    def read(
        self, slots: Int[Tensor, " row"], device: torch.device | None = None
    ) -> Float[Tensor, "row width"]:
        index = slots.to(self.acts.device)
        if device is None or device == self.acts.device:
            return self.acts.index_select(0, index)
        # Only from pinned memory can a GPU fetch without the CPU's help. (PyTorch caches pinned blocks, and
        # gives none out again before the copies from it are done.)
        pin = device.type == "cuda" and self.acts.device.type == "cpu"
        rows = torch.empty(
            len(slots), self.acts.shape[1], dtype=self.acts.dtype, device=self.acts.device, pin_memory=pin
        )
        torch.index_select(self.acts, 0, index, out=rows)
        return rows.to(device, non_blocking=pin)

    @torch.no_grad()
    def compact(self, live: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
        """Move the rows in the slots ``live``, all that are not free, to the first slots; their new slots."""
        n = len(live)
        low = torch.zeros(len(self), dtype=torch.bool)
        low[live] = True
        holes = (~low[:n]).nonzero().squeeze(1)
        moving = live >= n
        for piece in self._pieces(len(holes), self.acts.shape[1]):
            target, source = holes[piece], live[moving][piece]
            self.acts.index_copy_(0, target.to(self.acts.device), self.read(source))
            self.origin[target] = self.origin[source]
        live = live.clone()
        live[moving] = holes
        self.free = torch.arange(n, len(self))
        return live

    def _pieces(self, n_rows: int, width: int) -> Iterator[slice]:
        size = max(1, CHUNK_BYTES // (width * self.acts.element_size()))
        for start in range(0, n_rows, size):
            yield slice(start, min(start + size, n_rows))


def capacity_for(buffer_size: int, batch_size: int, forward_rows: int, mix_fraction: float) -> int:
    """The most rows that a buffer holds at once: it is filled by whole forwards until ``buffer_size`` are there,
    and up to one batch more than the part that it keeps may be left from the round before."""
    kept = int(buffer_size * mix_fraction)
    return max(buffer_size, kept + batch_size) + forward_rows - 1


def forward_rows(prompts: int, context_size: int, seqpos_slice: Sequence[int | None]) -> int:
    """Tokens that one forward of the language model gives at most."""
    return prompts * len(range(context_size)[slice(*seqpos_slice)])
