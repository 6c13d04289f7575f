"""Distributions of the next token: how far one forward's are from another's, and what they cost.

A vocabulary is wide: the float32 logits of one batch can be larger than the language model. So a batch's clean
logits stay as the model gave them, and everything is computed in chunks of positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = {"cpu": 2**21, "cuda": 2**26}
"""Logits in a chunk: few enough for the cache of a CPU, many enough to keep a GPU busy."""


def kl_per_token(
    clean: Float[Tensor, "*batch vocab"], spliced: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(clean || spliced) of the next-token distributions given as logits, in nats."""
    return kl_of_log_probs(clean.float().log_softmax(-1), spliced.float().log_softmax(-1))


def kl_of_log_probs(
    clean: Float[Tensor, "*batch vocab"], spliced: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(clean || spliced) of distributions given as log-probabilities, in nats."""
    return (clean.exp() * (clean - spliced)).sum(-1)


class NextTokens:
    """The clean pass of a batch, with which others of the same batch are compared.

    Args:
        logits: of the clean pass, in the model's dtype; not copied.
        tokens: the batch.
        keep: tokens that count.
    """

    def __init__(
        self,
        logits: Float[Tensor, "batch pos vocab"],
        tokens: Int[Tensor, "batch pos"],
        keep: Bool[Tensor, "batch pos"],
    ):
        self.logits, self.tokens, self.keep = logits, tokens, keep
        both = torch.zeros_like(keep)
        both[:, :-1] = keep[:, :-1] & keep[:, 1:]
        self.predicts = both
        """Positions that count and whose next token counts."""
        self._next = tokens.roll(-1, dims=1).flatten()
        self.predicted = int(both.sum())
        """Number of tokens in :meth:`cross_entropy`."""

    @cached_property
    def clean_losses(self) -> Float[Tensor, "batch pos"]:
        """:meth:`losses` of the clean pass."""
        return self.losses(self.logits)

    def kl(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """KL(clean || other) at every position, in nats, float64."""
        return self.compare(logits)[0]

    def cross_entropy(self, logits: Float[Tensor, "batch pos vocab"]) -> float:
        """Next-token cross-entropy in nats, summed where both the token and the predicted one count."""
        return self.losses(logits).sum().item()

    def losses(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """What the token after each position costs, in nats, float64; 0 where it or the position does not count."""
        losses = self._empty(logits)
        for rows, log_probs in self._chunks(logits):
            losses[rows] = self._losses(rows, log_probs)
        return losses.reshape(self.tokens.shape)

    def compare(
        self, logits: Float[Tensor, "batch pos vocab"]
    ) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
        """:meth:`kl` and :meth:`losses` of other logits, in one go."""
        kl, losses, clean_losses = (self._empty(logits) for _ in range(3))
        for (rows, ours), (_, theirs) in zip(self._chunks(self.logits), self._chunks(logits), strict=True):
            losses[rows], clean_losses[rows] = self._losses(rows, theirs), self._losses(rows, ours)
            gap = torch.sub(ours, theirs, out=theirs)
            kl[rows] = torch.einsum("pv,pv->p", ours.exp_(), gap).double()
        self.clean_losses = clean_losses.reshape(self.tokens.shape)  # (known by the way)
        return kl.reshape(self.tokens.shape), losses.reshape(self.tokens.shape)

    def _empty(self, logits: Tensor) -> Float[Tensor, " row"]:
        return torch.empty(self.tokens.numel(), dtype=torch.float64, device=logits.device)

    def _losses(self, rows: slice, log_probs: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        chosen = log_probs.gather(-1, self._next[rows, None]).squeeze(-1).double()
        return (-chosen).where(self.predicts.flatten()[rows], 0.0)

    def _chunks(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the flattened positions, and their log-probabilities in float32, which the next ones overwrite."""
        flat = logits.flatten(0, 1)
        size = max(1, CHUNK.get(logits.device.type, CHUNK["cuda"]) // logits.shape[-1])
        made = torch.empty_like(flat[:size], dtype=torch.float32)  # (memory new to the process costs time)
        for start in range(0, len(flat), size):
            part = flat[start : start + size]
            rows = slice(start, start + len(part))
            yield rows, torch.log_softmax(part, -1, dtype=torch.float32, out=made[: len(part)])
