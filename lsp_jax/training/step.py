"""One iteration: its stages in order, timed, with host rewards in between.

All results are computed by the jitted stages of `algorithm/stages.py`. With compiled rewards the only device reads are
the numbers of unfinished rows between chunks of long completions. While the host scores, the device runs the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
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
from lsp_jax.core.stage import Backend, named
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model import llama
from lsp_jax.model.sharding import load_to_device, replicate
from lsp_jax.perf import roofline
from lsp_jax.play.prompt_data import data_queries
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reporting.transcripts import records, token_texts
from lsp_jax.reward import scoring
from lsp_jax.reward.base import EpisodeTexts, RewardOutput, RewardSpec, episode_texts
from lsp_jax.training.run import Run


class Phases:
    """Seconds of each phase of an iteration; a phase ends when its arrays are computed."""

    def __init__(self, begins: Callable[[str], None] = lambda _: None) -> None:
        """`begins` is called with the name of each phase at its start."""
        self.seconds: dict[str, float] = {}
        self.start: float = time.perf_counter()
        """Start of the iteration, from `time.perf_counter`."""
        self._begins = begins

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._begins(name)
        start = time.perf_counter()
        with named(f"phase {name}"):
            yield
        self.took(name, start)

    def took(self, name: str, start: float) -> None:
        """Adds the time since `start`; the phase may have overlapped with others."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class StepContext:
    """Decisions of the host for one iteration; none is static, so that none causes a recompilation."""

    iteration: int
    """1 for the first."""
    data_cursor: int = 0
    """Prompts of the data set consumed so far."""
    challenger_weight: float = 1.0
    """Factor of the Challenger's loss, traced as a float32 scalar; 0 while the Challenger is paused."""
    sync_point: Callable[[str], None] = processes.barrier
    """Called with a name by all processes together between some phases, the last time before the update, which donates
    the state: an exception raised here leaves the state intact."""
    timer: Phases = field(default_factory=Phases)
    """Records the seconds of each phase."""


class StepResult(NamedTuple):
    """One iteration's results, still on device."""

    state: TrainState
    episode: Episode
    learnable: ScoredBatch
    metrics: dict[str, jax.Array]
    texts: EpisodeTexts | None
    """Decoded texts, if a host reward needed them and there is one process."""
    rollout_param_bytes: int
    """Bytes of the rollout parameters on one device."""
    prompts_consumed: int
    """Prompts of the data set consumed by this iteration."""


def train_step(run: Run, state: TrainState, ctx: StepContext) -> StepResult:
    """Runs and times one iteration (`stages.iteration`); `state` is donated."""
    backend = Backend(phase=ctx.timer, ready=jax.block_until_ready, sync=ctx.sync_point, load=load_to_device)
    source = RunSource(run, ctx.data_cursor)
    inputs = run.seed_key, run.hyper, replicate(np.float32(ctx.challenger_weight))
    result = stages.iteration(backend, source, state, run.reference, inputs, run.game)
    texts = source.texts if processes.number() == 1 else None
    metrics = result.metrics | source.metrics
    return StepResult(
        result.state, result.episode, result.learnable, metrics, texts, source.rollout_param_bytes, source.consumed
    )


