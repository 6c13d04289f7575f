"""Files of a run that hold one kind of result about one of its SAEs: ``<kind>/<sae>.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from routesae_lens.training.record import read_object, write_whole


def save_about(run: str | Path, kind: str, sae: str, format: str, values: Mapping[str, Any]) -> Path:
    """Write ``<kind>/<sae>.json`` in the folder of a run, whole or not at all; a former one is replaced.

    Raises:
        ValueError: no folder ``run``, or a name that is no file name.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"expected the folder of a run, but there is no folder {folder}")
    if sae in ("", ".", "..") or Path(sae).name != sae:
        raise ValueError(f"the name of an SAE must be a file name, got {sae!r}")
    path = folder / kind / f"{sae}.json"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"format": format, "sae": sae, **values}))
    return path


@contextmanager
def read_about(run: Path, kind: str, sae: str, format: str) -> Iterator[dict[str, Any] | None]:
    """What :func:`save_about` wrote, None where there is no file; what goes wrong inside names the file.

    Raises:
        ValueError: a damaged file, or one of another SAE or format.
    """
    path = run / kind / f"{sae}.json"
    if not path.exists():
        yield None
        return
    data = read_object(path)
    if data.get("format") != format or data.get("sae") != sae:
        raise ValueError(
            f"{path} is {data.get('format')!r} of {data.get('sae')!r}, expected {format!r} of {sae!r}"
        )
    try:
        yield data
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
