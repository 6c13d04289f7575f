"""SAELens' two model classes, able to carry RouteSAEs and Crosscoders beside ordinary SAEs."""

from __future__ import annotations

from collections.abc import Callable
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
from transformer_lens.utilities import get_attention_mask

from routesae_lens.splice.attach import Exclude
from routesae_lens.splice.layer_view import StackSplice
from routesae_lens.splice.passes import BridgePasses, HookedPasses
from routesae_lens.splice.running import arguments
from routesae_lens.splice.steering import Steering


class HookedRouteSAETransformer(Steering, HookedSAETransformer):
    """SAELens' HookedSAETransformer with RouteSAEs and Crosscoders.

    Source: SAELens ``analysis/hooked_sae_transformer.py``.
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
        """HookedTransformer.generate, as :meth:`RouteSplicing.generate`.

        Raises:
            NotImplementedError: with a KV cache on a model that adds position embeddings, without attention
                mask (no tokenizer, or embeddings as input): HookedTransformer would count the cached
                positions twice.
        """
        given = arguments(HookedTransformer.generate, self, *args, **kwargs)
        embeddings = isinstance(given["input"], Tensor) and given["input"].is_floating_point()
        adds_positions = self.cfg.positional_embedding_type in ("standard", "shortformer")
        if (
            (self._attached or self._steerings)
            and given["use_past_kv_cache"]
            and adds_positions
            and (embeddings or self.tokenizer is None)
        ):
            raise NotImplementedError(
                "HookedTransformer.generate with a KV cache counts positions wrongly for a model that adds "
                "position embeddings, if there is no attention mask (no tokenizer, or embeddings as input). Use "
                "use_past_kv_cache=False, or token ids and a model with a tokenizer."
            )
        # It hands embeddings to forward, so the token ids are caught where they are embedded.
        seen = self.__dict__["_embedded_tokens"] = []
        handle = self.embed.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        try:
            return super().generate(*args, **kwargs)
        finally:
            handle.remove()
            del self.__dict__["_embedded_tokens"]

    def _path(self, hook_name: str) -> str:
        return hook_name

    def _put(self, path: str, module: HookPoint | StackSplice) -> None:
        set_deep_attr(self, path, module)
        self.setup()

    def _ordinary_options(self, exclude: Exclude) -> dict[str, Any]:
        return {"exclude_special_tokens": False if exclude is None else exclude}

    def _check_forward(self, kwargs: dict[str, Any], layers: tuple[int, int] | None) -> None:
        if layers is None:
            return
        first, n_layers = layers[0], self.cfg.n_layers
        start, stop = kwargs.get("start_at_layer") or 0, kwargs.get("stop_at_layer")
        start = start + n_layers if start < 0 else start
        if start > first:
            raise ValueError(
                f"start_at_layer={start} is after layer {first}, the first that a RouteSAE or Crosscoder reads"
            )
        if stop is None:
            return
        stop = stop + n_layers if stop < 0 else stop
        if kwargs.get("past_kv_cache") is not None:
            raise ValueError(
                f"stop_at_layer={stop} with a KV cache and a RouteSAE or Crosscoder attached would leave the cache "
                "incomplete. Stop without past_kv_cache, or detach with reset_saes()."
            )
        if stop <= first:
            raise ValueError(
                f"stop_at_layer={stop} ends the pass before layer {first}, the first where a RouteSAE or "
                "Crosscoder is attached. Stop later, or detach it with reset_saes()."
            )

    def _passes(
        self, forward: Callable[..., Any], input: Any, kwargs: dict[str, Any], layers: tuple[int, int] | None
    ) -> HookedPasses:
        return HookedPasses(
            self,
            forward,
            input,
            kwargs | self._stream_mask(input, kwargs),
            layers=layers,
            points=tuple(self._attached),
            share=self._sharing(),
            tokens=self._embedded_ids(input, kwargs),
            prompt=self._prompt(kwargs.get("past_kv_cache")),
            growing=self._generation is not None,
        )

    def _stream_mask(self, input: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The attention mask of a pass of generate_stream, which gives token ids and no mask.

        Left alone, HookedTransformer would take a generated token for padding when it has the id of one.
        """
        running, cache = self._generation, kwargs.get("past_kv_cache")
        if running is None or kwargs.get("start_at_layer") is not None or not isinstance(input, Tensor):
            return {}
        start = 0 if cache is None else cache[0].past_keys.shape[1]
        ones = torch.ones(input.shape, dtype=torch.long, device=input.device)
        if not start and self.tokenizer is not None and self.tokenizer.padding_side == "left":
            prompt = input[:, : running.prompt]
            bos = kwargs.get("prepend_bos")
            bos = self.cfg.default_prepend_bos if bos is None else bos
            ones[:, : running.prompt] = get_attention_mask(self.tokenizer, prompt, bos)
        return {"attention_mask": ones}

    def _token_masks(self, input: Any, kwargs: dict[str, Any]) -> Any:
        """SAELens' bypass of special tokens at ordinary SAEs, by the token ids where it sees a stream only."""
        if kwargs.get("start_at_layer") is None:
            return super()._token_masks(input, kwargs)
        window = self.__dict__.get("_window")
        tokens = self._embedded_ids(input, kwargs) if window is None else window.tokens
        bypassing = [
            name for name, on in self._saes_by_hook.items() if on.exclude_special_tokens is not False
        ]
        if tokens is None and bypassing:
            raise ValueError(
                f"the SAEs at {', '.join(bypassing)} leave special tokens alone, but the model was given embeddings, "
                "not token ids. Give token ids (forward also takes tokens=...), or attach with "
                "exclude_special_tokens=False."
            )
        return super()._token_masks(tokens if tokens is not None else input, kwargs)

    def _embedded_ids(self, input: Any, kwargs: dict[str, Any]) -> Int[Tensor, "batch pos"] | None:
        """Token ids of a residual stream, where they are known."""
        if kwargs.get("start_at_layer") is None:
            return None
        if kwargs.get("tokens") is not None:
            return kwargs["tokens"]
        seen = self.__dict__.get("_embedded_tokens")
        if not seen:
            return None
        tokens = torch.cat(seen, dim=1)[:, -input.shape[1] :]
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


