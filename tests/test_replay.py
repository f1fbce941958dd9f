"""An iteration played again from its checkpoint and key is the one that was played, and nothing is written for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lsp_jax import cli
from lsp_jax.core.errors import InputError
from lsp_jax.training.replay import replay
from test_damage import array_file, flip
from test_resume import K, config_of, train
from test_trainer import game_dir, host_reward, read_lines, tree_hash

QUICK_COMPILES = True
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2k steps, with checkpoints at k and 2k."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(config_of(game_dir(tmp_path_factory.mktemp("model") / "tiny"), directory))
    return directory


@pytest.mark.parametrize(("step", "start"), [(1, 0), (K + 1, K), (2 * K, K), (2 * K + 1, 2 * K)])
def test_the_same_queries_answers_and_rewards(step: int, start: int, whole: Path):
    before = tree_hash(whole)
    again = replay(whole, step, rewards=[host_reward()])
    lines = [line for line in read_lines(whole / "transcripts.jsonl") if line["iteration"] == step]
    assert again.start == start and again.same is (True if lines else None)
    assert again.lines == lines or not lines
    metrics = [line for line in read_lines(whole / "metrics.jsonl") if line["iteration"] == step]
    for line in metrics:
        assert {name: line[name] for name in again.metrics} == again.metrics
    assert tree_hash(whole) == before


def test_from_the_whole_one_before_a_damaged_one_and_what_differs_is_said(whole: Path, tmp_path: Path):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    flip(array_file(copy / "checkpoints" / str(K)), 0.5)
    text = (copy / "transcripts.jsonl").read_text()
    (copy / "transcripts.jsonl").write_text(text.replace('"counted": true', '"counted": false'))
    before = tree_hash(copy)
    again = replay(copy, K + 1, rewards=[host_reward()])
    assert again.start == 0 and again.same is False
    assert again.lines == [line for line in read_lines(whole / "transcripts.jsonl") if line["iteration"] == K + 1]
    assert tree_hash(copy) == before


def test_bad_input(whole: Path, tmp_path: Path):
    with pytest.raises(InputError, match="step"):
        replay(whole, 0)
    with pytest.raises(InputError, match="config"):
        replay(tmp_path, 1)


def test_on_the_command_line(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = replay(whole, 1, rewards=[host_reward()])
    monkeypatch.setattr("lsp_jax.training.replay.replay", lambda run, step: found)
    assert cli.main(["replay", str(whole), "--step", "1"]) == 0
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == found.lines
    assert "iteration 1 from the initial model: identical to the run's transcript" in said.err
