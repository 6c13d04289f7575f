"""Sums and counts behind an evaluation, and the numbers made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from routesae_lens.analysis.next_tokens import NextTokens
from routesae_lens.analysis.subjects import Reading, Subject
from routesae_lens.hook_points import split_layers


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
    loss_recovered: float | None
    """1 - delta_ce / (ce_zero - ce_clean); like ``ce_zero`` None if that was not asked for."""
    norm_mse: float
    """Mean over tokens of ||z - z_hat||^2 / ||z||^2, z the routed activation, standardised, without p.

    For a Crosscoder the mean over tokens and layers, each layer by its own reconstruction."""
    explained_variance: float
    """1 - sum ||z - z_hat||^2 / sum ||z - mean of its layer||^2; for a Crosscoder the mean over its layers."""
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


class Tally:
    """Sums and counts in float64, so that batches may be of any size."""

    def __init__(self, subject: Subject):
        self.subject = subject
        layers, d_sae, wide = len(subject.layers), subject.sae.cfg.d_sae, torch.float64
        self.tokens = 0
        self.every_layer = False
        self.count = torch.zeros(layers, dtype=wide)
        self.ratio = torch.zeros(layers, dtype=wide)  # ||error||^2 / ||z||^2
        self.error = torch.zeros(layers, dtype=wide)
        self.square = torch.zeros(layers, dtype=wide)
        self.sum: Tensor | None = None  # (layer, d_model)
        self.fired = torch.zeros(d_sae, dtype=wide)
        self.p = self.entropy = self.kl_all = self.unscaled = 0.0
        self.ce = {"clean": 0.0, "spliced": 0.0}
        self.predicted = 0
        self.kl_sums: list[float] = []
        self.kl_counts: list[int] = []
        self.has_unscaled = False

    def add_reading(self, reading: Reading, keep: Tensor) -> None:
        latents, out = self.subject.autoencode(reading, keep)
        tokens = int(keep.sum())
        self.tokens += tokens
        self.every_layer = reading.every_layer
        z, layer = reading.original[keep], reading.layer[keep].cpu()
        if reading.every_layer:  # each layer of a token is a reconstruction of its own
            n_layers = len(self.count)
            z, out = split_layers(z, n_layers).flatten(0, 1), split_layers(out, n_layers).flatten(0, 1)
            layer = torch.arange(n_layers).repeat(tokens)
        z = z.double()
        error = (z - out.double()).pow(2).sum(-1).cpu()
        z = z.cpu()
        square = z.pow(2).sum(-1)
        if self.sum is None:
            self.sum = torch.zeros(len(self.count), z.shape[-1], dtype=z.dtype)
        self.sum.index_add_(0, layer, z)
        self.count.index_add_(0, layer, torch.ones_like(square))
        self.square.index_add_(0, layer, square)
        self.error.index_add_(0, layer, error)
        self.ratio.index_add_(0, layer, error / square.clamp_min(1e-12))
        self.fired += latents.latent.bincount(minlength=len(self.fired)).double().cpu()
        if reading.route is None:
            self.p += float(keep.sum())
        else:
            probs = reading.route.probs[keep].double()
            self.p += probs.gather(-1, reading.layer[keep][:, None]).sum().item()
            self.entropy += torch.special.entr(probs).sum().item()

    def add_clean(self, clean: NextTokens) -> None:
        self.predicted += clean.predicted
        self.ce["clean"] += clean.clean_cross_entropy

    def add_spliced(self, clean: NextTokens, spliced: Tensor) -> None:
        kl, cross_entropy = clean.compare(spliced)
        self.ce["spliced"] += cross_entropy
        self.kl_all += kl.sum().item()
        self.kl_sums += kl.where(clean.keep, 0.0).sum(-1).tolist()
        self.kl_counts += clean.keep.sum(-1).tolist()

    def add_zeroed(self, total: float) -> None:
        """``total``: cross-entropy of a batch with the replaced activations zeroed."""
        self.ce["zero"] = self.ce.get("zero", 0.0) + total

    def add_unscaled(self, clean: NextTokens, spliced: Tensor) -> None:
        self.has_unscaled = True
        self.unscaled += clean.kl(spliced)[clean.keep].sum().item()

    def result(self, scale_by_p: bool) -> Evaluation:
        assert self.sum is not None
        n, read = self.tokens, self.count.sum()
        variance = self.square - self.sum.pow(2).sum(-1) / self.count.clamp_min(1)
        ce = {name: total / max(self.predicted, 1) for name, total in self.ce.items()}
        per_layer = dict(enumerate(self.subject.layers))
        used = [i for i in per_layer if self.count[i] > 0]
        explained = 1 - self.error / variance
        if self.every_layer:
            explained_variance = explained.mean().item()
        else:
            explained_variance = (1 - self.error.sum() / variance.sum()).item()
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
            loss_recovered=recovered,
            norm_mse=(self.ratio.sum() / read).item(),
            explained_variance=explained_variance,
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
