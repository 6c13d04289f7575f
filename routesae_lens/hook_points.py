"""Multi-layer hook points: several layers' activations, side by side, as one TransformerLens hook.

:func:`mount_layers` registers a real ``HookPoint`` on a model. Once per forward pass it fires with
the listed layers' activations as ``batch pos (layer d_model)``. Because its name looks like any
other hook name (``blocks.21.hook_resid_post_stack_6to21``), SAELens' stock activation store,
runners and prefetching read it unmodified and stop the language model after the last listed layer.

Three backends: ``HookedTransformer`` (and ``HookedSAETransformer``), ``TransformerBridge`` (and
``SAETransformerBridge``), and SAELens' ``HookedProxyLM`` for Hugging Face models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

SITES = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Places in a block that :func:`mount_layers` can read, by their TransformerLens names."""


def mount_layers(model: Any, layers: Sequence[int], site: str = "hook_resid_post") -> str:
    """Register a hook point that fires with the activations of ``layers`` side by side.

    The point sees what flows on (after user hooks and spliced SAEs), survives ``reset_hooks``,
    ``add_sae``/``reset_saes`` and ``setup``, costs nothing while nobody listens, and is read-only.
    Mounting the same layers and site again returns the same point.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        layers: block numbers, 0-based, strictly increasing.
        site: one of :data:`SITES`.

    Returns:
        The name of the hook point, for ``run_with_cache``, ``run_with_hooks`` and SAELens' configs;
        its value has shape ``batch pos (layer d_model)``, bitwise equal to the layers captured alone.

    Raises:
        ValueError: layers empty, repeated, unsorted or out of range; a site the backend lacks.
        TypeError: a model of an unknown kind.
    """
    backend = backend_of(model)
    layers = check_layers(layers, backend.n_layers)
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; known sites: {', '.join(SITES)}")
    name = stack_name(layers, site, backend.blocks_path)
    if name not in backend.points():
        point = LayersHookPoint(len(layers))
        point.name = name
        try:
            for index, layer in enumerate(layers):
                point.taps.extend(backend.tap(layer, site, point, index))
        except Exception:
            point.remove_all_hooks_and_taps()
            raise
        backend.register(name, point)
    return name


def unmount_layers(model: Any, name: str) -> None:
    """Undo :func:`mount_layers`: remove the hook point ``name`` and its taps from ``model``.

    Raises:
        ValueError: no such point is mounted.
    """
    backend = backend_of(model)
    points = backend.points()
    if name not in points:
        raise ValueError(
            f"no multi-layer hook point {name!r} is mounted; mounted: {sorted(points) or 'none'}"
        )
    point = points[name]
    point.remove_all_hooks_and_taps()
    backend.unregister(name)


def mounted_points(model: Any) -> list[str]:
    """Names of the multi-layer hook points mounted on ``model``."""
    return sorted(backend_of(model).points())


def split_layers(
    stack: Float[Tensor, "*batch stacked"], n_layers: int
) -> Float[Tensor, "*batch layer d_model"]:
    """Give the layer axis of a stacked activation its own dimension.

    Raises:
        ValueError: the last dimension is not a multiple of ``n_layers``.
    """
    if stack.shape[-1] % n_layers:
        raise ValueError(
            f"last dimension {stack.shape[-1]} of a stack of {n_layers} layers is not a multiple of {n_layers}"
        )
    return rearrange(stack, "... (layer d_model) -> ... layer d_model", layer=n_layers)


def join_layers(x: Float[Tensor, "*batch layer d_model"]) -> Float[Tensor, "*batch stacked"]:
    """Inverse of :func:`split_layers`: layers side by side in the last dimension."""
    return rearrange(x, "... layer d_model -> ... (layer d_model)")


