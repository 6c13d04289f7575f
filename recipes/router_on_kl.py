"""A router fitted to the downstream KL itself, as a contextual bandit through the splice.

    python recipes/router_on_kl.py --run runs/paper/core --method random --k 20

For trained SAEs of a sweep (best those with random layers, which have seen all of them): splice every token at
a random layer, note the KL at that token, and fit for each layer a ridge regression from the router's input
(the sum of the standardised layers, Eq. 5) to the KL. The router then picks the layer of least predicted KL: the
paper's linear router, trained on what it is judged by. Beside it: a random layer, the oracle of
least reconstruction error, and that oracle with each layer's error weighted by what an error there costs (mean
KL / mean error). All with the same SAE on the same held-out text; fitted on other text: documents of which any
passage is in the held-out text are left out, and where the length of the text is known it is read from its end
(in the study's order, so that what the SAEs were trained on comes last).

Written to ``<run>/router_on_kl/<member>.json``: a list, one entry for each set of settings. What is there already
is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
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
        ones = torch.ones(layer.shape, device=x.device)
        route = sae.read_layers(x, ones[..., None].expand(*layer.shape, x.shape[-2]), layer, ones)
        hooks = rl.splice_hooks(sae, model, route, batch.keep)
        kl = rl.kl_per_token(batch.logits.whole(), model.run_with_hooks(batch.tokens, fwd_hooks=hooks))
        if not kl[batch.keep].isfinite().all():
            raise ValueError(f"logits are not finite in the batch of sequence {batch.start}")
        rows = x[batch.keep]
        chosen = layer[batch.keep]
        read = rows[torch.arange(len(rows), device=rows.device), chosen]
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
        return torch.cat([z, torch.ones(*z.shape[:-1], 1, device=z.device)], dim=-1).double()

    rows = []
    for layer in range(n_layers):
        here = seen["layer"] == layer
        z, kl = features(seen["input"][here]), seen["kl"][here].double()
        rows.append(torch.linalg.solve(z.T @ z + ridge * torch.eye(z.shape[1]).to(z), z.T @ kl))
    weights = torch.stack(rows)
    return lambda x: (features(x.sum(-2)) @ weights.T).argmin(-1)


def study(
    sae: Any, model: Any, train: Tensor, test: Tensor, seed: int, ridge: float, batch_size: int
) -> dict[str, Any]:
    """KL on ``test`` under every rule."""
    n_layers, generator = len(sae.layers), torch.Generator().manual_seed(seed)

    def random(x: Tensor) -> Tensor:
        return torch.randint(n_layers, x.shape[:2], generator=generator).to(x.device)

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


WINDOW = 32
"""Tokens that two texts must have in common, one after the other, to count as the same passage."""


def unseen(texts: Iterable[str], tokenizer: Any, held_out: Tensor) -> Iterator[str]:
    """Those of ``texts`` that share no passage with the sequences ``held_out``.

    Texts shorter than a passage are left out: nothing could be told of them.
    """
    size = min(WINDOW, held_out.shape[1] - 1)
    known = {tuple(row[i : i + size]) for row in held_out.tolist() for i in range(len(row) - size + 1)}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
        if windows and known.isdisjoint(windows):
            yield text


def fitting_text(dataset: str, skip_documents: int) -> Iterator[str]:
    """Documents in the order of the study (``shuffle(seed=0)``), from the end where it is known."""
    text = rl.load_text(dataset).shuffle(seed=0)
    rows = (text[i] for i in range(len(text) - 1, -1, -1)) if hasattr(text, "__len__") else iter(text)
    for row in islice(rows, skip_documents, None):
        if not isinstance(row.get("text"), str):
            raise typer.BadParameter(f"{dataset} has no column 'text'")
        yield row["text"]


def kept(path: Path, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """All that a file holds, and what of it was measured with these settings."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return records, next((one for one in records if one["settings"] == settings), None)


def _sha256(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().long().numpy().tobytes()).hexdigest()


def main(
    run: Annotated[Path, typer.Option(help="Folder of a part of reproduce_paper.py, or of a sweep.")],
    dataset: Annotated[str, typer.Option(help="Text to fit on.")] = "demo",
    method: Annotated[str, typer.Option(help="Whose SAEs.")] = "random",
    k: int = 20,
    model: Annotated[str, typer.Option(help='"demo" or a Hugging Face model.')] = "demo",
    test_tokens: Annotated[int, typer.Option(help="Of the study's held-out text.")] = 4_000,
    fit_tokens: int = 20_000,
    skip_documents: Annotated[
        int, typer.Option(help="Documents to pass over; of a stream, those trained on.")
    ] = 0,
    ridge: float = 1_000.0,
    batch_size: int = 4,
    output: Annotated[Path | None, typer.Option(help="Folder; by default router_on_kl in the run's.")] = None,
) -> None:
    """Fit a linear router to the KL and compare it with random layers and oracles, for every seed."""
    held_out = run.parent / "held_out.safetensors"
    if not (run / "sweep.json").exists() or not held_out.exists():
        raise typer.BadParameter(
            f"expected {run / 'sweep.json'} and {held_out}, as reproduce_paper.py writes them"
        )
    if wrong := [
        f"--{name} must be {least} or more, got {value}"
        for name, value, least in (
            ("test-tokens", test_tokens, 1), ("fit-tokens", fit_tokens, 1), ("batch-size", batch_size, 1),
            ("skip-documents", skip_documents, 0),
        )
        if value < least
    ]:  # fmt: skip
        raise typer.BadParameter("; ".join(wrong))
    sweep = rl.SweepResult.read(run)
    chosen = [
        one
        for one in sweep.members
        if one.method == method and one.sparsity == k and one.name not in sweep.diverged
    ]
    if not chosen:
        raise typer.BadParameter(
            f"{run} has no {method} with k = {k}; it has: {[m.name for m in sweep.members]}"
        )
    if not sweep.trained:
        raise typer.BadParameter(f"the training in {run} is not finished")
    device = rl.default_device()
    lm = rl.load_model(model, device=device)
    every = load_file(held_out)["tokens"]
    length = every.shape[1]
    texts = unseen(fitting_text(dataset, skip_documents), lm.tokenizer, every)
    train = rl.held_out_tokens(lm, texts, n_sequences=-(-fit_tokens // (length - 1)), context_size=length)
    test = every[: -(-test_tokens // (length - 1))]
    settings = {
        "sweep": sweep.identity, "ridge": ridge, "batch_size": batch_size,
        "fitted_on": _sha256(train), "tested_on": _sha256(test),
    }  # fmt: skip
    folder = run / "router_on_kl" if output is None else output
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for member in tqdm(chosen, desc="SAEs"):
        path = folder / f"{member.name}.json"
        records, found = kept(path, settings)
        if found is None:
            sae = sweep.load(member.name, device)
            found = {"settings": settings} | study(sae, lm, train, test, member.seed, ridge, batch_size)
            partial = path.with_name(f".{path.name}")
            partial.write_text(json.dumps([*records, found], indent=1), encoding="utf-8")
            partial.replace(path)  # whole or not at all
        results.append(found)
    for name in results[0]["rules"]:
        values = [one["rules"][name]["kl"] for one in results]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        Console().print(f"{name:36s} KL {statistics.fmean(values):.3f}{spread} ({len(values)} seeds)")


if __name__ == "__main__":
    typer.run(main)
