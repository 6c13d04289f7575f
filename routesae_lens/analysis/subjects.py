"""What is evaluated: a RouteSAE, a Crosscoder or an ordinary SAE, behind one small interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, TrainingSAE, Transcoder
from torch import Tensor

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import (
    SITES,
    check_layers,
    join_layers,
    layer_hook_name,
    mount_sites,
    split_layers,
)
from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.fast_topk import Latents, decode_fast, encode_fast
from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.layers import standardize
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.router import Route
from routesae_lens.saes.sparse_products import TopKCode
from routesae_lens.splice.replace import (
    Hook,
    check_device,
    chosen_layers,
    crosscoder_hooks,
    encode_stack,
    kept_rows,
    splice_hooks,
)


@dataclass
class Reading:
    """What an SAE makes of one batch of clean activations.

    ``read`` is d_model for an SAE that reads one layer of each token, and for a Crosscoder, which reads all
    of them, ``(layer d_model)``: the layers side by side.
    """

    route: Route | None
    layer: Int[Tensor, "batch pos"]
    """The layer each token is read at, as an index into ``Subject.layers``. For a Crosscoder the last one,
    where the stack is complete: counts by layer made from it say nothing then (see ``every_layer``)."""
    x: Float[Tensor, "batch pos read"]
    """The activation that the splice replaces; for a transcoder the one it reads."""
    original: Float[Tensor, "batch pos read"]
    """What the SAE reconstructs, unscaled; ``x`` standardised, or the mixture of soft and top-2 routing."""
    every_layer: bool = False
    """Whether each token is read at every layer at once, and reconstructed there (a Crosscoder)."""
    target: Float[Tensor, "batch pos read"] | None = None
    """The model's own activation of which ``original`` is the standardised form; None where there is no such
    one (mixtures of layers)."""


@runtime_checkable
class Subject(Protocol):
    sae: SAE[Any]
    point: str
    layers: list[int]
    scaled: bool
    splice_label: str

    @property
    def replaces(self) -> list[str]:
        """Names of the hooks at which splice and zero-ablation replace activations."""
        ...

    def read(self, activation: Tensor, draw: int) -> Reading: ...
    def encode(self, reading: Reading, keep: Tensor) -> TopKCode | Tensor:
        """Latents of the kept tokens, dense or sparse (see ``fast_topk.encode_fast``)."""
        ...

    def autoencode(self, reading: Reading, keep: Tensor) -> tuple[Latents, Tensor]:
        """Latents and reconstruction of the kept tokens, the latter comparable with ``reading.original``."""
        ...

    def splice(self, reading: Reading, keep: Tensor, scale_by_p: bool) -> list[tuple[str, Hook]]: ...
    def zero(self, reading: Reading, keep: Tensor) -> list[tuple[str, Hook]]: ...


def subject_of(sae: Any, model: Any) -> Subject:
    if isinstance(sae, TrainingSAE):
        sae = inference_form(sae)
    if isinstance(sae, SAE):
        check_weights(sae)
        check_device(sae, model)
    if isinstance(sae, RouteSAE):
        return _RoutedSubject(sae, model)
    if isinstance(sae, Crosscoder):
        return CrosscoderSubject(sae, model)
    if isinstance(sae, Transcoder):
        return _TranscoderSubject(sae, model)
    if isinstance(sae, SAE):
        return _PlainSubject(sae, model)
    raise ValueError(f"expected a RouteSAE, a Crosscoder or a SAELens SAE, got {type(sae).__name__}")


def check_weights(sae: SAE[Any]) -> None:
    """Raise a ValueError that names the weights which are not finite, if any."""
    bad = [name for name, weights in sae.named_parameters() if not torch.isfinite(weights).all()]
    if bad:
        raise ValueError(f"{type(sae).__name__} has NaN or infinite weights: {', '.join(bad)}")


class _RoutedSubject:
    def __init__(self, sae: RouteSAE, model: Any):
        self.sae, self.model = sae, model
        self.point, self.layers = sae.mount(model), sae.layers
        self.scaled = sae.cfg.routing == "hard"
        self.mixed = sae.cfg.routing in ("soft", "top2")
        self.splice_label = {
            "hard": "reconstruction at the routed layer, p undone",
            "soft": "reconstruction of the mixture at its argmax layer, unscaled",
            "top2": "reconstruction of the mixture at its argmax layer, unscaled",
        }.get(sae.cfg.routing, "reconstruction at the routed layer")

    @property
    def replaces(self) -> list[str]:
        return [layer_hook_name(self.model, layer, self.sae.cfg.site) for layer in self.layers]

    def read(self, activation: Tensor, draw: int) -> Reading:
        route = self.sae.route(activation, draw=draw)
        layers = split_layers(activation, len(self.layers))
        index = route.layer[..., None, None].expand(*route.layer.shape, 1, layers.shape[-1])
        x = layers.gather(-2, index).squeeze(-2)
        if self.mixed:
            return Reading(route, route.layer, x, route.input)
        return Reading(route, route.layer, x, standardize(x).x, target=x)

    def encode(self, reading: Reading, keep: Tensor) -> TopKCode | Tensor:
        assert reading.route is not None
        return encode_fast(self.sae, reading.route.input[keep], self.sae.encode_routed)

    def autoencode(self, reading: Reading, keep: Tensor) -> tuple[Latents, Tensor]:
        assert reading.route is not None
        code = self.encode(reading, keep)
        latents, out = Latents.of(code), decode_fast(self.sae, code)
        if self.mixed:
            return latents, out
        out = out / reading.route.scale[keep][:, None]
        if not self.sae.cfg.standardize:  # the SAE lives in the model's space; compare standardised
            stats = standardize(reading.x[keep])
            out = (out - stats.mean) / stats.std
        return latents, out

    def splice(self, reading: Reading, keep: Tensor, scale_by_p: bool) -> list[tuple[str, Hook]]:
        assert reading.route is not None
        return splice_hooks(self.sae, self.model, reading.route, keep, scale_by_p=scale_by_p)

    def zero(self, reading: Reading, keep: Tensor) -> list[tuple[str, Hook]]:
        def at(index: int) -> Hook:
            return lambda x, hook=None: x.masked_fill(((reading.layer == index) & keep)[..., None], 0.0)

        return [(name, at(i)) for i, name in enumerate(self.replaces)]


class CrosscoderSubject:
    """A Crosscoder: every kept token is read, and replaced, at many layers at once.

    Nothing is routed, so a token's layer has probability 1 and entropy 0, as for an ordinary SAE. How much
    of the dictionary lives in which layer is said by ``Crosscoder.decoder_norms``.
    """

    scaled = False

    def __init__(self, sae: Crosscoder, model: Any):
        self.sae, self.model = sae, model
        self.point, self.layers = sae.mount(model), sae.layers
        self.splice_at(None)

    def splice_at(self, splice_layers: Sequence[int] | None) -> None:
        """Choose the block numbers that splice and zero-ablation replace (None: all that are read).

        Raises:
            ValueError: the Crosscoder does not read one of them.
        """
        self.spliced = chosen_layers(self.sae, splice_layers)
        blocks = "every block"
        if self.spliced != self.layers:
            blocks = f"block {', '.join(map(str, self.spliced))} alone"
        self.splice_label = f"reconstruction at {blocks}, from the latents of the clean pass"

    @property
    def replaces(self) -> list[str]:
        return [layer_hook_name(self.model, layer, self.sae.cfg.site) for layer in self.spliced]

    def read(self, activation: Tensor, draw: int) -> Reading:
        layers = split_layers(activation, len(self.layers))
        last = torch.full(activation.shape[:-1], len(self.layers) - 1, device=activation.device)
        original = join_layers(standardize(layers).x)
        return Reading(None, last, activation, original, every_layer=True, target=activation)

    def encode(self, reading: Reading, keep: Tensor) -> TopKCode | Tensor:
        return encode_stack(self.sae, kept_rows(reading.x, keep))

    def autoencode(self, reading: Reading, keep: Tensor) -> tuple[Latents, Tensor]:
        code = self.encode(reading, keep)
        out = split_layers(decode_fast(self.sae, code), len(self.layers))
        if not self.sae.cfg.standardize:  # the SAE lives in the model's space; compare standardised
            stats = standardize(split_layers(reading.x[keep], len(self.layers)))
            out = (out - stats.mean) / stats.std
        return Latents.of(code), join_layers(out)

    def splice(self, reading: Reading, keep: Tensor, scale_by_p: bool) -> list[tuple[str, Hook]]:
        return crosscoder_hooks(self.sae, self.model, reading.x, keep, splice_layers=self.spliced)

    def zero(self, reading: Reading, keep: Tensor) -> list[tuple[str, Hook]]:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            return x.masked_fill(keep[..., None], 0.0)

        return [(name, hook) for name in self.replaces]


class _PlainSubject:
    """An ordinary SAELens SAE: one layer, every kept token."""

    scaled = False
    splice_label = "reconstruction at its hook"

    def __init__(self, sae: SAE[Any], model: Any):
        self.sae = sae
        name = sae.cfg.metadata.hook_name
        if name is None or sae.cfg.metadata.hook_name_out not in (None, name):
            raise ValueError(f"expected an SAE that reads and writes one hook, got hook_name={name!r}")
        match = re.search(r"\.(\d+)\.(\w+)$", name)
        if match and match[2] in SITES:
            check_layers([int(match[1])], backend_of(model).n_layers)
            # the same place under the name this backend knows it by
            name = layer_hook_name(model, int(match[1]), match[2])
        if name not in model.hook_dict:
            raise ValueError(f"the model has no hook {name!r} for this SAE")
        self.point = name
        self.layers = [int(layer) for layer in re.findall(r"\.(\d+)", name)[:1]] or [0]

    @property
    def replaces(self) -> list[str]:
        return [self.point]

    def read(self, activation: Tensor, draw: int) -> Reading:
        if activation.ndim != 3 or activation.shape[-1] != self.sae.cfg.d_in:
            raise ValueError(
                f"this SAE reads activations of shape batch pos {self.sae.cfg.d_in}; {self.point} has "
                f"{tuple(activation.shape)}"
            )
        layer = torch.zeros(activation.shape[:-1], dtype=torch.long, device=activation.device)
        return Reading(None, layer, activation, standardize(activation).x, target=activation)

    def encode(self, reading: Reading, keep: Tensor) -> TopKCode | Tensor:
        return encode_fast(self.sae, reading.x[keep], self.sae.encode)

    def autoencode(self, reading: Reading, keep: Tensor) -> tuple[Latents, Tensor]:
        code = self.encode(reading, keep)
        stats = standardize(reading.x[keep])
        return Latents.of(code), (decode_fast(self.sae, code) - stats.mean) / stats.std

    def splice(self, reading: Reading, keep: Tensor, scale_by_p: bool) -> list[tuple[str, Hook]]:
        def hook(x: Tensor, hook: Any = None) -> Tensor:
            out = decode_fast(self.sae, encode_fast(self.sae, x[keep], self.sae.encode))
            return x.index_put((keep,), out.to(x.dtype))

        return [(self.point, hook)]

    def zero(self, reading: Reading, keep: Tensor) -> list[tuple[str, Hook]]:
        return [(self.point, lambda x, hook=None: x.masked_fill(keep[..., None], 0.0))]


class _TranscoderSubject:
    """A SAELens transcoder: predicts one site of a block from another, and replaces what it predicts.

    With a skip connection its part belongs to the prediction. (SAELens' ``add_sae`` leaves it out: it calls
    ``encode`` and ``decode``, and the skip connection is in ``forward``.)
    """

    scaled = False
    splice_label = "prediction in place of what it predicts"

    def __init__(self, sae: Transcoder, model: Any):
        self.sae: Any = sae
        metadata = sae.cfg.metadata
        names = [metadata.hook_name, metadata.hook_name_out]
        places = [re.fullmatch(r"blocks\.(\d+)\.(.+)", str(name)) for name in names]
        if places[0] is None or places[1] is None or places[0][1] != places[1][1]:
            raise ValueError(
                "expected a transcoder between two TransformerLens hooks of one block, got hook_name="
                f"{names[0]!r} and hook_name_out={names[1]!r}"
            )
        layer = int(places[0][1])
        self.point = mount_sites(model, layer, places[0][2], places[1][2])
        self.layers, self.replaces = [layer], [layer_hook_name(model, layer, places[1][2])]

    def read(self, activation: Tensor, draw: int) -> Reading:
        d_in, d_out = self.sae.cfg.d_in, self.sae.cfg.d_out
        if activation.shape[-1] != d_in + d_out:
            raise ValueError(
                f"this transcoder reads {d_in} values and predicts {d_out}; {self.point} has "
                f"{activation.shape[-1]} together"
            )
        read, out = activation.split([d_in, d_out], dim=-1)
        layer = torch.zeros(activation.shape[:-1], dtype=torch.long, device=activation.device)
        return Reading(None, layer, read, standardize(out).x, target=out)

    def encode(self, reading: Reading, keep: Tensor) -> TopKCode | Tensor:
        return encode_fast(self.sae, reading.x[keep], self.sae.encode)

    def autoencode(self, reading: Reading, keep: Tensor) -> tuple[Latents, Tensor]:
        assert reading.target is not None
        out, latents = self.sae.forward_with_activations(reading.x[keep].to(self.sae.dtype))
        stats = standardize(reading.target[keep])
        return Latents.of(latents), (out - stats.mean) / stats.std

    def splice(self, reading: Reading, keep: Tensor, scale_by_p: bool) -> list[tuple[str, Hook]]:
        out = self.sae(reading.x[keep].to(self.sae.dtype))

        def hook(x: Tensor, hook: Any = None) -> Tensor:
            return x.index_put((keep,), out.to(x.dtype))

        return [(self.replaces[0], hook)]

    def zero(self, reading: Reading, keep: Tensor) -> list[tuple[str, Hook]]:
        return [(self.replaces[0], lambda x, hook=None: x.masked_fill(keep[..., None], 0.0))]
