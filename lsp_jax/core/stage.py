"""A stage of an iteration as every process runs it: one compiled program, the same everywhere, errors with a note."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.core import Tracer

from lsp_jax.core import processes, runtime

P = ParamSpec("P")
R = TypeVar("R")
Names = str | tuple[str, ...]


@contextmanager
def named(where: str) -> Iterator[None]:
    """Adds a note of the location to any error: errors of compiled code do not tell where they arose."""
    try:
        yield
    except Exception as error:
        error.add_note(f"lsp-jax: in the {where} of an iteration")
        raise


class Stage(Generic[P, R]):
    """A jitted function. At its first call every process must have lowered the same program, or InputError is raised
    where they would otherwise wait for one another for ever; within a trace it is `jax.jit` alone."""

    def __init__(self, function: Callable[P, R], static: Names, donate: Names):
        functools.update_wrapper(self, function)
        self.__name__: str = getattr(function, "__name__", "stage")
        self.jitted: Any = jax.jit(function, static_argnames=static, donate_argnames=donate)
        """What `jax.jit` made: `lower`, `trace` and the cache of compiled programs."""
        self.lower: Any = self.jitted.lower
        self._names: tuple[str, ...] = tuple(inspect.signature(function).parameters)
        by_name = (static,) if isinstance(static, str) else static
        self._arrays: int = min((self._names.index(name) for name in by_name), default=len(self._names))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # static arguments by name however they come: `jax.jit` would compile once for each way of passing them
        start, end = self._arrays, len(self._names)
        arrays = args[:start] + args[end:]  # one too many is left for `jax.jit` to refuse
        rest = dict(zip(self._names[start:], args[start:end], strict=False))
        named_arguments: dict[str, Any] = dict(**rest, **kwargs)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((arrays, named_arguments))):
            return self.jitted(*arrays, **named_arguments)
        with named(f"stage {self.__name__}"):
            processes.check_program(self.__name__, self.jitted, *arrays, **named_arguments)
            return self.jitted(*arrays, **named_arguments)


def stage(static: Names = (), donate: Names = ()) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Makes a pure function a `Stage`; `static` and `donate` name arguments, as in `jax.jit`."""
    return lambda function: Stage(function, static, donate)


Call = Callable[..., Any]
"""(stage, its arrays, its static arguments by name) -> the stage's result."""
execute: Call = Stage.__call__
"""Runs a stage: the `Call` of a run. `lsp-jax plan` has one that compiles it for another machine."""


def read_count(count: jax.Array) -> int:
    """A number read from the device."""
    return int(runtime.to_host(count))


@dataclass(frozen=True)
class Backend:
    """How stages are carried out; the default runs them, and composes under `jax.jit`."""

    call: Call = execute
    """Runs a stage, or compiles it."""
    phase: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    """Entered around each phase, with its name."""
    ready: Callable[[Any], Any] = lambda arrays: arrays
    """Returns its argument once the arrays are computed."""
    sync: Callable[[str], None] = lambda name: None
    """Called by all processes together at some places between phases; what it raises leaves the state as it was."""
    load: Callable[[Any], Any] = lambda arrays: arrays
    """Offloaded arrays on the devices."""
    read: Callable[[jax.Array], int] = read_count
    """How many rows have not stopped, by which decoding goes on with fewer of them."""


EAGER = Backend()
