"""The same SAEs on a base model and its instruct model, and the other way round (Llama Scope, section 4.5.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from sae_lens import SAE
from sae_lens.util import get_special_token_ids
from torch import Tensor

from routesae_lens.analysis.evaluate import evaluate_all
from routesae_lens.analysis.metrics import Evaluation, Row
from routesae_lens.analysis.stream import check_tokens
from routesae_lens.backends import backend_of


@dataclass(frozen=True)
class ModelComparison:
    """The same SAEs on several models that read the same tokens."""

    evaluations: Mapping[str, Mapping[str, Evaluation]]
    """By model, then by SAE."""

    def rows(self) -> list[Row]:
        """One row of a table for each SAE on each model, the models of one SAE after each other."""
        saes = next(iter(self.evaluations.values()))
        return [
            {"sae": sae, "model": model, **results[sae].row()}
            for sae in saes
            for model, results in self.evaluations.items()
        ]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Ready for JSON."""
        return {
            model: {sae: result.to_dict() for sae, result in results.items()}
            for model, results in self.evaluations.items()
        }


def compare_models(
    saes: Mapping[str, SAE[Any]],
    models: Mapping[str, Any],
    tokens: Int[Tensor, "sequence pos"],
    *,
    exclude_special_tokens: bool | list[int] = True,
    **options: Any,
) -> ModelComparison:
    """Evaluate the same SAEs on a base model and its instruct model, or any such relatives (Llama Scope, figure 6).

    Losses are each model's own: a smaller delta can also mean that the text is easier for it.

    Args:
        saes: by name, trained on any of the models.
        models: by name, such as ``{"base": a, "instruct": b}``; they may be of different backends.
        tokens: what all of them read: plain text, or chats (see ``conversation_tokens``).
        exclude_special_tokens: as in ``evaluate_all``; True leaves out what is special to *any* of the models, so that
            the same tokens count for all.
        **options: of ``evaluate_all``.

    Raises:
        ValueError: fewer than two models, models that differ in width, depth or the meaning of the tokens (it says
            in which); or as ``evaluate_all``.
    """
    if not isinstance(models, Mapping) or len(models) < 2:
        got = list(models) if isinstance(models, Mapping) else type(models).__name__
        raise ValueError(f"expected two or more models by name, got {got}")
    for model in models.values():
        check_tokens(tokens, model)
    if different := _differences(models, tokens):
        raise ValueError(f"the models do not fit each other: {'; '.join(different)}")
    if exclude_special_tokens is True:
        tokenizers = _tokenizers(models).values()
        exclude_special_tokens = sorted(
            {token for tokenizer in tokenizers for token in get_special_token_ids(tokenizer)}
        )
    return ModelComparison(
        {
            name: evaluate_all(saes, model, tokens, exclude_special_tokens=exclude_special_tokens, **options)
            for name, model in models.items()
        }
    )


def _tokenizers(models: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: getattr(model, "tokenizer", None) for name, model in models.items()}
    return {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}


def _differences(models: Mapping[str, Any], tokens: Tensor) -> list[str]:
    """What the models do not have in common, of what SAEs and tokens need."""
    different = []
    for what in ("d_model", "n_layers"):
        sizes = {name: getattr(backend_of(model), what) for name, model in models.items()}
        if len(set(sizes.values())) > 1:
            different.append(f"{what} {_listed(sizes)}")
    tokenizers = _tokenizers(models)
    if len(tokenizers) < len(models):
        # Without texts to compare, sizes must do.
        sizes = {name: _vocabulary(model) for name, model in models.items()}
        if len(set(sizes.values())) > 1:
            different.append(f"vocabulary {_listed(sizes)}")
    # (an instruct model may have more tokens: those in the text must be the same)
    ids = tokens.unique().tolist()
    texts = {name: tokenizer.convert_ids_to_tokens(ids) for name, tokenizer in tokenizers.items()}
    for token, *several in zip(ids, *texts.values(), strict=True):
        if len(set(several)) > 1:
            different.append(f"token {token} {_listed(dict(zip(texts, map(repr, several), strict=True)))}")
            break
    return different


def _vocabulary(model: Any) -> int:
    cfg = getattr(model, "cfg", None) or model.model.config
    return getattr(cfg, "d_vocab", None) or cfg.vocab_size


def _listed(values: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{name}: {value}" for name, value in values.items()) + ")"
