"""Where do tokens go? (RouteSAE, section 3.5 and figure 9.)

:func:`analyse_routing` counts the routes of held-out tokens (figure 9 b), :func:`training_shares` reads those
of training from its log (figure 9 a).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE
from torch import Tensor

from routesae_lens.analysis.stream import Batch, read_batches, subjects_of
from routesae_lens.analysis.subjects import Subject
from routesae_lens.analysis.token_classes import TOKEN_CLASSES, class_table
from routesae_lens.saes.route_sae import RouteSAE


@dataclass
class RoutingProfile:
    """How one RouteSAE routes. "Token" means a kept token; layers are block numbers; information is in nats.

    Standard errors are over sequences, since the tokens of one sequence are not independent.
    A number that has no value here (for instance a standard error of one sequence) is NaN, in JSON null.
    """

    tokens: int
    sequences: int
    layers: list[int]
    layer_share: dict[int, float]
    """Share of tokens routed to each layer; for mixtures of layers, of tokens that weigh it most."""
    layer_share_stderr: dict[int, float]
    layer_weight: dict[int, float]
    """Mean probability of each layer over tokens (figure 9 b)."""
    layer_weight_stderr: dict[int, float]
    mean_p: float
    """Mean probability of the chosen layer."""
    mean_p_stderr: float
    entropy: float
    """Mean entropy of a token's layer probabilities; log(number of layers) is a router that does not care."""
    entropy_stderr: float
    entropy_of_mean: float
    """Entropy of ``layer_share``: 0 where one layer takes all (collapse)."""
    effective_layers: float
    """exp(``entropy_of_mean``): the number of equally used layers with that entropy."""
    pairs: int
    """Neighbours: two kept tokens at adjacent positions of one sequence."""
    switch_rate: float
    """Share of neighbours that are routed to different layers ..."""
    switch_rate_stderr: float
    switch_rate_independent: float
    """... and what it would be if tokens were routed independently of each other: 1 - sum of shares squared."""
    tokens_by_class: dict[str, int]
    """Tokens of each class that occurs (``token_classes.TOKEN_CLASSES``); empty without a tokenizer."""
    share_by_class: dict[str, dict[int, float]]
    """``layer_share`` among the tokens of one class."""
    class_information: float
    """Mutual information of a token's class and its layer; ``entropy_of_mean`` if the class decided alone.
    As estimated from finite counts it is above 0 even where there is none:"""
    class_information_shuffled: float
    """``class_information`` of the same tokens with their layers shuffled among them."""
    token_information: float
    """Mutual information of the token id and the layer. There are many ids, most of them rare, so the
    finite counts alone make it large: compare it with"""
    token_information_shuffled: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON."""
        return _without_nan(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingProfile:
        """The inverse of :meth:`to_dict`, also after JSON has turned block numbers into text.

        Raises:
            ValueError: fields are missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if wrong := sorted(names ^ set(values)):
            raise ValueError(f"not a RoutingProfile: {', '.join(wrong)} missing or unknown")
        return cls(**{name: _with_nan(value) for name, value in values.items()})


@torch.no_grad()
def analyse_routing(
    saes: Mapping[str, SAE[Any]],
    model: Any,
    tokens: Int[Tensor, "sequence pos"],
    *,
    batch_size: int = 4,
    exclude_special_tokens: bool | list[int] = True,
    exclude_first_position: bool = True,
    progress: bool = True,
) -> dict[str, RoutingProfile]:
    """The routes of all RouteSAEs among ``saes`` on the same clean pass.

    Other SAEs choose no layer, nor do those with ``routing="every"`` (MLSAE): they are left out.

    Args:
        saes: SAEs by name; training SAEs are converted to their inference form.
        model: a HookedTransformer, TransformerBridge or HookedProxyLM; its tokenizer gives the token classes.
        tokens: held-out token ids, see ``held_out_tokens``.
        batch_size: sequences per forward. Only random routing depends on it: it draws anew for every batch.
        exclude_special_tokens: the tokenizer's special tokens (or these ids) do not count.
        exclude_first_position: nor does position 0.
        progress: show a progress bar.

    Raises:
        ValueError: none of ``saes`` chooses layers, or as ``evaluate_all``.
    """
    subjects = _routed(subjects_of(saes, model))
    batches = read_batches(
        subjects,
        model,
        tokens,
        batch_size=batch_size,
        exclude_special_tokens=exclude_special_tokens,
        exclude_first_position=exclude_first_position,
        progress="routing" if progress else None,
    )
    size = int(tokens.max()) + 1
    tallies = {name: _RouteTally(subject.layers, size) for name, subject in subjects.items()}
    tokenizer = getattr(model, "tokenizer", None)
    classes = None if tokenizer is None else _classes_up_to(tokenizer, size)
    for batch in batches:
        for name, subject in subjects.items():
            route = batch.read(subject).route
            assert route is not None
            tallies[name].add(route.probs, route.layer, batch)
    return {name: tally.result(classes) for name, tally in tallies.items()}


