"""Watchdog that ends a run without progress, with the stacks of all threads on standard error.

A Python thread checks the time of the last beat. If a call holds the interpreter so that it cannot run, the thread of
`faulthandler`, which needs no interpreter, ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from lsp_jax.core.errors import STALLED_STATUS

LATER = 30.0
"""Seconds after the Python thread at which `faulthandler` ends the process."""


class Watchdog:
    """Context that ends the process if no `beat` comes for `seconds`; 0 disables it."""

    def __init__(self, seconds: float, stream: TextIO | None = None):
        self._seconds, self._stream = seconds, stream
        self._phase, self._last = "start", time.monotonic()
        self._over = threading.Event()
        self.more: Callable[[], None] = lambda: None
        """Called after the stacks of this process are written, to write those of its children."""

    def __enter__(self) -> Watchdog:
        if self._seconds:
            # the original stream: replacements of sys.stderr (notebooks, tests) may have no file descriptor
            self._stream = self._stream or sys.__stderr__ or sys.stderr
            self.beat("start")
            threading.Thread(target=self._watch, name="lsp-jax-watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str) -> None:
        """Records progress: `phase` begins."""
        self._phase, self._last = phase, time.monotonic()
        if self._seconds and self._stream is not None and not self._over.is_set():
            faulthandler.dump_traceback_later(self._seconds + LATER, exit=True, file=self._stream)  # replaces the last

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                try:
                    self._tell(silent)
                finally:
                    os._exit(STALLED_STATUS)

    def _tell(self, silent: float) -> None:
        assert self._stream is not None
        self._stream.write(
            f"lsp-jax: error: no progress for {silent:.0f} seconds in the phase {self._phase} (progress_timeout): "
            "all threads' stacks follow\n"
        )
        self._stream.flush()
        faulthandler.dump_traceback(self._stream, all_threads=True)
        self.more()
