"""Why does the paper's router learn so little? The gradient it gets, measured on one batch of a real model.

    python recipes/router_gradients.py                  # routers at their start
    python recipes/router_gradients.py --run runs/paper/core   # and those of RouteSAE in a finished sweep

For every way of training a router: the gradient of the loss to the router's weights beside that to the
encoder's, and the mean derivative of a token's loss with respect to log p of its chosen layer (negative: the
loss falls when the router is surer). Means over seeds, with the spread.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from sae_lens.saes.sae import TrainStepInput

import routesae_lens as rl

WAYS: dict[str, dict[str, Any]] = {
    "hard, normalised MSE (the authors' code)": {},
    "hard, plain MSE (Eq. 12)": {"loss": "mse"},
    "soft, normalised MSE": {"routing": "soft"},
    "straight-through, normalised MSE": {"routing": "straight_through"},
    "hard, normalised MSE, load balancing 0.1": {"balance_coefficient": 0.1},
    "distilled from the oracle": {"routing": "distilled", "explore": 0.0, "oracle_fraction": 1.0},
}


def activations(model: Any, layers: list[int], dataset: str, tokens: int) -> torch.Tensor:
    """Stacked activations of ``tokens`` kept tokens."""
    text = rl.load_text(dataset)
    column = "text" if "text" in (text.column_names or []) else "problem"
    ids = rl.held_out_tokens(model, (row[column] for row in text), n_sequences=tokens // 127 + 2)
    point = rl.mount_layers(model, layers)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=[point])
    return cache[point][:, 1:].flatten(0, 1)[:tokens]


def measure(sae: Any, stack: torch.Tensor) -> dict[str, float]:
    """Gradients of one training step of ``sae``, which is left without them."""
    coefficients = {name: given.value for name, given in sae.get_coefficients().items()}
    output = sae.training_forward_pass(TrainStepInput(stack, coefficients, None, 10**9, False))
    output.loss.backward()
    log_p = torch.zeros(len(stack), requires_grad=True)
    layers = sae.split(stack)
    with torch.no_grad():
        probs = sae._probs(layers)
    p, layer = probs.max(-1)
    result = {
        "router": sae.W_router.grad.norm().item(),
        "encoder": sae.W_enc.grad.norm().item(),
        "mean_p": p.mean().item(),
        "largest_share": (torch.bincount(layer, minlength=probs.shape[-1]).max() / len(layer)).item(),
    }
    if sae.cfg.routing == "hard":
        x = layers[torch.arange(len(layer)), layer] * (p * log_p.exp())[:, None]
        sae.mse_loss_fn(sae.decode(sae.encode_routed(x)), x).sum(-1).mean().backward()
        assert log_p.grad is not None
        result["d_log_p"] = log_p.grad.sum().item()
    sae.zero_grad()
    return result


def trained_routes(run: Path) -> tuple[rl.SweepResult, dict[str, dict[str, Any]]]:
    """A finished sweep, and the training configs of its members of method ``route``.

    Raises:
        typer.BadParameter: no sweep, one that is not finished, or one without such a member.
    """
    try:
        found = rl.SweepResult.read(run)
    except FileNotFoundError as error:
        raise typer.BadParameter(f"{run} holds no sweep (no sweep.json)") from error
    if not found.trained:
        raise typer.BadParameter(f"the training in {run} is not finished")
    configs = json.loads((run / "sweep.json").read_text(encoding="utf-8"))["about"]["saes"]
    routes = [one.name for one in found.members if one.method == "route" and one.name not in found.diverged]
    if not routes:
        names = ", ".join(one.name for one in found.members)
        raise typer.BadParameter(f"{run} has no trained member of method route; it has: {names}")
    return found, {name: configs[name] for name in routes}


def in_training_form(trained: Any, config: dict[str, Any]) -> Any:
    """The training SAE that ``trained`` was saved from: its config, its weights, its router."""
    known = {one.name for one in fields(rl.RouteTopKTrainingSAEConfig)}
    cfg = rl.RouteTopKTrainingSAEConfig(
        **{name: value for name, value in config.items() if name in known and name != "metadata"}
    )
    sae = rl.RouteTopKTrainingSAE(cfg)
    sae.init_from(trained)
    router = {
        name: one
        for name, one in trained.state_dict().items()
        if name.lower().startswith(("w_router", "router_"))
    }
    sae.load_state_dict(router, strict=False)
    return sae


def main(
    run: Annotated[Path | None, typer.Option(help="folder of a finished sweep: its RouteSAEs too")] = None,
    model: Annotated[str, typer.Option(help="demo, or any Hugging Face model")] = "demo",
    dataset: Annotated[str, typer.Option(help="file, folder or hub name; demo: the text shipped")] = "demo",
    tokens: int = 2048,
    d_sae: int = 2304,
    k: int = 32,
    seeds: int = 3,
    output: Annotated[Path | None, typer.Option(help="write the numbers as JSON")] = None,
) -> None:
    """Print, for every way of training a router, the gradient that reaches it."""
    sweep, routes = (None, {}) if run is None else trained_routes(run)  # (before the model is loaded)
    lm = rl.load_model(rl.demo_model_path() if model == "demo" else model, device="cpu")
    layers = rl.default_layers(rl.backend_of(lm).n_layers)
    for name, config in routes.items():  # a sweep has one list of layers
        layers = config["layers"]
        if (
            config["d_in"] != len(layers) * rl.backend_of(lm).d_model
            or layers[-1] >= rl.backend_of(lm).n_layers
        ):
            raise typer.BadParameter(f"{name} was trained on another model than {model}")
    stack = activations(lm, layers, dataset, tokens)
    results: dict[str, list[dict[str, float]]] = {}
    for way, options in WAYS.items():
        cfg = rl.RouteTopKTrainingSAEConfig.for_model(
            lm, layers=layers, d_sae=d_sae, k=k, aux_loss_coefficient=0.0, **options
        )
        for seed in range(seeds):
            torch.manual_seed(seed)
            results.setdefault(f"{way}: start", []).append(measure(rl.RouteTopKTrainingSAE(cfg), stack))
    for name, config in routes.items():
        assert sweep is not None
        way = f"{name.rpartition('-seed')[0]} ({config['aggregator']}, {config['loss']}): after training"
        sae = in_training_form(sweep.load(name), config)
        results.setdefault(way, []).append(measure(sae, stack))
    show(results, tokens)
    if output is not None:
        output.write_text(json.dumps({"tokens": tokens, "results": results}, indent=1), encoding="utf-8")


def show(results: dict[str, list[dict[str, float]]], tokens: int) -> None:
    columns = {
        "router": "‖grad W_router‖",
        "encoder": "‖grad W_enc‖",
        "d_log_p": "d loss / d log p",
        "mean_p": "mean p",
        "largest_share": "largest layer share",
    }
    table = Table(title=f"One batch of {tokens} tokens", caption="mean ± standard deviation over seeds")
    table.add_column("router")
    for label in columns.values():
        table.add_column(label, justify="right")
    for way, measured in results.items():
        cells = []
        for name in columns:
            values = [one[name] for one in measured if name in one]
            spread = f" ± {statistics.stdev(values):.0e}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2g}{spread}" if values else "–")
        table.add_row(way, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
