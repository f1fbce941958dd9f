"""Console output: any text as one safe line, and warnings."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from lsp_jax.core import processes


def printable(text: str, limit: int = 200) -> str:
    """Returns `text` as one line of at most `limit` characters that is safe to print to a terminal.

    Non-printable characters (as defined by Python) are escaped: line ends, ANSI and C1 control characters, bidi
    overrides, zero-width and private-use characters, lone surrogates. Truncated text ends in "...".
    """
    pieces = [
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[: limit + 1]
    ]
    if sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    room = limit - len("...")
    while pieces and sum(map(len, pieces)) > room:
        pieces.pop()
    return "".join(pieces) + "..."[: max(limit, 0)]


def warn(text: str) -> None:
    """Prints a warning to standard error, from process 0 only."""
    if processes.is_writer():
        with suppress(OSError):  # the terminal or pipe is closed
            print(f"lsp-jax: warning: {text}", file=sys.stderr, flush=True)


def report_quarantined(iteration: int, reason: str, directory: Path) -> None:
    """Prints that a checkpoint is damaged and where it was moved, from process 0 only."""
    if processes.is_writer():
        print(f"checkpoint {iteration} is damaged and was moved to {directory}: {printable(reason, 300)}", flush=True)
