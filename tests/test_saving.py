"""A checkpoint that cannot be written: the error is seen, those before it stay, the run ends or goes on as told."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import child_run
import lsp_jax as lsp
from lsp_jax.checkpoint.manager import Checkpoints, SaveError
from lsp_jax.core.errors import FAILED_STATUS, InputError, Stopped
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.training.checkpointing import Saving
from test_resume import CLOCKS, assert_same_run, config_of, train, without_clocks
from test_trainer import host_reward, read_lines, same_bits

QUICK_COMPILES = True
pytestmark = pytest.mark.full
STEPS = 4


@contextmanager
def small_disk(size: int = 20_000) -> Iterator[Callable[[bool], None]]:
    """Switches a quota on and off: no file of this process may grow beyond `size` bytes. Parameters' files would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(on: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if on else soft, hard))

    try:
        yield full
    finally:
        full(False)


def run(config: Any, full: Callable[[bool], None], when: Callable[[int], bool], first: int = 0) -> TrainState:
    """With the disk full during the saves that come after the iterations for which `when`."""
    checkpoints = Path(config.output_dir) / "checkpoints"

    def switch(event: Any) -> None:
        if event.iteration == first:  # nothing is being written yet
            full(True)
            full_before.append(1)
            return
        deadline = time.monotonic() + 30
        while not full_before and not (checkpoints / str(event.iteration)).is_dir() and time.monotonic() < deadline:
            time.sleep(0.01)  # what is being written must be whole before the disk is full
        if full_before:
            time.sleep(2)  # and what cannot be written has failed before there is room again
        full_before[:] = [1] * when(event.iteration)
        full(when(event.iteration))

    full_before: list[int] = []
    return lsp.train(config, rewards=[host_reward()], callbacks=[switch])


def test_a_full_disk_ends_the_run(game_model: Path, whole_run: tuple[Path, TrainState], tmp_path: Path):
    """Iteration 1 is saved, 2 cannot be: the run ends with the reason; with room again it goes on exactly."""
    config = config_of(game_model, tmp_path / "run", save_steps=1)
    with small_disk() as full, pytest.raises(SaveError, match=r"checkpoint 2 could not be written.*newest one is 1"):
        run(config, full, lambda _: True)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert same_bits(train(replace(config, resume="must")), whole_run[1])
    assert_same_run(tmp_path / "run", whole_run[0])


