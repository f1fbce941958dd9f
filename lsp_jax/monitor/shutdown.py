"""Being asked to end: SIGTERM (preemption, Slurm, Kubernetes) and SIGINT (Ctrl-C) are noted at once, acted on between
two phases.

The main thread may be inside a compiled program for minutes, where no handler of Python's runs. So the signal wakes a
thread, which notes it, ends the process at a second SIGINT, and sees that what is left takes no longer than allowed.
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
    """Anything with a `close`."""

    def close(self) -> None: ...


class Stopping:
    """While it is entered, the first of those signals asks the run to end; the handlers of before come back after."""

    def __init__(self, seconds: float):
        """`seconds` after the first signal the process ends wherever it is."""
        self._seconds = seconds
        self._asked = ""
        self._old: dict[int, object] = {}
        self._over = threading.Event()

    def __enter__(self) -> Stopping:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's: whoever runs this elsewhere handles them
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
                if handler is not None:  # None: one that Python did not install, and cannot
                    signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def check(self, place: str) -> None:
        """Raises Stopped when any process of the run has been asked to end; all call it together, at the same `place`.

        Raises ProcessError naming a process that is late.
        """
        asked = [name for name in processes.gather(place, self._asked) if name]
        if asked:
            raise Stopped(f"asked to end by {asked[0]}")

    def _watch(self) -> None:
        while number := self._reader.recv(1):
            if number[0] not in _SIGNALS:
                continue
            if self._asked and number[0] == signal.SIGINT:
                _end(INTERRUPTED_STATUS, "interrupted twice: ended at once, the newest checkpoint is the one before")
            self.ask(signal.Signals(number[0]).name)
        self._reader.close()

    def ask(self, name: str) -> None:
        """Asks the run to end, for the reason `name`; any thread may, and once is enough."""
        if not self._asked:
            self._asked = name
            threading.Thread(target=self._limit, name="lsp-jax-stop-limit", daemon=True).start()
            _say(f"{name}: saving after this phase; Ctrl-C to end at once")

    def _limit(self) -> None:
        if not self._over.wait(self._seconds):
            _end(STOPPED_STATUS, f"not saved within {self._seconds:g} seconds: the newest checkpoint is the one before")


def close_all(*resources: Closable | None) -> None:
    """Closes every one that is there, whatever another one raises: that must not stand in for what ends the run."""
    for resource in resources:
        try:
            if resource is not None:
                resource.close()
        except Exception as error:  # trackers and terminals that are gone
            _say(f"warning: {type(error).__name__} while closing: {error}")


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread has it."""


def _say(message: str) -> None:
    with suppress(OSError, ValueError):  # the terminal or the pipe may be gone with the same signal
        print(f"lsp-jax: {message}", file=sys.stderr, flush=True)


def _end(status: int, message: str) -> None:
    _say(message)
    os._exit(status)
