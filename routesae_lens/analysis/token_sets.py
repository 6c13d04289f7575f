"""Chosen tokens of a text, such as the verbs among them, and what each SAE activates there: one clean pass for all.

Scale SAE measures on sets of tokens: 1,500 past-tense verbs (section 3.3.1), 13,500 verbs (section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.stream import check_tokens, kept_tokens, read_batches, subjects_of
from routesae_lens.analysis.subjects import Reading, Subject
from routesae_lens.analysis.token_classes import texts_in_context
from routesae_lens.saes.fast_topk import Latents
from routesae_lens.saes.sparse_products import TopKCode

Where = Bool[Tensor, "sequence pos"] | Callable[[str], bool] | Collection[str]
"""Which tokens: a mask, a rule for the text of a token (with the space before it), or a list of words."""


def chosen_tokens(
    tokens: Int[Tensor, "sequence pos"],
    model: Any,
    where: Where | None = None,
    *,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
) -> Bool[Tensor, "sequence pos"]:
    """Which tokens belong to a set; special tokens and position 0 never do.

    A rule and a list of words see one token at a time, without its neighbours: a word that the tokenizer cuts into
    pieces is not found, and ``" saw"`` is the same token for the verb and the tool.

    Args:
        tokens: token ids.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        where: a mask like ``tokens``; or a function of a token's text as it stands in running text, such as
            ``lambda text: text.endswith("ed")``; or words, compared stripped and in lower case. None for every token.
        exclude_special_tokens: the tokenizer's special tokens (or these ids) do not count.
        exclude_first_position: nor does position 0, whose norm is ~100 times the median.

    Raises:
        ValueError: no tokens of this model, a mask of another shape or dtype, a model without a tokenizer whose tokens
            are to be told by their text, or no token left.
    """
    check_tokens(tokens, model)
    keep = kept_tokens(tokens, model, exclude_special_tokens, exclude_first_position)
    if where is not None:
        keep &= _told(tokens, model, where).to(keep.device)
    if not keep.any():
        raise ValueError("no token is in the set: none is chosen, or all chosen are special or at position 0")
    return keep


def _told(tokens: Tensor, model: Any, where: Where) -> Tensor:
    if isinstance(where, Tensor):
        if where.dtype != torch.bool or where.shape != tokens.shape:
            raise ValueError(
                f"expected a mask of shape {tuple(tokens.shape)}, got {where.dtype} of {tuple(where.shape)}"
            )
        return where
    if isinstance(where, str) or not (callable(where) or isinstance(where, Collection)):
        raise ValueError(
            f"where must be a mask, a function of a token's text or a list of words, got {where!r}"
        )
    if not callable(where) and (other := [word for word in where if not isinstance(word, str)]):
        raise ValueError(
            f"words must be text, got {other[0]!r}; for token ids give the mask torch.isin(tokens, ids)"
        )
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: give a mask, tokens cannot be told by their text")
    if callable(where):
        rule = where
    else:
        words = {word.strip().lower() for word in where}

        def rule(text: str) -> bool:
            return text.strip().lower() in words

    ids, inverse = tokens.cpu().unique(return_inverse=True)
    texts = texts_in_context(tokenizer, ids.tolist())
    return torch.tensor([bool(rule(text)) for text in texts])[inverse]


class Activity(NamedTuple):
    """What one SAE activates on some more tokens of the set."""

    name: str
    sae: SAE[Any]
    """In its inference form."""
    latents: Latents
    n: int
    """Tokens, also those on which nothing is active."""
    place: Int[Tensor, " token"]
    """Where they are in the flattened text."""
    experts: Int[Tensor, "token active"] | None
    """The experts that the SAE's own router selected for each; None for SAEs that have none."""

    def among(self, keep: Bool[Tensor, "sequence pos"]) -> Activity:
        """The same on those of the tokens alone that ``keep`` holds, so that one pass serves several sets."""
        inside = keep.flatten().to(self.place.device)[self.place]
        number, some = inside.cumsum(0) - 1, inside[self.latents.token]
        token, latent, value = (column[some] for column in self.latents)
        experts = None if self.experts is None else self.experts[inside]
        latents = Latents(number[token], latent, value)
        return Activity(self.name, self.sae, latents, int(inside.sum()), self.place[inside], experts)


@torch.no_grad()
def read_token_set(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    keep: Bool[Tensor, "sequence pos"],
    *,
    batch_size: int = 4,
    progress: str | None = None,
) -> Iterator[Activity]:
    """The latents of every SAE on the tokens of a set: one clean forward per batch, then the SAEs in turn.

    Sequences without a token of the set are not read. (Random routing draws anew for every batch, so that its layers
    depend on the set.)

    Args:
        saes: RouteSAEs, Crosscoders and ordinary SAELens SAEs; training SAEs are converted.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM.
        tokens: token ids.
        keep: of :func:`chosen_tokens`.
        batch_size: sequences per forward.
        progress: caption of the progress bar, none without.

    Raises:
        ValueError: at once for SAEs that do not fit the model or that encode every layer of a token
            (``routing="every"``), tokens that are none of this model or an empty set; later for latents that are not
            finite.
    """
    if keep.shape != tokens.shape or not keep.any():
        raise ValueError(f"expected a set of tokens of shape {tuple(tokens.shape)} that is not empty")
    subjects = subjects_of(saes, model)
    for name, subject in subjects.items():
        if getattr(subject.sae.cfg, "routing", None) == "every":
            raise ValueError(
                f"SAE {name!r} encodes every layer of a token (routing='every'); sets of tokens are measured on SAEs "
                "that encode each token once"
            )
    place = keep.flatten().nonzero().flatten()
    rows = keep.any(dim=1)
    tokens, keep = tokens[rows.to(tokens.device)], keep[rows]
    batches = read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=False,
        exclude_first_position=False,
        progress=progress,
    )

    def activities() -> Iterator[Activity]:
        seen = 0
        for batch in batches:
            chosen = keep[batch.start : batch.start + len(batch.tokens)].to(batch.keep.device)
            n = int(chosen.sum())
            where = place[seen : seen + n].to(chosen.device)
            seen += n
            for name, subject in subjects.items():
                with torch.no_grad():
                    reading = batch.read(subject)
                    latents = finite_latents(subject.encode(reading, chosen), name)
                    experts = _selected(subject, reading, chosen)
                yield Activity(name, subject.sae, latents, n, where, experts)

    return activities()


def _selected(subject: Subject, reading: Reading, keep: Tensor) -> Tensor | None:
    sae: Any = subject.sae
    if not hasattr(sae, "choose_experts"):
        return None
    x = reading.x if reading.route is None else reading.route.input
    # (what its router reads is normalised where SAELens normalises at run time)
    chosen: Tensor = sae.choose_experts(sae.run_time_activation_norm_fn_in(x[keep].to(sae.dtype))).chosen
    return chosen


def finite_latents(code: TopKCode | Float[Tensor, "token d_sae"], name: str) -> Latents:
    """The latents of a batch.

    Raises:
        ValueError: they are not finite.
    """
    latents = Latents.of(code)
    if not torch.isfinite(latents.value).all():
        raise ValueError(f"SAE {name!r} has latents that are not finite")
    return latents
