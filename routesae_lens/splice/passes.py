"""The two passes of a forward with RouteSAEs or Crosscoders attached, as each backend can run them.

The *routing pass* sees the clean stream up to the last layer that is read, the *spliced pass* runs the whole
model. Below the first layer that is read they see the same: that prefix runs once.

With a KV cache each pass needs its own past: the spliced one that of the spliced stream, the routing pass
that of the clean one. The second is a *shadow cache*. It hangs on the cache that the caller holds, so that
both live equally long and are copied together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import utilities as tl_utilities
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformers import DynamicCache

from routesae_lens.splice.prefix import shadowed
from routesae_lens.splice.window import Window

_RECORD = "_routesae_lens_begun"


@dataclass
class Begun:
    """What a KV cache was begun with."""

    points: tuple[str, ...]
    """Multi-layer hook points of what was attached."""
    prompt: int
    """Positions of the pass that began it."""
    clean: Any
    """The shadow cache: keys and values of the clean stream, up to the last layer that is read."""


def begun(cache: Any) -> Begun | None:
    """What ``cache`` was begun with, None for a cache that saw no pass with anything attached or steered."""
    return None if cache is None else getattr(cache, _RECORD, None)


def check_cache(cache: Any, start: int, points: tuple[str, ...]) -> None:
    """Refuse a cache whose past does not belong to what is attached now.

    Raises:
        ValueError: its positions were computed with other SAEs attached, or by a pass that did not end.
    """
    record = begun(cache)
    before = record.points if record is not None else ()
    if len(lengths := _lengths(cache)) > 1:
        raise ValueError(
            f"this KV cache holds between {min(lengths)} and {max(lengths)} positions, not the same number in "
            "every layer: a pass was interrupted. Begin with an empty one."
        )
    if isinstance(cache, TransformerLensKeyValueCache):
        masked = cache.previous_attention_mask.shape[1]  # (0 where masks are not kept here, as in generate)
        if masked not in (0, start):
            raise ValueError(
                f"this KV cache holds {start} positions and a mask of {masked}: a pass was interrupted. Begin with "
                "an empty one."
            )
    if start and before != points:
        raise ValueError(
            f"this KV cache holds {start} positions that were computed with {_listed(before)} attached, and now "
            f"there is {_listed(points)}. Begin with an empty cache, or attach the same again."
        )
    if record is not None and record.clean is not None and (seen := max(_lengths(record.clean))) != start:
        raise ValueError(
            f"this KV cache holds {start} positions and its shadow for the routing pass {seen}: a pass was "
            "interrupted, or the cache was cut. Begin with an empty one."
        )


def check_unspliced(cache: Any) -> None:
    """Refuse a cache that was begun with something attached, now that nothing is."""
    record = begun(cache)
    if record is not None and record.points:
        raise ValueError(
            f"this KV cache was begun with {_listed(record.points)} attached, and now nothing is. Begin with an "
            "empty cache, or attach the same again."
        )


def check_attention(cache: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a cache with the state of recurrent layers, which a second pass would move on once more.

    Raises:
        NotImplementedError: the model has recurrent layers (Mamba, RecurrentGemma and their hybrids).
    """
    layers = getattr(cache, "layers", ())
    if kwargs.get("cache_params") is not None or not all(hasattr(one, "get_seq_length") for one in layers):
        raise NotImplementedError(
            "this model has recurrent layers, and what a cache holds of them cannot be shared by a routing and a "
            "spliced pass. Use generate(..., use_past_kv_cache=False); where that needs hf_generate (Mamba), call "
            "the model on the whole sequence for every token."
        )


def _listed(points: tuple[str, ...]) -> str:
    return ", ".join(points) or "no RouteSAE or Crosscoder"


def _lengths(cache: Any) -> set[int]:
    """How many positions the layers of a cache hold; one number unless a pass was interrupted."""
    if isinstance(cache, TransformerLensKeyValueCache):
        return {entry.past_keys.shape[1] for entry in cache.entries}
    return {layer.get_seq_length() for layer in cache.layers} or {0}