def _routed(subjects: Mapping[str, Subject]) -> dict[str, Subject]:
    routed = {
        name: subject
        for name, subject in subjects.items()
        if isinstance(subject.sae, RouteSAE) and subject.sae.cfg.routing != "every"
    }
    if not routed:
        kinds = ", ".join(f"{name} ({type(subject.sae).__name__})" for name, subject in subjects.items())
        raise ValueError(
            f"expected at least one RouteSAE that chooses a layer for each token, got only SAEs that do not: {kinds}"
        )
    return routed


def _classes_up_to(tokenizer: Any, size: int) -> Int[Tensor, " vocab"]:
    """Class index of ids 0 to size - 1."""
    names, table = class_table(tokenizer)
    padded = torch.full((size,), names.index("other"))
    padded[: len(table)] = table[:size]
    return padded


class _RouteTally:
    """Sums and counts of one RouteSAE's routes. Memory does not grow with the number of tokens."""

    def __init__(self, layers: list[int], vocabulary: int):
        self.layers = layers
        self.table = torch.zeros(vocabulary * len(layers), dtype=torch.float64)  # (token id, layer)
        self.means = _Means(2 * len(layers) + 2)  # shares, weights, p, entropy
        self.switches = _Means(1)

    def add(
        self,
        probs: Float[Tensor, "batch pos layer"],
        layer: Int[Tensor, "batch pos"],
        batch: Batch,
    ) -> None:
        probs, layer = probs.double().cpu(), layer.cpu()
        keep, ids, n = batch.keep.cpu(), batch.tokens.cpu(), len(self.layers)
        cells = (ids * n + layer)[keep]
        self.table.index_add_(0, cells, torch.ones(len(cells), dtype=self.table.dtype))
        columns = [
            torch.nn.functional.one_hot(layer, n).double(),
            probs,
            probs.gather(-1, layer[..., None]),
            torch.special.entr(probs).sum(-1, keepdim=True),
        ]
        self.means.add(torch.cat(columns, dim=-1), keep)
        switched = (layer[:, 1:] != layer[:, :-1]).double()[..., None]
        self.switches.add(switched, keep[:, 1:] & keep[:, :-1])

    def result(self, classes: Int[Tensor, " vocab"] | None) -> RoutingProfile:
        n, table = len(self.layers), self.table.reshape(-1, len(self.layers))
        (mean, stderr), (switch, switch_stderr) = self.means.result(), self.switches.result()
        share = table.sum(0) / table.sum()
        entropy = torch.special.entr(share).sum().item()
        by_class: dict[str, list[float]] = {}
        class_information = class_shuffled = math.nan
        if classes is not None:
            counts = torch.zeros(len(TOKEN_CLASSES), n, dtype=table.dtype).index_add_(0, classes, table)
            rows = zip(TOKEN_CLASSES, counts.tolist(), strict=True)
            by_class = {name: row for name, row in rows if sum(row)}
            class_information = mutual_information(counts)
            class_shuffled = mutual_information(shuffled_table(counts))
        return RoutingProfile(
            tokens=int(table.sum()),
            sequences=self.means.sequences,
            layers=list(self.layers),
            layer_share=self._by_layer(share),
            layer_share_stderr=self._by_layer(stderr[:n]),
            layer_weight=self._by_layer(mean[n : 2 * n]),
            layer_weight_stderr=self._by_layer(stderr[n : 2 * n]),
            mean_p=mean[-2].item(),
            mean_p_stderr=stderr[-2].item(),
            entropy=mean[-1].item(),
            entropy_stderr=stderr[-1].item(),
            entropy_of_mean=entropy,
            effective_layers=math.exp(entropy),
            pairs=int(self.switches.count),
            switch_rate=switch.item(),
            switch_rate_stderr=switch_stderr.item(),
            switch_rate_independent=1 - share.pow(2).sum().item(),
            tokens_by_class={name: int(sum(row)) for name, row in by_class.items()},
            share_by_class={
                name: self._by_layer([count / sum(row) for count in row]) for name, row in by_class.items()
            },
            class_information=class_information,
            class_information_shuffled=class_shuffled,
            token_information=mutual_information(table),
            token_information_shuffled=mutual_information(shuffled_table(table)),
        )

    def _by_layer(self, values: Iterable[Any]) -> dict[int, float]:
        return {layer: float(value) for layer, value in zip(self.layers, values, strict=True)}


