"""Distributions of the next token: how far one forward's are from another's, and what they cost.

Computed in float32 in blocks of positions and of the vocabulary, never whole. Within a block, distributions are
those of a token given that it is in the block; what they say together follows by the chain rule: the divergence of
two distributions is that of the blocks' probabilities, plus the mean of those within the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from routesae_lens.splice.late_logits import Logits

BLOCK = {"cpu": 2**19, "cuda": 2**26}
"""Logits in a block: few enough for the cache of a CPU, and for memory that one gives back to serve the next (from
some size on a system takes it away, and to get it anew costs more than to fill it); many enough for a GPU."""
ROWS = {"cpu": 512, "cuda": 4096}
"""Positions in a block where logits are made as they are needed: each row of blocks reads the whole unembedding."""


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
        logits: of the clean pass.
        tokens: the batch.
        keep: tokens that count.
        start: number of its first sequence, for errors.
    """

    def __init__(
        self,
        logits: Logits,
        tokens: Int[Tensor, "batch pos"],
        keep: Bool[Tensor, "batch pos"],
        start: int = 0,
    ):
        if int(tokens.max()) >= logits.d_vocab:
            raise ValueError(f"token {int(tokens.max())} has no logit: the model gives {logits.d_vocab}")
        self.logits, self.tokens, self.keep, self.start = logits, tokens, keep, start
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

    def kl(self, logits: Logits) -> Float[Tensor, "batch pos"]:
        """KL(clean || other) at every position, in nats, float64."""
        return self.compare(logits)[0]

    def cross_entropy(self, logits: Logits) -> float:
        """Next-token cross-entropy in nats, summed where both the token and the predicted one count."""
        return self.losses(logits).sum().item()

    def losses(self, logits: Logits) -> Float[Tensor, "batch pos"]:
        """What the token after each position costs, in nats, float64; 0 where it or the position does not count."""
        losses = self._empty(logits)
        for rows, blocks in self._blocks(logits):
            ours = _Rows(logits, rows, self._next[rows], len(blocks))
            for i, columns in enumerate(blocks):
                ours.log_probs(i, columns)
            losses[rows] = ours.losses()
        return self._counted(losses)

    def compare(self, logits: Logits) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
        """:meth:`kl` and :meth:`losses` of other logits, in one go.

        Raises:
            ValueError: logits of the clean pass are not finite at a token that counts.
        """
        kl, losses, clean_losses = (self._empty(logits) for _ in range(3))
        for rows, blocks in self._blocks(self.logits, logits):
            ours, theirs = (
                _Rows(each, rows, self._next[rows], len(blocks)) for each in (self.logits, logits)
            )
            within = torch.empty_like(ours.masses)
            for i, columns in enumerate(blocks):
                p, q = ours.log_probs(i, columns), theirs.log_probs(i, columns)
                self._check(rows, p)
                gap = torch.sub(p, q, out=q)
                within[:, i] = torch.linalg.vecdot(p.exp_(), gap)
            log_p, log_q = ours.masses.log_softmax(-1), theirs.masses.log_softmax(-1)
            kl[rows] = (log_p.exp() * (log_p - log_q + within)).sum(-1)
            losses[rows], clean_losses[rows] = theirs.losses(), ours.losses()
        self.clean_losses = self._counted(clean_losses)  # (known by the way)
        return kl.reshape(self.tokens.shape), self._counted(losses)

    def _check(self, rows: slice, log_probs: Float[Tensor, "row column"]) -> None:
        # (a sum is NaN or infinite where a number is, and makes no second copy of them)
        if not log_probs.sum(-1)[self.keep.flatten()[rows]].isfinite().all():
            end = self.start + len(self.tokens) - 1
            raise ValueError(f"the model's logits are not finite in sequences {self.start} to {end}")

    def _empty(self, logits: Logits) -> Float[Tensor, " row"]:
        return torch.empty(self.tokens.numel(), dtype=torch.float64, device=logits.device)

    def _counted(self, losses: Float[Tensor, " row"]) -> Float[Tensor, "batch pos"]:
        return losses.reshape(self.tokens.shape).where(self.predicts, 0.0)

    def _blocks(self, *several: Logits) -> Iterator[tuple[slice, list[slice]]]:
        """Rows of the flattened positions, with the columns of the vocabulary that make blocks of them."""
        n, one = self.tokens.numel(), several[0]
        size = BLOCK.get(one.device.type, BLOCK["cuda"])
        late = any(each.late for each in several)
        height = min(n, ROWS.get(one.device.type, ROWS["cuda"]) if late else max(1, size // one.d_vocab))
        width = max(1, size // height) if late else one.d_vocab
        columns = [slice(i, min(i + width, one.d_vocab)) for i in range(0, one.d_vocab, width)]
        for start in range(0, n, height):
            yield slice(start, min(start + height, n)), columns


class _Rows:
    """Distributions of one forward at some positions, block by block of the vocabulary.

    Args:
        logits, rows: of the forward, and where.
        following: the tokens that follow.
        n_blocks: how many blocks there are.
    """

    def __init__(self, logits: Logits, rows: slice, following: Int[Tensor, " row"], n_blocks: int):
        self.logits, self.rows, self.following = logits, rows, following
        n = len(following)
        # (taken once: small tensors between the large ones of the blocks would keep their memory in pieces)
        self.masses = torch.empty(n, n_blocks, dtype=torch.float64, device=logits.device)
        """Logarithm of the summed exponentials of each block's logits."""
        self._chosen = torch.zeros(n, dtype=torch.float64, device=logits.device)

    def log_probs(self, i: int, columns: slice) -> Float[Tensor, "row column"]:
        """Of the tokens of the ``i``-th block, given that it is one of them; float32, the caller's to overwrite."""
        block = self.logits.block(self.rows, columns)
        log_probs = torch.log_softmax(block, -1, dtype=torch.float32)
        # (at the largest one, where least is lost to rounding)
        self.masses[:, i] = block.amax(-1).double() - log_probs.amax(-1).double()
        at = self.following - columns.start
        inside = (at >= 0) & (at < block.shape[-1])
        chosen = block.gather(-1, at.where(inside, 0)[:, None]).squeeze(-1).double()
        self._chosen += chosen.where(inside, 0.0)
        return log_probs

    def losses(self) -> Float[Tensor, " row"]:
        """What the following tokens cost, in nats, float64."""
        return self.masses.logsumexp(-1) - self._chosen
