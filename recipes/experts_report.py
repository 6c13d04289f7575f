"""The report of the comparison of mixtures of experts: reads what was measured, computes nothing of a model.

``report/`` gets ``report.md``, the figures, ``results.json`` (every number), and as CSV: ``runs.csv`` (a row per SAE),
``omega.csv`` (training), ``utilisation.csv``, ``overlaps.csv`` and ``claims.csv``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import experts_plots as plots
import pandas as pd
from experts_claims import by_e, judged
from experts_findings import Findings, gather, settings_from
from experts_settings import parts_of
from experts_tables import (
    appendix_table,
    claims_table,
    flops_table,
    omega_table,
    redundancy_table,
    results_table,
    what_was_run,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from paper_findings import write_whole

from routesae_lens.training.log import plain

CAPTIONS = {
    "frontier": "Error and loss recovered against L0 at equal FLOPs; bars are 95 % intervals over seeds.",
    "redundancy": "Near copies among the decoder rows, and latents that verbs share, against the active experts.",
    "omega": "The scale factor ω at the end against e, and in training.",
    "utilisation": "Which share of the activations the most used experts have.",
    "overlaps": "How many active latents two verbs share.",
}


def write_report(output: Path, svg: bool = False) -> dict[str, int]:
    """Write ``<output>/report/`` over whatever parts exist; the number of claims by verdict.

    Raises:
        FileNotFoundError: no run there.
    """
    found = gather(output)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    settings = settings_from(found.settings)
    claims = judged(found.runs, found.kinds, settings.k, next(iter(parts_of(settings))))
    tables = {
        "claims": claims, "runs": found.runs, "omega": found.curves, "utilisation": found.cdfs,
        "overlaps": found.overlaps,
    }  # fmt: skip
    for name, table in tables.items():
        write_whole(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    numbers = {
        "settings": found.settings,
        "about": found.about,
        "versions": found.versions,
        "stages": found.stages,
        "runs": found.runs.to_dict("records"),
        "omega": found.curves.to_dict("records"),
        "utilisation": _nested(found.cdfs, "experts_share"),
        "overlaps": _nested(found.overlaps, "overlap"),
        "claims": claims.to_dict("records"),
    }
    write_whole(folder / "results.json", json.dumps(plain(numbers), indent=1, allow_nan=False))
    pictures = _draw(found, folder, svg)
    sections = [
        what_was_run(found),
        claims_table(claims),
        _pictured(results_table(found), pictures, "frontier"),
        flops_table(found),
        _pictured(redundancy_table(found), pictures, "redundancy", "utilisation", "overlaps"),
        _pictured(omega_table(found), pictures, "omega"),
        appendix_table(found),
    ]
    write_whole(folder / "report.md", "\n\n".join(one for one in sections if one) + "\n")
    return {str(name).partition(":")[0]: int(n) for name, n in _verdicts(claims).items()}


def _verdicts(claims: pd.DataFrame) -> pd.Series:
    return claims["verdict"].str.partition(":")[0].value_counts()


def _nested(table: pd.DataFrame, x: str) -> list[dict[str, Any]]:
    """A record for each SAE and set of tokens, its distribution as two lists."""
    return [
        {"name": name, "tokens": which, x: rows[x].tolist(), "share": rows["share"].tolist()}
        for (name, which), rows in table.groupby(["name", "tokens"], sort=False)
    ]


def _draw(found: Findings, folder: Path, svg: bool) -> dict[str, str]:
    """The captions of the pictures that were written, by name."""
    runs = found.runs[found.runs["kl"].notna()]
    main = {label: kind for label, kind in found.kinds.items() if not kind.appendix}
    figures: dict[str, Figure] = {}
    if len(runs[runs["method"].isin(main)]):
        panels = {
            "mse": "MSE (Eq. A.1), model's units",
            "norm_mse": "NormMSE",
            "loss_recovered": "loss recovered",
        }
        figures["frontier"] = plots.frontier(runs[runs["method"].isin(main)], main, panels)
    mixtures = runs[runs["method"].isin([*by_e(main, "mean").values(), *by_e(main, "none").values()])]
    if mixtures["redundancy"].notna().any():
        ks = sorted(mixtures["sparsity"].unique())
        middle = ks[len(ks) // 2]
        figures["redundancy"] = plots.redundancy(mixtures)
        figures["utilisation"] = plots.utilisation(found.cdfs[found.cdfs["method"].isin(main)], middle)
        figures["overlaps"] = plots.overlaps(found.overlaps[found.overlaps["method"].isin(main)], middle)
    if mixtures["omega"].notna().any():
        figures["omega"] = plots.omega(mixtures, found.curves[found.curves["method"].isin(main)])
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        if svg:
            figure.savefig(folder / f"{name}.svg")
        plt.close(figure)
    return {name: CAPTIONS[name] for name in figures}


def _pictured(section: str, pictures: Mapping[str, str], *names: str) -> str:
    """A section, and its pictures after its heading."""
    if not section:
        return section
    heading, _, text = section.partition("\n\n")
    shown = [f"![{pictures[name]}]({name}.png)\n\n{pictures[name]}" for name in names if name in pictures]
    return "\n\n".join([heading, *shown, text])
