"""Steer features of a trained SAE and see whether the text follows.

    python recipes/steer.py --sae runs/mine/route_topk --features runs/mine/features.json.gz --output runs/steer

Features are found by their contexts (``routesae_lens.collect_features``), set to multiples of their own maximum
while neutral prompts are completed, and judged by a rule that was fixed before (``steer_verdicts.py``). Each is
compared with its completions unsteered, from the same random numbers, and with other latents steered just as
strongly. Stopped at any point, the same command goes on with the next feature.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import torch
import typer
from sae_lens import SAE
from steer_report import figure, report, table
from steer_verdicts import RULE, judged, own_tokens
from tqdm.auto import tqdm

import routesae_lens as rl

PROMPTS = (
    "The old man walked",
    "This morning I went",
    "In the small town",
    "She opened the door",
    "We were talking about",
    "The weather today is",
    "My brother told me",
    "It was late when",
)
"""Neutral openings, of the same length in tokens for most tokenizers, so that they run side by side."""
CHOICE = (
    "Interpretable features that fire on at most 5 % of tokens and have a word among their tokens; of each home "
    "block (where most of their strong activations are) those first whose activations are strong contexts most "
    "often (above the threshold / above 0), then by more contexts, then by number; the blocks take turns, those with "
    "the most such features first."
)


def home(feature: rl.Feature) -> int | None:
    """The block with most of its strong activations; None for an SAE without blocks."""
    if not feature.blocks:
        return None
    return max(feature.blocks, key=lambda block: (feature.blocks[block].above, -block))


def selectivity(feature: rl.Feature) -> float:
    """Share of its activations that are strong ones."""
    active = sum(at.active for at in feature.blocks.values())
    return sum(at.above for at in feature.blocks.values()) / active if active else 0.0


def choose(features: Sequence[rl.Feature], n: int) -> list[rl.Feature]:
    """``n`` features by the rule in ``CHOICE``."""
    fit = [one for one in features if one.firing_frequency <= 0.05 and own_tokens(one)]
    fit.sort(key=lambda one: (-selectivity(one), -len(one.contexts), one.id))
    by_block: dict[Any, list[rl.Feature]] = {}
    for one in fit:
        by_block.setdefault(home(one), []).append(one)
    queues = sorted(by_block.items(), key=lambda item: (-len(item[1]), -1 if item[0] is None else item[0]))
    chosen: list[rl.Feature] = []
    while len(chosen) < n and any(queue for _, queue in queues):
        for _, queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop(0))
    if not chosen:
        raise typer.BadParameter(
            "no interpretable feature fires on at most 5 % of the tokens; name some with --latents"
        )
    return chosen


def controls_for(
    feature: rl.Feature, found: rl.FeatureSet, avoid: set[int], n: int, crowd: int = 20
) -> list[int]:
    """Other latents, drawn (seed: the feature's number) from those nearest to it in firing frequency."""
    frequency = found.firing_frequency.tolist()
    alive = [i for i, often in enumerate(frequency) if often > 0 and i not in avoid]
    if not alive:
        raise typer.BadParameter("no other latent fires, so there is nothing to compare with")
    alive.sort(key=lambda i: (abs(math.log(frequency[i] / feature.firing_frequency)), i))
    return sorted(random.Random(feature.id).sample(alive[:crowd], min(n, len(alive))))


@torch.no_grad()
def expected_next(
    lm: Any, wanted: Sequence[rl.Feature], others: Sequence[rl.Feature]
) -> dict[int, list[str]]:
    """By feature the ten token classes that the clean model expects after its contexts more than elsewhere.

    Elsewhere: after the strongest context of up to 64 of ``others``. Of a feature up to 16 contexts count.
    """

    def mean(contexts: Sequence[rl.Context]) -> torch.Tensor:
        total = torch.zeros(lm.cfg.d_vocab, dtype=torch.float64)
        for one in contexts:
            ids = lm.to_tokens(one.before + one.token)
            total += lm(ids)[0, -1].double().softmax(-1).cpu()
        return total / len(contexts)

    elsewhere = mean([one.contexts[0] for one in others[:64]])
    found = {}
    for feature in tqdm(wanted, desc="expected next", unit="feature"):
        gained = mean(feature.contexts[:16]) - elsewhere
        likely = [lm.tokenizer.decode([token]).strip().lower() for token in gained.topk(40).indices.tolist()]
        found[feature.id] = [one for one in dict.fromkeys(likely) if one][:10]
    return found


def described(feature: rl.Feature, expected: list[str], shown: int = 6) -> dict[str, Any]:
    """What is known of a feature from its contexts."""
    return {
        "feature": feature.id,
        "seems to be": own_tokens(feature),
        "expected next": expected,
        "home": home(feature),
        "firing_frequency": feature.firing_frequency,
        "max_activation": feature.max_activation,
        "selectivity": selectivity(feature),
        "contexts": [
            {"before": one.before, "token": one.token, "after": one.after, "block": one.block}
            for one in feature.contexts[:shown]
        ],
    }


def _write(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _json(data: Any) -> str:
    return json.dumps(data, indent=1, allow_nan=False)


def _claim(output: Path, options: dict[str, Any]) -> None:
    """A folder belongs to one set of options; a run with others needs another one."""
    record = output / "options.json"
    if record.exists() and (before := json.loads(record.read_text())) != options:
        different = [f"{name}={before.get(name)}" for name in options if before.get(name) != options[name]]
        raise typer.BadParameter(f"{output} holds a run with {', '.join(different)}; choose another --output")
    if not record.exists() and output.exists() and any(output.iterdir()):
        raise typer.BadParameter(f"{output} holds something else; choose another --output")
    (output / "features").mkdir(parents=True, exist_ok=True)
    _write(record, _json(options))


def main(
    sae: Annotated[Path, typer.Option(help="Folder of a trained SAE (inference form).")],
    features: Annotated[Path, typer.Option(help="FeatureSet of that SAE, as FeatureSet.save wrote it.")],
    latents: Annotated[
        str | None,
        typer.Option(help="Features to steer, such as 12,480; chosen by their contexts if left out."),
    ] = None,
    n: Annotated[int, typer.Option(help="How many features are chosen.")] = 6,
    strengths: Annotated[str, typer.Option(help="In units of each feature's maximum, ascending.")] = "1,2,4",
    prompt: Annotated[
        list[str] | None, typer.Option(help="In place of the neutral prompts. Repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Sampled completions of each prompt.")] = 3,
    controls: Annotated[int, typer.Option(help="Other latents steered for each feature.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a completion.")] = 40,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Tokens that are sampled from.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Completions side by side.")] = 24,
    model: Annotated[str, typer.Option(help="Hugging Face name, local folder, or 'demo'.")] = "demo",
    backend: Annotated[str, typer.Option(help="bridge or hooked.")] = "bridge",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    output: Annotated[Path, typer.Option(help="Folder for results, report and figure.")] = Path("runs/steer"),
) -> None:
    """Steer features of a trained SAE, at several strengths, against controls."""
    classes = {"bridge": rl.RouteSAETransformerBridge, "hooked": rl.HookedRouteSAETransformer}
    if backend not in classes:
        raise typer.BadParameter(f"unknown --backend {backend!r}; expected bridge or hooked")
    if n < 1 or controls < 1:
        raise typer.BadParameter(f"--n and --controls must be 1 or more, got {n} and {controls}")
    try:
        values = [float(value) for value in strengths.split(",")]
        named = None if latents is None else [int(latent) for latent in latents.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers separated by commas: {error}") from error
    if not all(map(math.isfinite, values)) or values != sorted(set(values)) or values[0] <= 0:
        raise typer.BadParameter(f"--strengths must be positive and ascending, got {strengths}")
    prompts = list(prompt or PROMPTS)
    if len(prompts) * seeds < 2:
        raise typer.BadParameter("one completion has no spread; give more prompts or --seeds 2")
    found = rl.FeatureSet.load(features)
    dictionary = SAE.load_from_disk(sae, device=device or rl.default_device())
    width = len(found.max_activation)
    if width != dictionary.cfg.d_sae:
        raise typer.BadParameter(f"{features} has {width} latents and the SAE {dictionary.cfg.d_sae}")
    known = {one.id: one for one in found.features}
    if missing := [latent for latent in named or () if latent not in known]:
        raise typer.BadParameter(f"--latents {missing} are no interpretable features in {features}")
    chosen = choose(list(known.values()), n) if named is None else [known[i] for i in dict.fromkeys(named)]
    others = {one.id: controls_for(one, found, {f.id for f in chosen}, controls) for one in chosen}
    generation = rl.GenerationOptions(
        max_new_tokens, True, temperature, top_k, seed=seed, samples=seeds, batch_size=batch_size
    )
    options = {
        "sae": sae.name, "features": features.name, "latents": named, "n": n, "strengths": values, "prompts": prompts,
        "seeds": seeds, "controls": controls, "max_new_tokens": max_new_tokens, "temperature": temperature,
        "top_k": top_k, "seed": seed, "batch_size": batch_size, "model": model, "backend": backend,
    }  # fmt: skip
    _claim(output, options)
    lm = rl.load_model(model, backend, device=device, model_class=classes[backend])
    typer.echo(f"{RULE}\n\nFeatures: " + "; ".join(f"{f.id} ({', '.join(own_tokens(f))})" for f in chosen))
    unsteered: list[rl.Completion] | None = None
    expected: dict[int, list[str]] = {}
    records = []
    for feature in chosen:
        path = output / "features" / f"{feature.id}.json"
        if not path.exists():
            if unsteered is None:
                expected = expected_next(lm, chosen, found.features)
                read = [one.id for one in chosen] + [i for each in others.values() for i in each]
                unsteered = rl.complete(
                    lm, dictionary, prompts, read=read, options=generation, progress="unsteered"
                )
            doses = [
                rl.dose_response(
                    lm,
                    dictionary,
                    latent,
                    values,
                    prompts,
                    relative=True,
                    maxima={latent: feature.max_activation},  # a control is set as high as the feature
                    options=generation,
                    read=[feature.id],
                    unsteered=unsteered,
                )
                for latent in (feature.id, *others[feature.id])
            ]
            quotes = [
                {"value": row.value, "prompt": prompts[i], "text": completions[i * seeds].text}
                for i in (0, len(prompts) // 2)
                for row, completions in zip(doses[0].rows, doses[0].completions, strict=True)
            ]
            record = {
                **described(feature, expected[feature.id]),
                **judged(feature, expected[feature.id], doses[0], doses[1:]),
                "quotes": quotes,
                "texts": [dose.to_dict() for dose in doses],
            }
            _write(path, _json(record))
        records.append(json.loads(path.read_text(encoding="utf-8")))
        typer.echo(f"{feature.id}: {records[-1]['verdict']}")
    results = {
        "options": options,
        "rule": RULE,
        "choice": CHOICE,
        "completions": len(prompts) * seeds,
        "versions": {
            name: version(name) for name in ("routesae-lens", "sae-lens", "transformer-lens", "torch")
        },
        "features": records,
    }
    _write(output / "results.json", _json(results))
    _write(output / "results.csv", table(records).to_csv(index=False))
    _write(output / "report.md", report(results))
    drawn = figure(records)
    drawn.savefig(output / "dose_response.png", dpi=100)
    plt.close(drawn)
    typer.echo(f"Written to {output}/: report.md, results.json, results.csv, dose_response.png")


if __name__ == "__main__":
    typer.run(main)
