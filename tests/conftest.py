"""Tiny models and the settings that every test runs under. Nothing here asks a network."""

from __future__ import annotations

import copy
import os

# Before the libraries are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from sae_lens.load_model import HookedProxyLM
    from transformer_lens import HookedTransformer
    from transformer_lens.model_bridge import TransformerBridge

    from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge

torch.set_num_threads(1)  # several workers, tiny models: threads only get into each other's way

ROOT = Path(__file__).parents[1]

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A sparse autoencoder reads the residual stream of one layer; a router picks the layer.",
    "In the morning the river was quiet, and the boats lay still in the harbour.",
    "How many layers does the model have? It has six, and each of them writes to the stream.",
)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data next to the checkout; the test is skipped where there is none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' with reference data next to the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random six-layer Llama (d_model 32, 128 tokens) and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        num_hidden_layers=6,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,  # with the default 0.02 so small a model hardly does anything
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer():
    """Byte-level BPE with 128 entries; every printable ASCII text survives encode and decode."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=["<s>", "</s>", "<pad>"],
        # Printable ASCII stands for itself in byte-level BPE, Ġ for the space and Ċ for the newline.
        initial_alphabet=[*map(chr, range(33, 127)), "Ġ", "Ċ"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=64,
    )


# Function scope: tests hook, splice and train these models.


@pytest.fixture
def tiny_hooked() -> HookedTransformer:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=6,
        d_model=32,
        n_ctx=32,
        d_head=8,
        n_heads=4,
        d_mlp=64,
        d_vocab=64,
        act_fn="gelu",
        seed=0,
        device="cpu",
    )
    return HookedTransformer(config).eval()


@pytest.fixture
def tiny_bridge(tiny_llama_dir: Path) -> TransformerBridge:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(tiny_llama_dir), device="cpu").eval()


@pytest.fixture
def tiny_proxy(tiny_llama_dir: Path) -> HookedProxyLM:
    from sae_lens.load_model import HookedProxyLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    return HookedProxyLM(model, AutoTokenizer.from_pretrained(tiny_llama_dir)).eval()


@pytest.fixture
def hooked(tiny_hooked: HookedTransformer) -> HookedRouteSAETransformer:
    from routesae_lens.splice.hooked import HookedRouteSAETransformer

    return HookedRouteSAETransformer.from_model(tiny_hooked)


@pytest.fixture
def bridge(tiny_bridge: TransformerBridge) -> RouteSAETransformerBridge:
    from routesae_lens.splice.hooked import RouteSAETransformerBridge

    return RouteSAETransformerBridge.from_model(tiny_bridge)


@pytest.fixture(params=["hooked", "bridge"])
def model(request: pytest.FixtureRequest):
    """Both model classes that carry RouteSAEs."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def exact_models(tiny_llama_dir: Path) -> dict:
    """What ``exact`` hands out copies of."""
    from routesae_lens.models import load_model
    from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge

    models = {}
    for name, model_class in (("hooked", HookedRouteSAETransformer), ("bridge", RouteSAETransformerBridge)):
        model = load_model(tiny_llama_dir, name, device="cpu", model_class=model_class)
        model.to(torch.float64)
        model.cfg.dtype = torch.float64
        models[name] = model.eval()
    return models


@pytest.fixture(params=["hooked", "bridge"])
def exact(request: pytest.FixtureRequest, exact_models: dict, monkeypatch: pytest.MonkeyPatch):
    """Both model classes with the tiny Llama and its tokenizer, in float64: equal means equal.

    The bridge computes its attention's softmax in float32 whatever the model's dtype. There float64's most
    negative number, with which it masks, is -inf, so that left padding gives NaN; here it is float64 too.
    """
    softmax = torch.nn.functional.softmax

    def wide_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)
    return copy.deepcopy(exact_models[request.param])


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users run the package: no type checker reports wrong types before the package's own errors."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
