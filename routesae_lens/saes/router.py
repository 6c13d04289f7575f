"""The router: which layer does each token's shared SAE read? (RouteSAE, section 2.2 and appendices B, C.)

Standardise every layer's activation, pool the layers into one vector (an *aggregator*), turn it into
probabilities over layers, and let a *routing rule* choose. To add an aggregator or a rule, write one
function and give it an entry in :data:`AGGREGATORS` or :data:`ROUTINGS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from routesae_lens.saes.layers import Layers


class Route(NamedTuple):
    """Where each token goes. All fields share the leading dimensions of the stack they were made from."""

    probs: Float[Tensor, "*batch layer"]
    """Probability of each layer (Eq. 7)."""
    layer: Int[Tensor, "*batch"]
    """The chosen layer as an index into the routed layers (not a block number); argmax of ``weights``."""
    weights: Float[Tensor, "*batch layer"]
    """What each layer's standardised activation is multiplied by before the sum."""
    input: Float[Tensor, "*batch d_model"]
    """What the shared SAE reads (Eq. 9 for hard routing)."""
    scale: Float[Tensor, "*batch"]
    """Factor on the chosen layer's activation in ``input``: p for hard routing, else 1."""


Pool = Callable[[Layers, dict[str, Tensor]], Float[Tensor, "*batch d_model"]]


class Aggregator(NamedTuple):
    """How the layers become the router's input."""

    pool: Pool
    parameters: tuple[str, ...] = ()
    """Names of learned vectors of size d_model (zero at the start), given to ``pool`` by name."""


def _sum(layers: Layers, parameters: dict[str, Tensor]) -> Tensor:
    return layers.total


def _mean(layers: Layers, parameters: dict[str, Tensor]) -> Tensor:
    return layers.total / layers.shape[-2]


def _attention(layers: Layers, parameters: dict[str, Tensor]) -> Tensor:
    # The paper gives no formula (appendix B). Ours: one learned query attends over the layers.
    x = layers.x
    scores = einsum(x, parameters["router_query"], "... layer d_model, d_model -> ... layer")
    attention = torch.softmax(scores / x.shape[-1] ** 0.5, dim=-1)
    return einsum(x, attention, "... layer d_model, ... layer -> ... d_model")


AGGREGATORS: dict[str, Aggregator] = {
    "sum": Aggregator(_sum),  # Eq. 5
    "mean": Aggregator(_mean),
    "attention": Aggregator(_attention, ("router_query",)),
}
"""What the router sees, by the name that ``aggregator`` of a config gives."""


class Choice(NamedTuple):
    """What a routing rule decides."""

    probs: Float[Tensor, "*batch layer"]
    layer: Int[Tensor, "*batch"]
    scale: Float[Tensor, "*batch"]
    mixture: Float[Tensor, "*batch layer"] | None = None
    """Weights of a sum over layers, for rules that read more than one layer."""


class RoutingContext(NamedTuple):
    """What a routing rule may look at."""

    shape: tuple[int, ...]
    """Leading dimensions of the stack."""
    n_layers: int
    probs: Callable[[], Float[Tensor, "*batch layer"]]
    """The learned probabilities, computed on demand."""
    errors: Callable[[], Float[Tensor, "*batch layer"]]
    """The shared SAE's normalised reconstruction error of every layer, computed on demand."""
    fixed_index: int | None
    random_per: str
    seed: int
    draw: int
    start: int
    """Positions of the sequences that come before the stack (cached ones, while generating)."""
    device: torch.device
    dtype: torch.dtype


class Routing(NamedTuple):
    choose: Callable[[RoutingContext], Choice]
    learned: bool
    """Whether the rule needs the router's parameters."""


def _hard(ctx: RoutingContext) -> Choice:
    probs = ctx.probs()
    p, layer = probs.max(dim=-1)
    return Choice(probs, layer, p)


def _soft(ctx: RoutingContext) -> Choice:
    probs = ctx.probs()
    layer = probs.argmax(dim=-1)
    return Choice(probs, layer, torch.ones_like(probs[..., 0]), mixture=probs)


def _straight_through(ctx: RoutingContext) -> Choice:
    # Value 1, gradient of p: the SAE reads the activation unscaled and the router still learns.
    # The loss must compare with the *detached* activation (see RouteTrainingSAE).
    probs = ctx.probs()
    p, layer = probs.max(dim=-1)
    return Choice(probs, layer, 1 + (p - p.detach()))  # in this order exactly 1