class RouteSAETransformerBridge(Steering, SAETransformerBridge):
    """SAELens' SAETransformerBridge with RouteSAEs and Crosscoders.

    While one is attached, ``start_at_layer``, ``stop_at_layer``, ``hf_generate`` and ``diffusion_generate``
    are refused. Source: SAELens ``analysis/sae_transformer_bridge.py``.
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

    def hf_generate(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerBridge.hf_generate; a NotImplementedError while something is attached or steered."""
        self._refuse_generation("hf_generate")
        return super().hf_generate(*args, **kwargs)

    def diffusion_generate(self, *args: Any, **kwargs: Any) -> Any:
        """TransformerBridge.diffusion_generate; a NotImplementedError while something is attached or steered."""
        self._refuse_generation("diffusion_generate")
        return super().diffusion_generate(*args, **kwargs)

    def _refuse_generation(self, method: str) -> None:
        if self._attached or self._steerings:
            raise NotImplementedError(
                f"{method} does not go through the model's forward, so nothing would be routed or steered; use "
                "generate or generate_stream"
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

    # SAEs stand where hook points were, and the bridge takes them for hook points when it resets.

    def hook_points(self) -> list[HookPoint]:
        """All registered hook points."""
        return [point for point in super().hook_points() if isinstance(point, HookPoint)]

    def clear_contexts(self) -> None:
        """Clear the stored ``ctx`` on every hook point."""
        for point in self.hook_points():
            point.clear_context()

    def remove_all_hook_fns(
        self, direction: Any = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hook functions from every hook point."""
        for point in self.hook_points():
            point.remove_hooks(dir=direction, including_permanent=including_permanent, level=level)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Any = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks; SAEs stay attached, and steering goes on unless ``including_permanent``."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent=including_permanent, level=level)
        for point in self.modules():  # those that are not registered
            if isinstance(point, HookPoint):
                point.remove_hooks(dir=direction, including_permanent=including_permanent, level=level)

    def _check_forward(self, kwargs: dict[str, Any], layers: tuple[int, int] | None) -> None:
        given = [key for key in ("start_at_layer", "stop_at_layer") if kwargs.get(key) is not None]
        if given and layers is not None:
            raise NotImplementedError(
                f"{', '.join(given)} on a bridge with a RouteSAE or Crosscoder attached: the routing pass has to "
                "run from the embeddings through all layers that are read. Run the whole sequence; to stop early use "
                "HookedRouteSAETransformer, or run_with_cache(..., names_filter=...)."
            )

    def _passes(
        self, forward: Callable[..., Any], input: Any, kwargs: dict[str, Any], layers: tuple[int, int] | None
    ) -> BridgePasses:
        tokens, mask = self._tokens_and_mask(input, kwargs)
        return BridgePasses(
            self,
            forward,
            input,
            kwargs,
            layers=layers,
            points=tuple(self._attached),
            share=self._sharing(),
            tokens=tokens,
            mask=mask,
            prompt=self._prompt(kwargs.get("past_key_values")),
            growing=self._generation is not None,
        )

    def _tokens_and_mask(
        self, input: Any, kwargs: dict[str, Any]
    ) -> tuple[Int[Tensor, "batch pos"] | None, Tensor | None]:
        """What the bridge's forward makes of its input: token ids (None for embeddings) and attention mask."""
        mask = kwargs.get("attention_mask")
        if isinstance(input, Tensor):
            return None if input.is_floating_point() else torch.atleast_2d(input), mask
        side = kwargs.get("padding_side") or getattr(self.tokenizer, "padding_side", "right")
        tokens = self.to_tokens(input, prepend_bos=kwargs.get("prepend_bos"), padding_side=side)
        if mask is None and not isinstance(input, str) and len(input) > 1:
            mask = get_attention_mask(
                self.tokenizer, tokens, prepend_bos=self.cfg.default_prepend_bos, padding_side=side
            )
        return tokens, mask
