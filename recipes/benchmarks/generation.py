"""How much do splicing and steering cost while generating? Tokens per second, in ratios to plain generation.

    python recipes/benchmarks/generation.py                       # both backends, a RouteSAE with new weights
    python recipes/benchmarks/generation.py --sae runs/route/final

Every way of generating is timed in every round, in one process, in an order that changes from round to
round; what counts is the ratio to plain generation of the same round (median, and the range over rounds).
The floor is what the number of blocks that run for one token alone allows: with blocks ``first`` to ``last``
routed and N in all, ``(last + 1) + (N - first)`` block runs with a shared prefix, ``(last + 1) + N`` without.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from sae_lens import SAE
from tqdm.auto import tqdm

import routesae_lens as rl

CLASSES: dict[str, Any] = {
    "hooked": rl.HookedRouteSAETransformer,
    "bridge": rl.RouteSAETransformerBridge,
}
PLAIN = "plain"


def ways(model: Any, sae: Any) -> dict[str, Any]:
    """Context managers to generate in."""
    steer = {"edits": {0: rl.Set(5.0)}, "use_error_term": True}
    return {
        PLAIN: nullcontext,
        "spliced": lambda: model.saes(sae),
        "spliced with the error term": lambda: model.saes(sae, use_error_term=True),
        "steered": lambda: model.steer(sae, **steer),
        "spliced, prefix not shared": lambda: unshared(model, model.saes(sae)),
        "steered, prefix not shared": lambda: unshared(model, model.steer(sae, **steer)),
    }


@contextmanager
def unshared(model: Any, context: Any) -> Iterator[None]:
    with ExitStack() as stack:
        model.share_prefix = False
        stack.callback(setattr, model, "share_prefix", True)
        stack.enter_context(context)
        yield


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def block_runs(model: Any, prompt: torch.Tensor) -> int:
    """Blocks that run for one more token, counted."""
    counts: list[int] = []
    handles = [block.register_forward_hook(lambda *_: counts.append(1)) for block in model.blocks]
    # A block that is skipped on the bridge still answers its hooks, so what it wraps is counted there.
    if not isinstance(model, rl.HookedRouteSAETransformer):
        for handle in handles:
            handle.remove()
        inner = [block.original_component for block in model.blocks]
        handles = [block.register_forward_hook(lambda *_: counts.append(1)) for block in inner]
    totals = []
    for n in (2, 3):
        counts.clear()
        generate(model, prompt, n)
        totals.append(len(counts))
    for handle in handles:
        handle.remove()
    return totals[1] - totals[0]


def generate(model: Any, prompt: torch.Tensor, n: int) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=n, do_sample=False, stop_at_eos=False, verbose=False)


def measure(model: Any, sae: Any, prompt: torch.Tensor, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table, one for each way."""
    all_ways = ways(model, sae)
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    runs = {}
    for name, context in all_ways.items():  # warms up, too
        with context():
            runs[name] = block_runs(model, prompt)
    for turn in tqdm(range(rounds), desc="rounds", unit="round"):
        names = list(all_ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with all_ways[name]():
                synchronize()
                start = time.perf_counter()
                generate(model, prompt, new_tokens)
                synchronize()
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in all_ways:
        ratios = [plain / own for plain, own in zip(seconds[PLAIN], seconds[name], strict=True)]
        rows.append(
            {
                "way": name,
                "tokens_per_s": len(prompt) * new_tokens / statistics.median(seconds[name]),
                "of_plain": statistics.median(ratios),
                "of_plain_range": [min(ratios), max(ratios)],
                "block_runs_per_token": runs[name],
                "floor": runs[PLAIN] / runs[name],
            }
        )
    return rows


def shadow_cache_bytes(model: Any, sae: Any) -> int:
    """Memory of the shadow cache per token and sequence."""
    heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    layers = sae.layers[-1] + 1 - sae.layers[0]
    return 2 * layers * heads * model.cfg.d_head * next(model.parameters()).element_size()


def main(
    model: Annotated[str, typer.Option(help="Hub name, folder, or 'demo' (SmolLM2-135M).")] = "demo",
    sae: Annotated[
        Path | None, typer.Option(help="Folder of a RouteSAE; by default one with new weights.")
    ] = None,
    width: Annotated[int, typer.Option(help="d_sae of a new RouteSAE.")] = 2304,
    k: Annotated[int, typer.Option(help="Active latents of a new RouteSAE.")] = 32,
    backend: Annotated[list[str] | None, typer.Option(help="hooked, bridge (repeatable).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... (a GPU if there is one).")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results.")] = None,
) -> None:
    """Tokens per second of plain, spliced and steered generation, with and without a shared prefix."""
    device = device or rl.default_device()
    results: dict[str, Any] = {
        "model": model,
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "versions": {
            name: version(name) for name in ("torch", "transformer-lens", "sae-lens", "transformers")
        },
        "backends": {},
    }
    for name in backend or list(CLASSES):
        loaded = rl.load_model(model, name, device=device, dtype=dtype, model_class=CLASSES[name]).eval()
        if sae is None:
            torch.manual_seed(seed)
            cfg = rl.RouteTopKSAEConfig.for_model(loaded, d_sae=width, k=k, device=device)
            spliced: Any = rl.RouteTopKSAE(cfg)
        else:
            spliced = SAE.load_from_disk(sae, device=device)
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(1000, 20000, (batch_size, prompt_tokens), generator=generator).to(device)
        rows = measure(loaded, spliced, prompt, new_tokens, rounds)
        results["backends"][name] = rows
        results["routed_layers"] = [spliced.layers[0], spliced.layers[-1]]
        results["shadow_cache_bytes_per_token"] = shadow_cache_bytes(loaded, spliced)
        show(name, rows, results)
        del loaded, spliced
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")


def show(backend: str, rows: list[dict[str, Any]], results: dict[str, Any]) -> None:
    table = Table(
        title=f"{backend}, {results['device']}, {results['dtype']}, batch {results['batch_size']}; shadow cache "
        f"{results['shadow_cache_bytes_per_token'] / 1024:.1f} KiB per token"
    )
    for column in ("", "tokens/s", "x plain (range)", "blocks/token", "x plain by blocks alone"):
        table.add_column(column)
    for row in rows:
        low, high = row["of_plain_range"]
        table.add_row(
            row["way"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['of_plain']:.2f} ({low:.2f}-{high:.2f})",
            str(row["block_runs_per_token"]),
            f"{row['floor']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
