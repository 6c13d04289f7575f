"""What a sweep trains: methods x sparsities x seeds, and everything that decides their numbers."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens.saes.sae import TrainingSAEConfig

from routesae_lens.backends import backend_of
from routesae_lens.hook_points import default_layers
from routesae_lens.training.methods import (
    METHODS,
    SPARSITIES,
    TRIAL_D_SAE,
    Method,
    find_method,
    make_config,
    option_problems,
)
from routesae_lens.training.preflight import context_limit, run_problems
from routesae_lens.training.presets import PRESETS, Preset
from routesae_lens.training.rows import BUFFER_DTYPES
from routesae_lens.training.schedules import SCHEDULES

LATER = ("buffer_dtype", "autocast_lm", "preset")


class SweepMember(NamedTuple):
    """One SAE of a sweep."""

    name: str
    """``<method>-<k, l1 or l0><number>-seed<seed>``; a folder and a result file."""
    method: str
    kind: str
    """What ``sparsity`` is, see ``methods.SPARSITIES``."""
    sparsity: int | float
    seed: int


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Everything that decides the numbers of a sweep, and nothing else.

    Making one checks nothing; :meth:`from_dict`, :meth:`check` and ``sweep`` list all mistakes at once.

    Args:
        methods: names of ``methods.METHODS``; those that read one layer also as ``topk@7``.
        k: latents per token, for every method whose sparsity is a k.
        sparsities: for single methods, other numbers than ``k``; needed where the sparsity is a coefficient
            (``{"relu": [0.5, 1, 2]}``).
        seeds: of weights and random routing. Every method is trained with every sparsity and seed.
        layers: routed blocks; 1/4 to 3/4 of the depth by default.
        d_sae: number of latents; by default ``expansion`` x d_model.
        expansion: see ``d_sae``.
        options: further fields of the SAEs' configs by method, for instance
            ``{"route": {"loss": "mse"}}``. A method with ``@`` takes those of its base, too. What the
            method's name, the sparsity or the seed sets is no option.
        aux_loss_coefficient: of methods with a k; the paper trains without.
        preset: name of a recipe in ``presets.PRESETS``. It sets those settings below that are not given, and
            fields of every method's config where ``options`` do not; every method has to take them.
        training_tokens, context_size, batch_size, lm_batch_size, buffer_tokens, buffer_dtype, autocast_lm, lr,
            schedule, unit_norm_every, exclude_special_tokens, exclude_first_position: see ``train``.
        held_out_sequences: sequences that the evaluation reads.
        eval_batch_size: sequences per forward of the evaluation.
        unscaled: also evaluate the authors' unscaled splice.
    """

    methods: tuple[str, ...]
    k: tuple[int, ...] = ()
    sparsities: dict[str, tuple[int | float, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    layers: tuple[int, ...] | None = None
    d_sae: int | None = None
    expansion: int = 8
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    aux_loss_coefficient: int | float = 0.0
    preset: str | None = None
    training_tokens: int
    context_size: int = 128
    batch_size: int = 2048
    lm_batch_size: int | None = None
    buffer_tokens: int | None = None
    buffer_dtype: str | None = None
    autocast_lm: bool = False
    lr: int | float = None  # type: ignore[assignment]  # (None until __post_init__: a preset may set it)
    schedule: str = None  # type: ignore[assignment]
    unit_norm_every: int | None = None
    exclude_special_tokens: bool = None  # type: ignore[assignment]
    exclude_first_position: bool = None  # type: ignore[assignment]
    held_out_sequences: int = 64
    eval_batch_size: int = 4
    unscaled: bool = False

    def __post_init__(self) -> None:
        for name, value in self._preset.settings().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def _preset(self) -> Preset:
        """What ``preset`` names; one that sets nothing where it is unknown (:meth:`problems` says so)."""
        return PRESETS.get(self.preset, Preset()) if isinstance(self.preset, str) else Preset()

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], methods: Mapping[str, Method] = METHODS) -> SweepConfig:
        """From plain lists and dicts, as a TOML or JSON file holds them.

        Raises:
            ValueError: listing every mistake.
        """
        known = {one.name: one for one in fields(cls)}
        problems = [
            f"unknown setting {name!r}; known: {', '.join(known)}" for name in given if name not in known
        ]
        if "training_tokens" not in given:
            problems.append("training_tokens is missing")
        defaults = {name: {} if one.default is MISSING else one.default for name, one in known.items()}
        values = {name: _tuples(value) for name, value in given.items() if name in known}
        # Not through __init__, so that values of any type can be looked at.
        draft = object.__new__(cls)
        vars(draft).update(defaults | {"training_tokens": 2**40} | values)
        draft.__post_init__()
        draft._raise(problems + draft.problems(methods))
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path, methods: Mapping[str, Method] = METHODS) -> SweepConfig:
        """From a .toml or .json file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, one that cannot be parsed, or mistakes in it (all are listed).
        """
        path = Path(path)
        readers = {".toml": tomllib.loads, ".json": json.loads}
        if path.suffix not in readers:
            raise ValueError(f"{path}: expected a .toml or .json file")
        try:
            given = readers[path.suffix](path.read_text(encoding="utf-8"))
        except ValueError as error:  # both readers' errors are ValueErrors
            raise ValueError(f"{path} is no valid {path.suffix[1:].upper()}: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected settings by name, got {type(given).__name__}")
        return cls.from_dict(given, methods)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; ``from_dict`` is the inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        # These came later: left out unless set, so that older folders hold the same sweep.
        return {name: value for name, value in plain.items() if value or name not in LATER}

    def members(self, methods: Mapping[str, Method] = METHODS) -> list[SweepMember]:
        """The SAEs, seeds innermost."""
        result = []
        for name in self.methods:
            kind = find_method(name, methods)[0].sparsity
            for sparsity in self.sparsities_of(name, kind):
                for seed in self.seeds:
                    label = f"{name}-{kind}{_short(sparsity)}-seed{seed}"
                    result.append(SweepMember(label, name, kind, sparsity, seed))
        return result

    def sparsities_of(self, name: str, kind: str) -> tuple[int | float, ...]:
        return self.sparsities.get(name, self.k if kind == "k" else ())

    def check(self, methods: Mapping[str, Method] = METHODS) -> None:
        """Raises ValueError that lists every mistake; no model is needed."""
        self._raise(self.problems(methods))

    def _raise(self, problems: list[str]) -> None:
        if problems:
            raise ValueError(
                f"the sweep has {len(problems)} mistake{'s' * (len(problems) > 1)}:\n  "
                + "\n  ".join(problems)
            )

    def problems(self, methods: Mapping[str, Method] = METHODS) -> list[str]:
        """Every mistake that shows without a model."""
        wrong = _wrong_types(self)
        found = [problem for problems in wrong.values() for problem in problems]

        def fine(*names: str) -> bool:
            return wrong.keys().isdisjoint(names)

        if self.buffer_dtype not in [None, *BUFFER_DTYPES]:
            known = ", ".join(BUFFER_DTYPES)
            found.append(f"unknown buffer_dtype {self.buffer_dtype!r}; known: {known}")
        if self.preset not in [None, *PRESETS]:
            found.append(f"unknown preset {self.preset!r}; known: {', '.join(PRESETS)}")
        if self.schedule not in list(SCHEDULES):  # (a list compares what cannot be hashed, too)
            found.append(f"unknown schedule {self.schedule!r}; known: {', '.join(SCHEDULES)}")
        if fine("training_tokens", "batch_size") and self.training_tokens < self.batch_size:
            found.append(
                f"training_tokens = {self.training_tokens} is less than one batch of {self.batch_size} tokens"
            )
        if (
            fine("buffer_tokens", "batch_size")
            and self.buffer_tokens
            and self.buffer_tokens < 2 * self.batch_size
        ):
            found.append(
                f"buffer_tokens = {self.buffer_tokens} must hold at least two batches of {self.batch_size} tokens"
            )
        of_methods, sound = self._method_problems(methods)
        # What the configs of the sound methods say, with a default in place of each setting that is wrong.
        defaults = asdict(SweepConfig(methods=(), training_tokens=1, seeds=(0,)))
        trial = object.__new__(SweepConfig)
        vars(trial).update(vars(self) | {name: defaults[name] for name in wrong} | {"methods": sound})
        return found + of_methods + trial._configs(None, methods)[1]

    def _method_problems(self, methods: Mapping[str, Method]) -> tuple[list[str], tuple[str, ...]]:
        """Unknown methods, methods without sparsities, options that a method does not take, and tables for
        methods that are not there; and the names of the methods with which nothing is wrong."""
        found: dict[str, None] = {}  # (methods with @ share the options of their base)
        sound = []
        listed = self.methods if isinstance(self.methods, tuple | list) else ()
        names = list(dict.fromkeys(name for name in listed if isinstance(name, str)))
        bases = {name.partition("@")[0] for name in names}
        for where, known in (("sparsities", {*names}), ("options", {*names, *bases})):
            table = getattr(self, where)
            for name in table if isinstance(table, dict) else ():
                if name not in known:
                    found[f"{where} are given for {name!r}, which is not among the methods"] = None
        for name in names:
            try:
                method = find_method(name, methods)[0]
            except ValueError as error:
                found[str(error)] = None
                continue
            wrong = self._sparsity_problems(name, method.sparsity)
            for table in dict.fromkeys((name.partition("@")[0], name)):
                options = self.options.get(table, {}) if isinstance(self.options, dict) else {}
                if isinstance(options, dict):
                    wrong += [f"options.{table}: {problem}" for problem in option_problems(method, options)]
            found |= dict.fromkeys(wrong)
            if not wrong:
                sound.append(name)
        return list(found), tuple(sound)

    def _sparsity_problems(self, name: str, kind: str) -> list[str]:
        if not isinstance(self.sparsities, dict):
            return []
        if not self.sparsities_of(name, kind):
            needed = f"sparsities.{name}" + (" or k" if kind == "k" else f" ({SPARSITIES[kind]}; k is none)")
            return [f"method {name} has no sparsity: give {needed}"]
        if name in self.sparsities:
            return _list_problems(f"sparsities.{name}", self.sparsities[name], int if kind == "k" else float)
        return []

    def sae_configs(
        self, model: Any, methods: Mapping[str, Method] = METHODS, *, more_problems: Iterable[str] = ()
    ) -> dict[str, TrainingSAEConfig]:
        """The training config of every member, by name.

        Args:
            more_problems: further mistakes, to be listed with those found here.

        Raises:
            ValueError: listing everything that does not fit this model.
        """
        found = list(more_problems)
        if (limit := context_limit(model)) is not None and self.context_size > limit:
            found.append(f"context_size = {self.context_size}, but the model reads at most {limit} tokens")
        configs, problems = self._configs(model, methods)
        self._raise(found + problems)
        return configs

    def _configs(
        self, model: Any, methods: Mapping[str, Method]
    ) -> tuple[dict[str, TrainingSAEConfig], list[str]]:
        """Training configs by member, and why others cannot be made; None stands for a model not yet loaded."""
        if model is None:  # sizes that are not known yet are taken as large
            layers, d_sae = list(self.layers or range(1000)), self.d_sae or TRIAL_D_SAE
        else:
            backend = backend_of(model)
            layers = list(self.layers or default_layers(backend.n_layers))
            d_sae = self.d_sae or self.expansion * backend.d_model
        configs: dict[str, TrainingSAEConfig] = {}
        found: dict[str, None] = {}  # without repeating what is the same for every seed
        for member in self.members(methods):
            method = find_method(member.method, methods)[0]
            if model is None and method.needs_model:
                continue
            tables = {member.method.partition("@")[0]: None, member.method: None}  # the latter counts more
            given: dict[str, Any] = {}
            if method.auxiliary:
                given["aux_loss_coefficient"] = self.aux_loss_coefficient
            for table in tables:
                given |= self.options.get(table, {})
            label = f"{member.method}, {member.kind} = {_short(member.sparsity)}"
            if member.kind == "k" and member.sparsity > d_sae:
                found[f"{label}: more than d_sae = {d_sae}"] = None
                continue
            try:
                given = self._with_preset(method, given)
                configs[member.name] = make_config(
                    member.method,
                    model,
                    layers,
                    d_sae,
                    member.sparsity,
                    member.seed,
                    methods=methods,
                    **given,
                )
            except (ValueError, TypeError) as error:
                found[f"{label}: {error}"] = None
                continue
            steps = self.training_tokens // self.batch_size
            for problem in run_problems(configs[member.name], steps, self.unit_norm_every):
                found[f"{label}: {problem}"] = None
        return configs, list(found)

    def _with_preset(self, method: Method, given: dict[str, Any]) -> dict[str, Any]:
        """Config fields: the preset's, and those given, which win. A field that the method's name sets stays."""
        if not self._preset.sae:
            return given
        if method.config is None:
            raise ValueError(f"preset {self.preset!r} needs methods that say which config they make")
        chosen = self._preset.fields_of(method.config, **given)
        return {name: value for name, value in chosen.items() if name not in method.sets or name in given}


