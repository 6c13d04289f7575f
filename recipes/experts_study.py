"""What the comparison of mixtures of experts does with each part: train and splice, then measure redundancy.

Every stage writes one JSON file per SAE, whole or not at all, and skips what is there.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from typing import Any

import torch
from experts_methods import methods_of
from experts_settings import Settings, kinds_of, sweep_of
from experts_verbs import verb_like
from paper_findings import write_whole
from paper_stages import Study as PaperStudy
from paper_stages import trained

from routesae_lens.analysis.activation_overlap import OverlapCounter
from routesae_lens.analysis.expert_use import ExpertCounter
from routesae_lens.analysis.redundancy import expert_similarity, feature_redundancy
from routesae_lens.analysis.stream import kept_tokens
from routesae_lens.analysis.token_sets import chosen_tokens, read_token_set
from routesae_lens.hook_points import layer_hook_name

GROUP = 20
"""SAEs measured on one pass over the held-out text: what an interruption costs at most."""
PAIRS = 240
"""Ordered pairs of experts that are compared; all of them up to 16 experts."""


class Study(PaperStudy):
    """The settings, the model (loaded when first needed), the text and the folder, as of ``reproduce_paper.py``."""

    @property
    def settings(self) -> Settings:
        assert isinstance(self.preset, Settings)
        return self.preset

    @property
    def layer(self) -> int:
        return int(self.about["layers"][-1])


def run_part(study: Study, part: str) -> None:
    settings = study.settings
    config = sweep_of(settings, part, study.layer, study.about["d_sae"])
    with study.timed(part, "training and KL"):
        _measure_power(study)
        result = trained(
            study,
            part,
            config,
            methods_of(kinds_of(settings)),
            group_size=GROUP,
            checkpoint_every=0,  # (it holds gigabytes; an interruption writes one all the same)
            log_every=max(1, settings.tokens // settings.batch_size // 50),
        )
    gc.collect()
    with study.timed(part, "redundancy"):
        result.measure(
            "redundancy", lambda saes: redundancy(study, saes), group_size=GROUP, device=study.device
        )


@torch.no_grad()
def _measure_power(study: Study) -> None:
    """Mean square of an activation's entry, which makes the MSE of Eq. A.1 from explained variance (``power.json``)."""
    path = study.output / "power.json"
    if path.exists():
        return
    name = layer_hook_name(study.model, study.layer, "hook_resid_post")
    tokens = study.held_out(study.settings.kl_tokens)
    keep, total, n = kept_tokens(tokens, study.model), 0.0, 0
    for ids, kept in zip(tokens.split(8), keep.split(8), strict=True):
        _, cache = study.model.run_with_cache(ids.to(study.device), names_filter=[name])
        x = cache[name][kept.to(study.device)].double()
        total, n = total + x.square().sum().item(), n + x.numel()
    write_whole(path, json.dumps({"mean_square": total / n, "values": n}))


@torch.no_grad()
def redundancy(study: Study, saes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Near copies among the weights, and what tokens activate, all SAEs on one pass over the held-out text."""
    tokens = study.held_out(study.settings.feature_tokens)
    activity = _activity(saes, study.model, tokens, study.settings.eval_batch_size)
    return {name: _weights(sae) | activity[name] for name, sae in saes.items()}


def _weights(sae: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        part: feature_redundancy(sae, part=part, progress=False).to_dict() for part in ("decoder", "encoder")
    }
    n = getattr(sae.cfg, "n_experts", None)
    if n is not None:
        one = expert_similarity(sae, pairs=min(PAIRS, n * (n - 1)), progress=False)
        lists = ("intra_shares", "pair_experts", "pair_shares")
        if sae.expert_scale.any():
            found["omega"] = sae.expert_scale.tolist()
        found["experts"] = {key: value for key, value in one.to_dict().items() if key not in lists}
    return found


def _activity(
    saes: Mapping[str, Any], model: Any, tokens: torch.Tensor, batch_size: int
) -> dict[str, dict[str, Any]]:
    """Overlaps and the experts' use, on all tokens and on those that look like verbs."""
    keep = chosen_tokens(tokens, model)
    sets = {"all": keep, "verbs": chosen_tokens(tokens, model, verb_like)}
    overlaps = {
        (name, which): OverlapCounter(sae.cfg.d_sae, int(inside.sum()))
        for name, sae in saes.items()
        for which, inside in sets.items()
    }
    uses = {
        (name, which): ExpertCounter(sae.cfg.d_sae, sae.cfg.n_experts)
        for name, sae in saes.items()
        for which in sets
        if hasattr(sae.cfg, "n_experts")
    }
    for one in read_token_set(saes, model, tokens, keep, batch_size=batch_size, progress="redundancy"):
        for which, inside in sets.items():
            some = one.among(inside)
            overlaps[one.name, which].add(some.latents, some.n)
            if some.experts is not None:
                uses[one.name, which].add_selected(some.experts)
    found: dict[str, dict[str, Any]] = {name: {"similarity": {}, "use": {}} for name in saes}
    for (name, which), overlap in overlaps.items():
        found[name]["similarity"][which] = overlap.result().to_dict()
    for (name, which), use in uses.items():
        found[name]["use"][which] = use.result().to_dict()
    return found
