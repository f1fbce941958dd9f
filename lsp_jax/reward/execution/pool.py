"""A pool of child processes that score for the run and cannot hang it.

A child is a command that speaks JSON lines: first `{"ready": true, ...}`, then one reply per request. It may be
compromised by what it grades, so its output is not trusted: replies are limited in size, parsed as data, and must carry
the number of the request. An item that times out, or whose child dies or violates the protocol, fails with a reason;
the child is killed, other items keep their results, and the next item gets a new child.

Children end with the run: their input is closed, and on Linux they are killed with the thread that started them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lsp_jax.core.console import printable
from lsp_jax.core.errors import InputError

START_SECONDS = 60.0  # time limit until a child is ready; its imports do not count towards the time of the item
START_FAILURES = 3  # consecutive failures to start after which the remaining items of a call fail too
MAX_REPLY = 8 << 20  # bytes per line
MAX_LINE = 1000  # bytes of a line of stderr that are kept until its end is read
MAX_LOG = 10_000  # bytes of a child's stderr that are forwarded per item


class Program(NamedTuple):
    """The command that starts a child; children of one program are interchangeable."""

    argv: tuple[str, ...]
    isolated: bool = False
    """Start with an empty environment; else with that of this process and the same `sys.path`."""
    once: bool = False
    """Start a new child for every item."""


class Outcome(NamedTuple):
    """The outcome of one item."""

    reply: dict[str, Any] | None
    """The child's reply; None on failure."""
    failure: str = ""
    """Reason of the failure, as one printable line."""
    started: bool = True
    """Whether a child was ready and received the item; if False, the item itself is not at fault."""
    refused: str = ""
    """The child's reason for not starting: the remedy of an InputError."""


class WorkerFailure(RuntimeError):
    """A call without a result: it timed out, raised, or its process died."""


def line_of(data: bytes | str) -> str:
    """Returns output of a child as one printable line."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    return printable(" ".join(text.split()), limit=300)


def _forward(lines: Iterable[bytes]) -> None:
    sys.stderr.writelines(f"{text}\n" for text in map(line_of, lines) if text)


class _Child:
    """One child process and its current item."""

    def __init__(self, program: Program):
        self.program, self.number = program, 0
        self.process = subprocess.Popen(
            program.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={} if program.isolated else _environment(),
            start_new_session=True,  # Ctrl-C is handled by the run, and the process group can be killed
        )
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.stdin, self.stdout, self.stderr = self.process.stdin, self.process.stdout, self.process.stderr
        for pipe in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(pipe.fileno(), False)
        self.ready: dict[str, Any] | None = None
        self.reading, self.log, self.logged, self.log_open = bytearray(), bytearray(), 0, True
        self.line, self.log_lock = b"", threading.Lock()

    def give(self, item: Mapping[str, Any], seconds: float) -> None:
        """Assigns an item, with a number that distinguishes its reply from a late one."""
        self.number += 1
        self.seconds, self.outcome = seconds, None
        request = json.dumps({**item, "number": self.number}, default=str).encode() + b"\n"
        self.request, self.logged = memoryview(request), 0
        self.deadline = time.monotonic() + (START_SECONDS if self.ready is None else seconds)

    def fail(self, why: str) -> None:
        log = f" ({line_of(bytes(self.log[-1000:]))})" if self.log and self.ready is None else ""
        self.outcome = Outcome(None, why + log, started=self.ready is not None)

    def is_late(self, now: float) -> bool:
        return self.outcome is None and now > self.deadline

    def fail_late(self) -> None:
        limit = START_SECONDS if self.ready is None else self.seconds
        self.fail(f"{'took' if self.ready else 'was not ready after'} more than {limit:g} s")

    def write(self) -> None:
        try:
            self.request = self.request[os.write(self.stdin.fileno(), self.request) :]
        except BlockingIOError:
            pass
        except OSError:  # it exited; its remaining output decides the outcome
            self.request = self.request[:0]

    def read_log(self) -> bool:
        """Forwards the complete lines of stderr; returns False at end of file."""
        with self.log_lock:  # `show_stacks` reads in another thread
            data = _read(self.stderr)
            if data is None:
                return True
            self.log_open = bool(data)
            self.log = (self.log + data)[-1000:]
            shown = data[: max(MAX_LOG - self.logged, 0)]
            self.logged += len(data)
            # faulthandler writes a line in pieces, so a read may end anywhere
            *lines, self.line = re.split(rb"[\r\n]", self.line[:MAX_LINE] + shown) if data else (self.line, b"")
        _forward(lines)
        return bool(data)

    def read(self) -> bool:
        """Reads a message of the child, readiness or reply; returns False at end of file."""
        data = _read(self.stdout)
        if data is None:
            return True
        self.reading += data
        end = self.reading.find(b"\n")
        if end < 0:
            if len(self.reading) > MAX_REPLY:
                self.fail(f"replied with more than {MAX_REPLY} bytes")
            elif not data:
                while self.read_log() and self.ready is None and self.process.poll() is None:
                    time.sleep(0.001)  # collects the reason why it could not start
                self.fail(f"ended without a reply{self._status()}")
            return bool(data)
        line, self.reading = bytes(self.reading[:end]), self.reading[end + 1 :]
        message = None
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(line)
        if self.ready is None and isinstance(message, dict) and message.get("ready") is True and not self.reading:
            self.ready, self.deadline = message, time.monotonic() + self.seconds
        elif self.ready is None and isinstance(message, dict) and isinstance(message.get("refused"), str):
            refused = line_of(message["refused"])
            self.outcome = Outcome(None, refused, started=False, refused=refused)
        elif self.ready is None or not isinstance(message, dict) or message.get("number") != self.number:
            self.fail("sent an invalid reply")
        elif self.reading:
            self.fail("sent more than one reply")
        else:
            self.outcome = Outcome(message)
        return True

    def _status(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f", exit status {self.process.wait(0.1)}"
        return ""

    def end(self) -> None:
        """Kills the child and its process group."""
        _forward([self.line])
        self.line = b""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        for pipe in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()


def _read(pipe: Any) -> bytes | None:
    """Reads without blocking: None if there is nothing yet, empty at end of file."""
    try:
        return os.read(pipe.fileno(), 1 << 16)
    except BlockingIOError:
        return None
    except (OSError, ValueError):  # ValueError: the pipe is closed
        return b""


def _environment() -> dict[str, str]:
    """This process's environment with the same `sys.path`; JAX in a child uses the CPU unless JAX_PLATFORMS is set."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path}


