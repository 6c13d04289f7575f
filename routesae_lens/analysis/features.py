"""Interpretable features: contexts above a threshold, grouped by token, at least four of them (section 3.3).

One clean pass over held-out text serves all SAEs and all thresholds. The contexts above a high threshold are
those above a lower one, less some, and so are the strongest two of every token class; so a pass that collects
above a low threshold (``collect_above``) answers for every higher one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.contexts import (
    Context,
    ContextRows,
    PassageReader,
    TextClasses,
    TopContexts,
    first_of_group,
    rank_in_group,
    token_texts,
)
from routesae_lens.analysis.feature_set import BlockActivity, Feature, FeatureRule, FeatureSet
from routesae_lens.analysis.stream import read_batches, subjects_of
from routesae_lens.analysis.subjects import Reading, Subject
from routesae_lens.saes.fast_topk import Latents

PAPER_NORM = 2048**0.5
"""Norm of the standardised activations (d_model 2048) that the paper's threshold of 15 belongs to."""


@torch.no_grad()
def collect_features(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    threshold: int | float = 15.0,
    relative: bool = True,
    collect_above: int | float | None = None,
    contexts_per_token: int = 2,
    min_contexts: int = 4,
    max_token_classes: int | None = None,
    max_contexts: int | None = 32,
    context_tokens: int = 64,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> dict[str, FeatureSet]:
    """Find the interpretable features of SAEs, all on the same clean pass over ``tokens``.

    A context is a token on which a latent is above the threshold. Contexts are grouped by the class of that
    token (decoded, stripped, lower case), the strongest ``contexts_per_token`` of each class are kept, and
    a latent with fewer than ``min_contexts`` of them is no interpretable feature. The authors' code differs
    from the paper: it asks for ``min_contexts=5`` and drops latents of more than ``max_token_classes=32``.

    Activations are in units of p = 1 (divided by the token's routing weight), so that the router's confidence
    does not decide what counts. Firing frequencies, maxima and histograms over blocks are over all kept tokens.

    Args:
        saes: RouteSAEs, Crosscoders and ordinary SAELens SAEs; training SAEs are converted.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM that has a tokenizer.
        tokens: held-out token ids (see :func:`held_out_tokens`).
        threshold: activations strictly above it count; the paper's is 15.
        relative: the threshold belongs to inputs of norm sqrt(2048), as the paper's do, and is multiplied by
            ||input|| / sqrt(2048), where the input is what the SAE encodes (of a Crosscoder, one layer of it).
            If False, the threshold is the activation as it is.
        collect_above: the lowest threshold that counts can be asked for later; by default a third of
            ``threshold``.
        contexts_per_token: contexts kept of each token class.
        min_contexts: contexts that a feature must have.
        max_token_classes: a latent with contexts of more classes is dropped; by default none is.
        max_contexts: contexts listed of each feature, the strongest of those kept; None for all (memory then
            grows with the number of different tokens). Counts do not depend on it.
        context_tokens: length of the text of a context, in tokens, half of it before the activated one.
        batch_size: sequences per forward. Only random routing depends on it: it draws anew for every batch.
        exclude_special_tokens: leave out the tokenizer's special tokens (or these ids).
        exclude_first_position: likewise position 0, whose norm is ~100 times the median.
        progress: show progress bars.

    Raises:
        ValueError: an option out of range, tokens that are no ids of this model, no kept token, a model without
            a tokenizer, SAEs that do not fit the model, that encode every layer of a token (``routing="every"``)
            or whose activations are not finite.
    """
    rule = FeatureRule(
        threshold,
        relative,
        collect_above,
        contexts_per_token,
        min_contexts,
        max_token_classes,
        max_contexts,
        context_tokens,
    )
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: contexts are grouped by the text of their tokens")
    for name, sae in saes.items():
        if getattr(getattr(sae, "cfg", None), "routing", None) == "every":
            raise ValueError(
                f"SAE {name!r} encodes every layer of a token (routing='every'); interpretable features are "
                "collected from SAEs that encode each token once"
            )
    subjects = subjects_of(saes, model)
    batches = read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        progress="features" if progress else None,
    )
    texts = token_texts(tokens, tokenizer)
    classes = TextClasses(texts)
    collections = {name: _Collection(name, subject, rule, classes) for name, subject in subjects.items()}
    for batch in batches:
        place = batch.start * tokens.shape[1] + torch.arange(batch.tokens.numel(), device=batch.keep.device)
        for collection in collections.values():
            reading = batch.read(collection.subject)
            collection.add(reading, batch.keep, batch.tokens[batch.keep], place[batch.keep.flatten()])
    reader = PassageReader(tokens, tokenizer, texts, context_tokens)
    return {name: collection.result(reader, progress) for name, collection in collections.items()}


