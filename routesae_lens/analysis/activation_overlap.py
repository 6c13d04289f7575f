"""Do different tokens activate the same latents? (Scale SAE, Eq. A.3, section 3.3.2 and appendix D.)

The mean over all pairs of tokens is exact and costs one count per latent: a latent active on c tokens is shared by
c (c - 1) ordered pairs. The distribution of overlaps needs the pairs themselves: all of them for a small set of tokens,
a seeded sample for a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.token_sets import Where, chosen_tokens, read_token_set
from routesae_lens.saes.fast_topk import Latents
from routesae_lens.saes.sparse_products import TopKCode

ALL_PAIRS_UP_TO = 4096
"""Tokens up to which the distribution is over all pairs (8.4 million of them) unless a sample is asked for."""
SAMPLED_PAIRS = 100_000
TOKENS_AT_ONCE, NUMBERS_AT_ONCE = 512, 2**24
"""Tokens of a block whose overlaps are computed at once, fewer where their dense latents would be more numbers."""
PAIRS_AT_ONCE = 65_536
"""Sampled pairs whose overlaps are computed at once."""


Pairs = int | Literal["all"]


@dataclass(frozen=True)
class ActivationSimilarity:
    """How many latents two tokens share, on average and as a distribution."""

    tokens: int
    """N in Eq. A.3."""
    d_sae: int
    active_latents: int
    """Latents that are active on at least one of the tokens."""
    l0: float
    """Mean number of active latents of a token."""
    k_total: float
    """What overlaps are divided by; ``l0`` unless another was given."""
    mean_overlap: float
    """Mean of \\|S_i ∩ S_j\\| over all pairs of tokens, exact."""
    similarity: float | None
    """Eq. A.3: ``mean_overlap / k_total``. None where nothing is active."""
    pairs: int
    """Unordered pairs of tokens in ``histogram``."""
    all_pairs: bool
    """Whether those are all there are; otherwise a sample, drawn with repetition."""
    seed: int
    histogram: tuple[int, ...]
    """Pairs that share 0, 1, 2 ... latents (appendix D, figure 11)."""
    sampled_similarity: float | None
    """Eq. A.3 from the pairs in ``histogram``; the exact one if they are all."""
    sampled_stderr: float | None
    """Its standard error over the pairs drawn; 0 if they are all. It says nothing about other texts."""

    @property
    def shares(self) -> list[float]:
        """Share of the pairs that have 0, 1, 2 ... latents in common."""
        return [count / self.pairs for count in self.histogram]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as strict JSON takes them."""
        return self.__dict__ | {"histogram": list(self.histogram), "shares": self.shares}


