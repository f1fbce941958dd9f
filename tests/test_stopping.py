"""A run that is asked to end saves, says so, and goes on from there as if it had not; one that hangs ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from child_run import QUICK
from lsp_jax import cli
from lsp_jax.algorithm import rollout, stages
from lsp_jax.checkpoint.manager import Checkpoints
from lsp_jax.core.errors import STALLED_STATUS, STOPPED_STATUS, InputError, Stopped
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.reward.user_callable import callable_reward
from test_resume import config_of, train, without_clocks
from test_trainer import low_share, same_bits

QUICK_COMPILES = True  # the resumed run is compared bit by bit with the whole one
pytestmark = pytest.mark.full


def signalled(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`call`, with a SIGTERM to this process as it is called for the `at`-th time."""
    calls = []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # a phase lasts longer than it takes the thread to wake
        return call(*arguments, **named)

    return wrapped


PHASES = {
    # where the signal comes, in which iteration: what is saved then
    "play": (rollout, "solve", 4, 3),
    "reward": (None, "the reward itself", 5, 3),  # it is tried once before anything is played
    "update": (stages, "learn", 3, 3),
    "save": (Checkpoints, "save", 1, 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(
    phase: str, game_model: Path, whole_run: tuple[Path, TrainState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Play and reward are abandoned, an update and a save are finished; either way the run goes on exactly."""
    owner, name, at, saved = PHASES[phase]
    config = config_of(game_model, tmp_path / "run", save_steps=2 if phase == "save" else 100)
    score = low_share if owner else signalled(low_share, at)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        if owner:
            patch.setattr(owner, name, signalled(getattr(owner, name), at))
        with pytest.raises(Stopped, match=rf"SIGTERM.*iteration {saved} is saved.*--resume auto"):
            lsp.train(config, rewards=[callable_reward(score, "share", weight=2.0)])
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert len(without_clocks(tmp_path / "run")) == saved and not (tmp_path / "run" / "export").exists()
    resumed = train(config_of(game_model, tmp_path / "run", resume="auto"))
    assert same_bits(resumed, whole_run[1])
    assert without_clocks(tmp_path / "run") == without_clocks(whole_run[0])
    assert (tmp_path / "run" / "transcripts.jsonl").read_bytes() == (whole_run[0] / "transcripts.jsonl").read_bytes()


def test_a_signal_before_anything_was_learned(game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rollout, "solve", signalled(rollout.solve, 1))
    with pytest.raises(Stopped, match="there was nothing to save"):
        train(config_of(game_model, tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_exit_status_of_a_stopped_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(_: Any) -> None:
        raise Stopped("asked to end by SIGTERM;\niteration 3 is saved")

    monkeypatch.setitem(cli.COMMANDS, "train", stop)
    assert cli.main(["train"]) == STOPPED_STATUS
    assert capsys.readouterr().err == "lsp-jax: asked to end by SIGTERM; iteration 3 is saved\n"


@pytest.mark.parametrize(
    ("field", "value"), [("stop_timeout", 0.0), ("stop_timeout", float("nan")), ("progress_timeout", -1.0)]
)
def test_limits_that_cannot_be_used(field: str, value: float, tmp_path: Path):
    with pytest.raises(InputError, match=field):
        config_of(tmp_path, tmp_path / "run", **{field: value}).check()


# --- ends that only a process of its own shows ------------------------------------------------------------------------

CHILD = """
import sys, time
sys.path[:0] = sys.argv[4:]
import lsp_jax as lsp
import test_resume
from lsp_jax.core.errors import RunError
from lsp_jax.reward.user_callable import callable_reward
from lsp_jax.monitor.watchdog import Watchdog

tried = []

def hangs(queries, answers):
    if not tried:  # on examples, before anything is played
        tried.append(1)
        return [[0.0 for _ in group] for group in answers]
    print("scoring", flush=True)
    time.sleep(200)

def fields():
    for item in sys.argv[3].split():
        name, _, value = item.partition("=")
        yield name, float(value)

if "progress_timeout" in sys.argv[3]:  # short in the phase that hangs alone: the start may take its time
    beat = Watchdog.beat

    def patient(self, phase):
        self._seconds = 3.0 if phase == "reward" else 600.0
        beat(self, phase)

    Watchdog.beat = patient
config = test_resume.config_of(sys.argv[1], sys.argv[2], **dict(fields()))
try:
    lsp.train(config, rewards=[callable_reward(hangs, "hangs")])
except RunError as error:
    sys.exit(error.status)
"""


class Child:
    """A run whose first scoring does not end, up to that point."""

    def __init__(self, model: Path, directory: Path, fields: str):
        tests = Path(__file__).parent
        script = directory / "child.py"
        script.write_text(CHILD)
        self.process = subprocess.Popen(
            [sys.executable, script, model, directory / "run", fields, tests, tests.parent],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUICK},
        )
        assert self.process.stdout is not None
        while "scoring" not in (line := self.process.stdout.readline()):
            assert line, self.process.communicate()[1]

    def ends(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=120)
        return self.process.returncode, said


def test_a_second_interrupt_ends_at_once(game_model: Path, tmp_path: Path):
    child = Child(game_model, tmp_path, "")
    for _ in range(2):
        child.process.send_signal(signal.SIGINT)
        time.sleep(1)
    status, said = child.ends()
    assert status == 130 and "Ctrl-C to exit at once" in said and "interrupted twice" in said


def test_what_is_left_has_a_limit(game_model: Path, tmp_path: Path):
    child = Child(game_model, tmp_path, "stop_timeout=1.5")
    child.process.send_signal(signal.SIGTERM)
    status, said = child.ends()
    assert status == STOPPED_STATUS and "not saved within 1.5 seconds" in said


def test_no_progress_ends_with_every_stack(game_model: Path, tmp_path: Path):
    status, said = Child(game_model, tmp_path, "progress_timeout=600").ends()
    assert status == STALLED_STATUS
    assert re.search(r"no progress for \d+ seconds in the phase reward", said)
    assert "in hangs" in said and "in train_step" in said and said.count("Thread 0x") >= 2
