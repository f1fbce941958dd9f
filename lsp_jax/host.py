"""The one door from device to host: every read passes here and is counted. So are compilations."""

from __future__ import annotations

from typing import Any

import jax

_reads = 0
_compiles = 0
_compile_seconds = 0.0


def to_host(tree: Any) -> Any:
    """Copies a pytree of device arrays to numpy arrays; one call is one read, whatever the number of leaves."""
    global _reads
    _reads += 1
    return jax.device_get(tree)


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
