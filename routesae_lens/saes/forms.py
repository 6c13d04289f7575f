"""The same SAE in another form: a training SAE at inference, a RouteSAE behind another routing rule."""

from __future__ import annotations

from typing import Any

from sae_lens import SAE, TrainingSAE

from routesae_lens.saes.route_sae import RouteSAE


def inference_form(sae: TrainingSAE[Any], scaling_factor: float | None = None) -> SAE[Any]:
    """The inference SAE that ``sae.save_inference_model`` would write, without going through the disk.

    Args:
        sae: any SAELens training SAE; it is left untouched.
        scaling_factor: input scale of a run in progress under ``expected_average_only_in``, to be folded.
    """
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    cfg_dict = sae.cfg.get_inference_sae_cfg_dict()
    device, cfg_dict["device"] = cfg_dict["device"], "meta"
    inference: SAE[Any] = SAE.from_dict(cfg_dict)
    inference.cfg.device = device
    inference.process_state_dict_for_loading(state)
    inference.load_state_dict(state, assign=True)
    inference = inference.to(device=device, dtype=sae.dtype)
    if scaling_factor is not None:
        inference.fold_activation_norm_scaling_factor(scaling_factor)
    return inference.eval()


def with_routing(
    sae: SAE[Any], routing: str, *, fixed_layer: int | None = None, route_seed: int = 0
) -> RouteSAE:
    """The same shared SAE behind another routing rule; parameters are shared, not copied.

    Serves questions such as: what would this dictionary cost at one fixed layer, at a random one, at the one it
    reconstructs best ("oracle")? All of them read the activation unscaled; a RouteSAE trained with
    ``routing="hard"`` has seen it times p.

    Raises:
        ValueError: not an inference RouteSAE, or a rule with a learned router that ``sae`` does not have.
    """
    if not isinstance(sae, RouteSAE):
        raise ValueError(f"expected an inference RouteSAE, got {type(sae).__name__} (inference_form(sae)?)")
    cfg = sae.cfg.to_dict() | {"routing": routing, "fixed_layer": fixed_layer, "route_seed": route_seed}
    cfg["device"] = "meta"
    other = SAE.from_dict(cfg)
    assert isinstance(other, RouteSAE)
    other.cfg.device = sae.cfg.device
    theirs = dict(sae.named_parameters())
    for name, _ in list(other.named_parameters()):
        if name not in theirs:
            raise ValueError(
                f"routing={routing!r} needs {name}, which an SAE trained with {sae.cfg.routing!r} lacks"
            )
        setattr(other, name, theirs[name])
    for name, buffer in sae.named_buffers():
        setattr(other, name, buffer)
    other.use_error_term = sae.use_error_term
    return other.train(sae.training)
