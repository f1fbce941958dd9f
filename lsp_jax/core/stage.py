"""A stage of an iteration as every process runs it: the same program everywhere, and a note on what fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.core import Tracer

from lsp_jax.core import processes


@contextmanager
def named(where: str) -> Iterator[None]:
    """An error that passes gets a note of where it was: those of compiled code say little of it."""
    try:
        yield
    except Exception as error:
        error.add_note(f"lsp-jax: in the {where} of an iteration")
        raise


def first_checked(stage: Any, *arguments: Any) -> Any:
    """`stage(*arguments)`; at its first use every process must have lowered the same program."""
    with named(f"stage {stage.__name__}"):
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments)):
            processes.check_program(stage.__name__, stage, *arguments)
        return stage(*arguments)
