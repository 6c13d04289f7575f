"""What the comparison of mixtures of experts has measured so far, read from its folder into tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from experts_methods import Kind, flops
from experts_settings import Settings, kinds_of, parts_of
from paper_findings import EVALUATED, UNFINISHED

METRICS = (
    "mse", "norm_mse", "kl", "ce_zero", "delta_ce", "loss_recovered", "l0", "dead_latents", "tokens",
)  # fmt: skip
"""Of the splice."""


@dataclass
class Findings:
    settings: dict[str, Any]
    about: dict[str, Any]
    stages: list[dict[str, Any]]
    versions: dict[str, str]
    kinds: dict[str, Kind]
    """By label, in the order of the legends."""
    runs: pd.DataFrame
    """A row per SAE; without numbers where ``status`` is not ``paper_findings.EVALUATED``."""
    curves: pd.DataFrame
    """Of training: part, name, method, active, seed, sparsity, step and what the experts' metrics were."""
    cdfs: pd.DataFrame
    """Columns method, active, sparsity, seed, tokens ("all", "verbs"), experts (share), share."""
    overlaps: pd.DataFrame
    """Columns method, active, scaling, sparsity, seed, tokens, overlap, share."""
    unfinished: list[str]


def settings_from(saved: Mapping[str, Any]) -> Settings:
    """Of ``settings.json``."""
    known = {one.name for one in fields(Settings)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved.items()
        if name in known
    }
    values["coefficients"] = {name: tuple(some) for name, some in saved["coefficients"].items()}
    return Settings(**values)


def gather(output: Path) -> Findings:
    """Read a run's folder, finished or not."""
    saved, about = _read(output / "settings"), _read(output / "text")
    versions: dict[str, str] = {}
    settings, power = settings_from(saved), _read(output / "power").get("mean_square", math.nan)
    kinds = {kind.name: kind for kind in kinds_of(settings)}
    found: dict[str, list[dict[str, Any]]] = {"runs": [], "curves": [], "cdfs": [], "overlaps": []}
    unfinished = []
    for part in parts_of(settings):
        versions |= _read(output / part / "sweep").get("versions", {})
        of_part = _part(output / part, kinds, about, power)
        for name, rows in of_part.items():
            found[name] += rows
        if not of_part["runs"] or not all(map(_done, of_part["runs"])):
            unfinished.append(part)
    table = pd.DataFrame(found["runs"])
    for column in (*KNOWN, "status", *METRICS, *OF_REDUNDANCY, *EXPERT_METRICS, "dead_share", "flops"):
        if column not in table:
            table[column] = None
    numeric = [
        one for one in table.columns if one not in ("part", "name", "method", "kind", "scaling", "status")
    ]
    table[numeric] = table[numeric].apply(pd.to_numeric)
    return Findings(
        settings=saved,
        about=about,
        stages=_read(output / "stages") or [],
        versions=versions,
        kinds={kind.label: kind for kind in kinds.values()},
        runs=table,
        curves=pd.DataFrame(found["curves"], columns=[*KNOWN, "step", *EXPERT_METRICS]),
        cdfs=pd.DataFrame(found["cdfs"], columns=[*KNOWN, "tokens", "experts_share", "share"]),
        overlaps=pd.DataFrame(found["overlaps"], columns=[*KNOWN, "tokens", "overlap", "share"]),
        unfinished=unfinished,
    )


KNOWN = ("part", "name", "method", "kind", "sparsity", "seed", "active", "experts", "scaling")
OF_REDUNDANCY = (
    "redundancy", "redundancy_encoder", "mean_best", "intra", "inter", "intra_mean", "inter_mean", "intra_minus_inter",
    "similarity", "similarity_verbs", "shared_verbs", "verbs", "entropy_verbs", "area_verbs", "area",
)  # fmt: skip
EXPERT_METRICS: dict[str, str] = {
    "omega": "expert_scale_mean", "omega_min": "expert_scale_min", "omega_max": "expert_scale_max",
    "share_max": "expert_share_max", "share_min": "expert_share_min", "share_entropy": "expert_share_entropy",
    "mean_p": "expert_mean_p",
}  # fmt: skip
"""Of training, and what its log calls them."""


