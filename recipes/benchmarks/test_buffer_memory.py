"""Peak memory of the shuffled activation buffer, in units of what it is asked to hold.

Measured from outside torch, as the growth of the process's resident memory, in a process of its own for each
buffer: what the allocator keeps counts, as it does for whoever trains. The batch being served and the
activations of the forward that fills the buffer are part of it.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from sae_lens.training.mixing_buffer import mixing_buffer

from routesae_lens.training.buffer import MixingBuffer

BUFFERS = [("ours", 16384), ("ours, bfloat16", 16384), ("SAELens", 16384), ("ours, bfloat16", 32768)]
"""Which, and how many tokens it holds. The last one has as many bytes as the first: beside what a buffer holds it
takes what a forward and a batch need, whatever its size."""
WIDTH = 4608  # 8 layers of 576
FORWARD = (4, 128)  # sequences, tokens
BATCH = 512


def measure(which: str, buffer_size: int) -> float:
    """Peak over nominal while twice the buffer goes through it; to be called in a fresh process."""
    sample = torch.rand(*FORWARD, WIDTH)
    batches = _ours(which, buffer_size, sample) if which != "SAELens" else _saelens(buffer_size, sample)
    before = psutil.Process().memory_info().rss
    for _ in range(2 * buffer_size // BATCH):
        next(batches)
        if isinstance(batches, MixingBuffer):
            batches.consumed()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (peak - before) / (buffer_size * WIDTH * _itemsize(which))


def _ours(which: str, buffer_size: int, sample: torch.Tensor) -> Iterator[Any]:
    dtype = torch.bfloat16 if "bfloat16" in which else None
    return MixingBuffer(_Store(sample), ["stack"], buffer_size=buffer_size, batch_size=BATCH, dtype=dtype)


def _saelens(buffer_size: int, sample: torch.Tensor) -> Iterator[Any]:
    def forwards() -> Iterator[torch.Tensor]:
        while True:
            yield sample.flatten(0, 1).clone()

    return mixing_buffer(buffer_size, BATCH, forwards())


class _Store:
    """As much of SAELens' ActivationsStore as the buffer uses; its forwards cost a copy."""

    device = torch.device("cpu")
    context_size = FORWARD[1]
    store_batch_size_prompts = FORWARD[0]
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: torch.Tensor | None = None

    def __init__(self, sample: torch.Tensor):
        self.sample = sample

    def get_batch_tokens(self, *, raise_at_epoch_end: bool) -> torch.Tensor:
        return torch.zeros(FORWARD, dtype=torch.long)

    def get_multi_hook_activations(self, batch_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"stack": self.sample.clone()}


@pytest.mark.parametrize("which, buffer_size", BUFFERS)
def test_buffer(which: str, buffer_size: int):
    from conftest import QUICK, add_row

    if QUICK:  # not worth a process: what this one took at its most before is counted, too
        buffer_size //= 8
        ratio = measure(which, buffer_size)
    else:
        command = [sys.executable, __file__, which, str(buffer_size)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        ratio = float(answer.stdout.split()[-1])
    add_row(
        group="Memory of the activation buffer",
        name=which,
        unit="nominal size",
        size=f"{buffer_size:,} tokens of {WIDTH:,} numbers, served {BATCH:,} at a time",
        ratios=[ratio],
        goal=None if which == "SAELens" else ("<=", 1.3),
        gigabytes=ratio * buffer_size * WIDTH * _itemsize(which) / 1e9,
    )


def _itemsize(which: str) -> int:
    return 2 if "bfloat16" in which else 4


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2])))
