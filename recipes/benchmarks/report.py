"""results.json, the Markdown table made from it, and the scaling plots.

python recipes/benchmarks/report.py           # table and plots again, from results.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS, TABLE, PLOT = "results.json", "results.md", "scaling.png"
OURS, SCALING = "RouteSAE", "Scaling"
FIRST = ("SAE step", "Memory of the SAE step", "Memory of the activation buffer")
FASTER_GOAL = 2.5
"""How many times faster than SAELens' fastest setting a RouteSAE's step should be."""


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write all three files; the plot only where scaling was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / RESULTS, json.dumps(_rounded(results), indent=1) + "\n")
    render(folder)


def render(folder: Path) -> None:
    """Table and plots from ``results.json``."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    _write_text(folder / TABLE, markdown(results))
    scaling = [row for row in results["rows"] if row["group"] == SCALING]
    if scaling:
        _plot(scaling, folder / PLOT)


def markdown(results: dict[str, Any]) -> str:
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['cpus']} cores"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        "# Benchmark results",
        "",
        f"{where}, {machine['threads']} threads, {machine['dtype']}; Python {machine['python']}, {versions}.",
        "",
        "Median over rounds of the ratio to the reference timed right before in the same round, with its range.",
    ]
    if results["quick"]:
        lines += ["", "**Tiny sizes: this shows that the benchmarks run, not how fast anything is.**"]
    rows = [row for row in results["rows"] if row["group"] != SCALING] + faster_than_saelens(results["rows"])
    for group, of_group in groupby(sorted(rows, key=_order(rows)), key=lambda row: row["group"]):
        lines += ["", f"## {group}"]
        for size, of_size in groupby(of_group, key=lambda row: row["size"]):
            lines += ["", f"{size}:", "", "| | ratio (range) | in units of | rounds | target |"]
            lines += ["| --- | --- | --- | --- | --- |"]
            lines += [_line(row) for row in of_size]
    return "\n".join(lines) + "\n"


def _order(rows: list[dict[str, Any]]) -> Any:
    """The SAE's step first; otherwise groups and sizes in the order they were measured in."""
    groups = list(dict.fromkeys([*FIRST, *(row["group"] for row in rows)]))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    return lambda row: (groups.index(row["group"]), sizes.index(row["size"]))


def _line(row: dict[str, Any]) -> str:
    ratio = f"{row['median']:.3g}"
    if row["rounds"] > 1:
        low, high = row["range"]
        ratio += f" ({low:.3g} to {high:.3g})"
    goal = ""
    if "goal" in row:
        sign, limit = row["goal"].split()
        goal = f"{ {'<=': '≤', '>=': '≥'}[sign] } {limit}: {'met' if row['met'] else '**missed**'}"
    name = row["name"]
    if "tokens_per_s" in row:
        name += f" ({row['tokens_per_s']:,.0f} tokens/s; huggingface {row['reference_tokens_per_s']:,.0f})"
    if "gigabytes" in row:
        name += f" ({row['gigabytes']:.3g} GB)"
    return f"| {name} | {ratio} | {row['unit']} | {row['rounds']} | {goal} |"


def faster_than_saelens(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A RouteSAE's step against SAELens' fastest, by their medians in units of the encoder matmul."""
    derived = []
    steps = [row for row in rows if row["group"] == "SAE step"]
    for size in dict.fromkeys(row["size"] for row in steps):
        medians = {row["name"]: row["median"] for row in steps if row["size"] == size}
        theirs = {name: median for name, median in medians.items() if name.startswith("SAELens")}
        if OURS not in medians or not theirs:
            continue
        fastest = min(theirs, key=lambda name: theirs[name])
        ratio = theirs[fastest] / medians[OURS]
        derived.append(
            {
                "group": "SAE step",
                "size": size,
                "name": f"{OURS} against {fastest}",
                "unit": "times faster, by the medians above",
                "median": ratio,
                "rounds": 1,
                "goal": f">= {FASTER_GOAL}",
                "met": ratio >= FASTER_GOAL,
            }
        )
    return derived


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    # panels share the colours but not the height: layers cost a Crosscoder far more than anything else does
    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, panel in zip(axes, panels.flat, strict=False):
        for i, name in enumerate(names):
            of_curve = sorted(
                (row for row in rows if row["axis"] == axis and row["name"] == name),
                key=lambda row: row["value"],
            )
            if not of_curve:
                continue
            x, y = [row["value"] for row in of_curve], [row["median"] for row in of_curve]
            below = [row["median"] - row["range"][0] for row in of_curve]
            above = [row["range"][1] - row["median"] for row in of_curve]
            panel.errorbar(x, y, [below, above], marker="o", capsize=3, color=f"C{i}", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xticks(x, [f"{value:,}" for value in x])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel({"layers": "layers read", "batch": "tokens per batch"}.get(axis, axis))
        panel.set_ylabel("step, in encoder matmuls of one layer")
        panel.grid(alpha=0.3)
    handles = {label: h for p in panels.flat for h, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150, metadata={"Software": None})
    plt.close(figure)
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """Five digits of every float: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main(
    folder: Annotated[Path, typer.Option(help="Where results.json is.")] = Path(__file__).parent,
) -> None:
    """Write the table and the plots again from results.json."""
    render(folder)


if __name__ == "__main__":
    typer.run(main)