def _argmax(ctx: RoutingContext) -> Choice:
    # The SAE reads the activation unscaled; what trains the router is a loss of its own (distillation.py).
    probs = ctx.probs()
    layer = probs.argmax(dim=-1)
    return Choice(probs, layer, torch.ones_like(probs[..., 0]))


def _top2(ctx: RoutingContext) -> Choice:
    probs = ctx.probs()
    top = probs.topk(min(2, ctx.n_layers), dim=-1)
    kept = torch.zeros_like(probs).scatter(-1, top.indices, top.values)
    mixture = kept / kept.sum(-1, keepdim=True)
    return Choice(probs, top.indices[..., 0], torch.ones_like(probs[..., 0]), mixture=mixture)


def _oracle(ctx: RoutingContext) -> Choice:
    layer = ctx.errors().argmin(dim=-1)
    probs = torch.nn.functional.one_hot(layer, ctx.n_layers).to(ctx.dtype)
    return Choice(probs, layer, torch.ones_like(probs[..., 0]))


def _every(ctx: RoutingContext) -> Choice:
    raise ValueError(
        "an SAE with routing='every' (MLSAE) encodes all layers and chooses none; with_routing(sae, 'fixed', "
        "fixed_layer=...), 'random' or 'oracle' gives a form that does"
    )


def _random(ctx: RoutingContext) -> Choice:
    layer = uniform_layers(
        ctx.shape, ctx.n_layers, ctx.seed, ctx.draw, per=ctx.random_per, start=ctx.start, device=ctx.device
    )
    probs = torch.full((*ctx.shape, ctx.n_layers), 1 / ctx.n_layers, device=ctx.device, dtype=ctx.dtype)
    return Choice(probs, layer, torch.ones(ctx.shape, device=ctx.device, dtype=ctx.dtype))


def _fixed(ctx: RoutingContext) -> Choice:
    assert ctx.fixed_index is not None  # checked by the config
    layer = torch.full(ctx.shape, ctx.fixed_index, device=ctx.device)
    probs = torch.nn.functional.one_hot(layer, ctx.n_layers).to(ctx.dtype)
    return Choice(probs, layer, torch.ones(ctx.shape, device=ctx.device, dtype=ctx.dtype))


ROUTINGS: dict[str, Routing] = {
    "hard": Routing(_hard, learned=True),  # Eqs. 8 and 9
    "soft": Routing(_soft, learned=True),  # Eq. 14
    "random": Routing(_random, learned=False),  # the paper's baseline: uniform
    "fixed": Routing(_fixed, learned=False),
    "straight_through": Routing(_straight_through, learned=True),  # ours, as are those below
    "distilled": Routing(_argmax, learned=True),  # taught by the oracle, see distillation.py
    "top2": Routing(_top2, learned=True),  # soft over the two best layers
    "oracle": Routing(_oracle, learned=False),  # the layer the shared SAE reconstructs best
    "every": Routing(_every, learned=False),  # MLSAE: every layer's activation is an input of its own
}
"""How a layer is chosen, by the name that ``routing`` of a config gives."""

RANDOM_PER = ("token", "batch")


def uniform_layers(
    shape: tuple[int, ...],
    n_layers: int,
    seed: int,
    draw: int = 0,
    per: str = "token",
    start: int = 0,
    device: torch.device | None = None,
) -> Int[Tensor, "..."]:
    """Layer indices drawn uniformly, a function of (seed, draw, sequence, position) alone.

    The last of ``shape`` is the position, counted from ``start``. Longer sequences begin with the draws of
    shorter ones and a sequence draws the same in every batch size, so both passes of a splice and
    step-by-step generation see the same layers. (A hash instead of a ``torch.Generator``: that also works
    on every device and under ``torch.compile``.)
    """
    state = _mix(_mix(torch.full((), seed, dtype=torch.int64, device=device)) + draw)
    if per == "token":
        *sequences, positions = shape or (1,)
        sequence = torch.arange(math.prod(sequences), device=device)
        state = _mix(_mix(state + sequence)[:, None] + torch.arange(start, start + positions, device=device))
    bits = (state >> 32) & 0xFFFFFFFF
    return (bits % n_layers).reshape(shape if per == "token" else ()).expand(shape)


def _mix(z: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """One step of SplitMix64, a bijection of 64-bit integers that scatters neighbours."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >= 1 << 63 else bits
