"""Examples of steering that a run's folder holds: texts side by side, and what each strength did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routesae_lens.training.record import read_object

NAMES = ("steering.json", "steering/steering.json", "steering/results.json")
"""Files of a run that are read, and ``steering/<sae>.json``."""


@dataclass(frozen=True)
class SteeringExamples:
    """What ``SteeredPair.to_dict`` and ``DoseResponse.to_dict`` wrote, wherever in the file they stand."""

    pairs: list[dict[str, Any]] = field(default_factory=list)
    """label, prompt, original and steered, all text."""
    doses: list[dict[str, Any]] = field(default_factory=list)
    """feature, edit, relative, and rows of value, kl, activation, perplexity, changed and an example text."""

    @classmethod
    def find(cls, folder: Path, sae: str) -> SteeringExamples:
        """Of one SAE; examples in a file that names another SAE are left out. Empty where there is no file.

        Raises:
            ValueError: a damaged file.
        """
        pairs: list[dict[str, Any]] = []
        doses: list[dict[str, Any]] = []
        for path in [*(folder / name for name in NAMES), folder / "steering" / f"{sae}.json"]:
            try:
                for label, one in _walk(read_object(path), sae, "") if path.exists() else ():
                    (pairs if "steered" in one else doses).append(_pair(label, one) or _dose(one))
            except (KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return cls(pairs, doses)


def _walk(value: Any, sae: str, label: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every pair and dose-response inside ``value``, with what the objects around it call it."""
    if isinstance(value, list):
        for inner in value:
            yield from _walk(inner, sae, label)
    if not isinstance(value, Mapping) or _sae_of(value) not in (None, sae):
        return
    if {"feature", "edit", "rows"} <= value.keys():
        if label in ("", f"Feature {value['feature']}"):  # others are its controls
            yield label, value
        return
    if {"prompt", "original", "steered"} <= value.keys():
        yield label, value
        return
    here = next((value[name] for name in ("feature", "latent", "id") if name in value), None)
    label = label if here is None else f"Feature {here}"
    edits = value["settings"].get("edits") if isinstance(value.get("settings"), Mapping) else None
    for name, inner in value.items():
        named = f"Feature {name}" if name.isdecimal() else label
        if name == "pairs" and edits:
            named = ", ".join(f"Feature {latent}: {edit}" for latent, edit in edits.items())
        yield from _walk(inner, sae, named)


def _sae_of(value: Mapping[str, Any]) -> str | None:
    """Name of the SAE that an object says it is about, itself or in its settings; the last part of a path."""
    for one in (value, value.get("settings"), value.get("options")):
        if isinstance(one, Mapping) and isinstance(one.get("sae"), str):
            return Path(one["sae"]).name
    return None


def _pair(label: str, one: Mapping[str, Any]) -> dict[str, Any] | None:
    if "steered" not in one:
        return None
    texts = {name: _text(one[name]) for name in ("original", "steered")}
    return {"label": label, "prompt": _text(one["prompt"]), **texts}


def _dose(one: Mapping[str, Any]) -> dict[str, Any]:
    texts = one.get("texts") or []
    rows = []
    for i, row in enumerate(one["rows"]):
        example = texts[i][0] if i < len(texts) and texts[i] else ""
        shown = {name: row.get(name) for name in ("value", "kl", "activation", "perplexity", "changed")}
        rows.append(shown | {"text": _text(example)})
    return {
        "feature": one["feature"],
        "edit": str(one["edit"]),
        "relative": bool(one.get("relative")),
        "rows": rows,
    }


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("text", "")
    if isinstance(value, list):
        value = "\n".join(
            _text(part.get("content", part) if isinstance(part, Mapping) else part) for part in value
        )
    return str(value)