def default_layers(n_blocks: int) -> list[int]:
    """Routed layers of the paper (table 1): 1/4 to 3/4 of depth; 16 blocks give 3...11, 30 give 6...21."""
    return list(range(max(0, n_blocks // 4 - 1), max(1, 3 * n_blocks // 4)))


def parse_layers(text: str) -> list[int]:
    """Block numbers of a text such as ``"6:21"`` (both ends included, as the paper writes it) or ``"3,5,9:11"``.

    Raises:
        ValueError: the text is of another form, or the blocks are not strictly increasing.
    """
    layers: list[int] = []
    for run in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", run)
        if match is None:
            raise ValueError(f"layers must look like '6:21' or '3,5,9:11', got {text!r}")
        layers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return check_layers(layers)


def check_layers(layers: Sequence[int], n_blocks: int | None = None) -> list[int]:
    """``layers`` as a list of ints, or a ValueError that says what is wrong with them."""
    if not isinstance(layers, Iterable):
        raise ValueError(f"layers must be a non-empty list of block numbers, got {layers!r}")
    checked = list(layers)
    if not checked or any(isinstance(i, bool) or not isinstance(i, int) for i in checked):
        raise ValueError(f"layers must be a non-empty list of block numbers, got {checked!r}")
    if checked != sorted(set(checked)):
        raise ValueError(f"layers must be strictly increasing, got {checked}")
    if checked[0] < 0 or (n_blocks is not None and checked[-1] >= n_blocks):
        allowed = "0 or more" if n_blocks is None else f"between 0 and {n_blocks - 1}"
        raise ValueError(f"layers must be {allowed}, got {checked}")
    return checked


def stack_name(layers: Sequence[int], site: str, blocks_path: str = "blocks") -> str:
    """Name of the point over ``layers``. It holds no ``.digit`` but the last layer, which SAELens parses."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    spec = "_".join(f"{run[0]}to{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{blocks_path}.{layers[-1]}.{site}_stack_{spec}"


class StackName(NamedTuple):
    layers: list[int]
    site: str


def parse_stack_name(name: str) -> StackName | None:
    """Layers and site of a name made by :func:`stack_name`; None for any other hook name."""
    match = re.search(r"\.(\w+?)_stack_([\dto_]+)$", name)
    if match is None:
        return None
    layers: list[int] = []
    for run in match[2].split("_"):
        first, _, last = run.partition("to")
        layers.extend(range(int(first), int(last or first) + 1))
    return StackName(layers, match[1])


def layer_hook_name(model: Any, layer: int, site: str = "hook_resid_post") -> str:
    """The hook of one layer under the name that ``run_with_hooks`` on this backend really fires.

    (On the bridge the alias ``blocks.4.hook_resid_post`` silently never fires once SAEs are attached;
    its canonical name ``blocks.4.hook_out`` does.)

    Raises:
        ValueError: the backend has no hook at that site.
    """
    return backend_of(model).hook_name(layer, site)


class LayersHookPoint(HookPoint):
    """A read-only hook point fed by taps on several layers; fires when the last layer has come by."""

    def __init__(self, n_layers: int):
        super().__init__()
        self.n_layers = n_layers
        self.taps: list[RemovableHandle] = []
        self._parts: list[Tensor] = []

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
            self._parts.clear()  # a forward that stopped early has left its part of the stack

    def put(self, index: int, activation: Tensor) -> None:
        """Take the activation of the ``index``-th listed layer."""
        if index == 0:
            self._parts.clear()  # what an interrupted forward may have left
        if not self.listening:
            return
        if index != len(self._parts):
            seen = len(self._parts)
            self._parts.clear()
            raise RuntimeError(
                f"{self.name}: listed layer {index + 1} of {self.n_layers} ran when {seen} had run before it. "
                "Does the forward start after the first listed layer (start_at_layer)?"
            )
        self._parts.append(activation)
        if index < self.n_layers - 1:
            return
        parts, self._parts = self._parts, []
        with torch.inference_mode(False):  # inference tensors do not count their in-place edits
            stack = torch.cat([part.to(activation.device) for part in parts], dim=-1)
        del parts
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
        self._parts.clear()


@runtime_checkable
class Backend(Protocol):
    """What :func:`mount_layers` and the splice need to know of a kind of model."""

    blocks_path: str

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
    def n_layers(self) -> int:
        return len(self.model.blocks)

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
        silent = self.model.cfg.attn_only and site == "hook_mlp_out"  # it has the hook, but never runs it
        if silent or not hasattr(self.model.blocks[layer], site):
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
        return f"blocks.{layer}.{self.site_path(layer, site)}"


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
            try:
                reduce(getattr, path.split("."), block)
            except AttributeError:
                continue
            return path
        raise ValueError(f"this model has no {site} in block {layer}")


# Names of the modules that read or write the residual stream, by family (Llama-like, GPT-2-like).
_MODULES = {
    "hook_attn_out": ("self_attn", "attn", "attention", "self_attention"),
    "hook_mlp_out": ("mlp", "feed_forward"),
    "hook_resid_mid": ("post_attention_layernorm", "ln_2"),
}
# Families that also normalise what attention and MLP write (Gemma 2, OLMo 2): only the norm's output
# is added to the stream, and post_attention_layernorm does not read it.
_MODULES_WITH_POST_NORMS = {
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
                self.blocks_path, self.blocks = path, module
                return
        raise ValueError(
            f"found no list of {model.model.config.num_hidden_layers} blocks in {type(model.model).__name__}"
        )

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
        names = (_MODULES_WITH_POST_NORMS if post_norms else _MODULES)[site]
        parallel = getattr(self.model.model.config, "use_parallel_residual", False)
        if not (parallel and site == "hook_resid_mid"):  # attention and MLP side by side: nothing between
            for name in names:
                if isinstance(getattr(block, name, None), nn.Module):
                    return name, getattr(block, name)
        raise ValueError(
            f"this Hugging Face model has no known module for {site} in block {layer} (looked for "
            f"{', '.join(names)}); load it as a TransformerBridge"
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
        if self.point.listening:
            heard: Any = reduce(getattr, self.path.split("."), block)
            self.live.append(heard.register_forward_hook(partial(_put_output, self.point, self.index)))

    def leave(self, *_: Any) -> None:
        while self.live:
            self.live.pop().remove()
