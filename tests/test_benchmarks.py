"""The benchmarks in tiny: they run and write their table. How fast anything is, is not asked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = {
    "SAE step",
    "Step of a mixture of experts",
    "Memory of the SAE step",
    "Memory of the activation buffer",
    "Multi-layer hook point",
    "Backends",
    "Evaluation",
    "Feature collection",
    "Scaling",
}


def test_the_benchmarks_run_and_write_their_results(tmp_path: Path):
    # by hand what `make bench` does
    environment = {**os.environ, "BENCH_QUICK": "1", "BENCH_OUTPUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--benchmark-quiet", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "recipes/benchmarks"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    assert {row["group"] for row in rows} == GROUPS
    for row in rows:
        low, high = row["range"]
        assert 0 < low <= row["median"] <= high
        assert len(row["ratios"]) == row["rounds"]
    assert results["quick"] and not any("met" in row for row in rows)  # tiny sizes decide nothing
    assert os.uname().nodename not in json.dumps(results) and str(ROOT) not in json.dumps(results)
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    for group in GROUPS - {"Scaling"}:
        assert f"## {group}\n" in table
    assert all(row["name"] in table for row in rows)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
