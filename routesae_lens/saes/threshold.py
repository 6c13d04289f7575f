"""The one threshold above which k latents per token are active on average (Llama Scope, sections 2.4 and 3.3.4).

It is a quantile of all pre-activations of a stream of tokens: ``k * tokens`` of them are above it. The stream
is too long to sort, so positive pre-activations are counted in bins made of the leading bits of their float32
pattern: 2^13 bins in every factor of 2, 16 MiB in all, whatever the length of the stream. Edges of bins are float32
numbers and counts are integers, so how many latents are above an edge is known exactly. Where no edge is close
enough to k, a second pass over the stream counts the one bin in which the threshold is, value by value.

No language model is needed here: ``analysis/jumprelu.py`` has the stream for SAEs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

DROPPED_BITS = 10
"""Trailing bits of a float32's 23 of mantissa that the first pass does not look at: bins of relative width 2^-13."""
AT_ONCE = 2**22
"""Pre-activations whose bins are computed together: bounds the memory beside the counts to about 100 MiB."""


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it does on the stream it was found on."""

    value: float
    """A latent is active where its pre-activation is larger. Exactly a float32."""
    l0: float
    """Active latents per token."""
    tokens: int
    passes: int = 1
    """2 where the bin of the threshold had to be counted again, value by value."""


class ThresholdCounts:
    """Counts of positive pre-activations by size, for :meth:`threshold`.

    Results do not depend on how the stream is cut into batches.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._dropped, self._first, self._above = DROPPED_BITS, 0, 0
        self._counts: Tensor = torch.zeros(2**31 >> DROPPED_BITS, dtype=torch.int64)

    @torch.no_grad()
    def add(self, pre_activations: Float[Tensor, "*token d_sae"]) -> None:
        """Count a batch; values that are not positive never pass a threshold and may be anything, also zeroed.

        Raises:
            ValueError: NaN or infinite pre-activations.
        """
        self._counts = self._counts.to(pre_activations.device)
        self.tokens += math.prod(pre_activations.shape[:-1])
        for part in pre_activations.flatten().split(AT_ONCE):
            # (a sum is NaN or infinite where a value is, and 50 times cheaper than asking each)
            if not torch.isfinite(part.sum(dtype=torch.float64)):
                raise ValueError("pre-activations are NaN or infinite")
            bits = _float32_upwards(part[part > 0]).view(torch.int32)
            # A bin is open below and closed above, as JumpReLU's strict > asks: its lower edge is not above itself.
            bins = ((bits - 1) >> self._dropped) - self._first
            if self._refined:  # most are in other bins
                self._above += int((bins >= len(self._counts)).sum())
                bins = bins[(bins >= 0) & (bins < len(self._counts))]
            self._counts += torch.bincount(bins, minlength=len(self._counts))

    def threshold(self, k: int | float) -> Threshold:
        """The edge at which the average number of active latents is closest to ``k``.

        Where nothing lies between several edges, the middle one, or 0 where it is one of them.

        Raises:
            ValueError: nothing was counted.
        """
        missed, active = self._missed(k)
        best = int(missed.argmin())
        same = (active == active[best]).nonzero().flatten()
        edge = int(same[len(same) // 2])
        if self._first == int(same[0]) == 0:
            edge = 0  # everything positive passes: ReLU
        return Threshold(
            self._edge(edge), int(active[edge]) / self.tokens, self.tokens, 2 if self._refined else 1
        )

    def refined(self, k: int | float) -> ThresholdCounts:
        """Empty counts for a second pass over the same stream: every float32 in the bin where the threshold is."""
        _, active = self._missed(k)
        inside = int((active >= k * self.tokens).sum()) - 1  # active falls from edge to edge
        other = ThresholdCounts()
        other._dropped = 0
        other._first = (self._first + min(max(inside, 0), len(self._counts) - 1)) << self._dropped
        other._counts = torch.zeros(2**self._dropped, dtype=torch.int64)
        return other

    @property
    def positive(self) -> int:
        """Positive pre-activations counted so far, the most that any threshold lets through."""
        return int(self._counts.sum()) + self._above

    @property
    def _refined(self) -> bool:
        return self._dropped == 0

    def _missed(self, k: int | float) -> tuple[Tensor, Tensor]:
        """Distance from ``k * tokens`` and number of active latents, for the lower edge of every bin and the end."""
        if not self.tokens:
            raise ValueError("no pre-activations were counted")
        counts = self._counts.cpu()
        from_above = torch.cat([torch.tensor([self._above]), counts.flip(0)]).cumsum(0)
        active = from_above.flip(0)
        return (active.double() - k * self.tokens).abs(), active

    def _edge(self, index: int) -> float:
        pattern = min((self._first + index) << self._dropped, 0x7F7FFFFF)  # the largest finite float32
        return torch.tensor([pattern], dtype=torch.int32).view(torch.float32).item()


def find_threshold(
    stream: Callable[[], Iterable[Float[Tensor, "*token d_sae"]]], k: int | float, *, tolerance: int | float
) -> Threshold:
    """The threshold above which ``k`` latents per token are active on average over a stream, to ``tolerance``.

    Args:
        stream: starts a pass over the batches of pre-activations (ReLU may have zeroed negative ones). It is
            called a second time only where a bin holds too many values for the tolerance.
        k: latents per token; need not be whole.
        tolerance: largest difference between the average number of active latents and ``k``.

    Raises:
        ValueError: fewer than ``k`` latents per token are positive at all, so many values are equal that no
            threshold is close enough, or pre-activations are not finite.
    """
    counts = ThresholdCounts()
    for batch in stream():
        counts.add(batch)
    found = counts.threshold(k)
    if counts.positive < (k - tolerance) * counts.tokens:
        raise ValueError(
            f"no threshold lets k = {k:g} latents per token through: only {counts.positive / counts.tokens:.4g} "
            "per token are positive on average. Ask for a smaller k."
        )
    if abs(found.l0 - k) > tolerance:
        counts = counts.refined(k)
        for batch in stream():
            counts.add(batch)
        found = counts.threshold(k)
    if abs(found.l0 - k) > tolerance:
        raise ValueError(
            f"no threshold gives {k:g} latents per token to a tolerance of {tolerance:g}: the closest gives "
            f"{found.l0:.6g}, because many pre-activations equal {found.value:.6g}"
        )
    return found


def check_level(k: Any, tolerance: Any, *, d_sae: int) -> None:
    """Raise a ValueError where ``k`` or ``tolerance`` make no sense for ``d_sae`` latents."""
    for name, value in (("k", k), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number of latents per token, got {value!r}")
    if k > d_sae:
        raise ValueError(f"k = {k:g} latents per token cannot be active in an SAE with d_sae = {d_sae}")


def check_calibration(k: Any, tolerance: Any, *, d_sae: int, tokens: int) -> None:
    """Raise before any work where ``k`` or ``tolerance`` make no sense, or the stream is too short for them.

    The rule: a threshold found on n tokens gives k on these, and on other tokens of the same kind k up to the
    standard error of the mean number of active latents. If latents fired independently of each other, that
    number would vary from token to token with a variance of sum_i p_i (1 - p_i) <= sum_i p_i = k, and its
    mean with a standard error of sqrt(k / n). Latents of real text are correlated, so that the true one is larger;
    less than ``n = k / tolerance^2`` tokens cannot support the tolerance in any case, and is refused.

    Raises:
        ValueError: says which, with what was got and what is expected.
    """
    check_level(k, tolerance, d_sae=d_sae)
    needed = math.ceil(k / tolerance**2)
    if tokens < needed:
        raise ValueError(
            f"the calibration stream is too short for the tolerance asked: {tokens} tokens count, and "
            f"k = {k:g} to a tolerance of {tolerance:g} latents per token needs {needed} (k / tolerance^2); "
            f"{tokens} serve a tolerance of {math.sqrt(k / tokens) if tokens else math.inf:.3g}"
        )


def _float32_upwards(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``x`` in float32; of a float64 the next float32 at or above, which is above the same edges."""
    narrow = x.float()
    if x.dtype != torch.float64:
        return narrow
    return torch.where(narrow.double() < x, narrow.nextafter(torch.tensor(math.inf, device=x.device)), narrow)
