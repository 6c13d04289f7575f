"""``routesae-lens``: the command line."""

from __future__ import annotations

import typer

from routesae_lens.cli.interpret_command import agreement, interpret
from routesae_lens.cli.meta_command import meta
from routesae_lens.cli.report_command import report
from routesae_lens.cli.steer_command import steer
from routesae_lens.cli.sweep_command import sweep
from routesae_lens.cli.train_command import train

app = typer.Typer(
    help="RouteSAE: train and measure multi-layer sparse autoencoders with SAELens and TransformerLens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(sweep)
app.command()(steer)
app.command()(meta)
app.command()(report)
app.command()(interpret)
app.command()(agreement)
