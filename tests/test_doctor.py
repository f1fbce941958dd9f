"""The pass over a run before it starts: each fault is found and says what to do, and a sound run has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax import cli
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.learn.losses import KL_ESTIMATORS, LossConfig, kl_terms
from lsp_jax.model.llama import Params
from lsp_jax.play.prompt_data import DataConfig
from lsp_jax.reward.base import DeviceReward, RewardOutput
from lsp_jax.text.prompts import PromptConfig
from lsp_jax.text.tokenizer import Tokenizer
from lsp_jax.training import doctor
from lsp_jax.training.announce import findings
from lsp_jax.training.doctor import Finding, examine, examine_rewards, pair
from lsp_jax.training.run import Run
from lsp_jax.training.setup import setup
from test_tokenizer import SENTENCEPIECE_FILES, sentencepiece_dir
from test_trainer import game_config, game_dir, host_reward, tree_hash
from tiny import EOS, tiny_dir

Opened = tuple[Run, Params]


class Usage(NamedTuple):
    """Of a disk."""

    free: int


@pytest.fixture
def open_run() -> Any:
    """`setup`, with the workers closed at the end."""
    runs: list[Opened] = []

    def make(config: TrainConfig) -> Opened:
        runs.append(setup(config, [host_reward()]))
        return runs[-1]

    yield make
    for run, _ in runs:
        run.workers.close()


def found(opened: Opened, check: str) -> Finding:
    (finding,) = [finding for finding in examine(*opened) if finding.check == check]
    return finding


def changed(model: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """One of a model's JSON files, with `change` made to what it holds."""
    data = json.loads((model / name).read_text())
    change(data)
    (model / name).write_text(json.dumps(data))


def test_a_sound_run_has_only_good_findings_and_nothing_is_written(
    game_model: Path, tmp_path: Path, open_run: Callable[..., Opened]
):
    made = examine(*open_run(game_config(game_model, tmp_path / "run")))
    assert {finding.level for finding in made} == {"ok"} and not any(finding.remedy for finding in made)
    assert [finding.check for finding in made] == [
        *("vocabulary", "stop ids", "Challenger's prompt", "Solver's prompt", "judge's prompt"),
        *("KL", "mesh", "memory", "disk"),
    ]
    assert not (tmp_path / "run").exists()


# --- tokens and prompts ----------------------------------------------------------------------------------------------


def test_a_turn_that_ends_with_no_stop_id(tmp_path: Path, open_run: Callable[..., Opened]):
    """ChatML's end of turn is another token than the one end of sequence that the files name."""
    model = game_dir(tmp_path / "model")
    changed(model, "generation_config.json", lambda data: data.update(eos_token_id=0))
    changed(model, "tokenizer_config.json", lambda data: data.update(eos_token="<|endoftext|>"))
    finding = found(open_run(game_config(model, tmp_path / "run")), "stop ids")
    assert finding.level == "warning" and "<|im_end|>" in finding.message
    assert f"add {EOS} to eos_token_id in generation_config.json" in finding.remedy


def test_a_template_without_an_end_of_turn(tmp_path: Path, open_run: Callable[..., Opened]):
    model = game_dir(tmp_path / "model")
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    changed(model, "tokenizer_config.json", lambda data: data.update(chat_template=template + "assistant: "))
    finding = found(open_run(game_config(model, tmp_path / "run")), "stop ids")
    assert finding.level == "warning" and "no such token" in finding.message


def test_a_template_for_one_turn_trains_a_solver(tmp_path: Path, open_run: Callable[..., Opened]):
    """It refuses an assistant's message; nothing in GRPO on data needs one."""
    model, data = game_dir(tmp_path / "model"), tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Say 3."}\n')
    single = "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>"
    changed(model, "tokenizer_config.json", lambda held: held.update(chat_template=single))
    reward, loss = RewardConfig(quality_weight=0.0), LossConfig(alpha_challenger=0.0)
    config = game_config(model, tmp_path / "run", reward=reward, loss=loss, data=DataConfig(source=str(data)))
    made = examine(*open_run(replace(config, prompts=PromptConfig())))
    assert {finding.level for finding in made} == {"ok"}


def test_a_stop_id_outside_the_model(tmp_path: Path, open_run: Callable[..., Opened]):
    model = game_dir(tmp_path / "model")
    changed(model, "generation_config.json", lambda held: held.update(eos_token_id=[EOS, 100_000]))
    with pytest.raises(InputError, match=r"eos_token_id = 100000.*generation_config\.json"):
        open_run(game_config(model, tmp_path / "run"))


