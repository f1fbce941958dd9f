"""When a run saves, what goes with the state, and what happens when it cannot."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from lsp_jax import processes
from lsp_jax.learn.update import TrainState
from lsp_jax.run.checkpoint import Checkpoints, SaveError
from lsp_jax.run.checksums import manifest
from lsp_jax.run.metrics import MetricsWriter


class Saving:
    """Saves of one run: the state with the bytes its files have, the data cursor, and the run's identity."""

    def __init__(
        self, checkpoints: Checkpoints, writer: MetricsWriter | None, identity: dict[str, Any], go_on: bool, done: int
    ):
        """`go_on` after a save that fails; `done` is the iteration of the newest checkpoint, 0 without one."""
        self._checkpoints, self._writer, self._identity, self._go_on = checkpoints, writer, identity, go_on
        self.newest = done
        self.cursor = 0
        """Where the data's queries go on after the newest save that was tried."""
        self.failed = 0
        """Saves that could not be written."""

    def save(self, number: int, state: TrainState, cursor: int) -> None:
        """The state as of iteration `number`; `cursor` is where the next one's queries begin in the data set."""
        self.wait()  # an earlier one's failure is its own
        processes.barrier("saving")  # named and bounded, which Orbax's own waiting is not
        arrays, offsets = manifest(state), {}
        if self._writer is not None:
            self._writer.write_checksums(number, arrays)
            offsets = self._writer.offsets()
        host = {"iteration": number, "cursor": cursor, "offsets": offsets, **self._identity}
        before, self.newest, self.cursor = self.newest, number, cursor
        try:
            self._checkpoints.save(number, state, host, arrays)
        except SaveError as error:
            self.newest = before
            self._failure(error)

    def check(self) -> None:
        """Whether what is written in the background has failed; once an iteration."""
        try:
            self._checkpoints.check()
        except SaveError as error:
            self._failure(error)

    def wait(self) -> None:
        """Until all is on disk."""
        try:
            self._checkpoints.wait()
        except SaveError as error:
            self._failure(error)

    def finish(self, number: int, state: TrainState) -> None:
        """Until iteration `number`, the last one, is on disk: tried once more where it could not be written."""
        self.wait()
        if self.newest < number:
            self.save(number, state, self.cursor)
            self.wait()

    def _failure(self, error: SaveError) -> None:
        self.failed += 1
        with suppress(OSError):
            self.newest = max(self._checkpoints.steps(), default=0)
        self.newest = processes.gather("newest checkpoint", self.newest)[0]  # file systems may show them differently
        kept = f"the newest one is {self.newest}" if self.newest else "there is none yet"
        if not self._go_on:
            raise SaveError(f"{error}; {kept} (--save-errors go_on trains on without)") from error
        if processes.is_writer():
            with suppress(OSError):
                print(f"lsp-jax: warning: {error}; {kept}, going on", file=sys.stderr, flush=True)
