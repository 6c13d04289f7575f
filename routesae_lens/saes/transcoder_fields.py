"""What the configs of all transcoders in training share: their sites, and the widths of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from routesae_lens.backends import MLP_INPUT, SITES, backend_of
from routesae_lens.hook_points import (
    check_layers,
    mount_sites,
    mounted_points,
    sites_name,
    unmount_layers,
)


@dataclass(kw_only=True)
class TranscoderFields:
    """Config fields of every transcoder in training; ``for_model`` fills in the widths.

    ``d_in`` is the width of both sites together, ``d_read + d_out``.

    Args:
        layer: the block, 0-based.
        d_out: width of what is predicted.
        site_in: what is read; by default what the MLP module reads. See ``hook_points.mount_sites``.
        site_out: what is predicted.
        skip: add ``W_skip x`` to the prediction, zero at the start.
        normalize: scale input and output to mean norm sqrt(width), see ``saes/transcoder.py``.
        norm_batches: training batches over which the mean norms are taken.

    Raises:
        ValueError: widths or sites that cannot be, k larger than ``d_sae``, or options of SAELens that do not
            work for transcoders.
    """

    layer: int
    d_out: int
    site_in: str = MLP_INPUT
    site_out: str = "hook_mlp_out"
    skip: bool = False
    normalize: bool = True
    norm_batches: int = 100
    apply_b_dec_to_input: bool = False

    def __post_init__(self) -> None:
        cfg: Any = self
        for name, least in (("d_in", 1), ("d_out", 1), ("d_sae", 1), ("norm_batches", 1), ("layer", 0)):
            value = getattr(cfg, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer, {least} or more; got {value!r}")
        check_layers([self.layer])
        if self.d_read < 1:
            raise ValueError(
                f"d_in is the width of what is read and what is predicted together, so more than d_out = "
                f"{self.d_out}; got {cfg.d_in}"
            )
        for name in ("skip", "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, only in (
            ("normalize_activations", "none"),
            ("reshape_activations", "none"),
            ("apply_b_dec_to_input", False),
        ):
            if getattr(cfg, name) != only:
                raise ValueError(
                    f"{name}={getattr(cfg, name)!r} does not work for transcoders; expected {only!r} "
                    "(normalize=True scales input and output)"
                )
        k = getattr(cfg, "k", None)
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= cfg.d_sae):
            raise ValueError(f"k must be an integer between 1 and d_sae = {cfg.d_sae}, got {k!r}")
        super().__post_init__()  # type: ignore[misc]
        if cfg.metadata.hook_name is None:
            cfg.metadata.hook_name = sites_name(self.layer, self.site_in, self.site_out)

    @property
    def d_read(self) -> int:
        """Width of what is read: ``d_in`` of the saved transcoder."""
        return int(self.d_in - self.d_out)  # type: ignore[attr-defined]

    @property
    def d_model(self) -> int:
        """Llama Scope's D: of a transcoder the width of what it writes."""
        return self.d_out

    @property
    def sites(self) -> tuple[str, str]:
        """TransformerLens' names of the hooks that are read and replaced.

        HookedSAETransformer and the bridges have them; ``add_sae`` of the saved transcoder uses them. A
        HookedTransformer or HookedProxyLM, which cannot carry SAEs, is trained on the same values.
        """
        return f"blocks.{self.layer}.{self.site_in}", f"blocks.{self.layer}.{self.site_out}"

    @classmethod
    def for_model(
        cls, model: Any, *, layer: int, d_in: int | None = None, d_out: int | None = None, **kwargs: Any
    ) -> Any:
        """A config that fits ``model``.

        Args:
            layer: the block, 0-based.
            d_in, d_out: widths of the two sites, by default d_model (``mlp.hook_post`` and the like have another).

        Raises:
            ValueError: the model lacks the block or a site, or the widths are not those of a site as wide as d_model.
                (Those of any other site, and the order of the two, ``train`` checks by a first short forward.)
        """
        backend = backend_of(model)
        read, out = (backend.d_model if width is None else width for width in (d_in, d_out))
        cfg: Any = cls(d_in=read + out, d_out=out, layer=layer, **kwargs)  # type: ignore[call-arg]
        before = mounted_points(model)
        cfg.metadata.hook_name = cfg.mount(model)
        if cfg.metadata.hook_name not in before:  # a config leaves no trace
            unmount_layers(model, cfg.metadata.hook_name)
        return cfg

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """The config of the saved transcoder."""
        saved: dict[str, Any] = super().get_inference_sae_cfg_dict()  # type: ignore[misc]
        hooks = dict(zip(("hook_name", "hook_name_out"), self.sites, strict=True))
        return saved | {"d_in": self.d_read, "metadata": saved["metadata"] | hooks}

    def mount(self, model: Any) -> str:
        """Mount the hook point over the two sites, and return its name. Raises as :meth:`for_model`."""
        self.check_widths(model)
        return mount_sites(model, self.layer, self.site_in, self.site_out)

    def check_widths(self, model: Any) -> None:
        """Raise a ValueError where the model's sites are known to have other widths, or the block is missing."""
        backend = backend_of(model)
        check_layers([self.layer], backend.n_layers)
        for name, site, width in (("d_in", self.site_in, self.d_read), ("d_out", self.site_out, self.d_out)):
            if site in (*SITES, MLP_INPUT) and width != backend.d_model:
                raise ValueError(
                    f"the transcoder was configured for {name} = {width}, but {site} of this model has "
                    f"{backend.d_model} values per token; ...TrainingSAEConfig.for_model(model, layer=...) fits"
                )
