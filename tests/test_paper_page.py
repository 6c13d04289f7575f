"""The page that the paper's report is: any text from data, and nothing to report yet."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))  # a recipe finds its own modules beside it

import paper_plots
import paper_report
import paper_tables


def test_text_from_data_cannot_break_the_page():
    assert paper_tables.escaped("a|b\n<script>*x*</script>[l](u)`c` $x$") == (
        r"a\|b &lt;script&gt;\*x\*&lt;/script&gt;\[l\](u)\`c\` \$x\$"
    )
    assert "\u202e" not in paper_tables.escaped("\u202eabc")


def test_figure_1_shows_any_token():
    record = {
        "method": "topk", "layers": [1, 2, 3],
        "features": [
            {"id": 7, "profile": [1.0, 0.5, 0.1], "end": "early", "top": ["$5 and $6", "\u4e2d", "<b>"]},
            {"id": 8, "profile": [0.1, 0.5, 1.0], "end": "late", "top": ["a" * 99]},
        ],
    }  # fmt: skip
    figure = paper_plots.profiles([record])
    assert figure is not None
    figure.canvas.draw()
    assert paper_plots.profiles([{"features": []}]) is None


def test_a_report_of_nothing_yet(tmp_path: Path):
    (tmp_path / "settings.json").write_text(json.dumps({"preset": "smoke", "dataset": "text.jsonl"}))
    report = paper_report.write_report(tmp_path)
    text = (report.folder / "report.md").read_text()
    assert "| parts in this report | none |" in text and "--part core\n" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## What was run", "## In short", "## Every claim", "## The distilled router",
    ]  # fmt: skip
    assert "None" not in text and "nan" not in text
    assert "| **not run**: `--part core` and `--part baselines` |" in text
