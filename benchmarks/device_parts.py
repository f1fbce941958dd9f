"""The parts of `device_check.py`, which says what they measure: each a function from a shape to its figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.spec import GameSpec, hyperparameters
from lsp_jax.config import TrainConfig
from lsp_jax.core.stage import Backend
from lsp_jax.learn import update as learner
from lsp_jax.learn.batch import LearnBatch, Reference, References, Rows
from lsp_jax.learn.logprobs import token_statistics
from lsp_jax.learn.optimizer import OptimizerConfig, TrainState, init_state
from lsp_jax.learn.spec import Hyperparameters, OptimizerSpec
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.perf import placeholders
from lsp_jax.play.selfplay import Episode, PlayConfig, Queries
from lsp_jax.reward import scoring
from lsp_jax.reward.base import DeviceReward, RewardOutput, RewardSpec
from lsp_jax.reward.preference import preference_scores
from lsp_jax.reward.quality import logits_scores
from lsp_jax.text.prompts import ids_row

# Twice what bfloat16 on the CPU itself differs by at 8 layers: 0.021 and 0.025 of the logits, 0.015 and 0.024 nats, for
# the 1B and 3B shapes.
LOGITS_TOLERANCE = 0.05  # ||difference|| over ||logits - their mean||
LOGPROB_TOLERANCE = 0.05  # nats, mean over tokens
Result = dict[str, Any]


class Sizes(NamedTuple):
    """How large everything is."""

    gemm: int
    stream: int
    play: PlayConfig
    decode: PlayConfig
    rows: tuple[int, int, int]
    """Of the update: rows, tokens a row, completion tokens a row."""
    parity: tuple[int, int, int]
    """Layers, rows, tokens."""


FULL = Sizes(8192, 2**28, PlayConfig(8, 8, 256, 512), PlayConfig(16, 8, 64, 256), (64, 768, 512), (8, 2, 128))
SMALL = Sizes(128, 2**14, PlayConfig(2, 2, 4, 6), PlayConfig(2, 4, 4, 6), (4, 12, 6), (1, 2, 16))
TINY = LlamaConfig(512, 32, 64, 1, 4, 2, 8, tie_word_embeddings=True, initializer_range=0.2)


# --- the game without a tokenizer ----------------------------------------------------------------------------------


def make_config(play: PlayConfig, micro_batch: int) -> TrainConfig:
    """A run of these sizes, with prompts as long as the package's own."""
    return TrainConfig(play=play, optimizer=OptimizerConfig(micro_batch_size=micro_batch), compute_dtype="bfloat16")


def make_game(model: LlamaConfig, config: TrainConfig) -> GameSpec:
    """The game as `lsp-jax plan` compiles it, without a stop token."""
    game = placeholders.game(config, model)
    endless = {name: replace(getattr(game, name), stop_ids=()) for name in ("challenger", "solver")}
    return replace(game, **endless)


@partial(jax.jit, static_argnames=("model", "dtype"))
def random_params(model: LlamaConfig, seed: int, dtype: str) -> llama.Params:
    """Made on the device."""
    return llama.cast(llama.init_params(model, jax.random.key(seed)), dtype)


@partial(jax.jit, static_argnames=("model", "spec"))
def random_state(model: LlamaConfig, spec: OptimizerSpec) -> TrainState:
    """float32 parameters and moments."""
    return init_state(llama.init_params(model, jax.random.key(0)), spec)


def make_rewards(reference: llama.Params, game: GameSpec, config: TrainConfig) -> tuple[DeviceReward, ...]:
    """A reward model of the policy's shape, and the reference as judge by `logits`."""
    model, token_classes = game.model, jnp.zeros(game.model.vocab_size, jnp.uint8)
    scorer = replace(model, head="score", tie_word_embeddings=False)
    scores = partial(
        preference_scores,
        config=scorer,
        template=placeholders.preference_template(),
        blank=placeholders.BLANK,
        rows=config.reward.preference_rows,
    )
    judge = placeholders.judge(config, model)
    _, rubric = jax.jit(llama.extend, static_argnums=1)(reference, model, *ids_row(judge.template.rubric_ids))
    unread = {"token_classes": token_classes, "tags": placeholders.NO_TAGS}
    judged = {"reference": reference, "rubric": rubric, **unread}
    scored = {"model": random_params(scorer, 1, "bfloat16"), **unread}
    return (
        DeviceReward("preference", "task", 1.0, scores, scored),
        DeviceReward("quality", "quality", 1.0, partial(logits_scores, judge=judge), judged),
    )


# --- what is counted -----------------------------------------------------------------------------------------------


def layer_weights(model: LlamaConfig) -> int:
    """Entries of one layer's matrices."""
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    return model.hidden_size * (heads + 3 * model.intermediate_size)


