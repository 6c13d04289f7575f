"""``ActivationsStore.from_sae`` for RouteSAEs: the store mounts the multi-layer hook point by itself.

SAELens reads the activations of a loaded SAE from the hook named in its metadata. A RouteSAE's hook
exists only where it was mounted, and its name differs between backends (``blocks.4...`` or
``model.layers.4...``); the stock method knows neither and fails at the first batch with a KeyError.
Importing ``routesae_lens.saes`` wraps it. For every other SAE nothing changes.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from sae_lens import ActivationsStore

from routesae_lens.saes.route_sae import Routed

_stock: Any = ActivationsStore.from_sae.__func__


@wraps(_stock)
def _from_sae(cls: Any, model: Any, sae: Any, *args: Any, **kwargs: Any) -> ActivationsStore:
    store = _stock(cls, model, sae, *args, **kwargs)
    if isinstance(sae, Routed):
        store.hook_name = sae.mount(model)
    return store


if not getattr(_stock, "__wrapped__", None):  # once, also when the module is loaded again
    ActivationsStore.from_sae = classmethod(_from_sae)
