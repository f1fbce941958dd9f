"""A whole run on a tiny model: what it writes, that it can be read back, recomputed and repeated bit for bit."""

from __future__ import annotations

import hashlib
import json
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsp_jax as lsp
import programs  # noqa: F401  # for the processes that import this module
from lsp_jax.algorithm import rollout, stages
from lsp_jax.checkpoint.export import export_run
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.model.weights import load_params
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.reporting.metrics import describe
from lsp_jax.reward.base import HostReward
from lsp_jax.reward.user_callable import callable_reward
from lsp_jax.text.prompts import PromptConfig
from lsp_jax.training import loop
from lsp_jax.training.announce import WRITTEN
from lsp_jax.training.hooks import IterationEvent
from lsp_jax.training.setup import make_game, setup, token_classes
from tiny import EOS, tiny_dir

STEPS = 3
STOPS = (EOS, *range(100, 140))
"""Ordinary bytes among the stop ids: a random model then ends a seventh of its texts at each token."""

# --- the tiny game, also that of test_resume and test_transfers: equal settings share their compiled programs -----


def game_dir(directory: str | Path, **config: Any) -> Path:
    """A random model of one layer whose texts end after a few tokens."""
    directory = tiny_dir(directory, **{"num_hidden_layers": 1, **config})
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": STOPS}))
    return directory


def game_config(model: str | Path, output_dir: str | Path, **changes: Any) -> TrainConfig:
    """Few and short texts, tempered and truncated sampling, steps long enough to show."""
    fields: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "save_steps": 2,
        "play": PlayConfig(num_queries=4, num_generations=4, max_query_length=8, max_completion_length=8),
        "prompts": PromptConfig(challenger="Ask.", query_prefix="What is "),
        "sampling": SamplingConfig(temperature=0.7, top_k=150, top_p=0.95, min_p=0.001),
        "challenger_sampling": SamplingConfig(temperature=0.7),
        "reward": RewardConfig(quality_weight=0.5),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=3),
    }
    return TrainConfig(**{**fields, **changes})


