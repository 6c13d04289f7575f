"""SAEs made of some latents of two others, from the one to the other step by step (Leask et al., 2025).

For latents of two SAEs to stand side by side, each has to fire as it did at home:

- An encoder may read its input minus b_dec, and the two b_dec differ. That part is folded into the encoder's bias
  (b_enc - b_dec W_enc), so that a stitched SAE never subtracts b_dec.
- Whether a latent fires must not depend on others. ReLU and JumpReLU latents have a threshold of their own (0 for
  ReLU), so every stitched SAE is a SAELens ``JumpReLUSAE`` (or the routed one). TopK lets a latent through only
  where few others are stronger; ``to_jumprelu`` gives such SAEs thresholds first.
- Decoder rows have norm 1 (SAELens' ``fold_W_dec_norm``), so that activations of the two are lengths in the output.

b_dec stays the smaller SAE's while latents are inserted, so that each insertion adds exactly its latent. Once latents
of the smaller SAE leave, it moves to the larger one's in proportion to how many of them have left. The first step
is the smaller SAE and the last one the larger, to rounding.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from torch import Tensor

from routesae_lens.analysis.geometry import unit_rows
from routesae_lens.analysis.jumprelu import JUMPRELU, as_jumprelu
from routesae_lens.analysis.latent_split import THRESHOLD, LatentSplit, split_latents
from routesae_lens.analysis.subjects import check_weights
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.route_sae import RouteSAE

FORMS = {
    "standard": "jumprelu",
    "jumprelu": "jumprelu",
    "route_standard": "route_jumprelu",
    "route_jumprelu": "route_jumprelu",
}
"""Architectures that can be stitched, and what stitched SAEs of them are."""
ORDERS = ("random", "similarity")
PER_TOKEN = ("none", "layer_norm", "constant_norm_rescale")
"""Normalisations that depend on the token alone, so that two SAEs which share one read the same."""
RULES = ("routing", "aggregator", "fixed_layer", "random_per", "route_seed", "layer_scale")
"""Fields of a RouteSAE's config that decide which layer it reads."""


@dataclass(frozen=True)
class Move:
    """One step from the smaller SAE to the larger."""

    phase: str
    """"insert" (a novel latent goes in), "swap" (a group: the smaller SAE's latents out, the larger's in), or "rest":
    a latent of the smaller SAE without counterpart goes out, one of the larger whose decoder row is zero in."""
    small: tuple[int, ...]
    """Latents of the smaller SAE that leave."""
    large: tuple[int, ...]
    """Latents of the larger SAE that enter."""


