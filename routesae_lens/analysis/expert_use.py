"""Which experts of an SAE do a set of tokens activate? (Scale SAE, section 3.3.1 and figure 6b.)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.redundancy import expert_width, experts_of
from routesae_lens.analysis.token_sets import Where, chosen_tokens, read_token_set
from routesae_lens.saes.fast_topk import Latents


@dataclass(frozen=True)
class ExpertUse:
    """How a set of tokens spreads over the experts of one SAE."""

    tokens: int
    n_experts: int
    selected: bool
    """Whether an expert is active where the router selects it; otherwise where one of its latents is active."""
    counts: tuple[int, ...]
    """Tokens on which each expert is active."""
    experts_per_token: float
    """Mean number of active experts of a token."""
    order: tuple[int, ...]
    """Experts by descending count; of equal ones the lower number first."""
    cdf: tuple[float, ...]
    """Share of all activations that the first 1, 2, ... experts of ``order`` have (figure 6b). A steep one, which is
    specialised on this set, is near 1 soon; a flat one is i / n_experts."""
    top_share: float
    """The first of ``cdf``."""
    entropy: float
    """Of the shares of the experts, in nats: 0 for a single expert, ln(n_experts) for all alike."""
    effective_experts: float
    """exp(``entropy``): that many equally used experts have this entropy."""
    unused: int
    """Experts that are active on none of the tokens."""

    def experts_for(self, share: int | float) -> int:
        """How many of the most used experts have this share of the activations, or more.

        Raises:
            ValueError: a share outside 0 to 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"expected a share above 0, up to 1; got {share}")
        target = share * sum(self.counts)
        reached = 0
        for n, expert in enumerate(self.order, start=1):
            reached += self.counts[expert]
            if reached >= target:
                return n
        return self.n_experts  # (rounding of the target)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as strict JSON takes them."""
        lists = {name: list(self.__dict__[name]) for name in ("counts", "order", "cdf")}
        return self.__dict__ | lists | {"experts_for_half": self.experts_for(0.5)}


class ExpertCounter:
    """Counts on how many tokens each expert is active, while the tokens go by.

    Raises:
        ValueError: experts that do not divide the width.
    """

    def __init__(self, d_sae: int, n_experts: int):
        self.width = expert_width(d_sae, n_experts)
        self.counts = torch.zeros(n_experts, dtype=torch.long)
        self.tokens = 0
        self._selected: bool | None = None

    def add(self, latents: Latents, n: int) -> None:
        """The latents of ``n`` more tokens; an expert is active on a token where one of its latents is."""
        self._only(selected=False)
        n_experts = len(self.counts)
        cell = (latents.token.cpu() * n_experts + latents.latent.cpu() // self.width).unique()
        self.counts += (cell % n_experts).bincount(minlength=n_experts)
        self.tokens += n

    def add_selected(self, experts: Int[Tensor, "token active"]) -> None:
        """The experts that the router selected for some more tokens; those are active.

        Raises:
            ValueError: an expert that is not there.
        """
        self._only(selected=True)
        n_experts = len(self.counts)
        if experts.numel() and not 0 <= int(experts.min()) <= int(experts.max()) < n_experts:
            raise ValueError(
                f"experts must be 0 to {n_experts - 1}, got {int(experts.min())} to {int(experts.max())}"
            )
        self.counts += experts.flatten().cpu().bincount(minlength=n_experts)
        self.tokens += len(experts)

    def _only(self, selected: bool) -> None:
        if self._selected is (not selected):
            raise ValueError("active latents and selected experts are counted apart: use a counter for each")
        self._selected = selected

    def result(self) -> ExpertUse:
        """How the tokens spread.

        Raises:
            ValueError: no expert was active on any token.
        """
        total = int(self.counts.sum())
        if not total:
            raise ValueError(f"no expert is active on any of {self.tokens} tokens")
        ordered, order = self.counts.sort(descending=True, stable=True)
        share = ordered.double() / total
        entropy = float(-torch.special.xlogy(share, share).sum())
        return ExpertUse(
            tokens=self.tokens,
            n_experts=len(self.counts),
            selected=bool(self._selected),
            counts=tuple(self.counts.tolist()),
            experts_per_token=total / self.tokens,
            order=tuple(order.tolist()),
            cdf=tuple((ordered.cumsum(0).double() / total).tolist()),
            top_share=share[0].item(),
            entropy=entropy,
            effective_experts=math.exp(entropy),
            unused=int((self.counts == 0).sum()),
        )


def expert_utilisation(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    where: Where | None = None,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> dict[str, ExpertUse]:
    """Which experts a set of tokens activates (Scale SAE, figure 6b), all SAEs on one clean pass.

    An expert is active on a token for which the SAE's router selects it (``choose_experts``), also where it gets none
    of the k latents; of an SAE that does not say what it selects, where one of its latents is active. ``selected`` of
    the result tells which.

    Args:
        saes: SAEs made of experts, ``cfg.n_experts`` equal groups of latents; training SAEs are converted.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: token ids (see :func:`held_out_tokens`).
        where: which tokens, as :func:`chosen_tokens` takes it: a mask, a function of a token's text, or words.
        batch_size: sequences per forward. Only random routing depends on it.
        exclude_special_tokens: leave out the tokenizer's special tokens (or these ids).
        exclude_first_position: likewise position 0.
        progress: show a progress bar.

    Raises:
        ValueError: an SAE without experts, and what :func:`chosen_tokens` and :func:`read_token_set` raise.
    """
    if isinstance(saes, Mapping):  # (what is none is refused below)
        counters = {name: ExpertCounter(sae.cfg.d_sae, experts_of(sae)) for name, sae in saes.items()}
    keep = chosen_tokens(
        tokens,
        model,
        where,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
    )
    for activity in read_token_set(
        saes, model, tokens, keep, batch_size=batch_size, progress="experts" if progress else None
    ):
        if activity.experts is None:
            counters[activity.name].add(activity.latents, activity.n)
        else:
            counters[activity.name].add_selected(activity.experts)
    return {name: counter.result() for name, counter in counters.items()}
