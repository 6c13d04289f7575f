"""The five parts of the Llama Scope recipe that train and measure. Each skips what is there already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from llama_scope_study import SCOPE, Study
from sae_lens.saes.transcoder import JumpReLUTranscoder
from tqdm.auto import tqdm

import routesae_lens as rl
from routesae_lens.analysis.feature_map import feature_map
from routesae_lens.analysis.firing import firing_frequencies
from routesae_lens.analysis.generalisation import LongDocuments, evaluate_by_position, long_documents
from routesae_lens.analysis.geometry import best_matches, cosine_bound, decoder_directions
from routesae_lens.analysis.jumprelu import to_jumprelu
from routesae_lens.analysis.match_distribution import match_distribution
from routesae_lens.analysis.model_comparison import compare_models
from routesae_lens.analysis.prompts import conversation_tokens
from routesae_lens.saes.transcoder import calibrate
from routesae_lens.training.positions import scope_configs

NARROW = "annealed-seed0"
WIDE, ROUTE, CROSSCODER = "wide-seed100", "route-seed100", "crosscoder-seed100"
OWN_SEED = 100
"""Of those three. With a seed of the others they would start from (some of) the same decoder rows, and a short training
leaves rows near their start: best matches would show the initialisation."""
OTHERS = (WIDE, "fixed-seed1", "annealed-seed1", ROUTE, CROSSCODER)
"""Dictionaries whose latents look for a match in the narrow one; none has its initial weights."""
FEATURE_THRESHOLD = 5.0
"""For inputs of norm sqrt(2048); a context counts from a ninth of the input's length on."""
RARE = 0.01
"""A feature that is shown on the map fires on no larger share of the tokens."""


# --- 1. K-annealing (figure 12) -----------------------------------------------------------------------


def annealing(study: Study) -> None:
    """TopK with and without K-annealing; a wide TopK SAE, a RouteSAE and a Crosscoder with it."""
    s = study.settings
    one: list[tuple[str, str, list[int], int, int]] = []
    for seed in range(s.seeds):
        one.append((f"annealed-seed{seed}", "scope_topk", [study.layer], study.d_sae, seed))
        one.append((f"fixed-seed{seed}", "scope_topk_fixed_k", [study.layer], study.d_sae, seed))
    one.append((WIDE, "scope_topk", [study.layer], study.wide, OWN_SEED))
    one.append((ROUTE, "route", study.route_layers, study.d_sae, OWN_SEED))
    one.append((CROSSCODER, "crosscoder_topk", study.layers, study.d_sae, OWN_SEED))
    if study.run("annealing").get("status") != "finished":
        configs = {}
        for name, method, layers, width, seed in one:
            given = {} if method.startswith("scope") else _scope_fields(method)
            configs[name] = rl.make_config(method, study.model, layers, width, s.k, seed, **given)
        study.train("annealing", configs, {name: seed for name, _, _, _, seed in one}, s.tokens)
    if study.done("annealing") is None:
        with study.timed("annealing", "evaluation"):
            saes = {name: study.load(f"annealing/{name}") for name in study.names("annealing")}
            found = study.evaluate(saes, study.tokens("held_out", s.eval_tokens))
            about = {
                name: {"method": method, "layers": layers, "d_sae": width, "seed": seed}
                for name, method, layers, width, seed in one
            }
            study.write("annealing", {"saes": about, "evaluations": found})


def _scope_fields(method: str) -> dict[str, Any]:
    config = rl.METHODS[method].config
    assert config is not None
    return SCOPE.fields_of(config)


# --- 2. Four positions (figure 10) --------------------------------------------------------------------


def positions(study: Study) -> None:
    """Residual stream, attention output, MLP output and transcoder of three blocks."""
    s = study.settings
    if study.run("positions").get("status") != "finished":
        configs = scope_configs(study.model, study.layers, d_sae=study.d_sae, k=s.k)
        study.train("positions", configs, dict.fromkeys(configs, 0), s.position_tokens)
    if study.done("positions") is None:
        with study.timed("positions", "evaluation"):
            saes: dict[str, Any] = {
                name: study.load(f"positions/{name}") for name in study.names("positions")
            }
            thresholds = _calibrated(study, saes)
            found = study.evaluate(saes, study.tokens("held_out", s.eval_tokens))
            study.write("positions", {"evaluations": found, "thresholds": thresholds})


