"""Attaching RouteSAEs to a model beside ordinary SAEs: what both model classes of ``hooked.py`` share.

While a RouteSAE is attached, a forward pass is two: a *routing pass* up to the last routed layer, with the
RouteSAEs bypassed (user hooks and ordinary SAEs stay on), and the *spliced pass*, in which each token's
reconstruction replaces the stream at its routed layer. Routes are constants for gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import (
    _SAEWrapper,
    get_deep_attr,
)
from sae_lens.util import get_special_token_ids
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.hook_points import LayersHookPoint, layer_hook_name, mounted_points, unmount_layers
from routesae_lens.saes.route_sae import Routed, RouteSAE, RouteTrainingSAE
from routesae_lens.saes.router import Route
from routesae_lens.splice.attached import Attached
from routesae_lens.splice.layer_view import LayerSplice
from routesae_lens.splice.replace import check_device

Exclude = bool | list[int] | None
"""Tokens a RouteSAE leaves alone: special ones (True), listed ids, none (False), or as in training (None)."""


class RouteSplicing:
    """What both model classes below share. Not for use alone."""

    @property
    def last_routes(self) -> dict[str, Route]:
        """Routes of the last forward pass, by the name that :attr:`route_saes` gives each RouteSAE.

        They stay readable after the RouteSAE is detached, until the next pass with one attached.
        """
        return self.__dict__.get("_last_routes", {})

    @property
    def route_saes(self) -> dict[str, RouteSAE]:
        """Attached RouteSAEs by the name of their multi-layer hook point."""
        return {point: attached.sae for point, attached in self._attached.items()}

    @property
    def _attached(self) -> dict[str, Attached]:
        # Made on demand: SAELens and from_model turn a model into ours without calling __init__.
        return self.__dict__.setdefault("_attached_route_saes", {})

    # --- attaching ---------------------------------------------------------------------------------

    def add_sae(
        self,
        sae: Any,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
    ) -> None:
        """Attach an SAE, transcoder or RouteSAE until ``reset_saes``.

        A RouteSAE appears on every routed layer: its latents of shape (batch, pos, d_sae), zero at tokens
        routed elsewhere, are at ``blocks.{i}.hook_resid_post.hook_sae_acts_post`` (on the bridge under the
        canonical name that ``get_sae_hook_name(model.acts_to_saes[...])`` gives). Only routed tokens are
        encoded. If anything goes wrong nothing is attached.

        Args:
            sae: what to attach; a RouteSAE in its inference form.
            use_error_term: add the error term, so that outputs stay what they were (None: as the SAE says).
            exclude_special_tokens: True (the tokenizer's), token ids, or False: the tokens to leave alone.
                None: for a RouteSAE as it was trained (metadata), for other SAEs False. Positions outside
                the metadata's ``seqpos_slice`` are left alone by a RouteSAE in any case.
            scale_by_p: consistent with training (default); False is the RouteSAE authors' splice.

        Raises:
            ValueError: the hook does not exist or is taken, or the SAE does not fit the model.
            TypeError: a training RouteSAE, or an option that the SAE has no use for.
        """
        if not isinstance(sae, SAE):
            raise TypeError(f"expected a SAELens SAE, transcoder or RouteSAE, got {type(sae).__name__}")
        if isinstance(sae, RouteTrainingSAE):
            raise TypeError(
                f"{type(sae).__name__} is a training SAE. Attach inference_form(sae) "
                "(routesae_lens.saes.route_sae), or sae.save_inference_model(path) and RouteSAE.load_from_disk(path)."
            )
        if isinstance(sae, RouteSAE):
            self._attach(sae, use_error_term, exclude_special_tokens, scale_by_p)
            return
        if not scale_by_p:
            raise TypeError(f"scale_by_p=False is for RouteSAEs, not for {type(sae).__name__}")
        self._check_ordinary(sae)
        parent: Any = super()
        parent.add_sae(sae, use_error_term=use_error_term, **self._ordinary_options(exclude_special_tokens))

    def _attach(self, sae: RouteSAE, use_error_term: bool | None, exclude: Exclude, scale_by_p: bool) -> str:
        check_device(sae, self)
        excluded = self._excluded_ids(sae, exclude)
        before = mounted_points(self)
        point = sae.mount(self)
        if point in self._attached:
            raise ValueError(f"a RouteSAE is already attached to the layers {sae.layers} ({point})")
        attached = Attached(
            sae=sae,
            mounted=point not in before,
            scale_by_p=scale_by_p,
            excluded=excluded,
            positions=slice(*(sae.cfg.metadata.seqpos_slice or (None,))),
            splices={},
        )
        self._attached[point] = attached
        try:
            for index, layer in enumerate(sae.layers):
                name = f"blocks.{layer}.{sae.cfg.site}"
                path = layer_hook_name(self, layer, sae.cfg.site)
                splice = LayerSplice(
                    sae,
                    index,
                    hook_name=name,
                    path=path,
                    original=self._free_hook(path),
                    use_error_term=sae.use_error_term if use_error_term is None else use_error_term,
                )
                attached.splices[name] = splice
                self._put(path, splice)
                self._saes_by_hook[name] = splice
        except BaseException:
            self._detach(point)
            raise
        return point

    def _detach(self, point: str) -> None:
        attached = self._attached.pop(point)
        for name, splice in attached.splices.items():
            self._put(splice.path, splice.hook_original)
            self._saes_by_hook.pop(name, None)
        if attached.mounted:
            unmount_layers(self, point)

    def _free_hook(self, path: str) -> HookPoint:
        """The HookPoint at ``path``, or a ValueError that says what occupies it."""
        for name, wrapper in self._saes_by_hook.items():
            if isinstance(wrapper, LayerSplice):
                if wrapper.path == path:
                    raise ValueError(f"{path} already carries a RouteSAE; two cannot share a layer")
            elif path in self._paths(wrapper.sae):
                raise ValueError(f"{path} already carries an SAE ({name}); reset_saes({name!r}) removes it")
        hook = self._hook_at(path)
        assert isinstance(hook, HookPoint)  # mounting made sure that the model has the layer and the site
        return hook

    def _check_ordinary(self, sae: SAE[Any]) -> None:
        """Refuse what SAELens would skip with a warning, or what would displace a RouteSAE."""
        taken = {splice.path for attached in self._attached.values() for splice in attached.splices.values()}
        for path in self._paths(sae):
            if path in taken:
                raise ValueError(
                    f"{path} carries a RouteSAE; reset_saes({path!r}) removes it from all its layers"
                )
            hook = self._hook_at(path)
            if hook is None:
                raise ValueError(
                    f"this model has no hook {path!r} for {type(sae).__name__}; see model.hook_dict"
                )
            if isinstance(hook, LayersHookPoint):
                raise ValueError(
                    f"{path} is a read-only copy of several layers; nothing can be spliced there"
                )

    def _paths(self, sae: SAE[Any]) -> list[str]:
        """Where an ordinary SAE reads and writes, as paths on the model."""
        metadata = sae.cfg.metadata
        return [
            self._path(str(name))
            for name in (metadata.hook_name, metadata.hook_name_out or metadata.hook_name)
        ]

    def _hook_at(self, path: str) -> HookPoint | _SAEWrapper | None:
        try:
            hook = get_deep_attr(self, path)
        except (AttributeError, IndexError, TypeError, ValueError):
            return None
        return hook if isinstance(hook, HookPoint | _SAEWrapper) else None

    def _excluded_ids(self, sae: RouteSAE, exclude: Exclude) -> list[int]:
        if exclude is None:
            exclude = sae.cfg.metadata.exclude_special_tokens or False
        if exclude is False:
            return []
        if exclude is not True:
            return [int(token) for token in exclude]
        tokenizer = getattr(self, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "exclude_special_tokens=True needs the model's tokenizer, and it has none; give a list of token "
                "ids, or False. (Without the argument a RouteSAE leaves alone what its training left out.)"
            )
        return get_special_token_ids(tokenizer)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Detach SAEs.

        Args:
            act_names: hook names of ordinary SAEs; the point's name or any layer's hook name of a RouteSAE,
                which is then removed from all its layers. None: everything.

        Raises:
            ValueError: nothing is attached under one of the names; then nothing is detached.
        """
        parent: Any = super()
        routed = {
            name: point
            for point, attached in self._attached.items()
            for key, splice in attached.splices.items()
            for name in (point, key, splice.path)
        }
        if act_names is None:
            act_names = [*self._attached, *(name for name in self._saes_by_hook if name not in routed)]
        names = [act_names] if isinstance(act_names, str) else list(act_names)
        unknown = [name for name in names if name not in routed and name not in self._saes_by_hook]
        if unknown:
            attached_to = sorted({*self._attached, *self._saes_by_hook})
            raise ValueError(f"no SAE is attached to {', '.join(unknown)}; attached: {attached_to or 'none'}")
        for point in dict.fromkeys(routed[name] for name in names if name in routed):
            self._detach(point)
        parent.reset_saes([name for name in names if name not in routed])

    @contextmanager
    def saes(
        self,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
    ) -> Iterator[Any]:
        """Context manager: the SAEs attached inside, and what was there before restored at its end.

        Takes SAEs and RouteSAEs; arguments and errors as in :meth:`add_sae` (``scale_by_p`` is for the
        RouteSAEs among them). ``reset_saes_end=False`` leaves them attached.
        """
        listed = [saes] if isinstance(saes, SAE) else list(saes)
        ordinary = [sae for sae in listed if not isinstance(sae, Routed)]
        for sae in ordinary:
            self._check_ordinary(sae)  # before SAELens notes what it is going to restore
        options = self._ordinary_options(exclude_special_tokens) if ordinary else {}
        parent: Any = super()
        with parent.saes(ordinary, reset_saes_end=reset_saes_end, use_error_term=use_error_term, **options):
            added: list[str] = []
            try:
                for sae in listed:
                    if isinstance(sae, Routed):
                        self.add_sae(sae, use_error_term, exclude_special_tokens, scale_by_p)
                        added.append(next(reversed(self._attached)))
                yield self
            finally:
                if reset_saes_end:
                    for point in added:
                        if point in self._attached:  # the caller may have reset it
                            self._detach(point)

    # --- running -----------------------------------------------------------------------------------

    def run_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        **model_kwargs: Any,
    ) -> Any:
        """One forward pass inside :meth:`saes`."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens, scale_by_p) as model:
            return model(*model_args, **model_kwargs)

    def run_with_cache_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> Any:
        """``run_with_cache`` inside :meth:`saes`; the cache is that of the spliced pass."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens, scale_by_p) as model:
            return model.run_with_cache(
                *model_args,
                return_cache_object=return_cache_object,
                remove_batch_dim=remove_batch_dim,
                **kwargs,
            )

    def run_with_hooks_with_saes(
        self,
        *model_args: Any,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        fwd_hooks: Sequence[tuple[Any, Any]] = (),
        bwd_hooks: Sequence[tuple[Any, Any]] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """``run_with_hooks`` inside :meth:`saes`. Up to the last routed layer, hooks on the model fire in both
        passes; hooks on a RouteSAE's own points in the spliced pass only."""
        with self.saes(saes, reset_saes_end, use_error_term, exclude_special_tokens, scale_by_p) as model:
            return model.run_with_hooks(
                *model_args,
                fwd_hooks=list(fwd_hooks),
                bwd_hooks=list(bwd_hooks),
                reset_hooks_end=reset_hooks_end,
                clear_contexts=clear_contexts,
                **model_kwargs,
            )

    def forward(self, input: Any, **kwargs: Any) -> Any:
        """The model's forward pass; with RouteSAEs attached, a routing pass and the spliced pass.

        Raises:
            NotImplementedError: an argument with which the splice would be wrong (a KV cache, for instance).
            ValueError: the routing pass cannot see all routed layers, or special tokens cannot be told.
        """
        parent: Any = super()
        if not self._attached:
            return parent.forward(input, **kwargs)
        self._check_forward(kwargs)
        tokens = None
        if any(attached.excluded for attached in self._attached.values()):
            tokens = self._token_ids(input, kwargs)
        routes = self.__dict__["_last_routes"] = self._routes(input, kwargs)
        with ExitStack() as routed:
            for point, attached in self._attached.items():
                routed.enter_context(attached.routed(routes[point], tokens))
            return parent.forward(input, **kwargs)

    @torch.no_grad()
    def _routes(self, input: Any, kwargs: dict[str, Any]) -> dict[str, Route]:
        """The routing pass. It stops after the last routed layer."""
        parent: Any = super()
        stacks: dict[str, Tensor] = {}
        not_for_it = ("return_type", "loss_per_token", "labels", "stop_at_layer")
        options = {key: value for key, value in kwargs.items() if key not in not_for_it}
        last = max(attached.sae.layers[-1] for attached in self._attached.values())
        with ExitStack() as routing:
            for point, attached in self._attached.items():

                def keep(_module: Any, _args: Any, stack: Tensor, point: str = point) -> None:
                    stacks[point] = stack

                routing.callback(get_deep_attr(self, point).register_forward_hook(keep).remove)
                routing.enter_context(attached.bypassed())
            parent.forward(input, return_type=None, stop_at_layer=last + 1, **options)
        for point in self._attached:
            if point not in stacks:
                raise RuntimeError(
                    f"the routing pass ended before {point} fired, so tokens cannot be routed. Was it stopped "
                    "by a hook, or by run_with_cache(..., stop_at_layer=...) on a bridge?"
                )
        return {point: attached.sae.route(stacks[point]) for point, attached in self._attached.items()}

    # --- where the two model classes differ --------------------------------------------------------

    @property
    def _saes_by_hook(self) -> dict[str, _SAEWrapper]:
        return self._acts_to_saes  # type: ignore[attr-defined]

    def _path(self, hook_name: str) -> str:
        """Path on the model of a hook name that may be an alias."""
        raise NotImplementedError

    def _put(self, path: str, module: HookPoint | LayerSplice) -> None:
        """Let ``module`` stand at ``path``, and the model know its hook points."""
        raise NotImplementedError

    def _ordinary_options(self, exclude: Exclude) -> dict[str, Any]:
        """Arguments for SAELens' own add_sae and saes."""
        raise NotImplementedError

    def _check_forward(self, kwargs: dict[str, Any]) -> None:
        """Refuse arguments with which the splice would be wrong."""
        raise NotImplementedError

    def _token_ids(self, input: Any, kwargs: dict[str, Any]) -> Int[Tensor, "batch pos"] | None:
        """Token ids of what forward was given; None if it was given embeddings."""
        raise NotImplementedError
