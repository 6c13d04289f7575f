"""Dictionaries whose rows are made of known meta-directions, for the tests of meta-SAEs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

N, M, D = 1500, 24, 32


def planted(seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """An SAE of N latents whose rows are sums of 1 to 3 of M directions, with weights of 0.5 to 1.5, at any scale.

    Also the directions (M, D) of norm 1, and which of them each row has (N, M).
    """
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(M, D, generator=generator), dim=-1)
    n_parts = torch.randint(1, 4, (N, 1), generator=generator)
    has = torch.rand(N, M, generator=generator).argsort(-1).argsort(-1) < n_parts
    weights = (0.5 + torch.rand(N, M, generator=generator)) * has
    scale = 0.1 + 3 * torch.rand(N, 1, generator=generator)
    return SimpleNamespace(W_dec=scale * (weights @ directions)), directions, has
