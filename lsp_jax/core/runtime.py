"""The JAX runtime on the host side: counted device reads and compilations, the persistent compilation cache."""

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
    """Copies a pytree of device arrays to numpy arrays; one call counts as one read, whatever the number of leaves.

    With several processes each gets the complete arrays, and all must call it together.
    """
    global _reads
    _reads += 1
    leaves, structure = jax.tree.flatten(tree)
    spread = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _is_local(leaf)]
    if spread:  # sharded over devices of other processes too: replicate first
        copies = _replicate(leaves[spread[0]].sharding.mesh)([leaves[i] for i in spread])
        for i, copy in zip(spread, copies, strict=True):
            leaves[i] = copy
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _is_local(leaf: jax.Array) -> bool:
    return leaf.is_fully_addressable or leaf.is_fully_replicated


@lru_cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(mesh, PartitionSpec()))


def reads() -> int:
    """Number of device reads so far in this process; subtract two calls to count the reads in between."""
    return _reads


def compiles() -> tuple[int, float]:
    """Number of programs compiled (or loaded from the cache) since the import, and the seconds spent on them."""
    return _compiles, _compile_seconds


def _on_event(event: str, duration_secs: float, **_: Any) -> None:
    global _compiles, _compile_seconds
    if event == "/jax/core/compile/backend_compile_duration":
        _compiles += 1
        _compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_on_event)


def keep_programs(directory: str) -> None:
    """Turns on JAX's persistent compilation cache in `directory`; does nothing if that is empty.

    A directory that is already set (JAX_COMPILATION_CACHE_DIR, or in a notebook) stays. Every program is cached: most
    of a run's programs compile in less than one second, JAX's default threshold.
    """
    if not directory:
        return
    # keyed by processor: a program compiled for one CPU may hit an illegal instruction on another. The devices are not
    # part of the key, because listing them would initialise the backend
    path = user_path("compilation_cache", directory) / _processor()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # a compilation before this call has fixed that there is no cache


def _processor() -> str:
    """Returns a short hash of the CPU's model and feature flags."""
    description = platform.machine() + platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        description += "".join(re.findall(r"^(?:model name|flags|Features)\s*:.*$", info.read_text(), re.M)[:2])
    return hashlib.sha256(description.encode()).hexdigest()[:12]
