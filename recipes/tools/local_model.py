"""A local Llama folder as SAELens' HookedSAETransformer, in the environments of the external tools.

TransformerLens knows official model names only, and its versions 2 and 3 read neither a local folder nor
SmolLM2's name. This runs under both. The rotary base is read from the file itself: transformers 4 does not know the
field that transformers 5 writes, and would silently take 10,000.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_llama_weights
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def load_local(folder: str | Path, n_ctx: int = 512) -> Any:
    folder = Path(folder)
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if hf["architectures"] != ["LlamaForCausalLM"] or hf.get("attention_bias") or hf.get("mlp_bias"):
        raise ValueError(f"{folder} holds {hf['architectures']}; expected a LlamaForCausalLM without biases")
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is not supported")
    d_head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    cfg = HookedTransformerConfig(
        model_name=folder.name,
        n_layers=hf["num_hidden_layers"],
        d_model=hf["hidden_size"],
        d_head=d_head,
        n_heads=hf["num_attention_heads"],
        n_key_value_heads=hf["num_key_value_heads"],
        d_mlp=hf["intermediate_size"],
        d_vocab=hf["vocab_size"],
        n_ctx=n_ctx,
        act_fn=hf["hidden_act"],
        eps=hf["rms_norm_eps"],
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=d_head,
        rotary_base=rope["rope_theta"],
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    model: Any = HookedSAETransformer(cfg, tokenizer=load_tokenizer(folder))
    weights = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    model.load_and_process_state_dict(
        convert_llama_weights(weights, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """From its data alone: the class that transformers 5 names in the folder is unknown to version 4."""
    given = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {name: given[name] for name in ("bos_token", "eos_token", "pad_token") if given.get(name)}
    # The last two keep TransformerLens from loading it again by name, through the class that is unknown.
    file = str(Path(folder) / "tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=file, **special, name_or_path=str(folder), add_bos_token=True
    )
