"""Comparing what was measured twice: nested results whose numbers agree up to rounding."""

from __future__ import annotations

from typing import Any

import pytest


def assert_alike(one: Any, other: Any, rel: float) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_alike(one[name], other[name], rel)
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b, rel)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=rel, abs=1e-6, nan_ok=True)
    else:
        assert one == other
