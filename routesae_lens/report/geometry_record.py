"""What a run's folder holds about the geometry of an SAE's features: ``geometry/<sae>.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from routesae_lens.analysis.feature_map import FeatureMap
from routesae_lens.analysis.match_distribution import MatchDistribution
from routesae_lens.report.run_files import read_about, save_about

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
        lists = {
            "distributions": [one.to_dict() for one in self.distributions],
            "maps": [one.to_dict() for one in self.maps],
        }
        return save_about(run, GEOMETRY, sae, FORMAT, lists)

    @classmethod
    def find(cls, run: Path, sae: str) -> GeometryRecord:
        """Of one SAE of a run; empty where there is no file.

        Raises:
            ValueError: a damaged file, or one of another SAE or format.
        """
        with read_about(run, GEOMETRY, sae, FORMAT) as data:
            if data is None:
                return cls()
            return cls(
                [MatchDistribution.from_dict(one) for one in data["distributions"]],
                [FeatureMap.from_dict(one) for one in data["maps"]],
            )
