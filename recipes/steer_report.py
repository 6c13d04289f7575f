"""Report, table and figure of the steering recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from paper_tables import escaped, markdown
from steer_verdicts import BREAKS, MEASURES, NOT, RULE, STEERS, UNSPECIFIC

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000")
MARKERS = "osD^vP<X"
CONTINUES = {
    STEERS: "goes on so",
    BREAKS: "goes on so, but breaks fluency",
    UNSPECIFIC: "not specific",
    NOT: "does not go on so",
}


def report(record: dict[str, Any]) -> str:
    """The whole experiment in Markdown."""
    found = record["features"]
    options = record["options"]
    n_controls = sum(len(one["controls"]) for one in found)
    rows = [
        [
            str(one["feature"]),
            escaped(", ".join(one["seems to be"])),
            "–" if one["home"] is None else str(one["home"]),
            f"**{one['verdict']}**" + _from(one["at"]),
            escaped(", ".join(one["expected next"])),
            f"**{CONTINUES[one['continues']]}**" + _from(one["continues_at"]),
            escaped("; ".join(one["rows"][-1]["more_frequent"])) or "–",
        ]
        for one in found
    ]
    strongest = f"{options['strengths'][-1]:g}"
    parts = [
        "# Steering\n",
        f"Does the text express the feature that was raised? Of {len(found)} features: "
        f"{_counted(one['verdict'] for one in found)}. Does it go on as after the feature's tokens? "
        f"{_counted(CONTINUES[one['continues']] for one in found)}. Of {n_controls} control latents, judged for "
        f"the features' measures, {sum(one['controls_that_rise'] for one in found)} rise at some strength in the "
        f"first sense and {sum(one['controls_that_continue'] for one in found)} in the second.\n",
        markdown(
            ["feature", "own tokens", "home block", "expressed?", "expected next", "goes on so?",
             f"more frequent at {strongest} (completions)"],
            rows,
        ),
        f"\n**Rule (fixed before the run).** {RULE}\n\n**Choice of features.** "
        + ("Named on the command line." if options["latents"] else record["choice"]),
        f"\nModel {escaped(Path(options['model']).name)} ({options['backend']}), {record['completions']} completions "
        f"per row ({len(options['prompts'])} prompts x {options['seeds']} samples, temperature "
        f"{options['temperature']:g}, top-k {options['top_k']}), at most {options['max_new_tokens']} tokens. Strengths "
        "are in units of each feature's maximum; a control is set to the same activation as the feature. "
        "± is the standard error over the pairs. The more frequent tokens are described, not tested.\n",
        "![Dose-response](dose_response.png)\n",
    ]  # fmt: skip
    return "\n".join([*parts, *(_section(one) for one in found)])


def _counted(verdicts: Iterable[str]) -> str:
    return ", ".join(f"{number} {verdict}" for verdict, number in Counter(verdicts).most_common())


def _from(strength: float | None) -> str:
    return "" if strength is None else f" (from {strength:g})"


def _section(one: dict[str, Any]) -> str:
    rows = []
    for row in one["rows"]:
        steered = row["value"] is not None
        cells = [f"{row['value']:g}" if steered else "unsteered", f"{row['kl']:.2f}"]
        cells.append(f"{row['perplexity']:.1f} ({row['perplexity_ratio']:.1f}x)")
        cells.append(f"{row['activation']:.2f}")
        for name in MEASURES:
            cells.append(f"{row[name]:.3f}" + (f" ({_signed(row[f'{name}_rise'])})" if steered else ""))
            cells.append(f"{row[f'{name}_control']:.3f}" if steered else "–")
        cells.append(f"{row['control_perplexity']:.1f}" if steered else "–")
        cells.append(escaped("; ".join(row["more_frequent"])) or "–")
        rows.append(cells)
    contexts = "\n".join(
        f"- {escaped(context['before'][-60:])}**{escaped(context['token'].strip()) or '(space)'}**"
        f"{escaped(context['after'][:40])}"
        + ("" if context["block"] is None else f" (block {context['block']})")
        for context in one["contexts"]
    )
    quotes = "\n".join(
        f"- {'unsteered' if quote['value'] is None else format(quote['value'], 'g')}: "
        f"{escaped(quote['prompt'])} … {escaped(quote['text'].strip()) or '(nothing)'}"
        for quote in one["quotes"]
    )
    columns = ["strength", "KL", "perplexity", "activation"]
    for title in ("fires on", "own tokens", "goes on so"):
        columns += [title, "control"]
    table = markdown([*columns, "control's perplexity", "more frequent"], rows)
    return (
        f"## Feature {one['feature']}: {escaped(', '.join(one['seems to be']))}\n\n{one['verdict'].capitalize()}; "
        f"{CONTINUES[one['continues']]}. Fires on {one['firing_frequency']:.2%} of tokens; maximum "
        f"{one['max_activation']:.2f}; expected next: {escaped(', '.join(one['expected next']))}; controls: "
        f"{', '.join(map(str, one['controls']))}.\n\n{contexts}\n\n{table}\n\nCompletions:\n\n{quotes}\n"
    )


def _signed(gain: dict[str, float]) -> str:
    return f"{gain['mean']:+.3f} ± {gain['stderr']:.3f}"


def figure(found: Sequence[dict[str, Any]]) -> Figure:
    """Six measures against strength, a line per feature; controls grey."""
    panels = {
        "kl": ("KL(clean ‖ steered), nats per token", "control_kl"),
        "firing": ("share of tokens it fires on", "firing_control"),
        "own": ("share of completions\nwith own tokens", "own_control"),
        "perplexity": ("perplexity under the clean model", "control_perplexity"),
        "activation": ("activation in a clean reading", None),
        "next": ("share of tokens expected\nafter own tokens", "next_control"),
    }
    drawn, axes = plt.subplots(2, 3, figsize=(12.5, 6.4), layout="constrained", sharex=True)
    for axis, (name, (title, control)) in zip(axes.flat, panels.items(), strict=True):
        for i, one in enumerate(found):
            strengths = [row["value"] or 0.0 for row in one["rows"]]
            if control is not None:
                grey = [row[control] for row in one["rows"]]
                axis.plot(strengths, grey, color="0.7", linewidth=1, label="controls" if not i else None)
            label = f"{one['feature']}: {', '.join(one['seems to be'][:2])}".replace("$", r"\$")
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            axis.plot(strengths, [row[name] for row in one["rows"]], label=label, markersize=5, **style)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[1, 0].set_yscale("log")
    axes[1, 0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[1, 0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    for axis in axes[1]:
        axis.set_xlabel("strength (in units of the feature's maximum)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper", frameon=False)
    return drawn


def table(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per feature and strength."""
    rows = []
    for one in found:
        for row in one["rows"]:
            flat: dict[str, Any] = {
                "feature": one["feature"],
                "tokens_of_feature": " ".join(one["seems to be"]),
            }
            for name, value in row.items():
                if isinstance(value, dict):
                    flat |= {f"{name}_{key}": number for key, number in value.items()}
                elif name == "tokens":
                    flat["generated_tokens"] = value
                else:
                    flat[name] = "; ".join(value) if isinstance(value, list) else value
            rows.append(flat | {"verdict": one["verdict"]})
    return pd.DataFrame(rows)
