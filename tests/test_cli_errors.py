"""Bad input: one line that names field, value and remedy, before any long work, and nothing overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lsp_jax import cli
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.model.weights import save_params
from refusal import Refused, WeightsRead, check_line
from test_trainer import game_config
from tiny import VOCABULARY, tiny_config, tiny_dir, tiny_params

REPOSITORY = Path(cli.__file__).parents[1]

# --- before the model is opened --------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "G = 1": (["--play.num-generations", 1], ("play.num_generations = 1", "at least 2")),
    "N = 1 with a Challenger": (["--play.num-queries", 1], ("play.num_queries = 1", "at least 2", "alpha_challenger")),
    "N = 0 without": (["--play.num-queries", 0, "--loss.alpha-challenger", 0], ("play.num_queries = 0",)),
    "no room for a query": (["--play.max-query-length", 0], ("play.max_query_length = 0", "at least 1")),
    "negative beta": (["--loss.beta", -0.1], ("loss.beta = -0.1", "must be >= 0")),
    "beta not a number": (["--loss.beta", "nan"], ("loss.beta = nan", "must be >= 0")),
    "greedy training": (["--sampling.temperature", 0], ("sampling.temperature = 0", "must be > 0")),
    "nearly greedy training": (["--sampling.temperature", 1e-9], ("sampling.temperature = 1e-09", "at least 0.01")),
    "greedy Challenger": (["--challenger-sampling.temperature", 0], ("challenger_sampling.temperature = 0", "> 0")),
    "top_p": (["--sampling.top-p", 1.5], ("sampling.top_p = 1.5", "(0, 1]")),
    "learning rate": (["--optimizer.learning-rate", 0], ("optimizer.learning_rate = 0", "> 0")),
    "steps": (["--max-steps", 0], ("max_steps = 0", "at least 1")),
    "seed": (["--seed", -1], ("seed = -1", "0 .. 2**32 - 1")),
    "reporter": (["--report-to", "nosuch"], ("report_to = 'nosuch'", "tensorboard, wandb, trackio")),
    "no model": (["--model", ""], ("model = ''", "directory or a hub id")),
    "missing model": (["--model", "./no/such"], ("model = './no/such'", "no such directory")),
    "port": (["--processes.coordinator", "host:" + "9" * 5000], ("processes.coordinator", "host:port")),
    "callable without a function": (
        ["--reward.callable", "os.path"],
        ("reward.callable = 'os.path'", "file.py:function"),
    ),
    "callable of no module": (["--reward.callable", "no_such_7:f"], ("reward.callable = 'no_such_7:f'", "No module")),
    "callable not there": (["--reward.callable", "os.path:nosuch"], ("reward.callable", "has no function nosuch")),
    "resume must": (["--resume", "must"], ("resume = 'must'", "no checkpoint", "use auto or never")),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", FIELDS)
def test_a_bad_field_is_named(case: str, refused: Refused, train: Callable, tmp_path: Path):
    arguments, words = FIELDS[case]
    refused(train(*arguments), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_weights")
def test_one_query_is_enough_for_the_solver_alone(train: Callable):
    """All checks passed: the next thing is the weights."""
    with pytest.raises(WeightsRead):
        cli.main([str(a) for a in train("--play.num-queries", 1, "--loss.alpha-challenger", 0)])


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "nosuch"], ("preset = 'nosuch'", "must be one of quickstart")),
        (["train", "--preset=nosuch"], ("preset = 'nosuch'", "must be one of quickstart")),
        (["train", "--preset"], ("preset = None", "after --preset")),
        (
            ["tarin"],
            ("command = 'tarin'", "must be one of train, doctor, generate, export, evaluate, report"),
        ),
        (["generate", "./no/such", "Hello"], ("model = './no/such'", "no such directory")),
        (["export", "no/such/run", "out"], ("config = 'no/such/run/config.json'", "No such file")),
    ],
)
def test_a_bad_command_is_named(arguments: list[str], words: tuple[str, ...], refused: Refused):
    refused(arguments, *words)


def test_no_command_shows_them_all(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2 and cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n  {name} ") == 2 for name in cli.COMMANDS)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("text", ["x" * 300, "y/" * 5000, "~nosuchuser/x", "a\0b", "\ud800"])
@pytest.mark.parametrize(
    "field", ["model", "output_dir", "init_from", "data.source", "reward.rubric", "compilation_cache"]
)
def test_what_no_file_system_takes_is_no_path(field: str, text: str, refused: Refused, train: Callable):
    more = ["--loss.alpha-challenger", 0] if field == "data.source" else []
    option, named = f"--{field.replace('_', '-')}", field.removeprefix("reward.")
    refused(train(option, text, *more), f"{named} = ", "give another one")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("below", ["file/x", "file", "new/" + "x" * 300])
def test_an_output_that_cannot_be_made(below: str, refused: Refused, train: Callable, game_model: Path, tmp_path: Path):
    """Said before the model is read, not once it is to be written."""
    (tmp_path / "file").write_text("precious\n")
    refused(train("--output-dir", tmp_path / below), "output_dir = ")
    refused(["export", tmp_path / "file", tmp_path / below], "directory = ")
    refused(["demo-model", tmp_path / below], "directory = ")


@pytest.mark.usefixtures("no_weights")
def test_what_a_file_says_reaches_no_terminal(refused: Refused, tmp_path: Path):
    """No escape sequence, and not more than a few hundred characters of it."""
    (tmp_path / "config.json").write_text(json.dumps({"\x1b[2J\r" + "x" * 100_000: 1}))
    err = refused(["export", tmp_path, tmp_path / "out"], "config.json: \\x1b[2J", "...")
    assert err[:-1].isprintable()


CALLABLES = {
    "transposed": ("return [[1.0] * len(queries) for _ in answers[0]]", ("shape (3, 2)", "(2, 3)")),
    "flat": ("return [1.0] * len(queries)", ("shape (2,)", "(2, 3)")),
    "nan": ("return [[float('nan')] * len(g) for g in answers]", ("nan", "must be finite")),
    "one infinity": ("return [[1.0, 2.0, float('inf')], [1.0, 2.0, 3.0]]", ("inf", "must be finite")),
    "texts": ("return answers", ("dtype", "numbers")),
    "raises": ("raise OSError('two\\nlines')", ("raised OSError: two lines", "every text")),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", CALLABLES)
def test_a_bad_callable_is_found_by_examples(
    case: str, refused: Refused, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    body, words = CALLABLES[case]
    (tmp_path / "mine.py").write_text(f"def score(queries, answers):\n    {body}\n")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # the process that scores would leave a cache beside the file
    refused(train("--reward.callable", f"{tmp_path}/mine.py:score"), "reward.callable = ", *words)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("held", ["config.json", "metrics.jsonl", "transcripts.jsonl", "checkpoints/4/x"])
def test_another_runs_folder_is_not_written_to(held: str, refused: Refused, train: Callable, tmp_path: Path):
    path = tmp_path / "run" / held
    path.parent.mkdir(parents=True)
    path.write_text("precious\n")
    refused(
        train(), "output_dir = ", str(tmp_path / "run"), f"holds another run ({held.split('/')[0]})", "--resume auto"
    )


@pytest.mark.usefixtures("no_weights")
def test_an_output_that_is_a_file_stays_one(refused: Refused, train: Callable, tmp_path: Path):
    (tmp_path / "run").write_text("precious\n")
    refused(train(), "output_dir = ", str(tmp_path / "run"), "is a file; give a directory")


@pytest.mark.usefixtures("no_weights")
def test_a_configuration_of_someone_else_is_not_resumed(refused: Refused, train: Callable, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "llama"}')
    refused(train("--resume", "auto"), "config.json: model_type = 'llama'", "is not a field of TrainConfig")
    (tmp_path / "run" / "config.json").write_text('{"seed": ')
    refused(train("--resume", "auto"), "config.json", "run's config.json")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed(
    name: str, refused: Refused, train: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Found before the run's folder is made: after the installation the same command must work."""
    monkeypatch.setitem(sys.modules, name, None)
    refused(train("--report-to", name), f"report_to = '{name}'", "pip install ")
    assert not (tmp_path / "run").exists()


