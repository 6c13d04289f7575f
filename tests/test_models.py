"""Models as ``load_model`` gives them."""

from __future__ import annotations

from pathlib import Path

import torch

from routesae_lens import load_model


def test_hooked_transformer_need_not_copy_its_weights_to_multiply_with_them(tiny_llama_dir: Path):
    model, stock = (load_model(tiny_llama_dir, "hooked", device="cpu") for _ in range(2))
    for parameter in stock.parameters():
        parameter.data = parameter.data.contiguous()
    mlp, tokens = model.blocks[0].mlp, torch.arange(1, 21)[None]
    for weight in (model.W_U, mlp.W_gate, mlp.W_in, mlp.W_out):
        assert weight.T.is_contiguous() and not weight.is_contiguous()
    ours, theirs = (dict(m.named_parameters()) for m in (model, stock))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        assert torch.equal(model(tokens), stock(tokens))
