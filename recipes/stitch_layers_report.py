"""The report of the stitching recipe: reads what was measured, computes nothing of a model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paper_findings import plain_name, write_whole
from paper_tables import escaped, markdown
from stitch_layers_study import SMALL, read

CHANCE = 0.05
"""Share beyond chance that counts as more than it."""
NEAR = 0.8
"""Of the ceiling: from here on a RouteSAE has about as much of a layer as another seed's SAE of that layer."""
SHARED = 0.5
"""Of the RouteSAE's latents: so many in the SAEs of two layers or more would be a space that layers share."""

COLUMNS = (
    "block", "tokens routed there", "covered", "random", "best other layer", "another seed",
    "mean cosine (random, another seed)", "novel in the layer", "latents of the RouteSAE",
)  # fmt: skip
VERDICTS = {True: "holds", False: "does not hold"}


@dataclass(frozen=True)
class Verdict:
    """An expectation that was fixed before the run, and whether it held."""

    claim: str
    measured: str
    rule: str
    verdict: str


def write_report(output: Path) -> list[Verdict]:
    """Write ``<output>/report/report.md`` and ``results.json``."""
    found = read(output)
    verdicts = judge(found)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    config = found["training"]["config"]
    training = found["training"] | {"config": config | {"model_name": plain_name(config["model_name"])}}
    numbers = found | {"training": training, "verdicts": [asdict(one) for one in verdicts]}
    write_whole(folder / "results.json", json.dumps(numbers, indent=1, allow_nan=False))
    sections = [
        _what_was_run(found),
        _verdicts(verdicts),
        _coverage(found),
        _stitching(found, threshold_drawn=(folder / "threshold.png").exists()),
        _saes(found),
    ]
    write_whole(folder / "report.md", "\n\n".join(sections) + "\n")
    return verdicts


# --- Verdicts ------------------------------------------------------------------------------------------------


def judge(found: dict[str, Any]) -> list[Verdict]:
    """Of each RouteSAE, then of the stitching."""
    verdicts = [one for name, covered in found["coverage"].items() for one in _of_route(name, covered)]
    return verdicts + _of_stitching(found["stitching"])


def _of_route(name: str, covered: dict[str, Any]) -> list[Verdict]:
    rows = covered["layers"]
    beyond = [row["covered"] - _mean(row["random"]) for row in rows]
    ratios = [row["covered"] / row["ceiling"] for row in rows if row["ceiling"]]
    others = [row["covered"] - row["best_other"] for row in rows if row["best_other"] is not None]
    several = sum(count for layers, count in covered["shared"].items() if int(layers) >= 2)
    shared = several / covered["route_latents"]
    found = [
        _verdict(
            f"{name} has more of every layer than a random dictionary",
            f"{min(beyond):+.1%} to {max(beyond):+.1%}",
            f"at least {CHANCE:.0%} of the latents more, at every layer",
            min(beyond) >= CHANCE,
        )
    ]
    if ratios:
        found.append(
            _verdict(
                f"{name} has about as much of every layer as another seed's SAE of the layer",
                f"{min(ratios):.2f} to {max(ratios):.2f} times as much",
                f"at least {NEAR:g} of it, at every layer",
                min(ratios) >= NEAR,
            )
        )
    if others:
        found.append(
            _verdict(
                f"{name} has more of every layer than the SAE of any other layer",
                f"{min(others):+.1%} to {max(others):+.1%}",
                "more, at every layer",
                min(others) > 0,
            )
        )
    found.append(
        _verdict(
            f"most latents of {name} are in the SAEs of two layers or more",
            f"{shared:.1%}; in none: {covered['route_novel_share']:.1%}",
            f"at least {SHARED:.0%}",
            shared >= SHARED,
        )
    )
    return found