def _end_all(idle: dict[Program, list[_Child]]) -> None:
    for children in idle.values():
        for child in children:
            child.end()
    idle.clear()


class Workers:
    """A pool of up to `count` children running in parallel, with at most `timeout` seconds per item.

    Children are started on demand, reused by later calls, and ended with the pool. Calls from several threads are
    serialised. Linux kills a child with the thread that started it, so call from a long-lived thread.

    Raises:
        InputError: `count` below 1 or `timeout` not above 0.
    """

    def __init__(self, count: int | None = None, timeout: float = 60.0):
        self.count: int = min(os.cpu_count() or 1, 16) if count is None else count
        self.timeout = timeout
        if self.count < 1:
            raise InputError("workers.count", count, "must be 1 or more")
        if not 0 < timeout < float("inf"):
            raise InputError("workers.timeout", timeout, "must be a number of seconds above 0")
        self._idle: dict[Program, list[_Child]] = {}
        self._busy: dict[int, _Child] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_all, self._idle)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the children; a later call starts new ones."""
        with self._lock:
            _end_all(self._idle)

    def show_stacks(self) -> None:
        """Makes every busy child print its stack to standard error; may be called from any thread at any time."""
        _show_stacks(list(self._busy.values()))

    def run(self, program: Program, items: Sequence[Mapping[str, Any]], timeout: float | None = None) -> list[Outcome]:
        """Returns one outcome per item, in order; never raises for the behaviour of a child."""
        with self._lock:
            return self._run(program, items, timeout or self.timeout)

    def _run(self, program: Program, items: Sequence[Mapping[str, Any]], seconds: float) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting, busy, not_started = deque(enumerate(items)), self._busy, 0
        try:
            while waiting or busy:
                while waiting and len(busy) < self.count:
                    place, item = waiting.popleft()
                    try:
                        child = self._child(program)
                        child.give(item, seconds)
                        busy[place] = child
                    except (OSError, ValueError) as error:  # ValueError: a NUL in its command
                        outcomes[place] = Outcome(None, f"could not be started: {line_of(str(error))}", False)
                        not_started += 1
                _attend(list(busy.values()))
                for place, child in list(busy.items()):
                    if child.outcome is None:
                        continue
                    del busy[place]
                    outcomes[place] = child.outcome
                    not_started = 0 if child.outcome.started else not_started + 1
                    if child.outcome.reply is None or program.once:
                        child.end()
                    else:
                        self._idle.setdefault(program, []).append(child)
                if not_started >= START_FAILURES:
                    why = next(o.failure for o in reversed(outcomes.values()) if not o.started)
                    outcomes.update({place: Outcome(None, why, False) for place, _ in waiting})
                    waiting.clear()
        finally:
            for child in busy.values():
                child.end()
            busy.clear()
        return [outcomes[place] for place in range(len(items))]

    def _child(self, program: Program) -> _Child:
        """Returns an idle child or starts a new one."""
        idle = self._idle.get(program, [])
        while idle:
            child = idle.pop()
            if child.process.poll() is None:
                return child
            child.end()
        return _Child(program)

    def ready(self, program: Program) -> Outcome:
        """Starts a child of this program if needed; returns its ready message as `reply`, or the failure."""
        with self._lock:
            try:
                child = self._child(program)
            except (OSError, ValueError) as error:
                return Outcome(None, f"could not be started: {line_of(str(error))}", False)
            if child.ready is None:
                child.give({}, self.timeout)
                while child.ready is None and child.outcome is None:
                    _attend([child], write=False)
            if child.ready is None:
                child.end()
                return child.outcome or Outcome(None, "is not ready", False)
            child.number = 0
            self._idle.setdefault(program, []).append(child)
            return Outcome(child.ready)


def _attend(children: list[_Child], write: bool = True) -> None:
    """Waits until a child sends output, accepts input or times out, and handles that."""
    if not children:
        return
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.stdout, selectors.EVENT_READ, child.read)
            if child.log_open:
                selector.register(child.stderr, selectors.EVENT_READ, child.read_log)
            if write and child.ready is not None and len(child.request):
                selector.register(child.stdin, selectors.EVENT_WRITE, child.write)
        wait = max(min(child.deadline for child in children) - time.monotonic(), 0.0)
        for key, _ in selector.select(wait + 0.001):
            key.data()
    now = time.monotonic()  # one time for all: printing stacks below must not make others late
    late = [child for child in children if child.is_late(now)]
    if late:
        _show_stacks(late)
    for child in late:
        child.fail_late()


def _show_stacks(children: list[_Child]) -> None:
    """Makes children that support it print their stacks to stderr, which is forwarded."""
    able = [child for child in children if child.ready and child.ready.get("stacks") is True]
    for child in able:
        child.read_log()  # what is waiting does not count towards the stack's log limit
        child.logged = 0
        child.process.send_signal(signal.SIGUSR1)
    for _ in range(10 if able else 0):
        time.sleep(0.02)
        for child in able:
            child.read_log()
