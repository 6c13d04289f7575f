"""Distributions of the next token: how far one forward's are from another's, and what they cost.

A vocabulary is wide: the float32 logits of one batch can be larger than the language model. So a batch's clean
logits stay as the model gave them, and everything is computed in chunks of positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 2**24
"""Logits in a chunk: 64 MiB in float32."""


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
        self.log_z = self._flat(logits.new_empty(tokens.shape, dtype=torch.float32))
        for rows, chunk in self._chunks(logits):
            self.log_z[rows] = chunk.logsumexp(-1)
        both = torch.zeros_like(keep)
        both[:, :-1] = keep[:, :-1] & keep[:, 1:]
        self._predicts = self._flat(both)
        """Positions that count and whose next token counts."""
        self._next = self._flat(tokens.roll(-1, dims=1))
        self.predicted = int(both.sum())
        """Number of tokens in :meth:`cross_entropy`."""

    def kl(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, "batch pos"]:
        """KL(clean || other) at every position, in nats, float64."""
        return self.compare(logits)[0]

    def cross_entropy(self, logits: Float[Tensor, "batch pos vocab"] | None = None) -> float:
        """Next-token cross-entropy of other logits (of the clean ones by default), summed, in nats.

        Summed where both the token and the predicted one count.
        """
        if logits is None:
            return self._cross_entropy(self.logits, self.log_z)
        log_z = torch.empty_like(self.log_z)
        for rows, chunk in self._chunks(logits):
            log_z[rows] = chunk.logsumexp(-1)
        return self._cross_entropy(logits, log_z)

    def compare(self, logits: Float[Tensor, "batch pos vocab"]) -> tuple[Float[Tensor, "batch pos"], float]:
        """:meth:`kl` and :meth:`cross_entropy` of other logits, in one go."""
        kl = torch.empty_like(self.log_z, dtype=torch.float64)
        log_z = torch.empty_like(self.log_z)
        for (rows, ours), (_, theirs) in zip(self._chunks(self.logits), self._chunks(logits), strict=True):
            log_z[rows] = theirs.logsumexp(-1)
            probs = (ours - self.log_z[rows, None]).exp_()
            # sum of p (log p - log q), log p = logit - log z
            lost = torch.einsum("pv,pv->p", probs, ours - theirs)
            kl[rows] = lost.double() + (log_z[rows].double() - self.log_z[rows].double())
        return kl.reshape(self.tokens.shape), self._cross_entropy(logits, log_z)

    def _cross_entropy(self, logits: Tensor, log_z: Tensor) -> float:
        rows = self._predicts.nonzero().flatten()
        chosen = self._flat(logits)[rows, self._next[rows]].double()
        return (log_z[rows].double() - chosen).sum().item()

    def _chunks(self, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
        flat = self._flat(logits)
        size = max(1, CHUNK // logits.shape[-1])
        for start in range(0, len(flat), size):
            rows = slice(start, start + size)
            yield rows, flat[rows].float()

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)
