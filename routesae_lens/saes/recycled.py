"""Memory of large gradients that serves again in the next step.

A step's gradients are freed when the optimiser has used them, and the C library gives blocks of their size back to the
system: the next step gets its own page by page, which takes longer than to fill them. So the last ones stay here.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**20
"""Bytes; the C library keeps smaller blocks by itself."""

_free: deque[np.ndarray] = deque(maxlen=2)  # an SAE has two large gradients, W_enc's and W_dec's


def empty(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(*shape)``, on a CPU in memory that an earlier one of that size has left, if there is any.

    The result cannot be resized.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < SMALLEST:
        return like.new_empty(*shape)
    block = _taken(size)
    view = block[:]  # held by every tensor on the memory; when the last one goes, the block is free
    weakref.finalize(view, _free.append, block).atexit = False
    return torch.from_numpy(view).view(like.dtype).view(*shape)


def _taken(size: int) -> np.ndarray:
    for _ in range(len(_free)):
        try:
            block = _free.popleft()  # (never the same one in two threads)
        except IndexError:
            break
        if block.nbytes == size:
            return block
        _free.append(block)
    forget()  # another SAE's: both at once would be more memory than a step needs
    return np.empty(size, np.uint8)


def forget() -> None:
    """Give the memory back that is kept for the next step."""
    _free.clear()


def kept_bytes() -> int:
    """Memory that is kept for the next step."""
    return sum(block.nbytes for block in _free)
