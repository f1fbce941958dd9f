"""How tests compile, and how much of it is kept.

Where JAX is told to leave most optimisations out, programs of tiny models take a third of the compiler's time. Imported
for that by `conftest.py` and by what tests start as processes: what is compared bit by bit is then compiled alike.
"""

from __future__ import annotations

import fcntl
import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import jax
from jax._src import compiler

if "PYTEST_CURRENT_TEST" in os.environ:
    # What a test has started needs no torch, which transformers would import with every tokenizer: seconds each time.
    _find_spec = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *given: None if name == "torch" else _find_spec(name, *given)  # type: ignore

_options = compiler.get_compile_options


def _quick_options(*arguments: Any, backend: Any = None, **more: Any) -> Any:
    """XLA's older code generator for CPUs besides: with the newer one a loop's gradient takes twice as long to compile.
    JAX hands no options to every program, but it keeps programs by them."""
    options = _options(*arguments, backend=backend, **more)
    quick = options.executable_build_options.debug_options.xla_llvm_disable_expensive_passes
    if quick and getattr(backend, "platform", "") == "cpu":
        options.env_option_overrides = [*options.env_option_overrides, ("xla_cpu_use_fusion_emitters", False)]
    return options


if jax.__version_info__ < (0, 11):  # later ones have the newer generator alone
    compiler.get_compile_options = _quick_options


def let_go(folder: Path, most: int) -> None:
    """Removes the programs that were read longest ago until the rest takes `most` bytes.

    Not left to JAX, which with a bound of its own reads the whole folder at every program it keeps.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = 0
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may have begun as well
        found = [(path, path.stat()) for path in folder.rglob("*-cache")]
        for path, about in sorted(found, key=lambda each: -max(each[1].st_atime, each[1].st_mtime)):
            kept += about.st_size
            if kept > most:
                path.unlink()
