"""Llama Scope's four positions (section 3.2), trained for many layers in one pass of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import check_layers, layer_hook_name
from routesae_lens.saes.k_annealing import AnnealedTopKTrainingSAEConfig
from routesae_lens.saes.transcoder import TopKTranscoderTrainingSAEConfig
from routesae_lens.training.presets import PRESETS

TRANSCODER = "TC"
POSITION_SITES = {"R": "hook_resid_post", "A": "hook_attn_out", "M": "hook_mlp_out"}
"""Where the SAEs read: the residual stream after the block, and what attention and MLP add to it."""
POSITIONS = (*POSITION_SITES, TRANSCODER)
"""All four; "TC" is a transcoder, from what the MLP reads to what it adds."""


def scope_configs(
    model: Any,
    layers: Sequence[int],
    positions: Sequence[str] | str = POSITIONS,
    *,
    d_sae: int,
    k: int,
    skip: bool = False,
    k_start: int | None = None,
    k_anneal_steps: int | None = None,
    k_anneal: Any = "linear",
    **options: Any,
) -> dict[str, TrainingSAEConfig]:
    """Training configs of Llama Scope's recipe, by its names: ``L7R``, ``L7A``, ``L7M``, ``L7TC``.

    ``train(model, scope_configs(model, [3, 7], d_sae=..., k=...), ...)`` trains them all on the same pass.
    Every one is a TopK SAE with decoder-norm rescaling (Eq. 5), K-annealing, the initialisation of section 3.3.1,
    input scaled to mean norm sqrt(D) and no auxiliary loss; the encoder does not subtract ``b_dec`` (Eq. 4).
    SAEs are saved as SAELens' ``TopKSAE``, transcoders as its JumpReLU transcoders (``saes/transcoder.py``).

    Args:
        model: a HookedTransformer, TransformerBridge or HookedProxyLM; hook names are those that fire on it.
        layers: block numbers, 0-based, strictly increasing.
        positions: of "R", "A", "M" and "TC", or one of them.
        d_sae: width of every dictionary.
        k: latents per token.
        skip: transcoders with a skip connection.
        k_start, k_anneal_steps, k_anneal: see ``k_annealing.ScopeFields``; by default from D to k over 10 % of the
            steps of ``train``.
        options: further fields of all configs, for instance ``dtype``.

    Raises:
        ValueError: layers or positions that are not there, a k larger than ``d_sae``, or a site the model lacks.
        TypeError: a model of an unknown kind.
    """
    backend = backend_of(model)
    layers = check_layers(layers, backend.n_layers)
    wanted = [positions] if isinstance(positions, str) else list(positions)
    unknown = [position for position in wanted if position not in POSITIONS]
    if unknown or not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"positions must be some of {', '.join(POSITIONS)}, each once; got {wanted}")
    annealing = {"k_start": k_start, "k_anneal_steps": k_anneal_steps, "k_anneal": k_anneal}
    given = {"d_sae": d_sae, "k": k, **annealing, **options}
    recipe = PRESETS["llama_scope"].fields_of
    configs: dict[str, TrainingSAEConfig] = {}
    for layer in layers:
        for position in wanted:
            if position == TRANSCODER:
                cfg = TopKTranscoderTrainingSAEConfig.for_model(
                    model, layer=layer, skip=skip, **recipe(TopKTranscoderTrainingSAEConfig, **given)
                )
            else:
                cfg = AnnealedTopKTrainingSAEConfig(
                    d_in=backend.d_model,
                    metadata=SAEMetadata(hook_name=layer_hook_name(model, layer, POSITION_SITES[position])),
                    **recipe(AnnealedTopKTrainingSAEConfig, **given),
                )
            configs[f"L{layer}{position}"] = cfg
    return configs
