"""The JAX runtime seen from the host: counted reads from devices, counted compilations, the cache of programs."""

from __future__ import annotations

import hashlib
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsp_jax.core.files import user_path

_reads = 0
_compiles = 0
_compile_seconds = 0.0


def to_host(tree: Any) -> Any:
    """Copies a pytree of device arrays to numpy arrays; one call is one read, whatever the number of leaves.

    With several processes each gets the whole of every array, and all must call it together.
    """
    global _reads
    _reads += 1
    leaves, structure = jax.tree.flatten(tree)
    spread = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _at_hand(leaf)]
    if spread:  # over devices of other processes too: every device gets a copy of the whole
        copies = _replicate(leaves[spread[0]].sharding.mesh)([leaves[i] for i in spread])
        for i, copy in zip(spread, copies, strict=True):
            leaves[i] = copy
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _at_hand(leaf: jax.Array) -> bool:
    return leaf.is_fully_addressable or leaf.is_fully_replicated


@lru_cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, PartitionSpec()))


def reads() -> int:
    """How often this process has read from its devices; the difference of two calls counts what lies between."""
    return _reads


def compiles() -> tuple[int, float]:
    """How many programs this process has compiled (or taken from the cache) since the import, and seconds spent."""
    return _compiles, _compile_seconds


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    global _compiles, _compile_seconds
    if event == "/jax/core/compile/backend_compile_duration":
        _compiles += 1
        _compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_on_event)


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
