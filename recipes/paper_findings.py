"""What a study has measured so far, read from its folder into tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from paper_presets import MEASURED, PARTS

SCALARS = (
    "tokens", "kl", "kl_stderr", "kl_authors", "ce_clean", "ce_zero", "delta_ce", "loss_recovered", "norm_mse",
    "explained_variance", "l0", "dead_latents", "mean_p", "entropy", "splice",
)  # fmt: skip
ROUTING_SCALARS = ("effective_layers", "switch_rate", "class_information", "class_information_shuffled")
USED = 0.02
"""A block with a larger share of the tokens counts as used."""
EVALUATED = "evaluated"
"""The status of an SAE that has numbers; any other says why it has none."""
UNFINISHED = ("training not finished", "evaluation not finished")
"""Statuses that the same command, run again, will change."""


@dataclass
class Findings:
    """Everything that was measured so far, as tables."""

    settings: dict[str, Any]
    text: dict[str, Any]
    sweeps: dict[str, dict[str, Any]]
    """``sweep.json`` of every part that exists."""
    stages: list[dict[str, Any]]
    runs: pd.DataFrame
    """A row per SAE of a part that has begun; without numbers where ``status`` is not :data:`EVALUATED`."""
    features: pd.DataFrame
    routing: pd.DataFrame
    views: pd.DataFrame
    profiles: list[dict[str, Any]] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    """Parts that were not begun, or of which something is left to train or measure."""

    def chooses(self, part: str, name: str) -> bool:
        """Whether an SAE sends each token to one of several blocks (by its config: it may have no numbers)."""
        config = self.sweeps[part]["about"]["saes"][name]
        return len(config.get("layers", ())) > 1 and config.get("routing", "fixed") not in ("fixed", "every")


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all. (The package's own is not public.)"""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def plain_name(source: str) -> str:
    """Of a data set or model: a file's or folder's name, not where it lies on this machine; hub names as they are."""
    path = Path(source)
    local = path.is_absolute() or path.exists() or source.startswith((".", "~")) or len(path.parts) > 2
    return path.name if local else source


def gather(output: Path) -> Findings:
    """Read a study's folder, finished or not.

    An SAE that diverged, gave NaN or infinity, or was not reached yet has a row that says so, and nowhere a number.

    Raises:
        FileNotFoundError: no study there.
    """
    settings = _read(output / "settings.json")
    about_columns = ["part", "name", "method", "kind", "sparsity", "seed"]
    written = {path.parent.name: path.parent for path in output.glob("*/sweep.json")}
    parts = [written[part] for part in PARTS if part in written]
    sweeps = {folder.name: _read(folder / "sweep.json") for folder in parts}
    runs, features, routing, views = [], [], [], []
    finished = set()
    for folder in parts:
        found = {kind: _records(folder / kind) for kind in ("results", "features", "routing", "views")}
        weights = _training_weights(folder / "training" / "log.jsonl")
        status = _statuses(folder, found["results"])
        evaluated = {name for name in status if status[name] == EVALUATED}
        kinds = [kind for kind in MEASURED if folder.name in MEASURED[kind]]
        if not set(status.values()) & {*UNFINISHED} and all(evaluated <= set(found[kind]) for kind in kinds):
            finished.add(folder.name)
        members = sweeps[folder.name]["members"]
        for member in sorted(members, key=lambda one: (one["method"], one["sparsity"], one["seed"])):
            name = member["name"]
            about = {"part": folder.name} | {key: member[key] for key in about_columns[1:]}
            if name not in evaluated:
                runs.append(about | {"status": status[name]})
                continue
            result = found["results"][name]
            row = about | {"status": EVALUATED} | {key: result.get(key) for key in SCALARS}
            of_features = found["features"].get(name, {})
            thresholds = of_features.get("by_threshold", {})
            row["features"] = of_features.get("features")
            row["feature_tokens"] = of_features.get("tokens")
            if thresholds:
                counts = list(thresholds.values())
                row["features_lost"] = counts[0] - counts[-1]
            features += [about | {"threshold": float(t), "features": n} for t, n in thresholds.items()]
            shares = result.get("layer_share") or {}
            row["layers_used"] = sum(share > USED for share in shares.values()) if shares else None
            row["blocks"] = " ".join(_by_share(shares)) if len(shares) > 1 else None
            profile = found["routing"].get(name, {})
            if profile.get("layers"):
                row |= {key: profile[key] for key in ROUTING_SCALARS}
                rows = _routing_rows(profile, weights.get(name, {}))
                routing += [about | one for one in rows]
                everything = [one for one in rows if one["token_class"] == "all"]
                for phase in ("training", "inference"):
                    row |= u_shape([one[f"{phase}_weight"] for one in everything], phase)
            runs.append(row)
            for rule, view in found["views"].get(name, {}).get("views", {}).items():
                views.append(about | {"rule": rule} | {key: view[key] for key in SCALARS if key != "splice"})
    run_table = pd.DataFrame(runs)
    for column in (
        *about_columns,
        "status",
        *SCALARS,
        "features",
        "feature_tokens",
        *ROUTING_SCALARS,
        "layers_used",
        "blocks",
    ):
        if column not in run_table:
            run_table[column] = None
    numeric = [
        c
        for c in run_table.columns
        if c not in ("part", "name", "method", "kind", "status", "splice", "blocks")
    ]
    run_table[numeric] = run_table[numeric].apply(pd.to_numeric)
    return Findings(
        settings=settings,
        text=_read(output / "text.json") if (output / "text.json").exists() else {},
        sweeps=sweeps,
        stages=_read(output / "stages.json") if (output / "stages.json").exists() else [],
        runs=run_table,
        features=pd.DataFrame(features, columns=[*about_columns, "threshold", "features"]),
        routing=pd.DataFrame(routing, columns=[*about_columns, *ROUTING_COLUMNS]),
        views=pd.DataFrame(
            views, columns=[*about_columns, "rule", *(key for key in SCALARS if key != "splice")]
        ),
        profiles=[
            _read(path)
            for path in sorted(output.glob("core/profiles/*.json"), reverse=True)
            if path.stem in set(run_table.loc[run_table["status"] == EVALUATED, "name"])
        ],
        unfinished=[part for part in PARTS if part not in finished],
    )