def _of_stitching(stitching: dict[str, Any]) -> list[Verdict]:
    curve, effects, choice = stitching["curve"], stitching["effects"], stitching["threshold"]
    steps = curve["steps"]
    inserted = [step for step in steps if step["phase"] in ("small", "insert")]
    first, full, last = steps[0], inserted[-1], steps[-1]
    swaps = [step for step in steps if step["phase"] == "swap"]
    # (what has no counterpart leaves behind the swaps, and lowers L0, too)
    after_swaps = f"{swaps[-1]['l0']:.1f} after the swaps alone" if swaps else "no group to swap"
    novel, others = effects["novel"], effects["reconstruction"]
    found = [
        _verdict(
            "inserting every novel latent lowers the error",
            f"NormMSE {first['norm_mse']:.4f} to {full['norm_mse']:.4f}",
            "lower after the insertions than before",
            full["norm_mse"] < first["norm_mse"],
        ),
        _verdict(
            "inserting them lowers the KL",
            f"{first['kl']:.4f} to {full['kl']:.4f}",
            "lower after the insertions than before",
            full["kl"] < first["kl"],
        ),
        _verdict(
            "swaps make the code sparser",
            f"L0 {full['l0']:.1f} to {last['l0']:.1f}; {after_swaps}",
            "L0 lower at the end than after the insertions",
            last["l0"] < full["l0"] if swaps else None,
        ),
    ]
    if novel["fired"]:
        share = novel["lowering"] / novel["fired"]
        of_others = (
            f"; {others['lowering']} of {others['fired']} reconstruction latents" if others["fired"] else ""
        )
        found.append(
            _verdict(
                f"single novel latents (below {curve['threshold']:g}) lower the error",
                f"{novel['lowering']} of {novel['fired']} that fire{of_others}",
                "more than half of those that fire",
                share > 0.5,
            )
        )
    best = choice["balanced_accuracy"]
    measured = "all insertions lower the error, or all raise it"
    if best is not None:
        measured = f"balanced accuracy {best:.2f} at {choice['threshold']:.2f}"
    found.append(
        _verdict(
            "the cosine foretells the effect of an insertion",
            measured,
            "balanced accuracy of the best threshold 0.7 or more",
            None if best is None else best >= 0.7,
        )
    )
    return found


def _verdict(claim: str, measured: str, rule: str, holds: bool | None) -> Verdict:
    """``holds`` is None where there was nothing to judge by."""
    return Verdict(claim, measured, rule, "cannot be said" if holds is None else VERDICTS[holds])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- Sections -----------------------------------------------------------------------------------------------