def update_flops(model: LlamaConfig, rows: int, width: int, completion: int) -> int:
    """Useful operations of forward and backward, as `device_check.py` counts them."""
    layers, attention = model.num_hidden_layers, model.num_attention_heads * model.head_dim
    weights = 6 * layers * layer_weights(model) * width + 6 * model.vocab_size * model.hidden_size * completion
    return rows * (weights + 6 * layers * attention * width**2)


def decode_bytes(model: LlamaConfig, play: PlayConfig, prompt: int) -> float:
    """Bytes that one step must read, on average over the steps, in bfloat16; `prompt` tokens stand before a row."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(llama.params_shape(model)))
    if not model.tie_word_embeddings:
        parameters -= model.vocab_size * model.hidden_size  # a few of its rows are read
    column = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    rows = play.num_queries * play.num_generations
    return 2.0 * (parameters + column * (play.num_queries * prompt + rows * play.max_completion_length / 2))


def seconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, the best of three times `calls` calls after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = [call() for _ in range(calls)][-1]
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


# --- the parts -----------------------------------------------------------------------------------------------------


def ceilings(sizes: Sizes) -> Result:
    """Operations a second of a matrix product, bytes a second of a triad."""
    keys = jax.random.split(jax.random.key(0), 4)
    left, right = (jax.random.normal(key, (sizes.gemm, sizes.gemm), jnp.bfloat16) for key in keys[:2])
    product = jax.jit(jnp.matmul)
    flops = 2 * sizes.gemm**3 / seconds(lambda: product(left, right), 4)
    one, other = (jax.random.uniform(key, (sizes.stream,)) for key in keys[2:])
    triad = jax.jit(lambda b, c: b + 3.0 * c)
    bandwidth = 3 * one.nbytes / seconds(lambda: triad(one, other), 4)
    return {"gemm_tflops": flops / 1e12, "bandwidth_gbytes": bandwidth / 1e9}


@dataclass(frozen=True)
class RandomSource:
    """The Challenger's queries, every one taken as valid, and compiled rewards, each timed by itself."""

    rewards: tuple[DeviceReward, ...]
    game: GameSpec

    @property
    def specs(self) -> tuple[RewardSpec, ...]:
        """How the rewards are mixed."""
        return tuple(RewardSpec(reward.name, reward.kind, reward.weight) for reward in self.rewards)

    def queries(self, on: Backend, params: llama.Params, key: jax.Array) -> Queries:
        """As `stages.Source.queries`."""
        queries = rollout.challenge(params, self.rewards[0].params["token_classes"], key, self.game, on)
        return queries._replace(valid=jnp.ones_like(queries.valid))

    def score(
        self, on: Backend, params: llama.Params, key: jax.Array, episode: Episode
    ) -> tuple[Episode, Callable[[], tuple[RewardOutput, ...]]]:
        """As `stages.Source.score`."""
        outputs = []
        for reward in self.rewards:
            with on.phase(reward.name):
                outputs.append(on.ready(scoring.score_episode(reward, episode)))
        return episode, lambda: tuple(outputs)


@dataclass(frozen=True)
class Timed:
    """Seconds of each phase; an error that passes is told its phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Entered around a phase."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"(in {name})")
            raise
        self.seconds[name] = time.perf_counter() - start


def play_once(
    state: TrainState, reference: llama.Params, source: RandomSource, hyper: Hyperparameters
) -> tuple[TrainState, Result, dict[str, float]]:
    """One iteration as the trainer runs it; seconds of each phase."""
    timed = Timed()
    on = Backend(phase=timed.phase, ready=jax.block_until_ready)
    inputs = jax.random.key(0), hyper, jnp.float32(1)
    result = stages.iteration(on, source, state, reference, inputs, source.game)
    named = ("loss", "grad_norm", "skipped_updates", "sampling/token_mult_prob_error")
    return result.state, {name: float(result.metrics[name]) for name in named}, timed.seconds


def peak() -> int | None:
    """Most bytes in use at one time since the process began; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def whole_iteration(model: LlamaConfig, micro_batch: int, sizes: Sizes) -> Result:
    """The second of two iterations, and the peak of memory."""
    before = peak()
    config = make_config(sizes.play, micro_batch)
    game = make_game(model, config)
    state, hyper = random_state(model, game.learner.optimizer), hyperparameters(config)
    reference = stages.rollout_params(state.params, game, {})  # bfloat16, so a copy
    source = RandomSource(make_rewards(reference, game, config), game)
    state, _, first = play_once(state, reference, source, hyper)
    state, metrics, phases = play_once(state, reference, source, hyper)
    if metrics["skipped_updates"] or not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        raise FloatingPointError(f"the update was not finite: {metrics}")
    after = peak()
    return {
        "seconds": sum(phases.values()),
        "phases": phases,
        "first_seconds": sum(first.values()),
        "peak_gib": None if after is None else after / 2**30,
        "peak_is_of_this_part": None if after is None or before is None else after > before,
        "micro_batch": micro_batch,
        "metrics": metrics,
    }


