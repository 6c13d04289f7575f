"""The page: one HTML file that opens from disk and asks no network."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from routesae_lens.analysis.feature_set import FeatureSet
from routesae_lens.report.contents import CURVES, ReportContents, gather
from routesae_lens.report.feature_rows import DETAILS_AT_ONCE, feature_details, feature_rows
from routesae_lens.report.meta_record import meta_rows, widest
from routesae_lens.report.visible import visible

TABLE_ROWS = 12
"""Rows of the table of numbers beside a curve; all of them would outgrow the rest of the page."""

COLUMNS = {
    "layer_share": "share of tokens",
    "layer_share_stderr": "standard error",
    "layer_weight": "mean probability",
    "l0": "L0",
    "kl": "KL",
    "loss_recovered": "loss recovered",
}

# What is worth a card, in this order: key of the evaluation, its name, what it says, digits.
METRICS = (
    ("kl", "KL", "nats per token between the model and the spliced model", 3),
    ("loss_recovered", "Loss recovered", "share of the loss from zero-ablation that the SAE undoes", 3),
    ("explained_variance", "Explained variance", "of the routed activations", 3),
    ("l0", "L0", "active latents per token", 1),
    ("dead_latents", "Dead latents", "fired on none of the evaluated tokens", 0),
    ("mean_p", "Mean p", "the router's probability of the chosen layer", 3),
    ("entropy", "Routing entropy", "nats, mean over tokens", 3),
)


@dataclass(frozen=True)
class Report:
    """What :func:`write_report` wrote."""

    path: Path
    sae: str
    features: int
    """Features on the page; 0 without a feature set."""
    size: int
    """Bytes."""


def write_report(
    run: str | Path,
    *,
    sae: str | None = None,
    features: str | Path | FeatureSet | None = None,
    output: str | Path | None = None,
    contexts: int = 10,
    neighbours: int = 8,
) -> Report:
    """Write the page of one SAE of a run, whole or not at all.

    Args:
        run, sae, features, neighbours: see :func:`~routesae_lens.report.contents.gather`.
        output: the file; by default ``report.html`` in ``run``, ``report-<sae>.html`` where it has several SAEs.
        contexts: how many contexts of each feature; they are most of the file.

    Raises:
        FileNotFoundError, ValueError: as ``gather``; fewer than one context, an output in no folder.
    """
    if contexts < 1:
        raise ValueError(f"contexts must be 1 or more, got {contexts}")
    if output is not None and not Path(output).resolve().parent.is_dir():
        raise ValueError(
            f"there is no folder {Path(output).resolve().parent} to write {Path(output).name} to"
        )
    if output is not None and Path(output).is_dir():
        raise ValueError(f"the output must be a file, but {output} is a folder")
    contents = gather(run, sae=sae, features=features, neighbours=neighbours)
    name = "report.html" if len(contents.saes) == 1 else f"report-{contents.sae}.html"
    path = Path(run) / name if output is None else Path(output)
    page = render(contents, contexts).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(page)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    found = contents.features
    return Report(path, contents.sae, len(found.features) if found is not None else 0, len(page))


def render(contents: ReportContents, n_contexts: int = 10) -> str:
    """The page as text. Everything from data and models is escaped by the template or sits in escaped JSON."""
    templates = Environment(
        loader=PackageLoader("routesae_lens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"visible": visible, "number": _number, "count": _count}
    script = _own_file("page.js") + _own_file("meta.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = contents.features
    rows = feature_rows(contents) if found is not None else []
    meta = contents.meta.found
    shared = meta_rows(meta, found) if meta is not None and found is not None else []
    return templates.get_template("page.html").render(
        page=contents,
        style=_own_file("page.css"),
        script=script,
        # The browser runs this script alone, whatever else might look like one, and loads nothing.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        metrics=_metrics(contents),
        figures=_figures(contents),
        settings=_settings(contents),
        features=rows,
        meta=meta,
        widest=widest(meta, shared) if meta is not None else [],
        shared=htmlsafe_json_dumps(shared, separators=(",", ":")),
        # (escapes <, >, & and ', and by \u all that is not ASCII, so no text can end the element)
        rows=htmlsafe_json_dumps(
            {"rows": rows, "at_once": DETAILS_AT_ONCE, "contexts": n_contexts},
            separators=(",", ":"),
        ),
        details=[
            htmlsafe_json_dumps(batch, separators=(",", ":"))
            for batch in feature_details(contents, n_contexts)
        ]
        if found is not None
        else [],
    )


def _own_file(name: str) -> Markup:
    return Markup(files("routesae_lens.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _metrics(contents: ReportContents) -> list[dict[str, str]]:
    values, cards = contents.evaluation, []
    for key, name, says, digits in METRICS:
        if key in ("mean_p", "entropy") and len(contents.config.get("layers") or []) < 2:
            continue
        if (value := values.get(key)) is not None:
            error = values.get(f"{key}_stderr")
            spread = "" if error is None else f" ± {_number(error, digits)}"
            cards.append({"name": name, "value": _number(value, digits) + spread, "says": says})
    if (judged := contents.interpretations) is not None and judged.features:
        scores = [one.score for one in judged.features.values()]
        lost = (
            f"; {len(judged.unparsed)} unparsed, {len(judged.failed)} failed"
            if judged.asked > len(scores)
            else ""
        )
        says = f"1 to 5, of {len(scores)} features{lost}"
        cards.append(
            {"name": "Judge's mean score", "value": _number(sum(scores) / len(scores), 2), "says": says}
        )
    if contents.features is not None:
        rule = contents.features.rule
        says = f"with {rule.min_contexts} or more contexts above {rule.threshold:g}"
        cards.append(
            {"name": "Interpretable features", "value": _count(contents.features.count()), "says": says}
        )
    return cards


def _figures(contents: ReportContents) -> list[dict[str, Any]]:
    """id, heading, and drawings with the table of their numbers."""
    from routesae_lens.report import plots  # needs Matplotlib, which the package does without

    sections = []
    curves, shares, routing = contents.curves, contents.training_shares, contents.routing
    drawn = [
        {"svg": plots.curve(curves, key, CURVES[key]), "table": _table(_few(curves[["tokens", key]].dropna())),
         "title": CURVES[key]}
        for key in curves.columns if key in CURVES and curves[key].notna().sum() > 1
    ]  # fmt: skip
    if drawn:
        sections.append({"id": "training", "title": "Training", "drawn": drawn})
    drawn = []
    if shares is not None and len(shares) > 1 and len(shares.columns) > 3:
        table = _table(_few(shares.drop(columns="step")))
        drawn.append(
            {"svg": plots.shares_in_training(shares), "table": table, "title": "Layer shares in training"}
        )
    if len(routing.get("layer_share", {})) > 1:
        frame = pd.DataFrame(routing).rename_axis("layer").reset_index()
        drawn.append({
            "svg": plots.shares_at_inference(routing), "table": _table(frame),
            "title": "Layer shares on held-out text",
        })  # fmt: skip
    if drawn:
        sections.append({"id": "routing", "title": "Where tokens are routed", "drawn": drawn})
    points = [one for one in contents.others if not math.isnan(one["l0"]) and not math.isnan(one["kl"])]
    if len(points) > 1:
        table = _table(pd.DataFrame(points).sort_values(["l0", "kl"]))
        drawing = plots.kl_against_sparsity(points, contents.sae)
        title = "KL against sparsity"
        sections.append(
            {"id": "sparsity", "title": title, "drawn": [{"svg": drawing, "table": table, "title": title}]}
        )
    if drawn := _geometry(contents):
        sections.append({"id": "geometry", "title": "Geometry", "drawn": drawn})
    return sections


def _geometry(contents: ReportContents) -> list[dict[str, Any]]:
    from routesae_lens.report import geometry_plots as plots

    drawn = []
    for i, one in enumerate(contents.geometry.distributions):
        first, second = map(visible, one.names)
        frame = pd.DataFrame({"cosine": one.cosine, first: one.share})
        frame["random dictionaries, mean"] = [
            sum(shares) / len(shares) for shares in zip(*one.random, strict=True)
        ]
        shown = frame[frame["cosine"] >= plots.left_edge(one)]
        split = sum(latents for n, latents in one.at_random.children.items() if n > 1)
        note = (
            f"Of the {_count(one.widths[0] - one.dead[0])} latents of {first}, "
            f"{one.at_random.new:.1%} have no match in {second} at a cosine of {one.at_random.threshold:.3f}, which "
            f"{one.quantile:.0%} of the best matches between random dictionaries stay below"
        )
        if one.bound < 1:
            note += f"; {one.at_bound.new:.1%} have none at the bound of {one.bound:.3f}"
        note += f". {_count(split)} of the {_count(one.widths[1])} latents of {second} are the match of two or more."
        if any(one.dead):
            note += f" Left out without a direction: {_count(one.dead[0])} and {_count(one.dead[1])}."
        svg = plots.matches_svg(one, f"geometry-matches-{i}")
        title = f"Best matches of {first} in {second}"
        drawn.append({"svg": svg, "table": _table(_few(shown)), "title": title, "note": note})
    judged = contents.interpretations.features if contents.interpretations else {}
    for i, found in enumerate(contents.geometry.maps):
        rows = []
        for point in found.points:
            told = judged.get(point.latent) if point.dictionary == contents.sae else None
            row = {"dictionary": point.dictionary, "latent": point.latent, "cosine": point.cosine}
            rows.append(row | ({"explanation": told.explanation if told else ""} if judged else {}))
        note = (
            f"The ringed latent and those nearest to it in each dictionary. Any two of the {len(rows)} have a "
            f"cosine of {found.smallest_cosine:.3f} or more. Distances on the map are UMAP's, not cosines."
        )
        title = f"Latents near latent {found.latent} of {visible(found.dictionary)}"
        svg = plots.map_svg(found, f"geometry-map-{i}")
        drawn.append({"svg": svg, "table": _table(pd.DataFrame(rows)), "title": title, "note": note})
    return drawn


def _few(frame: pd.DataFrame) -> pd.DataFrame:
    """At most :data:`TABLE_ROWS` rows, evenly spread, the first and the last among them."""
    n = min(TABLE_ROWS, len(frame))
    return frame.iloc[[round(i * (len(frame) - 1) / max(1, n - 1)) for i in range(n)]]


def _table(frame: pd.DataFrame) -> dict[str, Any]:
    names = CURVES | COLUMNS
    columns = [
        f"layer {column}" if isinstance(column, int) else names.get(column, column) for column in frame
    ]
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return {"columns": columns, "rows": rows}


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "–"
    if isinstance(value, str):
        return visible(value)
    return _count(int(value)) if value == int(value) else f"{value:.4g}"


def _settings(contents: ReportContents) -> list[tuple[str, str]]:
    config, training = contents.config, contents.training
    layers = [int(layer) for layer in config.get("layers") or []]
    hook = str((config.get("metadata") or {}).get("hook_name") or "")
    where = f"{_ranges(layers)} ({config.get('site')})" if layers else hook
    known = [
        ("Model", training["model"]),
        ("Architecture", config.get("architecture")),
        ("Reads layers", where),
        ("Latents", _count(config["d_sae"])),
        ("k", config.get("k")),
        ("Routing", config.get("routing") if len(layers) > 1 else None),
        ("Router input", config.get("aggregator") if len(layers) > 1 else None),
        ("Training tokens", None if training["tokens"] is None else _count(training["tokens"])),
        ("Tokens per step", training["batch"]),
        ("Context size", training["context"]),
        ("Learning rate", training["lr"]),
        ("Schedule", training["schedule"]),
        ("Seed", training["seed"]),
        ("Evaluated on", _evaluated_on(contents.evaluation)),
        ("Splice", contents.evaluation.get("splice")),
        (
            "Status",
            training["status"]
            if training["diverged"] is None
            else f"diverged at step {training['diverged']}",
        ),
        ("Versions", ", ".join(f"{name} {version}" for name, version in training["versions"].items())),
    ]
    return [(name, visible(str(value))) for name, value in known if value not in (None, "")]


def _evaluated_on(values: dict[str, Any]) -> str | None:
    if not values.get("tokens"):
        return None
    return f"{_count(values['tokens'])} tokens of {_count(values.get('sequences') or 0)} sequences"


def _ranges(layers: list[int]) -> str:
    """6, 7, 8, 10 as 6–8, 10."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _count(value: Any) -> str:
    return f"{int(value):,}"