# --- from the model's directory, before its weights ------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[..., Path]:
    """A tiny model's directory with fields of its config.json changed."""

    def make(**changes: Any) -> Path:
        directory = tiny_dir(tmp_path / "model", num_hidden_layers=1)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return directory

    return make


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_model_of_another_kind(command: str, refused: Refused, train: Callable, damaged: Callable):
    directory = damaged(model_type="mistral")
    arguments = train("--model", directory) if command == "train" else ["generate", directory, "Hello"]
    refused(arguments, "model_type = 'mistral'", "only Llama models")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_tokenizer_of_another_model(command: str, refused: Refused, train: Callable, damaged: Callable):
    directory = damaged()
    save_params(tiny_params(config := tiny_config(vocab_size=100)), config, directory)  # tokenizer files stay
    arguments = train("--model", directory) if command == "train" else ["generate", directory, "Hello"]
    refused(arguments, f"tokenizer.vocab_size = {VOCABULARY}", "vocab_size 100", "belongs to another model")


@pytest.mark.usefixtures("no_weights")
def test_a_configuration_that_cannot_be_read(refused: Refused, train: Callable, damaged: Callable):
    directory = damaged()
    (directory / "config.json").write_text('{"model_type": "llama", ')
    refused(train("--model", directory), "config.json = ", "not valid JSON")
    (directory / "config.json").unlink()
    refused(train("--model", directory), "config.json = ", str(directory))


@pytest.mark.usefixtures("no_weights")
def test_prompts_longer_than_the_context(refused: Refused, train: Callable):
    refused(train("--prompts.challenger", "long " * 400), "prompts.challenger = ", "context of 1024", "shorten")
    refused(train("--play.max-completion-length", 1200), "play.max_completion_length = ", "context of 1024", "shorten")
    refused(train("--prompts.query-prefix", "long " * 400), "= ", "context of 1024", "shorten")


