"""Failure detection between the processes of a run: a process whose peer died exits with the peer's name.

Every process writes a heartbeat to the coordinator's key-value store and reads those of its peers (`Watch`); a
heartbeat that stops changing identifies the dead process. The coordinator runs in process 0: when that dies, JAX ends
all other processes from a thread of its own, with a stack trace and no name. The others therefore connect through a
`Relay`, which sees the connection close first.
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
"""Seconds between heartbeats."""
GRACE = 2 * BEAT
"""Seconds a process waits for an error of its own after a peer failed; process 0 waits as long for the others."""
LINGER = GRACE + 2 * BEAT
"""Seconds a failed process 0 stays up, so that the others can read the reason within their `GRACE`."""
_BEATS = "lsp_jax/beat/"
_DONE, _FAILED = "done", "failed: "


def end(message: str, linger: float = 0.0) -> NoReturn:
    """Exits this process with one line on standard error, even if other threads are blocked."""
    with suppress(Exception):
        sys.stdout.flush()
    print(f"lsp-jax: error: {message}", file=sys.stderr, flush=True)
    time.sleep(linger)
    os._exit(LOST_STATUS)


class Watch(threading.Thread):
    """Publishes heartbeats and monitors those of the peers; exits the process when a peer is silent or has failed."""

    def __init__(self, client: Any, index: int, names: Sequence[str], silence: float):
        """`client` is that of the coordination service, `names[i]` the name of process i, `silence` in seconds."""
        super().__init__(name="lsp-jax-watch", daemon=True)
        self._client, self._index, self._names = client, index, names
        self._max_checks = max(2, round(silence / BEAT))
        self._silence = silence
        self._stopping = threading.Event()
        self._seen: dict[int, tuple[str, int]] = {}

    def publish(self, beat: str) -> None:
        """Replaces this process's heartbeat."""
        self._client.key_value_set(f"{_BEATS}{self._index}", beat, allow_overwrite=True)

    def stop(self, reason: str | None = None) -> None:
        """Ends the heartbeats: the work is done, or failed for `reason`, which the peers then report."""
        self._stopping.set()
        self.join(GRACE)
        with suppress(jax.errors.JaxRuntimeError):
            self.publish(_DONE if reason is None else _FAILED + reason)

    def run(self) -> None:
        number = 0
        while not self._stopping.wait(BEAT):
            number += 1
            try:
                self.publish(str(number))
                beats = {int(key.rpartition("/")[2]): beat for key, beat in self._client.key_value_dir_get(_BEATS)}
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone; the relay reports it
            self._check(beats)

    def _check(self, beats: dict[int, str]) -> None:
        for index, name in enumerate(self._names):
            beat = beats.get(index, "")
            if index == self._index or beat == _DONE:
                continue
            if beat.startswith(_FAILED):
                # this process may be about to fail with the same error, which it should report itself
                if not self._stopping.wait(GRACE):
                    self._end(f"{name} has failed: {beat.removeprefix(_FAILED)}")
                return
            # counted in checks, not seconds: a host that was suspended must not take its peers for dead
            last, unchanged = self._seen.get(index, ("", 0))
            self._seen[index] = (beat, unchanged + 1 if beat == last else 0)
            if self._seen[index][1] > self._max_checks:
                self._end(f"{name} has sent no heartbeat for {self._silence:g} seconds: it or its host has died")

    def _end(self, message: str) -> None:
        # the peers detect the same failure themselves, as long as process 0 serves the store
        end(message, linger=GRACE if self._index == 0 else 0.0)


class Relay:
    """Forwards connections from a local port to the coordinator, to see them close before JAX does."""

    def __init__(self, coordinator: str, silence: float, lost: Callable[[str], None]):
        """`coordinator` is host:port. Once armed, `lost` is called with the reason when it is gone or silent."""
        host, _, port = coordinator.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._silence, self._lost = silence, lost
        self._armed, self._heard = False, time.monotonic()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address: str = f"127.0.0.1:{self._door.getsockname()[1]}"
        self._start(self._accept)

    def arm(self, armed: bool = True) -> None:
        """Starts (or stops) reporting the loss of the coordinator, including by silence: it answers every heartbeat."""
        self._heard, self._armed = time.monotonic(), armed

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, name="lsp-jax-relay", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._door.accept()
            try:
                far = socket.create_connection(self._target, timeout=self._silence)
            except OSError:
                near.close()  # not up yet: JAX retries
                continue
            far.settimeout(1.0)
            closed = threading.Event()
            self._start(self._up, near, far, closed)
            self._start(self._down, near, far, closed)

    def _up(self, near: socket.socket, far: socket.socket, closed: threading.Event) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                _send(far, data)
        closed.set()  # closed by this process
        far.close()

    def _down(self, near: socket.socket, far: socket.socket, closed: threading.Event) -> None:
        while not closed.is_set():
            try:
                data = far.recv(1 << 16)
            except TimeoutError:
                if self._armed and time.monotonic() - self._heard > self._silence:
                    self._lost(f"has sent no heartbeat for {self._silence:g} seconds: it or its host has died")
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
    """Sends all of `data`, retrying when the read timeout of the socket interrupts it."""
    view = memoryview(data)
    while view:
        with suppress(TimeoutError):
            view = view[target.send(view) :]