class RunSource:
    """Queries of an iteration, from the Challenger or the run's data set, and its rewards: compiled ones run at once,
    host rewards while the devices run the reference."""

    def __init__(self, run: Run, cursor: int) -> None:
        """`cursor` is the number of prompts of the data set consumed so far."""
        self._run, self._cursor = run, cursor
        self._rows: list[Mapping[str, Any]] = []
        self.specs: tuple[RewardSpec, ...] = run.specs
        self.consumed: int = 0
        """Prompts of the data set consumed by this iteration."""
        self.texts: EpisodeTexts | None = None
        """Decoded texts of the episode, if a reward needed them."""
        self.metrics: dict[str, jax.Array] = {}
        self.rollout_param_bytes: int = 0
        """Bytes of the rollout parameters on one device."""

    def queries(self, on: Backend, params: llama.Params, key: jax.Array) -> Queries:
        """N queries, sampled or the next ones of the data set, whose rows are kept for the rewards."""
        run, number = self._run, self._run.game.num_queries
        self.rollout_param_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
        position = self._cursor + self.consumed
        self.consumed += number
        if run.data is None:
            return rollout.challenge(params, run.token_classes, key, run.game, on)
        picked = run.data.batch(position, number, run.config.seed)
        self._rows = [run.data.rows[index] for index in picked]
        return data_queries(run.data, picked)

    def score(
        self, on: Backend, params: llama.Params, key: jax.Array, episode: Episode
    ) -> tuple[Episode, Callable[[], tuple[RewardOutput, ...]]]:
        """As `Source.score`; with `play.max_resamples` the scores are complete when this returns."""
        run = self._run
        if run.config.play.max_resamples:
            episode, outputs = self._resampled(on, params, key, episode)
            return episode, lambda: outputs
        with on.phase("reward"):
            scored = scoring.score_compiled(run.rewards, episode)
            self.texts = texts = scoring.texts_to_score(run.rewards, run.policy.tokenizer, episode, self._rows)
            on.ready(scored)  # an offloaded reward model leaves the devices before the reference is loaded

        def finish() -> tuple[RewardOutput, ...]:
            outputs = dict(scored)
            if texts is not None:
                with on.phase("reward"):
                    outputs |= scoring.score_texts(run.rewards, texts)
            return tuple(outputs[reward.name] for reward in run.rewards)

        return episode, finish

    def _resampled(
        self, on: Backend, params: llama.Params, key: jax.Array, episode: Episode
    ) -> tuple[Episode, tuple[RewardOutput, ...]]:
        """Resamples queries without a gradient (`algorithm/resampling.py`); returns the episode and its scores.

        Sets the metrics: the fraction of replaced queries, and the tokens of all rollouts.
        """
        run = self._run
        use_quality = run.game.learner.loss.use_quality
        with on.phase("reward"):
            outputs = scoring.score(run.rewards, run.policy.tokenizer, episode, self._rows)
        changed_N, tokens = np.zeros(run.game.num_queries, bool), tokens_of(episode)
        for number in range(run.config.play.max_resamples):
            flat_N, _ = runtime.to_host(on.call(groups, episode, outputs, run.specs, use_quality=use_quality))
            if not flat_N.any():
                break
            fresh_key = jax.random.fold_in(key, RESAMPLE + number)
            with on.phase("challenge"):
                queries = on.ready(self.queries(on, params, fresh_key))
            with on.phase("solve"):
                more = on.ready(rollout.solve(params, queries, fresh_key, run.game, on))
            tokens = tokens + tokens_of(more)
            with on.phase("reward"):
                fresh = scoring.score(run.rewards, run.policy.tokenizer, more, self._rows)
                _, differ_N = runtime.to_host(on.call(groups, more, fresh, run.specs, use_quality=use_quality))
                source_N = sources(flat_N, differ_N)
                episode, outputs = on.call(replaced, (episode, outputs), (more, fresh), replicate(source_N))
            changed_N |= source_N >= 0
        self.metrics = {
            "resampled_fraction": replicate(np.float32(changed_N.mean())),
            "completions/tokens": tokens,
        }
        return episode, outputs


def precompile(run: Run, state: TrainState) -> None:
    """Compiles all programs that decoding may need in this run; the other stages have fixed shapes and compile in the
    first iteration."""
    params = stages.rollout_params(state.params, run.game, run.reference)
    key = stages.iteration_key(run.seed_key, state.iteration, state.attempt)
    if run.data is None:
        queries = rollout.challenge(params, run.token_classes, key, run.game)
    else:
        queries = data_queries(run.data, run.data.batch(0, run.game.num_queries, run.config.seed))
    rollout.precompile(params, queries, key, run.game)


def numbers_and_lines(run: Run, number: int, played: StepResult) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Returns metrics and transcript records of iteration `number`, with one device read (and one more for texts).

    Answers to the first query include their tokens with the sampler's log-probabilities. With several processes only
    process 0 gets records.
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
    """Answers to the first query: ids [G, T], lengths [G] without stop tokens, log-probabilities [G, T]."""
    return episode.answers.tokens[0], episode.answer_lengths[0], episode.answers.logprobs[0]


def host_metrics(run: Run, number: int, played: dict[str, float], phases: Phases, seconds: float) -> dict[str, float]:
    """Host metrics of iteration `number`, which took `seconds` and has the device metrics `played`."""
    metrics = {f"time/{name}": taken for name, taken in phases.seconds.items()}
    metrics["time/iteration"] = seconds
    metrics["tokens_per_second"] = played["completions/tokens"] / (
        phases.seconds["challenge"] + phases.seconds["solve"]
    )
    metrics |= roofline.shares(run.game, played | metrics, jax.devices())
    metrics["learning_rate"] = _learning_rate(run.config, number, played)
    metrics["compile/count"], metrics["compile/seconds"] = runtime.compiles()
    return metrics


def _learning_rate(config: TrainConfig, number: int, metrics: dict[str, float]) -> float:
    """Learning rate of this iteration's last update; warm-up counts applied updates, not iterations."""
    made = number * config.loss.num_iterations - metrics["skipped_updates"]
    return config.optimizer.learning_rate * min(1.0, made / max(config.optimizer.warmup_steps, 1))
