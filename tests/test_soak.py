"""Three hundred iterations: what must not grow, and six kills on the way. Only in `make test-slow`."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import child_run
from lsp_jax.config import RewardConfig, TrainConfig
from test_resume import assert_same_run, config_of, without_clocks
from test_trainer import read_lines

pytestmark = pytest.mark.slow

STEPS, WARM, EVERY = 300, 100, 50


class Soak:
    """The run that nothing interrupted, with what was seen of its process after each iteration."""

    def __init__(self, model: Path, folder: Path):
        self.config: TrainConfig = config_of(
            model,
            folder / "whole",
            max_steps=STEPS,
            save_steps=8,
            resume="auto",
            reward=RewardConfig(quality_weight=0.5),
        )
        # one heap: a thread that saves may open another one, of 4 MiB, which is no growth but looks like it
        self.environment = child_run.environment(folder / "programs") | {"MALLOC_ARENA_MAX": "1"}
        ended = child_run.run(self.config, "watched", folder / "seen.jsonl", env=self.environment)
        assert ended.returncode == 0, ended.stderr[-3000:]
        self.directory = folder / "whole"
        self.seen: list[dict[str, Any]] = read_lines(folder / "seen.jsonl")


@pytest.fixture(scope="module")
def soak(game_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    return Soak(game_model, tmp_path_factory.mktemp("soak"))


def test_nothing_compiles_after_the_first_iterations(soak: Soak) -> None:
    lines = read_lines(soak.directory / "metrics.jsonl")
    assert len(lines) == len(soak.seen) == STEPS
    assert len({line["compile/count"] for line in lines[60:]}) == 1


def test_memory_is_flat(soak: Soak) -> None:
    """A state that were kept each iteration would be 150 KiB of it, a batch of rows with its texts about 10.

    TensorStore keeps about 50 KiB a save (what it says of itself as JSON), here 6 an iteration. Resident memory grows
    by steps of 4 MiB at odd times, which a slope of 200 iterations takes for one: it is bounded as a whole.
    """
    resident, heap = (
        np.asarray([seen[name] for seen in soak.seen[WARM:]], np.float64) for name in ("resident", "heap")
    )
    first, last = np.triu_indices(len(heap), EVERY)
    slopes = [np.median((bytes_[last] - bytes_[first]) / (last - first)) for bytes_ in (resident, heap)]
    print(f"resident: {resident[0] / 2**20:.0f} MiB at {WARM}, {resident[-1] / 2**20:.0f} MiB at {STEPS}")
    print(f"slopes: {slopes[0]:.0f} bytes an iteration resident, {slopes[1]:.0f} in use")
    assert slopes[1] < 10 * 2**10
    assert resident[-1] < 1.015 * resident[0]


def test_no_file_stays_open(soak: Soak) -> None:
    """Some are open while a checkpoint is written: the fewest of each stretch of iterations are what remains."""
    files = [seen["files"] for seen in soak.seen]
    fewest = [min(files[start : start + EVERY]) for start in range(WARM, STEPS, EVERY)]
    print(f"open files: {fewest} at least in stretches of {EVERY} iterations after {WARM}, {max(files)} at most")
    assert len(set(fewest)) == 1 and max(files) < fewest[0] + 100


def test_killed_every_fifty_iterations(soak: Soak, tmp_path: Path) -> None:
    config = replace(soak.config, output_dir=str(tmp_path / "killed"))
    gone_on = 0
    for iteration in range(EVERY, STEPS + 1, EVERY):  # the last of them before the export
        ended = child_run.run(config, "killed_at", iteration, env=soak.environment)
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
        assert len(without_clocks(tmp_path / "killed")) == iteration
        gone_on += "resuming after iteration" in ended.stdout
    ended = child_run.run(config, env=soak.environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert gone_on == STEPS // EVERY - 1, "all but the first"
    assert_same_run(tmp_path / "killed", soak.directory)
    sums = [(directory / "checksums.jsonl").read_bytes() for directory in (tmp_path / "killed", soak.directory)]
    assert sums[0] == sums[1]
    assert not (tmp_path / "killed" / "damaged").exists()
