"""The three kinds of models, and the hook point that listens on several of their layers.

``hook_points.py`` mounts it; here is where to listen on HookedTransformer, TransformerBridge and SAELens'
HookedProxyLM, and how each of them knows its hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce
from typing import Any, Protocol, runtime_checkable

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Places in a block that :func:`mount_layers` can read, by their TransformerLens names."""

MLP_INPUT = "mlp.hook_in"
"""What the MLP module reads, normalised where the model does that, norm weights included. The bridge and SAELens'
HookedSAETransformer have a hook of this name; ``ln2.hook_normalized`` comes before the norm's weights, and
``hook_mlp_in`` before the norm."""


class LayersHookPoint(HookPoint):
    """A read-only hook point fed by taps on several layers, or sites; fires when the last has come by."""

    what = "layer"
    remedy = "Does the forward start after the first listed layer (start_at_layer)?"

    def __init__(self, n_layers: int):
        super().__init__()
        self.n_layers = n_layers
        self.taps: list[RemovableHandle] = []
        self.widths: list[int] = []
        """Numbers per token of what has come by, in the latest forward."""
        self._stack: Tensor | None = None  # filled layer by layer, so that no layer's output is kept for it

    @property
    def _seen(self) -> int:
        return 0 if self._stack is None else len(self.widths)

    @property
    def listening(self) -> bool:
        return bool(self._forward_hooks)

    def add_hook(self, hook: Any, dir: Any = "fwd", *args: Any, **kwargs: Any) -> None:
        if dir != "fwd":
            raise ValueError(
                f"{self.name} is a read-only copy of several layers: no gradient flows back through it, so a "
                f"{dir!r} hook would never fire. Put backward hooks on the single layers' hook points."
            )
        super().add_hook(hook, dir, *args, **kwargs)

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        super().remove_hooks(*args, **kwargs)
        if not self.listening:
            self._drop()  # a forward that stopped early has left its part of the stack

    def put(self, index: int, activation: Tensor) -> None:
        """Take the activation of the ``index``-th listed layer."""
        if index == 0:
            self._drop()  # what an interrupted forward may have left
        if not self.listening:
            return
        if index != self._seen:
            seen = self._seen
            self._drop()
            raise RuntimeError(
                f"{self.name}: listed {self.what} {index + 1} of {self.n_layers} ran when {seen} had run before "
                f"it. {self.remedy}"
            )
        with torch.inference_mode(False):  # inference tensors do not count their in-place edits
            stack = self._stack
            if stack is None:
                self.widths = []
                stack = activation.new_empty(*activation.shape[:-1], self.n_layers * activation.shape[-1])
            stack = stack.to(activation.device, torch.promote_types(stack.dtype, activation.dtype))
            start, self.widths = sum(self.widths), [*self.widths, activation.shape[-1]]
            end, last = sum(self.widths), len(self.widths) == self.n_layers
            if end > stack.shape[-1] or (last and end < stack.shape[-1]):  # the widths differ
                stack = torch.cat([stack[..., :start], activation.to(stack.dtype)], dim=-1)
            else:
                stack[..., start:end] = activation
        self._stack = stack
        if not last:
            return
        self._drop()
        version = stack._version
        out = self(stack)
        if out is not stack or stack._version != version:
            raise RuntimeError(
                f"{self.name} is read-only: a hook changed its value, which would have no effect on the model. "
                "Hook the single layers instead, or splice an SAE. (SAELens' stock evaluator does this: "
                "set runner.evaluator to routesae_lens.SpliceEvaluator.)"
            )

    def remove_all_hooks_and_taps(self) -> None:
        self.remove_hooks(dir="both", including_permanent=True)
        for handle in self.taps:
            handle.remove()
        self.taps.clear()
        self._drop()

    def _drop(self) -> None:
        self._stack = None


class SitesHookPoint(LayersHookPoint):
    """The same over two sites of one block, what is read and what is written: :func:`mount_sites`."""

    what = "site"
    remedy = "The site that is read must come before the one that is written."

    def __init__(self) -> None:
        super().__init__(n_layers=2)


@runtime_checkable
class Backend(Protocol):
    """What :func:`mount_layers` and the splice need to know of a kind of model."""

    blocks_path: str

    @property
    def blocks(self) -> nn.ModuleList: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    def points(self) -> dict[str, LayersHookPoint]: ...
    def register(self, name: str, point: LayersHookPoint) -> None: ...
    def unregister(self, name: str) -> None: ...
    def tap(self, layer: int, site: str, point: LayersHookPoint, index: int) -> Iterator[RemovableHandle]: ...
    def hook_name(self, layer: int, site: str) -> str: ...


