"""Compiled programs kept on disk, so that the second start of a run compiles nothing."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from lsp_jax.paths import user_path


def keep_programs(directory: str) -> None:
    """From here on JAX reads and writes compiled programs in `directory`; nothing for an empty one.

    A directory that is already set (JAX_COMPILATION_CACHE_DIR, or in a notebook) stays. Every program is kept: most of
    a run's compile in less than the second below which JAX keeps none.
    """
    if not directory:
        return
    # a program for this processor may end with an illegal instruction on another; which devices there are is not asked,
    # for that starts them
    path = user_path("compilation_cache", directory) / _processor()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # what was compiled before has settled that there is none


def _processor() -> str:
    """A short name for this processor's kind: its model and what it can do."""
    about = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        about += "".join(re.findall(r"^(?:model name|flags|Features)\s*:.*$", info.read_text(), re.M)[:2])
    return hashlib.sha256(about.encode()).hexdigest()[:12]
