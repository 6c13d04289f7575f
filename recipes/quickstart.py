"""Train a RouteSAE and two baselines on a real language model in one pass, splice them in, compare.

    python recipes/quickstart.py                                     # what `make quickstart` runs
    python recipes/quickstart.py --dataset my_text.jsonl --tokens 2000000 --seeds 3
    python recipes/quickstart.py --model meta-llama/Llama-3.2-1B --dataset Skylion007/openwebtext

The three SAEs differ only in the layer they read: RouteSAE routes each token among the middle layers,
TopK reads one layer at 3/4 of the depth (the last of the routed ones), Random draws a layer per token.
They share standardisation, loss, width, k, tokens and one language-model forward per batch.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import typer
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table
from sae_lens import SAE

import routesae_lens as rl

METHODS = ("RouteSAE", "TopK", "Random")
COLUMNS = {
    "l0": "L0",
    "norm_mse": "NormMSE",
    "explained_variance": "explained variance",
    "kl": "KL (nats/token)",
    "kl_unscaled": "KL, unscaled splice",
    "kl_authors": "KL, authors' sum",
    "delta_ce": "ΔCE",
    "ce_zero": "CE zero-ablated",
    "loss_recovered": "loss recovered",
    "dead_latents": "never fired",
    "mean_p": "mean p",
    "entropy": "entropy",
}


def configs(model: Any, layers: list[int], d_sae: int, k: int, seeds: int) -> dict[str, Any]:
    """One config per method and seed; names such as ``RouteSAE-seed0``."""
    make = rl.RouteTopKTrainingSAEConfig.for_model
    result = {}
    for seed in range(seeds):
        # (the paper trains without an auxiliary loss, and so do these few tokens)
        common = {"d_sae": d_sae, "k": k, "route_seed": seed, "aux_loss_coefficient": 0.0}
        result[f"RouteSAE-seed{seed}"] = make(model, layers=layers, **common)
        result[f"TopK-seed{seed}"] = make(model, layers=layers[-1:], **common)
        result[f"Random-seed{seed}"] = make(model, layers=layers, routing="random", **common)
    return result


def plot_curves(log: pd.DataFrame, names: list[str], path: Path) -> None:
    """Loss and explained variance of every SAE against training tokens."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, metric, title in (
        (axes[0], "losses/mse_loss", "normalised reconstruction loss"),
        (axes[1], "metrics/explained_variance", "explained variance of the routed input"),
    ):
        for name in names:
            method, _, seed = name.partition("-seed")
            axis.plot(
                log["tokens"],
                log[f"{name}/{metric}"],
                color=f"C{METHODS.index(method)}",
                label=method if seed == "0" else None,
            )
        axis.set(title=title, xlabel="training tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_shares(log: pd.DataFrame, results: dict[str, rl.Evaluation], layers: list[int], path: Path) -> None:
    """Where RouteSAE's tokens go: through training, and on held-out text beside uniform."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    color = plt.cm.ScalarMappable(plt.Normalize(layers[0], max(layers[-1], layers[0] + 1)), "viridis")
    shares = log[[f"RouteSAE-seed0/metrics/layer_share/{layer}" for layer in layers]]
    axes[0].stackplot(log["tokens"], shares.to_numpy().T, colors=list(color.to_rgba(np.array(layers))))
    axes[0].set(title="layer shares in training (seed 0)", xlabel="training tokens", ylim=(0, 1))
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[0].margins(x=0)
    figure.colorbar(color, ax=axes[0], label="block")
    seeds = [r.layer_share for name, r in results.items() if name.startswith("RouteSAE")]
    width = 0.8 / len(seeds)
    for i, share in enumerate(seeds):
        x = [layer + (i - (len(seeds) - 1) / 2) * width for layer in layers]
        axes[1].bar(x, [share[layer] for layer in layers], width, label=f"seed {i}")
    axes[1].axhline(1 / len(layers), color="gray", linestyle="--", label="uniform")
    axes[1].set(title="layer shares on held-out text", xlabel="block", ylabel="share of tokens")
    axes[1].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def table(results: dict[str, rl.Evaluation], layers: list[int]) -> Table:
    """Mean over seeds, with the spread (standard deviation) where there are several."""
    out = Table(title="On held-out text")
    out.add_column("")
    for method in METHODS:
        out.add_column(method, justify="right")
    for field, label in COLUMNS.items():
        out.add_row(
            label, *(_cell([getattr(r, field) for r in _seeds(results, method)]) for method in METHODS)
        )
    for layer in layers:
        out.add_row(
            f"share of block {layer}",
            *(_cell([r.layer_share.get(layer, 0.0) for r in _seeds(results, method)]) for method in METHODS),
        )
    return out


def _seeds(results: dict[str, rl.Evaluation], method: str) -> list[rl.Evaluation]:
    return [result for name, result in results.items() if name.startswith(f"{method}-")]


def _cell(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    mean = statistics.fmean(numbers)
    return (f"{mean:.0f}" if all(isinstance(v, int) for v in numbers) else f"{mean:.3f}") + spread


def _finished(output: Path) -> bool:
    record = output / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] == "finished"


def _claim(output: Path, options: dict[str, Any]) -> None:
    """A folder belongs to one set of options; a run with others needs another one."""
    record = output / "quickstart.json"
    if record.exists() and (before := json.loads(record.read_text())) != options:
        different = [f"{name}={before.get(name)}" for name in options if before.get(name) != options[name]]
        raise typer.BadParameter(f"{output} holds a run with {', '.join(different)}; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(options, indent=1))


def main(
    model: Annotated[str, typer.Option(help="Hugging Face name, local folder, or 'demo'.")] = "demo",
    backend: Annotated[str, typer.Option(help="huggingface, bridge or hooked.")] = "huggingface",
    dataset: Annotated[
        str, typer.Option(help="Hub name, .parquet, .jsonl, .txt or folder; 'demo' is the text shipped here.")
    ] = "demo",
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = 200_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 6_400,
    context_size: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Tokens per training step.")] = 1024,
    layers: Annotated[str | None, typer.Option(help="Routed blocks, e.g. 6:21; default 1/4 to 3/4.")] = None,
    expansion: Annotated[int, typer.Option(help="SAE width as a multiple of d_model.")] = 4,
    k: Annotated[int, typer.Option(help="Latents per token.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the 5/75/20 schedule.")] = 1e-3,
    seeds: Annotated[int, typer.Option(help="SAEs per method, all on the same tokens.")] = 1,
    held_out_documents: Annotated[int, typer.Option(help="Documents kept for the evaluation.")] = 100,
    output: Annotated[Path, typer.Option(help="Folder for SAEs, log, results and plots.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Train RouteSAE, TopK at 3/4 depth and random routing together, then splice and compare them."""
    options = {name: value for name, value in locals().items() if name != "output"}
    console, started = Console(), time.perf_counter()
    _claim(output, options)
    lm = rl.load_model(model, backend)
    n_blocks, d_model = rl.backend_of(lm).n_layers, rl.backend_of(lm).d_model
    blocks = rl.parse_layers(layers) if layers else rl.default_layers(n_blocks)
    text = rl.load_text(dataset).shuffle(seed=0)
    if "text" not in next(iter(text)):
        raise typer.BadParameter(f"{dataset} has no column 'text'; token ids go into rl.train(...) directly")
    eval_ids = rl.held_out_tokens(
        lm,
        (row["text"] for row in text.take(held_out_documents)),
        n_sequences=-(-eval_tokens // (context_size - 1)),
        context_size=context_size,
    )
    saes = configs(lm, blocks, expansion * d_model, k, seeds)
    console.print(
        f"{len(saes)} SAEs, blocks {blocks}, width {expansion * d_model}, k {k}, {tokens:,} training tokens"
    )

    if finished := _finished(output):
        console.print(
            f"[yellow]{output} holds a finished run with these options: it is evaluated, not trained again"
        )
        trained = {name: SAE.load_from_disk(output / name, device=rl.default_device()) for name in saes}
    else:
        run = rl.train(
            lm,
            saes,
            text.skip(held_out_documents),
            output=output,
            training_tokens=tokens,
            context_size=context_size,
            batch_size=batch_size,
            lr=lr,
            schedule="paper",
            unit_norm_every=10,
            seed={name: int(name.rpartition("seed")[2]) for name in saes},
            resume=True,  # where an earlier run in this folder was stopped
        )
        trained = run.saes
    seconds = time.perf_counter() - started
    results = rl.evaluate_all(trained, lm, eval_ids, unscaled=True)
    log = pd.read_json(output / "log.jsonl", lines=True)
    log = log.dropna(subset=[f"{name}/losses/mse_loss" for name in saes])
    plot_curves(log, list(saes), output / "training_curves.png")
    plot_shares(log, results, blocks, output / "layer_shares.png")
    summary = {
        "results": {name: result.to_dict() for name, result in results.items()},
        "seconds": {"training": None if finished else seconds, "all": time.perf_counter() - started},
        "training_tokens": int(log["tokens"].iloc[-1]),
        "held_out_documents": held_out_documents,
        "dataset": dataset,
        "run": json.loads((output / "run.json").read_text()),
    }
    (output / "results.json").write_text(json.dumps(summary, indent=1))
    console.print(table(results, blocks))
    first = next(iter(results.values()))
    console.print(
        f"{first.tokens:,} held-out tokens in {first.sequences} sequences; CE of the model as it is "
        f"{first.ce_clean:.3f} nats. Written to {output}/: results.json, training_curves.png, layer_shares.png"
    )


if __name__ == "__main__":
    typer.run(main)
