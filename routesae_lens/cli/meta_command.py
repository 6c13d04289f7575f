"""``routesae-lens meta``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from routesae_lens.cli.shared import RUN, SAE, one_line_errors, says_how_to_go_on

TRAINING = "The training"


def meta(
    run: Annotated[Path, typer.Argument(help="Output folder of `train` or `sweep`.")],
    sae: Annotated[
        str | None, typer.Option(help="Which SAE of the run; by default as `report` chooses it.")
    ] = None,
    d_meta: Annotated[
        int | None,
        typer.Option(help="Meta-latents; by default 3/64 of the latents that fired.", rich_help_panel=SAE),
    ] = None,
    k: Annotated[
        float, typer.Option(help="Meta-latents of a latent, on average.", rich_help_panel=SAE)
    ] = 4.0,
    steps: Annotated[int, typer.Option(help="Training steps.", rich_help_panel=TRAINING)] = 2000,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Decoder rows per step; by default 1024, or all.", rich_help_panel=TRAINING),
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.", rich_help_panel=TRAINING)] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of weights and shuffling.", rich_help_panel=TRAINING)] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, ...; a GPU where there is one.", rich_help_panel=TRAINING),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on with a run that was stopped; of a finished one, write the record anew.",
            rich_help_panel=RUN,
        ),
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.", rich_help_panel=RUN)] = False,
) -> None:
    """Train a meta-SAE on the decoder rows of a run's SAE, and keep what it finds for `report`.

    Writes RUN/meta/<sae>/ (the meta-SAE) and RUN/meta/<sae>.json (its record). Latents that never fired are left out
    where the run holds features of the SAE.
    """
    with one_line_errors(debug):
        from sae_lens import SAE as AnySAE

        from routesae_lens.analysis.meta_latents import meta_latents
        from routesae_lens.models import default_device, known_device
        from routesae_lens.report.contents import gather
        from routesae_lens.report.meta_record import META_RECORDS, MetaRecord
        from routesae_lens.training.meta_sae import train_meta_sae
        from routesae_lens.training.record import RUN_FILE, read_record
        from routesae_lens.training.sweep import TRAINING as TRAINED

        device = known_device(device or default_device())
        contents = gather(run, sae=sae, neighbours=0)
        trained = run if (run / RUN_FILE).exists() else run / TRAINED
        if not (trained / contents.sae).is_dir():
            raise ValueError(f"there is no SAE in {trained / contents.sae}: its training is not finished")
        subject = AnySAE.load_from_disk(trained / contents.sae, device=device)
        fired = None if contents.features is None else contents.features.firing_frequency > 0
        output = run / META_RECORDS / contents.sae
        if resume and read_record(output).get("status") == "finished":
            typer.echo(f"{output} is finished: it is read as it is, other options play no part", err=True)
            meta_sae = AnySAE.load_from_disk(output, device=device)
        else:
            with says_how_to_go_on():
                meta_sae = train_meta_sae(
                    subject,
                    d_sae=d_meta,
                    k=k,
                    latents=fired,
                    steps=steps,
                    batch_size=batch_size,
                    lr=lr,
                    seed=seed,
                    output=output,
                    resume=resume,
                )
        found = meta_latents(subject, meta_sae, latents=fired)
        path = MetaRecord(found).save(run, contents.sae)
        silent = "" if fired is None else f" ({int((~fired).sum())} that never fired left out)"
        typer.echo(
            f"{path}: {len(found.latents)} latents of {contents.sae}{silent}, {found.d_meta} meta-latents "
            f"({len(found.dead)} dead), explained variance {found.explained_variance:.3f}, L0 {found.l0:.2f}"
        )
