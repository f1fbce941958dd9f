"""Checkpoints of a run: Orbax stores the train state, and beside it a JSON record with the host state and checksums.

A checkpoint is intact if Orbax has committed it, the record has the digest it was written with, and the arrays have
their checksums (Orbax does not detect a flipped byte). Any other is `Damaged` and can be set aside.
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
    """A checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Retained are the newest `keep` at multiples of `every`, the newest of all, and pinned ones. A checkpoint between two
    multiples (the run was stopped there) therefore displaces none that an uninterrupted run would have.
    """

    def __init__(self, directory: str | Path, keep: int = 2, every: int = 1):
        # the first save creates the directory, so that merely listing checkpoints leaves nothing behind
        self.directory: Path = Path(directory).expanduser().resolve()
        # Orbax applies these when a save begins, and deletes after its commit; it keeps this list, so `pin` can edit it
        self._policies: list[PreservationPolicy] = [LatestN(1), EveryNSteps(every, max_to_keep=keep), CustomSteps(())]
        self._retention = AnyPreservationPolicy(self._policies)
        self._manager: ocp.CheckpointManager | None = None
        self._under_way: int | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._retention,
                create=True,
                lightweight_initialize=True,  # otherwise damaged metadata of Orbax prevents listing
            )
            # zstd saves a tenth of float32 weights, at the cost of up to their size in memory while writing
            arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
            handlers = {"params": arrays, "training": arrays, "host": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        return self._manager

    def pin(self, steps: Iterable[int]) -> None:
        """Replaces the set of pinned checkpoints, which are kept at any age; takes effect with the next save."""
        # BestN ranks by metrics of every save, but the probe does not run at every one, and "good" is no metric
        self._policies[-1] = CustomSteps(tuple(steps))

    def preserved(self, steps: Sequence[int]) -> set[int]:
        """Returns which of the checkpoints `steps`, oldest first, the retention policy keeps."""
        # these policies read only the step
        infos: list[Any] = [SimpleNamespace(step=step) for step in steps]
        stays = self._retention.should_preserve(infos, context=PreservationContext())
        return {step for step, kept in zip(steps, stays, strict=True) if kept}

    def latest(self) -> int | None:
        """Returns the iteration of the newest committed checkpoint, or None."""
        return self._open().latest_step() if self.directory.is_dir() else None

    def steps(self) -> list[int]:
        """Returns the iterations of all committed checkpoints, oldest first."""
        return sorted(self._open().all_steps()) if self.directory.is_dir() else []

    def save(self, state: TrainState, host: HostState, arrays: Manifest) -> None:
        """Starts saving `state`, whose `manifest` is `arrays`, as checkpoint `host.iteration`.

        Returns once the arrays are copied; writing continues in the background. Raises SaveError. With several
        processes all must call this together, after `wait`.
        """
        items = {name: ocp.args.PyTreeSave(part) for name, part in _split(state).items()}
        record = {**host.to_record(), "arrays": arrays}
        record["digest"] = _digest(record)
        self._under_way = host.iteration
        self._agreed(self._make_directory)  # before Orbax enters a collective without a time limit
        args = ocp.args.Composite(**items, host=ocp.args.JsonSave(record))
        self._told(lambda manager: manager.save(host.iteration, args=args))

    def check(self) -> None:
        """Raises SaveError if a background save has failed; all processes must call this together."""
        if self._under_way is not None:
            # Orbax reports an error once, to a thread of its own; waiting for the finished save raises it again
            self._told(lambda manager: manager.is_saving_in_progress() or manager.wait_until_finished())

    def wait(self) -> None:
        """Waits until every save is on disk; raises SaveError."""
        if self._under_way is not None:
            self._told(lambda manager: manager.wait_until_finished())
            self._under_way = None

    def _make_directory(self) -> None:
        if processes.is_writer():
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass  # fails early: Orbax's threads would retry for minutes

    def _told(self, call: Callable[[ocp.CheckpointManager], Any]) -> None:
        self._agreed(lambda: call(self._open()))

    def _agreed(self, call: Callable[[], Any]) -> None:
        """Runs `call`; a failure in any process raises SaveError in all."""
        try:
            call()
            reason = ""
        except Exception as error:  # file systems and storage libraries raise many types
            reason = one_line(error)
        reasons = [reason for reason in processes.gather("checkpoint written", reason) if reason]
        if reasons:
            failed, self._under_way = self._under_way, None
            self._drop()
            self.clean()  # partial files take space that the next save needs
            raise SaveError(f"checkpoint {failed} could not be written to {self.directory}: {reasons[0]}")

    def clean(self) -> None:
        """Removes partial files of unfinished saves; none may be in progress. All processes must call this together."""
        processes.barrier("checkpoints cleaned")
        if processes.is_writer() and self.directory.is_dir():
            for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    def _drop(self) -> None:
        """Discards a manager whose save has failed: it would fail again, and lists checkpoints that do not exist."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with suppress(Exception):
                manager.close()

    def restore(self, iteration: int, abstract: TrainState) -> tuple[TrainState, HostState]:
        """Restores the train state, in the shapes, dtypes and shardings of `abstract`, and the host state.

        Raises InputError if the checkpoint belongs to a model of another shape, Damaged if it is not intact.
        """
        record = self._record(iteration, abstract)
        items = {name: _into(part) for name, part in _split(abstract).items()}
        restored = self._read(iteration, **items)
        state = TrainState(restored["params"], **restored["training"])
        _check_arrays(record["arrays"], state)
        return state, HostState.from_record(record)

    def restore_params(self, iteration: int, abstract: Params) -> Params:
        """Restores only the policy's parameters; raises as `restore` does."""
        record = self._record(iteration, {"params": abstract})
        params = self._read(iteration, params=_into(abstract))["params"]
        _check_arrays(record["arrays"], {"params": params})
        return params

    def _record(self, iteration: int, abstract: Any) -> dict[str, Any]:
        """Reads the JSON record; checks its digest, and that its arrays have the shapes and dtypes of `abstract`."""
        record = self._read(iteration, host=ocp.args.JsonRestore())["host"]
        if isinstance(record, dict) and "offsets" in record and not {"digest", "arrays"} & set(record):
            remedy = "was written by an earlier version, without checksums: continue with that version"
            raise InputError("checkpoint", f"{self.directory}/{iteration}", remedy)
        if not isinstance(record, dict) or record.get("digest") != _digest(record):
            raise Damaged("its host record has changed since it was written")
        for path, leaf in jax.tree.leaves_with_path(abstract):
            name, here = path_name(path), (list(leaf.shape), leaf.dtype.name)
            saved = record["arrays"].get(name)
            if saved is None or (saved["shape"], saved["dtype"]) != here:
                there = "absent" if saved is None else f"{saved['dtype']}{saved['shape']}"
                remedy = f"{name} is {there} there and {here[1]}{here[0]} here: it belongs to another model"
                raise InputError("checkpoint", f"{self.directory}/{iteration}", remedy)
        return record

    def _read(self, iteration: int, **items: Any) -> Any:
        found, reason, machine = None, "", False
        try:
            found = self._open().restore(iteration, args=ocp.args.Composite(**items))
        except Exception as error:  # damaged files make Orbax and its libraries raise many types
            reason = one_line(error)
            # a lack of memory or permission does not mean that the checkpoint is damaged
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
        """Removes the checkpoints after `iteration`, newest first.

        No save may be in progress. All processes must call this together.
        """
        later = [step for step in self.steps() if step > iteration]
        self.close()
        processes.barrier("checkpoints looked at")
        if processes.is_writer():
            for step in reversed(later):
                # renamed first, because a half-deleted checkpoint would pass for a damaged one
                (self.directory / str(step)).rename(self.directory / f"{step}.orbax-checkpoint-tmp-gone")
        self.clean()

    def set_aside(self, iteration: int) -> Path:
        """Moves a damaged checkpoint to `damaged` and returns its new path; all processes must call this together."""
        self.close()
        place, number = self.damaged / str(iteration), 1
        while place.exists():
            place, number = self.damaged / f"{iteration}.{number}", number + 1
        place = Path(processes.gather("checkpoint set aside", str(place))[0])  # also a barrier for readers
        if processes.is_writer():
            self.damaged.mkdir(exist_ok=True)
            (self.directory / str(iteration)).rename(place)
        processes.barrier("checkpoint gone")
        return place

    @property
    def damaged(self) -> Path:
        """Directory of the damaged checkpoints."""
        return self.directory.with_name("damaged")

    def close(self) -> None:
        """Waits for a save in progress, ignoring its errors (`wait` raises them), and closes the manager."""
        if self._manager is not None:
            with suppress(Exception):
                self._manager.wait_until_finished()
        self._drop()


def _check_arrays(saved: Manifest, tree: Any) -> None:
    here = manifest(tree)
    wrong = differing(here, {name: saved.get(name) for name in here})
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise Damaged(f"{wrong[0]}{others}: the checksum has changed since the save")


def _digest(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _split(state: TrainState) -> dict[str, Any]:
    """Splits the state into two items, so that an export can read the parameters without the moments."""
    rest = {name: getattr(state, name) for name in TrainState._fields if name != "params"}
    return {"params": state.params, "training": rest}


def _into(abstract: Any) -> ocp.args.PyTreeRestore:
    """Returns the arguments to restore arrays in the dtypes and shardings of `abstract`; other shapes are an error."""
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def abstract(mesh: Mesh | None, make: Callable[..., Any], *arguments: Any) -> Any:
    """Returns shapes, dtypes and shardings on `mesh` of the result of `make(*arguments)`, without computing it."""
    shapes = jax.eval_shape(make, *arguments)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings(shapes, mesh)
    )
