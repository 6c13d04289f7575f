"""Characters that cannot be seen, or that turn the writing direction, as text."""

from __future__ import annotations

import unicodedata

UNSEEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories: control, format (also the marks of writing direction), surrogates, private, separators."""


def visible(text: str) -> str:
    """``text`` with every such character but line feeds written as ‹U+202E›."""
    return "".join(
        f"‹U+{ord(c):04X}›" if c != "\n" and unicodedata.category(c) in UNSEEN else c for c in text
    )
