"""Forwards that skip what a clean one has computed: the same logits, fewer blocks, nothing left behind."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from backends import TOKENS, every_backend

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import layer_hook_name
from routesae_lens.splice.prefix import SharedPrefix

FIRST = 2
OTHER = TOKENS.flip(0)


def halve(x: torch.Tensor, hook: Any = None) -> torch.Tensor:
    return x * 0.5


def counted(model: Any, run: Any) -> int:
    """Number of blocks whose attention output comes by while ``run`` runs."""
    ran: list[int] = []
    handles = []
    for i, block in enumerate(backend_of(model).blocks):
        inside = next(module for name, module in block.named_modules() if re.search(r"attn(_out)?$", name))
        handles.append(inside.register_forward_hook(lambda *_, i=i: ran.append(i)))
    run()
    for handle in handles:
        handle.remove()
    return len(ran)


@every_backend
@torch.no_grad()
def test_the_same_logits_from_fewer_blocks(model: Any):
    name = layer_hook_name(model, FIRST, "hook_resid_post")
    prefix, n = SharedPrefix(model, [name]), backend_of(model).n_layers
    for tokens in (TOKENS, OTHER):  # what was recorded is the last batch's
        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, halve)])
        with prefix.recorded():
            model.run_with_cache(tokens, names_filter=[name])
        with prefix.skipped():
            for _ in range(2):
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, halve)]), expected)
            run = lambda tokens=tokens: model.run_with_hooks(tokens, fwd_hooks=[(name, halve)])  # noqa: E731
            assert counted(model, run) == n - FIRST
        assert counted(model, run) == n
        assert torch.equal(run(), expected)


@every_backend
@torch.no_grad()
def test_the_lowest_of_several_hooks_counts(model: Any):
    names = [layer_hook_name(model, layer, "hook_resid_post") for layer in (4, 1, 2)]
    assert len(SharedPrefix(model, names).blocks) == 1
    assert SharedPrefix(model, ["hook_embed", names[0]]).blocks == []
    assert SharedPrefix(model, []).blocks == []


@every_backend
@torch.no_grad()
def test_a_block_that_has_a_forward_of_its_own_gets_it_back(model: Any):
    block = backend_of(model).blocks[0]
    own = block.forward
    block.__dict__["forward"] = own  # as device_map and compiled blocks do
    prefix = SharedPrefix(model, [layer_hook_name(model, FIRST, "hook_resid_post")])
    with prefix.recorded():
        model.run_with_cache(TOKENS, names_filter=[])
    with pytest.raises(KeyboardInterrupt), prefix.skipped():
        raise KeyboardInterrupt
    assert block.__dict__.pop("forward") is own
    assert all("forward" not in block.__dict__ for block in backend_of(model).blocks)


@every_backend
@torch.no_grad()
def test_nothing_recorded_is_an_error(model: Any):
    prefix = SharedPrefix(model, [layer_hook_name(model, FIRST, "hook_resid_post")])
    with pytest.raises(RuntimeError, match="no forward was recorded"), prefix.skipped():
        pass
    with pytest.raises(ZeroDivisionError), prefix.recorded():
        raise ZeroDivisionError
    assert not any(block._forward_hooks and prefix._record in block._forward_hooks.values()
                   for block in backend_of(model).blocks)  # fmt: skip
