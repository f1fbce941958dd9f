"""Multi-process runs: starting `jax.distributed`, barriers, and small values exchanged between processes.

With one process everything here is a no-op and touches no device. Otherwise `start` must precede any other JAX call.
Values are small and go through the coordination service of `jax.distributed` instead of devices, so that a missing
process can be named.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from lsp_jax.core import heartbeat
from lsp_jax.core.errors import LOST_STATUS, InputError, ProcessError, RunError, Stopped, one_line

_ROOT = "lsp_jax"


@dataclass(frozen=True)
class ProcessConfig:
    """Processes of a run. Detected on TPU pods and under Slurm; elsewhere set the first three fields."""

    coordinator: str = ""
    """host:port of process 0, with a free port; empty: detected on TPU pods and under Slurm, elsewhere one process."""
    number: int = 0
    """Number of processes; 0 with an empty coordinator."""
    index: int = -1
    """Index of this process, from 0; -1 with an empty coordinator."""
    start_timeout: float = 300.0
    """Seconds within which all processes must have started."""
    timeout: float = 1800.0
    """Seconds to wait for the others at a barrier: loading, compiling, saving, host rewards."""
    silence: float = 20.0
    """Seconds without a heartbeat after which a process is considered dead."""

    def check(self) -> None:
        """Raises InputError naming the field; touches no device."""
        if not self.coordinator:
            for name, unset in (("number", 0), ("index", -1)):
                if getattr(self, name) != unset:
                    remedy = "also needs processes.coordinator, host:port of process 0"
                    raise InputError(f"processes.{name}", getattr(self, name), remedy)
        else:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
                raise InputError("processes.coordinator", self.coordinator, "must be host:port of process 0")
            if self.number < 1:
                raise InputError("processes.number", self.number, "must be set together with the coordinator")
            if not 0 <= self.index < self.number:
                remedy = f"must be in 0 .. {self.number - 1}, different for each process"
                raise InputError("processes.index", self.index, remedy)
        for name in ("start_timeout", "timeout", "silence"):
            if not 1 <= getattr(self, name) < math.inf:
                raise InputError(f"processes.{name}", getattr(self, name), "must be at least 1 second and finite")


@dataclass
class _Group:
    """State of a multi-process run in this process."""

    config: ProcessConfig
    client: Any
    """Client of the coordination service."""
    index: int
    names: list[str]
    watch: heartbeat.Watch
    relay: heartbeat.Relay | None
    rounds: Counter[str] = field(default_factory=Counter)
    programs: set[Any] = field(default_factory=set)
    failed: int | None = None
    """Exit status once this process has failed."""


_group: _Group | None = None


def number() -> int:
    """Number of processes."""
    return 1 if _group is None else len(_group.names)


def index() -> int:
    """Index of this process, from 0."""
    return 0 if _group is None else _group.index


def is_writer() -> bool:
    """Whether this process writes files and to the console; only process 0 does."""
    return index() == 0


def share(count: int) -> range:
    """This process's contiguous share of `count` items; shares differ by at most one item."""
    return range(count * index() // number(), count * (index() + 1) // number())


# --- starting ------------------------------------------------------------------------------------------------------


def start(config: ProcessConfig) -> None:
    """Starts `jax.distributed` if `config` or the environment (TPU pod, Slurm) asks for several processes.

    Does nothing on later calls. Raises InputError for inconsistent settings or when JAX has already been used, and
    ProcessError naming the processes that did not start in time.
    """
    global _group
    config.check()
    if _group is not None:
        return
    if jax.distributed.is_initialized():  # by the caller
        _group = _join(config, jax.process_index(), jax.process_count(), None)
        return
    if config.coordinator:
        coordinator, count, index, local = config.coordinator, config.number, config.index, None
    else:
        coordinator, count, index, local = _detect(config.start_timeout)
    if count < 2:
        return

    def lost(what: str) -> None:
        heartbeat.end(f"{_name_of(0)} {what}")

    relay = heartbeat.Relay(coordinator, config.silence, lost) if index else None
    # JAX's preemption service would catch SIGTERM, which then no longer ends a process
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator if relay is None else relay.address,
            count,
            index,
            local_device_ids=local,
            initialization_timeout=math.ceil(config.start_timeout),
            # JAX's own heartbeat ends a process without naming the dead one: ours must be first
            heartbeat_timeout_seconds=math.ceil(2 * config.silence) + 15,
            shutdown_timeout_seconds=math.ceil(config.silence),
        )
    except RuntimeError as error:
        if "before any JAX call" in one_line(error):
            remedy = "must be started before any other use of JAX"
            raise InputError("processes", coordinator, remedy) from error
        raise ProcessError(
            f"process {index} ({socket.gethostname()}) could not join {count} processes at {coordinator} "
            f"within {config.start_timeout:g} seconds: {one_line(error)}"
        ) from error
    _group = _join(config, index, count, relay)


def _join(config: ProcessConfig, index: int, count: int, relay: heartbeat.Relay | None) -> _Group:
    """Exchanges names with the other processes and starts to monitor them."""
    from jax._src import distributed  # private, but used by `orbax.checkpoint.multihost` too

    client = distributed.global_state.client
    name = f"process {index} ({socket.gethostname()})"
    unknown = [name if i == index else f"process {i}" for i in range(count)]
    watch = heartbeat.Watch(client, index, unknown, config.silence)
    group = _Group(config, client, index, unknown, watch, relay)
    group.names[:] = _gather(group, "names", name, config.start_timeout)
    watch.start()
    if relay is not None:
        relay.arm()
    atexit.register(_leave)
    return group