def low_share(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    """The share of an answer's characters below "N"; the answers without any text have no value."""
    assert len(queries) == len(answers)
    return [[sum(c < "N" for c in text) / len(text) if text else float("nan") for text in group] for group in answers]


def host_reward() -> HostReward:
    return callable_reward(low_share, "share", weight=2.0)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Strict JSON lines: Python's NaN and Infinity are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text("utf-8").splitlines()]


def tree_hash(directory: str | Path, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """Every file below a directory by its path: the digest of its bytes."""
    root = Path(directory)
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in leave_out
    }


def same_bits(left: Any, right: Any) -> bool:
    """Whether two pytrees of arrays hold the same bytes."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in pairs)


# --- one run, looked at from all sides ----------------------------------------------------------------------------


class Trained:
    """A finished run with what its callbacks saw."""

    def __init__(self, config: TrainConfig, rewards: Sequence[HostReward] = ()):
        self.config, self.directory = config, Path(config.output_dir)
        self.events: list[IterationEvent] = []
        self.iterations: list[int] = []

        def callback(event: IterationEvent) -> None:
            self.events.append(event)
            self.iterations.append(int(event.state.iteration))  # read now: the state goes into the next update

        self.state = lsp.train(config, rewards=rewards, callbacks=[callback])
        self.metrics = read_lines(self.directory / "metrics.jsonl")
        self.transcripts = read_lines(self.directory / "transcripts.jsonl")


QUICK_COMPILES = True  # for every test here: whatever is compared bit by bit is compiled alike


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return game_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(game_config(model, tmp_path_factory.mktemp("run") / "lsp"), [host_reward()])


def test_the_folder_holds_what_train_says(run: Trained):
    assert sorted(path.name for path in run.directory.iterdir()) == sorted(name.rstrip("/") for name in WRITTEN)
    saved = TrainConfig.load(run.directory / "config.json")
    assert replace(saved, date="") == run.config
    assert saved.date == time.strftime("%d %b %Y"), "the day that chat templates showed is kept for resuming"
    saved = sorted(path.name for path in (run.directory / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == ["2", "3"]  # every save_steps, and the last


def test_one_line_an_iteration_with_every_metric_described(run: Trained):
    assert [line["iteration"] for line in run.metrics] == [1, 2, 3]
    for line in run.metrics:
        assert all(isinstance(value, (int, float)) for value in line.values()), "every number is finite"
        assert all(describe(name) for name in line)
        assert line["skipped_updates"] == 0 and line["grad_norm"] > 0
        assert line["host_reads"] == 1  # the texts of the host reward
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert run.metrics[0]["solver/kl"] == pytest.approx(0, abs=1e-6) and run.metrics[2]["solver/kl"] > 1e-6


def test_callbacks_see_what_is_written(run: Trained):
    assert [event.iteration for event in run.events] == run.iterations == [1, 2, 3]
    assert [{"iteration": event.iteration, **event.metrics} for event in run.events] == run.metrics
    told = [json.loads(json.dumps(record)) for event in run.events for record in event.transcripts]
    assert [(record["query"], record["advantage"]) for record in told] == [
        (record["query"], record["advantage"]) for record in run.transcripts
    ]
    assert int(run.state.iteration) == STEPS and int(run.state.skipped) == 0


def recomputed(
    records: list[dict[str, Any]], config: TrainConfig
) -> tuple[list[list[float]], list[float], list[float]]:
    """Solver advantages, Challenger rewards and advantages of one iteration in plain Python (LSP, Algorithm 1)."""
    use_quality, solver, rewards = config.loss.use_quality, [], []
    for record in records:
        valid = [a for a in record["answers"] if a["valid"]]
        worth = [a["R"] + a["R_Q"] * use_quality for a in valid]
        mean = sum(worth) / max(len(worth), 1)
        counts = len(valid) >= 2
        solver.append([(a["R"] + a["R_Q"] * use_quality - mean) * (a["valid"] and counts) for a in record["answers"]])
        if not record["valid"]:
            rewards.append(config.loss.invalid_query_penalty)
        else:
            rewards.append(sum(a["R_Q"] * use_quality - a["R"] for a in valid) / max(len(valid), 1))
    counted = [reward for reward, record in zip(rewards, records, strict=True) if record["counted"]]
    mean = sum(counted) / max(len(counted), 1)
    challenger = [(reward - mean) * record["counted"] for reward, record in zip(rewards, records, strict=True)]
    return solver, [r * record["counted"] for r, record in zip(rewards, records, strict=True)], challenger


def check_transcripts(run: Trained, weight: float = 2.0) -> None:
    """Rewards, advantages, validity and the metrics made of them agree with one another."""
    play, quality = run.config.play, run.config.reward.quality_weight
    assert len(run.transcripts) == run.config.max_steps * play.num_queries
    for line in run.metrics:
        records = [record for record in run.transcripts if record["iteration"] == line["iteration"]]
        assert [record["index"] for record in records] == list(range(play.num_queries))
        solver, rewards, challenger = recomputed(records, run.config)
        for n, record in enumerate(records):
            answers = record["answers"]
            assert len(answers) == play.num_generations and record["query"].startswith("What is ")
            texts = [answer["text"] for answer in answers]
            shares = [s for (s,) in low_share([record["query"]] * len(texts), [[text] for text in texts])]
            for answer, share in zip(answers, shares, strict=True):
                scored = np.isfinite(share)
                assert answer["valid"] == (record["valid"] and scored)
                assert answer["R"] == pytest.approx(weight * share if scored else 0)
                assert (answer["rewards"]["share"] is None) == (not scored)
                if quality:
                    assert answer["R_Q"] == pytest.approx(quality * answer["rewards"]["quality"], rel=1e-6)
                    assert 0 <= answer["rewards"]["quality"] <= 7
            assert record["counted"] == (not record["valid"] or any(answer["valid"] for answer in answers))
            np.testing.assert_allclose([answer["advantage"] for answer in answers], solver[n], atol=2e-6)
        np.testing.assert_allclose([record["reward"] for record in records], rewards, atol=2e-6)
        np.testing.assert_allclose([record["advantage"] for record in records], challenger, atol=2e-6)
        counted = [r for r, record in zip(rewards, records, strict=True) if record["counted"]]
        assert line["challenger/reward"] == pytest.approx(np.mean(counted), abs=1e-5)
        worth = [a["R"] + a["R_Q"] * run.config.loss.use_quality for r in records for a in r["answers"] if a["valid"]]
        assert line["solver/reward"] == pytest.approx(np.mean(worth) if worth else 0, abs=1e-5)
        assert line["queries/valid_fraction"] == np.mean([record["valid"] for record in records])


def test_advantages_recomputed_from_the_transcripts(run: Trained):
    check_transcripts(run)
    # or the masks were not tried
    assert {record["valid"] for record in run.transcripts} == {True, False}
    assert {a["valid"] for record in run.transcripts if record["valid"] for a in record["answers"]} == {True, False}
    assert {a["stopped"] for record in run.transcripts for a in record["answers"]} == {True, False}


def test_learner_and_sampler_agree_before_the_first_update(run: Trained):
    """The Solver at temperature 0.7 with top-k, top-p and min-p, the Challenger at 0.7 alone."""
    first = run.metrics[0]
    for role in ("solver", "challenger"):
        assert first[f"sampling/{role}/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
    for line in run.metrics:  # one update an iteration: every batch is on-policy
        assert line["sampling/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)


@pytest.mark.full
def test_the_same_seed_repeats_the_run_and_another_does_not(run: Trained, model: Path, tmp_path: Path):
    again = Trained(game_config(model, tmp_path / "again"), [host_reward()])
    assert (again.directory / "transcripts.jsonl").read_bytes() == (run.directory / "transcripts.jsonl").read_bytes()
    assert same_bits(again.state, run.state)
    other = Trained(game_config(model, tmp_path / "other", seed=1, max_steps=1), [host_reward()])
    assert [record["query"] for record in other.transcripts] != [record["query"] for record in run.transcripts[:4]]


@pytest.mark.full
def test_every_iteration_and_attempt_draws_its_own_noise(run: Trained, model: Path):
    policy = lsp.load_pretrained(model)
    game, classes = make_game(run.config, policy), token_classes(policy)
    seed_key = jax.random.key(run.config.seed)
    drawn = set()
    for iteration, attempt in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0)):
        key = stages.iteration_key(seed_key, jnp.int32(iteration), jnp.int32(attempt))
        queries = rollout.challenge(policy.params, classes, key, game)  # always the same parameters
        drawn.add(np.asarray(queries.sampled.tokens).tobytes())
    assert len(drawn) == 5
    key = stages.iteration_key(seed_key, jnp.int32(0), jnp.int32(0))
    queries = rollout.challenge(policy.params, classes, key, game)
    ids, lengths = (np.asarray(part) for part in queries.text)
    texts = [policy.tokenizer.decode(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]
    assert texts == [record["query"] for record in run.transcripts[:4]]  # the run's own first noise


def test_a_callback_that_raises_ends_the_run_and_the_bar(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Trained
):
    closed = []

    class Closing(loop.Console):
        def close(self) -> None:
            closed.append(True)
            super().close()

    def stop(event: IterationEvent) -> None:
        raise StopIteration(event.iteration)

    monkeypatch.setattr(loop, "Console", Closing)
    with pytest.raises(StopIteration, match="1"):
        lsp.train(game_config(model, tmp_path / "run"), rewards=[host_reward()], callbacks=[stop])
    assert closed == [True]
    line = (run.directory / "transcripts.jsonl").read_bytes().splitlines()[:4]
    assert (tmp_path / "run" / "transcripts.jsonl").read_bytes().splitlines() == line  # what was played is on disk
    assert not (tmp_path / "run" / "export").exists()


# --- what it leaves behind -----------------------------------------------------------------------------------------

PROMPTS = ["What is 3 + 4?", "Yes", "Add the user and 12", "What is the answer?", "q"]


def test_the_export_holds_the_final_parameters(run: Trained):
    exported = lsp.load_pretrained(run.directory / "export")
    assert same_bits(exported.params, run.state.params)
    assert exported.tokenizer.stop_ids == tuple(STOPS)
    assert not same_bits(exported.params, lsp.load_pretrained(run.config.model).params)  # it learned


def test_transformers_continues_the_export_as_we_do(run: Trained):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(run.directory / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.directory / "export")
    texts = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            out = theirs.generate(**ids, do_sample=False, max_new_tokens=16)[0, ids["input_ids"].shape[1] :].tolist()
        assert len(out) == 16 or out[-1] in STOPS
        texts.append(tokenizer.decode(out[:-1] if out[-1] in STOPS else out, skip_special_tokens=True))
    assert any(texts)
    ours = lsp.load_pretrained(run.directory / "export")
    assert lsp.generate(ours, PROMPTS, SamplingConfig(temperature=0), max_completion_length=16) == texts


def test_export_run_writes_the_same_directory(run: Trained, tmp_path: Path):
    assert export_run(run.directory, tmp_path / "newest") == STEPS
    assert tree_hash(tmp_path / "newest") == tree_hash(run.directory / "export")
    assert export_run(run.directory, tmp_path / "earlier", step=2) == 2
    earlier, last = (lsp.load_pretrained(tmp_path / name).params for name in ("earlier", "newest"))
    assert not same_bits(earlier, last)


def test_base_holds_configuration_and_tokenizer_but_no_weights(run: Trained, model: Path):
    base = run.directory / "base"
    assert not list(base.glob("*.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (base / name).read_bytes() == (run.directory / "export" / name).read_bytes()
    told = json.loads((base / "config.json").read_text())
    ours = json.loads((model / "config.json").read_text())
    assert told == ours


# --- other forms of the game ----------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    "changes",
    [
        {"loss": LossConfig(use_quality=False, invalid_query_penalty=-3.0)},
        {
            "loss": LossConfig(loss_type="token_mean", kl_estimator="k3"),
            "sampling": SamplingConfig(temperature=0.7),
            "challenger_sampling": SamplingConfig(temperature=0.7, top_p=0.8, top_k=40, min_p=0.01),
            "reward": RewardConfig(quality_weight=0.0),
        },
    ],
    ids=["lsp-zero", "token mean, sampling swapped"],
)
def test_other_objectives_and_samplings(changes: dict[str, Any], model: Path, tmp_path: Path):
    run = Trained(game_config(model, tmp_path / "run", max_steps=2, **changes), [host_reward()])
    check_transcripts(run)
    for role in ("solver", "challenger"):
        assert run.metrics[0][f"sampling/{role}/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)


@pytest.mark.full
def test_the_solver_alone_on_one_query(model: Path, tmp_path: Path):
    play = PlayConfig(num_queries=1, num_generations=4, max_query_length=8, max_completion_length=8)
    changes = {"play": play, "loss": LossConfig(alpha_challenger=0.0), "reward": RewardConfig(quality_weight=0.0)}
    run = Trained(game_config(model, tmp_path / "run", max_steps=4, **changes), [host_reward()])
    check_transcripts(run)
    assert any(record["valid"] for record in run.transcripts), "or nothing was trained"
    assert "challenger/loss" not in run.metrics[0] and "sampling/challenger/token_mult_prob_error" not in run.metrics[0]
    assert not same_bits(run.state.params, lsp.load_pretrained(model).params)


@pytest.mark.full
def test_bfloat16_parameters_train(model: Path, tmp_path: Path):
    """Master parameters and moments keep their dtypes through the update; the second moment is always float32."""
    optimizer = OptimizerConfig(learning_rate=1e-3, moment_dtype="bfloat16")
    config = game_config(model, tmp_path / "run", param_dtype="bfloat16", max_steps=1, optimizer=optimizer)
    state = lsp.train(config, rewards=[host_reward()])
    (adam,) = [
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    ]
    for tree, dtype in ((state.params, "bfloat16"), (adam.mu, "bfloat16"), (adam.nu, "float32")):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {dtype}
    assert int(state.skipped) == 0


def test_a_given_policy_needs_no_model_in_the_config(model: Path, tmp_path: Path):
    policy = lsp.load_pretrained(model)
    config = game_config(model, tmp_path / "run")
    run, params = setup(replace(config, model=""), [host_reward()], policy)
    assert run.config.model == str(model) and same_bits(params, policy.params) and run.policy.params == {}
    assert not (tmp_path / "run").exists(), "nothing is written before the run starts"


@pytest.mark.full
def test_the_loaded_parameters_are_let_go(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The state is made of copies: after the start nothing may hold the arrays that were read, or a device would carry
    them through the whole run."""
    loaded: list[Any] = []

    def load(*arguments: Any) -> Any:
        params = load_params(*arguments)
        loaded.append(weakref.ref(params["model"]["embed_tokens"]["weight"]))
        return params

    monkeypatch.setattr("lsp_jax.training.setup.load_params", load)
    alive: list[bool] = []
    config = game_config(model, tmp_path / "run", max_steps=1, compute_dtype="bfloat16")
    lsp.train(config, callbacks=[lambda event: alive.append(loaded[0]() is not None)])
    assert alive == [False]