class HookedPasses:
    """On a HookedTransformer: embed once, then run ranges of blocks.

    Args:
        model: the HookedTransformer.
        forward: its forward without splices.
        input: text, tokens, or a residual stream (with ``start_at_layer``).
        kwargs: the other arguments of forward.
        layers: first and last layer that is read; None if nothing is attached.
        points: multi-layer hook points of what is attached.
        share: run the blocks below the first layer once.
        tokens: token ids of a residual stream, where the caller knows them.
        prompt: positions of the prompt by the number of positions so far.
        growing: whether the model is generating.
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[..., Any],
        input: Any,
        kwargs: dict[str, Any],
        *,
        layers: tuple[int, int] | None,
        points: tuple[str, ...],
        share: bool,
        tokens: Int[Tensor, "batch pos"] | None,
        prompt: Callable[[int, int], int],
        growing: bool,
    ):
        self.forward, self.layers, self.share = forward, layers, share
        kwargs = dict(kwargs)
        self.cache: TransformerLensKeyValueCache | None = kwargs.get("past_kv_cache")
        start = 0 if self.cache is None else self.cache[0].past_keys.shape[1]
        if self.cache is not None:
            check_cache(self.cache, start, points)
        start_at = kwargs.pop("start_at_layer", None)
        mask = kwargs.pop("attention_mask", None)
        shortformer = kwargs.pop("shortformer_pos_embed", None)
        if start_at is None:
            sides = {key: kwargs[key] for key in ("prepend_bos", "padding_side") if key in kwargs}
            with tl_utilities.LocallyOverridenDefaults(model, **sides):
                self.residual, tokens, shortformer, mask = model.input_to_embed(
                    input, **sides, attention_mask=mask, past_kv_cache=self.cache
                )
                known = mask
                if mask is None and isinstance(input, list) and len(input) > 1:
                    # Padding that comes last needs no mask in attention, but it is no text either.
                    known = tl_utilities.get_attention_mask(
                        model.tokenizer, tokens, model.cfg.default_prepend_bos
                    )
            start_at = 0
        else:
            self.residual, known = input, mask
        self.start_at = start_at + len(model.blocks) if start_at < 0 else start_at
        self.outer = {key: kwargs.pop(key, None) for key in ("return_type", "loss_per_token")}
        self.stop_at = kwargs.pop("stop_at_layer", None)
        kwargs.pop("tokens", None)
        kwargs.pop("past_kv_cache", None)
        self.options = kwargs | {"attention_mask": mask, "shortformer_pos_embed": shortformer}
        self.tokens = tokens
        batch, length = self.residual.shape[:2]
        whole = known is not None and known.ndim == 2 and known.shape[1] == start + length
        self.window = Window(
            batch=batch,
            length=length,
            start=start,
            prompt=prompt(start, start + length),
            growing=growing or self.cache is not None,
            device=self.residual.device,
            tokens=None if tokens is None else tokens[:, -length:],
            mask=known.bool() if known is not None and whole else None,
        )
        if self.cache is not None and (not start or begun(self.cache) is None):
            clean = None
            if layers is not None:
                entry = TransformerLensKeyValueCacheEntry.init_cache_entry
                clean = TransformerLensKeyValueCache(
                    [entry(model.cfg, each.past_keys.device, batch) for each in self.cache.entries],
                    previous_attention_mask=self.cache.previous_attention_mask[:, :0],
                )
            setattr(self.cache, _RECORD, Begun(points, self.window.prompt, clean))

    @torch.no_grad()
    def _blocks(self, x: Tensor, start: int, stop: int, cache: Any) -> Tensor:
        return self.forward(
            x, start_at_layer=start, stop_at_layer=stop, past_kv_cache=cache, return_type=None, **self.options
        )

    def prefix(self) -> None:
        """The blocks below the first layer that is read, for both passes (with their gradients)."""
        assert self.layers is not None
        first = self.layers[0]
        if self.share and first > self.start_at:
            self.residual = self.forward(
                self.residual,
                start_at_layer=self.start_at,
                stop_at_layer=first,
                past_kv_cache=self.cache,
                return_type=None,
                **self.options,
            )
            self.start_at = first

    def routing(self) -> None:
        """The clean pass up to the last layer that is read."""
        assert self.layers is not None
        record = begun(self.cache)
        clean = None if record is None else record.clean
        below = []
        if clean is not None:
            assert self.cache is not None
            for entry in clean.entries:
                entry.frozen = self.cache.frozen
            # Below the first layer there is one past for both. It is lent here, and grows in the spliced pass.
            below = clean.entries[: self.layers[0]]
            clean.entries[: len(below)] = [copy.copy(entry) for entry in self.cache.entries[: len(below)]]
        try:
            self._blocks(self.residual, self.start_at, self.layers[1] + 1, clean)
        finally:
            if clean is not None:
                clean.entries[: len(below)] = below

    def spliced(self) -> Any:
        """The pass whose result the caller gets."""
        return self.forward(
            self.residual,
            start_at_layer=self.start_at,
            stop_at_layer=self.stop_at,
            past_kv_cache=self.cache,
            tokens=self.tokens,
            **self.outer,
            **self.options,
        )


class BridgePasses:
    """On a TransformerBridge: Hugging Face's forward, stopped by an exception, with the shared blocks skipped.

    Args: as of :class:`HookedPasses`.
    """

    def __init__(
        self,
        model: Any,
        forward: Callable[..., Any],
        input: Any,
        kwargs: dict[str, Any],
        *,
        layers: tuple[int, int] | None,
        points: tuple[str, ...],
        share: bool,
        tokens: Int[Tensor, "batch pos"] | None,
        mask: Tensor | None,
        prompt: Callable[[int, int], int],
        growing: bool,
    ):
        self.model, self.forward, self.input, self.layers = model, forward, input, layers
        # A block that is skipped gives what it gave before, without its graph.
        self.share = share and not torch.is_grad_enabled()
        kwargs = dict(kwargs)
        cached = kwargs.pop("use_past_kv_cache", False) or kwargs.get("use_cache", False)
        self.cache = kwargs.pop("past_key_values", None)
        if self.cache is None and cached:
            self.cache = self._new_cache()  # as the model would make it, but known here
        check_attention(self.cache, kwargs)
        start = 0 if self.cache is None else self.cache.get_seq_length()
        if self.cache is not None:
            kwargs["use_cache"] = True
            if layers is not None and not isinstance(self.cache, DynamicCache):
                raise ValueError(
                    f"past_key_values is a {type(self.cache).__name__}; with a RouteSAE or Crosscoder attached "
                    "expected a transformers.DynamicCache (or use_cache=True, which makes one)"
                )
            if layers is not None and not self.cache.layers:
                # Made without the model's config, it would get layers as they run, and skipped ones never do.
                self.cache.layers = self._new_cache().layers
            check_cache(self.cache, start, points)
        self.kwargs = kwargs
        shape = input.shape[:2] if tokens is None else tokens.shape
        batch, length = int(shape[0]), int(shape[1])
        whole = mask is not None and mask.ndim == 2 and mask.shape[1] == start + length
        self.window = Window(
            batch=batch,
            length=length,
            start=start,
            prompt=prompt(start, start + length),
            growing=growing or self.cache is not None,
            device=next(model.parameters()).device,
            tokens=tokens,
            mask=mask.bool() if mask is not None and whole else None,
        )
        if self.cache is not None and (not start or begun(self.cache) is None):
            clean = None if layers is None else self._new_cache()
            setattr(self.cache, _RECORD, Begun(points, self.window.prompt, clean))
        self._outputs: list[Any] = []

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.original_model.config.get_text_config(decoder=True))

    def prefix(self) -> None:
        """Nothing: what the shared blocks give is kept in the routing pass."""

    @torch.no_grad()
    def routing(self) -> None:
        """The clean pass up to the last layer that is read."""
        assert self.layers is not None
        first, last = self.layers
        record = begun(self.cache)
        not_for_it = ("return_type", "loss_per_token", "labels", "stop_at_layer")
        options = {key: value for key, value in self.kwargs.items() if key not in not_for_it}
        self._outputs.clear()
        with ExitStack() as listening:
            if self.share:
                for block in self.model.blocks[:first]:
                    handle = block.register_forward_hook(lambda _m, _a, out: self._outputs.append(out))
                    listening.callback(handle.remove)
            if record is not None:
                options["past_key_values"] = record.clean
            self.forward(self.input, return_type=None, stop_at_layer=last + 1, **options)

    def spliced(self) -> Any:
        """The pass whose result the caller gets."""
        with self._skipping():
            if self.cache is None:
                return self.forward(self.input, **self.kwargs)
            return self.forward(self.input, past_key_values=self.cache, **self.kwargs)

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Let the blocks that the routing pass has run give what they gave, keys and values included."""
        record = begun(self.cache)
        outputs, self._outputs = self._outputs, []

        def skip(index: int) -> Callable[..., Any]:
            def forward(*_args: Any, **_kwargs: Any) -> Any:
                if record is not None:
                    # A layer of a cache replaces its tensors when it grows, so the two can share them.
                    assert self.cache is not None
                    self.cache.layers[index] = copy.copy(record.clean.layers[index])
                return outputs[index]

            return forward

        with ExitStack() as skipping:
            for index, block in enumerate(self.model.blocks[: len(outputs)]):
                skipping.enter_context(shadowed(block, skip(index)))
            yield
