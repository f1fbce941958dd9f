"""A damaged checkpoint is never gone on from: the one before it is, or an error says that there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest

import lsp_jax as lsp
from lsp_jax.checkpoint.export import export_run
from lsp_jax.checkpoint.manager import Checkpoints, abstract
from lsp_jax.core.errors import InputError, RunError
from lsp_jax.learn.optimizer import OptimizerConfig, TrainState, init_state
from lsp_jax.model.llama import init_params
from test_resume import K, assert_same_run, config_of, train
from test_trainer import same_bits, tree_hash
from tiny import tiny_config

QUICK_COMPILES = True  # the resumed run is compared bit by bit with the whole one
pytestmark = pytest.mark.full
NEWEST = 2 * K


@pytest.fixture
def run(whole_run: tuple[Path, TrainState], tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run[0], tmp_path / "copy"))


def array_file(step: Path) -> Path:
    """The largest file of the parameters: their bytes."""
    return max((path for path in (step / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, place: float) -> None:
    """One bit of the byte at that part of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def flip_moment(step: Path) -> None:
    files = [path for path in (step / "training").rglob("*") if path.is_file()]
    flip(max(files, key=lambda path: path.stat().st_size), 0.5)


def flip_host(step: Path) -> None:
    (path,) = (step / "host").glob("metadata")
    path.write_text(path.read_text().replace('"cursor": 16', '"cursor": 17'))


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def foreign(step: Path) -> None:
    empty(step)
    (step / "holiday.jpg").write_bytes(b"not a checkpoint")


def truncate(step: Path) -> None:
    path = array_file(step)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a byte of the parameters": lambda step: flip(array_file(step), 0.5),
    "a byte of the moments": flip_moment,
    "a number of the host part": flip_host,
    "a file is gone": lambda step: array_file(step).unlink(),
    "half a file": truncate,
    "no host part": lambda step: shutil.rmtree(step / "host"),
    "an empty directory": empty,
    "a foreign directory": foreign,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_one_before_is_taken(
    damage: str, run: Path, whole_run: tuple[Path, TrainState], game_model: Path, capsys: pytest.CaptureFixture[str]
):
    DAMAGE[damage](run / "checkpoints" / str(NEWEST))
    left = tree_hash(run / "checkpoints" / str(NEWEST))
    resumed = train(config_of(game_model, run, resume="must"))
    out = capsys.readouterr().out
    assert f"checkpoint {NEWEST} is damaged and was moved to {run}/damaged/{NEWEST}" in out
    assert f"resuming after iteration {K}" in out
    assert tree_hash(run / "damaged" / str(NEWEST)) == left
    assert same_bits(resumed, whole_run[1])
    assert_same_run(run, whole_run[0])


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_a_record_of_orbax_that_nobody_needs(
    content: str, run: Path, whole_run: tuple[Path, TrainState], game_model: Path
):
    """Its times and names of handlers: whatever has become of them, arrays and host part have their own checksums."""
    (run / "checkpoints" / str(NEWEST) / "_CHECKPOINT_METADATA").write_text(content)
    assert same_bits(train(config_of(game_model, run, resume="must")), whole_run[1])
    assert not (run / "damaged").exists()


def test_a_newer_directory_of_someone_else(run: Path, game_model: Path, whole_run: tuple[Path, TrainState]):
    """One with a number for a name is set aside, one without is left alone; the run was done."""
    for name in ("7", "notes"):
        (run / "checkpoints" / name).mkdir()
        (run / "checkpoints" / name / "read me").write_text("mine")
    assert same_bits(train(config_of(game_model, run, resume="auto")), whole_run[1])
    assert (run / "damaged" / "7" / "read me").read_text() == "mine"
    assert (run / "checkpoints" / "notes" / "read me").read_text() == "mine"


def test_checkpoints_that_have_vanished_are_no_fresh_start(run: Path, game_model: Path):
    """`--resume auto` begins anew only where nothing was on disk."""
    shutil.rmtree(run / "checkpoints")
    before = tree_hash(run)
    with pytest.raises(InputError, match=f"checkpoint {K} existed, and none is left"):
        train(config_of(game_model, run, resume="auto"))
    assert tree_hash(run) == before


