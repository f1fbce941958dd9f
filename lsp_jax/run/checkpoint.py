"""Checkpoints of a run: Orbax holds the train state, a JSON beside it what the host must cut back to on resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from lsp_jax.errors import InputError
from lsp_jax.learn.update import TrainState
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import shardings


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
            # zstd takes a tenth off float32 weights, and for it holds up to as much memory again while it writes
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = {"params": arrays, "training": arrays, "host": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._manager

    def latest(self) -> int | None:
        """The newest whole checkpoint's iteration, None without one."""
        return self._open().latest_step() if self.directory.is_dir() else None

    def steps(self) -> list[int]:
        """Iterations of all whole checkpoints, oldest first."""
        return sorted(self._open().all_steps()) if self.directory.is_dir() else []

    def save(self, iteration: int, state: TrainState, host_state: dict[str, Any]) -> None:
        """Saves `state` as of `iteration`; returns once the arrays are copied, the writing goes on."""
        items = {name: ocp.args.PyTreeSave(part) for name, part in _split(state).items()}
        self._open().save(iteration, args=ocp.args.Composite(**items, host=ocp.args.JsonSave(host_state)))

    def restore(self, iteration: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state in the shapes, dtypes and shardings of `abstract`, and the host's part.

        Raises InputError when the checkpoint cannot be read or belongs to a model of another shape.
        """
        items = {name: _into(part) for name, part in _split(abstract).items()}
        restored = self._restore(iteration, ocp.args.Composite(**items, host=ocp.args.JsonRestore()))
        return TrainState(restored["params"], **restored["training"]), restored["host"]

    def restore_params(self, iteration: int, abstract: Params) -> Params:
        """The policy's parameters alone."""
        return self._restore(iteration, ocp.args.Composite(params=_into(abstract)))["params"]

    def _restore(self, iteration: int, args: ocp.args.Composite) -> Any:
        try:
            return self._open().restore(iteration, args=args)
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise InputError(
                "checkpoint", f"{self.directory}/{iteration}", f"cannot be restored ({reason}); is it of another model?"
            ) from error

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


def _split(state: TrainState) -> dict[str, Any]:
    """Two items, so that an export reads the parameters without the moments."""
    rest = {name: getattr(state, name) for name in TrainState._fields if name != "params"}
    return {"params": state.params, "training": rest}


def _into(abstract: Any) -> ocp.args.PyTreeRestore:
    """Reads arrays in the shapes, dtypes and shardings of `abstract`; another shape is an error."""
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def abstract(mesh: Mesh | None, make: Callable[..., Any], *arguments: Any) -> Any:
    """Shapes, dtypes and the placement on `mesh` of what `make(*arguments)` would build, without building it."""
    shapes = jax.eval_shape(make, *arguments)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings(shapes, mesh)
    )
