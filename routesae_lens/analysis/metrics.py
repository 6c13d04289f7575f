"""Sums and counts behind an evaluation, and the numbers made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from routesae_lens.analysis.next_tokens import NextTokens
from routesae_lens.analysis.subjects import Reading, Subject
from routesae_lens.hook_points import split_layers
from routesae_lens.saes.layers import standardize
from routesae_lens.splice.late_logits import Logits

Row = dict[str, int | float | str | None]
"""A row of a table, by column."""


@dataclass
class Evaluation:
    """Metrics of one SAE on held-out tokens. "Token" means a kept token: special tokens and position 0 are out."""

    tokens: int
    """Kept tokens: those encoded, spliced and averaged over."""
    sequences: int
    kl: float
    """KL(original || spliced), nats per token."""
    kl_stderr: float
    """Standard error of ``kl`` over sequences."""
    kl_authors: float
    """The authors' number: KL summed over all positions, averaged over sequences."""
    kl_unscaled: float | None
    """``kl`` of the authors' splice, which leaves p out (None where it is the same splice)."""
    ce_clean: float
    """Next-token cross-entropy of the model as it is, nats per token."""
    ce_spliced: float
    ce_zero: float | None
    """... with the activations that the splice replaces set to zero: the denominator of ``loss_recovered``."""
    delta_ce: float
    """ce_spliced - ce_clean (Llama Scope's delta LM loss)."""
    delta_ce_stderr: float
    """Standard error of ``delta_ce`` over sequences."""
    predicted: int
    """Tokens in the cross-entropies: kept ones whose next token is kept too."""
    loss_recovered: float | None
    """1 - delta_ce / (ce_zero - ce_clean); like ``ce_zero`` None if that was not asked for."""
    norm_mse: float
    """Mean over tokens of ||z - z_hat||^2 / ||z||^2, z the routed activation, standardised, without p.

    For a Crosscoder the mean over tokens and layers, each layer by its own reconstruction."""
    mse: float | None
    """Mean over tokens (and a Crosscoder's layers) of the squared error in the units of the model, standardisation
    undone, summed over dimensions. None where no activation of the model is reconstructed (mixtures of layers)."""
    explained_variance: float
    """1 - sum ||z - z_hat||^2 / sum ||z - mean of its layer||^2; for a Crosscoder the mean over its layers."""
    explained_variance_uncentered: float
    """1 - sum ||z - z_hat||^2 / sum ||z||^2 (Llama Scope, Eq. 6); for a Crosscoder the mean over its layers.
    A mean that all tokens share counts as explained here, so it is the larger of the two. The length of z is about
    the same for every token, so it is 1 - ``norm_mse``, except with mixtures of layers."""
    explained_variance_raw: float | None
    """``explained_variance`` in the units of the model, standardisation undone: what SAELens calls
    ``explained_variance``, and what other SAEs are compared by. Tokens and layers of large norm weigh more.
    None where no activation of the model is reconstructed (mixtures of layers)."""
    explained_variance_raw_uncentered: float | None
    """``explained_variance_uncentered`` likewise: Eq. 6 as Llama Scope reports it."""
    l0: float
    dead_latents: int
    """Latents that fired on none of ``tokens``."""
    mean_p: float
    """Mean probability of the chosen layer; 1 without a router."""
    entropy: float
    """Mean entropy of the layer probabilities, nats; log(number of layers) is a router that does not care.

    0 without a router."""
    layer_share: dict[int, float]
    """Share of tokens routed to each block. A Crosscoder reads every token at all of its L blocks: 1/L each.
    (Where its dictionary lives is another matter, see ``Crosscoder.decoder_norms``.)"""
    norm_mse_per_layer: dict[int, float]
    explained_variance_per_layer: dict[int, float]
    splice: str
    """What was written back."""
    firing_frequency: Float[Tensor, " d_sae"] = field(repr=False)
    """Share of tokens on which each latent is active."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-latent frequencies, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "firing_frequency"}

    def row(self) -> Row:
        """One row of a table: :meth:`to_dict` without the numbers per layer."""
        return {name: value for name, value in self.to_dict().items() if not isinstance(value, dict)}


class LayerSums:
    """Sums per layer from which explained variance follows exactly, whatever the batches.

    In float64, where mean squares minus squared means lose nothing that float32 activations hold.
    """

    def __init__(self, n_layers: int):
        self.count, self.error, self.square = (torch.zeros(n_layers, dtype=torch.float64) for _ in range(3))
        self.sum: Tensor | None = None  # (layer, d_model)

    def add(
        self,
        z: Float[Tensor, "row d_model"],
        error: Float[Tensor, " row"],
        layer: Int[Tensor, " row"],
    ) -> None:
        """Activations, squared errors of their reconstructions, and which layer each is of."""
        n = len(self.count)
        z, error, layer = z.double(), error.double(), layer.to(z.device)
        # (summed where they are: only a row per layer leaves the device)
        total = z.new_zeros(n, z.shape[-1]).index_add_(0, layer, z).cpu()
        self.sum = total if self.sum is None else self.sum + total
        for sums, values in (
            (self.count, torch.ones_like(error)),
            (self.error, error),
            (self.square, z.pow(2).sum(-1)),
        ):
            sums += values.new_zeros(n).index_add_(0, layer, values).cpu()

    @property
    def variance(self) -> Float[Tensor, " layer"]:
        """Sum of squared deviations from the mean."""
        assert self.sum is not None
        return self.square - self.sum.pow(2).sum(-1) / self.count.clamp_min(1)

    @property
    def mse(self) -> float:
        """Squared error per row."""
        return (self.error.sum() / self.count.sum()).item()

    def explained(self, total: Float[Tensor, " layer"], every_layer: bool) -> float:
        """1 - error / total: the mean over layers if each token has all of them, else of the sums."""
        if every_layer:
            return (1 - self.error / total).mean().item()
        return (1 - self.error.sum() / total.sum()).item()


class Tally:
    """Sums and counts in float64, so that batches may be of any size."""

    def __init__(self, subject: Subject):
        self.subject = subject
        layers, d_sae, wide = len(subject.layers), subject.sae.cfg.d_sae, torch.float64
        self.tokens = 0
        self.every_layer = False
        self.ratio = torch.zeros(layers, dtype=wide)  # ||error||^2 / ||z||^2
        self.standardized, self.raw = LayerSums(layers), LayerSums(layers)
        self.fired = torch.zeros(d_sae, dtype=wide)
        self.p = self.entropy = self.kl_all = self.unscaled = 0.0
        self.ce = {"clean": 0.0, "spliced": 0.0}
        self.predicted = 0
        self.kl_sums: list[float] = []
        self.kl_counts: list[int] = []
        self.delta_sums: list[float] = []
        self.delta_counts: list[int] = []
        self.has_unscaled = False

    @property
    def count(self) -> Float[Tensor, " layer"]:
        """Tokens read at each layer."""
        return self.standardized.count

    def add_reading(self, reading: Reading, keep: Tensor) -> None:
        latents, out = self.subject.autoencode(reading, keep)
        tokens = int(keep.sum())
        self.tokens += tokens
        self.every_layer = reading.every_layer
        z, layer = self._rows(reading.original[keep]), reading.layer[keep]
        if reading.every_layer:  # each layer of a token is a reconstruction of its own
            layer = torch.arange(len(self.count), device=z.device).repeat(tokens)
        z = z.double()
        error = (z - self._rows(out).double()).pow(2).sum(-1)
        self.standardized.add(z, error, layer)
        self.ratio.index_add_(0, layer.cpu(), (error / z.pow(2).sum(-1).clamp_min(1e-12)).cpu())
        if reading.target is not None:
            target = self._rows(reading.target[keep])
            self.raw.add(target, error * standardize(target).std.squeeze(-1).double().pow(2), layer)
        self.fired += latents.latent.bincount(minlength=len(self.fired)).double().cpu()
        if reading.route is None:
            self.p += float(keep.sum())
        else:
            probs = reading.route.probs[keep].double()
            self.p += probs.gather(-1, reading.layer[keep][:, None]).sum().item()
            self.entropy += torch.special.entr(probs).sum().item()

    def _rows(self, read: Float[Tensor, "token read"]) -> Float[Tensor, "row d_model"]:
        return split_layers(read, len(self.count)).flatten(0, 1) if self.every_layer else read

    def add_spliced(
        self,
        clean: NextTokens,
        compared: tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]],
        within: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """What :meth:`NextTokens.compare` made of the spliced pass, at the positions ``within`` (all of them)."""
        kl, losses = compared
        keep, predicts = clean.keep, clean.predicts
        if within is not None:
            kl, keep, predicts = kl.where(within, 0.0), keep & within, predicts & within
        ours, theirs = clean.clean_losses.where(predicts, 0.0), losses.where(predicts, 0.0)
        self.predicted += int(predicts.sum())
        self.ce["clean"] += ours.sum().item()
        self.ce["spliced"] += theirs.sum().item()
        self.delta_sums += (theirs - ours).sum(-1).tolist()
        self.delta_counts += predicts.sum(-1).tolist()
        self.kl_all += kl.sum().item()
        self.kl_sums += kl.where(keep, 0.0).sum(-1).tolist()
        self.kl_counts += keep.sum(-1).tolist()

    def add_zeroed(self, total: float) -> None:
        """``total``: cross-entropy of a batch with the replaced activations zeroed."""
        self.ce["zero"] = self.ce.get("zero", 0.0) + total

    def add_unscaled(self, clean: NextTokens, spliced: Logits) -> None:
        self.has_unscaled = True
        self.unscaled += clean.kl(spliced)[clean.keep].sum().item()

    def result(self, scale_by_p: bool) -> Evaluation:
        n, read = self.tokens, self.count.sum()
        ce = {
            name: total / self.predicted if self.predicted else float("nan")
            for name, total in self.ce.items()
        }
        per_layer = dict(enumerate(self.subject.layers))
        used = [i for i in per_layer if self.count[i] > 0]
        ours, raw, every = self.standardized, self.raw, self.every_layer
        variance = ours.variance
        explained = 1 - ours.error / variance
        has_raw = raw.sum is not None
        label = self.subject.splice_label
        if self.subject.scaled and not scale_by_p:
            label = "reconstruction at the routed layer, unscaled (the authors' splice)"
        delta, recovered = ce["spliced"] - ce["clean"], None
        if "zero" in ce:
            room = ce["zero"] - ce["clean"]
            recovered = 1 - delta / room if room else float("nan")
        return Evaluation(
            tokens=n,
            sequences=len(self.kl_sums),
            kl=sum(self.kl_sums) / n,
            kl_stderr=_ratio_stderr(self.kl_sums, self.kl_counts),
            kl_authors=self.kl_all / len(self.kl_sums),
            kl_unscaled=self.unscaled / n if self.has_unscaled else None,
            ce_clean=ce["clean"],
            ce_spliced=ce["spliced"],
            ce_zero=ce.get("zero"),
            delta_ce=delta,
            delta_ce_stderr=_ratio_stderr(self.delta_sums, self.delta_counts),
            predicted=self.predicted,
            loss_recovered=recovered,
            norm_mse=(self.ratio.sum() / read).item(),
            mse=raw.mse if has_raw else None,
            explained_variance=ours.explained(variance, every),
            explained_variance_uncentered=ours.explained(ours.square, every),
            explained_variance_raw=raw.explained(raw.variance, every) if has_raw else None,
            explained_variance_raw_uncentered=raw.explained(raw.square, every) if has_raw else None,
            l0=(self.fired.sum() / n).item(),
            dead_latents=int((self.fired == 0).sum()),
            mean_p=self.p / n,
            entropy=self.entropy / n,
            layer_share={layer: (self.count[i] / read).item() for i, layer in per_layer.items()},
            norm_mse_per_layer={per_layer[i]: (self.ratio[i] / self.count[i]).item() for i in used},
            explained_variance_per_layer={per_layer[i]: explained[i].item() for i in used if variance[i] > 0},
            splice=label,
            firing_frequency=(self.fired / n).float(),
        )


def _ratio_stderr(sums: list[float], counts: list[int]) -> float:
    """Standard error of sum(sums) / sum(counts) over sequences (delta method)."""
    if len(sums) < 2:
        return float("nan")
    s, c = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    residual = s - c * (s.sum() / c.sum())
    return (residual.std() / c.mean() / len(sums) ** 0.5).item()
