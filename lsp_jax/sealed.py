"""Files of ours that a later write may replace, unless somebody has edited them: a model card in an export."""

from __future__ import annotations

import hashlib
from pathlib import Path

CARD = "README.md"
"""A model card's file, as the hub shows it."""


def sealed(text: str) -> str:
    """`text`, and below it a line that says what it was when it was written."""
    return text + _seal(text)


def is_ours(path: Path) -> bool:
    """Whether the file is as `sealed` made it: one that was edited is somebody's work."""
    whole = path.read_text(encoding="utf-8", errors="replace")
    text, mark, _ = whole.rpartition("<!-- lsp_jax ")
    return bool(mark) and whole == sealed(text)


def _seal(text: str) -> str:
    return f"<!-- lsp_jax {hashlib.sha256(text.encode()).hexdigest()} -->\n"