def update(model: LlamaConfig, micro_batch: int, sizes: Sizes, top: Result) -> Result:
    """The update alone, on rows with random tokens and advantages."""
    rows, width, completion = sizes.rows
    config = make_config(sizes.play, micro_batch)
    spec, hyper = make_game(model, config).learner, hyperparameters(config)
    tokens, noise, drawn = jax.random.split(jax.random.key(2), 3)
    logprobs = -8 - jax.random.uniform(drawn, (rows, completion))
    lengths = jnp.full(rows, completion, jnp.int32)
    batch = LearnBatch(
        Rows(
            tokens=jax.random.randint(tokens, (rows, width), 3, model.vocab_size),
            prompt_lengths=width - lengths,
            completion_lengths=lengths,
            behaviour_logprobs=logprobs,
            log_mass=jnp.zeros_like(logprobs),
            advantages=jax.random.normal(noise, (rows,)),
            weights=jnp.full(rows, 1 / rows),
        ),
        None,
    )
    state, references, times = random_state(model, spec.optimizer), References(Reference(logprobs)), []
    for _ in range(3):  # the first compiles
        start = time.perf_counter()
        state, _ = jax.block_until_ready(learner.update(state, batch, references, hyper, spec=spec))
        times.append(time.perf_counter() - start)
    flops = update_flops(model, rows, width, completion) / 1e12
    taken = min(times[1:])
    return {
        "seconds": taken,
        "tokens_per_second": rows * width / taken,
        "useful_tflop": flops,
        "useful_tflops": flops / taken,
        "share_of_gemm": flops / taken / top["gemm_tflops"],
        "micro_batch": micro_batch,
    }


def decode(model: LlamaConfig, sizes: Sizes, top: Result) -> Result:
    """The `solve` stage at forced length: tokens a second, and bytes a second against the triad's."""
    play = sizes.decode
    game = make_game(model, make_config(play, 1))
    params = random_params(model, 0, "bfloat16")
    shape = (play.num_queries, play.max_query_length)
    text = (jax.random.randint(jax.random.key(3), shape, 3, model.vocab_size), jnp.full(shape[0], shape[1], jnp.int32))
    queries = Queries(None, text, jnp.ones(shape[0], bool))
    taken = seconds(lambda: rollout.solve(params, queries, jax.random.key(4), game).answers.tokens, 1)
    solver = game.prompts.solver
    step = decode_bytes(model, play, len(solver.prefix_ids) + len(solver.suffix_ids) + shape[1])
    rows, columns = play.num_queries * play.num_generations, play.max_completion_length
    return {
        "rows": rows,
        "tokens_per_second": rows * columns / taken,
        "milliseconds_per_step": 1e3 * taken / columns,
        "gbytes_per_step": step / 1e9,
        "share_of_bandwidth": step * (columns - 1) / taken / 1e9 / top["bandwidth_gbytes"],
    }


def parity(model: LlamaConfig, sizes: Sizes) -> Result:
    """Logits and log-probabilities of this device in bfloat16 against the CPU in float32."""
    layers, rows, length = sizes.parity
    model = replace(model, num_hidden_layers=layers)
    exact = random_params(model, 0, "float32")
    tokens = jax.random.randint(jax.random.key(5), (rows, length), 3, model.vocab_size)

    def run(params: llama.Params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = llama.hidden_states(params, model, tokens)
        stats = token_statistics(params, model, hidden[:, :-1], tokens[:, 1:], 1.0, 512)
        return llama.logits(params, model, hidden), stats.logprobs

    logits, logprobs = map(np.asarray, jax.jit(run)(llama.cast(exact, "bfloat16"), tokens))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):  # the kernel is chosen by the default device
        arguments = jax.device_put((exact, tokens), cpu)
        true_logits, true_logprobs = map(np.asarray, jax.jit(lambda *given: run(*given))(*arguments))
    spread = np.linalg.norm(true_logits - true_logits.mean(axis=-1, keepdims=True))
    error = float(np.linalg.norm(logits - true_logits) / spread)
    differences = np.abs(logprobs - true_logprobs)
    mean = float(differences.mean())
    return {
        "layers": layers,
        "logits_relative_error": error,
        "logits_tolerance": LOGITS_TOLERANCE,
        "logprob_mean_difference": mean,
        "logprob_tolerance": LOGPROB_TOLERANCE,
        "logprob_largest_difference": float(differences.max()),
        "within": error <= LOGITS_TOLERANCE and mean <= LOGPROB_TOLERANCE,
    }
