"""The language model's part: the multi-layer hook point, evaluation, and feature collection."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, QUICK, ROUNDS, Compare, model_name, tokens_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import routesae_lens as rl
from routesae_lens.analysis import features

BACKENDS = ("huggingface", "bridge", "hooked")
NO_BAR: dict[str, Any] = {"progress": False}


def stopped(model: Any, tokens: torch.Tensor, last: int) -> Callable[[], Any]:
    """The bare forward up to block ``last``."""
    options: dict[str, Any] = {"stop_at_layer": last + 1}
    if not hasattr(model, "cfg"):  # SAELens' proxy stops once the named modules have run
        options["_names_filter"] = [rl.backend_of(model).hook_name(last, "hook_resid_post")]
    return torch.no_grad()(lambda: model(tokens, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hook_point(compare: Compare, load: Any, backend: str):
    model = load(backend)
    tokens = tokens_of(model)
    layers = rl.default_layers(rl.backend_of(model).n_layers)
    point = rl.mount_layers(model, layers)

    @torch.no_grad()
    def listen() -> Any:
        return model.run_with_cache(tokens, names_filter=[point], stop_at_layer=layers[-1] + 1)

    compare(
        listen,
        stopped(model, tokens, layers[-1]),
        group="Multi-layer hook point",
        name=backend,
        unit="the same stopped forward, bare",
        size=f"{model_name()}, blocks {layers[0]} to {layers[-1]}, {tokens.numel()} tokens",
        rounds=3 if QUICK else 11,
        goal=("<=", 1.05),
    )
    rl.unmount_layers(model, point)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends(compare: Compare, load: Any, backend: str):
    models = {name: load(name) for name in (backend, "huggingface")}
    tokens = tokens_of(models[backend])
    last = rl.default_layers(rl.backend_of(models[backend]).n_layers)[-1]
    row = compare(
        stopped(models[backend], tokens, last),
        stopped(models["huggingface"], tokens, last),
        group="Backends",
        name=backend,
        unit="the stopped forward of huggingface",
        size=f"{model_name()}, up to block {last}, {tokens.numel()} tokens",
    )
    row["tokens_per_s"] = tokens.numel() / row["seconds"]
    row["reference_tokens_per_s"] = tokens.numel() / row["reference_seconds"]


FAMILIES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 8, "n_embd": 512, "n_head": 8},
    "gpt_neox": {"intermediate_size": 2048},
    "opt": {"ffn_dim": 2048, "word_embed_proj_dim": 512},
    "qwen2": {"intermediate_size": 1536, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64},
    "mistral": {"intermediate_size": 1536, "num_key_value_heads": 2},
    "gemma2": {"intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64},
    "gemma3_text": {"intermediate_size": 1536, "num_key_value_heads": 2, "head_dim": 64},
}
"""Architectures with what their eight blocks of d 512 need beside :data:`SHAPE`; weights are random."""
SHAPE = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8}


@pytest.fixture
def load_family(small_folder: Path, tmp_path: Path) -> Callable[[str, str], Any]:
    """``load_family(family, backend)``: with the tokenizer of the small Llama."""

    def loaded(family: str, backend: str) -> Any:
        folder = tmp_path / family
        if not folder.exists():
            tokenizer = AutoTokenizer.from_pretrained(small_folder)
            sizes = FAMILIES[family] | ({} if family == "gpt2" else SHAPE)
            special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.bos_token_id)
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **sizes, **special)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return rl.load_model(folder, backend, device=DEVICE).eval()

    return loaded


@pytest.mark.parametrize("family", list(FAMILIES)[: 1 if QUICK else None])
def test_families(compare: Compare, load_family: Any, family: str):
    """Of the backends that read a folder of any architecture; HookedTransformer reads Llama's alone."""
    models = {backend: load_family(family, backend) for backend in ("bridge", "huggingface")}
    tokens = tokens_of(models["bridge"])
    compare(
        stopped(models["bridge"], tokens, 5),
        stopped(models["huggingface"], tokens, 5),
        group="Backends",
        name=f"bridge, {family}",
        unit="the stopped forward of huggingface",
        size=f"random weights, 8 blocks of d 512, up to block 5, {tokens.numel()} tokens",
        rounds=3 if QUICK else 11,
    )


def route_sae(model: Any, width: int) -> Any:
    torch.manual_seed(0)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    cfg = rl.RouteTopKSAEConfig.for_model(
        model, d_sae=64 if QUICK else width, k=8 if QUICK else 32, device=DEVICE, dtype=dtype
    )
    return rl.RouteTopKSAE(cfg)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation(compare: Compare, load: Any, backend: str):
    model = load(backend)
    tokens, sae = tokens_of(model), route_sae(model, 4608)
    compare(
        lambda: rl.evaluate(sae, model, tokens, batch_size=len(tokens), zero_ablation=False, **NO_BAR),
        torch.no_grad()(lambda: model(tokens)),
        group="Evaluation",
        name=backend,
        unit="full forward",
        size=f"{model_name()}, one batch of {tokens.numel()} tokens, RouteSAE of width {sae.cfg.d_sae}",
        rounds=3 if QUICK else 11,
        goal=("<=", 1.95 if backend == "hooked" else 2.1),
    )


