"""The report of the Llama Scope recipe: reads what was measured, computes nothing of a model.

``report/`` gets ``report.md``, the figures, ``results.json`` (every number), and as CSV: ``results.csv`` (a row per
SAE and measurement), ``curves.csv`` (training), ``positions_in_context.csv``, ``firing.csv``, ``matches.csv`` and
``claims.csv``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llama_scope_claims as judged
import llama_scope_plots as plots
import llama_scope_tables as tables
import pandas as pd
from llama_scope_verdicts import RUNNING, Claim
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from paper_findings import write_whole
from paper_tables import escaped, markdown

from routesae_lens.analysis.feature_map import FeatureMap
from routesae_lens.analysis.match_distribution import MatchDistribution
from routesae_lens.report.geometry_plots import save_figure


@dataclass
class Found:
    """Everything that was measured so far; empty where a part was not run."""

    settings: dict[str, Any]
    about: dict[str, Any]
    stages: list[dict[str, Any]]
    versions: dict[str, str]
    curves: pd.DataFrame
    diverged: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    generalisation: dict[str, Any] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """Steps over which a latent that never fires counts as silent."""
        return max(1, self.settings["silent_window"] // self.settings["batch_size"])


def gather(output: Path) -> Found:
    """Read a run's folder, finished or not."""

    def read(name: str) -> Any:
        path = output / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    settings, about = read("settings"), read("about") or {}
    runs = {part: read(f"{part}/run") or {} for part in ("annealing", "positions")}
    parts = {name: read(name) for name in ("annealing", "positions", "conversion", "geometry")}
    kinds = {name: read(f"generalisation/{name}") for name in ("firing", "long", "chat", "models")}
    return Found(
        settings=settings,
        about=about,
        stages=read("stages") or [],
        versions={name: one for run in runs.values() for name, one in run.get("versions", {}).items()},
        curves=_curves(output / "annealing", settings, about, runs["annealing"]),
        diverged={name: step for run in runs.values() for name, step in run.get("diverged", {}).items()},
        parts={name: one for name, one in parts.items() if one is not None},
        generalisation={name: one for name, one in kinds.items() if one is not None},
    )


COLUMNS = ["name", "group", "seed", "step", "tokens", "share", "k", "loss", "explained_variance", "silent"]


