"""Several processes that run the same program side by side: starting them, and what they tell one another.

With one process everything here is a no-op and touches no device. Otherwise `start` comes before any other JAX call.
What is passed between processes is small and goes through the coordination service of `jax.distributed`, not through
devices, so that whoever is missing can be named.
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
from lsp_jax.core.errors import LOST_STATUS, InputError, ProcessError, RunError, Stopped

_ROOT = "lsp_jax"


@dataclass(frozen=True)
class ProcessConfig:
    """The processes of a run. On a TPU pod and under Slurm nothing need be given; elsewhere the first three."""

    coordinator: str = ""
    """host:port of process 0, the port free there; empty: found on TPU pods and under Slurm, elsewhere one process."""
    number: int = 0
    """How many processes there are; 0 with an empty coordinator."""
    index: int = -1
    """Which of them this is, from 0; -1 with an empty coordinator."""
    start_timeout: float = 300.0
    """Seconds in which all of them must have started."""
    timeout: float = 1800.0
    """Seconds that one may wait for the others at a barrier: loading, compiling, saving, host rewards."""
    silence: float = 20.0
    """Seconds without a sign of life after which a process is taken for dead."""

    def check(self) -> None:
        """Raises InputError naming the field; touches no device."""
        if not self.coordinator:
            for name, unset in (("number", 0), ("index", -1)):
                if getattr(self, name) != unset:
                    remedy = "needs processes.coordinator, host:port of process 0, too"
                    raise InputError(f"processes.{name}", getattr(self, name), remedy)
        else:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
                raise InputError("processes.coordinator", self.coordinator, "must be host:port of process 0")
            if self.number < 1:
                raise InputError("processes.number", self.number, "give the number of processes with the coordinator")
            if not 0 <= self.index < self.number:
                remedy = f"must be 0 .. {self.number - 1}, another for each process"
                raise InputError("processes.index", self.index, remedy)
        for name in ("start_timeout", "timeout", "silence"):
            if not 1 <= getattr(self, name) < math.inf:
                raise InputError(f"processes.{name}", getattr(self, name), "must be at least 1 second and finite")


@dataclass
class _Group:
    """The processes once started, seen from one of them."""

    config: ProcessConfig
    client: Any
    """Of the coordination service."""
    index: int
    names: list[str]
    watch: heartbeat.Watch
    relay: heartbeat.Relay | None
    rounds: Counter[str] = field(default_factory=Counter)
    programs: set[Any] = field(default_factory=set)
    failed: int | None = None
    """Exit status once this process has failed by itself."""


_group: _Group | None = None


def number() -> int:
    """How many processes there are."""
    return 1 if _group is None else len(_group.names)


def index() -> int:
    """Which of them this is, from 0."""
    return 0 if _group is None else _group.index


def is_writer() -> bool:
    """Whether this process writes files and to the console: process 0 does."""
    return index() == 0


def share(count: int) -> range:
    """The contiguous part of `count` items that is this process's work; parts differ by at most one item."""
    return range(count * index() // number(), count * (index() + 1) // number())


# --- starting ------------------------------------------------------------------------------------------------------


def start(config: ProcessConfig) -> None:
    """Starts `jax.distributed` when `config` or the surroundings (TPU pod, Slurm) say that there are several processes.

    Does nothing when it has been called before. Raises InputError for settings that do not go together or when JAX has
    been used before, ProcessError naming who has not started in time.
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
    # otherwise SIGTERM would no longer end a process
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator if relay is None else relay.address,
            count,
            index,
            local_device_ids=local,
            initialization_timeout=math.ceil(config.start_timeout),
            # JAX's own watch ends a process without a name: ours comes first
            heartbeat_timeout_seconds=math.ceil(2 * config.silence) + 15,
            shutdown_timeout_seconds=math.ceil(config.silence),
        )
    except RuntimeError as error:
        if "before any JAX call" in " ".join(str(error).split()):
            remedy = "must be started before JAX is used in any other way"
            raise InputError("processes", coordinator, remedy) from error
        reason = " ".join(str(error).split())[:300]
        raise ProcessError(
            f"process {index} ({socket.gethostname()}) could not join {count} processes at {coordinator} "
            f"within {config.start_timeout:g} seconds: {reason}"
        ) from error
    _group = _join(config, index, count, relay)


def _join(config: ProcessConfig, index: int, count: int, relay: heartbeat.Relay | None) -> _Group:
    """Tells the others this process's name, learns theirs, and starts to watch them."""
    from jax._src import distributed  # not public, but what `orbax.checkpoint.multihost` uses too

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
    """Coordinator, number, index, local devices as JAX finds them on a TPU pod and under Slurm; number 1 elsewhere."""
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
        raise InputError("processes.coordinator", "", f"{method} does not say: give coordinator, number and index")
    return coordinator, count, index, None if local is None else list(local)


def _leave() -> None:
    """At the interpreter's end: an orderly one goes through JAX's own shutdown, a failed one waits for nobody."""
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
    """Around what all processes do in step: an error in one of them ends the others with its name.

    An error that another's death has caused becomes that process's name: the watch finds it while we wait here.
    """
    try:
        yield
    except Stopped:  # all of them, together
        raise
    except BaseException as error:
        if _group is not None and _group.failed is None:
            if isinstance(error, jax.errors.JaxRuntimeError):
                time.sleep(_group.config.silence + 2 * heartbeat.GRACE)
            known = error.status if isinstance(error, RunError) else 1
            _group.failed = {InputError: 2, ProcessError: LOST_STATUS}.get(type(error), known)
            if _group.relay is not None:
                _group.relay.arm(False)
            _group.watch.stop(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            if _group.index == 0:
                time.sleep(heartbeat.LINGER)  # the others still read the reason from this process
        raise


# --- what they tell one another --------------------------------------------------------------------------------------


def gather(what: str, value: Any, seconds: float | None = None) -> list[Any]:
    """Every process's `value` (small, of JSON types), by index. `what` names the occasion, the same in all processes.

    Raises ProcessError naming who has not come within `seconds` (`ProcessConfig.timeout` unless given).
    """
    return [value] if _group is None else _gather(_group, what, value, seconds or _group.config.timeout)


def barrier(name: str, seconds: float | None = None) -> None:
    """Returns when all processes are here; raises as `gather`."""
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
            came = {int(key.rpartition("/")[2]): said for key, said in group.client.key_value_dir_get(place)}
            missing = [name for i, name in enumerate(group.names) if i not in came]
            if missing:
                raise ProcessError(f"{what}: {', '.join(missing)} did not come within {seconds:g} seconds") from error
            value = came[index]  # it came between the two questions
        values.append(json.loads(value))
    if number:  # all are here, so all have read the round before
        group.client.key_value_delete(f"{_ROOT}/gather/{what}/{number - 1}/{group.index}")
    return values


def check_same(what: str, values: Mapping[str, Any], remedy: str) -> None:
    """Raises InputError, in every process, when `values` are not the same everywhere: names the first that differs, the
    process that has another one, and says `remedy`."""
    first, *others = gather(what, dict(values))
    for index, other in enumerate(others, 1):
        for name in dict.fromkeys((*first, *other)):
            if name not in first or name not in other or first[name] != other[name]:
                theirs = f"{_name_of(index)} has {json.dumps(other.get(name))[:100]}"
                raise InputError(f"{what} {name}", first.get(name), f"in {_name_of(0)}, but {theirs}: {remedy}")


def check_program(name: str, function: Any, *arguments: Any, **static: Any) -> None:
    """Compares the lowered program of the jitted `function` with the other processes', the first time for each `name`
    and its static arguments.

    Processes that compile different programs wait for one another for ever. Raises InputError as `check_same`.
    """
    if _group is None:
        return
    program = name, *(leaf for leaf in jax.tree.leaves((arguments, static)) if not hasattr(leaf, "dtype"))
    if program in _group.programs:
        return
    _group.programs.add(program)
    digest = hashlib.sha256(function.lower(*arguments, **static).as_text().encode()).hexdigest()
    check_same("program", {name: digest}, "use the same versions of all packages and the same flags everywhere")
