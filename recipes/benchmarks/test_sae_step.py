"""The SAE's training step in units of its encoder's matrix product: time, memory, and how both grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import pytest
import sae_steps as steps
from conftest import DEVICE, QUICK, Compare, add_row
from sae_steps import Size, Step

SMALL = Size(576, 4608, 32, 2048)
LARGE = Size(2048, 16384, 64, 1024)
SIZES = [Size(16, 64, 4, 32, layers=3)] if QUICK else [SMALL, LARGE]

OURS = "RouteSAE"
CONTENDERS: dict[str, Callable[..., Step]] = {
    OURS: steps.route,
    "RouteSAE, SAELens' dense computation": partial(steps.route, dense=True),
    "SAELens TopK, dense": partial(steps.saelens, sparse=False),
    "SAELens TopK, sparse activations": partial(steps.saelens, sparse=True),
    "SAELens TopK, sparse activations, fused Adam": partial(steps.saelens, sparse=True, fused=True),
    "sparsify": steps.sparsify,
    "plain formula": steps.plain_formula,
    "Crosscoder": steps.crosscoder,
    "floor: matmul, top-k, fused Adam": steps.floor,
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONTENDERS)
def test_step(compare: Compare, name: str, size: Size):
    if name == "sparsify" and find_spec("sparsify") is None:
        pytest.skip("eai-sparsify is not installed")
    if name == "Crosscoder" and size == LARGE and DEVICE == "cpu":
        pytest.skip("parameters, gradients and moments of nine such layers take 10 GB")
    step = CONTENDERS[name](size, DEVICE)
    wide = size.layers if name == "Crosscoder" else 1
    unit = "encoder matmul" if wide == 1 else f"encoder matmul of {wide} layers"
    compare(
        step.run,
        steps.encoder_matmul(size, DEVICE, wide),
        group="SAE step",
        name=name,
        unit=unit,
        size=str(size),
        goal=("<=", 1.8) if name == OURS else None,
    )
    if name.startswith("floor"):
        return
    peak = step.peak_bytes()
    add_row(
        group="Memory of the SAE step",
        name=name,
        unit="parameters, gradients, moments, batch, one batch x width matrix",
        size=str(size),
        ratios=[peak / step.needed_bytes()],
        goal=("<=", 1.2) if name == OURS else None,
        gigabytes=peak / 1e9,
    )


BASE = Size(16, 64, 4, 32) if QUICK else Size(576, 4608, 32, 1024)
SCALES: dict[str, list[int]] = {
    "layers": [1, 2, 4, 8, 16],
    "width": [BASE.width // 4 * 2**i for i in range(5)],
    "k": [BASE.k // 4 * 2**i for i in range(5)],
    "batch": [BASE.batch // 4 * 2**i for i in range(5)],
}
FLOOR = "floor: matmul, top-k, fused Adam"
AGAINST = (OURS, "SAELens TopK, sparse activations", FLOOR)
CURVES: dict[str, tuple[str, ...]] = {
    "layers": (OURS, "Crosscoder"),  # one layer is all that the others read
    "width": AGAINST,
    "k": AGAINST,
    "batch": AGAINST,
}


@pytest.mark.parametrize(
    ("axis", "name", "value"),
    [(axis, name, value) for axis in SCALES for name in CURVES[axis] for value in SCALES[axis][QUICK * 4 :]],
)
def test_scaling(compare: Compare, axis: str, name: str, value: int):
    size = BASE._replace(**{axis: value})
    compare(
        CONTENDERS[name](size, DEVICE).run,
        steps.encoder_matmul(size, DEVICE),
        group="Scaling",
        name=name,
        unit="encoder matmul of one layer",
        size=str(size),
        axis=axis,
        value=value,
    )
