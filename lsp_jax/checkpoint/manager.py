"""Checkpoints of a run: Orbax holds the train state, a JSON beside it the host's part and a checksum of every array.

A checkpoint counts when it is whole: committed by Orbax, its JSON with the digest it was written with, its arrays with
their checksums (Orbax restores a flipped byte without a word). Any other is `Damaged` and can be set aside.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    CustomSteps,
    EveryNSteps,
    LatestN,
    PreservationContext,
    PreservationPolicy,
)

from lsp_jax.checkpoint.checksums import Manifest, differing, manifest
from lsp_jax.checkpoint.host_state import HostState
from lsp_jax.core import processes
from lsp_jax.core.errors import InputError, RunError, one_line
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import path_name, shardings


class Damaged(Exception):
    """The checkpoint differs from what was saved."""


class SaveError(RunError):
    """A checkpoint could not be written; those before it are as they were."""


class Checkpoints:
    """The checkpoints of one run, written in the background: the newest `keep` of those at multiples of `every` stay,
    the newest of all, and those that are pinned. One between two `every` (a run was stopped there) takes the place of
    none that an uninterrupted run would have."""

    def __init__(self, directory: str | Path, keep: int = 2, every: int = 1):
        # the directory is made by the first save, so that looking for checkpoints leaves nothing behind
        self.directory: Path = Path(directory).expanduser().resolve()
        # Orbax asks as a save begins and deletes once it is committed; it reads this very list, so `pin` can change it
        self._policies: list[PreservationPolicy] = [LatestN(1), EveryNSteps(every, max_to_keep=keep), CustomSteps(())]
        self._retention = AnyPreservationPolicy(self._policies)
        self._manager: ocp.CheckpointManager | None = None
        self._under_way: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                create=True,
                lightweight_initialize=True,  # else a damaged record of Orbax's own keeps all from being listed
            )
            # zstd takes a tenth off float32 weights, and for it holds up to as much memory again while it writes
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = {"params": arrays, "training": arrays, "host": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._manager

    def pin(self, steps: Iterable[int]) -> None:
        """Keeps these checkpoints whatever their age, and none that were pinned before; from the next save on."""
        # BestN would rank by the metrics of each save: the probe's are not of every one, and "good" is no metric
        self._policies[-1] = CustomSteps(tuple(steps))

    def preserved(self, steps: Sequence[int]) -> set[int]:
        """Those of the checkpoints `steps`, oldest first, that stay."""
        # a policy of these kinds reads the step alone
        infos: list[Any] = [SimpleNamespace(step=step) for step in steps]
        stays = self._retention.should_preserve(infos, context=PreservationContext())
        return {step for step, kept in zip(steps, stays, strict=True) if kept}

    def latest(self) -> int | None:
        """The newest whole checkpoint's iteration, None without one."""
        return self._open().latest_step() if self.directory.is_dir() else None

    def steps(self) -> list[int]:
        """Iterations of all whole checkpoints, oldest first."""
        return sorted(self._open().all_steps()) if self.directory.is_dir() else []

    def save(self, state: TrainState, host: HostState, arrays: Manifest) -> None:
        """Saves `state`, with its `manifest` in `arrays`, as of `host.iteration`; returns once the arrays are copied,
        the writing goes on. Raises SaveError; with several processes all must call it together, after `wait`.
        """
        items = {name: ocp.args.PyTreeSave(part) for name, part in _split(state).items()}
        record = {**host.to_record(), "arrays": arrays}
        record["digest"] = _digest(record)
        self._under_way = host.iteration
        self._agreed(self._make_directory)  # before Orbax waits for all in a collective without a limit
        args = ocp.args.Composite(**items, host=ocp.args.JsonSave(record))
        self._told(lambda manager: manager.save(host.iteration, args=args))

    def check(self) -> None:
        """Raises SaveError when a save in the background has failed; all processes call it together."""
        if self._under_way is not None:
            # Orbax tells an error once, and its own thread takes it; waiting for what has ended still raises it
            self._told(lambda manager: manager.is_saving_in_progress() or manager.wait_until_finished())

    def wait(self) -> None:
        """Returns when every save is on disk; raises SaveError."""
        if self._under_way is not None:
            self._told(lambda manager: manager.wait_until_finished())
            self._under_way = None

    def _make_directory(self) -> None:
        if processes.is_writer():
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass  # where none can be made Orbax's threads would wait minutes for one, and the process for them

    def _told(self, call: Callable[[ocp.CheckpointManager], Any]) -> None:
        self._agreed(lambda: call(self._open()))

    def _agreed(self, call: Callable[[], Any]) -> None:
        """`call`, with what went wrong in any process raised in all."""
        try:
            call()
            reason = ""
        except Exception as error:  # what file systems and those that write to them raise is of many kinds
            reason = one_line(error)
        reasons = [reason for reason in processes.gather("checkpoint written", reason) if reason]
        if reasons:
            failed, self._under_way = self._under_way, None
            self._drop()
            self.clean()  # what it has left holds the space that the next one needs
            raise SaveError(f"checkpoint {failed} could not be written to {self.directory}: {reasons[0]}")

    def clean(self) -> None:
        """Removes what saves have left that came to no end; no save may be under way. All processes together."""
        processes.barrier("checkpoints cleaned")
        if processes.is_writer() and self.directory.is_dir():
            for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    def _drop(self) -> None:
        """Lets go of a manager whose save has failed: it would fail again, and knows checkpoints that are not there."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with suppress(Exception):
                manager.close()

    def restore(self, iteration: int, abstract: TrainState) -> tuple[TrainState, HostState]:
        """The state in the shapes, dtypes and shardings of `abstract`, and what the host kept beside it.

        Raises InputError when the checkpoint belongs to a model of another shape, Damaged when it is not whole.
        """
        record = self._record(iteration, abstract)
        items = {name: _into(part) for name, part in _split(abstract).items()}
        restored = self._read(iteration, **items)
        state = TrainState(restored["params"], **restored["training"])
        _check_arrays(record["arrays"], state)
        return state, HostState.from_record(record)

    def restore_params(self, iteration: int, abstract: Params) -> Params:
        """The policy's parameters alone; raises as `restore`."""
        record = self._record(iteration, {"params": abstract})
        params = self._read(iteration, params=_into(abstract))["params"]
        _check_arrays(record["arrays"], {"params": params})
        return params

    def _record(self, iteration: int, abstract: Any) -> dict[str, Any]:
        """The host's part, as it was written and of arrays like `abstract`."""
        record = self._read(iteration, host=ocp.args.JsonRestore())["host"]
        if isinstance(record, dict) and "offsets" in record and not {"digest", "arrays"} & set(record):
            remedy = "was written by an earlier version, without checksums: go on with that version"
            raise InputError("checkpoint", f"{self.directory}/{iteration}", remedy)
        if not isinstance(record, dict) or record.get("digest") != _digest(record):
            raise Damaged("its host part is not as it was written")
        for path, leaf in jax.tree.leaves_with_path(abstract):
            name, here = path_name(path), (list(leaf.shape), leaf.dtype.name)
            saved = record["arrays"].get(name)
            if saved is None or (saved["shape"], saved["dtype"]) != here:
                there = "absent" if saved is None else f"{saved['dtype']}{saved['shape']}"
                remedy = f"{name} is {there} there and {here[1]}{here[0]} here: it is of another model"
                raise InputError("checkpoint", f"{self.directory}/{iteration}", remedy)
        return record

    def _read(self, iteration: int, **items: Any) -> Any:
        found, reason, machine = None, "", False
        try:
            found = self._open().restore(iteration, args=ocp.args.Composite(**items))
        except Exception as error:  # whatever Orbax and what it reads with make of damaged files
            reason = one_line(error)
            # a machine without memory or rights says nothing of the checkpoint
            machine = isinstance(error, (MemoryError, OSError, jax.errors.JaxRuntimeError))
            machine = machine and not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        failed = [said for said in processes.gather("checkpoint read", [reason, machine]) if said[0]]
        for reason, machine in failed:
            if machine:
                raise RunError(f"checkpoint {iteration} in {self.directory} could not be read: {reason}")
        if failed:
            raise Damaged(f"it cannot be read ({failed[0][0]})")
        return found

    def remove_after(self, iteration: int) -> None:
        """Removes the checkpoints of later iterations, the newest first; no save may be under way. All processes
        together."""
        later = [step for step in self.steps() if step > iteration]
        self.close()
        processes.barrier("checkpoints looked at")
        if processes.is_writer():
            for step in reversed(later):
                # at once: half a checkpoint would be taken for a damaged one
                (self.directory / str(step)).rename(self.directory / f"{step}.orbax-checkpoint-tmp-gone")
        self.clean()

    def set_aside(self, iteration: int) -> Path:
        """Moves that checkpoint to where no run looks for one, and returns its place; all processes together."""
        self.close()
        place, number = self.damaged / str(iteration), 1
        while place.exists():
            place, number = self.damaged / f"{iteration}.{number}", number + 1
        place = Path(processes.gather("checkpoint set aside", str(place))[0])  # nobody reads it any more
        if processes.is_writer():
            self.damaged.mkdir(exist_ok=True)
            (self.directory / str(iteration)).rename(place)
        processes.barrier("checkpoint gone")
        return place

    @property
    def damaged(self) -> Path:
        """Where checkpoints lie that were not whole."""
        return self.directory.with_name("damaged")

    def close(self) -> None:
        """Waits for a save under way, whatever becomes of it (`wait` says), and frees the manager."""
        if self._manager is not None:
            with suppress(Exception):
                self._manager.wait_until_finished()
        self._drop()


def _check_arrays(saved: Manifest, tree: Any) -> None:
    here = manifest(tree)
    wrong = differing(here, {name: saved.get(name) for name in here})
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"{wrong[0]}{others} do not have the checksum that they were saved with")


def _digest(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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