def _read(path: Path) -> Any:
    """A JSON file, by its name without the ending; empty where there is none."""
    path = path.with_name(f"{path.name}.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _part(
    folder: Path, kinds: Mapping[str, Kind], about: Mapping[str, Any], power: float
) -> dict[str, list[dict[str, Any]]]:
    """The rows of one part for each table."""
    status = _training(_read(folder / "training" / "run"))
    rows, cdfs, overlaps = [], [], []
    for member in _read(folder / "sweep").get("members", []):
        kind, name = kinds[member["method"]], member["name"]
        row = {
            "part": folder.name, "name": name, "method": kind.label, "kind": member["kind"],
            "sparsity": member["sparsity"], "seed": member["seed"], "active": kind.active,
            "experts": kind.experts, "scaling": kind.scaling,
        }  # fmt: skip
        result, measured = _read(folder / "results" / name), _read(folder / "redundancy" / name)
        cdfs += [row | one for one in _cdf(measured)]
        overlaps += [row | one for one in _overlaps(measured)]
        row |= {"status": result.get("status", status.get(name, status[""]))}
        if row["status"] == EVALUATED:
            row |= _spliced(result, power) | _redundancy(measured)
            row |= {"dead_share": result["dead_latents"] / (about["d_sae"] // kind.share)}
            row |= {"flops": flops(kind, about["d_model"], about["d_sae"], result["l0"]).total}
        rows.append(row)
    curves = list(_curves(folder / "training" / "log.jsonl", rows))
    last = {one["name"]: one for one in curves}
    for row in rows:
        if row["status"] == EVALUATED:
            of_training = last.get(row["name"], {})
            row |= {key: of_training[key] for key in EXPERT_METRICS if key in of_training and key not in row}
    return {"runs": rows, "curves": curves, "cdfs": cdfs, "overlaps": overlaps}


def _done(row: Mapping[str, Any]) -> bool:
    """Whether the same command would not change this row."""
    return row["status"] not in UNFINISHED and (row["status"] != EVALUATED or "redundancy" in row)


def _training(run: Mapping[str, Any]) -> dict[str, str]:
    """Why SAEs have no result yet; of all others under ""."""
    diverged = {name: f"diverged at step {step}" for name, step in run.get("diverged", {}).items()}
    return diverged | {"": UNFINISHED[run.get("status") == "finished"]}


def _spliced(result: Mapping[str, Any], power: float) -> dict[str, float | None]:
    unexplained = 1 - result["explained_variance_raw_uncentered"]
    return {key: result.get(key) for key in METRICS if key != "mse"} | {"mse": unexplained * power}


def _redundancy(measured: Mapping[str, Any]) -> dict[str, float | None]:
    if not measured:
        return {}
    similarity, use = measured["similarity"], measured["use"]
    row = {
        "redundancy": measured["decoder"]["share"],
        "redundancy_encoder": measured["encoder"]["share"],
        "mean_best": measured["decoder"]["mean_best"],
        "similarity": similarity["all"]["similarity"],
        "similarity_verbs": similarity["verbs"]["similarity"],
        "shared_verbs": similarity["verbs"]["mean_overlap"],
        "verbs": similarity["verbs"]["tokens"],
    }
    if omega := measured.get("omega"):
        row |= {"omega": sum(omega) / len(omega), "omega_min": min(omega), "omega_max": max(omega)}
    if experts := measured.get("experts"):
        row |= {
            "intra": experts["intra_share"], "inter": experts["inter_share"],
            "intra_mean": experts["intra_mean"], "inter_mean": experts["inter_mean"],
            "intra_minus_inter": experts["intra_mean"] - experts["inter_mean"],
        }  # fmt: skip
    if use:
        row |= {
            "entropy_verbs": use["verbs"]["entropy"] / math.log(use["verbs"]["n_experts"]),
            "area_verbs": area(use["verbs"]["cdf"]),
            "area": area(use["all"]["cdf"]),
        }
    return row


def area(cdf: list[float]) -> float:
    """Under a CDF over the share of the experts (trapezoids): 0.5 for experts used alike, nearly 1 for one alone."""
    whole = [0.0, *cdf]
    return sum((a + b) / 2 for a, b in pairwise(whole)) / len(cdf)


def _cdf(measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for which, use in measured.get("use", {}).items():
        cdf = [0.0, *use["cdf"]]
        for i, share in enumerate(cdf):
            yield {"tokens": which, "experts_share": i / (len(cdf) - 1), "share": share}


def _overlaps(measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for which, one in measured.get("similarity", {}).items():
        for overlap, share in enumerate(one["shares"]):
            yield {"tokens": which, "overlap": overlap, "share": share}


def _curves(log: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The experts' metrics by step."""
    # (what follows the last newline is not finished)
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    members = {row["name"]: {key: row[key] for key in KNOWN} for row in rows}
    named = {called: metric for metric, called in EXPERT_METRICS.items()}
    pattern = re.compile(r"(.+)/metrics/(" + "|".join(map(re.escape, named)) + ")")
    for line in lines:
        values = json.loads(line)
        found: dict[str, dict[str, float]] = {}
        for key, value in values.items():
            if (match := pattern.fullmatch(key)) and isinstance(value, float | int) and match[1] in members:
                found.setdefault(match[1], {})[named[match[2]]] = value
        for name, metrics in found.items():
            yield members[name] | {"step": values["step"]} | metrics
