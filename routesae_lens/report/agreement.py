"""Do two judges, or a judge and people, say the same of the same features? (RouteSAE, figure 7)"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from routesae_lens.report.interpretations import Interpretations
from routesae_lens.report.prompt import CATEGORIES


@dataclass(frozen=True)
class Agreement:
    """Two judges on the features that both have categorised and scored."""

    judges: tuple[str, str]
    n: int
    """Features that both answered about; all else here is about these."""
    left_out: tuple[int, int]
    """Features that only the first, only the second answered about."""
    categories: pd.DataFrame
    """Counts: categories of the first judge by those of the second."""
    category_agreement: float
    """Share of features in the same category."""
    kappa: float | None
    """Cohen's kappa of the categories: 0 by chance, 1 always. None where both only ever say one and the same."""
    kappa_low: float | None
    """95 % confidence interval (asymptotic)."""
    kappa_high: float | None
    score_differences: dict[int, int]
    """Features by second judge's score minus the first's, -4 to 4."""

    @property
    def absolute_differences(self) -> dict[int, int]:
        """Features by absolute difference of the scores, 0 to 4 (figure 7 b)."""
        counts = dict.fromkeys(range(5), 0)
        for difference, count in self.score_differences.items():
            counts[abs(difference)] += count
        return counts

    @property
    def close_scores(self) -> float:
        """Share of features whose scores differ by less than 2, the paper's measure of alignment."""
        return (self.absolute_differences[0] + self.absolute_differences[1]) / self.n

    @property
    def mean_difference(self) -> float:
        """Second judge's score minus the first's, on average."""
        return sum(difference * count for difference, count in self.score_differences.items()) / self.n

    def __str__(self) -> str:
        kappa = "not defined" if self.kappa is None else f"{self.kappa:.2f}"
        if self.kappa_low is not None:
            kappa += f" (95% CI {self.kappa_low:.2f} to {self.kappa_high:.2f})"
        counts = ", ".join(f"{size}: {count}" for size, count in self.absolute_differences.items())
        return (
            f"{self.judges[0]} and {self.judges[1]} on {self.n} features (only one answered about "
            f"{sum(self.left_out)} more)\n"
            f"categories: {self.category_agreement:.0%} the same, Cohen's kappa {kappa}\n{self.categories}\n"
            f"scores: {self.close_scores:.0%} differ by less than 2, mean difference "
            f"{self.mean_difference:+.2f}; features by |difference|: {counts}"
        )


def agreement(first: Interpretations, second: Interpretations) -> Agreement:
    """Compare two judges feature by feature.

    Raises:
        ValueError: interpretations of different SAEs, or no feature that both answered about.
    """
    if first.sae != second.sae:
        raise ValueError(f"interpretations of different SAEs: {first.sae!r} and {second.sae!r}")
    both = sorted(first.features.keys() & second.features.keys())
    if not both:
        raise ValueError(
            f"no feature of {first.sae!r} was answered about by both; draw the same sample (n, seed) for both"
        )
    table = pd.DataFrame(0, index=pd.Index(CATEGORIES), columns=pd.Index(CATEGORIES), dtype=int)
    differences = dict.fromkeys(range(-4, 5), 0)
    for latent in both:
        one, other = first.features[latent], second.features[latent]
        table.loc[one.category, other.category] += 1
        differences[other.score - one.score] += 1
    names = [f"{judge.judge['model']} ({judge.judge['kind']})" for judge in (first, second)]
    same = int(np.trace(table.to_numpy()))
    return Agreement(
        judges=(names[0], names[1]),
        n=len(both),
        left_out=(len(first.features) - len(both), len(second.features) - len(both)),
        categories=table,
        category_agreement=same / len(both),
        **_kappa(table.to_numpy()),
        score_differences=differences,
    )


def _kappa(table: np.ndarray) -> dict[str, float | None]:
    from statsmodels.stats.inter_rater import cohens_kappa

    if table.max() == table.sum() == np.trace(table):
        # Both say one and the same of everything: agreement by chance is 1, kappa 0 / 0.
        return {"kappa": None, "kappa_low": None, "kappa_high": None}
    with np.errstate(invalid="ignore", divide="ignore"):  # its test statistic divides by a variance of 0
        result = cohens_kappa(table)
    low, high = float(result.kappa_low), float(result.kappa_upp)
    if not np.isfinite([low, high]).all():
        return {"kappa": float(result.kappa), "kappa_low": None, "kappa_high": None}
    return {"kappa": float(result.kappa), "kappa_low": max(low, -1.0), "kappa_high": min(high, 1.0)}


def plot_agreement(found: Agreement, path: str | Path) -> None:
    """Figure 7 of the paper: shares of the categories by judge, and of the absolute score differences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    shares = [found.categories.sum(axis=axis) / found.n * 100 for axis in (1, 0)]
    for offset, share, name in zip((-0.2, 0.2), shares, found.judges, strict=True):
        # parse_math=False: a model's name may hold a dollar sign
        axes[0].bar(np.arange(len(CATEGORIES)) + offset, share, 0.4, label=name.lstrip("_"))
    axes[0].set_xticks(range(len(CATEGORIES)), CATEGORIES)
    axes[0].set(ylabel="features (%)", title=f"Categories (n = {found.n})")
    for text in axes[0].legend().get_texts():
        text.set_parse_math(False)
    counts = found.absolute_differences
    axes[1].bar(list(counts), [100 * count / found.n for count in counts.values()])
    axes[1].set(xlabel="|difference of scores|", ylabel="features (%)", title="Scores")
    figure.savefig(path, dpi=150)
