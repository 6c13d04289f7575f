"""The sections of the report on mixtures of experts, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from experts_findings import Findings
from experts_methods import flops
from paper_findings import EVALUATED, UNFINISHED, plain_name
from paper_report import _claim_table as table_of_claims
from paper_report import _costs as costs
from paper_tables import cell, escaped, markdown, reason, seeds
from paper_verdicts import number

RESULTS = {
    "l0": "L0", "mse": "MSE", "norm_mse": "NormMSE", "kl": "KL", "delta_ce": "ΔCE", "loss_recovered": "loss recovered",
    "dead_share": "silent here",
}  # fmt: skip
REDUNDANCY = {
    "redundancy": "near copies, decoder", "redundancy_encoder": "encoder", "mean_best": "mean best cosine",
    "intra_mean": "within experts", "inter_mean": "between", "intra": "near copies within", "inter": "between ",
    "similarity": "similarity, all tokens", "similarity_verbs": "verbs", "area_verbs": "area under the CDF, verbs",
    "entropy_verbs": "entropy, verbs",
}  # fmt: skip
OMEGA = {"omega": "mean ω", "omega_min": "least", "omega_max": "largest", "share_max": "largest share of selections",
         "share_min": "smallest",
         "mean_p": "mean p of a selected expert"}  # fmt: skip


def what_was_run(found: Findings) -> str:
    s, about, runs = found.settings, found.about, found.runs
    own = f"{about.get('held_out_documents', '–')} documents of the training text, not trained on"
    steps, width = s["tokens"] // s["batch_size"], about.get("d_sae", 0)
    rows = [
        ("preset", s["preset"]),
        ("training text", s["dataset"]),
        ("held-out text", s["eval_dataset"] or own),
        ("model", f"{plain_name(s['model'])}, d_model {about.get('d_model', '–')}"),
        ("block", str(about.get("layers", ["–"])[-1])),
        ("expert SAEs", f"{width:,} latents, N = {s['per_active']} e experts (e: {', '.join(map(str, s['experts']))}): "
         f"{width // s['per_active']:,} latents are computed for a token"),
        ("dense SAEs", f"{width // s['per_active']:,} latents"),
        ("training", f"{steps:,} steps of {s['batch_size']:,} tokens ({steps * s['batch_size']:,}); context "
         f"{s['context_size']}; all SAEs of a part on one language-model pass"),
        ("learning rate, balance", f"{s['lr']:g}, {s['balance']:g}"),
    ]  # fmt: skip
    for title, column in (("held-out tokens for the splice", "tokens"), ("verb-like tokens", "verbs")):
        counts = sorted(runs[column].dropna().unique())
        rows.append((title, ", ".join(f"{int(n):,}" for n in counts) or "–"))
    rows.append(("held-out tokens for overlaps and experts", f"{s['feature_tokens']:,} or a few more"))
    for part, group in runs.groupby("part", sort=False):
        some = ", ".join(str(one) for one in sorted(group["seed"].unique()))
        rows.append((f"part {part}", f"{len(group)} SAEs, seeds {some}"))
    rows += costs(found.stages)
    if found.versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())))
    text = (
        "# Mixtures of experts: TopK, Gated, Switch and Scale SAEs at equal FLOPs\n\nWritten by `recipes/experts.py`, "
        "after \"Beyond Redundancy: Diverse and Specialized Multi-Expert Sparse Autoencoder\" (Scale SAE).\n\n"
        "## What was run\n\n" + markdown(["", ""], [(name, escaped(value)) for name, value in rows])
    )  # fmt: skip
    failed = runs[~runs["status"].isin([EVALUATED, *UNFINISHED])]
    if len(failed):
        lines = [
            f"- {escaped(row.name_)}: {reason(row.status)}"
            for row in failed.rename(columns={"name": "name_"}).itertuples()
        ]
        text += "\n\n**Without numbers, and left out of all means, figures and verdicts:**\n\n" + "\n".join(
            lines
        )
    if found.unfinished:
        text += (
            f"\n\n**Not run, or not finished: {escaped(', '.join(found.unfinished))}.** The same command with the same "
            "options goes on."
        )
    return text


def claims_table(claims: pd.DataFrame) -> str:
    if claims.empty:
        return ""
    rules = "\n".join(f"- {escaped(rule)}" for rule in dict.fromkeys(claims["rule"]) if rule)
    return (
        "## Every claim\n\nDifferences are taken within a seed (the first minus the second, relative where the claim "
        "is one of nearness, the second times the factor where it names one), by k: their mean ± half of the 95 % "
        "interval (t distribution) and the number of seeds n. A mixture's MSE is that of Eq. A.1 in the model's units. "
        "Gated's sparsity is a coefficient: it is compared at equal L0, interpolated in ln L0. A claim is reproduced "
        f"where, by the rule of its row in claims.csv:\n\n{rules}\n\nIt is opposite where the same holds the other "
        "way. The sparsities are not independent: all SAEs see the same tokens.\n\n" + table_of_claims(claims)
    )


def _groups(found: Findings, appendix: bool) -> Iterator[tuple[str, float, pd.DataFrame]]:
    """Label, sparsity and rows of the comparison or of the appendix, in the order of the legends."""
    for label, kind in found.kinds.items():
        if kind.appendix == appendix:
            rows = found.runs[found.runs["method"] == label]
            for sparsity, group in rows.groupby("sparsity"):
                if not group["status"].isin(UNFINISHED).all():
                    yield label, float(sparsity), group


def _table(
    found: Findings, columns: Mapping[str, str], appendix: bool = False, only: Sequence[str] = ()
) -> str:
    rows = [
        [escaped(label), f"{sparsity:g}", seeds(group), *(cell(group[metric]) for metric in columns)]
        for label, sparsity, group in _groups(found, appendix)
        if not only or group[list(only)].notna().any(axis=None)
    ]
    return markdown(["SAE", "k or coefficient", "seeds", *columns.values()], rows) if rows else ""


def results_table(found: Findings) -> str:
    table = _table(found, RESULTS, only=["kl"])
    return table and (
        "## Error and loss recovered\n\nMean ± half of the 95 % interval over seeds (t distribution). MSE: Eq. A.1, "
        "the mean square of an entry of x - x̂ in the model's units; NormMSE: ‖x - x̂‖² / ‖x‖² per token. KL and ΔCE in "
        "nats per token. Loss recovered: Eq. A.2. Silent here: share of the latents that fired on none of these "
        f"held-out tokens.\n\n{table}"
    )


def flops_table(found: Findings) -> str:
    about, rows = found.about, []
    if not about:
        return ""
    reference = None
    for label, kind in found.kinds.items():
        runs = found.runs[(found.runs["method"] == label) & found.runs["l0"].notna()]
        k = max(found.settings["k"]) if runs.empty else float(runs["l0"].max())
        one = flops(kind, about["d_model"], about["d_sae"], k)
        reference = reference or one
        width = about["d_sae"] // kind.share
        rows.append(
            [escaped(label), str(kind.experts or "–"), str(kind.active or "–"), f"{width:,}",
             f"{round(width * kind.computed):,}", f"{one.encoder:,}", f"{one.router:,}", f"{one.decoder:,}",
             f"{one.total / reference.total:.2f}", f"{one.dense_total / reference.dense_total:.2f}"]
        )  # fmt: skip
    return (
        "## FLOPs\n\nPer token and forward, at the largest L0 that was measured (the largest k before). Matched is "
        "what is computed of encoder and decoder; the router comes on top. Feature scaling changes the weights once a "
        "batch and is not counted. Against TopK: with a decoder that multiplies the active latents alone, and, as the "
        "paper counts, with one that multiplies all computed ones.\n\n"
        + markdown(
            ["SAE", "N", "e", "width", "computed", "encoder", "router", "decoder, sparse",
             "against TopK", "dense decoder"],
            rows,
        )
    )  # fmt: skip


def redundancy_table(found: Findings) -> str:
    table = _table(found, REDUNDANCY, only=["redundancy"])
    return table and (
        "## Redundancy and specialisation\n\nNear copies: share of the latents whose best cosine to another exceeds "
        "0.9. Within experts and between: mean best cosine of a latent with the others of its expert, and with one "
        "other expert; near copies likewise. Similarity: share of its active latents that a token shares with another "
        "(Eq. A.3). Area under the CDF of the experts' use, over the share of the experts: 0.5 if all are used alike, "
        "near 1 for a single one; entropy relative to that of all alike. Latents that hardly trained stay near their "
        "random start, which has no near copies: in a short run low redundancy is not all specialisation. Verbs: "
        "lower-case tokens in -ed and irregular past forms, told by their text.\n\n" + table
    )


def omega_table(found: Findings) -> str:
    some = found.runs[found.runs["scaling"].isin(["mean", "identity", "learned"])]
    if not some["omega"].notna().any():
        return ""
    return (
        "## ω and balance\n\nω at the end, over the experts of an SAE; shares and p of the last logged batch of "
        "training. Adam moves a parameter by about the learning rate in a step: ω, which starts at 0, could get to "
        f"about ±{reach(found.settings):.3f} here. In a short run it says where ω goes, not where it ends (the paper "
        "trains 100,000 steps).\n\n" + _table(found, OMEGA, only=["omega", "share_max"])
    )


def reach(settings: Mapping[str, Any]) -> float:
    """The sum of the learning rates over the run: 5 % warm-up, 75 % constant, 20 % decay."""
    steps = settings["tokens"] // settings["batch_size"]
    return float(settings["lr"] * steps * (0.05 / 2 + 0.75 + 0.2 / 2))


def appendix_table(found: Findings) -> str:
    rows = _table(
        found, {**RESULTS, "redundancy": "near copies", "omega": "mean ω"}, appendix=True, only=["kl"]
    )
    if not rows:
        return ""
    e = number(float(found.settings["appendix_e"]))
    return (
        f"## Appendix C: other low-pass parts, and the authors' weights (e = {e})\n\nTo be compared with \"Scale, e = "
        f"{e}\" above at the same k and seeds. Renormalized weights: the published code's second softmax over the "
        f"selected probabilities, in place of Eq. 2.4.\n\n{rows}"
    )  # fmt: skip
