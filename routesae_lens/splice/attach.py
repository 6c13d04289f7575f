"""Attaching RouteSAEs and Crosscoders to a model beside ordinary SAEs, and detaching them.

What both model classes of ``hooked.py`` share; ``running.py`` has the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sae_lens import SAE, TrainingSAE
from sae_lens.analysis.hooked_sae_transformer import (
    _SAEWrapper,
    get_deep_attr,
)
from sae_lens.util import get_special_token_ids
from transformer_lens.hook_points import HookPoint

from routesae_lens.backends import SITES, backend_of
from routesae_lens.hook_points import LayersHookPoint, layer_hook_name, mounted_points, unmount_layers
from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.stack import StackSAE
from routesae_lens.splice.attached import Attached, AttachedCrosscoder, AttachedRouteSAE
from routesae_lens.splice.crosscoder import CrosscoderPass
from routesae_lens.splice.layer_view import StackSplice
from routesae_lens.splice.replace import check_device, chosen_layers

Exclude = bool | list[int] | None
"""Tokens that are left alone: special ones (True), listed ids, none (False), or as in training (None)."""


class Attaching:
    """What is attached, and how. Not for use alone."""

    @property
    def route_saes(self) -> dict[str, RouteSAE]:
        """Attached RouteSAEs by the name of their multi-layer hook point."""
        return {name: on.sae for name, on in self._attached.items() if isinstance(on, AttachedRouteSAE)}

    @property
    def crosscoders(self) -> dict[str, Crosscoder]:
        """Attached Crosscoders by the name of their multi-layer hook point."""
        return {name: on.sae for name, on in self._attached.items() if isinstance(on, AttachedCrosscoder)}

    @property
    def _attached(self) -> dict[str, Attached]:
        # Made on demand: SAELens and from_model turn a model into ours without calling __init__.
        return self.__dict__.setdefault("_attached_stack_saes", {})

    def add_sae(
        self,
        sae: Any,
        use_error_term: bool | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
        splice_layers: Sequence[int] | None = None,
    ) -> None:
        """Attach an SAE, transcoder, RouteSAE or Crosscoder until ``reset_saes``.

        A RouteSAE appears on every routed layer: its latents of shape (batch, pos, d_sae), zero at tokens
        routed elsewhere, are at ``blocks.{i}.hook_resid_post.hook_sae_acts_post`` (on the bridge under the
        canonical name that ``get_sae_hook_name(model.acts_to_saes[...])`` gives). Only routed tokens are
        encoded.

        A Crosscoder replaces several layers of a token from one set of latents, those of the clean pass.
        They are at ``<point>.hook_sae_acts_post``, with the name of its multi-layer hook point (the key of
        :attr:`crosscoders`), and fire once; what a hook writes there reaches every spliced layer. With the
        error term each layer gets the difference that such an edit makes to its reconstruction, on top of
        what came from the layers below. If anything goes wrong nothing is attached.

        Args:
            sae: what to attach; a RouteSAE or Crosscoder in its inference form.
            use_error_term: add the error term, so that outputs stay what they were (None: as the SAE says).
            exclude_special_tokens: True (the tokenizer's), token ids, or False: the tokens to leave alone.
                None: for a RouteSAE or Crosscoder as it was trained (metadata), for other SAEs False.
                Positions outside the metadata's ``seqpos_slice`` are left alone by these two in any case.
            scale_by_p: for RouteSAEs, consistent with training (default); False is the authors' splice.
            splice_layers: block numbers. For Crosscoders those to replace (None: all that it reads). For
                RouteSAEs those where every token is replaced, whatever its route, at the scale of its route
                (None: each token at its routed layer only).

        Raises:
            ValueError: the hook does not exist or is taken, or the SAE does not fit the model, or
                ``splice_layers`` names layers that it does not read.
            TypeError: a training SAE of several layers, or an option that the SAE has no use for.
        """
        if not isinstance(sae, SAE):
            raise TypeError(
                f"expected a SAELens SAE, transcoder, RouteSAE or Crosscoder, got {type(sae).__name__}"
            )
        if isinstance(sae, StackSAE) and isinstance(sae, TrainingSAE):
            raise TypeError(
                f"{type(sae).__name__} is a training SAE. Attach inference_form(sae) "
                "(routesae_lens.saes.route_sae), or sae.save_inference_model(path) and SAE.load_from_disk(path)."
            )
        if not scale_by_p and not isinstance(sae, RouteSAE):
            raise TypeError(f"scale_by_p=False is for RouteSAEs, not for {type(sae).__name__}")
        if splice_layers is not None and not isinstance(sae, RouteSAE | Crosscoder):
            raise TypeError(f"splice_layers is for RouteSAEs and Crosscoders, not for {type(sae).__name__}")
        if isinstance(sae, RouteSAE | Crosscoder):
            self._attach(sae, use_error_term, exclude_special_tokens, scale_by_p, splice_layers)
            return
        self._check_ordinary(sae)
        self._check_skip(sae, use_error_term)
        parent: Any = super()
        parent.add_sae(sae, use_error_term=use_error_term, **self._ordinary_options(exclude_special_tokens))

    def _attach(
        self,
        sae: RouteSAE | Crosscoder,
        use_error_term: bool | None,
        exclude: Exclude,
        scale_by_p: bool,
        splice_layers: Sequence[int] | None,
    ) -> None:
        check_device(sae, self)
        layers = chosen_layers(sae, splice_layers)
        excluded = self._excluded_ids(sae, exclude)
        before = mounted_points(self)
        point = sae.mount(self)
        if point in self._attached:
            raise ValueError(
                f"a {_kind(self._attached[point].sae)} is already attached to the layers {sae.layers} ({point})"
            )
        common: dict[str, Any] = {
            "layers": layers,
            "mounted": point not in before,
            "excluded": excluded,
            "positions": slice(*(sae.cfg.metadata.seqpos_slice or (None,))),
        }
        attached: Attached
        if isinstance(sae, RouteSAE):
            attached = AttachedRouteSAE(
                sae=sae, scale_by_p=scale_by_p, routed=splice_layers is None, **common
            )
        else:
            attached = AttachedCrosscoder(sae=sae, running=CrosscoderPass(sae, point), **common)
        self._attached[point] = attached
        try:
            for layer in layers:
                name = f"blocks.{layer}.{sae.cfg.site}"
                path = layer_hook_name(self, layer, sae.cfg.site)
                splice = attached.splice_at(
                    layer,
                    name,
                    path=path,
                    original=self._free_hook(path),
                    use_error_term=sae.use_error_term if use_error_term is None else use_error_term,
                )
                attached.splices[name] = splice
                self._put(path, splice)
                self._saes_by_hook[name] = splice
            hook = self._hook_at(point)
            assert isinstance(hook, LayersHookPoint)  # it has just been mounted
            if attached.shown_on(hook):
                self._put(point, hook)
        except BaseException:
            self._detach(point)
            raise

    def _detach(self, point: str) -> None:
        attached = self._attached.pop(point)
        for name, splice in attached.splices.items():
            self._put(splice.path, splice.hook_original)
            self._saes_by_hook.pop(name, None)
        hook = self._hook_at(point)
        if isinstance(hook, LayersHookPoint) and attached.hidden_on(hook):
            self._put(point, hook)
        if attached.mounted:
            unmount_layers(self, point)

    def _free_hook(self, path: str) -> HookPoint:
        """The HookPoint at ``path``, or a ValueError that says what occupies it."""
        for name, wrapper in self._saes_by_hook.items():
            if isinstance(wrapper, StackSplice):
                if wrapper.path == path:
                    kind = self._kinds_by_path()[path]
                    raise ValueError(f"{path} already carries a {kind}; two cannot share a layer")
            elif path in self._paths(wrapper.sae):
                raise ValueError(f"{path} already carries an SAE ({name}); reset_saes({name!r}) removes it")
        hook = self._hook_at(path)
        assert isinstance(hook, HookPoint)  # mounting made sure that the model has the layer and the site
        return hook

    def _check_ordinary(self, sae: SAE[Any]) -> None:
        """Refuse what SAELens would skip with a warning, or what would displace a RouteSAE or Crosscoder."""
        taken = self._kinds_by_path()
        for path in self._paths(sae):
            if path in taken:
                raise ValueError(
                    f"{path} carries a {taken[path]}; reset_saes({path!r}) removes it from all its layers"
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
        width = backend_of(self).d_model
        if _reads_the_stream(str(sae.cfg.metadata.hook_name)) and sae.cfg.d_in != width:
            raise ValueError(
                f"this {type(sae).__name__} has d_in = {sae.cfg.d_in}; {sae.cfg.metadata.hook_name} of this model "
                f"has {width}"
            )

    def _check_skip(self, sae: SAE[Any], use_error_term: bool | None) -> None:
        """Refuse what SAELens would splice without its skip connection, which the error term makes up for."""
        if hasattr(sae, "W_skip") and not (sae.use_error_term if use_error_term is None else use_error_term):
            raise ValueError(
                f"SAELens splices a {type(sae).__name__} by encode and decode, without W_skip: what it predicts "
                "would be wrong. Attach it with use_error_term=True, or evaluate(sae, model, tokens), which "
                "splices it whole"
            )

    def _kinds_by_path(self) -> dict[str, str]:
        """What carries each layer that a RouteSAE or Crosscoder is spliced at."""
        return {s.path: _kind(on.sae) for on in self._attached.values() for s in on.splices.values()}

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

    def _excluded_ids(self, sae: StackSAE, exclude: Exclude) -> list[int]:
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
                "ids, or False. (Without the argument this SAE leaves alone what its training left out.)"
            )
        return get_special_token_ids(tokenizer)

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Detach SAEs.

        Args:
            act_names: hook names of ordinary SAEs; the point's name or any layer's hook name of a RouteSAE or
                Crosscoder, which is then removed from all its layers. None: everything.

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
        splice_layers: Sequence[int] | None = None,
    ) -> Iterator[Any]:
        """Context manager: the SAEs attached inside, and what was there before restored at its end.

        Takes SAEs, RouteSAEs and Crosscoders; arguments and errors as in :meth:`add_sae` (``scale_by_p`` is
        for the RouteSAEs among them, ``splice_layers`` for each RouteSAE and Crosscoder, of which there
        must then be one). ``reset_saes_end=False`` leaves them attached.
        """
        listed = [saes] if isinstance(saes, SAE) else list(saes)
        if splice_layers is not None and not any(isinstance(sae, StackSAE) for sae in listed):
            kinds = ", ".join(type(sae).__name__ for sae in listed) or "nothing"
            raise TypeError(f"splice_layers is for RouteSAEs and Crosscoders, got {kinds}")
        if not scale_by_p and not any(isinstance(sae, RouteSAE) for sae in listed):
            kinds = ", ".join(type(sae).__name__ for sae in listed) or "nothing"
            raise TypeError(f"scale_by_p=False is for RouteSAEs, got {kinds}")
        ordinary = [sae for sae in listed if not isinstance(sae, StackSAE)]
        for sae in ordinary:
            self._check_ordinary(sae)  # before SAELens notes what it is going to restore
        options = self._ordinary_options(exclude_special_tokens) if ordinary else {}
        parent: Any = super()
        with parent.saes(ordinary, reset_saes_end=reset_saes_end, use_error_term=use_error_term, **options):
            added: list[str] = []
            try:
                for sae in listed:
                    if isinstance(sae, StackSAE):
                        own = {} if isinstance(sae, Crosscoder) else {"scale_by_p": scale_by_p}
                        self.add_sae(
                            sae, use_error_term, exclude_special_tokens, splice_layers=splice_layers, **own
                        )
                        added.append(next(reversed(self._attached)))
                yield self
            finally:
                if reset_saes_end:
                    for point in added:
                        if point in self._attached:  # the caller may have reset it
                            self._detach(point)

    # --- where the two model classes differ --------------------------------------------------------

    @property
    def _saes_by_hook(self) -> dict[str, _SAEWrapper]:
        return self._acts_to_saes  # type: ignore[attr-defined]

    def _path(self, hook_name: str) -> str:
        """Path on the model of a hook name that may be an alias."""
        raise NotImplementedError

    def _put(self, path: str, module: HookPoint | StackSplice) -> None:
        """Let ``module`` stand at ``path``, and the model know its hook points."""
        raise NotImplementedError

    def _ordinary_options(self, exclude: Exclude) -> dict[str, Any]:
        """Arguments for SAELens' own add_sae and saes."""
        raise NotImplementedError


def _reads_the_stream(hook_name: str) -> bool:
    return hook_name.rsplit(".", 1)[-1] in SITES


def _kind(sae: StackSAE) -> str:
    return "RouteSAE" if isinstance(sae, RouteSAE) else "Crosscoder"