def _what_was_run(found: dict[str, Any]) -> str:
    settings, text, run = found["settings"], found["text"], found["training"]
    seconds: dict[str, float] = {}
    for one in found.get("stages", []):  # (a stage that was interrupted is there more than once)
        seconds[one["stage"]] = seconds.get(one["stage"], 0.0) + one["seconds"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    trained = settings["tokens"] // settings["batch_size"] * settings["batch_size"]
    any_sae = next(iter(found["evaluation"].values()))
    return (
        "# A RouteSAE against single layers, and one SAE stitched to another\n\n"
        f"{escaped(settings['model'])}, text {escaped(settings['dataset'])}, blocks {text['layers'][0]} to "
        f"{text['layers'][-1]} ({len(text['layers'])} routed), width {text['d_sae']:,}, k = {settings['k'][0]}, "
        f"{trained:,} training tokens, all {len(run['seeds'])} SAEs on one pass, each from a seed of its own. "
        f"Firings on {any_sae['firing_tokens']:,} held-out tokens (latents without any are left out of the coverage), "
        f"splices on {any_sae['tokens']:,}. Seconds: "
        + (", ".join(f"{stage} {one:,.0f}" for stage, one in seconds.items()) or "not known")
        + f". {escaped(versions)}."
    )


def _verdicts(verdicts: list[Verdict]) -> str:
    rows = [
        [escaped(one.claim), escaped(one.measured), escaped(one.rule), f"**{one.verdict}**"]
        for one in verdicts
    ]
    return "## What was expected\n\nFixed before the run.\n\n" + markdown(
        ["expectation", "measured", "rule", "verdict"], rows
    )


def _coverage(found: dict[str, Any]) -> str:
    parts = ["## What a RouteSAE has of each layer", "![Coverage by layer](coverage.png)"]
    for name, covered in found["coverage"].items():
        shares = found["evaluation"][name]["layer_share"]
        rows = [
            [
                str(row["layer"]),
                f"{shares.get(str(row['layer']), 0.0):.1%}",
                f"{row['covered']:.1%}",
                f"{_mean(row['random']):.1%}",
                "–"
                if row["best_other"] is None
                else f"{row['best_other']:.1%} (block {row['best_other_layer']})",
                "–" if row["ceiling"] is None else f"{row['ceiling']:.1%}",
                f"{row['mean_cosine']:.3f} ({_mean(row['random_mean_cosine']):.3f}, {row['ceiling_mean_cosine']:.3f})",
                f"{len(row['novel']):,} of {row['latents']:,}",
                f"{len(row['route_latents']):,}",
            ]
            for row in covered["layers"]
        ]
        twin = covered["route_ceiling"]
        parts.append(f"### {escaped(name)}")
        parts.append(markdown(COLUMNS, rows))
        shared = ", ".join(f"{layers}: {count:,}" for layers, count in covered["shared"].items())
        parts.append(
            f"{len(covered['route_novel']):,} of the RouteSAE's {covered['route_latents']:,} living latents "
            f"({covered['route_novel_share']:.1%}) are in no layer's SAE ({covered['route_dead']:,} never fired). By "
            f"the number of layers that have their like: {shared}."
            + ("" if twin is None else f" Another seed's RouteSAE has {twin:.1%} of them.")
        )
    return "\n\n".join(parts)


def _stitching(found: dict[str, Any], threshold_drawn: bool) -> str:
    stitching = found["stitching"]
    curve, choice = stitching["curve"], stitching["threshold"]
    rows = [
        [step["phase"], f"{step['inserted']:,}", f"{step['swapped']:,}", f"{step['d_sae']:,}", f"{step['l0']:.1f}",
         f"{step['norm_mse']:.4f}", f"{step['mse']:.4g}", _kl(step)]
        for step in curve["steps"]
    ]  # fmt: skip
    small, large = curve["widths"]
    parts = [
        f"## From {small:,} to {large:,} latents at block {stitching['layer']}",
        "![The way from the small SAE to the large one](stitching.png)",
        f"With the threshold {curve['threshold']:g}, {curve['novel']:,} latents of the larger SAE are novel and "
        f"{curve['reconstruction']:,} reconstruct those of the smaller, in {curve['groups']:,} groups; "
        f"{curve['unmatched']:,} of the smaller have no counterpart. Moves in random order (seed {curve['seed']}), "
        f"{curve['tokens']:,} tokens; ± is the standard error over sequences. Both SAEs were made JumpReLU.",
        markdown(["phase", "inserted", "groups swapped", "width", "L0", "NormMSE", "MSE", "KL"], rows),
    ]
    if choice["threshold"] is None:
        parts.append(
            f"No threshold follows from the effects: of {choice['lowering'] + choice['raising']:,} latents that fire "
            f"{choice['lowering']:,} lower the error when inserted alone."
        )
    else:
        lowering, raising, silent = (f"{choice[name]:,}" for name in ("lowering", "raising", "left_out"))
        parts.append(
            f"Inserted alone, {lowering} latents lower the error and {raising} raise it ({silent} never fired; "
            f"{choice['tokens']:,} tokens). The threshold {choice['threshold']:.2f} tells them apart best, with a "
            f"balanced accuracy of {choice['balanced_accuracy']:.2f} (0.5 is chance)."
        )
        if threshold_drawn:
            parts.append("![Balanced accuracy by threshold](threshold.png)")
    return "\n\n".join(parts)


def _kl(step: dict[str, Any]) -> str:
    stderr = "" if step["kl_stderr"] is None else f" ± {step['kl_stderr']:.4f}"
    return f"{step['kl']:.4f}{stderr}"


def _saes(found: dict[str, Any]) -> str:
    seeds = found["training"]["seeds"]
    rows = [
        [escaped(name), str(seeds[name]), f"{one['d_sae']:,}", f"{one['l0']:.1f}", f"{one['norm_mse']:.4f}",
         f"{one['kl']:.4f}", f"{one['never_fired']:,}"]
        for name, one in found["evaluation"].items()
    ]  # fmt: skip
    return (
        "## The SAEs\n\n"
        + markdown(["SAE", "seed", "width", "L0", "NormMSE", "KL", "never fired"], rows)
        + f"\n\n`{SMALL}` is the smaller SAE of the stitching; `layerN-0` is looked for in the RouteSAEs, "
        "`layerN-1` is the ceiling."
    )
