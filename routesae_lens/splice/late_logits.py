"""Logits made late: forwards end at what the unembedding reads, and logits follow in blocks.

A vocabulary is wide: the float32 logits of a batch can be larger than the language model, and to take, fill and
give back so much memory costs as much time as several blocks. What the unembedding reads is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from transformer_lens.components import Unembed
from transformer_lens.model_bridge.generalized_components import UnembeddingBridge

from routesae_lens.splice.prefix import shadowed

EVERY = slice(None)


class Logits:
    """Logits of one forward, whole or made block by block.

    Args:
        source: the logits themselves, or what the unembedding reads.
        weight, bias: of the unembedding, (vocab, d) and (vocab); None if ``source`` are the logits.
    """

    def __init__(
        self,
        source: Float[Tensor, "batch pos d"],
        weight: Float[Tensor, "vocab d"] | None = None,
        bias: Float[Tensor, " vocab"] | None = None,
    ):
        self.source, self.weight, self.bias = source, weight, bias

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def d_vocab(self) -> int:
        return self.source.shape[-1] if self.weight is None else len(self.weight)

    @property
    def late(self) -> bool:
        """Whether blocks are made when they are asked for."""
        return self.weight is not None

    def block(self, rows: slice, columns: slice = EVERY) -> Float[Tensor, "row column"]:
        """Logits of these positions of the flattened batch and these tokens of the vocabulary."""
        part = self.source.flatten(0, 1)[rows]
        if self.weight is None:
            return part[:, columns]
        return F.linear(part, self.weight[columns], None if self.bias is None else self.bias[columns])

    def whole(self) -> Float[Tensor, "batch pos vocab"]:
        """All of them, made once and kept."""
        if self.weight is not None:
            self.source = F.linear(self.source, self.weight, self.bias)
            self.weight = self.bias = None
        return self.source


class Unembedding:
    """The unembedding of a model, left out of forwards.

    It steps aside, and logits come whole as the model makes them, where leaving it out could change what is
    heard or computed: if anything listens on it, in models that work on its output (soft caps, scales), and
    where it is no plain linear map.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
    """

    def __init__(self, model: Any):
        proxy = isinstance(model, HookedProxyLM)
        module = getattr(model, "unembed", None)
        if proxy:
            module = getattr(model.model, "get_output_embeddings", lambda: None)()
        self.module: nn.Module | None = module
        self._around: list[nn.Module] = []
        """Modules whose hooks would see that logits are missing."""
        if module is not None:
            path = next((name for name, each in model.named_modules() if each is module), "")
            parts = path.split(".")
            outer = [".".join(parts[:n]) for n in range(len(parts))]
            self._around = [*map(model.get_submodule, outer), *module.modules()]
            self._around.append(getattr(model, "original_model", model))
            if proxy:  # (its hook points stand beside the modules)
                names = [name.removeprefix("model.") for name in (*outer, path)]
                self._around += [model.hook_dict[name] for name in names if name in model.hook_dict]

    @torch.no_grad()
    def logits(self, forward: Callable[[], Float[Tensor, "batch pos vocab"]]) -> Logits:
        """The logits that ``forward``, a forward of the model, returns.

        It is run a second time where the first one shows that the model works on what the unembedding gives;
        from then on logits come whole.
        """
        if self.module is None:
            return Logits(forward())
        read: list[Tensor] = []
        probe: list[Tensor] = []
        unembed = self.module.forward

        def last_position(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or x.ndim != 3 or any(map(_heard, self._around)):
                return unembed(x, *args, **kwargs)
            read.append(x)
            logits = unembed(x[-1:, -1:])
            probe.append(logits.clone())  # (a model may work on what it gets in place)
            return logits

        out = None
        try:
            with shadowed(self.module, last_position):
                out = forward()
        except Exception:
            if not read:  # else it may be about the shape, and is raised once more if it is not
                raise
        if out is not None and not read:
            return Logits(out)
        weights = _weights(self.module)
        if out is not None and weights is not None and len(read) == 1 and weights[0].device == read[0].device:
            late = Logits(read[0], *weights)
            made = F.linear(read[0][-1:, -1:], *weights)
            # (what the model returns is what its unembedding gave, and that is what we make of its weights)
            if _same(out, probe[0]) and _same(made, probe[0], 4 * torch.finfo(made.dtype).eps):
                return late
        self.module = None
        return Logits(forward())


def _weights(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight (vocab, d) and bias, without gradient, if that is all there is to the unembedding."""
    if isinstance(module, UnembeddingBridge):
        module = module.original_component
    if type(module) is Unembed:
        return module.W_U.T.detach(), module.b_U.detach()
    plain = type(module) is nn.Linear and type(module.weight.data) is Tensor  # (not quantised)
    if not plain or "forward" in module.__dict__:  # (nor patched)
        return None
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _same(a: Tensor, b: Tensor, tolerance: float = 0.0) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return torch.allclose(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def _heard(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    # (those that HookedProxyLM has on every module feed its hook points)
    return any(getattr(hook, "__module__", None) != HookedProxyLM.__module__ for hook in hooks)
