"""One of several processes of a test: `python tests/process_worker.py SCENE PORT NUMBER INDEX [ARGUMENT ...]`.

Prints one JSON object; how it ends is the test's business.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

DEVICES = 8
CLOCKS = ("time/", "limit/", "compile/", "checkpoint/")
SILENCE = 6.0

scene, port, number, index = sys.argv[1], *map(int, sys.argv[2:5])
here = DEVICES // number
if scene == "resume":  # DATA x FSDP
    here = int(sys.argv[7]) * int(sys.argv[8]) or here
jax.config.update("jax_num_cpu_devices", here)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long here

import lsp_jax as lsp  # noqa: E402
from lsp_jax import cli  # noqa: E402
from lsp_jax.checkpoint.manager import Checkpoints  # noqa: E402
from lsp_jax.checkpoint.provenance import identity  # noqa: E402
from lsp_jax.config import RewardConfig, TrainConfig  # noqa: E402
from lsp_jax.core import processes, runtime  # noqa: E402
from lsp_jax.core.errors import InputError, ProcessError, Stopped  # noqa: E402
from lsp_jax.learn.optimizer import OptimizerConfig  # noqa: E402
from lsp_jax.model.sharding import MeshConfig, use_mesh  # noqa: E402
from lsp_jax.play.selfplay import PlayConfig  # noqa: E402
from lsp_jax.reward.user_callable import callable_reward  # noqa: E402
from lsp_jax.training.resume import start_state  # noqa: E402
from lsp_jax.training.setup import setup  # noqa: E402
from test_process_runs import digests  # noqa: E402
from test_trainer import game_config, host_reward, low_share  # noqa: E402

CONFIG = processes.ProcessConfig(f"127.0.0.1:{port}", number, index, start_timeout=60, timeout=200, silence=SILENCE)
if number == 1:
    CONFIG = processes.ProcessConfig()


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
    # what a kill promises, with the default; the rest sooner
    processes.start(replace(CONFIG, silence=processes.ProcessConfig().silence) if way == "works" else CONFIG)
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


def settings(model: str, directory: str, steps: int, **changes: Any) -> TrainConfig:
    return game_config(
        model,
        directory,
        max_steps=steps,
        save_steps=1,
        save_total_limit=3,
        processes=CONFIG,
        play=PlayConfig(4, 4, max_query_length=8, max_completion_length=8, decode_chunk=3),
        reward=RewardConfig(quality_weight=0.5, judge_rows=4),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=3, max_grad_norm=1e9, micro_batch_size=2),
        **changes,
    )


def played(config: TrainConfig, killed: int = -1) -> dict[str, Any]:
    """Trains, with what its callbacks saw and the arrays it ended with; the process `killed` dies after its first
    iteration."""
    seen: list[dict[str, float]] = []
    lines: list[int] = []
    scored: list[int] = []

    def share(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        scored.append(len(queries))
        return low_share(queries, answers)

    def callback(event: Any) -> None:
        seen.append({name: value for name, value in event.metrics.items() if not name.startswith(CLOCKS)})
        lines.append(len(event.transcripts))
        if index == killed:
            os.kill(os.getpid(), 9)

    state = lsp.train(config, rewards=[callable_reward(share, "share", weight=2.0)], callbacks=[callback])
    return {"metrics": seen, "lines": lines, "scored": scored, "ended": digests(runtime.to_host(state))}


def play() -> dict[str, Any]:
    """Two iterations from the start, with a host and a compiled reward: MODEL DIRECTORY [KILLED]."""
    return played(settings(*sys.argv[5:7], 2), *map(int, sys.argv[7:8]))


def asked() -> dict[str, Any]:
    """Process 1 alone is asked to end after the first of three iterations: MODEL DIRECTORY."""

    def callback(event: Any) -> None:
        if index == 1 and event.iteration == 1:
            os.kill(os.getpid(), 15)

    config = settings(*sys.argv[5:7], 3)
    try:
        lsp.train(config, rewards=[host_reward()], callbacks=[callback])
    except Stopped as error:
        return {"stopped": str(error)}
    return {}


def resume() -> dict[str, Any]:
    """What is restored of a run of two iterations onto DATA x FSDP devices (0 0: all), and as many more as are left of
    STEPS: MODEL DIRECTORY DATA FSDP STEPS."""
    data, fsdp, steps = map(int, sys.argv[7:10])
    config = settings(*sys.argv[5:7], steps, mesh=MeshConfig(data, fsdp), resume="must")
    processes.start(config.processes)
    run, params = setup(config, [host_reward()])
    checkpoints = Checkpoints(run.directory / "checkpoints")
    with use_mesh(run.mesh):
        provenance = identity(run.config, run.policy, params, run.reward_model)
        state, host = start_state(run, params, checkpoints, provenance)
        assert host.iteration == 2
        restored = digests(runtime.to_host(state))
    layout = [str(getattr(leaf.sharding, "spec", None)) for leaf in jax.tree.leaves(state)]
    checkpoints.close()
    run.workers.close()
    mesh = dict(run.mesh.shape) if run.mesh is not None else {}
    return {"mesh": mesh, "restored": restored, "layout": layout, **played(config)}


def command() -> None:
    """The command line with these arguments."""
    group = {
        "coordinator": CONFIG.coordinator,
        "number": number,
        "index": index,
        "start-timeout": 60,
        "silence": SILENCE,
    }
    flags = [text for name, value in group.items() for text in (f"--processes.{name}", str(value))]
    sys.exit(cli.main([*sys.argv[5:], *flags]))


if __name__ == "__main__":
    said = {"talk": talk, "die": die, "play": play, "asked": asked, "resume": resume, "command": command}[scene]()
    print(json.dumps(said), flush=True)
