"""Long runs: kills at any moment, and what must not grow. Only in `make test-slow`."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny import stopping_dir

pytestmark = pytest.mark.slow

STEPS = 60


def write_reward(directory: Path) -> Path:
    """A user's reward file: the share of an answer's characters below "N", so that there is something to learn."""
    path = directory / "soak_reward.py"
    path.write_text(
        "def share(queries, answers):\n"
        "    return [[sum(c < 'N' for c in text) / max(len(text), 1) for text in group] for group in answers]\n"
    )
    return path


def command(model: Path, output: Path, steps: int, *more: str) -> list[str]:
    options = {
        "model": model,
        "output-dir": output,
        "max-steps": steps,
        "save-steps": 3,
        "play.num-queries": 4,
        "play.num-generations": 4,
        "play.max-query-length": 8,
        "play.max-completion-length": 10,
        "optimizer.learning-rate": 1e-3,
        "reward.callable": f"{write_reward(model.parent)}:share",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "lsp_jax", "train", *flags, *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(record: dict) -> dict:
    """A metrics line without what depends on the clock or on the process."""
    drop = ("time/", "limit/", "compile/", "checkpoint/", "tokens_per_second")
    return {name: value for name, value in record.items() if not name.startswith(drop)}


def test_killed_at_random_moments_equals_uninterrupted(tmp_path: Path) -> None:
    """Twelve kills -9 at seeded delays, saves included, each followed by `--resume auto`."""
    model = stopping_dir(tmp_path / "model")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(model, whole, STEPS), check=True, capture_output=True)
    delays = random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            command(model, killed, STEPS, "--resume", "auto"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delays.uniform(12, 35))  # start-up and compilation take about as long: some kills come before a save
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(model, killed, STEPS, "--resume", "auto"), check=True, capture_output=True)
    learned = [line["grad_norm"] > 0 and line["queries/valid_fraction"] > 0 for line in lines(whole / "metrics.jsonl")]
    assert sum(learned) > STEPS / 2, "most updates must move the policy for equality to say anything"
    assert (killed / "transcripts.jsonl").read_bytes() == (whole / "transcripts.jsonl").read_bytes()
    assert [timeless(line) for line in lines(killed / "metrics.jsonl")] == [
        timeless(line) for line in lines(whole / "metrics.jsonl")
    ]
    name = "model.safetensors"
    assert (killed / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()


def test_three_hundred_iterations_compile_once_and_hold_their_memory(tmp_path: Path) -> None:
    """After warm-up no program is compiled, and resident memory does not climb with the iterations."""
    import resource

    import lsp_jax as lsp
    from lsp_jax.config import TrainConfig
    from lsp_jax.play.selfplay import PlayConfig

    memory: list[int] = []

    def watch(event: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory.append(pages * resource.getpagesize())

    config = TrainConfig(
        model=str(stopping_dir(tmp_path / "model")),
        output_dir=str(tmp_path / "run"),
        max_steps=300,
        save_steps=50,
        play=PlayConfig(num_queries=4, num_generations=4, max_query_length=8, max_completion_length=10),
    )
    lsp.train(config, rewards=[_length_reward()], callbacks=[watch])
    counts = [line["compile/count"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert len(set(counts[60:])) == 1, "compiled after warm-up"
    growth = (sum(memory[-50:]) - sum(memory[100:150])) / 50
    print(f"memory at 100: {memory[100] / 2**20:.0f} MiB, at 300: {memory[-1] / 2**20:.0f} MiB")
    assert growth < 20 * 2**20, f"{growth / 2**20:.1f} MiB more after 150 further iterations"


def _length_reward():
    from lsp_jax.reward.verify import callable_reward

    return callable_reward(lambda _, answers: [[len(text) / 10 for text in group] for group in answers], "length")
