"""Graceful shutdown: SIGTERM (preemption, Slurm, Kubernetes) and SIGINT (Ctrl-C) stop a run between two phases.

The main thread may be inside a compiled program for minutes, where Python runs no signal handlers. So a signal wakes a
thread, which records it, ends the process at a second SIGINT, and enforces the time limit of saving.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Protocol

from lsp_jax.core import processes
from lsp_jax.core.errors import STOPPED_STATUS, Stopped

INTERRUPTED_STATUS = 130
_SIGNALS = signal.SIGTERM, signal.SIGINT


class Closable(Protocol):
    """An object with a `close` method."""

    def close(self) -> None: ...


class Stopping:
    """Context in which the first signal requests the end of the run; restores the previous handlers on exit."""

    def __init__(self, seconds: float):
        """`seconds` after the first signal the process is ended in any case."""
        self._seconds = seconds
        self._asked = ""
        self._old: dict[int, object] = {}
        self._over = threading.Event()

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can handle signals; here they are the caller's concern
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, _nothing) for number in _SIGNALS}
        threading.Thread(target=self._watch, name="lsp-jax-signals", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        old, self._old = self._old, {}
        if old:
            signal.set_wakeup_fd(self._old_descriptor)
            self._writer.close()  # ends the thread
            for number, handler in old.items():
                if handler is not None:  # None: not installed by Python, which cannot restore it
                    signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def check(self, place: str) -> None:
        """Raises Stopped if any process has been asked to end; all call it together, with the same `place`.

        Raises ProcessError naming a late process.
        """
        asked = [name for name in processes.gather(place, self._asked) if name]
        if asked:
            raise Stopped(f"asked to end by {asked[0]}")

    def _watch(self) -> None:
        while number := self._reader.recv(1):
            if number[0] not in _SIGNALS:
                continue
            if self._asked and number[0] == signal.SIGINT:
                _end(
                    INTERRUPTED_STATUS,
                    "interrupted twice: exiting without a save; the previous checkpoint is the newest",
                )
            self.ask(signal.Signals(number[0]).name)
        self._reader.close()

    def ask(self, name: str) -> None:
        """Requests the end of the run for the reason `name`, from any thread; repeated requests have no effect."""
        if not self._asked:
            self._asked = name
            threading.Thread(target=self._limit, name="lsp-jax-stop-limit", daemon=True).start()
            _say(f"{name}: saving after this phase; Ctrl-C to exit at once")

    def _limit(self) -> None:
        if not self._over.wait(self._seconds):
            _end(STOPPED_STATUS, f"not saved within {self._seconds:g} seconds: the previous checkpoint is the newest")


def close_all(*resources: Closable | None) -> None:
    """Closes all resources and only prints their errors, which must not replace the error that ended the run."""
    for resource in resources:
        try:
            if resource is not None:
                resource.close()
        except Exception as error:  # for example a tracker or terminal that no longer exists
            _say(f"warning: {type(error).__name__} while closing: {error}")


def _nothing(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread handles the signal."""


def _say(message: str) -> None:
    with suppress(OSError, ValueError):  # the same signal may have closed the terminal or pipe
        print(f"lsp-jax: {message}", file=sys.stderr, flush=True)


def _end(status: int, message: str) -> None:
    _say(message)
    os._exit(status)
