"""``routesae-lens train``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routesae_lens.cli.shared import DATA, MODEL, RUN, SAE, Counted, one_line_errors, says_how_to_go_on

if TYPE_CHECKING:
    from routesae_lens.training.presets import Preset


def train(
    output: Annotated[Path, typer.Option(help="Folder for the SAE, its log and its checkpoints.")],
    dataset: Annotated[
        str,
        typer.Option(
            help='A .parquet, .jsonl, .json or .txt file, a folder, a hub name (text or token ids), or "demo".',
            rich_help_panel=DATA,
        ),
    ] = "demo",
    model: Annotated[
        str,
        typer.Option(
            help='Hugging Face name, local folder, TransformerLens name (backend hooked), or "demo".',
            rich_help_panel=MODEL,
        ),
    ] = "demo",
    backend: Annotated[
        str, typer.Option(help="huggingface, bridge or hooked.", rich_help_panel=MODEL)
    ] = "huggingface",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model's weights.", rich_help_panel=MODEL)] = "float32",
    attn_implementation: Annotated[
        str | None,
        typer.Option(
            help="Attention kernel of backend huggingface: sdpa, eager, ...; transformers chooses by default.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    autocast_lm: Annotated[
        bool, typer.Option(help="Run the model in bfloat16 where that is safe.", rich_help_panel=MODEL)
    ] = False,
    architecture: Annotated[
        str,
        typer.Option(
            help="route_topk, route_batchtopk, route_matryoshka_batchtopk, route_jumprelu, route_gated, "
            "route_standard, crosscoder_topk, crosscoder_batchtopk or crosscoder_standard.",
            rich_help_panel=SAE,
        ),
    ] = "route_topk",
    layers: Annotated[
        str | None,
        typer.Option(
            help='Routed blocks: "6:21" (both included) or "6,7,9:11"; 1/4 to 3/4 of depth by default.',
            rich_help_panel=SAE,
        ),
    ] = None,
    site: Annotated[
        str, typer.Option(help="Which activation of a block is read.", rich_help_panel=SAE)
    ] = "hook_resid_post",
    d_sae: Annotated[
        int | None, typer.Option(help="Number of latents; 8 x d_model by default.", rich_help_panel=SAE)
    ] = None,
    k: Annotated[
        int, typer.Option(help="Latents per token, for architectures that have k.", rich_help_panel=SAE)
    ] = 32,
    routing: Annotated[
        str,
        typer.Option(
            help="hard, soft, random, fixed or straight_through; ours: distilled, top2, oracle, every.",
            rich_help_panel=SAE,
        ),
    ] = "hard",
    fixed_layer: Annotated[
        int | None, typer.Option(help="The block of routing fixed.", rich_help_panel=SAE)
    ] = None,
    aggregator: Annotated[
        str, typer.Option(help="Router input: sum, mean or attention.", rich_help_panel=SAE)
    ] = "sum",
    loss: Annotated[str, typer.Option(help="normalized_mse or mse.", rich_help_panel=SAE)] = "normalized_mse",
    sae_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other field of the SAE's config, for instance relu=false or l1_coefficient=5. Repeatable.",
            metavar="NAME=VALUE",
            rich_help_panel=SAE,
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Start from the weights of this trained SAE (folder).", rich_help_panel=SAE),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split of a hub dataset or saved DatasetDict.", rich_help_panel=DATA)
    ] = "train",
    text_column: Annotated[
        str | None,
        typer.Option(help="Column with the text; text or problem by default.", rich_help_panel=DATA),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Training tokens, rounded down to whole batches.", rich_help_panel=DATA)
    ] = 1_000_000,
    context_size: Annotated[int, typer.Option(help="Tokens per sequence.", rich_help_panel=DATA)] = 512,
    batch_size: Annotated[int, typer.Option(help="Tokens per training step.", rich_help_panel=DATA)] = 4096,
    lm_batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences per forward of the model; one batch by default.", rich_help_panel=DATA),
    ] = None,
    buffer_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens shuffled together; four training batches by default.", rich_help_panel=DATA
        ),
    ] = None,
    buffer_dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 stores activations in half the memory; as the model gives them by default.",
            rich_help_panel=DATA,
        ),
    ] = None,
    buffer_device: Annotated[
        str | None,
        typer.Option(
            help="Where the buffer is, for instance cpu beside an SAE on a GPU; with the SAE by default.",
            rich_help_panel=DATA,
        ),
    ] = None,
    prefetch: Annotated[
        int, typer.Option(help="Batches prepared ahead in a background thread.", rich_help_panel=DATA)
    ] = 0,
    exclude_special_tokens: Annotated[
        bool | None,
        typer.Option(help="Train on no special tokens; true by default.", rich_help_panel=DATA),
    ] = None,
    exclude_first_position: Annotated[
        bool | None,
        typer.Option(help="Train on no token at position 0; true by default.", rich_help_panel=DATA),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Recipe: paper (RouteSAE's) or llama_scope (K-annealing, initialisation, input scale, lr 8e-4 "
            "and its schedule; for TopK architectures). What is given explicitly wins.",
            rich_help_panel=RUN,
        ),
    ] = "paper",
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of Adam; the preset's (paper: 5e-4).", rich_help_panel=RUN),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="paper (5 % warm-up, 75 % constant, 20 % decay), llama_scope or constant; the preset's.",
            rich_help_panel=RUN,
        ),
    ] = None,
    unit_norm_every: Annotated[
        int | None,
        typer.Option(
            help="Set decoder norms to 1 every so many steps (the authors: 10); 0: never, as by default.",
            rich_help_panel=RUN,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of weights, shuffling and random routes.", rich_help_panel=RUN)
    ] = 0,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint in the output folder.", rich_help_panel=RUN)
    ] = False,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints; a tenth of the run by default, 0: only when interrupted.",
            rich_help_panel=RUN,
        ),
    ] = None,
    save_buffer: Annotated[
        bool | None,
        typer.Option(
            help="Whether checkpoints hold the activation buffer; by default where it is under 2 GB.",
            rich_help_panel=RUN,
        ),
    ] = None,
    log_every: Annotated[
        int | None,
        typer.Option(help="Steps between lines of log.jsonl; 200 lines by default.", rich_help_panel=RUN),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option(
            help="Text to evaluate on (like --dataset); by default the first documents of --dataset, held out.",
            rich_help_panel=RUN,
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations; a fifth of the run by default, 0: at the end alone.",
            rich_help_panel=RUN,
        ),
    ] = None,
    eval_sequences: Annotated[
        int,
        typer.Option(
            help="Sequences of context_size tokens per evaluation; 0: no evaluation.", rich_help_panel=RUN
        ),
    ] = 16,
    wandb_project: Annotated[
        str | None, typer.Option(help="Also log to this Weights & Biases project.", rich_help_panel=RUN)
    ] = None,
    wandb_entity: Annotated[
        str | None, typer.Option(help="Weights & Biases user or team.", rich_help_panel=RUN)
    ] = None,
    run_name: Annotated[
        str | None, typer.Option(help="Name of the run on Weights & Biases.", rich_help_panel=RUN)
    ] = None,
    check_memory: Annotated[
        bool, typer.Option(help="Refuse a run that will not fit into memory.", rich_help_panel=RUN)
    ] = True,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.", rich_help_panel=RUN)] = False,
) -> None:
    """Train a RouteSAE. Ctrl-C or SIGTERM leaves a checkpoint, from which --resume goes on."""
    options = _parse_options(sae_option or [])
    from routesae_lens.analysis.evaluate import SpliceEvaluator, held_out_tokens
    from routesae_lens.backends import backend_of
    from routesae_lens.hook_points import layer_hook_name, parse_layers
    from routesae_lens.models import load_model
    from routesae_lens.training.data import is_tokenized, load_text
    from routesae_lens.training.methods import TRIAL_D_MODEL, TRIAL_D_SAE
    from routesae_lens.training.preflight import check_numbers, check_output, fit_to_run
    from routesae_lens.training.presets import find_preset
    from routesae_lens.training.train import train as run

    with one_line_errors(debug):
        blocks = None if layers is None else parse_layers(layers)
        recipe = find_preset(preset)
        given = {
            **{"lr": lr, "schedule": schedule, "unit_norm_every": unit_norm_every},
            "exclude_special_tokens": exclude_special_tokens,
            "exclude_first_position": exclude_first_position,
        }
        settings = recipe.settings(**{name: value for name, value in given.items() if value is not None})
        options = {
            "site": site,
            "routing": routing,
            "route_seed": seed,
            "fixed_layer": fixed_layer,
            "aggregator": aggregator,
            "loss": loss,
        } | options
        check_output(output, [architecture], resume)
        text = load_text(dataset, split=split, text_column=text_column)
        held_out = text
        if eval_dataset is not None:
            held_out = load_text(eval_dataset, split=split, text_column=text_column)
            if is_tokenized(held_out):
                raise ValueError(f"--eval-dataset {eval_dataset} holds token ids; expected text")
        if resume and not output.exists():
            typer.echo(f"nothing to resume in {output}: starting from the beginning", err=True)
        # Once without the model, which may take long to load, for what can be wrong without it.
        trial = blocks or [fixed_layer or 0]
        early = _config(
            architecture,
            lambda cls, **given: cls(d_in=TRIAL_D_MODEL * len(trial), layers=trial, **given),
            d_sae or TRIAL_D_SAE,
            k,
            options,
            recipe,
        )
        sizes = (tokens, batch_size, context_size, buffer_tokens)
        check_numbers(*sizes, settings["lr"], settings["schedule"], None, buffer_dtype)
        fit_to_run({architecture: early}, tokens // batch_size, settings["unit_norm_every"])
        loaded = load_model(
            model, backend=backend, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
        config = _config(
            architecture,
            lambda cls, **given: cls.for_model(loaded, layers=blocks, **given),
            d_sae or 8 * backend_of(loaded).d_model,
            k,
            options,
            recipe,
        )
        evaluator = None
        if eval_sequences and not is_tokenized(held_out):
            for layer in config.layers:
                layer_hook_name(loaded, layer, site)  # raises where this backend could not splice
            documents = Counted(row.get("text") or row.get("problem") for row in held_out)
            sequences = held_out_tokens(
                loaded, documents, n_sequences=eval_sequences, context_size=context_size
            )
            if eval_dataset is None:
                text = text.skip(documents.count)
            evaluator = SpliceEvaluator(loaded, sequences)
        with says_how_to_go_on():
            result = run(
                loaded,
                config,
                text,
                output=output,
                training_tokens=tokens,
                context_size=context_size,
                batch_size=batch_size,
                lm_batch_size=lm_batch_size,
                buffer_tokens=buffer_tokens,
                buffer_dtype=buffer_dtype,
                buffer_device=buffer_device,
                autocast_lm=autocast_lm,
                check_memory=check_memory,
                **settings,
                seed=seed,
                evaluator=evaluator,
                eval_every=eval_every,
                log_every=log_every,
                checkpoint_every=checkpoint_every,
                save_buffer=save_buffer,
                resume=resume,
                init_from=init_from,
                prefetch=prefetch,
                wandb_project=wandb_project,
                wandb_entity=wandb_entity,
                run_name=run_name,
            )
    typer.echo(
        f"{result.paths[architecture]}: {result.steps} steps, {result.tokens} tokens; log: {result.log}"
    )


def _parse_options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--sae-option {pair!r}: expected NAME=VALUE")
        try:
            options[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            options[name] = value  # a plain word
    return options


def _config(
    architecture: str, build: Callable[..., Any], d_sae: int, k: int, options: dict[str, Any], preset: Preset
) -> Any:
    """The SAE's config; ``build(config class, **fields)`` supplies layers and d_in. ``options`` win over ``preset``."""
    from dataclasses import fields

    from routesae_lens.saes.architectures import ROUTE_ARCHITECTURES
    from routesae_lens.saes.crosscoder import CROSSCODER_ARCHITECTURES
    from routesae_lens.saes.experts import EXPERT_ARCHITECTURES

    experts = {"route_scale": EXPERT_ARCHITECTURES["route_scale"]}  # (the others read one layer)
    architectures = ROUTE_ARCHITECTURES | CROSSCODER_ARCHITECTURES | experts
    if architecture not in architectures:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(architectures)}")
    config = architectures[architecture]
    known = {field.name: field for field in fields(config)}
    for name in ("d_in", "d_sae", "layers"):
        del known[name]  # they have options of their own
    if "routing" not in known:
        router = {
            "routing": "hard",
            "fixed_layer": None,
            "aggregator": "sum",
            "route_seed": options.get("route_seed"),
        }
        if given := [name for name, default in router.items() if options.get(name) != default]:
            raise ValueError(
                f"{architecture} has no router: it takes no --{', --'.join(given).replace('_', '-')}"
            )
        options = {name: value for name, value in options.items() if name not in router}
    unknown = set(options) - known.keys()
    if unknown:
        raise ValueError(
            f"{architecture} takes no --sae-option {', '.join(sorted(unknown))}; it takes: {', '.join(sorted(known))}"
        )
    options = preset.fields_of(config, **options)
    if "k" in known:
        options = {"k": float(k) if known["k"].type in (float, "float") else k} | options
    if "matryoshka_widths" in known:
        options = {"matryoshka_widths": [d_sae // 8, d_sae // 4, d_sae // 2, d_sae]} | options
    return build(config, d_sae=d_sae, **options)