def _calibrated(study: Study, saes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Gives each transcoder the threshold at which k latents are active on the calibration tokens: a short run's own
    follows them too slowly."""
    s = study.settings
    transcoders = {name: sae for name, sae in saes.items() if isinstance(sae, JumpReLUTranscoder)}
    if not transcoders:
        return {}
    subjects = rl.subjects_of(transcoders, study.model)
    tokens = study.tokens("calibration", s.calibration_tokens)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in transcoders}
    for batch in rl.read_batches(
        subjects, study.model, tokens, batch_size=s.eval_batch_size, progress="calibrate"
    ):
        for name, subject in subjects.items():
            inputs[name].append(batch.read(subject).x[batch.keep].to(transcoders[name].dtype))
    told = {}
    for name, sae in transcoders.items():
        followed = float(sae.threshold.detach().mean())
        found = calibrate(sae, partial(iter, inputs[name]), float(s.k), tolerance=s.tolerance)
        told[name] = {"followed_in_training": followed, "calibrated": found.value, "l0": found.l0}
    return told


# --- 3. TopK to JumpReLU (figure 11) ------------------------------------------------------------------


def conversion(study: Study) -> None:
    """Every SAE of the first part with one threshold in TopK's place, measured before and after."""
    s = study.settings
    if study.done("conversion") is not None:
        return
    names = study.names("annealing")
    with study.timed("conversion", "thresholds"):
        for name in tqdm(names, desc="conversion", unit="SAE"):
            if study.done(f"conversion/{name}") is None:
                found = to_jumprelu(
                    study.load(f"annealing/{name}"),
                    study.model,
                    study.tokens("calibration", s.calibration_tokens),
                    tolerance=s.tolerance,
                    batch_size=s.eval_batch_size,
                    progress=False,
                )
                found.sae.save_model(study.output / "conversion" / name)
                study.write(f"conversion/{name}", found.to_dict())
    with study.timed("conversion", "evaluation"):
        before = study.done("annealing")
        assert before is not None
        saes = {name: study.load(f"conversion/{name}") for name in names}
        after = study.evaluate(saes, study.tokens("held_out", s.eval_tokens))
        study.write(
            "conversion",
            {
                name: {
                    "threshold": study.done(f"conversion/{name}"),
                    "before": before["evaluations"][name],
                    "after": after[name],
                }
                for name in names
            },
        )


# --- 4. Generalisation (figures 4, 5 and 6) -----------------------------------------------------------


def generalisation(study: Study) -> None:
    """Firing frequencies, positions beyond the training's, chats, and another model where one is given."""
    stages: dict[str, Callable[[Study], dict[str, Any]]] = {
        "firing": _firing, "long": _long, "chat": _chat, "models": _models,
    }  # fmt: skip
    for name, measure in stages.items():
        if study.done(f"generalisation/{name}") is None:
            with study.timed("generalisation", name):
                study.write(f"generalisation/{name}", measure(study))


def _firing(study: Study) -> dict[str, Any]:
    """Of the TopK SAEs, as in the paper."""
    s = study.settings
    saes = {name: study.load(f"annealing/{name}") for name in study.names("annealing")}
    found = firing_frequencies(
        saes,
        study.model,
        study.tokens("held_out", s.firing_tokens),
        window=s.firing_tokens,
        batch_size=s.eval_batch_size,
    )
    return {name: one.to_dict() for name, one in found.items()}


def _jumprelu(study: Study) -> dict[str, Any]:
    """The SAEs that are judged away from the training text: with a threshold, so that L0 can change."""
    names = [name for name in study.names("annealing") if not name.startswith("fixed")]
    return {name: study.load(f"conversion/{name}") for name in names}


def _long(study: Study) -> dict[str, Any]:
    s = study.settings
    length = s.context_size * s.long_factor

    enough = (
        text for text in study.untrained_documents() if len(text) >= length
    )  # a token has a character or more
    try:
        found = long_documents(study.model, enough, length=length)
        rows, about = found.tokens[: s.long_rows], {"long_documents": len(found.tokens), "joined": False}
    except ValueError as error:
        if "documents have" not in str(error):
            raise
        # No document is long enough: joined ones show what the position does, not what a long text does.
        rows = rl.held_out_tokens(
            study.model, study.held_out_documents, n_sequences=s.long_rows, context_size=length
        )
        about = {"long_documents": 0, "joined": True}
    assert isinstance(rows, torch.Tensor)
    profiles = evaluate_by_position(_jumprelu(study), study.model, rows, training_length=s.context_size)
    return {**about, "rows": len(rows), "saes": {name: one.to_dict() for name, one in profiles.items()}}


def _chat(study: Study) -> dict[str, Any]:
    """The same documents as plain text and as the assistant's answer in a chat, cut to the same length."""
    s = study.settings
    if getattr(study.model.tokenizer, "chat_template", None) is None:
        return {"skipped": "the tokenizer has no chat template"}
    texts = [text for text in study.held_out_documents if len(study.ids(text)) >= s.context_size]
    texts = texts[: s.chats]
    if not texts:
        return {"skipped": f"no held-out document has {s.context_size} tokens"}
    plain: LongDocuments = long_documents(study.model, texts, length=s.context_size)
    chats = conversation_tokens(study.model, texts, context_size=s.context_size)
    saes = _jumprelu(study)
    return {
        "plain": study.evaluate(saes, plain.tokens),
        "chat": study.evaluate(saes, chats.tokens, exclude_special_tokens=chats.exclude),
        "counts": chats.to_dict(),
    }


def _models(study: Study) -> dict[str, Any]:
    s = study.settings
    if s.base_model is None:
        return {"skipped": "no --base-model was given"}
    other = rl.load_model(s.base_model, device=study.device, dtype=s.dtype)
    found = compare_models(
        _jumprelu(study),
        {"trained on": study.model, "relative": other},
        study.tokens("held_out", s.eval_tokens),
        batch_size=s.eval_batch_size,
        zero_ablation=False,
    )
    return found.to_dict()


# --- 5. Geometry (figures 7 and 8) --------------------------------------------------------------------


def geometry(study: Study) -> None:
    """Best matches of dictionaries in the first annealed one, and a map of one feature's neighbours."""
    if study.done("geometry") is not None:
        return
    names = study.names("annealing")
    with study.timed("geometry", "matches"):
        home = _directions(study, NARROW)
        others = [name for name in OTHERS if name in names]
        for name in others:
            if study.done(f"geometry/{name}") is None:
                found = match_distribution(_directions(study, name), home, names=(name, NARROW))
                study.write(f"geometry/{name}", found.to_dict())
    with study.timed("geometry", "map"):
        neighbourhood = _map(study)
    distributions = {name: study.done(f"geometry/{name}") for name in others}
    study.write("geometry", {"distributions": distributions, "map": neighbourhood})


def _directions(study: Study, name: str) -> torch.Tensor:
    sae = study.load(f"conversion/{name}")
    crosscoder = name.startswith("crosscoder")
    return decoder_directions(sae, layer=study.layer if crosscoder else None)


def _map(study: Study) -> dict[str, Any]:
    """The map of the feature that most latents of the wide dictionary match best; ties go to the lower number."""
    s = study.settings
    few, many = s.neighbours
    around = {NARROW: few, "fixed-seed1": few, WIDE: many}
    names = [name for name in around if name in study.names("annealing")]
    dictionaries = {name: _directions(study, name) for name in names}
    features = rl.collect_features(
        {name: study.load(f"conversion/{name}") for name in dictionaries},
        study.model,
        study.tokens("held_out", s.feature_tokens),
        threshold=FEATURE_THRESHOLD,
        batch_size=s.eval_batch_size,
    )
    matches = best_matches(dictionaries[WIDE], dictionaries[NARROW])
    bound = min(cosine_bound(study.wide, study.sizes.d_model), 0.999)
    children = Counter(matches.latents[matches.cosines >= bound].tolist())
    known = [
        one.id
        for one in features[NARROW].features
        if one.firing_frequency <= RARE and any(any(map(str.isalpha, token)) for token in one.tokens)
    ]
    candidates = known or list(children) or [0]
    chosen = max(candidates, key=lambda latent: (children[latent], -latent))
    about = {
        "dictionary": NARROW,
        "latent": chosen,
        "children": children[chosen],
        "cosine": bound,
        "candidates": len(known),
    }
    try:
        found = feature_map(
            dictionaries,
            {name: around[name] for name in names},
            dictionary=NARROW,
            latent=chosen,
        )
    except ImportError as error:
        return about | {"skipped": str(error)}
    tokens = {name: {one.id: one.tokens[:4] for one in each.features} for name, each in features.items()}
    points = [
        {"dictionary": p.dictionary, "latent": p.latent, "tokens": tokens[p.dictionary].get(p.latent, [])}
        for p in found.points
    ]
    return about | {"map": found.to_dict(), "tokens": points}


RUN: dict[str, Callable[[Study], None]] = {
    "annealing": annealing,
    "positions": positions,
    "conversion": conversion,
    "generalisation": generalisation,
    "geometry": geometry,
}
