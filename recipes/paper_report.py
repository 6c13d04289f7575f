"""The report of ``reproduce_paper.py``: reads what was measured, computes nothing of a model.

``report/`` gets ``report.md``, the figures, and every number as CSV: ``results.csv`` (a row per SAE), ``features.csv``
(by threshold), ``routing.csv`` (by block and token class), ``views.csv`` (other routing rules), ``claims.csv``;
and ``settings.json``, which decided them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import paper_claims
import paper_plots
import paper_tables as tables
from matplotlib import pyplot as plt
from paper_findings import Findings, gather, plain_name, write_whole
from paper_presets import OWN
from paper_tables import escaped, markdown
from paper_verdicts import NO_DIFFERENCE, OPPOSITE, REPRODUCED


@dataclass(frozen=True)
class Report:
    folder: Path
    claims: pd.DataFrame

    def summary(self) -> str:
        of_paper = self.claims[self.claims["where"] != OWN]
        verdicts = of_paper["verdict"].str.partition(":")[0].value_counts()
        return "Claims: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def write_report(output: Path, svg: bool = False) -> Report:
    """Write ``<output>/report/`` over whatever parts exist.

    Raises:
        FileNotFoundError: no study in ``output``.
    """
    found = gather(output)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    claims = paper_claims.judge(found.runs)
    if {"layers", "d_model", "d_sae"} <= set(found.text):
        sizes = found.text["d_model"], found.text["d_sae"], len(found.text["layers"])
        claims = pd.concat([paper_claims.parameter_claims(*sizes), claims], ignore_index=True)
    numbers = {
        "results": found.runs,
        "features": found.features,
        "routing": found.routing,
        "views": found.views,
        "claims": claims,
    }
    for name, table in numbers.items():
        write_whole(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    settings = {key: plain_name(one) if isinstance(one, str) else one for key, one in found.settings.items()}
    write_whole(folder / "settings.json", json.dumps(settings, indent=1))
    pictures = _draw(found, folder, svg)
    sections = [
        _what_was_run(found),
        tables.in_short(found, claims),
        tables.main_results(found),
        _pictures(pictures),
        tables.tables_2_and_3(found),
        tables.collapse(found),
        tables.by_class(found),
        tables.fixed_layers(found),
        tables.views(found),
        _claims(found, claims),
    ]
    write_whole(folder / "report.md", "\n\n".join(section for section in sections if section) + "\n")
    return Report(folder, claims)


def _draw(found: Findings, folder: Path, svg: bool) -> dict[str, str]:
    runs, threshold = found.runs, found.settings.get("threshold", 15.0)
    figures = {
        "figure_4": (
            paper_plots.frontier(runs, "kl", "KL(original ‖ spliced), nats/token"),
            "Figure 4: KL against L0, mean and 95 % interval over seeds. Crosscoders are spliced at "
            "all blocks at once, the others at one block per token.",
        ),
        "figure_5a": (
            paper_plots.feature_curves(found.features, ("route", "topk"), threshold),
            "Figure 5 a: interpretable features against the threshold.",
        ),
        "figure_6": (
            paper_plots.frontier(runs, "features", "interpretable features"),
            f"Figure 6: interpretable features (threshold {threshold:g}) against L0.",
        ),
        "figure_9": (
            paper_plots.layer_weights(found.routing, "route"),
            "Figure 9: RouteSAE's layer weights, mean over training and on held-out text; every seed.",
        ),
        "figure_9_distilled": (
            paper_plots.layer_weights(found.routing, "distilled"),
            "The same of the distilled router (in training, shares include its explored layers).",
        ),
        "figure_9_distilled_mean": (
            paper_plots.layer_weights(found.routing, "distilled_mean"),
            "The same with the mean over layers as the router's input.",
        ),
        "routers": (
            paper_plots.routers(runs),
            "Ways to choose a layer, at one sparsity: each seed, mean and 95 % interval over seeds.",
        ),
        "figure_12": (
            paper_plots.frontier(runs, "norm_mse", "NormMSE"),
            "Figure 12: NormMSE against L0.",
        ),
        "figure_1": (
            paper_plots.profiles(found.profiles),
            "Figure 1: activation by block of the interpretable features that peak first (solid) and last "
            "(dashed), with their strongest tokens.",
        ),
        "fixed_layers": (
            _fixed_layer_figure(found),
            "KL of one TopK SAE per block, beside methods that choose (at the right their 95 % intervals over seeds).",
        ),
    }
    written = {}
    for name, (figure, caption) in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            if svg:
                figure.savefig(folder / f"{name}.svg")
            plt.close(figure)
            written[name] = caption
    return written


def _what_was_run(found: Findings) -> str:
    text = (
        "# The RouteSAE paper's evaluation\n\nWritten by `recipes/reproduce_paper.py`.\n\n## What was run\n\n"
    )
    rows = _settings(found) + _counts(found.runs) + _costs(found.stages)
    versions = {name: v for sweep in found.sweeps.values() for name, v in sweep.get("versions", {}).items()}
    if versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    text += markdown(["", ""], [(name, escaped(value)) for name, value in rows])
    if lines := tables.without_numbers(found.runs):
        text += "\n\n**Without numbers, and left out of all means, figures and verdicts below:**\n\n"
        text += "\n".join(lines)
    if found.unfinished:
        text += (
            f"\n\n**Not run, or not finished: {escaped(', '.join(found.unfinished))}.** This command, with the "
            "study's folder and any other options that it was begun with, runs or continues a part, and writes this "
            "report again:\n\n"
            f"```\n{_command(found, found.unfinished[0])}\n```"
        )
    return text


def _command(found: Findings, part: str) -> str:
    preset = found.settings.get("preset", "cpu")
    return f"python recipes/reproduce_paper.py --preset {preset} --output FOLDER --part {part}"


def _settings(found: Findings) -> list[tuple[str, str]]:
    about, settings, sweeps = found.text, found.settings, list(found.sweeps.values())
    own = f"{about.get('held_out_documents', '')} documents of the training text, not trained on".lstrip()
    rows = [
        ("preset", str(settings.get("preset", ""))),
        ("parts in this report", ", ".join(found.sweeps) or "none"),
        ("training text", plain_name(str(settings.get("dataset")))),
        ("held-out text", plain_name(settings["eval_dataset"]) if settings.get("eval_dataset") else own),
    ]
    if not sweeps:
        return rows
    config, model = sweeps[0]["about"]["config"], sweeps[0]["about"]["model"]
    steps, batch, layers = (
        config["training_tokens"] // config["batch_size"],
        config["batch_size"],
        config["layers"],
    )
    epochs = "unknown (streamed text)"
    if about.get("epochs") is not None:
        epochs = f"about {about['epochs']:.2f} (of about {about['tokens_per_epoch']:,} tokens)"
    every = config["unit_norm_every"]
    return [
        *rows,
        ("model", f"{plain_name(model['name'])}, {model['layers']} blocks, d_model {model['d_model']}"),
        ("routed blocks", f"{layers[0]} to {layers[-1]} ({len(layers)})"),
        ("width", f"{config['d_sae']:,}"),
        (
            "training tokens",
            f"{steps * batch:,}: {steps:,} steps of {batch:,}; context {config['context_size']}",
        ),
        ("epochs", epochs),
        (
            "learning rate",
            f"{config['lr']:g}, schedule {config['schedule']}, decoder norm every {every} steps",
        ),
    ]


def _counts(runs: pd.DataFrame) -> list[tuple[str, str]]:
    rows = []
    for title, column in (
        ("held-out tokens for KL, NormMSE, L0", "tokens"),
        ("held-out tokens for features and routes", "feature_tokens"),
    ):
        counts = sorted(runs[column].dropna().unique())
        rows.append((title, ", ".join(f"{int(n):,}" for n in counts) or "–"))
    seeds = {part: sorted(group["seed"].unique()) for part, group in runs.groupby("part", sort=False)}
    words = (f"{part}: {', '.join(str(int(seed)) for seed in some)}" for part, some in seeds.items())
    return [*rows, ("seeds", "; ".join(words) or "–")]


def _costs(stages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    if not stages:
        return []
    seconds: dict[str, float] = {}
    for stage in stages:
        seconds[stage["part"]] = seconds.get(stage["part"], 0.0) + stage["seconds"]
    times = [
        f"{part} {_duration(spent)}" for part, spent in {**seconds, "together": sum(seconds.values())}.items()
    ]
    memory = f"{max(stage['peak_gib'] for stage in stages):.1f} GiB"
    if gpu := [stage["gpu_peak_gib"] for stage in stages if "gpu_peak_gib" in stage]:
        memory += f", GPU {max(gpu):.1f} GiB"
    return [("wall time", ", ".join(times)), ("peak memory", memory)]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _fixed_layer_figure(found: Findings) -> Any:
    layers = tables.layer_rows(found).dropna(subset=["kl"])
    if layers.empty:
        return None
    k = layers["sparsity"].iloc[0]
    return paper_plots.fixed_layers(layers, tables.choosers(found, k), k)


def _pictures(pictures: Mapping[str, str]) -> str:
    if not pictures:
        return ""
    shown = [f"![{caption}]({name}.png)\n\n{caption}" for name, caption in pictures.items()]
    return "## Figures\n\n" + "\n\n".join(shown)


def _claims(found: Findings, claims: pd.DataFrame) -> str:
    rules = "\n".join(f"- {escaped(rule)}" for rule in dict.fromkeys(claims["rule"]) if rule)
    ours, not_run = claims["where"] == OWN, ""
    if (claims["needs"] != "").any():
        not_run = (
            f"What is not run, this would run: `{_command(found, 'PART')}`, with each part that is named.\n\n"
        )
    return (
        "## Every claim\n\n"
        "Claimed KL values are sums over sequences of 512 tokens, ours are nats per token; orderings compare. "
        "Difference: by sparsity, the mean of the differences within each seed (the first measured method minus the "
        "second; the second times the factor where the claim says far; relative where the claim is) ± half of their "
        "95 % interval (t distribution), and the number of seeds n. Methods whose sparsity is a coefficient are "
        "compared at equal L0, interpolated in ln L0; SAEs whose L0 lies outside the other method's range are left "
        "out, and their number is given. A claim is reproduced where, by the rule of its row in "
        f"claims.csv:\n\n{rules}\n\n"
        "It is opposite where the same holds the other way, and otherwise there is no difference to be seen. "
        "The sparsities are not independent of each other: all SAEs see the same tokens.\n\n"
        + not_run
        + _claim_table(claims[~ours])
        + "\n\n## The distilled router\n\nNot a claim of the paper; judged by the same rules.\n\n"
        + _claim_table(claims[ours].assign(verdict=claims["verdict"].replace(OWN_WORDS)))
    )


OWN_WORDS = {REPRODUCED: "yes", OPPOSITE: "no: opposite", NO_DIFFERENCE: "no difference to be seen"}


def _claim_table(claims: pd.DataFrame) -> str:
    columns = ["where", "claim", "claimed", "measured", "spread"]
    rows = []
    for claim in claims.to_dict("records"):
        needed = " and ".join(f"`--part {part}`" for part in claim["needs"].split())
        verdict = f"**{escaped(claim['verdict'])}**" + (f": {needed}" if needed else "")
        rows.append([*(escaped(claim[column]) or "–" for column in columns), verdict])
    return markdown(["where", "claim", "claimed", "measured (mean)", "difference", "verdict"], rows)
