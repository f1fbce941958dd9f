"""A run that is killed thirty times, also while it saves, is the run that never was. Only in `make test-slow`."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from child_run import environment
from test_process_runs import saved_state
from test_resume import assert_same_run, without_clocks
from test_trainer import same_bits
from tiny import stopping_dir

pytestmark = pytest.mark.slow

KILLS, STEPS, SAVE_STEPS, SEED = 30, 180, 3, 0
BEFORE, DURING, BETWEEN = "before its first save", "during a save", "between saves"


def write_reward(directory: Path) -> Path:
    """A user's reward file: the share of an answer's characters below "N", so that there is something to learn."""
    path = directory / "soak_reward.py"
    path.write_text(
        "def share(queries, answers):\n"
        "    return [[sum(c < 'N' for c in text) / max(len(text), 1) for text in group] for group in answers]\n"
    )
    return path


def command(model: Path, output: Path) -> list[str]:
    options = {
        "model": model,
        "output-dir": output,
        "max-steps": STEPS,
        "save-steps": SAVE_STEPS,
        "resume": "auto",
        "play.num-queries": 4,
        "play.num-generations": 4,
        "play.max-query-length": 8,
        "play.max-completion-length": 10,
        "optimizer.learning-rate": 1e-3,
        "reward.callable": f"{write_reward(model.parent)}:share",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "lsp_jax", "train", *flags]


class Moment(NamedTuple):
    """When a process is killed: `delay` seconds after its start, or after it has written its `count`-th iteration, or
    after its `count`-th save has begun to be written."""

    event: str
    count: int
    delay: float


def schedule(seed: int) -> list[Moment]:
    """A third of each event; the longest delays are about as long as a start, three iterations, and a save."""
    draw = random.Random(seed)
    kinds = [("start", 1, 8.0), ("iteration", 8, 0.3), ("save", 3, 0.05)] * (KILLS // 3)
    draw.shuffle(kinds)
    return [Moment(event, draw.randint(1, most), draw.uniform(0, longest)) for event, most, longest in kinds]


def iterations_before(process: subprocess.Popen[str]) -> int:
    """The iteration that the process goes on after, once it says so: its folder is cleaned and cut back by then."""
    assert process.stdout is not None
    said = ""
    while "the first iteration also compiles" not in said:
        line = process.stdout.readline()
        assert line, f"it ended with status {process.wait()}: {said}"
        said += line
    found = re.search(r"resuming after iteration (\d+)", said)
    return int(found[1]) if found else 0


def wait_for(moment: Moment, process: subprocess.Popen[str], run: Path) -> None:
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    if moment.event != "start":
        done = iterations_before(process)
        step = done + SAVE_STEPS * moment.count

        def reached() -> bool:
            if moment.event == "iteration":
                return metrics.exists() and metrics.read_bytes().count(b"\n") >= done + moment.count
            # a save that was too quick to be seen is let go: where the kill fell is looked at, not supposed
            return (checkpoints / str(step)).exists() or any(checkpoints.glob(f"{step}.orbax-checkpoint-tmp*"))

        while not reached():
            assert process.poll() is None, "too few iterations for all the kills"
            time.sleep(0.001)
    time.sleep(moment.delay)


class Saves(NamedTuple):
    """What lies among the checkpoints: the whole ones, and those that are being written or were left so."""

    whole: set[str]
    half: set[tuple[str, int, int]]

    @classmethod
    def of(cls, run: Path) -> Saves:
        checkpoints = run / "checkpoints"
        left = [(path.name, path.stat()) for path in checkpoints.glob("*.orbax-checkpoint-tmp*")]
        whole = {path.name for path in checkpoints.glob("*") if path.name.isdigit()}
        return cls(whole, {(name, stat.st_ino, stat.st_mtime_ns) for name, stat in left})


def kill(moment: Moment, process: subprocess.Popen[str], run: Path) -> str:
    """Kills the process at that moment and says where it was."""
    before = Saves.of(run)
    try:
        wait_for(moment, process, run)
    finally:
        process.kill()
        status = process.wait()
    assert status == -signal.SIGKILL, f"{moment}: it had ended with {status}"
    after = Saves.of(run)
    if after.half - before.half:
        return DURING
    return BEFORE if after.whole == before.whole else BETWEEN


def test_thirty_kills_equal_none(tmp_path: Path) -> None:
    model = stopping_dir(tmp_path / "model")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env = environment(tmp_path / "programs")  # kept, so that starts are short and kills reach every phase
    subprocess.run(command(model, whole), env=env, check=True, capture_output=True)
    fell = []
    for moment in schedule(SEED):
        with (tmp_path / "errors").open("ab") as errors:
            process = subprocess.Popen(
                command(model, killed), env=env, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        with process:
            fell.append(kill(moment, process, killed))
        print(f"{moment}: {fell[-1]}, checkpoints {sorted(map(int, Saves.of(killed).whole))}")
    subprocess.run(command(model, killed), env=env, check=True, capture_output=True)
    counts = Counter(fell)
    print(f"{KILLS} kills: " + ", ".join(f"{count} {place}" for place, count in counts.items()))
    assert counts.total() == KILLS and counts[DURING] >= 5 and min(counts[BEFORE], counts[BETWEEN]) >= 1
    assert not (killed / "damaged").exists(), "a save that was killed must not count"
    learned = [line["grad_norm"] > 0 and line["queries/valid_fraction"] > 0 for line in without_clocks(whole)]
    assert sum(learned) > STEPS / 2, "most updates must move the policy for equality to say anything"
    assert_same_run(killed, whole)
    assert (killed / "checksums.jsonl").read_bytes() == (whole / "checksums.jsonl").read_bytes()
    assert same_bits(saved_state(killed, model, STEPS)[0], saved_state(whole, model, STEPS)[0])