def _curves(
    folder: Path, settings: dict[str, Any], about: dict[str, Any], run: dict[str, Any]
) -> pd.DataFrame:
    """The training log as a table. Losses of ordinary SAEs are divided by d_model: their input has mean norm
    sqrt(d_model). Those of RouteSAEs and Crosscoders are relative to each token's norm already."""
    if not (folder / "log.jsonl").exists():
        return pd.DataFrame(columns=COLUMNS)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    total = settings["tokens"] // settings["batch_size"] * settings["batch_size"]
    rows = []
    for line in lines:
        for name, seed in run["seeds"].items():
            if f"{name}/losses/overall_loss" not in line:
                continue
            group = plots.group_of(name)
            width = about["wide"] if group == "wide" else about["d_sae"]
            rows.append(
                {
                    "name": name,
                    "group": group,
                    "seed": seed,
                    "step": line["step"],
                    "tokens": line["tokens"],
                    "share": line["tokens"] / total,
                    "k": line.get(f"{name}/metrics/k", settings["k"]),
                    "loss": line[f"{name}/losses/overall_loss"]
                    / (1 if group in ("route", "crosscoder") else about["d_model"]),
                    "explained_variance": line[f"{name}/metrics/explained_variance"],
                    "silent": line[f"{name}/sparsity/dead_features"] / width,
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def judge(found: Found) -> pd.DataFrame:
    """A row for each claim that there are numbers for."""
    claims: list[Claim] = []
    parts = found.parts
    if "annealing" in parts:
        evaluations = parts["annealing"]["evaluations"]
        curves = {
            str(name): rows
            for name, rows in found.curves.groupby("name", sort=False)
            if name not in found.diverged
        }
        final = {name: one["norm_mse"] for name, one in evaluations.items()}
        claims += judged.annealing_claims(curves, found.window, final) + judged.wide_claims(evaluations)
    if "positions" in parts:
        claims += judged.position_claims(parts["positions"]["evaluations"], found.about["layers"])
    if "conversion" in parts:
        claims += judged.conversion_claims(parts["conversion"])
    claims += judged.generalisation_claims(found.generalisation)
    if "geometry" in parts:
        claims += judged.geometry_claims(parts["geometry"]["distributions"])
    columns = ["where", "claim", "claimed", "measured", "difference", "rule", "verdict"]
    return pd.DataFrame([asdict(one) for one in claims], columns=columns)


def write_report(output: Path, svg: bool = False) -> dict[str, int]:
    """Write ``<output>/report/`` over whatever parts exist; the number of claims by verdict."""
    found = gather(output)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    claims = judge(found)
    for name, table in {"claims": claims, "curves": found.curves, **tables.csv_tables(found)}.items():
        write_whole(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    numbers = {
        "settings": found.settings,
        "about": found.about,
        "versions": found.versions,
        "stages": found.stages,
        "diverged": found.diverged,
        **found.parts,
        "generalisation": found.generalisation,
        "claims": claims.to_dict("records"),
    }
    write_whole(folder / "results.json", json.dumps(numbers, indent=1, allow_nan=False))
    pictures = _draw(found, folder, svg)
    sections = [
        tables.what_was_run(found),
        _claims(claims),
        _pictured(pictures, "annealing", tables.annealing(found)),
        _pictured(pictures, "positions", tables.positions(found)),
        _pictured(pictures, "conversion", tables.conversion(found)),
        _pictured(pictures, "firing", tables.firing(found)),
        _pictured(pictures, "long", tables.long(found)),
        tables.chat(found),
        tables.models(found),
        _pictured(pictures, "matches", tables.geometry(found)),
        _pictured(pictures, "map", tables.neighbourhood(found)),
    ]
    write_whole(folder / "report.md", "\n\n".join(one for one in sections if one) + "\n")
    return {str(name): int(n) for name, n in claims["verdict"].value_counts().items()}


def _draw(found: Found, folder: Path, svg: bool) -> dict[str, list[str]]:
    """The names of the pictures by section."""
    parts, s = found.parts, found.settings
    figures: dict[str, Figure] = {}
    if "annealing" in parts and len(found.curves):
        annealed = found.curves[found.curves["group"] == "annealed"]
        ends = float(annealed.loc[annealed["k"] > s["k"], "tokens"].max()) if len(annealed) else 0.0
        figures["annealing"] = plots.annealing(found.curves, ends, found.window * s["batch_size"], RUNNING)
    if "positions" in parts:
        figures["positions"] = plots.positions(parts["positions"]["evaluations"], found.about["layers"])
    if "conversion" in parts:
        figures["conversion"] = plots.conversion(parts["conversion"])
    if "firing" in found.generalisation:
        figures["firing"] = plots.firing(found.generalisation["firing"])
    if "long" in found.generalisation:
        figures["long"] = plots.long(found.generalisation["long"], s["context_size"])
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        if svg:
            figure.savefig(folder / f"{name}.svg")
        plt.close(figure)
    written = {name: [name] for name in figures}
    geometry = parts.get("geometry", {})
    drawn: dict[str, Any] = {
        f"matches_{plots.group_of(name)}": MatchDistribution.from_dict(one)
        for name, one in geometry.get("distributions", {}).items()
        if plots.group_of(name) in ("wide", "fixed")
    }
    if "map" in geometry.get("map", {}):
        drawn["map"] = FeatureMap.from_dict(geometry["map"]["map"])
    for name, one in drawn.items():
        for ending in ("png", "svg") if svg else ("png",):
            save_figure(one, folder / f"{name}.{ending}")
        written.setdefault(name.partition("_")[0], []).append(name)
    return written


def _pictured(pictures: Mapping[str, list[str]], name: str, section: str) -> str:
    """A section with its pictures after its heading."""
    if not section or name not in pictures:
        return section
    heading, _, text = section.partition("\n\n")
    caption = heading.lstrip("# ")
    shown = "\n".join(f"![{caption}]({one}.png)" for one in pictures[name])
    return f"{heading}\n\n{shown}\n\n{text}"


def _claims(claims: pd.DataFrame) -> str:
    if claims.empty:
        return ""
    rows = [
        [*(escaped(one[c]) or "–" for c in ("where", "claim", "claimed", "measured", "difference")),
         f"**{escaped(one['verdict'])}**"]
        for one in claims.to_dict("records")
    ]  # fmt: skip
    rules = {
        rule: ", ".join(dict.fromkeys(some["where"])) for rule, some in claims.groupby("rule", sort=False)
    }
    return (
        "## Every claim\n\nMeans over seeds, with their range in brackets; differences within a seed with half of "
        "their 95 % interval (t distribution). SAEs of one seed get no verdict.\n\n"
        + markdown(["where", "claim", "claimed", "measured", "difference", "verdict"], rows)
        + "\n\nThe rules, fixed before the run:\n\n"
        + "\n".join(f"- {escaped(rule)} ({where})" for rule, where in rules.items())
    )
