"""Checks of what users pass: each returns a plain Python value, or raises InputError naming the argument.

numpy's scalars are taken as the numbers that they are; a bool is no number, and text is no list.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal, TypeVar

import numpy as np

from lsp_jax.core.errors import InputError

T = TypeVar("T")
SEEDS = 2**32
"""Number of seeds that JAX's generators tell apart: larger ones would repeat these."""


def integer(field: str, value: object, least: int | None = None, most: int | None = None, of: str = "") -> int:
    """Returns `value` as an int in `least` .. `most`; `of` says what it counts."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InputError(field, value, f"must be an integer{of and ' of ' + of}, not {_kind(value)}")
    number = int(value)
    if (least is not None and number < least) or (most is not None and number > most):
        limits = f"must be at least {least}" if most is None else f"must be in {least} .. {most}"
        raise InputError(field, value, f"{limits}{of and ' ' + of}")
    return number


def seed(field: str, value: object) -> int:
    """Returns `value` as a seed."""
    number = integer(field, value)
    if not 0 <= number < SEEDS:
        raise InputError(field, value, "must be in 0 .. 2**32 - 1")
    return number


def number(field: str, value: object) -> float:
    """Returns `value` as a float; NaN and infinities are left to the caller."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(field, value, f"must be a number, not {_kind(value)}")
    if type(value) is float:
        return value
    try:
        return float(value)
    except OverflowError as error:
        raise InputError(field, value, "is out of the range of a float") from error


def instance(field: str, value: object, kind: type[T], remedy: str) -> T:
    """Returns `value` if it is a `kind`."""
    if not isinstance(value, kind):
        raise InputError(field, value, f"{remedy}, not {_kind(value)}")
    return value


def boolean(field: str, value: object) -> bool:
    """Returns `value` as a bool; numbers are none."""
    return bool(instance(field, value, bool | np.bool_, "must be True or False"))  # pyright: ignore[reportArgumentType]


def text(field: str, value: object) -> str:
    """Returns `value` if it is text."""
    return instance(field, value, str, "must be text")


def path(field: str, value: object) -> str:
    """Returns a path as text."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise InputError(field, value, f"must be a path, not {_kind(value)}")
    if not os.fspath(value):
        raise InputError(field, value, "is empty; give a path")
    return os.fspath(value)


def items(field: str, value: object, remedy: str) -> list[Any]:
    """Returns the items of anything that has some in an order; text, bytes, dicts and sets are refused."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set):
        raise InputError(field, value, f"{remedy}, not {_kind(value)}")
    try:
        return list(value)
    except TypeError as error:  # an array without axes
        raise InputError(field, value, f"{remedy}, not a single number") from error


def plain(config: T, where: str = "") -> T:
    """Returns a dataclass whose fields have the types that it declares, nested ones included.

    Lists become tuples, integers floats where floats are declared, numpy's scalars plain numbers, and paths text;
    anything else of another type raises InputError naming `where`.<field>.
    """
    hints = typing.get_type_hints(type(config))
    values = {}
    for name, value in vars(config).items():
        field = f"{where}.{name}" if where else name
        if (new := typed(hints[name], value, field)) is not value:
            values[name] = new
    return dataclasses.replace(config, **values) if values else config  # pyright: ignore[reportArgumentType]


def typed(hint: Any, value: object, field: str) -> Any:
    """Returns `value` as `hint`, the annotation of a configuration's field, says."""
    if dataclasses.is_dataclass(hint):
        name = getattr(hint, "__name__", "")
        return plain(instance(field, value, hint, f"must be of type {name}"), field)  # pyright: ignore
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        given = items(field, value, f"must be a list of {'strings' if kind is str else 'integers'}")
        made = tuple(typed(kind, item, field) for item in given)
        return value if type(value) is tuple and all(a is b for a, b in zip(made, value, strict=True)) else made
    if hint is str or typing.get_origin(hint) is Literal:
        return text(field, os.fspath(value) if isinstance(value, os.PathLike) else value)
    return {bool: boolean, int: integer, float: number}[hint](field, value)


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
