"""One iteration's stages in order, timed, with what is scored on the host in between.

All numbers are made by the jitted stages of `algorithm/stages.py`. With compiled rewards nothing is read from the
device but, between chunks of long completions, how many rows still run. While the host
scores, the device runs the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.episode_metrics import tokens_of
from lsp_jax.algorithm.learner_batch import ScoredBatch
from lsp_jax.algorithm.resampling import RESAMPLE, groups, replaced, sources
from lsp_jax.config import TrainConfig
from lsp_jax.core import processes, runtime
from lsp_jax.core.stage import first_checked, named
from lsp_jax.learn.update import TrainState
from lsp_jax.model import llama
from lsp_jax.model.sharding import load_to_device, replicate
from lsp_jax.perf import roofline
from lsp_jax.play.prompt_data import data_queries
from lsp_jax.play.selfplay import Episode
from lsp_jax.reporting.transcripts import records, token_texts
from lsp_jax.reward import scoring
from lsp_jax.reward.base import EpisodeTexts, RewardOutput, episode_texts
from lsp_jax.training.run import Run


class Phases:
    """Seconds of each phase of one iteration; a phase ends when its arrays are there."""

    def __init__(self, begins: Callable[[str], None] = lambda _: None) -> None:
        """`begins` is told the name of each phase that begins."""
        self.seconds: dict[str, float] = {}
        self.start: float = time.perf_counter()
        """When the iteration began, on the clock of `time.perf_counter`."""
        self._begins = begins

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._begins(name)
        start = time.perf_counter()
        with named(f"phase {name}"):
            yield
        self.took(name, start)

    def took(self, name: str, start: float) -> None:
        """From `start` until now; what is waited for later may have run beside another phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class StepContext:
    """What the host decides of one iteration; nothing of it is static, so no value of it compiles anything."""

    iteration: int
    """1 for the first."""
    data_cursor: int = 0
    """Prompts of the data set taken so far."""
    challenger_weight: float = 1.0
    """Factor of the Challenger's loss, traced as a float32 scalar; 0 while the Challenger is paused."""
    sync_point: Callable[[str], None] = processes.barrier
    """Called with a name by all processes together at some places between phases, the last one before the update,
    which consumes the state: what it raises leaves the state as it was."""
    timer: Phases = field(default_factory=Phases)
    """Takes the seconds of each phase."""


class StepResult(NamedTuple):
    """One iteration's results, still on device."""

    state: TrainState
    episode: Episode
    learnable: ScoredBatch
    metrics: dict[str, jax.Array]
    texts: EpisodeTexts | None
    """Decoded already, when a host reward needed them and there is one process."""
    rollout_param_bytes: int
    """Bytes, on one device, of the parameters that played."""
    prompts_consumed: int
    """Prompts of the data set that were taken."""


def train_step(run: Run, state: TrainState, ctx: StepContext) -> StepResult:
    """One iteration's stages in order; the update consumes `state`."""
    game, phases, cursor, sync_point = run.game, ctx.timer, ctx.data_cursor, ctx.sync_point
    sync_point("iteration")  # a process that is late is named here, not waited for in a collective
    key = stages.iteration_key(run.seed_key, state)
    with phases("weight_sync"):
        params = jax.block_until_ready(stages.rollout_params(state.params, game, run.reference))
    rollout_param_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    episode, rows = _play(run, params, key, cursor, phases)
    sync_point("reward")
    prompts_consumed, outputs, texts, seen = game.play.num_queries, None, None, {}
    if game.play.max_resamples:
        episode, outputs, prompts_consumed, seen = _resampled(run, params, key, cursor, phases, episode, rows)
    del params
    if outputs is None:
        with phases("reward"):
            scored = scoring.score_compiled(run.rewards, episode)
            texts = scoring.texts_to_score(run.rewards, run.policy.tokenizer, episode, rows)
            jax.block_until_ready(scored)  # a parked reward model has gone before the reference comes
    begun = time.perf_counter()
    played = first_checked(stages.rows_without_rewards, episode, game)
    reference = load_to_device(run.reference)
    references = first_checked(stages.reference, reference, played, game)
    del played
    if outputs is None:
        if texts is not None:  # on this machine's processors, beside the reference on the device
            with phases("reward"):
                scored |= scoring.score_texts(run.rewards, texts)
        outputs = tuple(scored[reward.name] for reward in run.rewards)
    with named("phase reference"):
        references = jax.block_until_ready(references)
    phases.took("reference", begun)
    if not game.needs_base:
        reference = {}  # its log-probabilities are all that the update needs
    with phases("reward"):
        memory, nearest_similarity_N, novelty = stages.novelty_metrics(state, episode, references, game)
        weight = replicate(np.float32(ctx.challenger_weight))
        arguments = episode, outputs, run.specs, game, weight, nearest_similarity_N
        learnable = jax.block_until_ready(first_checked(stages.learn_batch, *arguments))
    sync_point("update")
    with phases("update"):
        state = state._replace(memory=memory)
        state, metrics = jax.block_until_ready(stages.learn(state, reference, learnable.batch, references, game))
    whole = texts if processes.number() == 1 else None
    metrics = learnable.metrics | novelty | metrics | seen
    return StepResult(state, episode, learnable, metrics, whole, rollout_param_bytes, prompts_consumed)


