"""A router fitted to the downstream KL itself, as a contextual bandit through the splice.

    python recipes/router_on_kl.py --run runs/paper/core --method random --k 20

For trained SAEs of a sweep (best those with random layers, which have seen all of them): splice every token at
a random layer, note the KL at that token, and fit for each layer a ridge regression from the router's input
(the sum of the standardised layers, Eq. 5) to the KL. The router then picks the layer of least predicted KL: the
paper's linear router, trained on what it is judged by. Beside it: a random layer, the oracle of
least reconstruction error, and that oracle with each layer's error weighted by what an error there costs (mean
KL / mean error). All with the same SAE on the same held-out text; fitted on other text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

import routesae_lens as rl

Rule = Callable[[Tensor], Tensor]
"""From standardised layers (batch pos layer d_model) to layer indices (batch pos)."""


@torch.no_grad()
def spliced(
    sae: Any, model: Any, tokens: Tensor, rule: Rule, batch_size: int, label: str
) -> dict[str, Tensor]:
    """Splice each kept token at the layer that ``rule`` picks: KL, layer, router input and error of each."""
    subjects = rl.subjects_of({"sae": sae}, model)
    found: dict[str, list[Tensor]] = {"kl": [], "layer": [], "input": [], "error": []}
    for batch in rl.read_batches(subjects, model, tokens, batch_size=batch_size, logits=True, progress=label):
        assert batch.logits is not None
        x = sae.split(batch.activations[subjects["sae"].point])
        layer = rule(x)
        ones = torch.ones(layer.shape)
        route = sae.read_layers(x, ones[..., None].expand(*layer.shape, x.shape[-2]), layer, ones)
        hooks = rl.splice_hooks(sae, model, route, batch.keep)
        kl = rl.kl_per_token(batch.logits, model.run_with_hooks(batch.tokens, fwd_hooks=hooks))
        rows = x[batch.keep]
        chosen = layer[batch.keep]
        read = rows[torch.arange(len(rows)), chosen]
        error = (read - sae.autoencode_routed(read)).pow(2).sum(-1) / read.pow(2).sum(-1)
        for name, value in (
            ("kl", kl[batch.keep]),
            ("layer", chosen),
            ("input", rows.sum(-2)),
            ("error", error),
        ):
            found[name].append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def fit(seen: dict[str, Tensor], n_layers: int, ridge: float) -> Rule:
    """The bandit router: one ridge regression per layer."""
    mean, scale = seen["input"].mean(0), seen["input"].std()

    def features(x: Tensor) -> Tensor:
        z = (x - mean) / scale
        return torch.cat([z, torch.ones(*z.shape[:-1], 1)], dim=-1).double()

    rows = []
    for layer in range(n_layers):
        here = seen["layer"] == layer
        z, kl = features(seen["input"][here]), seen["kl"][here].double()
        rows.append(torch.linalg.solve(z.T @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype), z.T @ kl))
    weights = torch.stack(rows)
    return lambda x: (features(x.sum(-2)) @ weights.T).argmin(-1)


def study(
    sae: Any, model: Any, train: Tensor, test: Tensor, seed: int, ridge: float, batch_size: int
) -> dict[str, Any]:
    """KL on ``test`` under every rule."""
    n_layers, generator = len(sae.layers), torch.Generator().manual_seed(seed)

    def random(x: Tensor) -> Tensor:
        return torch.randint(n_layers, x.shape[:2], generator=generator)

    seen = spliced(sae, model, train, random, batch_size, "random layers, to fit")
    layers = range(n_layers)
    kl = torch.stack([seen["kl"][seen["layer"] == layer].mean() for layer in layers])
    error = torch.stack([seen["error"][seen["layer"] == layer].mean() for layer in layers])
    rules: dict[str, Rule] = {
        "random layer": random,
        "linear router fitted to KL": fit(seen, n_layers, ridge),
        "oracle: least error": lambda x: sae.layer_errors(x).argmin(-1),
        "oracle: least error x its price": lambda x: (sae.layer_errors(x) * kl / error).argmin(-1),
    }
    result: dict[str, Any] = {
        "fitted_on_tokens": len(seen["kl"]),
        "kl_by_layer": dict(zip(map(str, sae.layers), kl.tolist(), strict=True)),
        "error_by_layer": dict(zip(map(str, sae.layers), error.tolist(), strict=True)),
        "rules": {},
    }
    for name, rule in rules.items():
        out = spliced(sae, model, test, rule, batch_size, name)
        shares = torch.bincount(out["layer"], minlength=n_layers) / len(out["layer"])
        result["rules"][name] = {
            "kl": out["kl"].double().mean().item(),
            "norm_mse": out["error"].double().mean().item(),
            "tokens": len(out["kl"]),
            "layer_share": dict(zip(map(str, sae.layers), shares.tolist(), strict=True)),
        }
    return result


def main(
    run: Annotated[Path, typer.Option(help="Folder of a part of reproduce_paper.py, or of a sweep.")],
    dataset: Annotated[str, typer.Option(help="Text to fit on.")] = "demo",
    method: Annotated[str, typer.Option(help="Whose SAEs.")] = "random",
    k: int = 20,
    model: Annotated[str, typer.Option(help='"demo" or a Hugging Face model.')] = "demo",
    test_tokens: Annotated[int, typer.Option(help="Of the study's held-out text.")] = 4_000,
    fit_tokens: int = 20_000,
    skip_documents: Annotated[int, typer.Option(help="First documents that are not used.")] = 6_000,
    ridge: float = 1_000.0,
    batch_size: int = 4,
    output: Annotated[Path, typer.Option(help="JSON file; SAEs already in it are skipped.")] = Path(
        "router_on_kl.json"
    ),
) -> None:
    """Fit a linear router to the KL and compare it with random layers and oracles, for every seed."""
    sweep = rl.SweepResult.read(run)
    chosen = [one for one in sweep.members if one.method == method and one.sparsity == k]
    if not chosen:
        raise typer.BadParameter(
            f"{run} has no {method} with k = {k}; it has: {[m.name for m in sweep.members]}"
        )
    lm = rl.load_model(model)
    test = load_file(run.parent / "held_out.safetensors")["tokens"]
    length = test.shape[1]
    text = rl.load_text(dataset).skip(skip_documents)
    train = rl.held_out_tokens(
        lm, (row["text"] for row in text), n_sequences=-(-fit_tokens // (length - 1)), context_size=length
    )
    results = json.loads(output.read_text()) if output.exists() else {}
    for member in tqdm(chosen, desc="SAEs"):
        if member.name not in results:
            sae = sweep.load(member.name)
            test_part = test[: -(-test_tokens // (length - 1))]
            results[member.name] = study(sae, lm, train, test_part, member.seed, ridge, batch_size)
            output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    for name in next(iter(results.values()))["rules"]:
        values = torch.tensor([one["rules"][name]["kl"] for one in results.values()])
        Console().print(f"{name:36s} KL {values.mean():.3f} ± {values.std():.3f} ({len(values)} seeds)")


if __name__ == "__main__":
    typer.run(main)
