"""User paths, atomic writes, JSON and JSON Lines, and sealed text files that are replaced only if unedited."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from lsp_jax.core.errors import InputError, shown

BESIDE = 48
"""Bytes reserved in names for the temporary siblings of a directory (`.NAME.new-0123`)."""


def user_path(field: str, text: str | Path) -> Path:
    """Returns `text` as a path with `~` expanded; it need not exist.

    Raises InputError naming `field` for what is not a path, and for a path that no file system accepts: a NUL, a lone
    surrogate, an overlong name, a symlink loop, an unknown `~user`.
    """
    if not isinstance(text, str | os.PathLike):
        raise InputError(field, text, "must be a path")
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write, which then replaces `path`: readers see the old or the new file, complete.

    After an error `path` is unchanged and the temporary file removed.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def read_json_object(path: Path, remedy: str, field: str = "") -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises InputError naming `field` (default: the file) and the path, with the cause and `remedy`.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(value, dict):
            return value
        reason, cause = f"must be a JSON object, not {shown(value, 40)}", None
    except OSError as error:
        reason, cause = f"cannot be read ({error.strerror})", error
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        reason, cause = f"is not valid JSON in UTF-8 ({error})", error
    raise InputError(field or path.name, str(path), f"{reason}; {remedy}") from cause


def read_jsonl(
    path: Path, field: str = "", *, skip: Literal["", "torn", "invalid"] = "", offset: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON Lines file from byte `offset` on; nothing if there is no such file.

    `skip` ignores an incomplete last line, which another process may be writing ("torn"), or every invalid line
    ("invalid"). Otherwise an invalid line raises InputError naming `field` (default: the file), the path and the line.
    """
    return (value for _, value in read_jsonl_lines(path, field, skip=skip, offset=offset))


def read_jsonl_lines(
    path: Path, field: str = "", *, skip: Literal["", "torn", "invalid"] = "", offset: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of `read_jsonl`, each with its place `PATH:LINE`."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8)  # files written on Windows, also several in one
            if not line.strip():
                continue
            cause: Exception | None = None
            try:
                value = json.loads(line.decode())
                if isinstance(value, dict):
                    yield f"{path}:{number}", value
                    continue
                reason = f"must be a JSON object, not {shown(value, 40)}"
            except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
                reason, cause = f"is not JSON Lines in UTF-8 ({error})", error
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    reason = "is not JSON Lines in UTF-8 but UTF-16: save the file as UTF-8"
            if skip == "invalid" or (skip == "torn" and not line.endswith(b"\n")):
                continue
            raise InputError(field or path.name, f"{path}:{number}", reason) from cause


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
