"""Running a model with RouteSAEs and Crosscoders attached: what both model classes of ``hooked.py`` share.

While one is attached, a forward pass is two: a *routing pass* up to the last layer that is read, with
RouteSAEs and Crosscoders bypassed (user hooks and ordinary SAEs stay on), and the *spliced pass*. There each
token's reconstruction replaces the stream, for a RouteSAE at the token's routed layer, for a Crosscoder at
every spliced layer, from the latents of the routing pass. Routes are constants for gradients, and so is what
a Crosscoder encodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import get_deep_attr
from torch import Tensor

from routesae_lens.saes.router import Route
from routesae_lens.splice.attach import Attaching, Exclude


class RouteSplicing(Attaching):
    """What both model classes share. Not for use alone."""

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
        """``run_with_hooks`` inside :meth:`saes`. Up to the last routed layer, hooks on the model fire in both
        passes; hooks on a RouteSAE's own points in the spliced pass only."""
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

        Raises:
            NotImplementedError: an argument with which the splice would be wrong (a KV cache, for instance).
            ValueError: the routing pass cannot see all layers that are read, or special tokens cannot be told.
        """
        parent: Any = super()
        if not self._attached:
            return parent.forward(input, **kwargs)
        self._check_forward(kwargs)
        tokens = None
        if any(attached.excluded for attached in self._attached.values()):
            tokens = self._token_ids(input, kwargs)
        read = self._routing_pass(input, kwargs)
        self.__dict__["_last_routes"] = {
            point: route for point, route in read.items() if isinstance(route, Route)
        }
        with ExitStack() as splicing:
            for point, attached in self._attached.items():
                splicing.enter_context(attached.splicing(read.pop(point), tokens))
            return parent.forward(input, **kwargs)

    @torch.no_grad()
    def _routing_pass(self, input: Any, kwargs: dict[str, Any]) -> dict[str, Route | Tensor]:
        """What each attached SAE needs of the clean stack. The pass stops after the last layer that is read."""
        parent: Any = super()
        stacks: dict[str, Tensor] = {}
        not_for_it = ("return_type", "loss_per_token", "labels", "stop_at_layer")
        options = {key: value for key, value in kwargs.items() if key not in not_for_it}
        last = max(attached.sae.layers[-1] for attached in self._attached.values())
        with ExitStack() as routing:
            for point, attached in self._attached.items():

                def keep(_module: Any, _args: Any, stack: Tensor, point: str = point) -> None:
                    stacks[point] = stack

                routing.callback(get_deep_attr(self, point).register_forward_hook(keep).remove)
                routing.enter_context(attached.bypassed())
            parent.forward(input, return_type=None, stop_at_layer=last + 1, **options)
        for point in self._attached:
            if point not in stacks:
                raise RuntimeError(
                    f"the routing pass ended before {point} fired, so tokens cannot be routed. Was it stopped "
                    "by a hook, or by run_with_cache(..., stop_at_layer=...) on a bridge?"
                )
        return {point: attached.read(stacks.pop(point)) for point, attached in self._attached.items()}

    def _check_forward(self, kwargs: dict[str, Any]) -> None:
        """Refuse arguments with which the splice would be wrong."""
        raise NotImplementedError

    def _token_ids(self, input: Any, kwargs: dict[str, Any]) -> Int[Tensor, "batch pos"] | None:
        """Token ids of what forward was given; None if it was given embeddings."""
        raise NotImplementedError
