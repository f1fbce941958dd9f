"""The one door from device to host: every read passes here and is counted. So are compilations."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