def _play(
    run: Run, params: llama.Params, key: jax.Array, cursor: int, phases: Phases
) -> tuple[Episode, list[Mapping[str, Any]]]:
    """One play, and the rows of the data set behind its queries."""
    game, rows = run.game, []
    with phases("challenge"):
        if run.data is None:
            queries = jax.block_until_ready(rollout.challenge(params, run.token_classes, key, game))
        else:
            picked = run.data.batch(cursor, game.play.num_queries, run.config.seed)
            queries, rows = data_queries(run.data, picked), [run.data.rows[index] for index in picked]
    with phases("solve"):
        return jax.block_until_ready(rollout.solve(params, queries, key, game)), rows


def _resampled(
    run: Run,
    params: llama.Params,
    key: jax.Array,
    cursor: int,
    phases: Phases,
    episode: Episode,
    rows: Sequence[Mapping[str, Any]],
) -> tuple[Episode, tuple[RewardOutput, ...], int, dict[str, jax.Array]]:
    """The play with queries that teach nothing replaced (`algorithm/resampling.py`), its scores, the prompts taken of
    the data set, and metrics: the fraction of queries that were replaced, and the tokens of all plays."""
    play, static = run.game.play, (run.specs, run.game.loss.use_quality)
    with phases("reward"):
        outputs = scoring.score(run.rewards, run.policy.tokenizer, episode, rows)
    changed = np.zeros(play.num_queries, bool)
    prompts_consumed, tokens = play.num_queries, tokens_of(episode)
    for number in range(play.max_resamples):
        flat, _ = runtime.to_host(first_checked(groups, episode, outputs, *static))
        if not flat.any():
            break
        more, fresh_rows = _play(
            run, params, jax.random.fold_in(key, RESAMPLE + number), cursor + prompts_consumed, phases
        )
        prompts_consumed, tokens = prompts_consumed + play.num_queries, tokens + tokens_of(more)
        with phases("reward"):
            fresh = scoring.score(run.rewards, run.policy.tokenizer, more, fresh_rows)
            _, differ = runtime.to_host(first_checked(groups, more, fresh, *static))
            source = sources(flat, differ)
            episode, outputs = first_checked(replaced, (episode, outputs), (more, fresh), replicate(source))
        changed |= source >= 0
    seen = {"resampled_fraction": replicate(np.float32(changed.mean())), "completions/tokens": tokens}
    return episode, outputs, prompts_consumed, seen


def precompile(run: Run, state: TrainState) -> None:
    """Compiles all that decoding may need in this run; what else an iteration runs is of one shape, and compiles in
    the first one."""
    params = stages.rollout_params(state.params, run.game, run.reference)
    key = stages.iteration_key(run.seed_key, state)
    if run.data is None:
        queries = rollout.challenge(params, run.token_classes, key, run.game)
    else:
        queries = data_queries(run.data, run.data.batch(0, run.game.play.num_queries, run.config.seed))
    rollout.precompile(params, queries, key, run.game)


def numbers_and_lines(run: Run, number: int, played: StepResult) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of iteration `number` and its records, with one read from the device (texts may take another).

    The answers to the first query have their tokens, too, each with the log-probability it was sampled at. With several
    processes only process 0 gets records.
    """
    shown = None if processes.is_writer() else range(0)
    texts = played.texts or episode_texts(played.episode, run.policy.tokenizer, queries=shown)
    learned = played.learnable.advantages, played.learnable.scores, played.episode.answers.stopped
    values, learned, group = runtime.to_host((played.metrics, learned, _first_group(played.episode)))
    lines = records(number, texts, *learned)
    if lines:
        for answer, ids, length, logprobs in zip(lines[0]["answers"], *group, strict=True):
            answer["tokens"] = token_texts(run.policy.tokenizer, ids[:length].tolist(), logprobs[:length].tolist())
    return {name: float(value) for name, value in values.items()}, lines


@jax.jit
def _first_group(episode: Episode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The answers to the first query: ids [G, T], lengths [G] without stop tokens, log-probabilities [G, T]."""
    return episode.answers.tokens[0], episode.answer_lengths[0], episode.answers.logprobs[0]


def host_metrics(run: Run, number: int, played: dict[str, float], phases: Phases, seconds: float) -> dict[str, float]:
    """Of iteration `number` that took `seconds`, whose metrics from the device are `played`."""
    metrics = {f"time/{name}": prompts_consumed for name, prompts_consumed in phases.seconds.items()}
    metrics["time/iteration"] = seconds
    metrics["tokens_per_second"] = played["completions/tokens"] / (
        phases.seconds["challenge"] + phases.seconds["solve"]
    )
    metrics |= roofline.shares(run.game, played | metrics, jax.devices())
    metrics["learning_rate"] = _learning_rate(run.config, number, played)
    metrics["compile/count"], metrics["compile/seconds"] = runtime.compiles()
    return metrics


def _learning_rate(config: TrainConfig, number: int, metrics: dict[str, float]) -> float:
    """The step size of this iteration's last update: warm-up counts updates made, not iterations."""
    made = number * config.loss.num_iterations - metrics["skipped_updates"]
    return config.optimizer.learning_rate * min(1.0, made / max(config.optimizer.warmup_steps, 1))