def backend_of(model: Any) -> Backend:
    """The :class:`Backend` of ``model``.

    Raises:
        TypeError: the model is of none of the supported kinds.
    """
    if isinstance(model, HookedTransformer):
        return _Hooked(model)
    if isinstance(model, TransformerBridge):
        return _Bridge(model)
    if isinstance(model, HookedProxyLM):
        return _Proxy(model)
    raise TypeError(
        f"unsupported model {type(model).__name__}; expected a HookedTransformer, a TransformerBridge or "
        "SAELens' HookedProxyLM (a Hugging Face model wrapped as HookedProxyLM(model, tokenizer))"
    )


class _Hooked:
    """HookedTransformer: hook points are submodules of the blocks, listed again by ``setup()``."""

    blocks_path = "blocks"

    def __init__(self, model: Any):
        self.model = model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.model.cfg.d_model

    def points(self) -> dict[str, LayersHookPoint]:
        return {
            f"blocks.{i}.{name}": child
            for i, block in enumerate(self.model.blocks)
            for name, child in block.named_children()
            if isinstance(child, LayersHookPoint)
        }

    def register(self, name: str, point: LayersHookPoint) -> None:
        _, layer, attribute = name.split(".")
        setattr(self.model.blocks[int(layer)], attribute, point)
        self.model.setup()

    def unregister(self, name: str) -> None:
        _, layer, attribute = name.split(".")
        delattr(self.model.blocks[int(layer)], attribute)
        self.model.setup()

    def site_path(self, layer: int, site: str) -> str:
        """Path, below the block, of the hook point that stands for ``site``."""
        block = self.model.blocks[layer]
        silent = self.model.cfg.attn_only and site == "hook_mlp_out"  # it has the hook, but never runs it
        # (the MLP's input can be read where SAELens' class, which has a hook there, is not in use)
        if silent or not (hasattr(block, "mlp") if site == MLP_INPUT else _has(block, site)):
            raise ValueError(f"this model has no {site} in block {layer}")
        return site

    def tap(self, layer: int, site: str, point: LayersHookPoint, index: int) -> Iterator[RemovableHandle]:
        block, path = self.model.blocks[layer], self.site_path(layer, site)
        if site == "hook_resid_post":
            # The block's own output: add_sae, reset_saes and reset_hooks replace or clear HookPoints, never this.
            yield block.register_forward_hook(partial(_put_output, point, index))
            return
        inside = _TapInside(path, point, index)
        yield block.register_forward_pre_hook(inside.enter)
        yield block.register_forward_hook(inside.leave, always_call=True)

    def hook_name(self, layer: int, site: str) -> str:
        path = self.site_path(layer, site)
        if not _has(self.model.blocks[layer], path):
            raise ValueError(
                f"{type(self.model).__name__} has no hook at {site} (block {layer}): only SAELens' "
                "HookedSAETransformer, this package's HookedRouteSAETransformer and bridges have one"
            )
        return f"blocks.{layer}.{path}"


class _Bridge(_Hooked):
    """TransformerBridge: no HookedRootModule and no setup(); a registry of names, and aliases for ours."""

    def register(self, name: str, point: LayersHookPoint) -> None:
        _, layer, attribute = name.split(".")
        setattr(self.model.blocks[int(layer)], attribute, point)
        point.name = name  # the block has just named it after the attribute alone; hooks then never fire
        self.model._hook_registry[name] = point

    def unregister(self, name: str) -> None:
        _, layer, attribute = name.split(".")
        delattr(self.model.blocks[int(layer)], attribute)
        self.model.blocks[int(layer)]._hook_registry.pop(attribute, None)
        self.model._hook_registry.pop(name, None)

    def site_path(self, layer: int, site: str) -> str:
        block = self.model.blocks[layer]
        target = block.hook_aliases.get(site, site)
        for path in [target] if isinstance(target, str) else target:
            if _has(block, path):
                return path
        raise ValueError(f"this model has no {site} in block {layer}")


# Names of the modules that read or write the residual stream, by family (Llama-like, GPT-2-like).
_MODULES = {
    MLP_INPUT: ("mlp", "feed_forward"),
    "hook_attn_out": ("self_attn", "attn", "attention", "self_attention"),
    "hook_mlp_out": ("mlp", "feed_forward"),
    "hook_resid_mid": ("post_attention_layernorm", "ln_2"),
}
# Families that also normalise what attention and MLP write (Gemma 2, OLMo 2): only the norm's output
# is added to the stream, and post_attention_layernorm does not read it.
_MODULES_WITH_POST_NORMS = {
    MLP_INPUT: ("mlp", "feed_forward"),
    "hook_attn_out": ("post_attention_layernorm",),
    "hook_mlp_out": ("post_feedforward_layernorm",),
    "hook_resid_mid": ("pre_feedforward_layernorm",),
}


