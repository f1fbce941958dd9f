"""Running a stage of an iteration: checked to be the same program in all processes, errors annotated with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.core import Tracer

from lsp_jax.core import processes


@contextmanager
def named(where: str) -> Iterator[None]:
    """Adds a note of the location to any error: errors of compiled code do not tell where they arose."""
    try:
        yield
    except Exception as error:
        error.add_note(f"lsp-jax: in the {where} of an iteration")
        raise


def first_checked(stage: Any, *arguments: Any) -> Any:
    """Calls `stage(*arguments)`; on first use, checks that every process has lowered the same program."""
    with named(f"stage {stage.__name__}"):
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
            processes.check_program(stage.__name__, stage, *arguments)
        return stage(*arguments)
