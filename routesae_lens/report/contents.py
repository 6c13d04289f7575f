"""What a report shows, gathered from the folder of a run or of a sweep as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from routesae_lens.analysis.feature_set import FeatureSet
from routesae_lens.analysis.routing import training_shares
from routesae_lens.report.geometry_record import GeometryRecord
from routesae_lens.report.interpretations import Interpretations
from routesae_lens.report.meta_record import MetaRecord
from routesae_lens.report.neighbours import nearest_features
from routesae_lens.report.steering_examples import SteeringExamples
from routesae_lens.training.record import RUN_FILE, read_object, read_record
from routesae_lens.training.sweep import TRAINING, SweepResult
from routesae_lens.training.sweep_identity import SWEEP_FILE

FEATURE_SETS, INTERPRETATIONS, ROUTING = "feature_sets", "interpretations", "routing"
"""Folders of a run in which files named after its SAEs are looked for."""

CURVES = {
    "losses/overall_loss": "Training loss",
    "metrics/explained_variance": "Explained variance",
    "metrics/l0": "L0 (active latents per token)",
    "sparsity/dead_features": "Dead latents",
    "metrics/route_entropy": "Routing entropy (nats)",
    "metrics/route_mean_p": "Mean p of the chosen layer",
    "eval/kl": "KL on held-out text (nats per token)",
}
"""Keys of the training log that are drawn, after the SAE's name, and what they are."""


@dataclass(frozen=True)
class ReportContents:
    """Everything on the page of one SAE of a run. What the folder does not hold is empty or None."""

    run: str
    """Name of the folder."""
    sae: str
    saes: list[str]
    """All SAEs of the run."""
    config: dict[str, Any]
    """The SAE's."""
    training: dict[str, Any]
    """Settings of the training."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """What was measured by splicing, named as in ``Evaluation``."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """name, method, seed, l0 and kl of every evaluated SAE of the run, this one included."""
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per logged step: tokens, and those columns of :data:`CURVES` that were logged."""
    training_shares: pd.DataFrame | None = None
    """Of ``training_shares``: tokens, and a column for each layer."""
    routing: dict[str, Any] = field(default_factory=dict)
    """``layer_share`` on held-out text by layer, where known with ``layer_share_stderr``, ``layer_weight``."""
    features: FeatureSet | None = None
    neighbours: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    """Nearest latents of each feature and the cosine of their decoder directions."""
    interpretations: Interpretations | None = None
    steering: SteeringExamples = field(default_factory=SteeringExamples)
    geometry: GeometryRecord = field(default_factory=GeometryRecord)
    meta: MetaRecord = field(default_factory=MetaRecord)


