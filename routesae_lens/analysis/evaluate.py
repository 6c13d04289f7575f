"""How good is an SAE? Splice its reconstructions into the language model and compare.

One clean forward gives the original distribution *and* the activations that decide the routes; then one
spliced and one zero-ablated forward per SAE. The same definitions serve RouteSAEs and ordinary SAELens
SAEs on HookedTransformer, TransformerBridge and HookedProxyLM, through plain forward hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from sae_lens import SAE
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm.auto import tqdm

from routesae_lens.analysis.metrics import Evaluation, Tally
from routesae_lens.analysis.subjects import subject_of
from routesae_lens.backends import backend_of
from routesae_lens.saes.route_sae import inference_form
from routesae_lens.splice.replace import Hook


def evaluate(sae: SAE[Any], model: Any, tokens: Int[Tensor, "sequence pos"], **options: Any) -> Evaluation:
    """:func:`evaluate_all` for one SAE."""
    return evaluate_all({"sae": sae}, model, tokens, **options)["sae"]


@torch.no_grad()
def evaluate_all(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    scale_by_p: bool = True,
    unscaled: bool = False,
    progress: bool = True,
) -> dict[str, Evaluation]:
    """Evaluate SAEs by splicing, all on the same clean pass.

    Args:
        saes: RouteSAEs and ordinary SAELens SAEs; training SAEs are converted to their inference form.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM. Points not yet mounted are mounted.
        tokens: held-out token ids (see :func:`held_out_tokens`).
        batch_size: sequences per forward. Only random routing depends on it: it draws anew for every batch.
        exclude_special_tokens: leave the tokenizer's special tokens (or these ids) out of the splice and all means.
        exclude_first_position: likewise position 0, whose norm is ~100 times the median.
        scale_by_p: splice consistently with training; False for the authors' unscaled splice.
        unscaled: also report ``kl_unscaled`` (one more forward for RouteSAEs with hard routing).
        progress: show a progress bar.

    Raises:
        ValueError: tokens that are not a non-empty batch of ids of this model, no kept token, SAEs made
            for another width or a hook this model lacks, or a model that answers NaN.
        RuntimeError: a splice hook that never fired.
    """
    if not saes:
        raise ValueError("no SAEs to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    if attached := sorted(getattr(model, "acts_to_saes", {})):
        raise ValueError(f"SAEs are attached to the model at {attached}; call model.reset_saes() first")
    check_tokens(tokens, model)
    keep_all = kept_tokens(tokens, model, exclude_special_tokens, exclude_first_position)
    if not keep_all.any():
        raise ValueError("every token is special or at position 0: nothing to evaluate")
    subjects = {name: subject_of(sae, model) for name, sae in saes.items()}
    tallies = {name: Tally(subject) for name, subject in subjects.items()}
    points = sorted({subject.point for subject in subjects.values()})
    starts = range(0, len(tokens), batch_size)
    for draw, start in enumerate(tqdm(starts, desc="evaluate", unit="batch", disable=not progress)):
        batch = tokens[start : start + batch_size].to(_input_device(model))
        keep = keep_all[start : start + batch_size].to(batch.device)
        clean, cache = model.run_with_cache(batch, names_filter=points)
        if not torch.isfinite(clean[keep[:, : clean.shape[1]]]).all():
            raise ValueError(
                f"the model's logits are not finite in sequences {start} to {start + len(batch) - 1}"
            )
        clean = clean.float().log_softmax(-1)  # once for all SAEs
        for name, subject in subjects.items():
            tally, reading = tallies[name], subject.read(cache[subject.point], draw)
            tally.add_reading(reading, keep)
            tally.add_clean(clean, batch, keep)
            hooks = subject.splice(reading, keep, scale_by_p)
            tally.add_spliced(clean, _run_hooked(model, batch, hooks), batch, keep)
            tally.add_zeroed(_run_hooked(model, batch, subject.zero(reading, keep)), batch, keep)
            if unscaled and scale_by_p and subject.scaled:
                hooks = subject.splice(reading, keep, False)
                tally.add_unscaled(clean, _run_hooked(model, batch, hooks), keep)
    return {name: tally.result(scale_by_p) for name, tally in tallies.items()}


def held_out_tokens(
    model: Any, texts: Iterable[str], *, n_sequences: int, context_size: int = 128
) -> Int[Tensor, "sequence pos"]:
    """Tokenise ``texts`` as SAELens' activation store does: documents joined by BOS, cut into full contexts.

    Raises:
        ValueError: the model has no tokenizer, or the texts give fewer than ``n_sequences`` sequences.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give token ids instead of text")
    if n_sequences < 1:
        raise ValueError(f"n_sequences must be 1 or more, got {n_sequences}")
    documents = (
        torch.tensor(ids, dtype=torch.long)
        for text in texts
        if (ids := tokenizer(text, add_special_tokens=False)["input_ids"])
    )
    bos = tokenizer.bos_token_id
    sequences = list(
        islice(
            concat_and_batch_sequences(
                documents, context_size, begin_batch_token_id=bos, sequence_separator_token_id=bos
            ),
            n_sequences,
        )
    )
    if len(sequences) < n_sequences:
        raise ValueError(
            f"the text gives {len(sequences)} sequences of {context_size} tokens, {n_sequences} are asked for"
        )
    return torch.stack(sequences)


