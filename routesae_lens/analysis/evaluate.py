"""How good is an SAE? Splice its reconstructions into the language model and compare.

One clean forward gives the original distribution *and* the activations that decide the routes; then one
spliced and one zero-ablated forward per SAE, which begin at the first block that is replaced. The same
definitions serve RouteSAEs, Crosscoders and ordinary SAELens SAEs on HookedTransformer, TransformerBridge and
HookedProxyLM, through plain forward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.training.prefetch import PrefetchingIterator
from torch import Tensor

from routesae_lens.analysis.metrics import Evaluation, Tally
from routesae_lens.analysis.next_tokens import NextTokens
from routesae_lens.analysis.stream import check_tokens, read_batches, subjects_of
from routesae_lens.analysis.subjects import CrosscoderSubject, Reading, Subject
from routesae_lens.saes.forms import inference_form
from routesae_lens.splice.late_logits import Logits, Unembedding
from routesae_lens.splice.prefix import SharedPrefix
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
    zero_ablation: bool = True,
    splice_layers: Sequence[int] | None = None,
    progress: bool = True,
) -> dict[str, Evaluation]:
    """Evaluate SAEs by splicing, all on the same clean pass.

    Args:
        saes: RouteSAEs, Crosscoders and ordinary SAELens SAEs; training SAEs are converted to their
            inference form.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM. Points not yet mounted are mounted.
        tokens: held-out token ids (see :func:`held_out_tokens`).
        batch_size: sequences per forward. Only random routing depends on it: it draws anew for every batch.
        exclude_special_tokens: leave the tokenizer's special tokens (or these ids) out of the splice and all means.
        exclude_first_position: likewise position 0, whose norm is ~100 times the median.
        scale_by_p: splice consistently with training; False for the authors' unscaled splice.
        unscaled: also report ``kl_unscaled`` (one more forward for RouteSAEs with hard routing).
        zero_ablation: report ``ce_zero`` and ``loss_recovered`` (one more forward for each choice of layers);
            without it they are None.
        splice_layers: block numbers at which Crosscoders are spliced and zero-ablated, all that they read by
            default. NormMSE and explained variance are about all layers in any case.
        progress: show a progress bar.

    Raises:
        ValueError: tokens that are not a non-empty batch of ids of this model, no kept token, SAEs made
            for another width or a hook this model lacks, a model that answers NaN, or ``splice_layers``
            without a Crosscoder, or with layers that one of them does not read.
        RuntimeError: a splice hook that never fired.
    """
    subjects = subjects_of(saes, model)
    if splice_layers is not None:
        _choose_layers(subjects, splice_layers)
    tallies = {name: Tally(subject) for name, subject in subjects.items()}
    prefix = SharedPrefix(model, [name for subject in subjects.values() for name in subject.replaces])
    unembedding = Unembedding(model)
    for batch in read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        logits=unembedding,
        prefix=prefix,
        progress="evaluate" if progress else None,
    ):
        assert batch.logits is not None
        ids, keep = batch.tokens, batch.keep
        if len(subjects) > 1 or (unscaled and scale_by_p):  # (what is compared several times is made once)
            batch.logits.whole()
        clean = NextTokens(batch.logits, ids, keep, batch.start)
        rerun = partial(logits_with_hooks, model, ids, prefix, unembedding)
        zeroed = _ZeroPasses(rerun, clean)
        for name, subject in subjects.items():
            tally, reading = tallies[name], batch.read(subject)
            tally.add_reading(reading, keep)
            tally.add_spliced(clean, clean.compare(rerun(subject.splice(reading, keep, scale_by_p))))
            if zero_ablation:
                tally.add_zeroed(zeroed(subject, reading, keep))
            if unscaled and scale_by_p and subject.scaled:
                tally.add_unscaled(clean, rerun(subject.splice(reading, keep, False)))
        del batch, clean, rerun, zeroed  # (before the next batch's logits are made)
    return {name: tally.result(scale_by_p) for name, tally in tallies.items()}


def _choose_layers(subjects: Mapping[str, Subject], splice_layers: Sequence[int]) -> None:
    crosscoders = {
        name: subject for name, subject in subjects.items() if isinstance(subject, CrosscoderSubject)
    }
    if not crosscoders:
        raise ValueError(
            f"splice_layers={list(splice_layers)} is for Crosscoders, and none of {', '.join(subjects)} is one"
        )
    for name, subject in crosscoders.items():
        try:
            subject.splice_at(splice_layers)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


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


class _ZeroPasses:
    """Cross-entropy of a batch with the replaced activations zeroed, once for SAEs that replace the same."""

    def __init__(self, rerun: Callable[[list[tuple[str, Hook]]], Logits], clean: NextTokens):
        self.rerun, self.clean = rerun, clean
        self.done: list[tuple[tuple[Any, ...], Tensor, float]] = []

    def __call__(self, subject: Subject, reading: Reading, keep: Tensor) -> float:
        where = (type(subject), subject.point, tuple(subject.layers))
        for known, layer, total in self.done:
            if known == where and torch.equal(layer, reading.layer):
                return total
        total = self.clean.cross_entropy(self.rerun(subject.zero(reading, keep)))
        self.done.append((where, reading.layer, total))
        return total


def logits_with_hooks(
    model: Any,
    tokens: Int[Tensor, "batch pos"],
    prefix: SharedPrefix,
    unembedding: Unembedding,
    hooks: list[tuple[str, Hook]],
) -> Logits:
    """Logits of the batch that ``prefix`` recorded last, with hooks, one at a point.

    Raises:
        RuntimeError: a hook that never fired.
    """
    points, fired = model.hook_dict, set()
    # (a TransformerBridge knows some points by other names as well; they call hooks by their own)
    fns = {(points[name].name or name) if name in points else name: fn for name, fn in hooks}

    def spliced(x: Tensor, hook: Any) -> Tensor:
        fired.add(hook.name)
        return fns[hook.name](x, hook=hook)

    with prefix.skipped():
        # (one filter for all: for every name it is given, a TransformerBridge lists all its hooks and their aliases)
        fwd_hooks = [(fns.__contains__, spliced)]
        logits = unembedding.logits(lambda: model.run_with_hooks(tokens, fwd_hooks=fwd_hooks))
    if silent := sorted(fns.keys() - fired):
        raise RuntimeError(f"splice hooks never fired, the splice touched nothing there: {silent}")
    return logits
