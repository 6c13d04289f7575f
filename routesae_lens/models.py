"""Loading a language model for any of the three backends, by hub name, local folder, or ``"demo"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.components import GatedMLP, Unembed
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from routesae_lens.demo import DEMO_MODEL, demo_model_path

BACKENDS = ("huggingface", "bridge", "hooked")


def load_model(
    name: str | Path,
    backend: str = "huggingface",
    device: str | None = None,
    dtype: str = "float32",
    model_class: Any = None,
    attn_implementation: str | None = None,
) -> Any:
    """Load a language model that ``mount_layers`` and SAELens' runners accept.

    Args:
        name: a Hugging Face name, a local folder in Hugging Face format, a TransformerLens name
            (backend "hooked"), or "demo" for SmolLM2-135M without any model hub.
        backend: "huggingface" (SAELens' HookedProxyLM: the fastest forward), "bridge"
            (TransformerBridge) or "hooked" (HookedTransformer, weights unprocessed).
        device: "cpu", "cuda", ...; by default a GPU when there is one.
        dtype: of the weights, for instance "float32" or "bfloat16".
        model_class: a subclass to load instead, such as HookedRouteSAETransformer (backend "hooked") or
            RouteSAETransformerBridge (backend "bridge").
        attn_implementation: transformers' name of the attention kernel, such as "sdpa", "eager" or
            "flash_attention_2"; by default its choice, which is "sdpa" for most architectures. Backend
            "huggingface" alone has the choice: the others compute attention step by step, since each step
            has a hook.

    Raises:
        ValueError: unknown backend or dtype, an attention kernel that the backend or the architecture does
            not have, or a local folder that backend "hooked" cannot read.
        OSError: neither a folder nor a reachable hub name (from transformers).
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise ValueError(f"unknown dtype {dtype!r}; expected float32, bfloat16 or float16")
    if model_class is not None and backend == "huggingface":
        raise ValueError("model_class goes with backend 'bridge' or 'hooked'")
    if attn_implementation not in (None, "eager") and backend != "huggingface":
        raise ValueError(
            f"backend {backend!r} has no attn_implementation {attn_implementation!r}: it computes attention step "
            "by step for its hooks (\"eager\"); use backend 'huggingface'"
        )
    device = known_device(device or default_device())
    source = str(demo_model_path() if name == DEMO_MODEL else name)
    if backend == "huggingface":
        return _load_proxy(source, device, torch_dtype, attn_implementation)
    if backend == "bridge":
        return (model_class or TransformerBridge).boot_transformers(source, device=device, dtype=torch_dtype)
    hooked = model_class or HookedTransformer
    if Path(source).is_dir():
        return _as_linear_reads(_load_hooked_folder(hooked, source, device, torch_dtype))
    return _as_linear_reads(hooked.from_pretrained_no_processing(source, device=device, dtype=torch_dtype))


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def known_device(device: str) -> str:
    """The same name. Raises ValueError for a device that torch does not know or have."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; expected cpu, cuda, cuda:0, mps ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA GPU here")
    return device


def _load_proxy(source: str, device: str, dtype: torch.dtype, attention: str | None) -> HookedProxyLM:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False  # nothing here decodes step by step through this class
    # Hooks on blocks, attention and MLPs alone: one on every submodule costs time and breaks compilation.
    names = [
        path
        for path, _ in model.named_modules()
        if path.rsplit(".", 1)[-1].isdigit() or path.rsplit(".", 1)[-1] in ("self_attn", "attn", "mlp")
    ]
    return HookedProxyLM(model.to(device).eval(), AutoTokenizer.from_pretrained(source), hook_names=names)


def _as_linear_reads(model: HookedTransformer) -> HookedTransformer:
    """The same weights, those of gated MLPs and the unembedding transposed in memory.

    HookedTransformer hands ``W.T.contiguous()`` to ``F.linear``: a copy of each of them in every forward, a tenth of
    its time on a CPU, unless the numbers already lie that way.
    """
    names: dict[type, tuple[str, ...]] = {Unembed: ("W_U",), GatedMLP: ("W_gate", "W_in", "W_out")}
    for module in model.modules():
        for name in names.get(type(module), ()):
            weight = getattr(module, name)
            weight.data = weight.data.T.contiguous().T
    return model


def _load_hooked_folder(hooked: Any, folder: str, device: str, dtype: torch.dtype) -> HookedTransformer:
    """HookedTransformer only knows official names; a Llama folder is configured by hand here."""
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    hf = AutoConfig.from_pretrained(folder)
    if (hf.architectures or [None])[0] != "LlamaForCausalLM":
        raise ValueError(
            f"backend 'hooked' reads local folders of LlamaForCausalLM, but {folder} holds {hf.architectures}; "
            "use backend 'bridge' or 'huggingface'"
        )
    rope: Any = hf.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"backend 'hooked' cannot read rope_type {rope['rope_type']!r} from a local folder; use 'bridge'"
        )
    if getattr(hf, "attention_bias", False) or getattr(hf, "mlp_bias", False):
        # TransformerLens' conversion would set these biases to zero.
        raise ValueError(
            f"backend 'hooked' cannot read {folder}: it has attention or MLP biases; use 'bridge'"
        )
    cfg = HookedTransformerConfig(
        model_name=Path(folder).name,
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        d_head=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_mlp=hf.intermediate_size,
        d_vocab=hf.vocab_size,
        n_ctx=min(hf.max_position_embeddings, 2048),  # it allocates an n_ctx x n_ctx mask in every layer
        act_fn=hf.hidden_act,
        eps=hf.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rotary_base=rope["rope_theta"],
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device=device,
        dtype=dtype,
    )
    model = hooked(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.load_and_process_state_dict(
        convert_llama_weights(weights, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.to(device).eval()