def _short(number: int | float) -> str:
    """The shortest text that is this number and no other: 0.5, 1e-05, 1234567."""
    short = f"{number:g}"  # (six digits)
    return short if float(short) == number else repr(number)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(one) if isinstance(one, list) else one for name, one in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _wrong_types(config: SweepConfig) -> dict[str, list[str]]:
    """By setting: what has the wrong type or sign, is empty or holds duplicates."""
    found: dict[str, list[str]] = {}
    at_least = {
        "expansion": 1, "training_tokens": 1, "context_size": 2, "batch_size": 1, "held_out_sequences": 1,
        "eval_batch_size": 1, "d_sae": 1, "lm_batch_size": 1, "buffer_tokens": 1, "unit_norm_every": 0,
    }  # fmt: skip
    optional = {one.name for one in fields(config) if one.default is None}
    for name, minimum in at_least.items():
        value = getattr(config, name)
        if not ((value is None and name in optional) or _is_integer(value, minimum)):
            found[name] = [f"{name} must be an integer, {minimum} or more; got {value!r}"]
    if not _is_number(config.lr) or config.lr <= 0:
        found["lr"] = [f"lr must be a positive number, got {config.lr!r}"]
    auxiliary = config.aux_loss_coefficient
    if not _is_number(auxiliary) or auxiliary < 0:
        found["aux_loss_coefficient"] = [
            f"aux_loss_coefficient must be a number, 0 or more; got {auxiliary!r}"
        ]
    for name in ("exclude_special_tokens", "exclude_first_position", "unscaled", "autocast_lm"):
        if not isinstance(getattr(config, name), bool):
            found[name] = [f"{name} must be true or false, got {getattr(config, name)!r}"]
    for name in ("sparsities", "options"):
        if not isinstance(getattr(config, name), dict):
            found[name] = [f"{name} must be a table by method, got {getattr(config, name)!r}"]
    if isinstance(config.options, dict) and (
        bad := [f"options.{name} must be a table of config fields" for name, table in config.options.items()
                if not isinstance(table, dict)]
    ):  # fmt: skip
        found["options"] = bad
    for name, what, minimum in (("methods", str, 0), ("k", int, 1), ("seeds", int, 0), ("layers", int, 0)):
        values = getattr(config, name)
        if (values is None and name in optional) or (name == "k" and values == ()):
            continue
        if bad := _list_problems(name, values, what, minimum):
            found[name] = bad
    if "layers" not in found and config.layers is not None and list(config.layers) != sorted(config.layers):
        found["layers"] = [f"layers must be strictly increasing, got {list(config.layers)}"]
    return found


def _list_problems(name: str, values: Any, what: type, minimum: int = 1) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        return [f"{name} must be a list, got {values!r}"]
    values = list(values)
    if not values:
        return [f"{name} is empty"]
    expected, valid = {
        str: ("a name", lambda value: isinstance(value, str)),
        int: (f"an integer, {minimum} or more and below 2**63", lambda value: _is_integer(value, minimum)),
        float: ("a positive number", lambda value: _is_number(value) and value > 0),
    }[what]
    found = [f"{name} holds {value!r}; expected {expected}" for value in values if not valid(value)]
    twice = dict.fromkeys(repr(value) for i, value in enumerate(values) if value in values[:i])
    return found + [f"{name} holds {value} more than once" for value in twice]


def _is_integer(value: Any, minimum: int) -> bool:
    """Also that it fits PyTorch's sizes and seeds, 64 bits with a sign."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value < 2**63


def _is_number(value: Any) -> bool:
    largest = sys.float_info.max  # neither NaN nor infinite, nor an integer that no float can hold
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest
