"""How often does each latent fire? (Llama Scope, section 4.4 and figure 4.)

Two shares tell a healthy dictionary: few latents that stay silent over 100 k tokens, and few that fire on more than
a tenth of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.stream import read_batches, subjects_of
from routesae_lens.saes.fast_topk import Latents

WINDOW = 100_000
"""Tokens over which the paper calls a latent silent."""
SILENT_LIMIT, DENSE_ABOVE, DENSE_LIMIT = 0.1, 0.1, 0.02
"""The paper's limits: about 10 % of the latents silent, 2 % firing on more than a tenth of the tokens."""


@dataclass(frozen=True)
class Firing:
    """How often each latent of one SAE fires. "Token" means a kept token: special tokens and position 0 are out."""

    tokens: int
    """Tokens really seen."""
    sequences: int
    d_sae: int
    l0: float
    counts: Int[Tensor, " d_sae"] = field(repr=False)
    """Tokens on which each latent fires, int64."""
    window: int
    windows: int
    """Complete windows of ``window`` tokens among ``tokens``; what is left over only counts elsewhere."""
    silent_share: float | None
    """Share of the latents that fire on no token of a window: the mean over windows. None before the first
    window is complete."""
    silent_share_stderr: float | None
    """Its standard error over windows; None with fewer than two."""
    silent_limit: float
    never_fired: int
    """Latents that fire on none of ``tokens``. On more tokens there are fewer of them."""
    dense_above: float
    dense: int
    """Latents that fire on more than ``dense_above`` of the tokens."""
    dense_share: float
    dense_limit: float
    edges: tuple[float, ...]
    """Frequencies between the bars of the histogram, ascending, evenly spaced in log10."""
    histogram: tuple[int, ...]
    """Latents by frequency; those that never fire are ``never_fired``, in no bar. A bar holds its lower edge, the
    last one both."""

    @property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of the tokens on which each latent fires, float64."""
        return self.counts.double() / self.tokens

    @property
    def few_silent(self) -> bool | None:
        """Whether ``silent_share`` is within its limit; None where that cannot be judged yet."""
        return None if self.silent_share is None else self.silent_share <= self.silent_limit

    @property
    def few_dense(self) -> bool:
        """Whether ``dense_share`` is within its limit."""
        return self.dense_share <= self.dense_limit

    def findings(self) -> list[str]:
        """A sentence on each of the two limits."""
        if self.silent_share is None:
            silent = (
                f"silent latents cannot be judged yet: {self.tokens:,} tokens were seen, the limit is about "
                f"{self.window:,}"
            )
        else:
            silent = (
                f"{self.silent_share:.1%} of the latents are silent over {self.window:,} tokens "
                f"({_verdict(bool(self.few_silent), self.silent_limit)})"
            )
        dense = (
            f"{self.dense_share:.1%} of the latents fire on more than {self.dense_above:.0%} of {self.tokens:,} "
            f"tokens ({_verdict(self.few_dense, self.dense_limit)})"
        )
        return [silent, dense]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-latent counts, ready for strict JSON."""
        kept = {name: value for name, value in self.__dict__.items() if name != "counts"}
        kept |= {"edges": list(self.edges), "histogram": list(self.histogram)}
        return kept | {
            "few_silent": self.few_silent,
            "few_dense": self.few_dense,
            "findings": self.findings(),
        }


def _verdict(within: bool, limit: float) -> str:
    return f"{'within' if within else 'above'} the limit of {limit:.0%}"