def gather(
    run: str | Path,
    *,
    sae: str | None = None,
    features: str | Path | FeatureSet | None = None,
    neighbours: int = 8,
) -> ReportContents:
    """Read everything that a folder holds about one of its SAEs.

    Args:
        run: output folder of ``train`` or of ``sweep``.
        sae: which SAE; by default the only one, the one that ``features`` names, or else, of those that have
            a feature set (of all, if none has), the one with the lowest KL.
        features: a feature set or its file; by default ``feature_sets/<sae>.json.gz`` or ``.json`` in ``run``.
        neighbours: how many nearest latents of each feature; 0 for none.

    Raises:
        FileNotFoundError: no such file of features.
        ValueError: a folder that is no run, an SAE that it does not have, features of another SAE, a
            damaged file.
    """
    folder = Path(run)
    if neighbours < 0:
        raise ValueError(f"neighbours must be 0 or more, got {neighbours}")
    trained, evaluations = _open_run(folder)
    record = read_record(trained)
    if not record:
        raise ValueError(f"the training of {folder} has not begun: there is no {trained / RUN_FILE}")
    with _reading(trained / RUN_FILE):
        configs: dict[str, Any] = record.get("config", {}).get("saes", {})
        if not configs:
            raise ValueError("it names no SAEs")
        settings = {name: _settings(record, name) for name in configs}
        for config in configs.values():
            _layers(config)
    if sae is not None and sae not in configs:
        raise ValueError(f"{folder} has no SAE {sae!r}; it has: {', '.join(configs)}")
    given = FeatureSet.load(features) if isinstance(features, str | Path) else features
    with _reading(trained / "log.jsonl"):
        lines = _logged(trained / "log.jsonl")
        evaluations = evaluations or {name: _last_evaluation(lines, name) for name in configs}
    evaluations = {name: values for name, values in evaluations.items() if values}
    sae = sae or _default_sae(folder, list(configs), evaluations, given)
    path = _feature_file(folder, sae)
    found = given if given is not None or path is None else FeatureSet.load(path)
    config = configs[sae]
    if found is not None:
        _check_features(found, sae, config, list(configs))
    weights = trained / sae
    near: dict[int, list[tuple[int, float]]] = {}
    if found is not None and neighbours and weights.is_dir():
        near = nearest_features(weights, found, neighbours)
    judged = _interpretations(folder / INTERPRETATIONS / f"{sae}.json", sae, config["d_sae"])
    routing = _record_of(folder, ROUTING, sae) or evaluations.get(sae, {})
    with _reading(trained / "log.jsonl"):
        curves, shares = _curves(lines, sae), None
        if any(
            f"{sae}/metrics/layer_share/{layer}" in line for line in lines for layer in _layers(config)[:1]
        ):
            shares = training_shares(lines, sae)
    return ReportContents(
        run=folder.resolve().name,
        sae=sae,
        saes=list(configs),
        config=config,
        training=settings[sae],
        evaluation=evaluations.get(sae, {}),
        others=[_point(name, values, configs.get(name, {})) for name, values in evaluations.items()],
        curves=curves,
        training_shares=shares,
        routing={name: _by_layer(routing[name]) for name in ROUTING_VALUES if routing.get(name)},
        features=found,
        neighbours=near,
        interpretations=judged,
        steering=SteeringExamples.find(folder, sae),
        geometry=GeometryRecord.find(folder, sae),
        meta=_meta(folder, sae, config["d_sae"]),
    )


ROUTING_VALUES = ("layer_share", "layer_share_stderr", "layer_weight")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong inside comes from the contents of this file, and the message names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _logged(path: Path) -> list[dict[str, Any]]:
    """Lines of a training log, empty where there is none; a last line that is not finished is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def _open_run(folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """Folder of the training, and the sweep's evaluations."""
    if not folder.is_dir():
        raise ValueError(f"expected the folder of a run, but there is no folder {folder}")
    if (folder / SWEEP_FILE).exists():
        result = SweepResult.read(folder)
        return folder / TRAINING, {
            name: values for name, values in result.results.items() if values["status"] == "evaluated"
        }
    if not (folder / RUN_FILE).exists():
        inner = [
            path.name
            for path in sorted(folder.iterdir())
            if (path / SWEEP_FILE).exists() or (path / RUN_FILE).exists()
        ]
        hint = f"; its folders {', '.join(inner)} are runs" if inner else ""
        raise ValueError(f"{folder} is no run: it has neither {RUN_FILE} nor {SWEEP_FILE}{hint}")
    return folder, {}


def _default_sae(
    folder: Path, names: list[str], evaluations: Mapping[str, Mapping[str, Any]], given: FeatureSet | None
) -> str:
    if len(names) == 1:
        return names[0]
    if given is not None:
        if given.name not in names:
            raise ValueError(
                f"the features are of {given.name!r}, which is no SAE of {folder}; say which one they belong "
                f"to: {', '.join(names)}"
            )
        return given.name
    having = [name for name in names if _feature_file(folder, name)] or names
    return min(having, key=lambda name: _number(evaluations.get(name, {}).get("kl"), math.inf))


