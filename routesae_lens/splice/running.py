"""Running a model with RouteSAEs and Crosscoders attached: what both model classes of ``hooked.py`` share.

While one is attached, a forward pass is two: a *routing pass* up to the last layer that is read, with
RouteSAEs and Crosscoders bypassed (user hooks and ordinary SAEs stay on), and the *spliced pass*. There each
token's reconstruction replaces the stream, for a RouteSAE at the token's routed layer, for a Crosscoder at
every spliced layer, from the latents of the routing pass. Routes are constants for gradients, and so is what
a Crosscoder encodes. Blocks below the first layer that is read run once for both (``passes.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import get_deep_attr
from torch import Tensor

from routesae_lens.backends import backend_of
from routesae_lens.saes.router import Route
from routesae_lens.splice.attach import Attaching, Exclude
from routesae_lens.splice.passes import BridgePasses, HookedPasses, begun, check_unspliced
from routesae_lens.splice.window import Window


@dataclass
class Generation:
    """A running ``generate``."""

    max_new_tokens: int
    prompt: int | None = None
    """Positions of the prompt, known with the first pass."""

    def __post_init__(self) -> None:
        n = self.max_new_tokens
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
            raise ValueError(f"max_new_tokens must be a whole number of 1 or more, got {n!r}")


class RouteSplicing(Attaching):
    """What both model classes share. Not for use alone."""

    share_prefix: bool = True
    """Whether the blocks below the first layer that is read run once for both passes. (On a bridge never
    while gradients are on.) Off, hooks there fire in both passes; the results are the same."""

    @property
    def last_routes(self) -> dict[str, Route]:
        """Routes of the last forward pass, by the name that :attr:`route_saes` gives each RouteSAE.

        They stay readable after the RouteSAE is detached, until the next pass with something attached.
        """
        return self.__dict__.get("_last_routes", {})

    def run_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        splice_layers: Sequence[int] | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass inside :meth:`saes`."""
        with self.saes(
            saes, reset_saes_end, use_error_term, exclude_special_tokens, scale_by_p, splice_layers
        ) as model:
            return model(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        splice_layers: Sequence[int] | None = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``run_with_cache`` inside :meth:`saes`; the cache is that of the spliced pass."""
        with self.saes(
            saes, reset_saes_end, use_error_term, exclude_special_tokens, scale_by_p, splice_layers
        ) as model:
            return model.run_with_cache(
                *model_args,
                return_cache_object=return_cache_object,
                remove_batch_dim=remove_batch_dim,
                **kwargs,
            )

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        splice_layers: Sequence[int] | None = None,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        bwd_hooks: Sequence[tuple[Any, Any]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` inside :meth:`saes`. From the first layer that is read to the last, hooks on the
        model fire in both passes; hooks on a RouteSAE's own points in the spliced pass only."""
        with self.saes(
            saes, reset_saes_end, use_error_term, exclude_special_tokens, scale_by_p, splice_layers
        ) as model:
            return model.run_with_hooks(
                *model_args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **model_kwargs,
            )

    def forward(self, input: Any, **kwargs: Any) -> Any:
        """The model's forward pass; with RouteSAEs or Crosscoders attached, a routing and the spliced pass.

        With a KV cache (begun empty, with the same attached from its first pass on) the routing pass has
        one of its own, of the clean stream: ``2 * layers * n_key_value_heads * d_head`` numbers per token,
        with the layers from the first to the last that is read.

        Raises:
            NotImplementedError: an argument with which the splice would be wrong.
            ValueError: the routing pass cannot see all layers that are read, special tokens cannot be told,
                the cache holds positions of another splice, or the sequence exceeds the model's context.
        """
        parent: Any = super()
        if not (self._attached or self._steerings):
            check_unspliced(kwargs.get("past_kv_cache", kwargs.get("past_key_values")))
            return parent.forward(input, **kwargs)
        layers = None
        if self._attached:
            all_read = [attached.sae.layers for attached in self._attached.values()]
            layers = min(each[0] for each in all_read), max(each[-1] for each in all_read)
        self._check_forward(kwargs, layers)
        passes = self._passes(parent.forward, input, kwargs, layers)
        self._check_length(passes.window)
        with ExitStack() as splicing:
            self.__dict__["_window"] = passes.window
            splicing.callback(self.__dict__.pop, "_window")
            if layers is not None:
                passes.prefix()
                read = self._routing_pass(passes)
                self.__dict__["_last_routes"] = {
                    point: route for point, route in read.items() if isinstance(route, Route)
                }
                for point, attached in self._attached.items():
                    splicing.enter_context(attached.splicing(read.pop(point), passes.window))
            return passes.spliced()

    @torch.no_grad()
    def _routing_pass(self, passes: HookedPasses | BridgePasses) -> dict[str, Route | Tensor]:
        """What each attached SAE needs of the clean stack."""
        stacks: dict[str, Tensor] = {}
        with ExitStack() as routing:
            for point, attached in self._attached.items():

                def keep(_module: Any, _args: Any, stack: Tensor, point: str = point) -> None:
                    stacks[point] = stack

                routing.callback(get_deep_attr(self, point).register_forward_hook(keep).remove)
                routing.enter_context(attached.bypassed())
            passes.routing()
        for point in self._attached:
            if point not in stacks:
                raise RuntimeError(
                    f"the routing pass ended before {point} fired, so tokens cannot be routed. Was it stopped "
                    "by a hook, or by run_with_cache(..., stop_at_layer=...) on a bridge?"
                )
            broken = torch.isnan(stacks[point]).any(-1) & passes.window.real.to(stacks[point].device)
            if broken.any():
                raise ValueError(
                    f"{int(broken.sum())} tokens have NaN activations in the model's own stream at {point}, so they "
                    "cannot be routed. (A TransformerBridge in float64 gives NaN for padded batches: use float32, "
                    "HookedRouteSAETransformer, or one prompt at a time.)"
                )
        return {
            point: attached.read(stacks.pop(point), passes.window)
            for point, attached in self._attached.items()
        }

    def _check_length(self, window: Window) -> None:
        """Refuse an empty sequence, and one that the model has no positions for, now or when all is generated."""
        if not window.batch or not window.length:
            raise ValueError(
                f"got {window.batch} sequences of {window.length} tokens; expected at least one of each"
            )
        context = getattr(self.cfg, "n_ctx", None)  # type: ignore[attr-defined]
        length, running = window.start + window.length, self._generation
        if context is None:
            return
        if length > context:
            raise ValueError(
                f"the sequence has {length} positions (padding included), and the model's context is {context}"
            )
        if running is not None and (needed := window.prompt + running.max_new_tokens - 1) > context:
            raise ValueError(
                f"a prompt of {window.prompt} tokens and max_new_tokens={running.max_new_tokens} need {needed} "
                f"positions, and the model's context is {context}: generate at most "
                f"{context - window.prompt + 1} tokens"
            )

    # --- generation --------------------------------------------------------------------------------

    @property
    def _generation(self) -> Generation | None:
        return self.__dict__.get("_running_generation")

    @contextmanager
    def _generating(self, generation: Generation) -> Iterator[None]:
        before = self._generation
        self.__dict__["_running_generation"] = generation
        try:
            yield
        finally:
            self.__dict__["_running_generation"] = before

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``generate``, every token routed (and steered) as a pass over the whole would do it.

        With or without the KV cache the same tokens come out: exactly in float64, and in float32 as long
        as no two logits or routes are within rounding of each other.

        Raises:
            ValueError: ``max_new_tokens`` is no whole number of 1 or more, the prompt is empty, both exceed
                the model's context; as :meth:`forward`.
        """
        parent: Any = super()
        if not (self._attached or self._steerings):
            return parent.generate(*args, **kwargs)
        given = arguments(parent.generate, *args, **kwargs)
        with self._generating(Generation(given["max_new_tokens"])):
            return parent.generate(*args, **kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The model's own ``generate_stream``; as :meth:`generate`.

        What is attached or steered must stay so until the last token has come.
        """
        parent: Any = super()
        stream = parent.generate_stream(*args, **kwargs)
        if not (self._attached or self._steerings):
            return stream
        given = arguments(parent.generate_stream, *args, **kwargs)
        return self._streamed(stream, Generation(given["max_new_tokens"]), self._spliced_with())

    def _streamed(self, stream: Any, generation: Generation, begun_with: tuple[Any, ...]) -> Iterator[Any]:
        while True:
            if self._spliced_with() != begun_with:
                raise RuntimeError(
                    "what is attached or steered changed while generate_stream was running; take all its "
                    "tokens inside the with block"
                )
            with self._generating(generation):  # other calls of the model may come between two tokens
                try:
                    tokens = next(stream)
                except StopIteration:
                    return
            yield tokens

    def _spliced_with(self) -> tuple[Any, ...]:
        return (*self._attached, *map(id, self._steerings))

    def _prompt(self, cache: Any) -> Callable[[int, int], int]:
        """Positions of the prompt, given those before the pass and those after it."""

        def prompt(start: int, total: int) -> int:
            running = self._generation
            if running is not None:
                running.prompt = running.prompt or total
                return running.prompt
            record = begun(cache)
            return record.prompt if record is not None else start or total

        return prompt

    def _sharing(self) -> bool:
        """Whether the prefix can run once: not if another multi-layer hook point would hear it half."""
        points = backend_of(self).points()
        return self.share_prefix and not any(
            point.listening for name, point in points.items() if name not in self._attached
        )

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``run_with_hooks``.

        Raises:
            ValueError: backward hooks while gradients are off and something is attached: they would not fire.
        """
        self._check_gradients(bool(kwargs.get("bwd_hooks")), "bwd_hooks")
        parent: Any = super()
        return parent.run_with_hooks(*args, **kwargs)

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own ``run_with_cache``; the cache is that of the spliced pass.

        Raises:
            ValueError: ``incl_bwd`` while gradients are off and something is attached.
        """
        self._check_gradients(bool(kwargs.get("incl_bwd")), "incl_bwd=True")
        parent: Any = super()
        return parent.run_with_cache(*args, **kwargs)

    def _check_gradients(self, wanted: bool, argument: str) -> None:
        if wanted and (self._attached or self._steerings) and not torch.is_grad_enabled():
            raise ValueError(
                f"{argument} needs gradients, and they are off (torch.no_grad or inference_mode): no backward "
                "hook would fire"
            )

    # --- where the two model classes differ --------------------------------------------------------

    @property
    def _steerings(self) -> list[Any]:
        # Made on demand, as _attached is.
        return self.__dict__.setdefault("_running_steerings", [])

    def _check_forward(self, kwargs: dict[str, Any], layers: tuple[int, int] | None) -> None:
        """Refuse arguments with which the splice would be wrong."""
        raise NotImplementedError

    def _passes(
        self, forward: Callable[..., Any], input: Any, kwargs: dict[str, Any], layers: tuple[int, int] | None
    ) -> HookedPasses | BridgePasses:
        """The passes of this forward, ``layers`` the first and the last that is read."""
        raise NotImplementedError


def arguments(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What each parameter of ``function`` gets in a call, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
