"""Generation with RouteSAEs and Crosscoders attached: every token is routed, with and without a KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from routesae_lens.hook_points import mounted_points
from routesae_lens.saes.route_sae import with_routing
from tests.routed_saes import make_crosscoder
from tests.spliced import TOKENS, acts_name, assert_clean, make_sae, ordinary_sae, state_of

GREEDY: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
PAD = 2


def by_hand(model: Any, tokens: torch.Tensor, n: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Greedy tokens, each from a forward over the whole sequence: no generate, no cache."""
    for _ in range(n):
        options = {} if mask is None else {"attention_mask": mask}
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, **options)[:, -1:].argmax(-1)], dim=1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return tokens