def _statuses(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of every SAE of a part; what has no result yet may be known to have diverged."""
    training = folder / "training" / "run.json"
    run = _read(training) if training.exists() else {}
    waiting = UNFINISHED[run.get("status") == "finished"]
    names = [member["name"] for member in _read(folder / "sweep.json")["members"]]
    diverged = {name: f"diverged at step {step}" for name, step in run.get("diverged", {}).items()}
    return {
        name: results[name]["status"] if name in results else diverged.get(name, waiting) for name in names
    }


def _by_share(shares: Mapping[str, float]) -> list[str]:
    """The blocks that are used, the largest share first; six at most."""
    used = sorted((block for block in shares if shares[block] > USED), key=lambda block: -shares[block])
    return used[:6] + (["..."] if len(used) > 6 else [])


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def _training_weights(log: Path) -> dict[str, dict[int, tuple[float, float]]]:
    """By SAE and block: mean p and share of tokens, averaged over the logged steps of training.

    ``rl.training_shares`` has the shares alone, of one SAE at a time; this reads a long log once, for all of them.
    """
    pattern = re.compile(r"(.+)/metrics/layer_(weight|share)/(\d+)")
    sums: dict[tuple[str, str, int], list[float]] = {}
    # (what follows the last newline is not finished)
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    for line in lines:
        for key, value in json.loads(line).items():
            if (match := pattern.fullmatch(key)) and isinstance(value, float | int) and math.isfinite(value):
                entry = sums.setdefault((match[1], match[2], int(match[3])), [0.0, 0])
                entry[0] += value
                entry[1] += 1
    means: dict[str, dict[int, tuple[float, float]]] = {}
    for (name, what, layer), (total, count) in sums.items():
        weight, share = means.setdefault(name, {}).get(layer, (math.nan, math.nan))
        means[name][layer] = (total / count, share) if what == "weight" else (weight, total / count)
    return means


ROUTING_COLUMNS = (
    "layer", "token_class", "class_tokens", "training_weight", "training_share", "inference_weight", "inference_share",
)  # fmt: skip


def _routing_rows(
    profile: Mapping[str, Any], training: Mapping[int, tuple[float, float]]
) -> list[dict[str, Any]]:
    rows = []
    for layer in profile["layers"]:
        weight, share = training.get(layer, (math.nan, math.nan))
        at = str(layer)
        at_inference = profile["layer_weight"][at], profile["layer_share"][at]
        values = (layer, "all", profile["tokens"], weight, share, *at_inference)
        rows.append(dict(zip(ROUTING_COLUMNS, values, strict=True)))
    for token_class, shares in profile["share_by_class"].items():
        tokens = profile["tokens_by_class"][token_class]
        rows += [
            dict(zip(ROUTING_COLUMNS, (int(at), token_class, tokens, None, None, None, share), strict=True))
            for at, share in shares.items()
        ]
    return rows


def u_shape(weights: Sequence[float], phase: str) -> dict[str, float]:
    """How far the outer thirds of the blocks lie above the middle one: together, and the lower of the two."""
    n = len(weights) // 3
    if n == 0 or not all(map(math.isfinite, weights)):
        return {f"u_{phase}": math.nan, f"both_ends_{phase}": math.nan}
    first, middle, last = weights[:n], weights[n:-n], weights[-n:]
    centre = sum(middle) / len(middle)
    ends = [sum(first) / n, sum(last) / n]
    return {f"u_{phase}": sum(ends) / 2 - centre, f"both_ends_{phase}": min(ends) - centre}
