"""User-defined reward functions: loading by name, calling, checking of results.

Imports no JAX, because it runs in worker processes too.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError, one_line


def load_callable(spec: str) -> Callable[..., Any]:
    """Loads the function named by "package.module:function" or "path/to/file.py:function".

    This imports and thereby runs the user's module: never build `spec` from model output or data.

    Raises:
        InputError: `spec` is malformed, the module is missing or fails on import, or has no such function.
    """
    target, _, attribute = spec.rpartition(":")
    if not target or not attribute.isidentifier():
        raise InputError("reward.callable", spec, "must be package.module:function or path/to/file.py:function")
    try:
        module = _load_file(target) if target.endswith(".py") else importlib.import_module(target)
    except (Exception, SystemExit) as error:  # user code may raise anything, and scripts may call sys.exit
        remedy = f"importing {target} raised {one_line(error)}; a file is named as path/to/file.py:function"
        raise InputError("reward.callable", spec, remedy) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        remedy = f"{target} has no function {attribute}" if function is None else f"{attribute} is not callable"
        raise InputError("reward.callable", spec, f"{remedy}; name a function of (queries, answers)")
    return function


def _load_file(path: str) -> Any:
    name = f"_lsp_jax_user_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def takes_rows(function: Callable[..., Any]) -> bool:
    """Whether the function has a parameter named `rows`."""
    try:
        return "rows" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def call_reward(
    function: Callable[..., Any],
    name: str,
    queries: list[str],
    answers: list[list[str]],
    rows: Sequence[Mapping[str, Any]],
) -> np.ndarray:
    """Calls the function and checks its result; returns float32 [N, G].

    Raises:
        InputError: wrong shape or non-numeric values.
        Exception: any exception of the function.
    """
    # copies: a function that modifies its arguments must not affect other components
    arguments = [list(queries), [list(group) for group in answers]]
    extra = {"rows": [dict(row) for row in rows]} if takes_rows(function) else {}
    return reward_array(function(*arguments, **extra), name, (len(queries), len(answers[0])))


def reward_array(result: Any, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Converts a result to float32 [N, G]; raises InputError if it is not an array of numbers of that shape."""
    returns = f"the function must return numbers of shape (queries, answers per query) = {shape}, one row per query"
    try:
        array = np.asarray(result)
    except ValueError as error:  # rows of different lengths
        raise InputError("reward.callable", name, f"returned rows of unequal length; {returns}") from error
    if array.shape != shape:
        raise InputError("reward.callable", name, f"returned shape {array.shape}; {returns}")
    # numpy does not classify the small floats of ml_dtypes as floats; they are recognised by name
    if array.dtype.kind not in "biuf" and not array.dtype.name.startswith(("bfloat", "float")):
        raise InputError("reward.callable", name, f"returned dtype {array.dtype}; {returns}")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are masked
        return array.astype(np.float32)
