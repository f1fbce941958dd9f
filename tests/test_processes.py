"""Several processes on one machine: what they tell one another, and how the others end when one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lsp_jax.core import processes
from lsp_jax.core.errors import LOST_STATUS, InputError
from lsp_jax.core.processes import ProcessConfig

WORKER = Path(__file__).with_name("process_worker.py")
LIMIT = 60
"""Seconds in which the others must have ended when one process is killed: the promise of the documents."""


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    def said(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    def line(self) -> str:
        """The one line of error that is ours."""
        lines = [line for line in self.err.splitlines() if line.startswith("lsp-jax: error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def run_together(
    scene: str,
    *arguments: Any,
    number: int = 2,
    victim: int = 0,
    limit: float = 300,
    more: Sequence[Sequence[Any]] = (),
) -> list[Ended]:
    """Starts `number` processes of `process_worker.py` side by side and waits for all; `more[i]` are arguments of i.

    Once the `victim` has ended, each of the others has `limit` seconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    root = WORKER.parents[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{root}:{WORKER.parent}"}
    started = []
    try:
        for index in range(number):
            mine = [*arguments, *more[index]] if more else arguments
            command = [sys.executable, str(WORKER), scene, *map(str, (port, number, index, *mine))]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        ended = {}
        for index in sorted(range(number), key=lambda index: index != victim):
            out, err = started[index].communicate(timeout=300 if index == victim else limit)
            ended[index] = Ended(started[index].returncode, out, err)
        return [ended[index] for index in range(number)]
    finally:
        for process in started:
            process.kill()
            process.wait()


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"number": 2}, "processes.number"),
        ({"index": 0}, "processes.index"),
        ({"coordinator": "host:1"}, "processes.number"),
        ({"coordinator": "host:1", "number": 2}, "processes.index"),
        ({"coordinator": "host:1", "number": 2, "index": 2}, "processes.index"),
        ({"coordinator": "host", "number": 2, "index": 0}, "processes.coordinator"),
        ({"coordinator": "host:66000", "number": 2, "index": 0}, "processes.coordinator"),
        ({"silence": 0.0}, "processes.silence"),
        ({"timeout": float("inf")}, "processes.timeout"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], field: str):
    with pytest.raises(InputError) as caught:
        processes.start(ProcessConfig(**settings))
    assert caught.value.field == field


def test_without_settings_there_is_one_process_and_nothing_is_started():
    processes.start(ProcessConfig())
    assert (processes.number(), processes.index(), processes.is_writer()) == (1, 0, True)
    assert processes.gather("value", 3) == [3] and list(processes.share(4)) == [0, 1, 2, 3]
    processes.barrier("nobody else", 0.001)
    processes.check_same("config.", {"seed": 1}, "")


def test_slurm_is_detected(monkeypatch: pytest.MonkeyPatch):
    """What `srun` sets on the third task of a job of two nodes with two tasks each."""
    for name, value in {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": "node[007-008]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    coordinator, number, index, local = processes._detect(1.0)
    assert coordinator.startswith("node007:") and (number, index, local) == (4, 2, [0])
    monkeypatch.setenv("SLURM_NTASKS", "1")  # an interactive shell of an allocation
    assert processes._detect(1.0)[1] == 1


# --- what they tell one another ------------------------------------------------------------------------------------


@pytest.mark.full
def test_two_processes_tell_one_another_what_they_must():
    zero, one = (ended.said() for ended in run_together("talk"))
    assert (zero["number"], zero["index"], zero["writer"], zero["share"]) == (2, 0, True, [0, 1])
    assert (one["number"], one["index"], one["writer"], one["share"]) == (2, 1, False, [2, 3, 4])
    assert zero["devices"] == one["devices"] == [8, 4]
    assert zero["gathered"] == [[{"from": i, "round": k} for i in range(2)] for k in range(3)] == one["gathered"]
    me = f"process 1 ({socket.gethostname()})"
    for said in (zero, one):
        assert said["config"].startswith("InputError: config. seed = 0: ") and f"{me} has 1" in said["config"]
        assert said["program"].startswith("InputError: program solve = ") and me in said["program"]
    assert zero["late"] == f"ProcessError: after loading: {me} did not arrive within 1 seconds"


@pytest.mark.full
def test_different_configurations_are_refused_in_one_line_before_anything_is_written(game_model: Path, tmp_path: Path):
    arguments = ["train", "--model", game_model, "--output-dir", tmp_path / "run", "--seed"]
    for ended in run_together("command", *arguments, more=[[0], [1]]):
        assert ended.status == 2, ended.err
        assert f"config seed = 0: in process 0 ({socket.gethostname()}), but process 1 " in ended.line()
        assert "has 1: start all processes with the same settings" in ended.line() and "Traceback" not in ended.err
    assert not (tmp_path / "run").exists()


# --- how they end --------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("victim", "way"),
    [pytest.param(1, "works", marks=pytest.mark.slow), (0, "works"), pytest.param(1, "sleeps", marks=pytest.mark.slow)],
)
def test_killing_one_process_ends_the_other_with_its_name(victim: int, way: str):
    check_killed(run_together("die", victim, way, victim=victim, limit=LIMIT), victim)


def check_killed(ended: list[Ended], victim: int) -> None:
    assert ended[victim].status == -9
    other = ended[1 - victim]
    assert other.status == LOST_STATUS, other.err
    assert f"process {victim} ({socket.gethostname()}) has" in other.line()


@pytest.mark.full
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_error_in_one_process_ends_the_other_with_the_reason(victim: int):
    ended = run_together("die", victim, "raises", victim=victim, limit=LIMIT)
    assert ended[victim].status == 1 and "no room on the disk" in ended[victim].err
    other = ended[1 - victim]
    assert other.status == LOST_STATUS, other.err
    line = other.line()
    assert f"process {victim} ({socket.gethostname()}) has failed: RuntimeError: no room on the disk" in line
