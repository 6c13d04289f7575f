"""The sections and CSV tables of the Llama Scope recipe's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from llama_scope_plots import GROUPS, POSITION_STYLES, called, group_of
from llama_scope_verdicts import CLOSE, ranged, summary
from paper_report import _duration as duration
from paper_tables import escaped, markdown
from paper_verdicts import number

from routesae_lens.analysis.match_distribution import MatchDistribution

if TYPE_CHECKING:
    from llama_scope_report import Found

METRICS = {
    "l0": "L0",
    "norm_mse": "NormMSE",
    "explained_variance_raw": "EV, centred",
    "explained_variance_raw_uncentered": "EV (Eq. 6)",
    "delta_ce": "ΔLM loss",
    "kl": "KL",
    "dead_latents": "silent here",
}
"""Columns of an evaluation in the report."""


def cells(one: Mapping[str, Any], metrics: Sequence[str] = tuple(METRICS)) -> list[str]:
    return ["–" if one.get(name) is None else number(float(one[name])) for name in metrics]


def in_order(names: Any) -> list[str]:
    return sorted(names, key=lambda name: (list(GROUPS).index(group_of(name)), name))


# --- CSV --------------------------------------------------------------------------------------------


def csv_tables(found: Found) -> dict[str, pd.DataFrame]:
    """By file name."""
    rows: list[dict[str, Any]] = []
    parts, more = found.parts, found.generalisation

    def add(measured: str, evaluations: Mapping[str, Any]) -> None:
        for name, one in evaluations.items():
            flat = {key: value for key, value in one.items() if not isinstance(value, dict)}
            rows.append({"measured": measured, "name": name, **flat})

    for name in ("annealing", "positions"):
        if name in parts:
            add(name, parts[name]["evaluations"])
    if "conversion" in parts:
        add("JumpReLU", {name: one["after"] for name, one in parts["conversion"].items()})
    if "plain" in more.get("chat", {}):
        add("documents, plain", more["chat"]["plain"])
        add("documents, as chats", more["chat"]["chat"])
    for name, one in more.get("models", {}).items():
        if isinstance(one, dict):
            add(f"model {name}", one)
    by_position = [
        {"name": name, "start": one["start"], "end": one["end"]}
        | {key: value for key, value in one.items() if not isinstance(value, dict)}
        for name, profile in more.get("long", {}).get("saes", {}).items()
        for one in profile["bins"]
    ]
    histogram = [
        {"name": name, "from": low, "to": high, "latents": n, "never_fired": one["never_fired"],
         "d_sae": one["d_sae"], "tokens": one["tokens"]}
        for name, one in more.get("firing", {}).items()
        for low, high, n in zip(one["edges"], one["edges"][1:], one["histogram"], strict=False)
    ]  # fmt: skip
    matches = [
        {"from": one["names"][0], "to": one["names"][1], "cosine": cosine, "share": share, "random": random}
        for one in parts.get("geometry", {}).get("distributions", {}).values()
        for cosine, share, random in zip(
            one["cosine"], one["share"], map(_mean, zip(*one["random"], strict=True)), strict=True
        )
    ]
    named = {
        "results": rows, "positions_in_context": by_position, "firing": histogram, "matches": matches,
    }  # fmt: skip
    return {name: pd.DataFrame(some) for name, some in named.items() if some}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- Sections -----------------------------------------------------------------------------------------


def what_was_run(found: Found) -> str:
    s, about = found.settings, found.about
    batch = s["batch_size"]
    own = f"the first {about.get('held_out_documents', '–')} documents of the shuffled training text, not trained on"
    rows = [
        ("preset", s["preset"]),
        ("training text", s["dataset"]),
        ("held-out text", s["eval_dataset"] or own),
        ("model", f"{s['model']}, {about.get('n_layers')} blocks, d_model {about.get('d_model')}"),
    ]
    if about:
        routed = about["route_layers"]
        rows += [
            ("blocks", f"{about['layer']} (TopK), {', '.join(map(str, about['layers']))} (positions, Crosscoder), "
             f"{routed[0]} to {routed[-1]} (RouteSAE)"),
            ("width", f"{about['d_sae']:,}; the wide one {about['wide']:,}"),
        ]  # fmt: skip
    for part, key in (("annealing", "tokens"), ("positions", "position_tokens")):
        if part in found.parts:
            n = len(found.parts[part]["evaluations"])
            steps = s[key] // batch
            rows.append((f"training, {part}", f"{n} SAEs on one pass: {steps:,} steps of {batch:,} tokens"))
    seeds = ", ".join(map(str, range(s["seeds"])))
    rows += [
        ("k", str(s["k"])),
        ("context", f"{s['context_size']} tokens; special tokens and position 0 do not count"),
        ("seeds", f"{seeds} with and without K-annealing; 0 of the positions, 100 of everything else"),
        ("silent latents", f"fired on none of the last {found.window * batch:,} training tokens"),
        ("held-out tokens", f"{_kept(found)} for metrics"),
    ]
    if found.diverged:
        rows.append(
            (
                "diverged, left out",
                ", ".join(f"{name} (step {step})" for name, step in found.diverged.items()),
            )
        )
    if found.stages:
        seconds: dict[str, float] = {}
        for stage in found.stages:
            seconds[stage["part"]] = seconds.get(stage["part"], 0.0) + stage["seconds"]
        spent = [
            f"{part} {duration(t)}" for part, t in {**seconds, "together": sum(seconds.values())}.items()
        ]
        rows.append(("wall time", ", ".join(spent)))
        rows.append(("peak memory", f"{max(stage['peak_gib'] for stage in found.stages):.1f} GiB"))
    if found.versions:
        rows.append(("versions", ", ".join(f"{name} {v}" for name, v in found.versions.items())))
    text = "# Llama Scope's training and evaluation\n\nWritten by `recipes/llama_scope.py`.\n\n## What was run\n\n"
    text += markdown(["", ""], [[name, escaped(value)] for name, value in rows])
    wanted = ("annealing", "positions", "conversion", "geometry")
    missing = [part for part in wanted if part not in found.parts]
    if set(found.generalisation) != {"firing", "long", "chat", "models"}:
        missing.insert(0, "generalisation")
    if missing:
        text += f"\n\n**Not run, or not finished: {', '.join(missing)}.**"
    return text


def _kept(found: Found) -> str:
    counts = {one["tokens"] for name in ("annealing", "positions") if name in found.parts
              for one in found.parts[name]["evaluations"].values()}  # fmt: skip
    return ", ".join(f"{n:,}" for n in sorted(counts)) or "–"


def annealing(found: Found) -> str:
    if "annealing" not in found.parts:
        return ""
    part = found.parts["annealing"]
    rows = []
    for name in in_order(part["evaluations"]):
        one = summary(found.curves[found.curves["name"] == name], found.window)
        rows.append(
            [called(name), f"{part['saes'][name]['d_sae']:,}", f"{one['final_loss']:.4f}",
             f"{one['largest_silent']:.1%}", f"{one['last_silent']:.1%}", f"{one['awake_from']:.0%}",
             *cells(part["evaluations"][name])]
        )  # fmt: skip
    return (
        "## K-annealing (figure 12)\n\n"
        "Line: mean over seeds; band: their range. All SAEs saw the same tokens. The last loss is the median over the "
        f"last tenth of the run; a run counts as converged within {CLOSE:.0%} of it. Losses of the RouteSAE and the "
        "Crosscoder are relative to each token's norm, and their input is standardised, so they do not compare with "
        "the others'; the wide one's do. The paper's window for silence is 1e6 tokens, more than a short run "
        "has. The columns from L0 on are of held-out text, through the splice.\n\n"
        + markdown(
            ["SAE", "width", "last loss", "silent, most", "silent, end", "few silent after", *METRICS.values()], rows
        )
    )  # fmt: skip


def positions(found: Found) -> str:
    if "positions" not in found.parts:
        return ""
    part = found.parts["positions"]
    rows = []
    for layer in found.about["layers"]:
        for position, (words, _, _) in POSITION_STYLES.items():
            if (one := part["evaluations"].get(f"L{layer}{position}")) is not None:
                rows.append([f"L{layer}{position}", words.partition(": ")[2], *cells(one)])
    thresholds = "; ".join(
        f"{name} {number(one['calibrated'])} ({number(one['followed_in_training'])} followed in training)"
        for name, one in part["thresholds"].items()
    )
    return (
        "## Four positions at three blocks (figure 10)\n\n"
        "One seed, one pass. Explained variance is of the model's own activations; Eq. 6 is the paper's, uncentred. A "
        "splice into attention or MLP output leaves the residual stream's own path as it is, so their ΔLM losses are "
        "smaller by nature. Transcoders have one threshold in TopK's place, set on the calibration text to k latents "
        f"per token: {thresholds or 'none'}.\n\n" + markdown(["SAE", "position", *METRICS.values()], rows)
    )


def conversion(found: Found) -> str:
    if "conversion" not in found.parts:
        return ""
    rows = []
    for name in in_order(found.parts["conversion"]):
        one = found.parts["conversion"][name]
        row = [called(name), f"{number(one['threshold']['threshold'])} ({one['threshold']['unit']})"]
        for metric in ("l0", "norm_mse", "kl", "delta_ce"):
            before, after = one["before"][metric], one["after"][metric]
            row.append(f"{number(before)} → {number(after)} ({after / before - 1:+.1%})")
        rows.append(row)
    calibrated = next(iter(found.parts["conversion"].values()))["threshold"]["tokens"]
    return (
        "## TopK to JumpReLU (figure 11)\n\n"
        f"The threshold gives k latents per token on {calibrated:,} tokens of the training text; measured on held-out "
        "text, so L0 there may differ from k.\n\n"
        + markdown(["SAE", "threshold", "L0", "NormMSE", "KL", "ΔLM loss"], rows)
    )


def firing(found: Found) -> str:
    if not (some := found.generalisation.get("firing")):
        return ""
    rows = []
    for name in in_order(some):
        one = some[name]
        rows.append(
            [called(name), f"{one['tokens']:,}", f"{one['never_fired'] / one['d_sae']:.1%}",
             f"{one['dense_share']:.2%}", "; ".join(one["findings"])]
        )  # fmt: skip
    return "## Firing frequencies (figure 4)\n\n" + (
        "Of the TopK forms on held-out text. The limits are the paper's (section 4.4).\n\n"
        + markdown(["SAE", "tokens", "never fired", "on more than 10 %", "limits"], rows)
    )


def long(found: Found) -> str:
    if not (some := found.generalisation.get("long")):
        return ""
    profiles = some["saes"]
    any_one = next(iter(profiles.values()))
    where = found.settings["long_dataset"] or "the text"
    source = (
        f"No document of {where} has {any_one['length']:,} tokens, so the {some['rows']} contexts are documents "
        "joined by BOS: they show what positions beyond the training length do, not what a long text does."
        if some["joined"]
        else f"{some['long_documents']} documents of {where} that were not trained on have "
        f"{any_one['length']:,} tokens or more; {some['rows']} of them, cut to that, were read."
    )
    rows = []
    for group in GROUPS:
        names = [name for name in profiles if group_of(name) == group]
        if names:
            row = [GROUPS[group][0]]
            bins = [profiles[name]["bins"] for name in names]
            for metric in ("norm_mse", "l0", "delta_ce"):
                row += [ranged([one[i][metric] for one in bins]) for i in (0, -1)]
            rows.append(row)
    first, last = any_one["bins"][0], any_one["bins"][-1]
    spans = [f"{one['start']} to {one['end'] - 1}" for one in (first, last)]
    titles = [f"{what}, {span}" for what in ("NormMSE", "L0", "ΔLM loss") for span in spans]
    return (
        f"## Contexts up to {any_one['length'] / any_one['training_length']:g} times the training length (figure 5)\n\n"
        f"{source} JumpReLU forms, mean and range over seeds; every range of positions is in "
        "positions_in_context.csv. The band shows SAEs' seeds, not texts.\n\n"
        + markdown(["SAE", *titles], rows)
    )


def chat(found: Found) -> str:
    if not (some := found.generalisation.get("chat")):
        return ""
    title = "## Chats (section 4.5.2)\n\n"
    if "skipped" in some:
        return f"{title}Not measured: {escaped(some['skipped'])}."
    rows = []
    for name in in_order(some["plain"]):
        plain, chats = some["plain"][name], some["chat"][name]
        rows.append(
            [called(name)]
            + [f"{number(plain[m])} → {number(chats[m])}" for m in ("l0", "norm_mse", "delta_ce", "kl")]
        )
    counts = some["counts"]
    return (
        f"{title}The same {counts['conversations']} documents as plain text and as the answer in a chat, cut to "
        f"{found.settings['context_size']} tokens; what the template writes takes some of these. The template's "
        "special tokens do not count, its other words do. The model and the SAEs are the same: this is the "
        "data's part alone. JumpReLU forms.\n\n" + markdown(["SAE", "L0", "NormMSE", "ΔLM loss", "KL"], rows)
    )


def models(found: Found) -> str:
    if not (some := found.generalisation.get("models")):
        return ""
    title = "## From a base model to its instruct model (figure 6)\n\n"
    if "skipped" in some:
        return f"{title}Not measured: {escaped(some['skipped'])}."
    rows = [[called(name), escaped(model), *cells(one[name])] for name in in_order(next(iter(some.values())))
            for model, one in some.items()]  # fmt: skip
    return title + markdown(["SAE", "model", *METRICS.values()], rows)


def geometry(found: Found) -> str:
    if "geometry" not in found.parts:
        return ""
    rows = []
    for name, plain in found.parts["geometry"]["distributions"].items():
        one = MatchDistribution.from_dict(plain)
        children = one.at_bound.children
        split = sum(n for how_many, n in children.items() if how_many > 1) / max(1, sum(children.values()))
        median = next(c for c, share in zip(one.cosine, one.share, strict=True) if share >= 0.5)
        rows.append(
            [called(name), f"{one.widths[0]:,}", f"{median:.2f}", number(one.bound), f"{one.at_bound.new:.1%}",
             number(one.at_random.threshold), f"{one.at_random.new:.1%}", f"{split:.1%}"]
        )  # fmt: skip
    return (
        "## Best matches (figure 8)\n\n"
        f"Every latent's most similar latent in {called('annealed-seed0')}, by decoder cosine. The bound is "
        "sqrt(12 ln F / D) with the wider F; 99 % of the best matches of random dictionaries of the same sizes are "
        "below the random limit. A latent of the first that matches none above it is new; split are those of the "
        "second that are the best match of two or more above the bound. All started from other random rows than that "
        "one; latents that never fire keep theirs and count as new. The Crosscoder is compared in the SAEs' block, and "
        "like the RouteSAE it reads standardised activations.\n\n"
        + markdown(
            ["dictionary", "width", "median cosine", "bound", "new at the bound", "random limit",
             "new at the random limit", "split (bound)"],
            rows,
        )
    )  # fmt: skip


def neighbourhood(found: Found) -> str:
    if "geometry" not in found.parts:
        return ""
    one = found.parts["geometry"]["map"]
    text = (
        "## One feature's neighbours (figure 7)\n\n"
        f"Latent {one['latent']} of {called(one['dictionary'])}: chosen by rule, of {one['candidates']} interpretable "
        "features that fire on at most 1 % of the tokens the one that is the best match of most latents of the wide "
        f"dictionary ({one['children']} with a cosine of {number(one['cosine'])} or more). "
    )
    if "skipped" in one:
        return text + f"No map: {escaped(one['skipped'])}."
    rows = [
        [called(point["dictionary"]), str(point["latent"]), f"{point['cosine']:.2f}",
         escaped(", ".join(words["tokens"])) or "–"]
        for point, words in zip(one["map"]["points"], one["tokens"], strict=True)
    ]  # fmt: skip
    return (
        text
        + "Tokens: the strongest on held-out text, where the latent counts as interpretable there.\n\n"
        + (markdown(["dictionary", "latent", "cosine with it", "tokens"], rows))
    )
