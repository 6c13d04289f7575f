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
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from routesae_lens.backends import (
    MLP_INPUT,
    SITES,
    Backend,
    LayersHookPoint,
    SitesHookPoint,
    backend_of,
)


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
        _mount(backend, name, LayersHookPoint(len(layers)), [(layer, site) for layer in layers])
    return name


def mount_sites(model: Any, block: int, site_in: str = MLP_INPUT, site_out: str = "hook_mlp_out") -> str:
    """Register a hook point that fires with two sites of one block side by side: what a transcoder trains on.

    As for :func:`mount_layers`, but over sites, whose widths may differ: the value has shape
    ``batch pos (d_in + d_out)``, bitwise equal to the two captured alone. :func:`unmount_layers` undoes it.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        block: its number, 0-based.
        site_in: what is read: one of :data:`SITES`, or :data:`MLP_INPUT`, what the MLP module reads (behind its
            norm, weights of the norm included). On HookedTransformer and TransformerBridge also any other
            hook of the block, for instance ``"mlp.hook_post"``.
        site_out: what is to be predicted, likewise; it must come after ``site_in``.

    Raises:
        ValueError: a block out of range, the same site twice, or a site the backend lacks.
        TypeError: a model of an unknown kind.
    """
    backend = backend_of(model)
    (block,) = check_layers([block], backend.n_layers)
    if site_in == site_out:
        raise ValueError(f"expected two sites, got {site_in!r} twice (an SAE reads and writes one)")
    if "hook_mlp_in" in (site_in, site_out):
        raise ValueError(
            f"hook_mlp_in is the stream before the norm, and fires with a flag only; expected {MLP_INPUT!r}, what "
            "the MLP reads, or 'hook_resid_mid', the stream"
        )
    name = sites_name(block, site_in, site_out, backend.blocks_path)
    if name not in backend.points():
        _mount(backend, name, SitesHookPoint(), [(block, site_in), (block, site_out)])
    return name


def _mount(backend: Backend, name: str, point: LayersHookPoint, places: list[tuple[int, str]]) -> None:
    point.name = name
    try:
        for index, (layer, site) in enumerate(places):
            point.taps.extend(backend.tap(layer, site, point, index))
    except Exception:
        point.remove_all_hooks_and_taps()
        raise
    backend.register(name, point)


def unmount_layers(model: Any, name: str) -> None:
    """Undo :func:`mount_layers` or :func:`mount_sites`: remove the hook point ``name`` and its taps from ``model``.

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


def sites_name(block: int, site_in: str, site_out: str, blocks_path: str = "blocks") -> str:
    """Name of the point over two sites of a block. It holds no ``.digit`` but the block, which SAELens parses."""
    sites = f"{site_in}_beside_{site_out}".replace(".", "_")
    return f"{blocks_path}.{block}.{sites}"


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