class OverlapCounter:
    """Counts which latents tokens share, while the tokens go by.

    It holds a count per latent, and the active latents of those tokens whose pairs are asked for: of all tokens, or of
    the (at most ``2 * pairs``) tokens in the sample.

    Args:
        d_sae: width.
        tokens: how many tokens will come. (So that the pairs can be drawn before they do, each as likely as any other.)
        pairs: draw this many pairs for the distribution, independently, or take "all". By default all pairs of up to
            :data:`ALL_PAIRS_UP_TO` tokens, :data:`SAMPLED_PAIRS` of more.
        seed: of that draw. Equal ones give the same pairs for every SAE.
        k: K_total of Eq. A.3; by default the mean L0 of these tokens.

    Raises:
        ValueError: fewer than two tokens, no pairs, or a k that is not positive.
    """

    def __init__(
        self,
        d_sae: int,
        tokens: int,
        *,
        pairs: Pairs | None = None,
        seed: int = 0,
        k: int | float | None = None,
    ):
        check_options(pairs, k)
        if tokens < 2:
            raise ValueError(f"a pair of tokens needs two, got {tokens}")
        self.tokens, self.seed, self.k = tokens, seed, k
        self.counts = torch.zeros(d_sae, dtype=torch.long)
        """Tokens on which each latent is active, int64."""
        self.seen = 0
        if pairs is None:
            pairs = "all" if tokens <= ALL_PAIRS_UP_TO else SAMPLED_PAIRS
        self._pairs: Tensor | None = None
        self._needed: Tensor | None = None
        if pairs != "all":
            generator = torch.Generator().manual_seed(seed)
            first = torch.randint(tokens, (pairs,), generator=generator)
            second = torch.randint(tokens - 1, (pairs,), generator=generator)
            drawn = torch.stack([first, second + (second >= first)])
            self._needed, self._pairs = drawn.unique(return_inverse=True)
        self._held: list[tuple[Tensor, Tensor]] = []

    def add(self, latents: Latents | TopKCode | Float[Tensor, "token d_sae"], n: int | None = None) -> None:
        """The latents of ``n`` more tokens, in the order of the text.

        Args:
            latents: dense, or sparse as ``encode_fast`` and ``Latents.of`` give them. Not zero is active.
            n: how many tokens they belong to; needed for ``Latents``, which do not name tokens without any.

        Raises:
            ValueError: latents that are not finite, out of the order of the tokens, or that the width or ``n`` lacks;
                more tokens than announced.
        """
        if not isinstance(latents, Latents):
            rows = len(latents.values if isinstance(latents, TopKCode) else latents)
            if n not in (None, rows):
                raise ValueError(f"latents of {rows} tokens, but n is {n}")
            if not isinstance(latents, TopKCode) and latents.shape[1:] != self.counts.shape:
                raise ValueError(
                    f"expected latents (token, {len(self.counts)}), got shape {tuple(latents.shape)}"
                )
            latents, n = Latents.of(latents), rows
        if n is None:
            raise ValueError("sparse latents do not say of how many tokens they are: give n")
        token, latent = latents.token.cpu(), latents.latent.cpu()
        if (token.diff() < 0).any():
            raise ValueError("sparse latents must come token after token")
        if not torch.isfinite(latents.value).all():
            raise ValueError("the latents hold numbers that are not finite")
        if len(token) and (int(token.max()) >= n or int(latent.max()) >= len(self.counts)):
            raise ValueError(
                f"latents of {n} tokens and {len(self.counts)} latents, got token {int(token.max())} and latent "
                f"{int(latent.max())}"
            )
        if self.seen + n > self.tokens:
            raise ValueError(f"{self.tokens} tokens were announced, {self.seen + n} came")
        self.counts += latent.bincount(minlength=len(self.counts))
        row = token + self.seen
        if self._needed is not None:
            place = torch.searchsorted(self._needed, row).clamp_max(len(self._needed) - 1)
            inside = self._needed[place] == row
            row, latent = place[inside], latent[inside]
        self._held.append((row.int(), latent.int()))
        self.seen += n

    def result(self) -> ActivationSimilarity:
        """What the tokens share.

        Raises:
            ValueError: fewer tokens came than were announced.
        """
        n = self.tokens
        if self.seen != n:
            raise ValueError(f"{n} tokens were announced, {self.seen} came")
        counts = self.counts[self.counts > 0].tolist()
        l0 = sum(counts) / n
        k = l0 if self.k is None else float(self.k)
        # (Python's integers: c (c - 1) summed over latents passes int64 for long texts)
        mean = sum(c * (c - 1) for c in counts) / (n * (n - 1))
        sampled: float
        stderr: float | None
        row, latent = (torch.cat(column).long() for column in zip(*self._held, strict=True))
        if self._pairs is None:
            histogram = all_overlaps(row, latent, n)
            sampled, stderr = mean, 0.0
        else:
            histogram = sampled_overlaps(row, latent, self._pairs, len(self.counts))
            sampled, stderr = _mean(histogram)
        return ActivationSimilarity(
            tokens=n,
            d_sae=len(self.counts),
            active_latents=len(counts),
            l0=l0,
            k_total=k,
            mean_overlap=mean,
            similarity=mean / k if k else None,
            pairs=int(histogram.sum()),
            all_pairs=self._pairs is None,
            seed=self.seed,
            histogram=tuple(histogram.tolist()),
            sampled_similarity=sampled / k if k else None,
            sampled_stderr=stderr / k if k and stderr is not None else None,
        )


