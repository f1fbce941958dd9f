"""Runs of two processes with 4 devices each beside runs of one process with 8: the same game, checkpoints in common."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from lsp_jax.checkpoint.host_state import HostState
from lsp_jax.checkpoint.manager import Checkpoints, abstract
from lsp_jax.config import TrainConfig
from lsp_jax.learn.novelty import MemoryConfig
from lsp_jax.learn.optimizer import TrainState, init_state
from lsp_jax.learn.spec import OptimizerSpec
from lsp_jax.model.llama import init_params
from lsp_jax.model.sharding import partitions
from lsp_jax.model.weights import read_config
from test_processes import LIMIT, check_killed, run_together
from test_trainer import read_lines

pytestmark = pytest.mark.full


class Runs:
    """Two iterations by two processes and the same by one, of the same model."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.two, self.one = model, folder / "two", folder / "one"
        self.said = [ended.said() for ended in run_together("play", model, self.two)]
        (self.said_alone,) = (ended.said() for ended in run_together("play", model, self.one, number=1))


@pytest.fixture(scope="module")
def runs(game_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(game_model, tmp_path_factory.mktemp("runs"))


def shapes(model: Path, remembers: bool = True) -> Any:
    """Of the state of a run with that model, on this process's one device; `remembers`: the Challenger's queries."""
    config = read_config(model)
    memory = (MemoryConfig().size, config.hidden_size) if remembers else None
    return abstract(None, lambda: init_state(init_params(config, jax.random.key(0)), OptimizerSpec(), memory))


def saved_state(directory: Path, model: Path, step: int) -> tuple[TrainState, HostState]:
    """A checkpoint on this process's one device."""
    checkpoints = Checkpoints(directory / "checkpoints")
    try:
        remembers = TrainConfig.load(directory / "config.json").loss.alpha_challenger > 0
        return checkpoints.restore(step, shapes(model, remembers))
    finally:
        checkpoints.close()


def digests(tree: Any) -> list[str]:
    """Of every array's bytes."""
    return [hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(tree)]


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def distance(left: Any, right: Any) -> float:
    return float(np.linalg.norm(vector(left) - vector(right)) / np.linalg.norm(vector(right)))


def test_queries_answers_and_rewards_are_the_same(runs: Runs):
    pairs = zip(*(read_lines(directory / "transcripts.jsonl") for directory in (runs.two, runs.one)), strict=True)
    played = 0
    for ours, theirs in pairs:
        played += 1
        assert (ours["query"], ours["valid"]) == (theirs["query"], theirs["valid"])
        assert ours["advantage"] == pytest.approx(theirs["advantage"], abs=1e-4)
        for mine, other in zip(ours["answers"], theirs["answers"], strict=True):
            assert (mine["text"], mine["valid"], mine["R"]) == (other["text"], other["valid"], other["R"])
            assert mine["rewards"]["share"] == other["rewards"]["share"]
            assert mine["rewards"]["quality"] == pytest.approx(other["rewards"]["quality"], abs=1e-4)
    assert played == 8


def test_each_process_scores_its_share_and_process_0_writes(runs: Runs):
    for said in runs.said:
        assert said["scored"] == [2, 2, 2]  # a probe of 2 texts, then half of 4 queries in each iteration
    assert runs.said_alone["scored"] == [2, 4, 4]
    assert [said["lines"] for said in runs.said] == [[4, 4], [0, 0]]
    written = read_lines(runs.two / "metrics.jsonl")
    assert len(written) == 2
    for mine, other, line in zip(*(said["metrics"] for said in runs.said), written, strict=True):
        rate = {"tokens_per_second"}
        assert {k: v for k, v in mine.items() if k not in rate} == {k: v for k, v in other.items() if k not in rate}
        assert mine.items() <= line.items()
    for mine, alone in zip(runs.said[0]["metrics"], runs.said_alone["metrics"], strict=True):
        assert mine.keys() == alone.keys()
        for name in mine.keys() - {"tokens_per_second"}:
            assert mine[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
    names = [sorted(path.name for path in directory.iterdir()) for directory in (runs.two, runs.one)]
    assert names[0] == names[1]


def test_the_unclipped_gradient_and_the_saved_states_are_the_same(runs: Runs):
    """The first moment after one update is a tenth of the gradient."""
    (two, host_two), (one, host_one) = (saved_state(directory, runs.model, 1) for directory in (runs.two, runs.one))
    gradients = [optax.tree_utils.tree_get(state.opt_state, "mu") for state in (two, one)]
    assert distance(*gradients) < 1e-5
    assert distance(two.params, one.params) < 1e-5
    assert host_two.cursor == host_one.cursor == 4 and host_two.provenance.keys() == host_one.provenance.keys()
    assert host_two.offsets["metrics.jsonl"] == len((runs.two / "metrics.jsonl").read_bytes().splitlines(True)[0])


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [
        pytest.param(1, 1, id="1 device", marks=pytest.mark.slow),
        pytest.param(1, 4, id="4 devices", marks=pytest.mark.slow),
        pytest.param(2, 4, id="2 x 4 devices", marks=pytest.mark.slow),
    ],
)
def test_what_8_devices_saved_goes_on_on_others(data: int, fsdp: int, runs: Runs, tmp_path: Path):
    """Parameters and moments are the bits that the run of 8 devices ended with, spread as the new mesh has it."""
    copy = shutil.copytree(runs.one, tmp_path / "run")
    (said,) = (ended.said() for ended in run_together("resume", runs.model, copy, data, fsdp, 4, number=1))
    assert said["restored"] == runs.said_alone["ended"] == digests(saved_state(runs.one, runs.model, 2)[0])
    assert list(said["mesh"].values()) == ([data, fsdp, 1] if data * fsdp > 1 else [])
    assert any("fsdp" in spec for spec in said["layout"]) == (fsdp > 1)
    lines = read_lines(copy / "metrics.jsonl")  # strict: a number that is not finite would be null
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["skipped_updates"] == 0 and lines[-1]["grad_norm"] > 0
    assert said["ended"] != said["restored"]
    state, host = saved_state(copy, runs.model, 4)
    assert digests(state) == said["ended"] and host.cursor == 16


@pytest.mark.slow
def test_a_run_of_either_resumes_on_the_other(runs: Runs):
    """Two processes' run on one process and a mesh of 2 x 4 devices, and the other way round."""
    wanted = [digests(saved_state(directory, runs.model, 2)[0]) for directory in (runs.two, runs.one)]
    (on_one,) = (ended.said() for ended in run_together("resume", runs.model, runs.two, 2, 4, 3, number=1))
    on_two = [ended.said() for ended in run_together("resume", runs.model, runs.one, 0, 0, 3)]
    layout = [str(spec) for spec in jax.tree.leaves(partitions(shapes(runs.model)), is_leaf=is_spec)]
    assert any("fsdp" in spec for spec in layout)
    for said, arrays, mesh in ((on_one, wanted[0], [2, 4, 1]), *((said, wanted[1], [1, 8, 1]) for said in on_two)):
        assert list(said["mesh"].values()) == mesh
        assert said["restored"] == arrays and said["layout"] == layout
        assert [line["learning_rate"] for line in said["metrics"]] == pytest.approx([1e-3])
    lines = [read_lines(directory / "transcripts.jsonl")[8:] for directory in (runs.two, runs.one)]
    texts = [[(line["query"], [a["text"] for a in line["answers"]]) for line in part] for part in lines]
    assert len(texts[0]) == 4 and texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_of_a_run_ends_the_other_with_its_name(game_model: Path, tmp_path: Path, victim: int):
    ended = run_together("play", game_model, tmp_path / "run", victim, victim=victim, limit=LIMIT)
    check_killed(ended, victim)


@pytest.mark.slow
def test_one_process_that_is_asked_to_end_stops_all_of_them(game_model: Path, tmp_path: Path):
    """Both abandon the same iteration, save together and say the same; process 0 goes on alone from there."""
    said = [ended.said()["stopped"] for ended in run_together("asked", game_model, tmp_path / "run")]
    assert said[0] == said[1] == "asked to end by SIGTERM; iteration 1 is saved; --resume auto continues"
    state, host = saved_state(tmp_path / "run", game_model, 1)
    assert int(state.iteration) == host.iteration == 1


def is_spec(value: Any) -> bool:
    return isinstance(value, jax.sharding.PartitionSpec)
