"""``routesae-lens``: the command line."""

from __future__ import annotations

import typer

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