def test_a_space_that_sentencepiece_adds_is_no_finding(tmp_path: Path):
    """Mistral's: text alone opens with a space of its own, text after a line end does not."""
    tokenizer = Tokenizer.from_pretrained(sentencepiece_dir(tmp_path / "mistral", SENTENCEPIECE_FILES[1]))
    alone, inside = tokenizer.encode("What is 3 + 4?"), tokenizer.chat_ids("Instruction:\nWhat is 3 + 4?")
    spliced = [*tokenizer.chat_ids("Instruction:\n")[:-1], *alone]
    assert inside != spliced
    finding = doctor._prompt(tokenizer, "prompt", [*spliced, inside[-1]], inside, ["What is 3 + 4?"])
    assert finding.level == "ok" and "tokenised differently" in finding.message


def test_a_template_that_puts_two_beginnings(tmp_path: Path, open_run: Callable[..., Opened]):
    model = game_dir(tmp_path / "model")

    def twice(data: dict[str, Any]) -> None:
        data["chat_template"] = "<|im_start|><|im_start|>" + data["chat_template"].replace("<|im_start|>", "", 1)

    changed(model, "tokenizer_config.json", twice)
    opened = open_run(game_config(model, tmp_path / "run"))
    finding = found(opened, "Solver's prompt")
    assert finding.level == "error" and "begins with '<|im_start|><|im_start|>'" in finding.message
    with pytest.raises(InputError, match="chat_template"):
        findings(examine(*opened))


def test_a_template_that_changes_what_the_challenger_is_asked(tmp_path: Path, open_run: Callable[..., Opened]):
    """One that cuts long messages: what it is asked in the end is not what is configured."""
    model = game_dir(tmp_path / "model")

    def cut(data: dict[str, Any]) -> None:
        data["chat_template"] = data["chat_template"].replace("message['content']", "message['content'][:20]")

    changed(model, "tokenizer_config.json", cut)
    config = game_config(model, tmp_path / "run", reward=RewardConfig(quality_weight=0.0))
    asked = "Ask me something that is easy."
    finding = found(open_run(replace(config, prompts=replace(config.prompts, challenger=asked))), "Challenger's prompt")
    assert finding.level == "warning" and asked in finding.message


def test_ids_that_are_not_the_templates(game_model: Path, tmp_path: Path, open_run: Callable[..., Opened]):
    """A game whose Solver's prompt lacks a token: what any fault in cutting the template would look like."""
    run, params = open_run(game_config(game_model, tmp_path / "run"))
    solver = run.game.prompts.solver
    prompts = replace(run.game.prompts, solver=solver._replace(suffix_ids=solver.suffix_ids[1:]))
    finding = found((replace(run, game=replace(run.game, prompts=prompts)), params), "Solver's prompt")
    assert finding.level == "error" and "the template has '<|im_end|>" in finding.message


# --- the objective and the machine -----------------------------------------------------------------------------------


def kl_pull(estimator: str) -> float:
    """How much a small step down the KL term's expected gradient takes off the exact KL to the reference, over what
    the exact gradient takes: 1 for the exact one, 0 for none, below 0 away from the reference. (On seven tokens.)"""
    reference = jax.nn.log_softmax(jnp.sin(2.0 * jnp.arange(7.0)))

    def exact(logits: jax.Array) -> jax.Array:
        own = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(own) * (own - reference))

    def expected(logits: jax.Array) -> jax.Array:
        own = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(jnp.exp(own))
        return jnp.sum(drawn * kl_terms(own, reference, estimator, exact(logits)))

    logits = jnp.linspace(-1.0, 1.0, 7)
    down, best = jax.grad(expected)(logits), jax.grad(exact)(logits)
    return float(jnp.sum(down * best) / jnp.sum(best * best))


@pytest.mark.parametrize(
    ("estimator", "least", "most"), [("k1", -0.01, 0.01), ("k2", 0.99, 1.01), ("k3", 0.1, 3.0), ("full", 0.99, 1.01)]
)
def test_which_estimators_pull_to_the_reference(
    estimator: str, least: float, most: float, game_model: Path, tmp_path: Path, open_run: Callable[..., Opened]
):
    """k2's and the exact KL's expected gradients are the KL's own, k1's is zero (PAPER: the printed form)."""
    pull = kl_pull(estimator)
    assert least < pull < most and set(doctor.KL_GRADIENTS) == set(KL_ESTIMATORS)
    assert doctor.KL_GRADIENTS[estimator] == (
        "zero" if abs(pull) < 0.01 else f"that of KL({'policy || reference' if pull > 0.99 else 'reference || policy'})"
    )
    loss = LossConfig(kl_estimator=estimator)  # pyright: ignore[reportArgumentType]
    finding = found(open_run(game_config(game_model, tmp_path / "run", loss=loss)), "KL")
    assert (finding.level == "warning") == (estimator == "k1")


