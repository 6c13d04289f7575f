"""What a run's folder holds about the geometry of an SAE's features: ``geometry/<sae>.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from routesae_lens.analysis.feature_map import FeatureMap
from routesae_lens.analysis.match_distribution import MatchDistribution
from routesae_lens.training.record import read_object, write_whole

GEOMETRY = "geometry"
"""Folder of a run in which files named after its SAEs are looked for."""
FORMAT = "routesae_lens.geometry/1"


@dataclass(frozen=True)
class GeometryRecord:
    """Comparisons of an SAE's dictionary with others, and maps of its features."""

    distributions: list[MatchDistribution] = field(default_factory=list)
    maps: list[FeatureMap] = field(default_factory=list)

    def save(self, run: str | Path, sae: str) -> Path:
        """Write ``geometry/<sae>.json`` in the folder of a run, whole or not at all; a former one is replaced.

        Raises:
            ValueError: no folder ``run``, or a name that is no file name.
        """
        folder = Path(run)
        if not folder.is_dir():
            raise ValueError(f"expected the folder of a run, but there is no folder {folder}")
        if sae in ("", ".", "..") or Path(sae).name != sae:
            raise ValueError(f"the name of an SAE must be a file name, got {sae!r}")
        path = folder / GEOMETRY / f"{sae}.json"
        path.parent.mkdir(exist_ok=True)
        data = {
            "format": FORMAT,
            "sae": sae,
            "distributions": [one.to_dict() for one in self.distributions],
            "maps": [one.to_dict() for one in self.maps],
        }
        write_whole(path, json.dumps(data))
        return path

    @classmethod
    def find(cls, run: Path, sae: str) -> GeometryRecord:
        """Of one SAE of a run; empty where there is no file.

        Raises:
            ValueError: a damaged file, or one of another SAE or format.
        """
        path = run / GEOMETRY / f"{sae}.json"
        if not path.exists():
            return cls()
        data = read_object(path)
        if data.get("format") != FORMAT or data.get("sae") != sae:
            raise ValueError(
                f"{path} is {data.get('format')!r} of {data.get('sae')!r}, expected {FORMAT!r} of {sae!r}"
            )
        try:
            return cls(
                [MatchDistribution.from_dict(one) for one in data["distributions"]],
                [FeatureMap.from_dict(one) for one in data["maps"]],
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