def test_a_full_disk_and_going_on(
    game_model: Path, whole_run: tuple[Path, TrainState], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    config = config_of(game_model, tmp_path / "run", save_steps=1, save_errors="go_on")
    with small_disk() as full:
        state = run(config, full, lambda number: number in (1, 2))
    assert same_bits(state, whole_run[1])
    said = capfd.readouterr().err
    assert said.count("could not be written") == 2 and "the newest one is 1; continuing" in said
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["checkpoint/failed"] == 0
    assert lines[-1]["checkpoint/failed"] >= 1  # what is found only while the last one is saved is not in its line
    assert without_clocks(tmp_path / "run") == without_clocks(whole_run[0])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps()[-1] == STEPS
    checkpoints.close()


def test_a_failure_is_seen_an_iteration_later_and_leaves_nothing(game_model: Path, tmp_path: Path):
    """Not only when the next save comes; what was half written does not hold the space."""
    config = config_of(game_model, tmp_path / "run", save_steps=2)
    with small_disk() as full, pytest.raises(SaveError, match=r"checkpoint 2 could not be written.*there is none yet"):
        run(config, full, lambda number: number == 2, first=1)
    assert [line["iteration"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_being_asked_to_end_waits_for_the_save_under_way(
    game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A save that fails while the run is asked to end is made anew, since what is said to be saved must be."""
    config = config_of(game_model, tmp_path / "run", save_steps=2, save_errors="go_on")
    with small_disk() as full:

        def ask(event: Any) -> None:
            if event.iteration == 1:
                full(True)
            if event.iteration == 2:
                time.sleep(2)
                full(False)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

        monkeypatch.setattr(Saving, "check", lambda _: None)  # else it is found before
        with pytest.raises(Stopped, match="iteration 2 is saved"):
            lsp.train(config, rewards=[host_reward()], callbacks=[ask])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [2]
    checkpoints.close()


def test_a_place_that_cannot_be_written_to(game_model: Path, tmp_path: Path):
    """Something that is no directory in the way of the first checkpoint."""
    config = config_of(game_model, tmp_path / "run", save_steps=1)

    def block(event: lsp.run.trainer.IterationEvent) -> None:
        if event.iteration == 1:
            (tmp_path / "run" / "checkpoints").write_text("a file")

    with pytest.raises(SaveError, match=r"checkpoint 2 could not be written.*there is none yet"):
        lsp.train(replace(config, save_steps=2), rewards=[host_reward()], callbacks=[block])


@pytest.mark.parametrize("save_errors", ["stop", pytest.param("go_on", marks=pytest.mark.slow)])
def test_a_directory_that_has_become_read_only(
    save_errors: Any, game_model: Path, whole_run: tuple[Path, TrainState], tmp_path: Path
):
    """After iteration 1 is saved nothing more can be: the run ends or goes on as told, and can be gone on with from 1.

    In a process of its own, for root would have to give up its right to write anywhere.
    """
    config = config_of(game_model, tmp_path / "run", save_steps=1, save_errors=save_errors)
    directory = tmp_path / "run" / "checkpoints"
    try:
        ended = child_run.run(config, "read_only_after", 1, env=child_run.environment(quick=True), bound=True)
    finally:
        if directory.is_dir():
            directory.chmod(0o755)
    if "the mode does not bind" in ended.stdout:
        pytest.skip("this user may write into a directory that is read only")
    assert [path.name for path in directory.iterdir()] == ["1"]
    assert "checkpoint 2 could not be written" in ended.stderr and "Permission denied" in ended.stderr
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    if save_errors == "stop":
        assert ended.returncode == FAILED_STATUS and "the newest one is 1 (--save-errors go_on" in ended.stderr
        assert len(lines) < STEPS and not (tmp_path / "run" / "export").exists()
    else:
        assert ended.returncode == 0 and "checkpoint 4 could not be written" in ended.stderr, ended.stderr
        assert ended.stderr.count("the newest one is 1; continuing") >= 3 and lines[-1]["checkpoint/failed"] >= 1
        assert_same_run(tmp_path / "run", whole_run[0])
        shutil.rmtree(tmp_path / "run" / "export")
    resumed = train(replace(config, resume="must"))
    assert same_bits(resumed, whole_run[1])
    assert_same_run(tmp_path / "run", whole_run[0])


# --- the best checkpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_checkpoint_stays(greater: bool, game_model: Path, whole_run: tuple[Path, TrainState], tmp_path: Path):
    """With one checkpoint kept by age the best one stays beside it, also over a restart; training is the same."""
    metrics = read_lines(whole_run[0] / "metrics.jsonl")
    by_best = {}  # metrics that differ every time, by the iteration in which they were best
    for name in sorted(set(metrics[0]) - {name for name in metrics[0] if name.startswith((*CLOCKS, "iteration"))}):
        if len({line[name] for line in metrics}) == STEPS:
            best = (max if greater else min)(metrics, key=lambda line: line[name])
            by_best.setdefault(best["iteration"], name)
    early = min(by_best)
    assert early < STEPS - 1, "else the newest one would be the best"
    name = by_best[early]
    kept = {"save_total_limit": 1, "metric_for_best_model": name, "greater_is_better": greater, "save_steps": 1}
    config = config_of(game_model, tmp_path / "run", **kept)
    train(replace(config, max_steps=3))
    state = train(replace(config, resume="must"))
    assert same_bits(state, whole_run[1])
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == [early, STEPS]
    checkpoints.close()


def test_a_metric_that_there_is_not(game_model: Path, tmp_path: Path):
    config = config_of(game_model, tmp_path / "run", save_steps=1, metric_for_best_model="accuracy")
    with pytest.raises(InputError, match="metric_for_best_model = 'accuracy': no such metric"):
        train(config)
    assert not (tmp_path / "run").exists()
    absent = replace(config, metric_for_best_model="rewards/preference/mean")  # known, but not in this run
    with pytest.raises(InputError, match=r"metric_for_best_model.*there are .*solver/reward"):
        train(absent)
