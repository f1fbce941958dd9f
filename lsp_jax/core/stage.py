"""Jitted stages of an iteration, checked to be the same program in every process; backends that execute them."""

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
    """Context that adds `where` as a note to any error: errors of compiled code do not name their origin."""
    try:
        yield
    except Exception as error:
        error.add_note(f"lsp-jax: in the {where} of an iteration")
        raise


class Stage(Generic[P, R]):
    """A jitted function whose first call checks that every process lowered the same program.

    Processes with different programs would deadlock; InputError is raised instead. Within a trace a stage is plain
    `jax.jit`.
    """

    def __init__(self, function: Callable[P, R], static: Names, donate: Names):
        functools.update_wrapper(self, function)
        self.__name__: str = getattr(function, "__name__", "stage")
        self.jitted: Any = jax.jit(function, static_argnames=static, donate_argnames=donate)
        """The result of `jax.jit`, with `lower`, `trace` and the cache of compiled programs."""
        self.lower: Any = self.jitted.lower
        self._names: tuple[str, ...] = tuple(inspect.signature(function).parameters)
        by_name = (static,) if isinstance(static, str) else static
        self._arrays: int = min((self._names.index(name) for name in by_name), default=len(self._names))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        # static arguments are always passed by name: `jax.jit` would compile once for each way of passing them
        start, end = self._arrays, len(self._names)
        arrays = args[:start] + args[end:]  # `jax.jit` rejects surplus arguments
        rest = dict(zip(self._names[start:], args[start:end], strict=False))
        named_arguments: dict[str, Any] = dict(**rest, **kwargs)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((arrays, named_arguments))):
            return self.jitted(*arrays, **named_arguments)
        with named(f"stage {self.__name__}"):
            processes.check_program(self.__name__, self.jitted, *arrays, **named_arguments)
            return self.jitted(*arrays, **named_arguments)


def stage(static: Names = (), donate: Names = ()) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Decorator that makes a pure function a `Stage`; `static` and `donate` name arguments, as in `jax.jit`."""
    return lambda function: Stage(function, static, donate)


Call = Callable[..., Any]
"""Signature: (stage, its arrays, its static arguments by name) -> the stage's result."""
execute: Call = Stage.__call__
"""The `Call` of a run, which executes the stage; that of `lsp-jax plan` compiles it for other hardware."""


def read_count(count: jax.Array) -> int:
    """Reads a scalar from the device."""
    return int(runtime.to_host(count))


@dataclass(frozen=True)
class Backend:
    """Callbacks by which an iteration executes its stages; the defaults run them, and also work within `jax.jit`."""

    call: Call = execute
    """Executes or compiles a stage."""
    phase: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
    """Returns the context of the phase with this name."""
    ready: Callable[[Any], Any] = lambda arrays: arrays
    """Returns its argument once the arrays are computed."""
    sync: Callable[[str], None] = lambda name: None
    """Called by all processes together between some phases; an exception raised here leaves the state unchanged."""
    load: Callable[[Any], Any] = lambda arrays: arrays
    """Copies offloaded arrays to the devices."""
    read: Callable[[jax.Array], int] = read_count
    """Reads the number of unfinished rows, to which chunked decoding shrinks its batch."""


EAGER = Backend()
