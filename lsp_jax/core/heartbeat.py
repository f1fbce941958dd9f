"""How a process notices that another one of its run has died, and ends with its name instead of waiting for ever.

Every process writes a beat into the coordinator's key-value store, and looks at the others' beats (`Watch`). A beat
that stands still names the dead. The coordinator itself lives in process 0: when that dies JAX ends every other process
at once from its own thread, with a stack trace and no name. So the others reach it through a `Relay` of ours, which
sees the connection end first.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import jax

from lsp_jax.core.errors import LOST_STATUS

BEAT = 2.0
"""Seconds between two beats."""
GRACE = 2 * BEAT
"""Seconds that are left to an error of one's own when another process has failed, and by process 0 to the others."""
LINGER = GRACE + 2 * BEAT
"""Seconds that a failed process 0 waits: until the others have read why, and have taken their `GRACE`."""
_BEATS = "lsp_jax/beat/"
_DONE, _FAILED = "done", "failed: "


def end(message: str, linger: float = 0.0) -> NoReturn:
    """Ends this process with one line on standard error, whatever its other threads are waiting for."""
    with suppress(Exception):
        sys.stdout.flush()
    print(f"lsp-jax: error: {message}", file=sys.stderr, flush=True)
    time.sleep(linger)
    os._exit(LOST_STATUS)


class Watch(threading.Thread):
    """Beats, and looks at the others' beats; ends the process when one of them stands still or says that it failed."""

    def __init__(self, client: Any, index: int, names: Sequence[str], silence: float):
        """`client` is the coordination service's; `names[i]` names process i; `silence` in seconds."""
        super().__init__(name="lsp-jax-watch", daemon=True)
        self._client, self._index, self._names = client, index, names
        self._looks = max(2, round(silence / BEAT))
        self._silence = silence
        self._stopping = threading.Event()
        self._seen: dict[int, tuple[str, int]] = {}

    def say(self, word: str) -> None:
        """Replaces this process's beat."""
        self._client.key_value_set(f"{_BEATS}{self._index}", word, allow_overwrite=True)

    def stop(self, reason: str | None = None) -> None:
        """Ends the beats: the work is done, or failed for `reason`, which the others then give when they end."""
        self._stopping.set()
        self.join(GRACE)
        with suppress(jax.errors.JaxRuntimeError):
            self.say(_DONE if reason is None else _FAILED + reason)

    def run(self) -> None:
        number = 0
        while not self._stopping.wait(BEAT):
            number += 1
            try:
                self.say(str(number))
                beats = {int(key.rpartition("/")[2]): beat for key, beat in self._client.key_value_dir_get(_BEATS)}
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone: that is the relay's to see
            self._look(beats)

    def _look(self, beats: dict[int, str]) -> None:
        for index, name in enumerate(self._names):
            beat = beats.get(index, "")
            if index == self._index or beat == _DONE:
                continue
            if beat.startswith(_FAILED):
                # this process may be about to end with the same error, which is then its own to tell
                if not self._stopping.wait(GRACE):
                    self._end(f"{name} has failed: {beat.removeprefix(_FAILED)}")
                return
            # counted in looks, not seconds: a machine that slept takes nobody else for dead
            last, looks = self._seen.get(index, ("", 0))
            self._seen[index] = (beat, looks + 1 if beat == last else 0)
            if self._seen[index][1] > self._looks:
                self._end(f"{name} has shown no life for {self._silence:g} seconds: it has died, or its machine has")

    def _end(self, message: str) -> None:
        # the others see the same for themselves, as long as process 0 is there to ask
        end(message, linger=GRACE if self._index == 0 else 0.0)


class Relay:
    """Passes connections to a local port on to the coordinator, and is the first to see them end."""

    def __init__(self, coordinator: str, silence: float, lost: Callable[[str], None]):
        """`coordinator` is host:port; `lost` is called once armed, with what happened, when it is gone or silent."""
        host, _, port = coordinator.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._silence, self._lost = silence, lost
        self._armed, self._heard = False, time.monotonic()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address: str = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._start(self._accept)

    def arm(self, armed: bool = True) -> None:
        """From now on the coordinator answers every beat: its silence, like its end, is a loss."""
        self._heard, self._armed = time.monotonic(), armed

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name="lsp-jax-relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._door.accept()
            try:
                far = socket.create_connection(self._target, timeout=self._silence)
            except OSError:
                near.close()  # not there yet: JAX tries again
                continue
            far.settimeout(1.0)
            closed = threading.Event()
            self._start(self._up, near, far, closed)
            self._start(self._down, near, far, closed)

    def _up(self, near: socket.socket, far: socket.socket, closed: threading.Event) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                _send(far, data)
        closed.set()  # by this process itself
        far.close()

    def _down(self, near: socket.socket, far: socket.socket, closed: threading.Event) -> None:
        while not closed.is_set():
            try:
                data = far.recv(1 << 16)
            except TimeoutError:
                if self._armed and time.monotonic() - self._heard > self._silence:
                    self._lost(f"has shown no life for {self._silence:g} seconds: it has died, or its machine has")
                continue
            except OSError:
                data = b""
            if not data:
                if self._armed and not closed.is_set():
                    self._lost("has died: it closed its connection")
                break
            self._heard = time.monotonic()
            with suppress(OSError):
                near.sendall(data)
        near.close()


def _send(target: socket.socket, data: bytes) -> None:
    """`sendall` that a time limit meant for reading does not break off."""
    view = memoryview(data)
    while view:
        with suppress(TimeoutError):
            view = view[target.send(view) :]
