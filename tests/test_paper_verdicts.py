"""From numbers to verdicts: the rules, the comparisons and the claims of the paper's evaluation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import paper_claims
import paper_findings
import paper_verdicts as verdicts


def runs(**values: list[list[float]]) -> pd.DataFrame:
    """``method=[[values of the seeds at k = 10], [at k = 20], ...]`` of a metric called "kl"."""
    rows = [
        {"method": method, "kind": "k", "sparsity": 10.0 * (i + 1), "l0": 10.0 * (i + 1), "seed": seed, "kl": value}
        for method, by_k in values.items()
        for i, seeds in enumerate(by_k)
        for seed, value in enumerate(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["method", "kind", "sparsity", "l0", "seed", "kl"])


def test_interval_is_students():
    mean, half = verdicts.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(verdicts.interval([1.0])[1])


TOPK = [[2.0, 2.1, 2.2], [1.0, 1.1, 1.2], [0.5, 0.6, 0.7]]
# paired: the seeds spread more than the difference, which is nearly the same in each
LOWER = [[v - 0.05 - 0.001 * i for i, v in enumerate(row)] for row in TOPK]
HIGHER = [[v + 0.05 + 0.001 * i for i, v in enumerate(row)] for row in TOPK]
SCATTERED = [[v + (-1) ** i * 0.3 for i, v in enumerate(row)] for row in TOPK]


@pytest.mark.parametrize(
    "route, expected",
    [
        (LOWER, verdicts.REPRODUCED),
        (HIGHER, verdicts.OPPOSITE),
        (SCATTERED, verdicts.NO_DIFFERENCE),
        ([LOWER[0], *SCATTERED[1:]], verdicts.NO_DIFFERENCE),
        ([*LOWER[:2], HIGHER[2]], verdicts.REPRODUCED),
        ([row[:1] for row in LOWER], verdicts.ONE_SEED),
        ([], verdicts.NOT_RUN),
    ],
)
def test_verdict_at_equal_k(route: list[list[float]], expected: str):
    comparison = verdicts.equal_k(runs(route=route, topk=TOPK), "route", "topk", "kl")
    assert verdicts.in_the_majority(comparison.differences, -1) == expected
    if route is LOWER:
        assert comparison.differences["k 20"] == pytest.approx([-0.05, -0.051, -0.052])
        assert comparison.measured == "RouteSAE 1.216, TopK, last block 1.267 (-4.0%)"
        assert "k 10: -0.0510 ± 0.0025 (n 3)" in paper_claims.spread(comparison.differences)


def test_only_seeds_and_sparsities_of_both_count():
    comparison = verdicts.equal_k(runs(route=[[1.0, 2.0], [3.0]], topk=[[0.5]]), "route", "topk", "kl")
    assert comparison.differences == {"k 10": [0.5]}
    missing = runs(route=[[1.0, math.nan]], topk=[[0.5, 0.5]])
    assert verdicts.equal_k(missing, "route", "topk", "kl").differences == {"k 10": [0.5]}


def test_coefficients_are_compared_at_equal_l0():
    table = runs(topk=[[4.0], [2.0]])  # at L0 10 and 20
    relu = [(0.1, 10 * math.sqrt(2), 7.0), (0.07, 20.3, 7.0), (0.05, 40.0, 7.0), (0.4, 5.0, 7.0)]
    table = pd.concat(
        [table, pd.DataFrame([("relu", "l1", c, l0, 0, kl) for c, l0, kl in relu], columns=table.columns)]
    )
    comparison = verdicts.equal_l0(table, "relu", "topk", "kl", factor=2.0)
    # half-way in ln L0: 3; a hair above the range: the value at its end; outside: none
    assert comparison.differences == {
        "l1 0.07": [pytest.approx(7 - 2 * 2)],
        "l1 0.1": [pytest.approx(7 - 2 * 3)],
    }
    assert comparison.measured.endswith("; 2 of 4 SAEs left out: L0 outside the other's range")
    far = table[(table["method"] == "topk") | table["l0"].isin([5.0, 40.0])]
    none = verdicts.equal_l0(far, "relu", "topk", "kl")
    assert none == ({}, "2 of 2 SAEs left out: L0 outside the other's range")


@pytest.mark.parametrize(
    "times, expected",
    [(2.5, verdicts.REPRODUCED), (1.5, verdicts.NOT_FAR), (0.8, verdicts.OPPOSITE)],
)
def test_far_is_twice(times: float, expected: str):
    far = next(claim for claim in paper_claims.PAPER if claim.text.startswith("Gated has a far higher KL"))
    gated = [[times * v + 0.01 * i for i, v in enumerate(row)] for row in TOPK]
    judged = paper_claims.judge(runs(gated=gated, topk=TOPK), [far])
    assert judged["verdict"].tolist() == [expected]


def test_slopes_are_over_ln_l0():
    table = runs(route=[[4.0, 5.0], [3.0, 4.0]], topk=[[4.0, 4.0], [2.0, 1.0]])
    comparison = verdicts.slopes(table, "topk", "route", "kl")
    assert comparison.differences["slope"] == pytest.approx([-1 / math.log(2), -2 / math.log(2)])
    assert verdicts.slopes(table, "topk", "random", "kl").differences == {"slope": []}


def test_other_rules():
    every, some, near = verdicts.in_every_seed, verdicts.at_some_sparsity, verdicts.nearly_equal
    assert every({"k 1": [0.1, 0.2], "k 2": [0.1, 0.1]}, 1) == verdicts.REPRODUCED
    assert every({"k 1": [0.1, 0.2], "k 2": [0.1, -0.1]}, 1) == verdicts.NO_DIFFERENCE
    assert every({"k 1": [-0.1, -0.2]}, 1) == verdicts.OPPOSITE
    assert every({"k 1": [0.1]}, 1) == some({"k 1": [0.1]}, 1) == near({"k 1": [0.1]}, 1) == verdicts.ONE_SEED
    assert some({"k 1": [1.0, 1.01], "k 2": [-1.0, -1.01]}, 1) == verdicts.REPRODUCED
    assert some({"k 1": [-1.0, -1.01], "k 2": [-1.0, -1.01]}, 1) == verdicts.OPPOSITE
    assert near({"k 1": [0.1, 0.101]}, 1) == verdicts.REPRODUCED
    assert near({"k 1": [0.5, 0.501]}, 1) == verdicts.OPPOSITE
    assert near({"k 1": [0.1, -0.1]}, 1) == "not reproduced: undecided"


def test_a_claim_that_is_not_run_names_the_parts():
    pairs = (("relu", "topk"), ("oracle", "distilled_mean"), ("distilled", "topk@best"))
    chosen = [
        c
        for c in paper_claims.PAPER + paper_claims.OURS
        if (c.methods, c.metric) in {(p, "kl") for p in pairs}
    ]
    judged = paper_claims.judge(runs(topk=TOPK, distilled=TOPK), chosen)
    assert set(judged["verdict"]) == {verdicts.NOT_RUN}
    assert judged["needs"].tolist() == ["baselines"] * 2 + ["layers", "core routers"]
    # KL is there but features are not: the part is not finished
    features = [c for c in paper_claims.PAPER if c.methods == ("random", "route") and c.metric == "features"]
    judged = paper_claims.judge(runs(random=TOPK, route=TOPK), features)
    assert len(judged) == 2 and judged["needs"].tolist() == ["core"] * 2
    # all of a method stopped: running it again gives nothing
    stopped = runs(relu=[[math.nan, math.nan]], topk=TOPK).assign(status="evaluated")
    stopped.loc[stopped["method"] == "relu", "status"] = ["diverged at step 3", "not finite"]
    judged = paper_claims.judge(stopped, chosen[:1])
    assert judged[["verdict", "needs"]].values.tolist() == [[verdicts.NO_NUMBERS, ""]]
    stopped.loc[stopped["status"] == "not finite", "status"] = "evaluation not finished"
    assert paper_claims.judge(stopped, chosen[:1])["needs"].tolist() == ["baselines"]


def test_u_shape():
    assert paper_findings.u_shape([4, 4, 1, 1, 1, 2, 2], "training") == pytest.approx(
        {"u_training": 3 - 1, "both_ends_training": 2 - 1}
    )
    one_end = paper_findings.u_shape([0.9, 0.05, 0.0], "inference")
    assert one_end["u_inference"] > 0 > one_end["both_ends_inference"]


def test_parameters_are_those_of_the_saes():
    from sae_lens.registry import get_sae_training_class

    from routesae_lens.training.methods import make_config

    counted = paper_claims.count_parameters(8, 40, 3)
    for method, name in (("route", "route"), ("topk", "topk"), ("crosscoder_topk", "crosscoder")):
        config = make_config(method, None, [1, 2, 3], 40, 4, 0)
        config.d_in = 8 * len(config.layers)
        sae = get_sae_training_class(config.architecture())[0](config)
        # (a RouteSAE over one layer has a router, too, that decides nothing)
        used = [tensor for key, tensor in sae.named_parameters() if (key, method) != ("W_router", "topk")]
        assert counted[name] == sum(map(torch.numel, used)), method


def of_blocks(**values: list[list[float]]) -> pd.DataFrame:
    """:func:`runs` with ``b7`` for ``topk@7``, and features that are 1,000 x KL."""
    table = runs(**values)
    table["method"] = table["method"].str.replace(r"^b(?=\d)", "topk@", regex=True)
    return table.assign(features=1000 * table["kl"])


def test_the_best_block_has_the_least_mean_kl():
    table = of_blocks(
        b6=[[1.0, 3.0], [1.0, 1.0]], b7=[[1.5, 1.6], [2.0, 2.0]], distilled=[[1.4, 1.49], [1.1, 1.12]]
    )
    best = verdicts.with_best_block(table)
    best = best[best["method"] == "topk@best"]
    # block 7 at k = 10 (block 6 is better in one seed, and worse on average), block 6 at k = 20
    assert best[["sparsity", "kl"]].values.tolist() == [[10, 1.5], [10, 1.6], [20, 1.0], [20, 1.0]]
    claims = [c for c in paper_claims.OURS if c.methods == ("distilled", "topk@best")]
    assert len(claims) == 2
    judged = paper_claims.judge(table, claims)
    assert judged["spread"].tolist()[0].startswith("k 10: -0.1050 ± 0.06")
    assert judged["verdict"].tolist() == [verdicts.NO_DIFFERENCE] * 2  # one sparsity each way
    # one seed of each block: numbers, but no verdict; without blocks: not run
    judged = paper_claims.judge(table[(table["seed"] == 0) | (table["method"] == "distilled")], claims)
    assert judged["verdict"].tolist() == [verdicts.ONE_SEED] * 2
    judged = paper_claims.judge(table[table["method"] == "distilled"], claims)
    assert judged["verdict"].tolist() == [verdicts.NOT_RUN] * 2


def test_weights_in_training_are_those_of_the_package(tmp_path: Path):
    import routesae_lens as rl

    log = tmp_path / "log.jsonl"
    lines = [
        {"step": i, "tokens": i} | {f"a/metrics/layer_{what}/{b}": i * b + (what == "share") for b in (3, 4)
                                    for what in ("weight", "share")}
        for i in (1, 2)
    ]  # fmt: skip
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tok')  # still being written
    found = paper_findings._training_weights(log)
    shares = rl.training_shares(log, "a")[[3, 4]].mean()
    assert found == {"a": {3: (4.5, shares[3]), 4: (6.0, shares[4])}} and shares[3] == 5.5
