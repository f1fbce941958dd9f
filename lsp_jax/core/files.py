"""Paths as a user or a file names them: what no file system takes is an InputError, not an error of the first call."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from lsp_jax.core.errors import InputError

BESIDE = 48
"""Bytes that names of what is written beside a directory (`.NAME.new-0123`) are longer than its own."""


def user_path(field: str, text: str | Path) -> Path:
    """`text` as a path, `~` expanded; it need not exist. InputError names `field`.

    A NUL, half a surrogate pair, a name that is too long, a link to itself and an unknown `~user` are no paths.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # `exists` hides some of these errors and raises others
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(field, str(text), f"is no path that can be used here ({reason}); give another one") from error
    return path


def existing_part(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())


def check_writable(field: str, path: Path) -> None:
    """InputError naming `field` unless the directory `path` is there, or can be made, and can be written to."""
    whole, existing = path.absolute(), existing_part(path)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(field, str(path), f"{existing} is not a directory that can be written to")
    longest = os.pathconf(existing, "PC_NAME_MAX") - BESIDE
    if any(len(os.fsencode(name)) > longest for name in whole.relative_to(existing).parts):
        raise InputError(field, str(path), f"holds a name of more than {longest} bytes; shorten it")


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