# --- the weights and what follows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "generate"])
@pytest.mark.parametrize("cut", [4, 300, -8])
def test_corrupt_weights(command: str, cut: int, refused: Refused, train: Callable, damaged: Callable, tmp_path: Path):
    directory = damaged()
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    arguments = train("--model", directory) if command == "train" else ["generate", directory, "Hello"]
    refused(arguments, "safetensors = ", str(path), "damaged or truncated", "download it again")
    assert not (tmp_path / "run").exists()


def test_missing_and_pickled_weights(refused: Refused, train: Callable, damaged: Callable):
    directory = damaged()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(train("--model", directory), "weights = 'pytorch_model.bin'", "never opened")
    (directory / "pytorch_model.bin").unlink()
    refused(train("--model", directory), "weights = ", "model.safetensors")


def test_generate_with_a_prompt_that_is_too_long(refused: Refused, game_model: Path, damaged: Callable):
    refused(["generate", game_model, "long " * 400], "prompt length = ", "64 new tokens", "context of 1024")
    refused(["generate", game_model, "Hello", "--max-completion-length", 0], "max_completion_length = 0", "at least 1")
    refused(["generate", game_model, "Hello", "--temperature", -1], "sampling.temperature = -1")
    refused(["generate", game_model, "Hello", "--temperature", "nan"], "sampling.temperature = nan", "finite")
    refused(["generate", game_model], "prompts = ()", "at least one")
    refused(["generate", game_model, "Hello", "--dtype", "int8"], "dtype = 'int8'", "float32, bfloat16, float16")
    roomy = damaged(max_position_embeddings=100_000)
    refused(["generate", roomy, "q" * 33_000], "prompt length = ", "largest bucket (32768 tokens)", "shorten")


def test_export_of_what_is_not_there(refused: Refused, game_model: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    refused(["export", run, tmp_path / "out"], "config = ", "No such file")
    (run / "config.json").write_text(game_config(game_model, run).to_json())
    refused(["export", run, tmp_path / "out"], "step = None", "has checkpoints none")
    refused(["export", run, tmp_path / "out", "--step", 3], "step = 3", "has checkpoints none")


def test_the_wrong_json_type_names_its_field(tmp_path: Path):
    text = json.dumps(json.loads(TrainConfig().to_json()) | {"loss": {"beta": "big"}})
    with pytest.raises(ValueError, match=r"config\.json: loss: beta = 'big': must be a number, not of type str"):
        TrainConfig.from_json(text)


BAD_JSON = {
    "nested": b"[" * 100_000,
    "nested inside": b'{"seed": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "too large for a float": b'{"stop_timeout": 1' + b"0" * 400 + b"}",
    "not UTF-8": b'{"model": "\xff"}',
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_python_does_not_read(case: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(BAD_JSON[case])
    with pytest.raises(InputError, match=r"config(\.json)?"):
        TrainConfig.load(tmp_path / "config.json")


# --- other processes --------------------------------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--preset", "nosuch"], ("preset = 'nosuch'", "quickstart")),
        (
            ["train", "--preset", "quickstart", "--model", "OUT", "--play.num-generations", "1"],
            ("num_generations = 1",),
        ),
        (["generate", "no/such/model", "Hello"], ("model = 'no/such/model'", "no such directory")),
        (["generate", "owner/no-such-model", "Hello"], ("model = 'owner/no-such-model'", "local directory")),
    ],
)
def test_a_real_command_fails_with_one_line(arguments: list[str], words: tuple[str, ...], tmp_path: Path):
    """JAX_PLATFORMS names no platform: touching a device would be another error."""
    out = str(tmp_path / "out")
    done = python("-m", "lsp_jax", *[out if a == "OUT" else a for a in arguments], JAX_PLATFORMS="nosuch")
    check_line(done.stderr, words)
    assert done.returncode == 2 and done.stdout == "" and not Path(out).exists()


IMPORT = """
import sys
import lsp_jax, lsp_jax.cli, lsp_jax.training.loop
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
unwanted = {"torch", "wandb", "tensorboardX", "trackio"} & set(sys.modules)
assert not unwanted, unwanted
for command in (*lsp_jax.cli.COMMANDS, None):
    try:
        status = lsp_jax.cli.main([command, "--help"] if command else ["--help"])
    except SystemExit as stop:
        status = stop.code
    assert status in (0, None), (command, status)
assert not xla_bridge.backends_are_initialized()
unwanted = {"wandb", "tensorboardX", "trackio"} & set(sys.modules)
assert not unwanted, unwanted
"""


@pytest.mark.full
def test_import_and_help_touch_no_device():
    done = python("-c", IMPORT, JAX_PLATFORMS="nosuch")
    assert done.returncode == 0, done.stderr
    for word in ("--play.num-generations", "--resume", "--max-completion-length", "--step", "quickstart", "demo-model"):
        assert word in done.stdout, word
