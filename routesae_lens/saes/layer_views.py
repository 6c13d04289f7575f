"""One layer of a RouteSAE as an ordinary SAELens SAE, for tools that have never heard of RouteSAEs.

A *layer view* stands for p = 1 and every token: it reads the model's raw activations at one routed layer,
whether or not the router would send a token there, and never scales them by the router's probability.
``analysis.compare_views`` measures what that changes. The views inside a splice
(``splice/layer_view.py``) are another thing: they read what is already standardised, and routed tokens only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEConfig, SAEMetadata
from torch import nn
from tqdm.auto import tqdm

from routesae_lens.hook_points import check_layers
from routesae_lens.saes.route_sae import RouteSAE

NOTE = (
    "One layer of a RouteSAE without its router: it encodes every token at this layer, unscaled (p = 1). The "
    "RouteSAE itself encodes a token at the one layer that its router chooses, times the router's probability "
    "p where routing is 'hard'. routesae_lens.compare_views(sae, model, tokens) measures the difference."
)


def layer_view(sae: RouteSAE, layer: int, hook_name: str | None = None) -> SAE[Any]:
    """One routed layer as an ordinary SAELens SAE, for tools that know SAELens and nothing of routing.

    The view stands for p = 1 and every token: it reads the model's raw activations at this layer, whether or
    not the router would send a token there, unscaled. ``metadata.layer_view`` records that.

    Standardisation becomes SAELens' ``normalize_activations="layer_norm"``. It adds 1e-5 to the standard
    deviation s where this package adds 1e-6, and undoes s alone: input and output differ by a relative 9e-6 / s
    and 1e-6 / s (on SmolLM2, s around 5: latents up to 7 by 1e-5). In bfloat16 it computes the statistics in
    bfloat16, not in float32. As everywhere in SAELens, ``decode`` then needs the ``encode`` before it, which
    leaves mean and s behind.

    The view has the RouteSAE's very parameters: training or editing one changes both, and so does folding
    (``fold_W_dec_norm``). What replaces parameters (``load_state_dict(assign=True)``) or records dtype and
    device beside them (``.to``) reaches one only; ask for a new view after it, which costs nothing. With
    ``layer_scale`` the layer's factor, and decoder norms with it, are folded into copies: nothing is shared.

    Args:
        sae: an inference RouteSAE.
        layer: block number.
        hook_name: for ``metadata.hook_name``, if not the TransformerLens name ``blocks.<layer>.<site>``.

    Returns:
        an SAE of class ``sae.shared_class``, in training or evaluation mode as ``sae`` is.

    Raises:
        ValueError: the layer is not routed, or ``relu=False``, which no stock class can represent.
    """
    index = _index(sae, layer)
    if getattr(sae.cfg, "relu", True) is False and not hasattr(sae.shared_config, "relu"):
        raise ValueError(
            f"this {type(sae).__name__} has relu=False: its latents may be negative, which a stock "
            f"{sae.shared_class.__name__} sets to zero. No layer view of it would be exact; use the RouteSAE itself"
        )
    factor = sae.router_log_scale[index].exp().item() if sae.cfg.layer_scale else 1.0
    cfg = stock_config(sae, _metadata(sae, layer, hook_name, factor))
    if sae.cfg.standardize:
        cfg.normalize_activations = "layer_norm"
    view = sae.shared_class(cfg)
    for name, _ in list(view.named_parameters()):
        setattr(view, name, sae.get_parameter(name))
    for name, buffer in sae.named_buffers():
        if name in view._buffers:
            setattr(view, name, buffer)
    cfg.device = sae.cfg.device
    view.device, view.dtype = sae.device, sae.dtype
    if sae.cfg.layer_scale:
        _fold(view, factor)
    return view.train(sae.training)


def stock_config(sae: RouteSAE, metadata: SAEMetadata) -> SAEConfig:
    """The config of the stock SAE that ``sae`` shares between layers, on the meta device.

    There the weights of an SAE made from it cost nothing until they are replaced.
    """
    given = {field.name: getattr(sae.cfg, field.name) for field in fields(sae.shared_config)}
    given |= {"d_in": sae.cfg.d_model, "device": "meta", "metadata": metadata}
    return sae.shared_config(**given)


def save_layer_views(sae: RouteSAE, path: str | Path, layers: Sequence[int] | None = None) -> dict[int, Path]:
    """Write :func:`layer_view` of ``layers``, one SAELens folder each, whole or not at all.

    ``SAE.load_from_disk(folder)`` reads one where this package is not installed. Every folder holds all
    weights, so they take the RouteSAE's size times the number of layers.

    Args:
        sae: an inference RouteSAE.
        path: folder that gets ``blocks.<layer>.<site>/`` for every layer; what else is in it stays.
        layers: block numbers, all routed ones by default.

    Returns:
        The folder of each layer.

    Raises:
        ValueError: as for :func:`layer_view`, a shared SAE that SAELens does not have, or such a folder is there
            already; nothing is written then.
    """
    path = Path(path)
    if not sae.shared_class.__module__.startswith("sae_lens."):
        raise ValueError(
            f"views of a {type(sae).__name__} are {sae.shared_class.__name__}s, which SAELens does not have: nothing "
            "could read them without this package. Save the SAE itself, or use layer_view"
        )
    chosen = sae.layers if layers is None else check_layers(layers)
    views = {layer: layer_view(sae, layer) for layer in chosen}  # a refusal comes before anything is written
    folders = {layer: path / str(view.cfg.metadata.hook_name) for layer, view in views.items()}
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; layer views need a folder")
    if taken := [str(folder) for folder in folders.values() if folder.exists()]:
        raise ValueError(f"already there, and not overwritten: {', '.join(taken)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        for layer, view in tqdm(views.items(), desc="layer views", unit="layer"):
            view.save_model(partial / folders[layer].name)
        if path.exists():
            for folder in folders.values():
                (partial / folder.name).rename(folder)
        else:
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folders


def _index(sae: RouteSAE, layer: int) -> int:
    if isinstance(layer, bool) or layer not in sae.layers:
        raise ValueError(f"layer {layer!r} is not among the routed blocks {sae.layers}")
    return sae.layers.index(layer)


def _metadata(sae: RouteSAE, layer: int, hook_name: str | None, factor: float) -> SAEMetadata:
    metadata = dict(sae.cfg.metadata.items())
    # Trained on a Hugging Face model the SAE knows its blocks by another name. The tools that read views know
    # TransformerLens' names, and SAELens would load the class that is recorded here and look for them in it.
    if hook_name is None and metadata.get("model_class_name") == "AutoModelForCausalLM":
        metadata["model_class_name"] = "HookedTransformer"
    metadata["hook_name"] = f"blocks.{layer}.{sae.cfg.site}" if hook_name is None else hook_name
    metadata["layer_view"] = {
        "architecture": sae.cfg.architecture(),
        "layer": layer,
        "layers": list(sae.layers),
        "routing": sae.cfg.routing,
        "p": 1.0,
        "tokens": "every token",
        "layer_scale": factor,
        "note": NOTE,
    }
    return SAEMetadata(**metadata)


@torch.no_grad()
def _fold(view: SAE[Any], factor: float) -> None:
    """Take a factor on the standardised input, undone after decoding, into copies of the weights."""
    for name, parameter in list(view.named_parameters()):
        setattr(view, name, nn.Parameter(parameter.detach().clone()))
    if getattr(view.cfg, "rescale_acts_by_decoder_norm", False):
        # The factor changes the decoder's norms, in whose units such an SAE gives its latents.
        view.fold_W_dec_norm()
        view.cfg.rescale_acts_by_decoder_norm = False
    normalize = view.cfg.normalize_activations
    view.fold_activation_norm_scaling_factor(factor)
    view.cfg.normalize_activations = normalize  # SAELens takes it for the scale that has just been folded
