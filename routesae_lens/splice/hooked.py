"""SAELens' two model classes, able to carry RouteSAEs and Crosscoders beside ordinary SAEs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer, set_deep_attr
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from routesae_lens.splice.attach import Exclude
from routesae_lens.splice.layer_view import StackSplice
from routesae_lens.splice.running import RouteSplicing


class HookedRouteSAETransformer(RouteSplicing, HookedSAETransformer):
    """SAELens' HookedSAETransformer with RouteSAEs and Crosscoders.

    ``generate`` works with ``use_past_kv_cache=False``: it runs both passes over the whole sequence for
    every new token. Source: SAELens ``analysis/hooked_sae_transformer.py``.
    """

    def __init__(self, *model_args: Any, **model_kwargs: Any):
        super().__init__(*model_args, **model_kwargs)
        _hook_mlp_inputs(self)

    @classmethod
    def from_model(cls, model: HookedTransformer) -> HookedRouteSAETransformer:
        """Turn a HookedTransformer or HookedSAETransformer into this class, in place, and return it.

        Raises:
            TypeError: another class, whose own methods would be lost.
        """
        if type(model) not in (HookedTransformer, HookedSAETransformer, cls):
            raise TypeError(
                f"expected a HookedTransformer or HookedSAETransformer, got {type(model).__name__}"
            )
        model.__class__ = cls
        assert isinstance(model, cls)
        model.__dict__.setdefault("_acts_to_saes", {})
        model.__dict__.setdefault("_transcoder_output_hooks", {})
        _hook_mlp_inputs(model)
        return model

    def forward(
        self, input: Any, return_type: str | None = "logits", loss_per_token: bool = False, **kwargs: Any
    ) -> Any:
        """As :meth:`RouteSplicing.forward`."""
        return super().forward(input, return_type=return_type, loss_per_token=loss_per_token, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """HookedTransformer.generate; with a RouteSAE or Crosscoder attached, ``use_past_kv_cache`` must be False.

        Raises:
            NotImplementedError: a RouteSAE or Crosscoder is attached and the KV cache is on (its default).
        """
        if not self._attached:
            return super().generate(*args, **kwargs)
        # It hands embeddings to forward, so the ids of special tokens are caught where they are embedded.
        seen = self.__dict__["_embedded_tokens"] = []
        handle = self.embed.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        try:
            return super().generate(*args, **kwargs)
        finally:
            handle.remove()
            del self.__dict__["_embedded_tokens"]

    def generate_stream(self, *args: Any, **kwargs: Any) -> Any:
        """HookedTransformer.generate_stream; a NotImplementedError while a RouteSAE or Crosscoder is attached."""
        if self._attached:
            raise NotImplementedError(
                "generate_stream with a RouteSAE or Crosscoder attached; use generate(..., use_past_kv_cache=False)"
            )
        return super().generate_stream(*args, **kwargs)

    def _path(self, hook_name: str) -> str:
        return hook_name

    def _put(self, path: str, module: HookPoint | StackSplice) -> None:
        set_deep_attr(self, path, module)
        self.setup()

    def _ordinary_options(self, exclude: Exclude) -> dict[str, Any]:
        return {"exclude_special_tokens": False if exclude is None else exclude}

    def _check_forward(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_kv_cache") is not None:
            raise NotImplementedError(
                "a KV cache with a RouteSAE or Crosscoder attached: the cache would hold spliced keys and values, "
                "and the routing pass needs clean ones. Use generate(..., use_past_kv_cache=False), or run the "
                "whole sequence without past_kv_cache."
            )
        first = min(attached.sae.layers[0] for attached in self._attached.values())
        start = kwargs.get("start_at_layer") or 0
        start = start + self.cfg.n_layers if start < 0 else start
        if start > first:
            raise ValueError(
                f"start_at_layer={start} is after layer {first}, the first that a RouteSAE or Crosscoder reads"
            )

    def _token_ids(self, input: Any, kwargs: dict[str, Any]) -> Int[Tensor, "batch pos"] | None:
        if kwargs.get("start_at_layer") is None:
            if not isinstance(input, Tensor):
                sides = {key: kwargs[key] for key in ("prepend_bos", "padding_side") if key in kwargs}
                input = self.to_tokens(input, **sides)
            return torch.atleast_2d(input)
        if kwargs.get("tokens") is not None:
            return kwargs["tokens"]
        seen = self.__dict__.get("_embedded_tokens")
        if not seen:
            return None
        tokens = torch.cat(seen, dim=1)
        # (generate can also be given embeddings; then only what it generated itself was seen.)
        return tokens if tokens.shape == input.shape[:2] else None


def _hook_mlp_inputs(model: HookedSAETransformer) -> None:
    """Give every MLP the ``hook_in`` that HookedSAETransformer gives it.

    SAELens does it with a closure over the MLP, which makes a deep copy of the model run the original's
    MLPs; what is bound here is copied along.
    """
    for block in model.blocks:
        mlp: Any = getattr(block, "mlp", None)
        if mlp is not None:
            mlp.hook_in = getattr(mlp, "hook_in", None) or HookPoint()
            mlp.forward = partial(_mlp_forward, mlp)
    model.setup()


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    return type(mlp).forward(mlp, mlp.hook_in(x))


class RouteSAETransformerBridge(RouteSplicing, SAETransformerBridge):
    """SAELens' SAETransformerBridge with RouteSAEs and Crosscoders.

    While one is attached, generation, a KV cache and ``start_at_layer``/``stop_at_layer`` are refused.
    Source: SAELens ``analysis/sae_transformer_bridge.py``.
    """

    @classmethod
    def from_model(cls, model: TransformerBridge) -> RouteSAETransformerBridge:
        """Turn a TransformerBridge or SAETransformerBridge into this class, in place, and return it.

        Raises:
            TypeError: another class, whose own methods would be lost.
        """
        if type(model) not in (TransformerBridge, SAETransformerBridge, cls):
            raise TypeError(
                f"expected a TransformerBridge or SAETransformerBridge, got {type(model).__name__}"
            )
        model.__class__ = cls
        assert isinstance(model, cls)
        model.__dict__.setdefault("_acts_to_saes", {})
        model.__dict__.setdefault("_transcoder_output_hooks", {})
        return model

    def forward(
        self, input: Any, return_type: str | None = "logits", loss_per_token: bool = False, **kwargs: Any
    ) -> Any:
        """As :meth:`RouteSplicing.forward`."""
        return super().forward(input, return_type=return_type, loss_per_token=loss_per_token, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerBridge.generate; a NotImplementedError while a RouteSAE or Crosscoder is attached."""
        self._refuse_generation("generate")
        return super().generate(*args, **kwargs)

    def generate_stream(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerBridge.generate_stream; a NotImplementedError while a RouteSAE or Crosscoder is attached."""
        self._refuse_generation("generate_stream")
        return super().generate_stream(*args, **kwargs)

    def hf_generate(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerBridge.hf_generate; a NotImplementedError while a RouteSAE or Crosscoder is attached."""
        self._refuse_generation("hf_generate")
        return super().hf_generate(*args, **kwargs)

    def diffusion_generate(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerBridge.diffusion_generate; a NotImplementedError while a RouteSAE or Crosscoder is attached."""
        self._refuse_generation("diffusion_generate")
        return super().diffusion_generate(*args, **kwargs)

    def _refuse_generation(self, method: str) -> None:
        if self._attached:
            raise NotImplementedError(
                f"{method} on a bridge with a RouteSAE or Crosscoder attached. Call the model on the whole sequence "
                "for every new token, or use HookedRouteSAETransformer.generate(..., use_past_kv_cache=False)."
            )

    def _path(self, hook_name: str) -> str:
        return self._resolve_hook_name(hook_name)

    def _put(self, path: str, module: HookPoint | StackSplice) -> None:
        registry: dict[str, Any] = self._hook_registry
        for name in [name for name in registry if name.startswith(f"{path}.")]:
            del registry[name]
        set_deep_attr(self, path, module)
        registry[path] = module
        for name, hook in module.named_modules():
            if isinstance(hook, HookPoint):
                hook.name = f"{path}.{name}" if name else path
                registry[hook.name] = hook

    def _ordinary_options(self, exclude: Exclude) -> dict[str, Any]:
        if exclude is None or exclude is False:
            return {}
        raise TypeError(
            "SAETransformerBridge has no exclude_special_tokens for ordinary SAEs, only for RouteSAEs and "
            "Crosscoders"
        )

    def _check_forward(self, kwargs: dict[str, Any]) -> None:
        given = [
            key
            for key in ("start_at_layer", "stop_at_layer", "past_key_values")
            if kwargs.get(key) is not None
        ]
        given += [key for key in ("use_cache", "use_past_kv_cache") if kwargs.get(key)]
        if given:
            raise NotImplementedError(
                f"{', '.join(given)} on a bridge with a RouteSAE or Crosscoder attached: the routing pass has to "
                "run from the embeddings through all layers that are read. Run the whole sequence; to stop early use "
                "HookedRouteSAETransformer, or run_with_cache(..., names_filter=...)."
            )

    def _token_ids(self, input: Any, kwargs: dict[str, Any]) -> Int[Tensor, "batch pos"] | None:
        if isinstance(input, Tensor):
            return None if input.is_floating_point() else torch.atleast_2d(input)
        return self.to_tokens(
            input, prepend_bos=kwargs.get("prepend_bos"), padding_side=kwargs.get("padding_side")
        )