class _Proxy:
    """HookedProxyLM: a Hugging Face model whose submodules' outputs are the hooks."""

    def __init__(self, model: HookedProxyLM):
        self.model = model
        for path, module in model.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == model.model.config.num_hidden_layers:
                self.blocks_path, self._blocks = path, module
                return
        raise ValueError(
            f"found no list of {model.model.config.num_hidden_layers} blocks in {type(model.model).__name__}"
        )

    @property
    def blocks(self) -> nn.ModuleList:
        return self._blocks

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return self.model.model.config.hidden_size

    def points(self) -> dict[str, LayersHookPoint]:
        return {
            name: point for name, point in self.model.hook_dict.items() if isinstance(point, LayersHookPoint)
        }

    def register(self, name: str, point: LayersHookPoint) -> None:
        # run_with_cache reads hook_dict, HookPoint lookups mod_dict, and stop_at_layer hangs its stop
        # hook on named_modules_dict: on the point itself the stop comes when the stack is complete.
        self.model.hook_dict[name] = point
        self.model.mod_dict[name] = point
        self.model.named_modules_dict[name] = point

    def unregister(self, name: str) -> None:
        for names in (self.model.hook_dict, self.model.mod_dict, self.model.named_modules_dict):
            names.pop(name, None)

    def site_module(self, layer: int, site: str) -> tuple[str, nn.Module]:
        block = self.blocks[layer]
        post_norms = hasattr(block, "post_feedforward_layernorm")
        names = (_MODULES_WITH_POST_NORMS if post_norms else _MODULES).get(site, ())
        parallel = getattr(self.model.model.config, "use_parallel_residual", False)
        if not (parallel and site == "hook_resid_mid"):  # attention and MLP side by side: nothing between
            for name in names:
                if isinstance(getattr(block, name, None), nn.Module):
                    return name, getattr(block, name)
        raise ValueError(
            f"this Hugging Face model has no known module for {site} in block {layer} (looked for "
            f"{', '.join(names) or 'none'}); load it as a TransformerBridge"
        )

    def tap(self, layer: int, site: str, point: LayersHookPoint, index: int) -> Iterator[RemovableHandle]:
        if site == "hook_resid_post":
            yield self.blocks[layer].register_forward_hook(partial(_put_output, point, index))
        elif site in ("hook_attn_out", "hook_mlp_out"):
            _, module = self.site_module(layer, site)
            yield module.register_forward_hook(partial(_put_output, point, index))
        else:
            reader = self.blocks[layer] if site == "hook_resid_pre" else self.site_module(layer, site)[1]
            yield reader.register_forward_pre_hook(partial(_put_input, point, index), with_kwargs=True)

    def hook_name(self, layer: int, site: str) -> str:
        if site == "hook_resid_post":
            name = f"{self.blocks_path}.{layer}"
        elif site == "hook_resid_pre" and layer > 0:
            name = f"{self.blocks_path}.{layer - 1}"
        elif site in ("hook_attn_out", "hook_mlp_out"):
            name = f"{self.blocks_path}.{layer}.{self.site_module(layer, site)[0]}"
        else:
            raise ValueError(
                f"HookedProxyLM has no hook that can replace {site} of block {layer}; load the model as a "
                "TransformerBridge or HookedTransformer"
            )
        if name not in self.model.hook_dict:
            raise ValueError(
                f"HookedProxyLM was loaded without the hook {name!r}; load it without the hook_names restriction"
            )
        return name


def _has(block: nn.Module, path: str) -> bool:
    """Whether the block has a module at ``path``."""
    try:
        return isinstance(reduce(getattr, path.split("."), block), nn.Module)
    except AttributeError:
        return False


# Taps are partials and bound methods, not closures: copy.deepcopy(model) then copies the point with
# them, where a closure would feed the copy's activations to the original's point.


def _put_output(point: LayersHookPoint, index: int, _module: nn.Module, _args: Any, output: Any) -> None:
    point.put(index, output[0] if isinstance(output, tuple) else output)


def _put_input(
    point: LayersHookPoint, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    point.put(index, args[0] if args else kwargs["hidden_states"])


class _TapInside:
    """Hears whatever stands at ``path`` when the block runs (an SAE may have taken the HookPoint's place).

    It listens there from the block's start to its end only, so that nothing is left to be replaced.
    """

    def __init__(self, path: str, point: LayersHookPoint, index: int):
        self.path, self.point, self.index = path, point, index
        self.live: list[RemovableHandle] = []

    def enter(self, block: nn.Module, _args: Any) -> None:
        if not self.point.listening:
            return
        if self.path == MLP_INPUT and not _has(block, self.path):  # HookedTransformer without SAELens
            put_input = partial(_put_input, self.point, self.index)
            mlp: Any = block.mlp
            self.live.append(mlp.register_forward_pre_hook(put_input, with_kwargs=True))
            return
        heard: Any = reduce(getattr, self.path.split("."), block)
        self.live.append(heard.register_forward_hook(partial(_put_output, self.point, self.index)))

    def leave(self, *_: Any) -> None:
        while self.live:
            self.live.pop().remove()
