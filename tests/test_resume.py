"""A run that stops and goes on is the run that never stopped: bit for bit, or an error that says why not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import pytest

import lsp_jax as lsp
from child_run import QUICK
from lsp_jax import policy
from lsp_jax.checkpoint.run_dir import init_run_dir
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core import runtime
from lsp_jax.core.errors import InputError
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.training.replay import replay
from lsp_jax.training.resume import _check_same_run
from lsp_jax.training.setup import setup
from test_trainer import game_config, game_dir, host_reward, read_lines, same_bits, tree_hash

K = 2
CLOCKS = ("time/", "limit/", "compile/", "checkpoint/", "tokens_per_second")
FILES = ("metrics.jsonl", "transcripts.jsonl")


def config_of(model: Path, directory: Path, **changes: Any) -> TrainConfig:
    """2k steps, a checkpoint each k; the host reward alone unless said otherwise: fewer programs."""
    fields = {"max_steps": 2 * K, "save_steps": K, "reward": RewardConfig(quality_weight=0.0), **changes}
    return game_config(model, directory, **fields)


def train(config: TrainConfig) -> TrainState:
    return lsp.train(config, rewards=[host_reward()])


def without_clocks(directory: Path) -> list[dict[str, Any]]:
    lines = read_lines(directory / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith(CLOCKS)} for line in lines]


def assert_same_run(left: Path, right: Path) -> None:
    assert (left / "transcripts.jsonl").read_bytes() == (right / "transcripts.jsonl").read_bytes()
    assert without_clocks(left) == without_clocks(right)
    assert tree_hash(left / "export") == tree_hash(right / "export")


REWRITTEN = ["config.json", "report.html"]
"""What a start writes anew, with its own settings."""
QUICK_COMPILES = True  # for every test here: whatever is compared bit by bit is compiled alike
pytestmark = pytest.mark.full  # every test here starts from a run


@pytest.fixture(scope="module")
def first_half(game_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of k steps; tests work on copies of it."""
    directory = tmp_path_factory.mktemp("half") / "run"
    train(config_of(game_model, directory, max_steps=K))
    return directory