def test_no_whole_one_is_an_error_and_stays_one(run: Path, game_model: Path):
    for step in (K, NEWEST):
        flip(array_file(run / "checkpoints" / str(step)), 0.5)
    lines = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "transcripts.jsonl")}
    for _ in range(2):
        with pytest.raises(InputError, match="none of the run's checkpoints is intact"):
            train(config_of(game_model, run, resume="auto"))
    assert {name: (run / name).read_bytes() for name in lines} == lines
    assert {path.name for path in (run / "damaged").iterdir()} == {str(K), str(NEWEST)}


@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), MemoryError()], ids=lambda error: type(error).__name__
)
def test_a_machine_that_cannot_read_moves_nothing(
    error: Exception, run: Path, game_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    before = tree_hash(run)
    monkeypatch.setattr(ocp.CheckpointManager, "restore", refuse)
    with pytest.raises(RunError, match=f"checkpoint {NEWEST} .*could not be read: {type(error).__name__}"):
        train(config_of(game_model, run, resume="auto"))
    assert tree_hash(run) == before


def test_a_checkpoint_without_checksums_is_of_an_earlier_version(run: Path, game_model: Path):
    path = run / "checkpoints" / str(NEWEST) / "host" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in ("iteration", "cursor", "offsets")}))
    with pytest.raises(InputError, match="earlier version"):
        train(config_of(game_model, run, resume="auto"))
    assert not (run / "damaged").exists()


def test_what_killed_saves_have_left_goes(run: Path, game_model: Path, whole_run: tuple[Path, TrainState]):
    left = run / "checkpoints" / "3.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("an array")
    assert same_bits(train(config_of(game_model, run, resume="auto")), whole_run[1])
    assert not left.exists()


def test_the_reference_must_be_the_same(run: Path, game_model: Path, tmp_path: Path):
    """Other weights under the same path would be another reference, and another run."""
    elsewhere = game_model.with_name("kept")
    game_model.rename(elsewhere)
    try:
        changed = lsp.load_pretrained(elsewhere)
        norm = changed.params["model"]["norm"]
        norm["weight"] = norm["weight"] + 1e-6
        lsp.save_pretrained(changed, game_model)
        with pytest.raises(InputError, match="are not those that the run started from"):
            train(config_of(game_model, run, resume="must", max_steps=NEWEST + 1))
    finally:
        shutil.rmtree(game_model)
        elsewhere.rename(game_model)
    assert not (run / "damaged").exists()


def test_a_checkpoint_of_another_model_is_named_not_set_aside(run: Path):
    wider = tiny_config(num_hidden_layers=1, intermediate_size=64)
    shapes = abstract(None, lambda: init_state(init_params(wider, jax.random.key(0)), OptimizerConfig()))
    checkpoints = Checkpoints(run / "checkpoints")
    with pytest.raises(InputError, match="another model"):
        checkpoints.restore(NEWEST, shapes)
    checkpoints.close()
    assert (run / "checkpoints" / str(NEWEST)).is_dir()


def test_no_export_of_damaged_parameters(run: Path, tmp_path: Path):
    flip(array_file(run / "checkpoints" / str(NEWEST)), 0.5)
    with pytest.raises(InputError, match="is damaged: params/"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_run(run, tmp_path / "out", step=K) == K


def test_what_a_checkpoint_records(run: Path):
    record = json.loads((run / "checkpoints" / str(NEWEST) / "host" / "metadata").read_text())
    assert record["iteration"] == NEWEST and set(record["offsets"]) == {
        "metrics.jsonl",
        "transcripts.jsonl",
        "checksums.jsonl",
        "alarms.jsonl",
    }
    assert record["config"]["play.num_queries"] == 4 and record["versions"]["jax"] == jax.__version__
    assert len(record["reference"]["digest"]) == len(record["config_digest"]) == 64
    started = json.loads((run / "manifest.json").read_text())
    names = ("config_digest", "versions", "numerics", "prompts", "reference", "reward_model")
    assert started == {name: record[name] for name in names}
    assert "params/model/norm/weight" in record["arrays"]
