"""``routesae-lens report``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from routesae_lens.cli.shared import RUN, one_line_errors

PAGE = "The page"


def report(
    run: Annotated[Path, typer.Argument(help="Output folder of `train` or `sweep`.")],
    sae: Annotated[
        str | None,
        typer.Option(
            help="Which SAE of the run; by default the only one, or of those with features the one with the lowest "
            "KL.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="File of its features (FeatureSet.save); by default RUN/feature_sets/<sae>.json.gz.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; by default RUN/report.html, or report-<sae>.html of several.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    contexts: Annotated[
        int, typer.Option(help="Contexts shown of each feature; most of the file.", rich_help_panel=PAGE)
    ] = 10,
    neighbours: Annotated[
        int,
        typer.Option(help="Nearest features shown of each, by decoder cosine.", rich_help_panel=PAGE),
    ] = 8,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.", rich_help_panel=RUN)] = False,
) -> None:
    """Write a run's report: one HTML file with metrics, curves and a browser of features."""
    with one_line_errors(debug):
        try:
            from routesae_lens.report.page import write_report
        except ModuleNotFoundError as error:
            raise ValueError(
                f"a report needs {error.name}, which is not installed: pip install 'routesae-lens[report]'"
            ) from error
        begun = time.perf_counter()
        written = write_report(
            run, sae=sae, features=features, output=output, contexts=contexts, neighbours=neighbours
        )
        seconds = time.perf_counter() - begun
        typer.echo(
            f"{written.path}: {written.sae}, {written.features} features, {written.size / 1e6:.1f} MB, "
            f"{seconds:.1f} s"
        )
        if not written.features:
            typer.echo(
                f"no features; they are looked for in {run / 'feature_sets' / written.sae}.json.gz (FeatureSet.save)",
                err=True,
            )
