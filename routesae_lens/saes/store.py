"""SAELens' activation store mounts multi-layer hook points by itself.

The store reads the hook that a config or a loaded SAE names. A multi-layer point exists only where it was
mounted, and its name differs between backends (``blocks.4...`` or ``model.layers.4...``); SAELens knows
neither and fails at the first batch with a bare KeyError. Importing ``routesae_lens.saes`` wraps the
store's three ways of being made. For every other hook and SAE nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from inspect import unwrap
from typing import Any

from sae_lens import ActivationsStore

from routesae_lens.hook_points import mount_layers, parse_stack_name
from routesae_lens.saes.stack import StackSAE

# SAELens' own, also when this module is loaded again and finds its wrappers in their place.
_from_sae: Any = unwrap(ActivationsStore.from_sae.__func__)
_from_config: Any = unwrap(ActivationsStore.from_config.__func__)
_from_config_multi_hook: Any = unwrap(ActivationsStore.from_config_multi_hook.__func__)


def _mount(model: Any, hook_names: Iterable[str]) -> None:
    for name in hook_names:
        stack = parse_stack_name(name)
        if stack is not None and (mounted := mount_layers(model, stack.layers, stack.site)) != name:
            raise ValueError(
                f"hook {name!r} is called {mounted!r} on this model (mount_layers returns the name)"
            )


@wraps(_from_sae)
def from_sae(cls: Any, model: Any, sae: Any, *args: Any, **kwargs: Any) -> ActivationsStore:
    store = _from_sae(cls, model, sae, *args, **kwargs)
    if isinstance(sae, StackSAE):
        store.hook_name = sae.mount(model)
    return store


@wraps(_from_config)
def from_config(cls: Any, model: Any, cfg: Any, *args: Any, **kwargs: Any) -> ActivationsStore:
    _mount(model, [cfg.hook_name])
    return _from_config(cls, model, cfg, *args, **kwargs)


@wraps(_from_config_multi_hook)
def from_config_multi_hook(cls: Any, model: Any, **kwargs: Any) -> ActivationsStore:
    _mount(model, kwargs["hook_names"])
    return _from_config_multi_hook(cls, model, **kwargs)


for method in (from_sae, from_config, from_config_multi_hook):
    setattr(ActivationsStore, method.__name__, classmethod(method))
