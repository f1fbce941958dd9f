"""Paths given by users, checked before they are used, and sealed text files that are replaced only if unedited."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from lsp_jax.core.errors import InputError

BESIDE = 48
"""Bytes reserved in names for the temporary siblings of a directory (`.NAME.new-0123`)."""


def user_path(field: str, text: str | Path) -> Path:
    """Returns `text` as a path with `~` expanded; it need not exist.

    Raises InputError naming `field` for what no file system accepts: a NUL, a lone surrogate, an overlong name, a
    symlink loop, an unknown `~user`.
    """
    try:
        path = Path(text).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # `exists` hides some of these errors and raises others
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(field, str(text), f"is not a usable path ({reason}); give another one") from error
    return path


def existing_part(path: Path) -> Path:
    """Returns `path` if it exists, else its nearest existing parent."""
    full = path.absolute()
    return next(candidate for candidate in (full, *full.parents) if candidate.exists())


def check_writable(field: str, path: Path) -> None:
    """Raises InputError naming `field` unless the directory `path` exists or can be created, and is writable."""
    full, existing = path.absolute(), existing_part(path)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(field, str(path), f"{existing} is not a writable directory")
    longest = os.pathconf(existing, "PC_NAME_MAX") - BESIDE
    if any(len(os.fsencode(name)) > longest for name in full.relative_to(existing).parts):
        raise InputError(field, str(path), f"has a name of more than {longest} bytes; shorten it")


CARD = "README.md"
"""File name of a model card; the hub displays it."""


def sealed(text: str) -> str:
    """Returns `text` followed by a line with its checksum, by which `is_ours` detects later edits."""
    return text + _seal(text)


def is_ours(path: Path) -> bool:
    """Whether the file is unedited since `sealed` made its text; an edited file must not be overwritten."""
    content = path.read_text(encoding="utf-8", errors="replace")
    text, mark, _ = content.rpartition("<!-- lsp_jax ")
    return bool(mark) and content == sealed(text)


def _seal(text: str) -> str:
    return f"<!-- lsp_jax {hashlib.sha256(text.encode()).hexdigest()} -->\n"
