"""When a run saves, what goes with the state, and what happens when it cannot."""

from __future__ import annotations

import sys
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
        before, self.newest = self.newest, number
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

    def _failure(self, error: SaveError) -> None:
        self.failed += 1
        whole = self._checkpoints.steps()
        self.newest = whole[-1] if whole else 0
        kept = f"the newest one is {self.newest}" if whole else "there is none yet"
        if not self._go_on:
            raise SaveError(f"{error}; {kept} (--save-errors go_on trains on without)") from error
        if processes.is_writer():
            print(f"lsp-jax: warning: {error}; {kept}, going on", file=sys.stderr, flush=True)
