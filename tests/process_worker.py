"""One of several processes of a test: `python tests/process_worker.py SCENE PORT NUMBER INDEX [ARGUMENT ...]`.

Prints one JSON object; how it ends is the test's business.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

DEVICES = 8
SILENCE = 6.0

scene, port, number, index = sys.argv[1], *map(int, sys.argv[2:5])
jax.config.update("jax_num_cpu_devices", DEVICES // number)
jax.config.update("jax_cpu_collectives_implementation", "gloo")

from lsp_jax import cli, processes  # noqa: E402
from lsp_jax.errors import InputError, ProcessError  # noqa: E402

CONFIG = processes.ProcessConfig(f"127.0.0.1:{port}", number, index, start_timeout=60, timeout=60, silence=SILENCE)


def refusal(call: Callable[..., Any], *arguments: Any) -> str:
    try:
        call(*arguments)
    except (InputError, ProcessError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def matmul(x: jax.Array) -> jax.Array:
    return x @ x


def talk() -> dict[str, Any]:
    """Gathering, comparing, a barrier that process 1 does not come to."""
    processes.start(CONFIG)
    processes.start(CONFIG)  # once is enough
    found = {
        "number": processes.number(),
        "index": processes.index(),
        "writer": processes.is_writer(),
        "share": list(processes.share(5)),
        "gathered": [processes.gather("value", {"from": index, "round": k}) for k in range(3)],
        "devices": [jax.device_count(), jax.local_device_count()],
    }
    processes.check_same("config.", {"seed": 1}, "start all alike")
    found["config"] = refusal(processes.check_same, "config.", {"model": "m", "seed": index}, "start all alike")
    processes.check_program("same", jax.jit(matmul), np.ones((2, 2)))
    other = jax.jit(matmul if index == 0 else lambda x: x @ x + 1)
    found["program"] = refusal(processes.check_program, "solve", other, np.ones((2, 2)))
    if index == 0:
        found["late"] = refusal(processes.barrier, "after loading", 1.0)
    processes.barrier("the end")
    return found


def die() -> None:
    """A collective in a loop; the last argument says who dies in it, and how the others wait."""
    victim, way = int(sys.argv[5]), sys.argv[6]
    processes.start(CONFIG)
    with processes.together():
        mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        ones = jax.make_array_from_callback((DEVICES,), spread, lambda part: np.ones(DEVICES, np.float32)[part])
        total = jax.jit(lambda x: x.sum(), out_shardings=whole)
        assert float(total(ones)) == DEVICES
        processes.barrier("all are here")
        if index == victim:
            if way == "raises":
                raise RuntimeError("no room on the disk")
            os.kill(os.getpid(), 9)
        while True:
            if way == "sleeps":
                time.sleep(0.1)
            else:
                total(ones).block_until_ready()


def command() -> None:
    sys.exit(cli.main(sys.argv[5:]))


if __name__ == "__main__":
    said = {"talk": talk, "die": die, "command": command}[scene]()
    print(json.dumps(said), flush=True)
