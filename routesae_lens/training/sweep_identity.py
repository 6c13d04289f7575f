"""What makes two sweeps the same: config, model, texts. A folder is continued by the same sweep alone."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from sae_lens.saes.sae import TrainingSAEConfig
from torch import Tensor

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import mount_layers, mounted_points, split_layers, unmount_layers
from routesae_lens.training.checkpoint import flat, same_setting
from routesae_lens.training.data import TEXT_COLUMNS, TOKEN_COLUMNS
from routesae_lens.training.record import read_object, sae_settings
from routesae_lens.training.sweep_config import SweepConfig
from routesae_lens.training.train import model_name

SWEEP_FILE = "sweep.json"
PARTS = ("config", "model", "probe", "text", "held_out", "saes")
"""Of ``about``; what one sets comes before what follows from it."""
TEXT_ROWS = 32
"""Rows of the training text that its fingerprint reads."""


def about_sweep(
    model: Any,
    config: SweepConfig,
    configs: Mapping[str, TrainingSAEConfig],
    text: Dataset | IterableDataset,
    held_out: Int[Tensor, "sequence pos"],
) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON holds it."""
    backend = backend_of(model)
    name = _folder_name(model_name(model))
    about = {
        "config": config.to_dict(),
        "model": {"name": name, "layers": backend.n_layers, "d_model": backend.d_model},
        "probe": probe_model(model),
        "text": text_fingerprint(text),
        "held_out": {
            "sequences": held_out.shape[0],
            "positions": held_out.shape[1],
            "sha256": hashlib.sha256(held_out.cpu().long().numpy().tobytes()).hexdigest(),
        },
        "saes": {name: sae_settings(cfg) for name, cfg in configs.items()},
    }
    plain_about: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return plain_about


def identity_of(about: Mapping[str, Any]) -> str:
    """Hash of ``about`` without the probe, which is measured and may differ in its last digits."""
    exact = {part: value for part, value in about.items() if part != "probe"}
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def probe_model(model: Any) -> dict[str, float]:
    """Root mean square of the residual stream after every block, on eight tokens.

    Another model shows other values. Compared to 1 % (machines and number formats differ by less), so a model whose
    weights were changed only a little passes for the same.
    """
    before = mounted_points(model)
    n_layers = backend_of(model).n_layers
    point = mount_layers(model, range(n_layers))
    try:
        tokens = torch.arange(8, device=next(model.parameters()).device)[None]
        _, cache = model.run_with_cache(tokens, names_filter=[point])
        stack = split_layers(cache[point], n_layers).double()
    finally:
        if point not in before:
            unmount_layers(model, point)
    return {str(layer): stack[..., layer, :].pow(2).mean().sqrt().item() for layer in range(n_layers)}


def text_fingerprint(text: Dataset | IterableDataset) -> dict[str, Any]:
    """Number of rows (None where it is not known) and a hash of some: evenly spaced ones, or the first.

    ``datasets``' own fingerprint is not used: it depends on where a file lies and when it was written.
    """
    n_rows = len(text) if isinstance(text, Dataset) else None
    if isinstance(text, Dataset):
        text = text.with_format(None).select(range(0, len(text), max(1, len(text) // TEXT_ROWS)))
    digest = hashlib.sha256()
    for row in itertools.islice(text, TEXT_ROWS):
        read = {name: row[name] for name in (*TEXT_COLUMNS, *TOKEN_COLUMNS) if name in row}
        digest.update(json.dumps(read, default=str).encode())
    return {"rows": n_rows, "sha256": digest.hexdigest()}


def read_sheet(output: Path) -> dict[str, Any]:
    """``sweep.json`` of ``output``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    path = output / SWEEP_FILE
    sheet = read_object(path)
    about = sheet.get("about")
    for where, table, names in (
        ("it", sheet, ("identity", "about", "members")),
        ("its 'about'", about if isinstance(about, dict) else {}, ("config", "model", "saes")),
    ):
        if missing := [name for name in names if name not in table]:
            raise ValueError(f"{path} is damaged, or no sweep's: {where} lacks {', '.join(missing)}")
    return sheet


def check_same_sweep(output: Path, about: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises FileExistsError that lists the settings of ``known``, the folder's sweep, which differ in ``about``.

    Parts that ``known`` does not have are not compared: it may have been written before they were recorded.
    """
    for part in PARTS:
        if part not in known:
            continue
        here, theirs = flat({part: about[part]}), flat({part: known[part]})
        if "model.name" in theirs:
            theirs["model.name"] = _folder_name(theirs["model.name"])
        different = [
            f"{key}: there {theirs.get(key, 'none')!r}, now {here.get(key, 'none')!r}"
            for key in [*theirs, *(key for key in here if key not in theirs)]
            if not same_setting(key, here.get(key, "none"), theirs.get(key, "none"))
        ]
        if different:
            raise FileExistsError(
                f"{output} holds another sweep; choose another folder, or the same settings:\n  "
                + "\n  ".join(different)
            )


def _folder_name(name: str) -> str:
    """A local folder by its own name, however the path to it was given; other names as they are."""
    path = Path(name)
    if path.is_dir():
        return path.resolve().name
    return path.name if path.is_absolute() else name
