"""Text for people: one harmless line of any text, and warnings."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from lsp_jax.core import processes


def printable(text: str, limit: int = 200) -> str:
    """`text` on one line of at most `limit` characters, harmless on a terminal.

    Whatever Python does not call printable is shown as its escape: line ends, ANSI and C1 control characters, bidi
    overrides, zero-width and private characters, lone surrogates. A longer text ends in "...".
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
    """A line on standard error, from process 0."""
    if processes.is_writer():
        with suppress(OSError):  # a terminal or pipe that is gone
            print(f"lsp-jax: warning: {text}", file=sys.stderr, flush=True)


def set_aside(iteration: int, reason: str, place: Path) -> None:
    """That a checkpoint was not whole, and where it is kept."""
    if processes.is_writer():
        print(f"checkpoint {iteration} is damaged and kept aside in {place}: {printable(reason, 300)}", flush=True)
