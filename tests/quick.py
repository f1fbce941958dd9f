"""Programs of tiny models in a third of the compiler's time, where JAX is told to leave most optimisations out.

Imported for what it does, by `conftest.py` and by what tests start as processes: those that are compared bit by bit are
then compiled alike.
"""

from __future__ import annotations

from typing import Any

import jax
from jax._src import compiler

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