class _Collection:
    """Contexts and counts of one SAE while the text goes by."""

    def __init__(self, name: str, subject: Subject, rule: FeatureRule, classes: TextClasses):
        self.name, self.subject, self.rule, self.classes = name, subject, rule, classes
        self.d_sae = d_sae = subject.sae.cfg.d_sae
        self.contexts = TopContexts(
            d_sae,
            len(classes.names),
            above=rule.lowest,
            per_class=rule.contexts_per_token,
            per_feature=rule.held_per_feature,
        )
        self.tokens = 0
        self.every_layer = False
        layers = len(subject.layers)
        self.layer_tokens = torch.zeros(layers, dtype=torch.int64)
        self.active = torch.zeros(layers * d_sae, dtype=torch.int64)
        self.above = torch.zeros(layers * d_sae, dtype=torch.int64)
        self.sum = torch.zeros(layers * d_sae, dtype=torch.float64)
        self.max = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, reading: Reading, keep: Tensor, ids: Tensor, place: Tensor) -> None:
        """``ids`` and ``place`` (in the flattened text) are those of the kept tokens."""
        if not len(ids):
            return
        token, feature, value = Latents.of(self.subject.encode(reading, keep))
        if not torch.isfinite(value).all():
            raise ValueError(f"SAE {self.name!r} has activations that are not finite")
        positive = value > 0
        if not positive.all():  # (without a ReLU)
            token, feature, value = token[positive], feature[positive], value[positive]
        route, layer = reading.route, reading.layer[keep]
        scale = torch.ones_like(layer, dtype=torch.float64) if route is None else route.scale[keep].double()
        activation = value.double() / scale.index_select(0, token)
        strength = activation
        if self.rule.relative:
            norm = _input_norm(self.subject, reading, keep)
            # An input of norm 0 says nothing: what it activates is bias.
            unit = torch.where(norm > 0, PAPER_NORM / norm, 0.0)
            strength = activation * unit.index_select(0, token)
        cell = layer.index_select(0, token) * self.d_sae + feature
        self._count(layer, cell, feature, activation, strength)
        p = torch.full_like(scale, math.nan)
        if route is not None:
            p = route.probs[keep].gather(-1, layer[:, None]).squeeze(-1).double()
        if reading.every_layer:
            self.every_layer = True
            layer = torch.full_like(layer, -1)
        self.contexts.floor = self.contexts.floor.to(strength.device)
        high = (strength > self.contexts.floor.index_select(0, feature)).nonzero().squeeze(-1)
        of_token = (self.classes(ids), place, layer, p)
        token = token.index_select(0, high)
        token_class, place, layer, p = (column.index_select(0, token) for column in of_token)
        feature, strength, activation = (
            column.index_select(0, high) for column in (feature, strength, activation)
        )
        self.contexts.add(ContextRows(feature, token_class, strength, activation, place, layer, p))

    def _count(
        self, layer: Tensor, cell: Tensor, feature: Tensor, activation: Tensor, strength: Tensor
    ) -> None:
        self.tokens += len(layer)
        self.layer_tokens += layer.bincount(minlength=len(self.layer_tokens)).cpu()
        self.active += cell.bincount(minlength=len(self.active)).cpu()
        self.above += cell[strength > self.rule.threshold].bincount(minlength=len(self.active)).cpu()
        self.sum += cell.bincount(weights=activation, minlength=len(self.active)).cpu()
        self.max = self.max.to(activation.device).scatter_reduce(0, feature, activation, "amax")

    def result(self, reader: PassageReader, progress: bool) -> FeatureSet:
        rule, d_sae = self.rule, self.d_sae
        frequency = self.active.view(-1, d_sae).sum(0).double() / self.tokens
        largest = self.max.cpu()
        rows = self.contexts.rows()
        rows = None if rows is None else ContextRows(*(column.cpu() for column in rows))
        retained_below, crowded_below = _limits(rows, rule, d_sae, len(self.classes.names))
        candidates = []
        if rows is not None:
            above = (rows.strength > rule.threshold) & (retained_below > rule.threshold)[rows.feature]
            if rule.max_contexts is not None:  # (the strongest come first)
                above &= rank_in_group(rows.feature) < rule.max_contexts
            shown = rows.take(above.nonzero().squeeze(-1))
            latents, sizes = shown.feature.unique_consecutive(return_counts=True)
            contexts = self._contexts(shown, reader, progress)
            columns = (
                latents.tolist(),
                [
                    contexts[end - size : end]
                    for end, size in zip(sizes.cumsum(0).tolist(), sizes.tolist(), strict=True)
                ],
                frequency[latents].tolist(),
                largest[latents].tolist(),
                self._activity(latents),
                self._decoder_norms(latents),
            )
            candidates = list(map(Feature, *columns))
        return FeatureSet(
            self.name,
            rule,
            self.tokens,
            dict(zip(self.blocks, self.layer_tokens.tolist(), strict=False)),
            frequency,
            largest,
            retained_below,
            crowded_below,
            candidates,
        )

    @property
    def blocks(self) -> list[int]:
        """Blocks that tokens are routed to; none for an SAE that reads several at once."""
        return [] if self.every_layer else self.subject.layers

    def _activity(self, latents: Tensor) -> list[dict[int, BlockActivity]]:
        active, above, total = (
            cells.view(-1, self.d_sae)[:, latents].T for cells in (self.active, self.above, self.sum)
        )
        columns = (active, above, total / active.clamp(min=1))
        return [
            dict(zip(self.blocks, map(BlockActivity, *counts), strict=False))
            for counts in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def _decoder_norms(self, latents: Tensor) -> list[dict[int, float]]:
        sae: Any = self.subject.sae
        if not hasattr(sae, "decoder_norms"):
            return [{} for _ in range(len(latents))]
        norms = sae.decoder_norms().cpu()[:, latents].T
        return [dict(zip(self.subject.layers, column, strict=True)) for column in norms.tolist()]

    def _contexts(self, rows: ContextRows, reader: PassageReader, progress: bool) -> list[Context]:
        names, blocks, length = self.classes.names, dict(enumerate(self.blocks)), reader.tokens.shape[1]
        columns: dict[str, list[Any]] = {
            **reader.read(rows.token, f"contexts {self.name}" if progress else None)._asdict(),
            "token_class": [names[number] for number in rows.token_class.tolist()],
            "token_id": reader.tokens.flatten()[rows.token].tolist(),
            "activation": rows.activation.tolist(),
            "strength": rows.strength.tolist(),
            "block": [blocks.get(layer) for layer in rows.layer.tolist()],
            "p": [None if math.isnan(p) else p for p in rows.p.tolist()],
            "sequence": (rows.token // length).tolist(),
            "position": (rows.token % length).tolist(),
        }
        return list(map(Context._make, zip(*(columns[name] for name in Context._fields), strict=True)))


def _limits(rows: ContextRows | None, rule: FeatureRule, d_sae: int, n_classes: int) -> tuple[Tensor, Tensor]:
    """``FeatureSet.retained_below`` and ``crowded_below`` from the contexts, strongest first in each feature."""
    retained, crowded = torch.zeros(2, d_sae, dtype=torch.float64)
    if rows is not None:
        last_needed = rank_in_group(rows.feature) == rule.min_contexts - 1
        retained[rows.feature[last_needed]] = rows.strength[last_needed]
        if rule.max_token_classes is not None:
            first = first_of_group(rows.feature * n_classes + rows.token_class, 1)
            tops = rows.take(first.nonzero().squeeze(-1))
            one_too_many = rank_in_group(tops.feature) == rule.max_token_classes
            crowded[tops.feature[one_too_many]] = tops.strength[one_too_many]
    return retained, crowded


def _input_norm(subject: Subject, reading: Reading, keep: Tensor) -> Float[Tensor, " token"]:
    """Norm of what the SAE encodes, in units of p = 1, float64; of a Crosscoder's layers, the root mean square."""
    sae = subject.sae
    if reading.route is not None:
        return reading.route.input[keep].double().norm(dim=-1) / reading.route.scale[keep].double()
    if reading.every_layer:
        stack = reading.original if sae.cfg.standardize else reading.x
        return stack[keep].double().norm(dim=-1) / len(subject.layers) ** 0.5
    # SAELens may normalise at run time, and the latents are those of the normalised input.
    return sae.run_time_activation_norm_fn_in(reading.x[keep].to(sae.dtype)).double().norm(dim=-1)
