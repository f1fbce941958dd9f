"""What a refused command must look like: one line, nothing compiled, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lsp_jax import cli
from lsp_jax.core import runtime
from test_trainer import tree_hash


class WeightsRead(Exception):
    """Stands for the beginning of the long work."""


class Refused:
    """Runs a command that must be refused: `refused(arguments, word, ...)`. Everything below `watched` must stay."""

    def __init__(self, capsys: pytest.CaptureFixture[str], watched: Path):
        self.capsys, self.watched = capsys, watched

    def __call__(self, arguments: list[Any], *words: str) -> str:
        before, compiled = tree_hash(self.watched), runtime.compiles()[0]
        status = cli.main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        check_line(captured.err, words)
        assert status == 2 and captured.out == ""
        assert runtime.compiles()[0] == compiled
        assert tree_hash(self.watched) == before
        return captured.err


def check_line(err: str, words: tuple[str, ...]) -> None:
    """One line of error that holds every word."""
    assert err.startswith("lsp-jax: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and len(err) < 800
    for word in words:
        assert word in err, (word, err)
