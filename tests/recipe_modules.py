"""Recipes as modules: they are scripts beside the package, not part of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe(name: str) -> Any:
    """A fresh copy of ``recipes/<name>.py``."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
