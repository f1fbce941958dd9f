"""A run of the tiny game in a process of its own, and what is done to it on the way: killed, watched, hindered.

Tests call `run`; the child is `python tests/child_run.py CONFIG.json [SCENE ARGUMENT]`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lsp_jax as lsp
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import RunError
from test_trainer import host_reward

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_XLA_PROFILE_VERSION": "2"}
"""Compiled as `conftest.py` has it, so that the programs of this session serve."""


def environment(cache: Path | None = None, devices: int = 1, quick: bool = False) -> dict[str, str]:
    """Of a child with that many CPU devices and its compiled programs kept in `cache`; `quick`: compiled in half the
    time, as what this process compiles where a test's `QUICK_COMPILES` says so."""
    tests = Path(__file__).parent
    changes = {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    if devices > 1:
        changes["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    if cache is not None:
        changes["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    if quick:
        changes |= QUICK
    return {**os.environ, **changes}


def run(
    config: TrainConfig, *scene: Any, env: dict[str, str] | None = None, bound: bool = False
) -> subprocess.CompletedProcess[str]:
    """The run of `config` as a child in which `scene` is played; `bound`: by the modes of files, even for root."""
    path = Path(f"{config.output_dir}.json")
    path.write_text(config.to_json())
    command = [sys.executable, "-c", BOUND] if bound else [sys.executable]
    command += [__file__, str(path), *map(str, scene)]
    env = environment() if env is None else env
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=850, check=False)


BOUND = f"""
import ctypes, os, sys
for right in ({CAP_DAC_OVERRIDE}, {CAP_DAC_READ_SEARCH}):  # root loses them with the next program; others have none
    ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, right, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


# --- in the child -----------------------------------------------------------------------------------------------------


def wait_for_checkpoint(config: TrainConfig, iteration: int) -> Path:
    """Until it is whole, which its name says; returns the directory of all."""
    checkpoints = Path(config.output_dir) / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints / str(iteration)).is_dir():
        assert time.monotonic() < deadline, f"checkpoint {iteration} does not come"
        time.sleep(0.01)
    return checkpoints


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(config: TrainConfig, iteration: str) -> Callable[[Any], None]:
    """Killed once that iteration's lines are written and its save, if one is due, has begun."""
    return lambda event: die() if event.iteration == int(iteration) else None


def killed_after_saving(config: TrainConfig, iteration: str) -> Callable[[Any], None]:
    """Killed in the iteration that follows, once that checkpoint is whole."""

    def callback(event: Any) -> None:
        if event.iteration == int(iteration) + 1:
            wait_for_checkpoint(config, int(iteration))
            die()

    return callback


def read_only_after(config: TrainConfig, iteration: str) -> Callable[[Any], None]:
    """From that iteration's checkpoint on no file can be made among the checkpoints."""

    def callback(event: Any) -> None:
        if event.iteration == int(iteration):
            checkpoints = wait_for_checkpoint(config, event.iteration)
            checkpoints.chmod(0o555)
            if os.access(checkpoints, os.W_OK):
                print("the mode does not bind", flush=True)

    return callback


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def watched(config: TrainConfig, path: str) -> Callable[[Any], None]:
    """A JSON line an iteration: resident bytes, those that malloc has given out and not got back (of its one heap), and
    open file descriptors of this process."""
    page = os.sysconf("SC_PAGE_SIZE")
    heap = ctypes.CDLL(None).mallinfo2
    heap.restype = _MallInfo

    def callback(event: Any) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        given = heap()
        found = {
            "iteration": event.iteration,
            "resident": resident,
            "heap": given.uordblks + given.hblkhd,
            "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        }
        with Path(path).open("a") as file:
            file.write(json.dumps(found) + "\n")

    return callback


SCENES = {scene.__name__: scene for scene in (killed_at, killed_after_saving, read_only_after, watched)}


def threads_left() -> list[str]:
    """Threads that keep this process from ending."""
    own, deadline = threading.main_thread(), time.monotonic() + 20
    others = [thread for thread in threading.enumerate() if thread is not own and not thread.daemon]
    for thread in others:
        thread.join(max(deadline - time.monotonic(), 0))
    return [thread.name for thread in others if thread.is_alive()]


def main() -> None:
    config, scene = TrainConfig.load(sys.argv[1]), sys.argv[2:]
    callbacks = [SCENES[scene[0]](config, *scene[1:])] if scene else []
    status = 0
    try:
        lsp.train(config, rewards=[host_reward()], callbacks=callbacks)
    except RunError as error:
        print(f"lsp-jax: error: {error}", file=sys.stderr)
        status = error.status
    if left := threads_left():
        print(f"threads left: {left}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(status)


if __name__ == "__main__":
    main()
