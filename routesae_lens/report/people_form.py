"""A form that people fill in, in any spreadsheet: the same examples that the judge saw, without its answers."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from routesae_lens.analysis.feature_set import FeatureSet
from routesae_lens.report.answers import write_whole
from routesae_lens.report.interpret import sample_features
from routesae_lens.report.interpretations import Interpretations
from routesae_lens.report.prompt import CATEGORIES, PROMPT_SHA256, Interpretation, example_lines

COLUMNS = ("sae", "latent", "seed", "available", "examples", "category", "score", "explanation")
_FORMULA = re.compile(r"(^|[;,\t\n\r\"'|])([ ]*)([=+\-@＝＋－＠])")


def write_form(
    features: FeatureSet,
    path: str | Path,
    *,
    n: int | None = 100,
    seed: int = 0,
    max_contexts: int | None = None,
) -> Path:
    """Write a CSV file with the features that ``interpret`` asks about with the same arguments.

    People fill in ``category`` (low-level, high-level or undiscernible), ``score`` (1 to 5, the rubric of the
    prompt) and, if they like, ``explanation``. Text that a spreadsheet could take for a formula gets an
    apostrophe in front, also behind separators, for programs that split lines at other ones than commas.

    Raises:
        ValueError: as ``sample_features``; ``path`` exists (it may hold somebody's work).
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists and may be filled in already; give another name")
    drawn = sample_features(features, n, seed)
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(COLUMNS)
    for feature in drawn:
        examples = example_lines(feature.contexts[:max_contexts]).strip()
        start = [_cell(features.name), feature.id, seed, len(features.features), _cell(examples)]
        writer.writerow([*start, "", "", ""])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode("utf-8-sig"))  # the mark makes Excel read UTF-8
    return path


def _cell(text: str) -> str:
    return _FORMULA.sub(r"\1\2'\3", text)


def _plain(cell: str) -> str:
    return re.sub(_FORMULA.pattern.replace("([=", "'([="), r"\1\2\3", cell)


def read_form(path: str | Path, annotator: str) -> Interpretations:
    """What somebody filled in, as the interpretations of a judge of kind "people".

    Rows without category and score are left out. Columns may be separated by commas, semicolons or tabs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no form, or every row that is filled in wrongly, with its line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; save it as CSV UTF-8") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        return _read_rows(rows, path, annotator)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


def _read_rows(rows: csv.DictReader[str], path: str | Path, annotator: str) -> Interpretations:
    missing = set(COLUMNS) - set(rows.fieldnames or ())
    if missing:
        raise ValueError(f"{path} is no form: columns {', '.join(sorted(missing))} are missing")
    said: dict[int, Interpretation] = {}
    about: set[tuple[str, int, int]] = set()
    wrong: list[str] = []
    for row in rows:
        category, score = ((row[name] or "").strip() for name in ("category", "score"))
        if not category and not score:
            continue
        try:
            latent = int(row["latent"])
            if latent in said:
                raise ValueError(f"latent {latent} is there twice")
            about.add((_plain(row["sae"]), int(row["seed"]), int(row["available"])))
            name = category.lower().replace(" ", "-")
            name = next((one for one in CATEGORIES if name and one.startswith(name)), category)
            number = int(score) if score.isdecimal() else score
            said[latent] = Interpretation(name, number, (row["explanation"] or "").strip())  # type: ignore[arg-type]
        except (ValueError, TypeError) as error:
            wrong.append(f"line {rows.line_num}: {error}")
    if len(about) > 1:
        wrong.append(f"rows of several samples: {sorted(about)}")
    if not about and not wrong:
        wrong.append("no row is filled in")
    if wrong:
        raise ValueError(f"{path}: " + "; ".join(wrong))
    sae, seed, available = about.pop()
    judge: dict[str, Any] = {
        "kind": "people",
        "model": annotator,
        "base_url": None,
        "temperature": None,
        "parameters": {},
    }
    return Interpretations(sae, judge, PROMPT_SHA256, seed, None, available, said)
