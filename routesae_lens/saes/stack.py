"""What every SAE on a multi-layer hook point shares: its layers, and their standardised activations."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
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
from routesae_lens.saes.router import Standardized, standardize


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
        if stack.shape[-1] != self.cfg.d_in:
            raise ValueError(
                f"expected a stack of {self.cfg.n_layers} layers x d_model {self.cfg.d_model} = {self.cfg.d_in} "
                f"in the last dimension, got shape {tuple(stack.shape)}. Read it from the hook point that "
                "sae.mount(model) returns."
            )
        layers = split_layers(stack.to(self.dtype), self.cfg.n_layers)
        return standardized_once(stack, layers).x if self.cfg.standardize else layers

    def fold_activation_whitening(
        self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor
    ) -> None:
        raise NotImplementedError(
            f"a {type(self).__name__} reads several layers; one whitening matrix cannot be folded into it"
        )


class _Memo:
    """The last standardised stack: many SAEs read the same one in a training step."""

    source: weakref.ref[Tensor] | None = None
    key: Any = None
    result: Standardized | None = None

    def forget(self, source: Any) -> None:
        if self.source is source:
            self.source = self.key = self.result = None


_memo = _Memo()


def standardized_once(
    stack: Float[Tensor, "*batch stacked"], layers: Float[Tensor, "*batch layer d_model"]
) -> Standardized:
    """``standardize(layers)``, remembered for as long as the very same ``stack`` lives unchanged.

    Gradients through the stack are kept: a stack that needs them is standardised anew.
    """
    if stack.requires_grad or torch.compiler.is_compiling():
        return standardize(layers)
    known = _memo.source() if _memo.source is not None else None
    key = (stack._version, stack.data_ptr(), layers.shape, layers.dtype)
    if known is not stack or _memo.key != key or _memo.result is None:
        _memo.result = None  # before the next one is made: they are large
        result = standardize(layers)
        _memo.source, _memo.key, _memo.result = weakref.ref(stack, _memo.forget), key, result
    return _memo.result