class _Means:
    """Means over tokens and their standard errors over sequences, from running sums."""

    def __init__(self, columns: int):
        self.sequences, self.count, self.count_squared = 0, 0.0, 0.0
        self.sum, self.squared, self.crossed = torch.zeros(3, columns, dtype=torch.float64)

    def add(self, x: Float[Tensor, "batch pos column"], keep: Bool[Tensor, "batch pos"]) -> None:
        sums, counts = (x * keep[..., None]).sum(1), keep.sum(1).double()
        self.sequences += len(x)
        self.count += counts.sum().item()
        self.count_squared += counts.pow(2).sum().item()
        self.sum += sums.sum(0)
        self.squared += sums.pow(2).sum(0)
        self.crossed += (sums * counts[:, None]).sum(0)

    def result(self) -> tuple[Float[Tensor, " column"], Float[Tensor, " column"]]:
        """Mean and standard error; the error of a ratio of two sums, by the delta method."""
        n, mean = self.sequences, self.sum / self.count if self.count else torch.full_like(self.sum, math.nan)
        if n < 2 or not self.count:
            return mean, torch.full_like(self.sum, math.nan)
        residual = self.squared - 2 * mean * self.crossed + mean.pow(2) * self.count_squared
        return mean, (residual.clamp_min(0) / (n - 1) * n).sqrt() / self.count


def mutual_information(counts: Float[Tensor, "a b"]) -> float:
    """Mutual information of two variables in nats, from a table of counts (the plug-in estimate).

    It overestimates by about (rows - 1)(columns - 1) / (2 counts); see :func:`shuffled_table`.
    """
    joint = counts.double() / counts.sum()
    entropies = [torch.special.entr(p).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    return max(0.0, (entropies[0] + entropies[1] - entropies[2]).item())


def shuffled_table(counts: Float[Tensor, "a b"], seed: int = 0) -> Float[Tensor, "a b"]:
    """The table after one random shuffle of the second variable over the observations; its sums stay."""
    generator = np.random.default_rng(seed)
    left = counts.sum(0).long().numpy()
    shuffled = torch.zeros_like(counts)
    for row in counts.sum(1).nonzero().flatten().tolist():
        drawn = generator.multivariate_hypergeometric(left, int(counts[row].sum()))
        left = left - drawn
        shuffled[row] = torch.from_numpy(drawn)
    return shuffled


def training_shares(
    log: str | Path | Iterable[Mapping[str, Any]], name: str, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """Share of tokens routed to each layer during training (figure 9 a), as ``train()`` logged it.

    Each line is one training step: the shares are those of its batch.

    Args:
        log: the run's ``log.jsonl``, or its lines. A last line that is still being written is left out.
        name: of the SAE in that run.
        layers: block numbers; by default those in the log.

    Returns:
        One row per logged step: ``step``, ``tokens``, and a column for each block, named by its number.

    Raises:
        ValueError: no such file, a broken line, or no shares of this SAE or of one of ``layers``.
    """
    lines = list(_read_jsonl(Path(log)) if isinstance(log, str | Path) else log)
    pattern = re.compile(r"(.*)/metrics/layer_share/(\d+)")
    found: dict[str, set[int]] = {}
    for match in filter(None, (pattern.fullmatch(key) for line in lines for key in line)):
        found.setdefault(match[1], set()).add(int(match[2]))
    if name not in found:
        raise ValueError(
            f"the log has no layer shares of {name!r}; it has those of: {sorted(found) or 'none'}"
        )
    layers = sorted(found[name]) if layers is None else list(layers)
    if missing := [layer for layer in layers if layer not in found[name]]:
        raise ValueError(f"the log of {name!r} has shares of blocks {sorted(found[name])}, not of {missing}")
    keys = {layer: f"{name}/metrics/layer_share/{layer}" for layer in layers}
    rows = [
        {"step": line["step"], "tokens": line["tokens"]} | {layer: line[key] for layer, key in keys.items()}
        for line in lines
        if all(key in line for key in keys.values())  # others hold evaluations or sparsity
    ]
    return pd.DataFrame(rows, columns=["step", "tokens", *layers])


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"expected a training log, but there is no file {path}")
    lines = path.read_text(encoding="utf-8").split("\n")  # what follows the last newline is not finished
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        numbered = all(str(name).isdecimal() for name in value)
        return {int(name) if numbered else name: _with_nan(inner) for name, inner in value.items()}
    return math.nan if value is None else value
