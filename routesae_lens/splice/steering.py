"""Steering: edit latents of an attached SAE while the model runs (RouteSAE, section 3.5 and figure 10).

An edit is a hook on ``hook_sae_acts_post``, beside which other hooks keep working. What reaches the stream is
what the decoder makes of the edited latents: with the error term the difference ``decode(edited) -
decode(latents)`` is added, without it the reconstruction of the edited latents replaces the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from routesae_lens.hook_points import check_layers
from routesae_lens.saes.crosscoder import Crosscoder
from routesae_lens.saes.route_sae import RouteSAE
from routesae_lens.saes.stack import StackSAE
from routesae_lens.splice.attach import Exclude
from routesae_lens.splice.edits import Edit, Positions, check_edits, check_positions, chosen
from routesae_lens.splice.layer_view import RoutedHookPoint, Rows
from routesae_lens.splice.running import RouteSplicing


class Steering(RouteSplicing):
    """What both model classes share. Not for use alone."""

    @contextmanager
    def steer(
        self,
        sae: SAE[Any],
        edits: Mapping[int, Edit],
        *,
        positions: Positions = "all",
        layers: str | int | Sequence[int] | None = None,
        use_error_term: bool | None = None,
        maxima: Mapping[int, float] | Tensor | None = None,
        exclude_special_tokens: Exclude = None,
        scale_by_p: bool = True,
    ) -> Iterator[Any]:
        """Context manager: inside, the latents of ``sae`` are edited in every pass, generated tokens included.

        An SAE that is not attached yet is attached for the time. One that is (by ``add_sae``, or by an
        outer ``steer``) keeps the way it is attached; then ``layers``, ``use_error_term``,
        ``exclude_special_tokens`` and ``scale_by_p`` must not be given. Edits apply in the order of the
        ``with`` blocks. At its end, or after any exception, the model is what it was.

        Args:
            sae: a RouteSAE, a Crosscoder, or an ordinary SAELens SAE.
            edits: ``Set``, ``Add``, ``Scale`` or ``Ablate`` by latent index. Strengths are in units of the
                latents; for a RouteSAE with hard routing these have been multiplied by p.
            positions: which tokens: "all", "prompt", "generated", a slice (without padding; negative
                bounds count back from the prompt's end), token ids, or a function of token ids that
                judges each token by itself (with a KV cache it is asked about the new tokens alone).
            layers: for a RouteSAE "routed" (default: each token at its routed layer, as in the paper),
                "all" or block numbers (every token there, whatever its route, at the scale of its own
                route); for a Crosscoder "all" (default) or block numbers. Other SAEs have one.
            use_error_term: True (default): only the edit's effect is added to the stream. False: the
                stream is replaced by the edited reconstruction, at tokens that are not edited too; the
                paper's.
            maxima: the features' own maxima, for edits with ``relative=True``, in units of p = 1 (such as
                ``FeatureSet.max_activation``, or a dict by latent).
            exclude_special_tokens: as in ``add_sae``.
            scale_by_p: as in ``add_sae``.

        Raises:
            ValueError: a latent out of range, a relative strength without a maximum, an SAE that does not
                fit the model or whose hook another SAE has, layers that it does not read, or an option that
                its attachment fixes.
            TypeError: something that is no SAE, edits that are none, or an option without use for this SAE.
        """
        if not isinstance(sae, SAE):
            raise TypeError(f"expected a SAELens SAE, RouteSAE or Crosscoder, got {type(sae).__name__}")
        checked = check_edits(edits, sae.cfg.d_sae, maxima)
        check_positions(positions)
        splice_layers = _splice_layers(sae, layers)
        with ExitStack() as steering:
            if self._carries(sae):
                given = {
                    "layers": layers is not None,
                    "use_error_term": use_error_term is not None,
                    "exclude_special_tokens": exclude_special_tokens is not None,
                    "scale_by_p": not scale_by_p,
                }
                if fixed := [name for name, is_given in given.items() if is_given]:
                    raise ValueError(
                        f"this {type(sae).__name__} is already attached, which fixes {', '.join(fixed)}; leave "
                        "that out, or detach it first"
                    )
            else:
                self._check_no_other(sae)
                attaching = self.saes(
                    sae,
                    use_error_term=True if use_error_term is None else use_error_term,
                    exclude_special_tokens=exclude_special_tokens,
                    scale_by_p=scale_by_p,
                    splice_layers=splice_layers,
                )
                steering.enter_context(attaching)
            hook = self._edit_hook(checked, positions)
            for point, rows in self._latents_of(sae):
                steering.enter_context(_hooked(point, hook(rows)))
            mark = object()
            self._steerings.append(mark)
            steering.callback(self._steerings.remove, mark)
            yield self

    def __getstate__(self) -> dict[str, Any]:
        if self._steerings:
            raise ValueError(
                "a steered model cannot be copied or pickled, for its edits would not work in the copy; copy it "
                "outside the steer block and steer the copy"
            )
        return self.__dict__

    def _check_no_other(self, sae: SAE[Any]) -> None:
        """Refuse an ordinary SAE where SAELens would put it in the place of another, whose edits would be lost."""
        if isinstance(sae, StackSAE):
            return  # (these never displace)
        taken = self._kinds_by_path()
        for path in self._paths(sae):
            if path not in taken and isinstance(self._hook_at(path), _SAEWrapper):
                raise ValueError(
                    f"{path} carries another SAE, which steering this one would displace. There is one SAE at a "
                    f"hook: end the other's steer block, or reset_saes({path!r}) first"
                )

    def _carries(self, sae: SAE[Any]) -> bool:
        if isinstance(sae, StackSAE):
            return any(attached.sae is sae for attached in self._attached.values())
        return any(wrapper.sae is sae for wrapper in self._saes_by_hook.values())

    def _latents_of(self, sae: SAE[Any]) -> list[tuple[HookPoint, Rows | None]]:
        """The hook points where latents of ``sae`` appear, and which tokens they stand for."""
        for attached in self._attached.values():
            if attached.sae is sae:
                return attached.latents()
        return [(sae.hook_sae_acts_post, None)]

    def _edit_hook(
        self, edits: dict[int, tuple[Edit, float]], positions: Positions
    ) -> Callable[[Rows | None], Callable[..., Tensor]]:
        def for_rows(rows: Rows | None) -> Callable[..., Tensor]:
            def hook(acts: Float[Tensor, "batch pos d_sae"], hook: HookPoint) -> Tensor:
                window = self.__dict__.get("_window")
                if window is None:  # the SAE is used by itself
                    return acts
                where = chosen(positions, window).to(acts.device)
                # A feature's maximum is known in units of p = 1, these latents are in units of p.
                p = torch.ones((), device=acts.device) if rows is None or rows.scale is None else rows.scale
                acts = acts.clone()
                for latent, (edit, maximum) in edits.items():
                    unit = (maximum * p).to(acts) if edit.relative else torch.ones((), dtype=acts.dtype)
                    before = acts[..., latent]
                    acts[..., latent] = torch.where(where, edit(before, unit.to(acts.device)), before)
                return acts

            return hook

        return for_rows


def _splice_layers(sae: SAE[Any], layers: str | int | Sequence[int] | None) -> list[int] | None:
    """``layers`` as :meth:`Attaching.add_sae` takes them."""
    if layers is None:
        return None
    if not isinstance(sae, StackSAE):
        raise TypeError(f"layers is for RouteSAEs and Crosscoders; this {type(sae).__name__} has one layer")
    if isinstance(layers, str):
        if layers == "routed" and isinstance(sae, RouteSAE):
            return None
        if layers == "all":
            return sae.layers
        names = "'routed', 'all'" if isinstance(sae, RouteSAE) else "'all'"
        raise ValueError(
            f"unknown layers {layers!r} for a {type(sae).__name__}; known: {names}, block numbers"
        )
    wanted = check_layers([layers] if isinstance(layers, int) else layers)
    if missing := [layer for layer in wanted if layer not in sae.layers]:
        kind = "Crosscoder" if isinstance(sae, Crosscoder) else "RouteSAE"
        raise ValueError(f"this {kind} does not read the layers {missing}; it reads {sae.layers}")
    return wanted


@contextmanager
def _hooked(point: HookPoint, hook: Callable[..., Tensor]) -> Iterator[None]:
    """A hook that ``reset_hooks`` leaves alone, as steering ends with its block."""
    point.add_hook(hook, is_permanent=True)
    handle = point.fwd_hooks[-1]
    if isinstance(point, RoutedHookPoint):
        point.edits += 1
    try:
        yield
    finally:
        handle.hook.remove()
        if handle in point.fwd_hooks:  # somebody may have removed permanent hooks too
            point.fwd_hooks.remove(handle)
        if isinstance(point, RoutedHookPoint):
            point.edits -= 1
