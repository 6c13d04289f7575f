"""What ``routesae-lens steer`` prints and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from routesae_lens.analysis.feature_set import FeatureSet
    from routesae_lens.analysis.steering import DoseResponse, SteeredPair

WRITTEN = ("steering.json", "steering.txt", "dose.csv")


def contexts(found: FeatureSet, latent: int, most: int = 5) -> str:
    feature = next((one for one in found.features if one.id == latent), None)
    heading = f"Latent {latent}: maximum {found.max_activation[latent]:.2f}, fires on "
    heading += f"{found.firing_frequency[latent]:.2%} of tokens"
    if feature is None:
        return f"{heading}; no interpretable feature"
    lines = [
        f"  {one.before[-50:]!r} [{one.token}] {one.after[:30]!r}"
        + ("" if one.block is None else f"  block {one.block}")
        for one in feature.contexts[:most]
    ]
    return "\n".join([f"{heading}; contexts:", *lines])


def side_by_side(pair: SteeredPair, verbose: bool) -> str:
    lines = [f"Prompt:   {pair.prompt}"]
    for name, one in (("Original", pair.original), ("Steered", pair.steered)):
        lines.append(f"{name + ':':<9} {one.text}")
    lines.append(
        f"KL {pair.steered.mean_kl:.4f} nats per token; perplexity under the clean model "
        f"{pair.original.perplexity:.2f} original, {pair.steered.perplexity:.2f} steered; "
        f"{pair.changed:.0%} of the tokens differ"
    )
    for latent in pair.steered.activations:
        lines.append(
            f"Latent {latent} in a clean reading: mean {pair.original.mean_activation(latent):.3f} original, "
            f"{pair.steered.mean_activation(latent):.3f} steered; fires on {pair.original.firing_share(latent):.0%} "
            f"and {pair.steered.firing_share(latent):.0%} of the tokens"
        )
    if verbose:
        lines.append(f"  {'steered token':<20} {'KL':>9}  block")
        for string, kl, block in zip(pair.steered.strings, pair.steered.kl, pair.steered.blocks, strict=True):
            lines.append(f"  {string!r:<20} {kl:9.4f}  {'–' if block is None else block}")
    return "\n".join(lines)


def dose_table(response: DoseResponse) -> str:
    unit = " x maximum" if response.relative else ""
    lines = [
        f"Latent {response.feature} clamped ({response.rows[0].completions} completions each):",
        f"{'value' + unit:>18} {'KL':>9} {'activation':>11} {'fires on':>9} {'perplexity':>11} {'changed':>8}",
    ]
    for row in response.rows:
        value = "unsteered" if row.value is None else f"{row.value:g}"
        lines.append(
            f"{value:>18} {row.kl:9.4f} {row.activation:11.3f} {row.firing_share:9.1%} {row.perplexity:11.2f} "
            f"{row.changed:8.0%}"
        )
    return "\n".join(lines)


def printable(text: str) -> str:
    """A model's text may hold control characters that a terminal would obey."""
    return "".join(one if one.isprintable() or one == "\n" else " " for one in text)


def write(
    output: Path,
    settings: dict[str, Any],
    pairs: Sequence[SteeredPair],
    response: DoseResponse | None,
    text: str,
) -> None:
    data = {
        "settings": settings,
        "pairs": [pair.to_dict() for pair in pairs],
        "dose_response": None if response is None else response.to_dict(),
    }
    contents = {
        "steering.json": json.dumps(data, indent=1, allow_nan=False),
        "steering.txt": text + "\n",
    }
    if response is not None:
        contents["dose.csv"] = response.to_frame().to_csv(index=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / "dose.csv").unlink(missing_ok=True)  # of an earlier command
    for name, content in contents.items():
        partial = output / f".{name}.{os.getpid()}"
        try:
            partial.write_text(content, encoding="utf-8")
            partial.replace(output / name)
        finally:
            partial.unlink(missing_ok=True)
