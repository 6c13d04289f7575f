"""What a run's folder holds about the meta-SAE of one of its SAEs, ``meta/<sae>.json``, and how the page reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routesae_lens.analysis.feature_set import FeatureSet
from routesae_lens.analysis.meta_latents import MetaLatents
from routesae_lens.report.run_files import read_about, save_about

META_RECORDS = "meta"
"""Folder of a run in which files named after its SAEs are looked for; ``meta/<sae>/`` is the meta-SAE itself."""
FORMAT = "routesae_lens.meta_latents/1"
WIDEST = 12
"""Meta-latents in the page's table, and features named beside each."""
NAMED = 5


@dataclass(frozen=True)
class MetaRecord:
    """The meta-latents of an SAE of a run; None where the run holds none."""

    found: MetaLatents | None = None

    def save(self, run: str | Path, sae: str) -> Path:
        """Write ``meta/<sae>.json`` in the folder of a run, whole or not at all; a former one is replaced.

        Raises:
            ValueError: nothing to save, no folder ``run``, or a name that is no file name.
        """
        if self.found is None:
            raise ValueError("this record holds no meta-latents: MetaRecord(meta_latents(sae, meta_sae))")
        return save_about(run, META_RECORDS, sae, FORMAT, self.found.to_dict())

    @classmethod
    def find(cls, run: str | Path, sae: str) -> MetaRecord:
        """Of one SAE of a run; empty where there is no file.

        Raises:
            ValueError: a damaged file, or one of another SAE or format.
        """
        with read_about(Path(run), META_RECORDS, sae, FORMAT) as data:
            return cls(None if data is None else MetaLatents.from_dict(data))


def meta_rows(found: MetaLatents, features: FeatureSet) -> list[list[Any]]:
    """Each meta-latent that a feature of the page has: number, latents that have it, and these features.

    A feature is its latent and the activation, strongest first. A feature's own meta-latents are the rows in which
    it stands, so every pair is on the page once: the file grows with the features, not with their pairs.
    """
    on_page = {feature.id for feature in features.features}
    rows = []
    for meta, among in enumerate(found.counts.tolist()):
        having = [[latent, round(x, 3)] for latent, x in found.latents_of(meta) if latent in on_page]
        if having:
            rows.append([meta, among, having])
    return rows


def widest(found: MetaLatents, rows: list[list[Any]]) -> list[dict[str, Any]]:
    """The meta-latents that most latents have: number, latents, how many are on the page, the strongest of these."""
    shown = {meta: [latent for latent, _ in having] for meta, _, having in rows}
    order = found.counts.argsort(descending=True, stable=True)[:WIDEST].tolist()
    return [
        {"number": meta, "latents": n, "here": len(shown.get(meta, [])), "named": shown.get(meta, [])[:NAMED]}
        for meta in order
        if (n := int(found.counts[meta]))
    ]
