"""The SAEs that are compared, as methods of a sweep; and what each of them computes for a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import routesae_lens as rl

DENSE = ("topk", "gated")
"""Of 1/``per_active`` of the total width each."""
SCALING = {"mean": "scale", "none": "unscaled"}
"""Beginning of a method's name by its feature scaling; unscaled with e = 1 it is the Switch SAE."""


@dataclass(frozen=True)
class Kind:
    """One of the SAEs that are compared."""

    name: str
    """Of the method in the sweep."""
    label: str
    base: str
    """The package's method of which this one is a setting."""
    active: int = 0
    """Experts per token, e; 0 for a dense SAE."""
    experts: int = 0
    share: int = 1
    """Its width is the total width divided by this."""
    scaling: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)
    appendix: bool = False
    """It is one of appendix C's alternatives, or has the authors' weights."""

    @property
    def computed(self) -> float:
        """Share of its latents that are computed for a token."""
        return self.active / self.experts if self.experts else 1.0


def expert_kind(e: int, per_active: int, scaling: str, balance: float, **given: Any) -> Kind:
    """A mixture of which e experts are active, of ``per_active`` x e."""
    switch = e == 1 and scaling == "none"
    prefix = SCALING.get(scaling, scaling)
    words = {"mean": f"Scale, e = {e}", "none": f"no scaling, e = {e}"}.get(
        scaling, f"{scaling} low-pass, e = {e}"
    )
    if "expert_weights" in given:
        prefix, words = str(given["expert_weights"]), f"{given['expert_weights']} weights, e = {e}"
    fields = {"n_experts": per_active * e, "active_experts": e, "feature_scaling": scaling}
    return Kind(
        "switch" if switch else f"{prefix}_e{e}",
        "Switch (e = 1, no scaling)" if switch else words,
        "scale",
        active=e,
        experts=per_active * e,
        scaling=scaling,
        given=fields | {"expert_balance_coefficient": balance} | given,
        appendix=scaling not in SCALING or "expert_weights" in given,
    )


def main_kinds(experts: Sequence[int], per_active: int, balance: float, wide: bool) -> list[Kind]:
    """The FLOP-matched comparison: two dense SAEs, and mixtures with and without feature scaling."""
    kinds = [
        Kind("topk", "TopK", "topk", share=per_active),
        Kind("gated", "Gated", "gated", share=per_active),
        *(expert_kind(e, per_active, scaling, balance) for scaling in ("none", "mean") for e in experts),
    ]
    return [*kinds, *([Kind("topk_wide", "TopK, full width", "topk")] if wide else [])]


def appendix_kinds(e: int, per_active: int, balance: float) -> list[Kind]:
    """Appendix C's other low-pass parts, and the weights of the authors' code (which needs several experts)."""
    kinds = [
        expert_kind(e, per_active, "identity", balance),
        expert_kind(e, per_active, "learned", balance),
    ]
    if e > 1:
        kinds.append(expert_kind(e, per_active, "mean", balance, expert_weights="renormalized"))
    return kinds


def methods_of(kinds: Sequence[Kind]) -> dict[str, rl.Method]:
    """For ``sweep(methods=)``."""
    found = {}
    for kind in kinds:
        base = rl.METHODS[kind.base]
        sets = dict(base.sets) | dict.fromkeys(kind.given, "the method")
        found[kind.name] = base._replace(make=partial(_make, base.make, kind), sets=sets)
    return found


def _make(
    make: Any, kind: Kind, model: Any, layers: list[int], d_sae: int, sparsity: Any, seed: int, **given: Any
) -> Any:
    return make(model, layers, d_sae // kind.share, sparsity, seed, **kind.given, **given)


# --- FLOPs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one forward, per token. Feature scaling changes the weights, once for all tokens
    of a batch, and is not counted."""

    encoder: int
    """2 x d_model for every latent that is computed."""
    router: int
    """2 x d_model for every expert."""
    decoder: int
    """2 x d_model for every active latent: a sparse product."""
    dense_decoder: int
    """... for every computed latent instead, as the paper counts and as matrix products without sparsity do it."""

    @property
    def total(self) -> int:
        """With a sparse decoder."""
        return self.encoder + self.router + self.decoder

    @property
    def dense_total(self) -> int:
        return self.encoder + self.router + self.dense_decoder


def flops(kind: Kind, d_model: int, d_sae: int, l0: float) -> Flops:
    """What an SAE of this kind computes for a token. ``d_sae``: the total width of the expert SAEs."""
    width = d_sae // kind.share
    computed = width * kind.active // kind.experts if kind.experts else width
    return Flops(
        encoder=2 * d_model * computed,
        router=2 * d_model * kind.experts,
        decoder=round(2 * d_model * l0),
        dense_decoder=2 * d_model * computed,
    )
