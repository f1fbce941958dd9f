"""Bad rewards and data at the command line: one line that names field, value and remedy, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax import cli
from lsp_jax.core.errors import InputError
from lsp_jax.reward.user_callable import arithmetic_reward
from refusal import Refused, WeightsRead
from test_trainer import game_config
from tiny import tiny_dir

pytestmark = pytest.mark.usefixtures("no_weights")


@pytest.fixture
def reward_model(tmp_path: Path) -> Callable[..., Path]:
    """A tiny reward model's directory with fields of its config.json changed."""

    def make(**changes: Any) -> Path:
        directory = tiny_dir(tmp_path / "reward", head="score", num_hidden_layers=1)
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return directory

    return make


def test_a_good_reward_model_is_no_error(train: Callable, reward_model: Callable):
    with pytest.raises(WeightsRead):
        cli.main([str(argument) for argument in train("--reward.preference-model", reward_model())])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, ("model_type = 'qwen2'", "only Llama models")),
        ({"architectures": ["LlamaForCausalLM"]}, ("architectures = ", "LlamaForSequenceClassification")),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, ("architectures = ", "LlamaForSequenceClassification")),
        ({"id2label": {"0": "bad", "1": "good"}}, ("num_labels = 2", "one label")),
        ({"id2label": None, "num_labels": 3}, ("num_labels = 3", "one label")),
    ],
)
def test_a_reward_model_of_another_kind(
    changes: dict[str, Any], words: tuple[str, ...], refused: Refused, train: Callable, reward_model: Callable
):
    refused(train("--reward.preference-model", reward_model(**changes)), *words)


def test_a_reward_model_without_template(refused: Refused, train: Callable, reward_model: Callable):
    directory = reward_model()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    refused(train("--reward.preference-model", directory), "chat_template = None", str(directory))


def test_a_reward_model_that_is_not_there(refused: Refused, train: Callable):
    refused(train("--reward.preference-model", "./no/such"), "'./no/such'", "no such directory")


DATA: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "missing": (None, ("data.source = ", "no such file")),
    "empty": ("", ("data.source = ", "no rows")),
    "blank lines": ("\n\n", ("data.source = ", "no rows")),
    "no prompts": ('{"text": "one"}\n', ("data.prompt_fields = 'prompt'", "no such field (it has text)")),
    "empty prompts": ('{"prompt": ""}\n{"prompt": null}\n', ("data.source = ", "2 rows, none with a prompt")),
    "no text": ('{"prompt": 3}\n', ("data.prompt_fields = 'prompt'", "must be a string")),
    "no object": ('["one"]\n', (".jsonl:1", "must be a JSON object")),
    "no JSON": ("one\n", ("data.source = ", "is not JSON Lines")),
}


@pytest.mark.parametrize("case", DATA)
def test_data_without_prompts(case: str, refused: Refused, train: Callable, tmp_path: Path):
    text, words = DATA[case]
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    refused(train("--data.source", path, "--loss.alpha-challenger", 0), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward.arithmetic-weight", 1, "--reward.quality-weight", -1], ("rewards weights", "sum to zero")),
        (["--reward.quality-weight", 0], ("rewards", "at least one component must reward the Solver")),
        (["--reward.quality-weight", "nan"], ("reward.quality_weight = nan", "finite number")),
        (["--reward.clip", "quality:1:0"], ("reward.clip = 'quality:1:0'", "name:lowest:highest")),
        (["--reward.standardize", "nosuch"], ("reward.standardize = 'nosuch'", "is not a component of this run")),
    ],
)
def test_a_mixture_that_cannot_be(arguments: list[Any], words: tuple[str, ...], refused: Refused, train: Callable):
    refused(train(*arguments), *words)


def test_two_components_of_one_name(game_model: Path, tmp_path: Path):
    """The command line cannot give two the same name; a notebook can."""
    rewards = [arithmetic_reward(1.0), arithmetic_reward(2.0)]
    with pytest.raises(InputError, match="rewards = 'arithmetic': is the name of several components"):
        lsp.train(game_config(game_model, tmp_path / "run"), rewards=rewards)
    assert not (tmp_path / "run").exists()