def _name_of(index: int) -> str:
    return f"process {index}" if _group is None else _group.names[index]


def _detect(timeout: float) -> tuple[str, int, int, list[int] | None]:
    """Returns coordinator, number, index and local devices as detected on TPU pods and under Slurm; else number 1."""
    from jax._src import cloud_tpu_init, clusters

    if all(name in os.environ for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")):
        method = "slurm"
        if int(os.environ.get("SLURM_NTASKS", 1)) < 2:
            return "", 1, 0, None
    elif cloud_tpu_init.running_in_cloud_tpu_vm:
        gke = {"TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"} & os.environ.keys()
        if not gke and "TPU_SKIP_MDS_QUERY" in os.environ:
            return "", 1, 0, None
        method = "gketpu" if gke else "gcetpu"
    else:
        return "", 1, 0, None
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, math.ceil(timeout))
    coordinator, count, index, local = found
    if coordinator is None or count is None or index is None:
        raise InputError("processes.coordinator", "", f"not detected on {method}: give coordinator, number and index")
    return coordinator, count, index, None if local is None else list(local)


def _leave() -> None:
    """Exit handler: on success JAX's own shutdown follows; a failed process exits at once, without that barrier."""
    assert _group is not None
    if _group.failed is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_group.failed)
    _group.watch.stop()
    if _group.relay is not None:
        _group.relay.arm(False)


@contextmanager
def together() -> Iterator[None]:
    """Context for work that all processes do in lockstep: an error in one ends the others, which name it.

    An error caused by the death of a peer is replaced by that peer's name, which the watch finds while we wait here.
    """
    try:
        yield
    except Stopped:  # raised in all processes
        raise
    except BaseException as error:
        if _group is not None and _group.failed is None:
            if isinstance(error, jax.errors.JaxRuntimeError):
                time.sleep(_group.config.silence + 2 * heartbeat.GRACE)
            status = error.status if isinstance(error, RunError) else 1
            _group.failed = {InputError: 2, ProcessError: LOST_STATUS}.get(type(error), status)
            if _group.relay is not None:
                _group.relay.arm(False)
            _group.watch.stop(one_line(error))
            if _group.index == 0:
                time.sleep(heartbeat.LINGER)  # the others read the reason from this process
        raise


# --- exchanging values -----------------------------------------------------------------------------------------------


def gather(what: str, value: Any, seconds: float | None = None) -> list[Any]:
    """Returns every process's `value` (small, of JSON types), by index. `what` names the call, equal in all processes.

    Raises ProcessError naming the processes that do not arrive within `seconds` (default `ProcessConfig.timeout`).
    """
    return [value] if _group is None else _gather(_group, what, value, seconds or _group.config.timeout)


def barrier(name: str, seconds: float | None = None) -> None:
    """Waits until all processes arrive; raises as `gather` does."""
    gather(name, None, seconds)


def _gather(group: _Group, what: str, value: Any, seconds: float) -> list[Any]:
    number = group.rounds[what]
    group.rounds[what] += 1
    place = f"{_ROOT}/gather/{what}/{number}/"
    group.client.key_value_set(f"{place}{group.index}", json.dumps(value))
    deadline = time.monotonic() + seconds
    values = []
    for index in range(len(group.names)):
        left = max(1, math.ceil(1000 * (deadline - time.monotonic())))
        try:
            value = group.client.blocking_key_value_get(f"{place}{index}", left)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            arrived = {int(key.rpartition("/")[2]): text for key, text in group.client.key_value_dir_get(place)}
            missing = [name for i, name in enumerate(group.names) if i not in arrived]
            if missing:
                names = ", ".join(missing)
                raise ProcessError(f"{what}: {names} did not arrive within {seconds:g} seconds") from error
            value = arrived[index]  # it arrived between the two requests
        values.append(json.loads(value))
    if number:  # all have arrived, so all have read the previous round
        group.client.key_value_delete(f"{_ROOT}/gather/{what}/{number - 1}/{group.index}")
    return values


def check_same(what: str, values: Mapping[str, Any], remedy: str) -> None:
    """Raises InputError in every process unless `values` are equal everywhere.

    The message names the first value that differs and the process that differs from process 0, and gives `remedy`.
    """
    first, *others = gather(what, dict(values))
    for index, other in enumerate(others, 1):
        for name in dict.fromkeys((*first, *other)):
            if name not in first or name not in other or first[name] != other[name]:
                theirs = f"{_name_of(index)} has {json.dumps(other.get(name))[:100]}"
                raise InputError(f"{what} {name}", first.get(name), f"in {_name_of(0)}, but {theirs}: {remedy}")


def check_program(name: str, function: Any, *arguments: Any, **static: Any) -> None:
    """Compares the lowered program of the jitted `function` between processes, once for each `name` and its static
    arguments.

    Processes that compile different programs would deadlock. Raises InputError as `check_same` does.
    """
    if _group is None:
        return
    program = name, *(leaf for leaf in jax.tree.leaves((arguments, static)) if not hasattr(leaf, "dtype"))
    if program in _group.programs:
        return
    _group.programs.add(program)
    digest = hashlib.sha256(function.lower(*arguments, **static).as_text().encode()).hexdigest()
    check_same("program", {name: digest}, "use the same package versions and flags in all processes")