@pytest.fixture
def half(first_half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first_half, tmp_path / "copy"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr(policy, "load_params", fail)
    monkeypatch.setattr("lsp_jax.training.setup.load_params", fail)


@pytest.mark.full
def test_resume_after_k_of_2k_steps(
    whole_run: tuple[Path, TrainState], half: Path, game_model: Path, capsys: pytest.CaptureFixture[str]
):
    directory, state = whole_run
    resumed = train(config_of(game_model, half, resume="must"))
    assert f"resuming after iteration {K}" in capsys.readouterr().out
    assert same_bits(resumed.params, state.params)
    assert same_bits(resumed.opt_state, state.opt_state)  # both moments and the count of the warm-up
    assert same_bits(resumed, state)
    assert_same_run(half, directory)
    assert [line["iteration"] for line in without_clocks(half)] == [1, 2, 3, 4]
    assert TrainConfig.load(half / "config.json").max_steps == 2 * K


@pytest.mark.full
@pytest.mark.parametrize("tail", [b"", b'{"iteration": 3, "half a li'], ids=["whole lines", "a torn line"])
def test_what_was_written_after_the_checkpoint_is_cut_off(
    tail: bytes, whole_run: tuple[Path, TrainState], half: Path, game_model: Path
):
    for name in FILES:
        with (half / name).open("ab") as file:
            file.write(b'{"iteration": 3, "query": "never saved"}\n' * 3 + tail)
    resumed = train(config_of(game_model, half, resume="auto"))
    assert same_bits(resumed, whole_run[1])
    assert_same_run(half, whole_run[0])


def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    whole_run: tuple[Path, TrainState], half: Path, game_model: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(half / "checkpoints")
    resumed = train(config_of(game_model, half, resume="auto"))
    assert "no checkpoint yet: starting from the model" in capsys.readouterr().out
    assert same_bits(resumed, whole_run[1])
    assert_same_run(half, whole_run[0])


@pytest.mark.parametrize("exists", [True, False])
def test_auto_in_an_empty_directory_starts_and_says_so(
    exists: bool,
    game_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    whole_run: tuple[Path, TrainState],
):
    directory = tmp_path / "new" / "run"
    if exists:
        directory.mkdir(parents=True)
    train(config_of(game_model, directory, resume="auto", max_steps=1))
    out = capsys.readouterr().out
    assert "no checkpoint yet: starting from the model" in out and "resuming" not in out
    assert without_clocks(directory) == without_clocks(whole_run[0])[:1]


def test_never_says_nothing_of_checkpoints(
    first_half: Path, game_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    train(config_of(game_model, tmp_path / "run", max_steps=1))
    out = capsys.readouterr().out
    assert "checkpoint yet" not in out and "resuming" not in out


def test_a_finished_run_says_so_and_keeps_what_it_wrote(
    half: Path, game_model: Path, capsys: pytest.CaptureFixture[str]
):
    before, calls = tree_hash(half, REWRITTEN), []
    state = lsp.train(
        config_of(game_model, half, resume="auto", max_steps=K), rewards=[host_reward()], callbacks=[calls.append]
    )
    assert int(state.iteration) == K and calls == []
    assert f"all {K} iterations are done" in capsys.readouterr().out
    assert tree_hash(half, REWRITTEN) == before


@pytest.mark.parametrize("export", ["missing", "of an earlier policy"])
def test_export_is_that_of_the_newest_checkpoint(half: Path, game_model: Path, export: str):
    """A run killed after its last checkpoint and before its export."""
    before = tree_hash(half, REWRITTEN)
    shutil.rmtree(half / "export")
    if export != "missing":
        shutil.copytree(game_model, half / "export")
    train(config_of(game_model, half, resume="must", max_steps=K))
    assert tree_hash(half, REWRITTEN) == before


def test_a_resumed_run_shows_its_own_day(tmp_path: Path):
    """Llama 3.1's template shows the date: the prompts of a run must not change at midnight."""
    model = game_dir(tmp_path / "dated")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    settings["chat_template"] = today + "{{ 'Today: ' + date_string + '.' }}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    config = replace(config_of(model, tmp_path / "run"), date="")
    old, _ = setup(replace(config, date="26 Jul 2019"), [host_reward()])
    new, _ = setup(replace(config, resume="auto"), [host_reward()])
    assert old.game != new.game, "the template shows the day"
    init_run_dir(old.directory, old.config, old.policy, {})
    again, _ = setup(replace(config, resume="auto"), [host_reward()])
    assert again.config.date == "26 Jul 2019" and again.game == old.game
    with pytest.raises(InputError, match="another date"):
        setup(replace(config, resume="auto", date="27 Jul 2019"), [host_reward()])


def test_a_run_resumed_on_another_day_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SmolLM3's and others' templates call strftime_now whatever arguments they are given."""
    model = game_dir(tmp_path / "dated")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ 'Today: ' + strftime_now('%d %B %Y, %A') }}" + settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))

    def on(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(2026, 7, day)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
        monkeypatch.setattr("lsp_jax.text.chat_template.time.localtime", lambda: datetime(2026, 7, day).timetuple())

    whole, half = (config_of(model, tmp_path / name, save_steps=1, max_steps=2, date="") for name in ("whole", "half"))
    on(26)
    state = train(whole)
    train(replace(half, max_steps=1))
    on(27)
    assert same_bits(train(replace(half, resume="auto")), state)
    assert_same_run(tmp_path / "half", tmp_path / "whole")
    assert TrainConfig.load(tmp_path / "half" / "config.json").date == "26 Jul 2026"
    assert replay(tmp_path / "half", 2, rewards=[host_reward()]).same is True
    later, _ = setup(replace(whole, output_dir=str(tmp_path / "later")), [host_reward()])
    earlier, _ = setup(replace(whole, resume="auto"), [host_reward()])
    assert later.game.prompts != earlier.game.prompts, "the template shows the day"


@pytest.mark.parametrize("changed", ["template", "jax"])
def test_what_would_change_the_numbers_of_a_resumed_run(half: Path, game_model: Path, tmp_path: Path, changed: str):
    model, saved = Path(shutil.copytree(game_model, tmp_path / "model")), half / "config.json"
    saved.write_text(saved.read_text().replace(str(game_model), str(model)))
    config = config_of(model, half, resume="auto")
    if changed == "jax":
        jax.config.update("jax_default_matmul_precision", "highest")
        try:
            with pytest.raises(InputError, match=r"precision = 'highest'.*None"):
                train(config)
        finally:
            jax.config.update("jax_default_matmul_precision", None)
        return
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": "Now: " + settings["chat_template"]}))
    with pytest.raises(InputError, match=r"model = .*other prompts"):
        train(config)


def test_a_checkpoint_of_an_earlier_version_records_the_model_alone():
    here = {"reference": {"source": "model", "digest": "f3"}, "prompts": "a1", "numerics": {"jax_enable_x64": "False"}}
    earlier = {"reference": here["reference"]}
    _check_same_run(TrainConfig(model="model"), earlier, here)
    _check_same_run(TrainConfig(model="model"), {**here, "numerics": {}}, here)
    with pytest.raises(InputError, match="its parameters"):
        _check_same_run(TrainConfig(model="model"), {"reference": {"source": "model", "digest": "f4"}}, here)


# --- refused, with nothing touched and nothing loaded ---------------------------------------------------------------


def refused(config: TrainConfig, *words: str) -> None:
    directory = Path(config.output_dir)
    before, compiled = tree_hash(directory), runtime.compiles()[0]
    with pytest.raises(InputError) as error:
        train(config)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert tree_hash(directory) == before and runtime.compiles()[0] == compiled


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("damage", ["missing", "empty", "no checkpoint", "no whole checkpoint"])
def test_must_needs_a_checkpoint(damage: str, half: Path, game_model: Path):
    if damage in ("missing", "empty"):
        shutil.rmtree(half)
    if damage == "empty":
        half.mkdir()
    if damage == "no checkpoint":
        shutil.rmtree(half / "checkpoints")
    if damage == "no whole checkpoint":
        for step in (half / "checkpoints").iterdir():
            shutil.rmtree(step)
    refused(config_of(game_model, half, resume="must"), "resume", "must", "auto")
    assert half.exists() == (damage != "missing")


CHANGES: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "optimizer.learning_rate": lambda c: replace(c, optimizer=replace(c.optimizer, learning_rate=2e-3)),
    "seed": lambda c: replace(c, seed=1),
    "play.num_generations": lambda c: replace(c, play=replace(c.play, num_generations=8)),
    "prompts.query_prefix": lambda c: replace(c, prompts=replace(c.prompts, query_prefix="Add ")),
    "sampling.top_p, challenger_sampling.temperature": lambda c: replace(
        c, sampling=replace(c.sampling, top_p=0.5), challenger_sampling=SamplingConfig()
    ),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_changed_field_is_named(name: str, resume: str, half: Path, game_model: Path):
    refused(CHANGES[name](config_of(game_model, half, resume=resume)), name, str(half), "same value", "new output_dir")


@pytest.mark.usefixtures("no_weights")
def test_never_refuses_the_folder_of_a_run(half: Path, game_model: Path):
    refused(config_of(game_model, half), "output_dir", str(half), "holds another run", "--resume auto")


def test_what_does_not_decide_the_numbers_may_change(
    whole_run: tuple[Path, TrainState], half: Path, game_model: Path, tmp_path: Path
):
    moved = half.rename(tmp_path / "moved elsewhere")
    config = config_of(game_model, moved, resume="auto", max_steps=K + 1, save_steps=1, save_total_limit=1)
    assert int(train(config).iteration) == K + 1
    assert without_clocks(moved) == without_clocks(whole_run[0])[: K + 1]
    assert [path.name for path in (moved / "checkpoints").iterdir() if path.name.isdigit()] == [str(K + 1)]
    assert same_bits(train(replace(config, max_steps=2 * K)), whole_run[1])


def test_a_lost_or_shortened_file_is_not_resumed_over(half: Path, game_model: Path):
    path = half / "transcripts.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    kept = {name: (half / name).read_bytes() for name in FILES}
    with pytest.raises(InputError, match=r"transcripts\.jsonl.*complete lines before the checkpoint"):
        train(config_of(game_model, half, resume="must"))
    assert {name: (half / name).read_bytes() for name in FILES} == kept


@pytest.mark.usefixtures("no_weights")
def test_auto_does_not_empty_files_of_someone_else(game_model: Path, tmp_path: Path):
    """No config.json: whatever wrote metrics.jsonl, it was not a run that could be resumed."""
    directory = tmp_path / "results"
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"precious": 1}\n')
    refused(config_of(game_model, directory, resume="auto"), "output_dir", "metrics.jsonl")


# --- another process, killed ----------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[4:]
import test_resume
from lsp_jax import train
from test_trainer import host_reward

def kill(event):
    if event.iteration == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

config = test_resume.config_of(sys.argv[1], sys.argv[2], resume="auto", max_steps=6, reward=test_resume.QUALITY)
train(config, rewards=[host_reward()], callbacks=[kill])
"""
QUALITY = RewardConfig(quality_weight=0.5)


@pytest.mark.full
def test_kill_9_in_the_middle_and_resume(game_model: Path, tmp_path: Path):
    """Killed in iteration 5 of 6, with the save of iteration 4 just begun: goes on from 4 or from 2."""
    tests = Path(__file__).parent
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def child(name: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, game_model, tmp_path / name, str(kill_at), tests, tests.parent],
            capture_output=True,
            text=True,
            env={**os.environ, **QUICK},
            timeout=600,
            check=False,
        )

    killed = child("killed", 5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_lines(tmp_path / "killed" / "metrics.jsonl")) == 5
    assert not (tmp_path / "killed" / "export").exists()
    resumed = child("killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after iteration" in resumed.stdout and "resuming" not in killed.stdout
    train(config_of(game_model, tmp_path / "whole", max_steps=6, reward=QUALITY))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