class Stitching:
    """The way from a smaller SAE to a larger one; ``stitching.sae(n)`` is the SAE after ``n`` moves.

    Args:
        small: a ReLU or JumpReLU SAE of SAELens, or a RouteSAE of such; training SAEs are taken in their inference
            form. Neither SAE is changed.
        large: another one on the same activations.
        threshold: of :func:`split_latents`.
        split: its result, where known already (``threshold`` is then its own).
        order: "random", or "similarity": novel latents from the least similar on, groups from the most similar on.
        seed: of "random".
        swap: whether to go on after the insertions. Without it the last step is the smaller SAE with every novel
            latent, and not the larger SAE.
        progress: show progress bars of the similarities.

    Raises:
        ValueError: SAEs of other kinds (TopK: convert first), or that do not read the same activations in the same
            way; a split of other SAEs; an unknown order.
    """

    def __init__(
        self,
        small: SAE[Any],
        large: SAE[Any],
        *,
        threshold: float = THRESHOLD,
        split: LatentSplit | None = None,
        order: str = "random",
        seed: int = 0,
        swap: bool = True,
        progress: bool = True,
    ):
        if order not in ORDERS:
            raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}")
        self.small, self.large = stitchable_pair(small, large)
        if split is None:
            split = split_latents(self.small, self.large, threshold, progress=progress)
        _check_split(split, self.small, self.large)
        self.split = split
        self.moves = _moves(split, order, seed, swap)

    def __len__(self) -> int:
        """Moves from the first step to the last."""
        return len(self.moves)

    def latents(self, n: int) -> tuple[list[int], list[int]]:
        """Latents of the smaller and of the larger SAE after ``n`` moves, ascending.

        Raises:
            ValueError: fewer than 0 or more than all moves.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= len(self.moves):
            raise ValueError(f"expected a number of moves from 0 to {len(self.moves)}, got {n!r}")
        left = {latent for move in self.moves[:n] for latent in move.small}
        entered = sorted(latent for move in self.moves[:n] for latent in move.large)
        return [latent for latent in range(self.small.cfg.d_sae) if latent not in left], entered

    @torch.no_grad()
    def sae(self, n: int) -> SAE[Any]:
        """The stitched SAE after ``n`` moves: a ``JumpReLUSAE`` or ``RouteJumpReLUSAE`` with weights of its own.

        Latents of the smaller SAE come first, each side in the order it had. ``metadata.stitched`` says what it is.

        Raises:
            ValueError: fewer than 0 or more than all moves.
        """
        ours, theirs = self.latents(n)
        share = 1 - len(ours) / self.small.cfg.d_sae
        cfg = copy.deepcopy(self.small.cfg.to_dict())
        cfg |= {"d_sae": len(ours) + len(theirs), "device": "meta"}
        stitched: SAE[Any] = SAE.from_dict(cfg)
        stitched.cfg.device = self.small.cfg.device
        stitched.cfg.metadata.stitched = {
            "move": n,
            "moves": len(self.moves),
            "phase": self.phase(n),
            "threshold": self.split.threshold,
            "of_small": len(ours),
            "of_large": len(theirs),
            "share_of_large_b_dec": share,
        }
        state = {name: tensor.clone() for name, tensor in self.small.state_dict().items()}
        other = self.large.state_dict()
        for name, dim in (("W_enc", 1), ("b_enc", 0), ("threshold", 0), ("W_dec", 0)):
            parts = [_chosen(state[name], ours, dim), _chosen(other[name], theirs, dim)]
            state[name] = torch.cat(parts, dim).contiguous()
        state["b_dec"] = (1 - share) * state["b_dec"] + share * other["b_dec"]
        stitched.load_state_dict(state, assign=True)
        return stitched.to(device=self.small.W_dec.device, dtype=self.small.dtype).eval()

    def phase(self, n: int) -> str:
        """Phase of the ``n``-th move; "small" before the first."""
        return self.moves[n - 1].phase if n else "small"

    @property
    def phase_ends(self) -> dict[str, int]:
        """Moves after which each phase that occurs is over."""
        return {move.phase: n for n, move in enumerate(self.moves, 1)}


def _chosen(weights: Tensor, latents: list[int], dim: int) -> Tensor:
    return weights.index_select(dim, torch.tensor(latents, dtype=torch.long, device=weights.device))


def _moves(split: LatentSplit, order: str, seed: int, swap: bool) -> list[Move]:
    cosine = split.large.cosines.tolist()
    inserts = [Move("insert", (), (latent,)) for latent in split.novel.tolist()]
    swaps = [Move("swap", group.small, group.large) for group in split.groups]
    empty_small, empty_large = split.without_direction
    rest = [Move("rest", (latent,), ()) for latent in (*split.unmatched.tolist(), *empty_small.tolist())]
    rest += [Move("rest", (), (latent,)) for latent in empty_large.tolist()]
    if order == "similarity":
        inserts.sort(key=lambda move: cosine[move.large[0]])
        swaps.sort(key=lambda move: -max(cosine[latent] for latent in move.large))
    else:
        draw = random.Random(seed)
        for moves in (inserts, swaps, rest):
            draw.shuffle(moves)
    return [*inserts, *swaps, *rest] if swap else inserts


# --- What can be stitched -------------------------------------------------------------------------------


def stitchable_pair(small: Any, large: Any) -> tuple[SAE[Any], SAE[Any]]:
    """Copies of both in the form in which their latents can stand side by side (see the head of this file).

    Raises:
        ValueError: as :class:`Stitching`.
    """
    ours, theirs = (
        _checked(inference_form(one) if isinstance(one, TrainingSAE) else one) for one in (small, large)
    )
    _check_same_input(ours, theirs)
    return _free_of_b_dec(ours), _free_of_b_dec(theirs)


def _checked(sae: Any) -> SAE[Any]:
    """``sae``, if its latents fire independently of each other."""
    if not isinstance(sae, SAE):
        raise ValueError(f"expected an SAE, got {type(sae).__name__}")
    architecture, kind = sae.cfg.architecture(), type(sae).__name__
    if JUMPRELU.get(architecture) in FORMS:
        raise ValueError(
            f"{kind} ({architecture}) cannot be stitched as it is: whether one of its latents fires depends on the "
            "others. to_jumprelu(sae, model, tokens).sae gives each a threshold of its own"
        )
    if architecture not in FORMS:
        raise ValueError(
            f"{kind} ({architecture}) cannot be stitched; architectures that can: {', '.join(FORMS)}"
        )
    check_weights(sae)
    return sae


def _check_split(split: LatentSplit, small: SAE[Any], large: SAE[Any]) -> None:
    """Raise a ValueError unless the best matches of ``split`` have the cosines that it says in these two."""
    if not isinstance(split, LatentSplit):
        raise ValueError(f"split must be what split_latents gives, got {type(split).__name__}")
    widths = (small.cfg.d_sae, large.cfg.d_sae)
    if split.widths != widths:
        raise ValueError(f"a split of SAEs with {split.widths} latents; these have {widths}")
    ours, theirs = (unit_rows(one.W_dec)[0].cpu() for one in (small, large))
    matched = split.large.latents >= 0
    cosines = (theirs[matched] * ours[split.large.latents[matched]]).sum(-1)
    if not torch.allclose(cosines, split.large.cosines[matched], rtol=0, atol=1e-3):
        raise ValueError("a split of other SAEs: the decoder rows of these two have other cosines")


def _check_same_input(small: SAE[Any], large: SAE[Any]) -> None:
    """Raise a ValueError that lists every way in which the two read different inputs."""
    routed = [isinstance(one, RouteSAE) for one in (small, large)]
    if routed[0] != routed[1]:
        raise ValueError(
            f"{type(small).__name__} and {type(large).__name__}: a RouteSAE and an ordinary SAE read different "
            "things; stitch route_sae.layer_view(layer) with an SAE of that layer"
        )
    names = ["d_in", "normalize_activations", "reshape_activations"]
    several = routed[0] and small.cfg.n_layers > 1
    names += ["layers", "site", "standardize"] if routed[0] else []
    names += RULES if several else []
    wrong = [
        f"{name}: {getattr(small.cfg, name)!r} and {getattr(large.cfg, name)!r}"
        for name in names
        if getattr(small.cfg, name) != getattr(large.cfg, name)
    ]
    if not routed[0]:
        hooks = [(one.cfg.metadata.hook_name, one.cfg.metadata.hook_head_index) for one in (small, large)]
        if hooks[0] != hooks[1]:
            wrong.append(f"hook: {hooks[0]} and {hooks[1]}")
    elif not wrong and (router := _different_router(small, large, several)):
        wrong.append(router)
    if wrong:
        raise ValueError(f"the two SAEs do not read the same activations alike: {'; '.join(wrong)}")
    if small.cfg.normalize_activations not in PER_TOKEN and not (routed[0] and small.cfg.standardize):
        raise ValueError(
            f"normalize_activations={small.cfg.normalize_activations!r} needs a number or matrix that the SAE does "
            "not hold; fold it first (fold_activation_norm_scaling_factor)"
        )


def _different_router(small: SAE[Any], large: SAE[Any], several: bool) -> str:
    """What of the routing differs, and what to do; empty where tokens of both go the same ways."""
    if small.cfg.routing == "every" or (several and small.cfg.routing == "oracle"):
        return (
            f"routing={small.cfg.routing!r} chooses no layer that is the same for both; stitch "
            "with_routing(sae, 'random') of the two"
        )
    # (with one layer there is nothing to choose, but the factor on it counts)
    ours, theirs = (
        {
            name: one
            for name, one in sae.named_parameters()
            if name == "router_log_scale" or (several and name.startswith(("W_router", "router_")))
        }
        for sae in (small, large)
    )
    different = [
        name for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not torch.equal(ours[name].cpu(), theirs[name].cpu())
    ]  # fmt: skip
    if not different:
        return ""
    return (
        f"routers ({', '.join(sorted(different))}), so that tokens would go to different layers; stitch "
        "sae.layer_view(layer) of the two, or with_routing(sae, 'random')"
    )


@torch.no_grad()
def _free_of_b_dec(sae: SAE[Any]) -> SAE[Any]:
    """A JumpReLU copy whose encoder does not know b_dec, with decoder rows of norm 1."""
    copied: Any = as_jumprelu(sae, FORMS[sae.cfg.architecture()])
    if copied.cfg.apply_b_dec_to_input:
        copied.b_enc -= copied.b_dec @ copied.W_enc
        copied.cfg.apply_b_dec_to_input = False
    copied.fold_W_dec_norm()
    return copied