def test_kl_pull_against_numpy():
    """k3's expected gradient is that of the reverse divergence; by finite differences in float64."""
    logits, reference = np.linspace(-1, 1, 7), np.sin(2.0 * np.arange(7.0))
    reference = reference - np.log(np.exp(reference).sum())

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum())

    def gradient(of: Callable[[np.ndarray], float]) -> np.ndarray:
        return np.array([(of(logits + step) - of(logits - step)) / 2e-6 for step in 1e-6 * np.eye(7)])

    exact = gradient(lambda x: float((np.exp(log_softmax(x)) * (log_softmax(x) - reference)).sum()))
    other_way = gradient(lambda x: float((np.exp(reference) * (reference - log_softmax(x))).sum()))
    assert kl_pull("k3") == pytest.approx(exact @ other_way / (exact @ exact), rel=1e-4)


@pytest.mark.parametrize(
    ("free", "save_errors", "level"),
    [(1 << 50, "stop", "ok"), (1 << 10, "stop", "error"), (1 << 10, "go_on", "warning")],
)
def test_room_on_the_disk(
    free: int, save_errors: Any, level: str, game_model: Path, tmp_path: Path, monkeypatch: Any, open_run: Any
):
    opened = open_run(game_config(game_model, tmp_path / "run", save_errors=save_errors))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(free))
    finding = found(opened, "disk")
    assert finding.level == level and bool(finding.remedy) == (level != "ok")


def test_a_model_too_large_for_the_machine(game_model: Path, tmp_path: Path, monkeypatch: Any, open_run: Any):
    run, params = open_run(game_config(game_model, tmp_path / "run"))
    monkeypatch.setattr(doctor, "host_memory", lambda: 1 << 20)
    finding = found((run, params), "memory")
    assert finding.level == "warning" and "--optimizer.micro-batch-size" in finding.remedy


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_the_pair_is_what_it_says(open_run: Any, game_model: Path, tmp_path: Path):
    run, _ = open_run(game_config(game_model, tmp_path / "run"))
    episode, tokenizer = pair(run.policy.tokenizer, 2), run.policy.tokenizer
    lengths = np.asarray(episode.answer_lengths)
    texts = [tokenizer.decode(np.asarray(episode.answers.tokens[1, n, : lengths[1, n]]).tolist()) for n in range(2)]
    assert texts == ["It is 7.", "no no no no"]
    assert tokenizer.decode(np.asarray(episode.queries.text[0][0]).tolist()) == "What is 3 + 4?"


@pytest.mark.parametrize(
    ("values", "valid", "level"),
    [
        ([2.0, 1.0], True, "ok"),
        ([1.0, 2.0], True, "warning"),
        ([1.0, 1.0], True, "warning"),
        ([float("nan"), 1.0], True, "error"),
        ([2.0, 1.0], False, "warning"),
    ],
)
def test_rewards_that_cannot_tell_right_from_wrong(
    values: list[float], valid: bool, level: str, open_run: Any, game_model: Path, tmp_path: Path
):
    def score(_: Any, episode: Any) -> RewardOutput:
        shape = (len(episode.queries.valid), 1)
        tiled = jnp.tile(jnp.asarray(values), shape)
        return RewardOutput(tiled, jnp.full_like(tiled, valid, bool), jnp.ones(shape[0], bool))

    run, _ = open_run(game_config(game_model, tmp_path / "run"))
    (finding,) = examine_rewards(replace(run, rewards=(DeviceReward("mine", "task", 1.0, score),)))
    assert finding.check == "reward mine" and finding.level == level


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All that training takes; a line a finding, the reward model's and the judge's among them; nothing is written."""
    model, scorer = game_dir(tmp_path / "model"), tiny_dir(tmp_path / "scorer", head="score", num_hidden_layers=1)
    before = tree_hash(tmp_path)
    options = ["--model", model, "--output-dir", tmp_path / "run", "--reward.preference-model", scorer]
    options += ["--compilation-cache", ""]
    options += ["--prompts.challenger", "Ask.", "--play.max-query-length", 8, "--play.max-completion-length", 8]
    assert cli.main(["doctor", *map(str, options)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok  ", "warning  ")) for line in lines)
    assert {line[9:].partition(":")[0] for line in lines} >= {"stop ids", "disk", "reward preference", "reward quality"}
    assert tree_hash(tmp_path) == before


def test_the_command_ends_at_an_error(game_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(0))
    short = ["--prompts.challenger", "Ask.", "--play.max-query-length", "8", "--play.max-completion-length", "8"]
    short += ["--reward.quality-weight", "0", "--reward.arithmetic-weight", "1", "--compilation-cache", ""]
    assert cli.main(["doctor", "--model", str(game_model), "--output-dir", str(tmp_path / "run"), *short]) == 2
    said = capsys.readouterr()
    assert "error    disk" in said.out and said.err.startswith("lsp-jax: error: disk = ")
