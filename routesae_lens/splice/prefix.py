"""Forwards of one batch that differ from a clean one only from some block on: the blocks below run once.

For evaluation, where many splices follow one clean pass, on every backend. (Generation has a KV cache to keep
in step; its passes are in ``passes.py``.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from routesae_lens.backends import backend_of


class SharedPrefix:
    """The blocks below every hook that later forwards change.

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        hook_names: what later forwards hook. A name without a block number shares nothing.
    """

    def __init__(self, model: Any, hook_names: Iterable[str]):
        blocks = backend_of(model).blocks
        config = getattr(model, "original_model", getattr(model, "model", model))
        # (blocks of such a model read keys and values of earlier ones, which skipping would not make)
        whole = getattr(getattr(config, "config", None), "num_kv_shared_layers", 0)
        first = 0 if whole else min((_block_of(name) for name in hook_names), default=0)
        self.blocks: list[nn.Module] = list(blocks[:first])
        self._output: Any = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Listen to the clean forward that is run inside."""
        self._output = None
        if not self.blocks:
            yield
            return
        handle = self.blocks[-1].register_forward_hook(self._record)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Forwards inside, of the same batch and without gradient, take up where the recorded one left the prefix.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if self.blocks and self._output is None:
            raise RuntimeError("no forward was recorded to skip the blocks of")
        with ExitStack() as skipping:
            for block in self.blocks:
                skipping.enter_context(shadowed(block, self._skip))
            yield

    def _record(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._output = output

    def _skip(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._output  # of the last block; what the blocks before it give is not looked at


@contextmanager
def shadowed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` does ``forward`` in place of its own."""
    # (setattr would hand it to the component that a bridge's module wraps)
    own = module.__dict__
    before = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)


def _block_of(hook_name: str) -> int:
    match = re.search(r"\.(\d+)(?:\.|$)", hook_name)
    return int(match[1]) if match else 0
