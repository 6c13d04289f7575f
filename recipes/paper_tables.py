"""The tables of the report, as Markdown."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

import pandas as pd
from paper_findings import EVALUATED, UNFINISHED, USED, Findings
from paper_plots import STYLES
from paper_presets import NAMES, OWN
from paper_verdicts import NOT_RUN, NOT_TESTABLE, ONE_SEED, REPRODUCED, interval, number


def escaped(text: object) -> str:
    """Text from data for a Markdown table: it cannot end a cell, format anything, or be HTML."""
    plain = "".join(c if c.isprintable() else " " for c in str(text))
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(plain, quote=False))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(values: pd.Series) -> str:
    """Mean and half of the 95 % interval over seeds."""
    found = values.dropna().astype(float).tolist()
    if not found:
        return "–"
    mean, half = interval(found)
    return number(mean) + ("" if math.isnan(half) else f" ± {number(half)}")


REASONS = {"not finite": "KL not finite"}
"""Statuses that need more words."""


def reason(status: str) -> str:
    """Why an SAE has no numbers."""
    return escaped(REASONS.get(status, status))


def seeds(group: pd.DataFrame) -> str:
    """How many seeds the numbers of a row are of, and what became of the others."""
    failed = group[group["status"] != EVALUATED]
    if failed.empty:
        return str(len(group))
    count = f"{len(group) - len(failed)} of {len(group)}"
    if len(failed) == len(group) and failed["status"].nunique() == 1:
        return f"{count} ({reason(failed['status'].iloc[0])})"
    each = zip(failed["seed"], failed["status"], strict=True)
    return f"{count} ({', '.join(f'seed {seed}: {reason(status)}' for seed, status in each)})"


def without_numbers(runs: pd.DataFrame, some: Sequence[str] | None = None) -> list[str]:
    """A line for each part and reason that leave SAEs (of ``some`` methods) without numbers."""
    failed, lines = runs[runs["status"] != EVALUATED], []
    failed = failed if some is None else failed[failed["method"].isin(some)]
    for (part, status), group in failed.groupby(["part", "status"], sort=False):
        of_part = (runs["part"] == part).sum()
        whole = len(group) == of_part > 1
        names = f"all {of_part} SAEs" if whole else ", ".join(map(escaped, group["name"]))
        lines.append(f"- {escaped(part)}, {reason(status)}: {names}")
    return lines


def _groups(runs: pd.DataFrame) -> Iterable[tuple[str, str, float, pd.DataFrame]]:
    """Method, kind, sparsity and rows, methods in the order of the legends; without ``topk@block``.

    Nor those of which nothing is known yet: the top of the report names them.
    """
    order = [m for m in NAMES if (runs["method"] == m).any()]
    order += sorted({m for m in runs["method"] if m not in NAMES and "@" not in m})
    for method in order:
        rows = runs[runs["method"] == method]
        for (kind, sparsity), group in rows.groupby(["kind", "sparsity"]):
            if not group["status"].isin(UNFINISHED).all():
                yield method, kind, sparsity, group


IN_SHORT = {REPRODUCED: "answered with yes", "not reproduced": "not answered with yes"}
"""Verdicts where nobody claimed anything before."""


def in_short(found: Findings, claims: pd.DataFrame) -> str:
    """The core at its middle sparsity, and how many claims got which verdict."""
    parts = []
    core = found.runs[found.runs["part"] == "core"]
    if len(core):
        ks = sorted(core["sparsity"].unique())
        k = ks[len(ks) // 2]
        rows = [
            f"- {NAMES[method]}: KL {cell(group['kl'])} nats/token, loss recovered {cell(group['loss_recovered'])}, "
            f"{cell(group['features'])} interpretable features"
            if group["kl"].notna().any()
            else f"- {NAMES[method]}: no numbers, {seeds(group)} seeds"
            for method, _, sparsity, group in _groups(core)
            if sparsity == k
        ]
        if rows:
            parts.append(f"At k = {k:g}, mean over seeds ± half of the 95 % interval:\n\n" + "\n".join(rows))
    verdicts = claims["verdict"].str.partition(":")
    kind = verdicts[0].where(~verdicts[0].isin([ONE_SEED, NOT_RUN, "no verdict"]), "no verdict")
    detail = verdicts[2].str.strip().where(~verdicts[0].isin([ONE_SEED, NOT_RUN]), verdicts[0])
    own = claims["where"] == OWN
    for words, which in (("claims of the paper", ~own), ("own questions (below, by the same rules)", own)):
        lines = []
        for name, count in kind[which].value_counts().items():
            details = detail[which & (kind == name)].value_counts()
            inner = ", ".join(f"{n} {escaped(one)}" for one, n in details.items() if one)
            title = IN_SHORT.get(name, name) if which is own else name
            lines.append(f"- {count} {title}" + (f" ({inner})" if inner and name != NOT_TESTABLE else ""))
        if lines:
            parts.append(f"Of {which.sum()} {words}:\n\n" + "\n".join(lines))
    return "## In short\n\n" + "\n\n".join(parts)


MAIN = {
    "l0": "L0",
    "kl": "KL (nats/token)",
    "loss_recovered": "loss recovered",
    "norm_mse": "NormMSE",
    "features": "features",
    "dead_latents": "never fired",
}


def main_results(found: Findings) -> str:
    rows = [
        [NAMES.get(method, method), f"{kind} {sparsity:g}", seeds(group), *(cell(group[c]) for c in MAIN)]
        for method, kind, sparsity, group in _groups(found.runs)
    ]
    if not rows:
        return ""
    return (
        "## Results\n\nMean over seeds ± half of the 95 % confidence interval (t distribution).\n\n"
        + markdown(["method", "sparsity", "seeds", *MAIN.values()], rows)
    )


def tables_2_and_3(found: Findings) -> str:
    out = []
    for number_, title, variant, name in (
        (2, "sum pooling and attention", "route_attention", "attention"),
        (3, "hard and soft routing", "route_soft", "soft routing"),
    ):
        runs = found.runs[~found.runs["status"].isin(UNFINISHED)]
        shared = sorted(
            set(runs.loc[runs["method"] == "route", "sparsity"])
            & set(runs.loc[runs["method"] == variant, "sparsity"])
        )
        if not shared:
            continue
        rows = [
            [
                words,
                what,
                *(
                    cell(runs.loc[(runs["method"] == method) & (runs["sparsity"] == k), metric])
                    for k in shared
                ),
            ]
            for method, words in (
                ("route", "sum pooling" if number_ == 2 else "hard routing"),
                (variant, name),
            )
            for metric, what in (("norm_mse", "NormMSE"), ("kl", "KL (nats/token)"), ("features", "features"))
        ]
        out.append(
            f"## Table {number_}: {title}\n\n" + markdown(["", "", *(f"k = {k:g}" for k in shared)], rows)
        )
        if lines := without_numbers(runs[runs["sparsity"].isin(shared)], ("route", variant)):
            out.append("Without numbers:\n\n" + "\n".join(lines))
    return "\n\n".join(out)


def collapse(found: Findings) -> str:
    """Of every SAE that chooses among blocks; where its routing was not analysed, what the evaluation saw.

    One without numbers stands in the last column with the reason: a router may well be why it has none.
    """
    chooses = [found.chooses(*one) for one in zip(found.runs["part"], found.runs["name"], strict=True)]
    runs = found.runs[pd.Series(chooses, found.runs.index, dtype=bool)]
    columns = {
        "mean_p": "mean p",
        "entropy": "entropy of p (nats)",
        "effective_layers": "effective blocks",
        "layers_used": f"blocks over {USED:.0%}",
        "switch_rate": "switch rate",
        "dead_latents": "never fired",
    }
    rows = []
    for method, kind, sparsity, group in _groups(runs):
        used = []
        for seed, blocks, status in zip(group["seed"], group["blocks"], group["status"], strict=True):
            used.append(f"seed {int(seed)}: {blocks if status == EVALUATED else reason(status)}")
        rows.append(
            [
                NAMES.get(method, method),
                f"{kind} {sparsity:g}",
                *(cell(group[c]) for c in columns),
                "; ".join(used),
            ]
        )
    if not rows:
        return ""
    note = (
        "Effective blocks: exp of the entropy of the shares. Switch rate: neighbouring tokens sent to different "
        "blocks. The last column has the blocks by share, the largest first."
    )
    return f"## Collapse\n\n{note}\n\n" + markdown(
        ["method", "sparsity", *columns.values(), "blocks used"], rows
    )


def by_class(found: Findings) -> str:
    """Share by token class: of each class, the three blocks that take most of it, at the middle k and first seed."""
    compared = ("route", "distilled", "distilled_mean", "random")
    routing = found.routing[found.routing["method"].isin(compared)]
    if routing.empty:
        return ""
    ks = sorted(routing["sparsity"].unique())
    routing = routing[(routing["sparsity"] == ks[len(ks) // 2]) & (routing["seed"] == routing["seed"].min())]
    methods = [m for m in compared if (routing["method"] == m).any()]
    rows = []
    for token_class in dict.fromkeys(routing["token_class"]):
        cells = []
        of_class = routing[routing["token_class"] == token_class]
        for method in methods:
            top = of_class[of_class["method"] == method].nlargest(3, "inference_share")
            shares = (f"{int(r.layer)}: {r.inference_share:.0%}" for r in top.itertuples())
            cells.append(", ".join(shares) or "–")
        tokens = of_class["class_tokens"].max()
        rows.append([escaped(token_class), f"{int(tokens):,}", *cells])
    return (
        "## Blocks by token class\n\nThe three blocks that take most of each class "
        f"(k = {ks[len(ks) // 2]:g}, one seed).\n\n"
        + markdown(["class", "tokens", *(NAMES.get(m, m) for m in methods)], rows)
    )


def layer_rows(found: Findings) -> pd.DataFrame:
    """SAEs of one fixed block, with a column ``layer``; also those without numbers."""
    rows = found.runs[found.runs["method"].astype(str).str.startswith("topk@")].copy()
    rows["layer"] = rows["method"].str.partition("@")[2].astype(int) if len(rows) else []
    return rows.sort_values("layer")


def choosers(found: Findings, k: float) -> pd.DataFrame:
    """KL of what chooses a block per token, at one k: columns label, kl, half, color, line."""
    rows = []
    for method in ("route", "random", "distilled", "distilled_mean"):
        name, (color, _, line) = NAMES[method], STYLES[method]
        values = found.runs.loc[
            (found.runs["method"] == method) & (found.runs["sparsity"] == k), "kl"
        ].dropna()
        if len(values):
            rows.append((name, *interval(values.tolist()), color, line))
        seen = found.views[
            (found.views["method"] == method)
            & (found.views["sparsity"] == k)
            & (found.views["rule"] == "oracle")
        ]
        if len(seen):
            rows.append(
                (
                    f"{name}, oracle",
                    *interval(seen["kl"].astype(float).tolist()),
                    color,
                    ":" if line == "-" else "-.",
                )
            )
    return pd.DataFrame(rows, columns=["label", "kl", "half", "color", "line"])


def fixed_layers(found: Findings) -> str:
    layers = layer_rows(found)
    if layers["kl"].isna().all():
        return ""
    k = layers["sparsity"].iloc[0]
    columns = ("kl", "loss_recovered", "norm_mse", "features")
    rows = [
        [f"TopK on block {layer}", seeds(g), *(cell(g[c]) for c in columns)]
        for layer, g in layers.groupby("layer")
    ]
    rows += [
        [
            row.label,
            "",
            number(row.kl) + ("" if math.isnan(row.half) else f" ± {number(row.half)}"),
            "",
            "",
            "",
        ]
        for row in choosers(found, k).itertuples()
    ]
    best = layers.groupby("layer")["kl"].mean().idxmin()
    note = f"The best block is {best}: the least mean KL, chosen on the text that it is compared on."
    if layers["seed"].nunique() == 1:
        note += " One seed for each block: numbers, but no verdict."
    return f"## One block for all tokens (k = {k:g})\n\n{note}\n\n" + markdown(
        ["", "seeds", "KL (nats/token)", "loss recovered", "NormMSE", "features"], rows
    )


def views(found: Findings) -> str:
    if found.views.empty:
        return ""
    rows = [
        [
            NAMES.get(method, method),
            f"{kind} {sparsity:g}",
            escaped(rule),
            str(len(g)),
            *(cell(g[c]) for c in ("kl", "loss_recovered", "norm_mse")),
        ]
        for (method, kind, sparsity, rule), g in found.views.groupby(
            ["method", "kind", "sparsity", "rule"], sort=False
        )
    ]
    note = "The same dictionary, each token's block chosen otherwise. The oracle takes the one with the least NormMSE."
    return f"## Other routing rules\n\n{note}\n\n" + markdown(
        ["dictionary of", "sparsity", "rule", "seeds", "KL (nats/token)", "loss recovered", "NormMSE"], rows
    )
