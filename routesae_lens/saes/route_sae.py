"""RouteSAE: a router in front of one of SAELens' SAEs.

A RouteSAE reads the stack of a multi-layer hook point (``hook_points.py``), picks for every token the
layer whose activation is encoded (``router.py``), and is otherwise the SAELens SAE it inherits from. Here
is what all of them share; ``architectures.py`` has the SAEs themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from sae_lens import (
    SAE,
)
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainStepInput,
    TrainStepOutput,
    _disable_hooks,
)
from torch import Tensor, nn

from routesae_lens.saes.distillation import distill, route_metrics, router_losses
from routesae_lens.saes.fast_topk import ScaledStepInput, decode_fast, encode_fast
from routesae_lens.saes.layers import Layers
from routesae_lens.saes.router import (
    AGGREGATORS,
    RANDOM_PER,
    ROUTINGS,
    Route,
    RoutingContext,
)
from routesae_lens.saes.stack import StackFields, StackSAE, StackTrainingFields, StackTrainingSAE


@dataclass(kw_only=True)
class RouteFields(StackFields):
    """The router's part of every RouteSAE config; ``d_in`` is ``len(layers) * d_model``.

    Args:
        layers: block numbers that are routed, strictly increasing.
        site: which activation of a block, see ``hook_points.SITES``.
        aggregator: how layers become the router's input, see ``router.AGGREGATORS``.
        routing: how a layer is chosen, see ``router.ROUTINGS``.
        fixed_layer: the block number for ``routing="fixed"``.
        random_per: for ``routing="random"``, one layer per "token" or per "batch".
        route_seed: seed of ``routing="random"``.
        layer_scale: learn one factor per layer on the activation that is read (1 at the start); it is undone
            after decoding.
        standardize: standardise each token's activation per layer, as the authors do.
    """

    aggregator: str = "sum"
    routing: str = "hard"
    fixed_layer: int | None = None
    random_per: str = "token"
    route_seed: int = 0
    layer_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_known(aggregator=AGGREGATORS, routing=ROUTINGS, random_per=RANDOM_PER)
        if self.routing == "fixed" and self.fixed_layer not in self.layers:
            raise ValueError(
                f"routing='fixed' needs fixed_layer to be one of layers {self.layers}, got {self.fixed_layer}"
            )
        if self.routing != "fixed" and self.fixed_layer is not None:
            raise ValueError(f"fixed_layer={self.fixed_layer} only goes with routing='fixed'")
        if self.layer_scale and self.routing in ("soft", "top2", "every"):
            raise ValueError(f"layer_scale needs a rule that reads one layer, not routing={self.routing!r}")


class Routed(StackSAE):
    """What training and inference RouteSAEs share: the router, and everything that sees the stack.

    ``encode`` and ``forward`` take the stack; ``encode_routed``, ``decode`` and all of SAELens' hook
    points live in the routed space of size ``d_model``.
    """

    W_router: nn.Parameter

    def initialize_weights(self) -> None:
        with _sized_for_d_model(self.cfg):  # SAELens sizes weights by d_in; the shared SAE reads d_model
            super().initialize_weights()
        if ROUTINGS[self.cfg.routing].learned:
            router = nn.Linear(
                self.cfg.d_model, self.cfg.n_layers, bias=False, dtype=self.dtype, device=self.device
            )
            self.W_router = nn.Parameter(router.weight.detach())  # (layer, d_model), Eq. 6
            for name in AGGREGATORS[self.cfg.aggregator].parameters:
                vector = torch.zeros(self.cfg.d_model, dtype=self.dtype, device=self.device)
                self.register_parameter(name, nn.Parameter(vector))
        if self.cfg.layer_scale:
            scale = torch.zeros(self.cfg.n_layers, dtype=self.dtype, device=self.device)
            self.router_log_scale = nn.Parameter(scale)

    def route(self, stack: Float[Tensor, "*batch stacked"], draw: int = 0, start: int = 0) -> Route:
        """Choose a layer for every token (Eqs. 5-9).

        Args:
            stack: activations of the routed layers side by side, ``... (layer d_model)``.
            draw: counter of the random baseline's draws; other rules ignore it.
            start: how many positions of the sequences come before the stack's; only random routing asks.

        Raises:
            ValueError: the last dimension is not ``len(layers) * d_model``.
        """
        layers = self.layers_of(stack)
        choice = ROUTINGS[self.cfg.routing].choose(
            RoutingContext(
                shape=tuple(stack.shape[:-1]),
                n_layers=self.cfg.n_layers,
                probs=lambda: self._probs(layers),
                errors=lambda: self.layer_errors(layers),
                fixed_index=self.layers.index(self.cfg.fixed_layer) if self.cfg.routing == "fixed" else None,
                random_per=self.cfg.random_per,
                seed=self.cfg.route_seed,
                draw=draw,
                start=start,
                device=stack.device,
                dtype=self.dtype,
            )
        )
        if choice.mixture is not None:
            routed = torch.einsum("...ld,...l->...d", layers.x, choice.mixture)
            # (only a scale that is all there is between constants and the input may have a gradient, see _routed)
            return Route(choice.probs, choice.layer, choice.mixture, routed, choice.scale.detach())
        return self.read_layers(layers, choice.probs, choice.layer, choice.scale)

    def read_layers(
        self,
        x: Layers | Float[Tensor, "*batch layer d_model"],
        probs: Float[Tensor, "*batch layer"],
        layer: Int[Tensor, "*batch"],
        scale: Float[Tensor, "*batch"],
    ) -> Route:
        """The route that reads ``layer`` of each token, times ``scale`` (and the layer's learned factor)."""
        if self.cfg.layer_scale:
            scale = scale * self.router_log_scale.exp()[layer]
        routed = Layers.of(x).read(layer) * scale[..., None]
        one_hot = nn.functional.one_hot(layer, self.cfg.n_layers)
        return Route(probs, layer, one_hot * scale[..., None], routed, scale)

    @torch.no_grad()
    def layer_errors(
        self, x: Layers | Float[Tensor, "*batch layer d_model"]
    ) -> Float[Tensor, "*batch layer"]:
        """Normalised error ||x - x_hat||^2 / ||x||^2 of the shared SAE on every layer's activation.

        One layer at a time, so it takes ``n_layers`` encodings but the memory of one.
        """
        layers, errors = Layers.of(x), []
        for i in range(x.shape[-2]):
            layer = layers.layer(i)
            factor = self.router_log_scale[i].exp() if self.cfg.layer_scale else 1.0
            out = self.autoencode_routed(layer * factor) / factor
            errors.append((layer - out).pow(2).sum(-1) / layer.pow(2).sum(-1).clamp_min(1e-12))
        return torch.stack(errors, dim=-1)

    def autoencode_routed(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Encode and decode in the routed space."""
        return decode_fast(self, encode_fast(self, x, self.encode_routed)).reshape(x.shape)

    def _probs(self, x: Layers | Float[Tensor, "*batch layer d_model"]) -> Float[Tensor, "*batch layer"]:
        aggregator = AGGREGATORS[self.cfg.aggregator]
        pooled = aggregator.pool(Layers.of(x), {name: getattr(self, name) for name in aggregator.parameters})
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.softmax(pooled @ self.W_router.T, dim=-1, dtype=wide).to(pooled.dtype)

    def encode(self, x: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "... d_sae"]:
        """Latents of a stack: route, then encode (Eq. 10). With ``routing="every"`` (... layer d_sae)."""
        if self.cfg.routing == "every":
            return self.encode_routed(self.split(x))
        return self.encode_routed(self.route(x).input)

    def encode_routed(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of what the shared SAE reads, ``Route.input``."""
        return super().encode(x)

    def forward(self, x: Float[Tensor, "*batch stacked"]) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction of the routed input (Eq. 11): standardised and scaled by p as ``route(x).input`` is."""
        routed = self.route(x).input
        out = self.decode(self.encode_routed(routed))
        if self.use_error_term:
            with torch.no_grad():  # the error is a constant for gradients, as in SAELens
                with _disable_hooks(self):
                    clean = self.decode(self.encode_routed(routed))
                error = self.hook_sae_error(routed - clean)
            out = out + error
        return self.hook_sae_output(out)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Fold SAELens' scalar input norm; a no-op where layers are standardised (they undo any scale)."""
        if not self.cfg.standardize:
            super().fold_activation_norm_scaling_factor(scaling_factor)
            if ROUTINGS[self.cfg.routing].learned:
                self.W_router.mul_(scaling_factor)
                for name in AGGREGATORS[self.cfg.aggregator].parameters:
                    getattr(self, name).mul_(scaling_factor)
        self.cfg.normalize_activations = "none"


class RouteSAE(Routed):
    """Common base of the routed inference SAEs: ``isinstance(sae, RouteSAE)``, ``RouteSAE.load_from_disk``."""

    shared_class: ClassVar[type[SAE[Any]]]
    """The stock SAELens class that one layer's view of this SAE is."""
    shared_config: ClassVar[type[SAEConfig]]

    def layer_view(self, layer: int, hook_name: str | None = None) -> SAE[Any]:
        """One routed layer as an ordinary SAELens SAE on the same parameters; it reads raw activations.

        It stands for p = 1 and every token. See :func:`routesae_lens.saes.layer_views.layer_view`.
        """
        from routesae_lens.saes.layer_views import layer_view

        return layer_view(self, layer, hook_name)

    def save_layer_views(self, path: str | Path, layers: Sequence[int] | None = None) -> dict[int, Path]:
        """Write :meth:`layer_view` of ``layers``, one SAELens folder each, for processes without this package.

        See :func:`routesae_lens.saes.layer_views.save_layer_views`.
        """
        from routesae_lens.saes.layer_views import save_layer_views

        return save_layer_views(self, path, layers)


@dataclass(kw_only=True)
class RouteTrainingFields(RouteFields, StackTrainingFields):
    """Training fields on top of :class:`RouteFields`.

    Args:
        balance_coefficient: of a load-balancing loss, ``n_layers * sum_l share_l * mean p_l`` (1 at balance).
        entropy_coefficient: of a loss that adds the mean entropy of the probabilities (nats); negative
            values reward entropy.
        router_warm_up_steps: both coefficients rise linearly from 0 over so many steps.
        uniform_steps: for ``routing="distilled"``: read a uniformly random layer in the first steps. None
            lets ``train`` choose 15 % of its steps; SAELens' own runners take it as 0.
        explore: for ``routing="distilled"``: share of tokens that read a random layer afterwards.
        oracle_fraction: for ``routing="distilled"``: share of each batch on which the oracle is asked. It
            costs ``n_layers`` encodings of those tokens.
    """

    balance_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    router_warm_up_steps: int = 0
    uniform_steps: int | None = None
    explore: float = 0.1
    oracle_fraction: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("explore", "oracle_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")
        for name in ("uniform_steps", "router_warm_up_steps"):
            steps = getattr(self, name)
            if steps is not None and (not isinstance(steps, int) or steps < 0):
                raise ValueError(f"{name} must be a number of steps, 0 or more; got {steps!r}")
        if (self.balance_coefficient or self.entropy_coefficient) and not ROUTINGS[self.routing].learned:
            raise ValueError(
                f"routing={self.routing!r} has no learned router that balance_coefficient or "
                "entropy_coefficient could act on"
            )


class RouteTrainingSAE(Routed, StackTrainingSAE):
    """Common base of the routed training SAEs."""

    starts_anew: ClassVar[tuple[str, ...]] = ("W_router", "router_")
    """How the names of parameters begin that :meth:`init_from` leaves alone."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self.cfg.routing == "every":
            return self._train_on_every_layer(step_input)
        lesson = None
        if self.cfg.routing == "distilled":
            lesson = distill(self, self.layers_of(step_input.sae_in), step_input.n_training_steps)
        route = lesson.route if lesson else self.route(step_input.sae_in, draw=step_input.n_training_steps)
        output = super().training_forward_pass(_routed(step_input, route))
        losses = router_losses(route, step_input.coefficients) | (lesson.losses if lesson else {})
        output.losses.update(losses)
        output.loss = output.loss + sum(losses.values())
        output.metrics.update(route_metrics(route, self.layers))
        if lesson:
            output.metrics.update(lesson.metrics)
        return output

    def _train_on_every_layer(self, step_input: TrainStepInput) -> TrainStepOutput:
        """MLSAE: the shared SAE sees each token once per layer."""
        layers = self.split(step_input.sae_in)
        return super().training_forward_pass(replace(step_input, sae_in=layers.flatten(0, -2)))

    def get_coefficients(self) -> dict[str, Any]:
        """SAELens' scheduled coefficients, and the router's own."""
        ours = {"balance": self.cfg.balance_coefficient, "entropy": self.cfg.entropy_coefficient}
        return super().get_coefficients() | {
            name: TrainCoefficientConfig(value, warm_up_steps=self.cfg.router_warm_up_steps)
            for name, value in ours.items()
            if value
        }

    def _target(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        # Attached, the normalised loss of straight_through would be scale-free and the router learn nothing.
        return x.detach() if self.cfg.routing == "straight_through" else x

    @torch.no_grad()
    def init_from(self, sae: SAE[Any]) -> None:
        """Start from the weights of a trained single-layer SAE (or another RouteSAE).

        The router keeps its own initialisation, and so does JumpReLU's threshold where ``sae`` has none.
        Both decoders' norms count the same afterwards: where ``sae`` measures its latents in units of the
        decoder norm (``rescale_acts_by_decoder_norm``) and this one does not, the norms are folded.

        Raises:
            ValueError: a shape or ``apply_b_dec_to_input`` differs, or ``sae`` lacks a parameter.
        """
        ours, theirs = dict(self.named_parameters()), dict(sae.named_parameters())
        needed = [name for name in ours if not name.startswith(self.starts_anew)]
        wrong = [f"no {name}" for name in needed if name not in theirs and name != "threshold"]
        shared = [name for name in needed if name in theirs]
        wrong += [
            f"{name}: {tuple(theirs[name].shape)} into {tuple(ours[name].shape)}"
            for name in shared
            if theirs[name].shape != ours[name].shape
        ]
        if sae.cfg.apply_b_dec_to_input != self.cfg.apply_b_dec_to_input:
            wrong.append(f"apply_b_dec_to_input: {sae.cfg.apply_b_dec_to_input}")
        if wrong:
            raise ValueError(
                f"cannot start {type(self).__name__} from {type(sae).__name__}: {'; '.join(wrong)}"
            )
        for name in shared:
            ours[name].copy_(theirs[name])
        in_units_of_norm = [
            getattr(cfg, "rescale_acts_by_decoder_norm", False) for cfg in (self.cfg, sae.cfg)
        ]
        if in_units_of_norm == [False, True]:
            self.fold_and_get_W_dec_norm()


def _routed(step_input: TrainStepInput, route: Route) -> TrainStepInput:
    """``step_input`` for the shared SAE."""
    given = {field.name: getattr(step_input, field.name) for field in fields(step_input)}
    # (what mixes layers has a constant scale; a stack with gradients is no constant)
    scale = route.scale if route.scale.requires_grad and not step_input.sae_in.requires_grad else None
    return ScaledStepInput(**given | {"sae_in": route.input, "scale": scale})


@contextmanager
def _sized_for_d_model(cfg: Any) -> Iterator[None]:
    d_in = cfg.d_in
    cfg.d_in = cfg.d_model
    try:
        yield
    finally:
        cfg.d_in = d_in
