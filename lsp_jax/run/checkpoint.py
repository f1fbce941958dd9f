"""Checkpoints of a run: Orbax holds the train state, a JSON beside it what the host must cut back to on resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lsp_jax.errors import InputError
from lsp_jax.learn.update import TrainState


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them, written in the background.

    An error of a background save is raised by the next call.
    """

    def __init__(self, directory: str | Path, keep: int = 2):
        # the directory is made by the first save, so that looking for checkpoints leaves nothing behind
        self.directory = Path(directory).expanduser().resolve()
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def latest(self) -> int | None:
        """The newest whole checkpoint's iteration, None without one."""
        return self._open().latest_step() if self.directory.is_dir() else None

    def save(self, iteration: int, state: TrainState, host_state: dict[str, Any]) -> None:
        """Saves `state` as of `iteration`; returns once the arrays are copied, the writing goes on."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host_state))
        self._open().save(iteration, args=args)

    def restore(self, iteration: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state in the shapes, dtypes and shardings of `abstract`, and the host's part.

        Raises InputError when the checkpoint cannot be read or belongs to a model of another shape.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), host=ocp.args.JsonRestore())
        try:
            restored = self._open().restore(iteration, args=args)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise InputError(
                "checkpoint", f"{self.directory}/{iteration}", f"cannot be restored ({reason}); is it of another model?"
            ) from error
        return restored["state"], restored["host"]

    def wait(self) -> None:
        """Returns when every save is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves under way and frees the manager."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None


def abstract_state(make: Callable[[], TrainState]) -> TrainState:
    """Shapes, dtypes and the placement of the state that `make` would build, without building it."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(make),
    )
