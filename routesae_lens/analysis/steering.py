"""What steering does to a model's text: original and steered side by side, and the dose-response of a feature.

A steered completion is judged by three things: how far its next-token distributions are from the clean
model's (KL), how likely the clean model finds the text (perplexity), and whether the text itself expresses the
feature, that is, whether the feature fires when the clean model reads it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from tqdm.auto import tqdm

from routesae_lens.analysis.completions import Completion, GenerationOptions, complete, perplexity, prepared
from routesae_lens.analysis.prompts import Prompt
from routesae_lens.splice.edits import Ablate, Edit, Set, check_edits


@dataclass
class SteeredPair:
    """One prompt, completed by the model as it is and by the steered model."""

    prompt: str
    """As the model was given it: a chat as its template renders it."""
    original: Completion
    steered: Completion

    @property
    def changed(self) -> float:
        """Share of places at which the two have different tokens; where one has ended they differ."""
        return changed(self.original, self.steered)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "prompt": self.prompt,
            "changed": self.changed,
            "original": self.original.to_dict(),
            "steered": self.steered.to_dict(),
        }


def steer_completions(
    model: Any,
    sae: SAE[Any],
    edits: Mapping[int, Edit],
    prompts: Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    progress: bool = True,
    **steering: Any,
) -> list[SteeredPair]:
    """Original and steered completions of prompts, with what the clean model and the SAE make of both.

    Sampled pairs share their random numbers, so that they differ by the steering alone.

    Args:
        model: a HookedRouteSAETransformer or RouteSAETransformerBridge with a tokenizer.
        sae: a RouteSAE, Crosscoder or ordinary SAE, not attached.
        edits: ``Set``, ``Add``, ``Scale`` or ``Ablate`` by latent.
        prompts: texts, or chats as lists of turns.
        options: how to generate; by default 40 tokens, greedily.
        progress: show progress bars.
        **steering: the other arguments of ``model.steer``: positions, layers, use_error_term, maxima,
            exclude_special_tokens, scale_by_p.

    Returns:
        ``options.samples`` pairs of each prompt, in the order of the prompts.

    Raises:
        TypeError, ValueError: a model, SAE, edit or prompt that does not do; before anything is generated.
    """
    options = options or GenerationOptions()
    with prepared(model, sae, prompts, options) as ready, model.steer(sae, edits, **steering):
        rendered = [model.tokenizer.decode(tokens) for tokens in ready.prompts]
    common: dict[str, Any] = {"options": options, "read": edits}
    original = complete(model, sae, prompts, progress="original" if progress else None, **common)
    steered = complete(
        model, sae, prompts, edits, progress="steered" if progress else None, **common, **steering
    )
    return [
        SteeredPair(rendered[one.prompt], one, other) for one, other in zip(original, steered, strict=True)
    ]


@dataclass
class DoseRow:
    """Completions at one strength: means over them, each counting the same, and standard deviations between
    them (over prompts and samples; None for a single one)."""

    value: float | None
    """The strength; None for the unsteered completions."""
    completions: int
    tokens: int
    """Generated, in all completions."""
    kl: float
    """KL(clean || steered) per generated token, nats."""
    kl_std: float | None
    activation: float
    """Of the feature in a clean reading of the completions, per token, in units of p = 1."""
    activation_std: float | None
    firing_share: float
    """Share of tokens on which it fires in a clean reading."""
    firing_share_std: float | None
    nll: float
    """Mean negative log-probability of the tokens under the clean model, nats."""
    nll_std: float | None
    perplexity: float
    """exp(nll)."""
    changed: float
    """Share of tokens that are not those of the unsteered completion."""
    changed_std: float | None


@dataclass
class DoseResponse:
    """What steering one feature at several strengths does."""

    feature: int
    edit: str
    """Name of the edit."""
    relative: bool
    """Whether the strengths are in units of the feature's own maximum."""
    rows: list[DoseRow]
    """Unsteered first, then the strengths as they were given."""
    completions: list[list[Completion]]
    """Those behind each row."""

    def to_frame(self) -> pd.DataFrame:
        """One row per strength, ready for CSV; the unsteered one has no value."""
        rows = [
            {"feature": self.feature, "edit": self.edit, "relative": self.relative, **asdict(row)}
            for row in self.rows
        ]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; of the completions the texts."""
        return {
            "feature": self.feature,
            "edit": self.edit,
            "relative": self.relative,
            "rows": [asdict(row) for row in self.rows],
            "texts": [[completion.text for completion in row] for row in self.completions],
        }


def dose_response(
    model: Any,
    sae: SAE[Any],
    feature: int,
    values: Sequence[float],
    prompts: Sequence[Prompt],
    *,
    edit: Callable[..., Edit] = Set,
    relative: bool = False,
    maxima: Mapping[int, float] | torch.Tensor | None = None,
    options: GenerationOptions | None = None,
    read: Iterable[int] = (),
    unsteered: list[Completion] | None = None,
    progress: bool = True,
    **steering: Any,
) -> DoseResponse:
    """Steer one feature at several strengths and measure text and model.

    Args:
        model, sae, prompts, options: as for :func:`steer_completions`.
        feature: number of the latent.
        values: strengths, or factors for ``Scale``.
        edit: ``Set``, ``Add`` or ``Scale``.
        relative: strengths are in units of the feature's maximum, which ``maxima`` gives.
        maxima: as for ``model.steer``.
        read: other latents to read in the completions.
        unsteered: completions of the same prompts with the same options, read for this feature; they are
            generated if not given. With it, several features share them.
        progress: show a progress bar.
        **steering: positions, layers, use_error_term, exclude_special_tokens, scale_by_p.

    Raises:
        TypeError, ValueError: as :func:`steer_completions`; no values, one that is no finite number, an edit
            without a strength, or ``unsteered`` of other prompts or without readings of this feature.
    """
    options = options or GenerationOptions()
    edits = [_edit(edit, value, relative) for value in values]
    if not edits:
        raise ValueError("no values to steer at")
    for one in edits:
        check_edits({feature: one}, sae.cfg.d_sae, maxima)
    if unsteered is not None:
        expected = [(i, j) for i in range(len(prompts)) for j in range(options.samples)]
        if [(one.prompt, one.sample) for one in unsteered] != expected:
            raise ValueError(
                f"unsteered must be {options.samples} completions of each of {len(prompts)} prompts, in order"
            )
        if not all(feature in one.activations for one in unsteered):
            raise ValueError(
                f"unsteered holds no readings of latent {feature}: complete(..., read=[{feature}])"
            )
    steering["maxima"] = maxima
    with prepared(model, sae, prompts, options), model.steer(sae, {feature: edits[0]}, **steering):
        pass
    common: dict[str, Any] = {"read": [feature, *read], "options": options, "progress": None}
    steps = tqdm(edits, desc=f"latent {feature}", unit="strength", disable=not progress)
    if unsteered is None:
        unsteered = complete(model, sae, prompts, **common)
    found = [
        unsteered,
        *(complete(model, sae, prompts, {feature: one}, **common, **steering) for one in steps),
    ]
    rows = [
        dose_row(feature, value, completions, unsteered)
        for value, completions in zip([None, *map(float, values)], found, strict=True)
    ]
    return DoseResponse(feature, edits[0].__class__.__name__, relative, rows, found)


def _edit(edit: Callable[..., Edit], value: Any, relative: bool) -> Edit:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"strengths must be finite numbers, got {value!r}")
    if edit is Ablate or not callable(edit):
        raise TypeError(f"edit must be Set, Add or Scale, which take a strength; got {edit!r}")
    try:
        return edit(value, relative=True) if relative else edit(value)
    except TypeError as error:
        raise TypeError(f"{getattr(edit, '__name__', edit)} takes no relative strength") from error


def dose_row(
    feature: int, value: float | None, completions: Sequence[Completion], unsteered: Sequence[Completion]
) -> DoseRow:
    """The row of some completions; ``unsteered`` are the ones they belong to, in the same order."""
    kl = [one.mean_kl for one in completions]
    activation = [one.mean_activation(feature) for one in completions]
    firing = [one.firing_share(feature) for one in completions]
    nll = [one.nll for one in completions]
    different = [changed(before, one) for before, one in zip(unsteered, completions, strict=True)]
    return DoseRow(
        value=value,
        completions=len(completions),
        tokens=sum(len(one.tokens) for one in completions),
        kl=statistics.fmean(kl),
        kl_std=_spread(kl),
        activation=statistics.fmean(activation),
        activation_std=_spread(activation),
        firing_share=statistics.fmean(firing),
        firing_share_std=_spread(firing),
        nll=statistics.fmean(nll),
        nll_std=_spread(nll),
        perplexity=perplexity(statistics.fmean(nll)),
        changed=statistics.fmean(different),
        changed_std=_spread(different),
    )


def changed(one: Completion, other: Completion) -> float:
    """Share of places at which two completions have different tokens; where one has ended they differ."""
    same = sum(a == b for a, b in zip(one.tokens, other.tokens, strict=False))
    return 1 - same / max(len(one.tokens), len(other.tokens))


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
