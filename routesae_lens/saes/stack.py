"""What every SAE on a multi-layer hook point shares: its layers, and their standardised activations."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from torch import Tensor

from routesae_lens.hook_points import (
    SITES,
    backend_of,
    check_layers,
    default_layers,
    mount_layers,
    split_layers,
    stack_name,
)
from routesae_lens.saes.layers import Layers
from routesae_lens.saes.row_error import SMALLEST, row_error


@dataclass(kw_only=True)
class StackFields:
    """Config fields of every SAE that reads several layers; ``d_in`` is ``len(layers) * d_model``.

    Args:
        layers: block numbers that are read, strictly increasing.
        site: which activation of a block, see ``hook_points.SITES``.
        standardize: standardise each token's activation per layer, as the RouteSAE authors do.
    """

    layers: list[int]
    site: str = "hook_resid_post"
    standardize: bool = True
    metadata: Any = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        if isinstance(self.metadata, dict):  # as SAEConfig.from_dict hands it over
            self.metadata = SAEMetadata(**self.metadata)
        super().__post_init__()  # type: ignore[misc]
        cfg: Any = self
        for given in fields(cfg):
            value = getattr(cfg, given.name)
            if isinstance(given.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{given.name} must be True or False, got {value!r}")
            if given.type in (int, "int") and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{given.name} must be an integer, got {value!r}")
        if cfg.d_in < 1 or cfg.d_sae < 1:
            raise ValueError(f"d_in and d_sae must be positive, got {cfg.d_in} and {cfg.d_sae}")
        self.layers = check_layers(self.layers)
        self._check_known(site=SITES)
        if cfg.d_in % self.n_layers:
            raise ValueError(
                f"d_in must be len(layers) * d_model: {cfg.d_in} is not a multiple of {self.n_layers} layers"
            )
        if self.standardize and self.d_model < 2:
            raise ValueError(f"standardize=True needs a d_model of 2 or more, got {self.d_model}")
        if cfg.normalize_activations not in ("none", "expected_average_only_in"):
            raise ValueError(
                f"normalize_activations={cfg.normalize_activations!r} does not work on a stack of layers; "
                "expected 'none' (with standardize=True) or 'expected_average_only_in'"
            )
        if cfg.reshape_activations != "none":
            raise ValueError(
                f"reshape_activations={cfg.reshape_activations!r} does not work on a stack of layers"
            )
        k = getattr(cfg, "k", None)
        if k is not None and not 0 < k <= cfg.d_sae:
            raise ValueError(f"k must be between 1 and d_sae = {cfg.d_sae}, got {k}")
        if cfg.metadata.hook_name is None:
            cfg.metadata.hook_name = stack_name(self.layers, self.site)

    def _check_known(self, **tables: Any) -> None:
        for name, known in tables.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def d_model(self) -> int:
        return self.d_in // self.n_layers  # type: ignore[attr-defined]

    @classmethod
    def for_model(cls, model: Any, *, layers: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """A config whose ``d_in`` fits ``model``; ``layers`` defaults to 1/4 to 3/4 of its depth."""
        backend = backend_of(model)
        layers = check_layers(
            default_layers(backend.n_layers) if layers is None else layers, backend.n_layers
        )
        cfg = cls(d_in=len(layers) * backend.d_model, layers=layers, **kwargs)  # type: ignore[call-arg]
        cfg.metadata.hook_name = stack_name(layers, cfg.site, backend.blocks_path)
        return cfg


class StackSAE(SAE[Any]):
    """Common base of the SAEs whose input is the stack of a multi-layer hook point."""

    cfg: Any

    @property
    def layers(self) -> list[int]:
        """Block numbers that are read, in the order of the stack."""
        return self.cfg.layers

    def mount(self, model: Any) -> str:
        """Mount this SAE's multi-layer hook point on ``model`` (if it is not there) and return its name.

        Raises:
            ValueError: the model lacks the layers or the site, or has another d_model.
        """
        backend = backend_of(model)
        if backend.d_model != self.cfg.d_model:
            raise ValueError(
                f"this {type(self).__name__} was made for d_model = {self.cfg.d_model} ({self.cfg.n_layers} "
                f"layers, d_in = {self.cfg.d_in}); the model has d_model = {backend.d_model}"
            )
        return mount_layers(model, self.layers, self.cfg.site)

    def split(self, stack: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "*batch layer d_model"]:
        """The layers of a stack, standardised where the config says so.

        Raises:
            ValueError: the last dimension is not ``len(layers) * d_model``.
        """
        return self.layers_of(stack).x

    def layers_of(self, stack: Float[Tensor, "*batch stacked"]) -> Layers:
        """What :meth:`split` gives, computed on demand.

        Raises:
            ValueError: the last dimension is not ``len(layers) * d_model``.
        """
        if stack.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"expected a stack of {self.cfg.n_layers} layers x d_model {self.cfg.d_model} = {self.cfg.d_in} "
                f"in the last dimension, got shape {tuple(stack.shape)}. Read it from the hook point that "
                "sae.mount(model) returns."
            )
        return layers_once(stack, self.dtype, self.cfg.n_layers, self.cfg.standardize)

    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(
            f"a {type(self).__name__} reads several layers; one whitening matrix cannot be folded into it"
        )


@dataclass(kw_only=True)
class StackTrainingFields(StackFields):
    """Training fields on top of :class:`StackFields`.

    Args:
        loss: "normalized_mse" divides the squared error by ||x||^2 per token (the RouteSAE authors' code);
            "mse" does not (Eq. 12).
    """

    loss: Literal["normalized_mse", "mse"] = "normalized_mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_known(loss=("normalized_mse", "mse"))


class StackTrainingSAE(StackSAE, TrainingSAE[Any]):
    """Common base of their training forms: the reconstruction loss, and SAELens' other losses on its scale."""

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.mse_loss_fn = self._reconstruction_loss  # SAELens sets its own on every construction

    def _reconstruction_loss(
        self, preds: Float[Tensor, "*batch d"], target: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        target = self._target(target)
        error = (preds - target).pow(2)
        if self.cfg.loss == "mse":
            return error
        return error / target.pow(2).sum(-1, keepdim=True).clamp_min(SMALLEST)

    def _mean_error(
        self, preds: Float[Tensor, "batch d"], x: Float[Tensor, "batch d"], scale: Tensor | None
    ) -> Float[Tensor, ""]:
        # (neither a class's nor an instance's own)
        if self.mse_loss_fn != StackTrainingSAE._reconstruction_loss.__get__(self):
            return super()._mean_error(preds, x, scale)
        target = self._target(x)
        known = scale if target.requires_grad else None
        target = target if scale is None else target.detach()
        return row_error(preds, target, known, normalized=self.cfg.loss == "normalized_mse").mean()

    def _target(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What reconstructions are compared with: ``x`` itself, detached or not."""
        return x

    def _input_norm(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """What losses of first order are divided by: ||x||, or 1 for the plain MSE.

        It keeps its gradient where the target does: as a constant it would reward a router for shrinking p.
        """
        if self.cfg.loss == "mse":
            return torch.ones_like(x[..., :1])
        return self._target(x).norm(dim=-1, keepdim=True).clamp_min(1e-6)

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """SAELens' auxiliary losses, on the scale of the reconstruction loss."""
        if getattr(self.cfg, "aux_loss_coefficient", None) == 0:
            return {}  # SAELens would compute it and multiply by zero
        if self.cfg.loss == "mse":
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        norm = self._input_norm(step_input.sae_in)
        return self._normalized_aux_loss(step_input, feature_acts, hidden_pre, sae_out, norm)

    def _normalized_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
        norm: Float[Tensor, "*batch 1"],
    ) -> Tensor | dict[str, Tensor]:
        """Auxiliary losses with squared errors divided per token by ||x||^2 and L1 by ||x||.

        This default serves losses that are homogeneous in the activations: scaling what goes in is enough.
        """
        return super().calculate_aux_loss(
            replace(step_input, sae_in=step_input.sae_in / norm),
            feature_acts if feature_acts.is_sparse else feature_acts / norm,
            hidden_pre / norm,
            sae_out / norm,
        )


class _Known(NamedTuple):
    source: weakref.ref[Tensor]
    key: Any
    layers: Layers


class _Memo:
    """The layers of the last stack: many SAEs read the same one in a training step.

    They are one attribute, so that a thread sees those of another stack or its own, and never half of each.
    """

    known: _Known | None = None

    def forget(self, source: Any) -> None:
        if self.known is not None and self.known.source is source:
            self.known = None


_memo = _Memo()


def layers_once(
    stack: Float[Tensor, "*batch stacked"], dtype: torch.dtype, n_layers: int, standardized: bool
) -> Layers:
    """The :class:`Layers` of ``stack``, the same object for as long as the very same stack lives unchanged (and
    nothing they gave out was edited in place, as hooks do).

    They are made anew for a stack that needs gradients, and in inference mode (no version counter, and what is
    made there is of no use outside).
    """
    anew = torch.compiler.is_compiling() or stack.requires_grad
    if anew or stack.is_inference() or torch.is_inference_mode_enabled():
        return Layers(split_layers(stack.to(dtype), n_layers), standardized=standardized)
    known, key = _memo.known, (stack._version, stack.data_ptr(), dtype, n_layers, standardized)
    if known and known.source() is stack and known.key == key and not known.layers.edited:
        return known.layers
    _memo.known = known = None  # before the next one is made: what they hold is large
    # (a view would keep the stack alive; .data does not)
    layers = Layers(split_layers(stack.data.to(dtype), n_layers), standardized=standardized)
    _memo.known = _Known(weakref.ref(stack, _memo.forget), key, layers)
    return layers
