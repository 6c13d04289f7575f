"""The hooks of an evaluation's spliced pass: where they fire, and what is said where they do not."""

from __future__ import annotations

import pytest
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from routesae_lens.analysis.evaluate import evaluate, logits_with_hooks
from routesae_lens.splice.late_logits import Unembedding
from routesae_lens.splice.prefix import SharedPrefix


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("alias, own", [("hook_embed", "embed.hook_out"), ("blocks.2.mlp.hook_post", None)])
def test_a_bridge_splices_at_other_names_of_its_points(tiny_bridge, tokens, alias, own):
    own = own or tiny_bridge.hook_dict[alias].name
    assert own != alias
    width = tiny_bridge.run_with_cache(tokens, names_filter=[own])[1][own].shape[-1]
    results = []
    for name in (alias, own):
        torch.manual_seed(0)
        sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=64, k=8, metadata=SAEMetadata(hook_name=name)))
        results.append(evaluate(sae, tiny_bridge, tokens, progress=False).kl)
    assert results[0] == results[1] > 1e-3


def test_a_splice_that_touches_nothing_is_an_error(tiny_hooked, tokens):
    prefix = SharedPrefix(tiny_hooked, [])
    with pytest.raises(RuntimeError, match=r"touched nothing there.*blocks\.2\.hook_nowhere"):
        logits_with_hooks(
            tiny_hooked,
            tokens,
            prefix,
            Unembedding(tiny_hooked),
            [("blocks.2.hook_nowhere", lambda x, hook: x)],
        )