@torch.no_grad()
def dense_batches(sae: Any, model: Any, tokens: torch.Tensor, batch_size: int) -> Iterator[tuple[Any, ...]]:
    """What the loop reads of every batch: its first sequence, the layer of every token, dense activations."""
    point = sae.mount(model)
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        _, cache = model.run_with_cache(batch, names_filter=[point], stop_at_layer=sae.layers[-1] + 1)
        route = sae.route(cache[point])
        yield start, route.layer, sae.encode_routed(route.input) / route.scale[..., None]


@torch.no_grad()
def naive_features(
    batches: Iterable[tuple[Any, ...]], tokenizer: Any, tokens: torch.Tensor, threshold: float, lean: bool
) -> Any:
    """The paper's rule in a loop over activations: a heap of two contexts per token class and latent.

    Returns the latents with at least four contexts, with the text around each, and how often each latent fired.
    The text is decoded as each context comes, or, if ``lean``, at the end for those that are kept.
    """

    def text_around(sequence: int, position: int) -> str:
        return tokenizer.decode(tokens[sequence, max(0, position - 32) : position + 32])

    heaps: Any = defaultdict(lambda: defaultdict(list))
    fired: Counter[tuple[int, int]] = Counter()
    special = set(tokenizer.all_special_ids)
    for start, layers, acts in batches:
        for sequence, position in product(range(len(acts)), range(1, acts.shape[1])):
            token = int(tokens[start + sequence, position])
            if token in special:
                continue
            text = tokenizer.decode([token]).strip().lower()
            layer = int(layers[sequence, position])
            row = acts[sequence, position]
            for latent in row.nonzero().flatten().tolist():
                activation = row[latent].item()
                fired[layer, latent] += 1
                if activation > threshold:
                    heap = heaps[latent][text]
                    passage = None if lean else text_around(start + sequence, position)
                    heapq.heappush(heap, (activation, -start - sequence, -position, passage))
                    if len(heap) > 2:
                        heapq.heappop(heap)
    found = {}
    for latent, classes in heaps.items():
        contexts = sorted((context for heap in classes.values() for context in heap), reverse=True)
        if len(contexts) >= 4:
            found[latent] = [
                text_around(-sequence, -position) if lean else passage
                for _, sequence, position, passage in contexts[:32]
            ]
    return found, fired


def give_stored_pass(
    monkeypatch: pytest.MonkeyPatch, sae: Any, model: Any, tokens: torch.Tensor, batch_size: int
) -> None:
    """``collect_features`` is given batches that were read and encoded before."""
    subjects = features.subjects_of({"sae": sae}, model)
    subject = subjects["sae"]
    batches = list(features.read_batches(subjects, model, tokens, batch_size=batch_size))
    readings = [batch.read(subject) for batch in batches]
    with torch.no_grad():
        codes = [
            subject.encode(reading, batch.keep) for reading, batch in zip(readings, batches, strict=True)
        ]
    code_of = {id(reading): code for reading, code in zip(readings, codes, strict=True)}
    monkeypatch.setattr(features, "subjects_of", lambda saes, model: subjects)
    monkeypatch.setattr(features, "read_batches", lambda *args, **options: iter(batches))
    monkeypatch.setattr(subject, "read", lambda activation, draw: readings[draw])
    monkeypatch.setattr(subject, "encode", lambda reading, keep: code_of[id(reading)])


ALONE, WHOLE = "choosing and texts alone", "pass and encoding included"
"""Both ways take the same pass and encode the same, which decides on a real model; alone is where they differ."""


@pytest.mark.parametrize("lean", [False, True], ids=["naive", "lean"])
@pytest.mark.parametrize("small, part", [(True, ALONE), (True, WHOLE)] + [(False, WHOLE)] * (not QUICK))
def test_features(
    compare: Compare, load: Any, monkeypatch: pytest.MonkeyPatch, small: bool, part: str, lean: bool
):
    model = load("huggingface", small)
    n_sequences = {"n_sequences": 384 if part == ALONE else 128} if small and not QUICK else {}
    tokens = tokens_of(model, **n_sequences)
    sae = route_sae(model, 4608)
    batch_size = 4 if QUICK else 8
    point = sae.mount(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens[:128], names_filter=[point])
        acts = sae.encode(cache[point])
    quantile = 0.5 if QUICK else 0.99  # one activation in a hundred is a context
    threshold = acts[acts > 0].float().quantile(quantile).item()
    options: dict[str, Any] = {"threshold": threshold, "relative": False, "batch_size": batch_size}
    stored = None
    if part == ALONE:
        give_stored_pass(monkeypatch, sae, model, tokens, batch_size)
        stored = list(dense_batches(sae, model, tokens, batch_size))

    def ours() -> Any:
        return rl.collect_features({"sae": sae}, model, tokens, **options, **NO_BAR)["sae"]

    def loop() -> Any:
        batches = stored or dense_batches(sae, model, tokens, batch_size)
        return naive_features(batches, model.tokenizer, tokens, threshold, lean)

    expected, _ = loop()
    found = {feature.id for feature in ours().features}
    # (a tie or a rounding may go either way)
    assert expected and len(found ^ expected.keys()) <= 0.02 * len(expected)
    compare(
        ours,
        loop,
        group="Feature collection",
        name=f"{part}, against a {'lean' if lean else 'naive'} loop",
        unit="a loop over activations that decodes "
        + ("what is kept" if lean else "each context as it comes"),
        size=f"{model_name(small)}, {tokens.numel()} tokens, RouteSAE of width {sae.cfg.d_sae}, k {sae.cfg.k}",
        times_faster=True,
        rounds=11 if part == ALONE and not QUICK else ROUNDS,
        goal=(">=", 10) if part == ALONE else None,
    )