@torch.no_grad()
def firing_frequencies(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    window: int = WINDOW,
    silent_limit: float = SILENT_LIMIT,
    dense_above: float = DENSE_ABOVE,
    dense_limit: float = DENSE_LIMIT,
    bars_per_decade: int = 4,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> dict[str, Firing]:
    """Count the tokens on which each latent of each SAE fires, on one pass of the language model.

    Fewer tokens than ``window`` are no error: the result says that silence cannot be judged yet.

    Args:
        saes: RouteSAEs, Crosscoders and ordinary SAELens SAEs; training SAEs are converted to their
            inference form.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: held-out token ids, see ``held_out_tokens``.
        window: tokens over which silence is judged.
        silent_limit: share of latents that may be silent over a window.
        dense_above: frequency above which a latent is dense.
        dense_limit: share of latents that may be dense.
        bars_per_decade: of the histogram, which begins at the power of ten at or below 1 / tokens and ends at 1.
        batch_size: sequences per forward. Only random routing depends on it: it draws anew for every batch.
        exclude_special_tokens: the tokenizer's special tokens (or these ids) do not count.
        exclude_first_position: nor does position 0.
        progress: show a progress bar.

    Raises:
        ValueError: an option out of its range, or as ``evaluate_all``.
    """
    for name, number in (("window", window), ("bars_per_decade", bars_per_decade)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be an integer, 1 or more; got {number!r}")
    shares = {"silent_limit": silent_limit, "dense_above": dense_above, "dense_limit": dense_limit}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share, between 0 and 1; got {share}")
    subjects = subjects_of(saes, model)
    batches = read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        progress="firing" if progress else None,
    )
    counters = {name: _Counter(subject.sae.cfg.d_sae, window) for name, subject in subjects.items()}
    for batch in batches:
        n = int(batch.keep.sum())
        if not n:
            continue
        for name, subject in subjects.items():
            counters[name].add(Latents.of(subject.encode(batch.read(subject), batch.keep)), n)
    return {
        name: counter.result(len(tokens), bars_per_decade=bars_per_decade, **shares)
        for name, counter in counters.items()
    }


class _Counter:
    """Counts of firings, and of the latents that each window leaves silent."""

    def __init__(self, d_sae: int, window: int):
        self.window, self.tokens = window, 0
        self.counts = torch.zeros(d_sae, dtype=torch.long)
        self.silent: list[int] = []
        """Silent latents of each complete window."""
        self._filled = 0
        self._fired = torch.zeros(d_sae, dtype=torch.bool)

    def add(self, latents: Latents, n: int) -> None:
        """The latents of ``n`` more tokens. A window ends where it ends, also within a batch."""
        self.tokens += n
        token, latent = latents.token.cpu(), latents.latent.cpu()
        self.counts += latent.bincount(minlength=len(self.counts))
        start = 0
        while start < n:
            end = min(n, start + self.window - self._filled)
            self._fired[latent[(token >= start) & (token < end)]] = True
            self._filled, start = self._filled + end - start, end
            if self._filled == self.window:
                self.silent.append(int((~self._fired).sum()))
                self._fired.zero_()
                self._filled = 0

    def result(
        self,
        sequences: int,
        *,
        silent_limit: float,
        dense_above: float,
        dense_limit: float,
        bars_per_decade: int,
    ) -> Firing:
        d_sae, n = len(self.counts), self.tokens
        silent = torch.tensor(self.silent, dtype=torch.float64) / d_sae
        frequency = self.counts.double().numpy() / n
        edges = _edges(n, bars_per_decade)
        dense = int((frequency > dense_above).sum())
        return Firing(
            tokens=n,
            sequences=sequences,
            d_sae=d_sae,
            l0=self.counts.sum().item() / n,
            counts=self.counts,
            window=self.window,
            windows=len(silent),
            silent_share=sum(self.silent) / (len(silent) * d_sae) if len(silent) else None,
            silent_share_stderr=(silent.std() / len(silent) ** 0.5).item() if len(silent) > 1 else None,
            silent_limit=silent_limit,
            never_fired=int((self.counts == 0).sum()),
            dense_above=dense_above,
            dense=dense,
            dense_share=dense / d_sae,
            dense_limit=dense_limit,
            edges=edges,
            histogram=tuple(np.histogram(frequency[frequency > 0], np.array(edges))[0].tolist()),
        )


def _edges(tokens: int, per_decade: int) -> tuple[float, ...]:
    """From the power of ten at or below 1 / tokens to 1."""
    decades = max(1, len(str(tokens - 1)))
    # (powers of ten as they are written: 10.0**-5 is not 1e-5, and 1 of 100,000 would miss the first bar)
    return tuple(
        float(f"1e{-decades + i // per_decade}") * 10 ** (i % per_decade / per_decade)
        for i in range(decades * per_decade + 1)
    )