def activation_similarity(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    where: Where | None = None,
    k: int | float | None = None,
    pairs: Pairs | None = None,
    seed: int = 0,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> dict[str, ActivationSimilarity]:
    """Average activation similarity over pairs of tokens (Scale SAE, Eq. A.3), all SAEs on one clean pass.

    The mean is exact for any number of tokens. The distribution of overlaps is over all pairs or over a sample (see
    :class:`OverlapCounter`), the same pairs for every SAE. Low is diverse; but an SAE whose similar tokens activate
    different copies of one feature is low, too (the paper's appendix D), so read it beside
    :func:`~routesae_lens.analysis.redundancy.feature_redundancy`.

    Args:
        saes: RouteSAEs, Crosscoders and ordinary SAELens SAEs; training SAEs are converted.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: token ids (see :func:`held_out_tokens`).
        where: which tokens, as :func:`chosen_tokens` takes it: a mask, a function of a token's text, or words.
        k: K_total; by default each SAE's mean L0 on these tokens. With a given one SAEs of different L0 compare by
            shared latents rather than by shares of their own.
        pairs: draw this many pairs for the distribution, or take "all" (time grows with their number and with L0).
        seed: of that draw.
        batch_size: sequences per forward. Only random routing depends on it.
        exclude_special_tokens: leave out the tokenizer's special tokens (or these ids).
        exclude_first_position: likewise position 0.
        progress: show a progress bar.

    Raises:
        ValueError: fewer than two tokens, no pairs, a k that is not positive, and what :func:`chosen_tokens` and
            :func:`read_token_set` raise.
    """
    check_options(pairs, k)
    keep = chosen_tokens(
        tokens,
        model,
        where,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
    )
    n = int(keep.sum())
    if n < 2:
        raise ValueError(f"a pair of tokens needs two, got {n}")
    stream = read_token_set(
        saes, model, tokens, keep, batch_size=batch_size, progress="overlaps" if progress else None
    )
    counters: dict[str, OverlapCounter] = {}
    for activity in stream:
        if activity.name not in counters:
            counters[activity.name] = OverlapCounter(activity.sae.cfg.d_sae, n, pairs=pairs, seed=seed, k=k)
        counters[activity.name].add(activity.latents, activity.n)
    return {name: counter.result() for name, counter in counters.items()}


def all_overlaps(
    token: Int[Tensor, " active"], latent: Int[Tensor, " active"], tokens: int
) -> Int[Tensor, " overlaps"]:
    """How many unordered pairs of tokens have 0, 1, 2 ... latents in common, by blocks of tokens.

    Args:
        token: 0 to ``tokens - 1``, for every active latent.
        latent: its number; each once in a token.
        tokens: how many tokens there are.
    """
    used, latent = latent.unique(return_inverse=True)
    histogram = torch.zeros(1, dtype=torch.long)
    size = max(1, min(TOKENS_AT_ONCE, NUMBERS_AT_ONCE // max(len(used), 1)))
    blocks = []
    for start in range(0, tokens, size):
        inside = (token >= start) & (token < start + size)
        blocks.append((torch.stack([token[inside] - start, latent[inside]]), min(size, tokens - start)))
    for i, (columns, n_columns) in enumerate(blocks):
        dense = torch.zeros(max(len(used), 1), n_columns)
        dense[columns[1], columns[0]] = 1.0
        for j, (rows, n_rows) in enumerate(blocks[: i + 1]):
            sparse = torch.sparse_coo_tensor(
                rows, torch.ones(rows.shape[1]), (n_rows, len(dense)), check_invariants=False
            )
            overlaps = torch.sparse.mm(sparse, dense).long()
            if i == j:
                above = torch.ones(n_rows, n_columns, dtype=torch.bool).triu(1)
                overlaps = overlaps[above]
            histogram = _plus(histogram, overlaps.flatten())
    return histogram


def sampled_overlaps(
    token: Int[Tensor, " active"], latent: Int[Tensor, " active"], pairs: Int[Tensor, "2 pair"], d_sae: int
) -> Int[Tensor, " overlaps"]:
    """How many of ``pairs`` have 0, 1, 2 ... latents in common; ``token`` ascends."""
    tokens = int(pairs.max()) + 1
    lengths = token.bincount(minlength=tokens)
    starts = lengths.cumsum(0) - lengths
    histogram = torch.zeros(1, dtype=torch.long)
    for part in pairs.split(PAIRS_AT_ONCE, dim=1):
        keys = []
        for side in part:
            n = lengths[side]
            pair = torch.arange(len(side)).repeat_interleave(n)
            place = torch.arange(len(pair)) - (n.cumsum(0) - n)[pair] + starts[side][pair]
            keys.append(pair * d_sae + latent[place])
        # A latent comes once in a token, so a key that comes twice is one that both tokens have.
        both = torch.cat(keys).sort().values
        shared = both[1:][both[1:] == both[:-1]] // d_sae
        histogram = _plus(histogram, shared.bincount(minlength=part.shape[1]))
    return histogram


def check_options(pairs: Pairs | None, k: int | float | None) -> None:
    if pairs not in (None, "all") and (isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1):
        raise ValueError(f'pairs must be an integer, 1 or more, or "all"; got {pairs!r}')
    if k is not None and not 0 < k < math.inf:
        raise ValueError(f"k must be a number of latents above 0, got {k}")


def _plus(histogram: Tensor, overlaps: Tensor) -> Tensor:
    more = overlaps.bincount(minlength=len(histogram))
    more[: len(histogram)] += histogram
    return more


def _mean(histogram: Tensor) -> tuple[float, float | None]:
    """Mean of a histogram's values, and its standard error; None with a single one."""
    n, value = int(histogram.sum()), torch.arange(len(histogram), dtype=torch.float64)
    weight = histogram.double()
    mean = float((weight * value).sum()) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(float((weight * (value - mean).square()).sum()) / (n - 1) / n)