def kept_tokens(
    tokens: Int[Tensor, "sequence pos"],
    model: Any,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
) -> Bool[Tensor, "sequence pos"]:
    """Which tokens are encoded and counted: not special, not at position 0."""
    keep = ~torch.isin(tokens, _special_ids(tokens, model, exclude_special_tokens))
    if exclude_first_position:
        keep[:, 0] = False
    return keep


class SpliceEvaluator:
    """:func:`evaluate_all` as SAELens' evaluator: ``runner.evaluator = SpliceEvaluator(model, tokens)``.

    Serves ``LanguageModelSAETrainingRunner`` (positional arguments) and ``MultiSAETrainingRunner``
    (keyword arguments), whose own evaluators cannot read a multi-layer hook point.
    """

    def __init__(self, model: Any, tokens: Int[Tensor, "sequence pos"], **options: Any):
        """``options`` go to :func:`evaluate_all`."""
        check_tokens(tokens, model)
        signature(evaluate_all).bind(
            {}, model, tokens, **options
        )  # a TypeError now rather than in mid-training
        self.model, self.tokens = model, tokens
        self.options = {"progress": False, **options}

    def __call__(
        self,
        sae: Any = None,
        data_provider: Any = None,
        activation_scaler: Any = None,
        *,
        saes: Mapping[str, Any] | None = None,
        activation_scalers: Mapping[str, Any] | None = None,
        hook_names: Mapping[str, str] | None = None,
    ) -> dict[str, float]:
        several = saes if saes is not None else {"": sae}
        scalers = activation_scalers if activation_scalers is not None else {"": activation_scaler}
        forms = {
            name: inference_form(s, getattr(scalers.get(name), "scaling_factor", None))
            for name, s in several.items()
            if s is not None
        }
        # The prefetching thread runs the same model: hooks of both would mix.
        pause: AbstractContextManager[None] = (
            data_provider.paused() if isinstance(data_provider, PrefetchingIterator) else nullcontext()
        )
        with pause:
            results = evaluate_all(forms, self.model, self.tokens, **self.options)
        return {
            f"{name}/eval/{metric}".lstrip("/"): value
            for name, result in results.items()
            for metric, value in _flat(result.to_dict())
        }


def _flat(metrics: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", float(value)


def _run_hooked(model: Any, tokens: Tensor, hooks: list[tuple[str, Hook]]) -> Tensor:
    fired: set[str] = set()

    def watched(name: str, fn: Hook) -> Hook:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            fired.add(name)
            return fn(x, hook=hook)

        return hook

    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, watched(name, fn)) for name, fn in hooks])
    if silent := sorted({name for name, _ in hooks} - fired):
        raise RuntimeError(f"splice hooks never fired, the splice touched nothing there: {silent}")
    return logits


def check_tokens(tokens: Tensor, model: Any) -> None:
    """Raise a ValueError unless ``tokens`` are ids this model can read, (sequence, pos)."""
    backend_of(model)
    if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool:
        raise ValueError(
            f"expected a tensor of token ids, got {getattr(tokens, 'dtype', type(tokens).__name__)}"
        )
    if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape or tokens.shape[1] < 2:
        raise ValueError(
            "expected token ids of shape (sequence, pos) with at least 2 positions, got "
            f"{tuple(tokens.shape)} of {tokens.dtype}"
        )
    cfg = getattr(model, "cfg", None) or model.model.config
    vocabulary = getattr(cfg, "d_vocab", None) or cfg.vocab_size
    context = getattr(cfg, "n_ctx", None) or cfg.max_position_embeddings
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise ValueError(
            f"token ids must be between 0 and {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )
    if tokens.shape[1] > context:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens exceed the model's context of {context}")


def _special_ids(tokens: Tensor, model: Any, exclude: bool | list[int]) -> Tensor:
    if exclude is False:
        ids: list[int] = []
    elif exclude is True:
        tokenizer = getattr(model, "tokenizer", None)
        ids = get_special_token_ids(tokenizer) if tokenizer is not None else []
    elif isinstance(exclude, list):
        ids = exclude
    else:
        raise ValueError(
            f"exclude_special_tokens must be True, False or a list of token ids, got {exclude!r}"
        )
    return torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)


def _input_device(model: Any) -> torch.device:
    return next(model.parameters()).device