def _check_features(features: FeatureSet, sae: str, config: Mapping[str, Any], names: list[str]) -> None:
    width = len(features.max_activation)
    if width != config["d_sae"]:
        raise ValueError(
            f"the features are of an SAE with {width} latents ({features.name!r}); {sae!r} has {config['d_sae']}"
        )
    if features.name != sae and features.name in names:
        raise ValueError(f"the features are of {features.name!r}, another SAE of this run than {sae!r}")
    layers = _layers(config)
    if features.layer_tokens and layers and sorted(features.layer_tokens) != sorted(layers):
        raise ValueError(
            f"the features are of an SAE on layers {sorted(features.layer_tokens)}; {sae!r} reads {layers}"
        )


def _feature_file(folder: Path, sae: str) -> Path | None:
    paths = [folder / FEATURE_SETS / f"{sae}{ending}" for ending in (".json.gz", ".json")]
    return next((path for path in paths if path.exists()), None)


def _layers(config: Mapping[str, Any]) -> list[int]:
    return [int(layer) for layer in config.get("layers") or []]


def _record_of(folder: Path, kind: str, sae: str) -> dict[str, Any]:
    path = folder / kind / f"{sae}.json"
    return read_object(path) if path.exists() else {}


def _by_layer(values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        return {}
    return {int(layer): _number(value, math.nan) for layer, value in values.items()}


def _last_evaluation(lines: list[dict[str, Any]], sae: str) -> dict[str, Any]:
    """As ``Evaluation.to_dict``, from a training log."""
    prefix = f"{sae}/eval/"
    found: dict[str, Any] = {}
    for line in lines:
        here = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
        found = here or found
    values: dict[str, Any] = {}
    for key, value in found.items():
        name, _, layer = key.partition("/")
        if layer:
            values.setdefault(name, {})[layer] = value
        else:
            values[name] = value
    return values


def _curves(lines: list[dict[str, Any]], sae: str) -> pd.DataFrame:
    keys = {f"{sae}/{key}": key for key in CURVES}
    rows = [
        {"tokens": line["tokens"]} | {short: line[key] for key, short in keys.items() if key in line}
        for line in lines
        if any(key in line for key in keys)
    ]
    frame = pd.DataFrame(rows, columns=["tokens", *CURVES]).apply(pd.to_numeric)
    return frame.dropna(axis="columns", how="all")


def _settings(record: Mapping[str, Any], sae: str) -> dict[str, Any]:
    config, options = record["config"], record.get("options", {})
    for value in (config["saes"][sae]["d_sae"], config.get("training_tokens")):
        if value is not None and type(value) is not int:
            raise ValueError(f"expected a whole number, got {value!r}")
    return {
        "model": str(config.get("model_name", "")).rstrip("/").rpartition("/")[2],
        "tokens": config.get("training_tokens"),
        "batch": config.get("train_batch_size_tokens"),
        "context": config.get("context_size"),
        "lr": config.get("lr"),
        "schedule": options.get("schedule"),
        "seed": record.get("seeds", {}).get(sae),
        "status": record.get("status"),
        "diverged": record.get("diverged", {}).get(sae),
        "versions": dict(record.get("versions", {})),
    }


def _point(name: str, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "method": values.get("method", config.get("architecture", name)),
        "seed": values.get("seed"),
        "l0": _number(values.get("l0"), math.nan),
        "kl": _number(values.get("kl"), math.nan),
        "loss_recovered": _number(values.get("loss_recovered"), math.nan),
    }


def _interpretations(path: Path, sae: str, width: int) -> Interpretations | None:
    if not path.exists():
        return None
    found = Interpretations.load(path)
    if found.sae != sae:
        raise ValueError(f"{path} interprets the features of {found.sae!r}, expected those of {sae!r}")
    if beyond := [latent for latent in found.features if latent >= width]:
        raise ValueError(f"{path} interprets latent {beyond[0]}, but the SAE has {width}")
    return found


def _meta(folder: Path, sae: str, width: int) -> MetaRecord:
    record = MetaRecord.find(folder, sae)
    if record.found is not None and record.found.d_sae != width:
        raise ValueError(
            f"{folder} holds meta-latents of an SAE with {record.found.d_sae} latents; {sae!r} has {width}"
        )
    return record


def _number(value: Any, otherwise: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return otherwise
    return float(value)
