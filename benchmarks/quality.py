"""What the quality self-reward costs beside the reference pass over the same answers.

    python benchmarks/quality.py MODEL_DIR [--rounds 3]

8 queries of 32 tokens with 8 answers each, of 64, 128 and 256 tokens, float32. `logits`: rubric prefilled before, then
query, answer and seven branches once; `text`: the judge writes up to 64 tokens for every answer (of a model that does
not keep to the form: all of them). The reference pass is the run's own, over the Solver's rows.

Writes `results/quality.json` and `results/quality.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

import lsp_jax as lsp
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.config import TrainConfig
from lsp_jax.learn.batch import LearnBatch, Sampled, make_rows
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.update import reference_logprobs
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, PlayConfig, Queries
from lsp_jax.reward import scoring
from lsp_jax.reward.base import DeviceReward, EpisodeReward
from lsp_jax.reward.config import RewardConfig
from lsp_jax.reward.quality import quality_reward
from lsp_jax.text.prompts import PlayPrompts, PromptConfig, splice
from lsp_jax.training.setup import token_classes

QUERIES, REPEATS, QUERY = 8, 8, 32
LENGTHS = (64, 128, 256)


def episode_of(prompts: PlayPrompts, vocabulary: int, length: int) -> Episode:
    """Random ids above the demo model's control tokens, no answer stopped before its end."""
    rng = np.random.default_rng(length)
    text = jnp.asarray(rng.integers(20, vocabulary, (QUERIES, QUERY)), jnp.int32), jnp.full(QUERIES, QUERY, jnp.int32)
    queries = Queries(None, text, jnp.ones(QUERIES, bool))
    shape = (QUERIES, REPEATS, length)
    answers = Completions(
        jnp.asarray(rng.integers(20, vocabulary, shape), jnp.int32),
        jnp.full(shape[:2], length, jnp.int32),
        jnp.zeros(shape),
        jnp.zeros(shape),
        jnp.zeros(shape[:2], bool),
    )
    return Episode(queries, splice(prompts.solver, text), answers)


def rows_of(episode: Episode, length: int) -> LearnBatch:
    count = QUERIES * REPEATS
    prompts = [jnp.repeat(x, REPEATS, axis=0) for x in episode.prompts]
    zeros = jnp.zeros((count, length))
    answers = Sampled(episode.answers.tokens.reshape(zeros.shape), episode.answers.lengths.reshape(-1), zeros, zeros)
    rows = make_rows((prompts[0], prompts[1]), answers, zeros[:, 0], jnp.ones(count, bool), 1.0, "sequence")
    return LearnBatch(rows, None)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def of_length(policy: lsp.Policy, length: int, rounds: int, text_too: bool) -> dict[str, Any]:
    """Seconds of the reference pass and of the judge, in turn."""
    config = TrainConfig(
        play=PlayConfig(QUERIES, REPEATS, max_query_length=QUERY, max_completion_length=length),
        loss=LossConfig(alpha_challenger=0.0),
        optimizer=OptimizerConfig(micro_batch_size=16),
    )
    prompts = PlayPrompts.build(policy.tokenizer, PromptConfig())
    spec = GameSpec.of(config, policy.config, prompts, (), "float32").learner
    episode = episode_of(prompts, policy.config.vocab_size, length)
    batch, classes = rows_of(episode, length), token_classes(policy)
    arguments = policy.params, policy, classes
    judge = quality_reward(*arguments, RewardConfig(quality_mode="logits"))
    assert isinstance(judge, DeviceReward)
    contestants: dict[str, Callable[[], Any]] = {
        "reference": lambda: reference_logprobs(policy.params, batch, spec=spec),
        "logits": lambda: scoring.score_component(judge.params, episode, score=judge.score),
    }
    if text_too:
        writing = quality_reward(*arguments, RewardConfig(quality_mode="text"))
        assert isinstance(writing, EpisodeReward)
        contestants["text"] = lambda: writing.score(episode)
    timed = {name: partial(seconds, run) for name, run in contestants.items()}
    found = {name: measure.spread(values) for name, values in measure.in_turn(timed, rounds, str(length)).items()}
    return found | {"ratio": found["logits"]["median"] / found["reference"]["median"]}


def table(found: dict[int, dict[str, Any]]) -> str:
    lines = ["| answer tokens | reference s | logits s | logits / reference | text s |", "|---|---|---|---|---|"]
    for length, entry in found.items():
        text = measure.shown(entry["text"]) if "text" in entry else ""
        numbers = f"{measure.shown(entry['reference'])} | {measure.shown(entry['logits'])} | {entry['ratio']:.2f}"
        lines.append(f"| {length} | {numbers} | {text} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    policy = lsp.load_pretrained(options.model)
    found = {length: of_length(policy, length, options.rounds, length == 128) for length in LENGTHS}
    measure.write("quality", {"lengths": found}, table(found))


if __name__ == "__main__":
    main()
