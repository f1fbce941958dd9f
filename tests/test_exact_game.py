"""An exact game: on five tokens the joint LSP gradient is enumerated and compared with the mean of sampled gradients.

The sampled side is the real code path, stage by stage as in `algorithm/stages.py`, over thousands of iterations. The
exact side knows nothing of it: every query and every answer is listed, its probability comes from plain
`llama.forward` calls on whole sequences, and jax differentiates the objective as the paper writes it, with the
factors 1 - 1/G and 1 - 1/N of baselines that include the sample itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.learner_batch import learn_batch
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.learn.update import gradients, reference_logprobs
from lsp_jax.model import llama
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import Episode, PlayConfig
from lsp_jax.reward import scoring
from lsp_jax.reward.base import DeviceReward, RewardOutput, RewardSpec
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate
from lsp_jax.text.tokenizer import BLANK, SPECIAL, TEXT
from specs import game_spec
from tiny import tiny_config, tiny_params

STOP, A, B, SPACE, TAG = range(5)
pytestmark = pytest.mark.full
QUICK_COMPILES = True  # the time goes into compiling, not into arithmetic

KINDS = np.array([SPECIAL, TEXT, TEXT, BLANK, SPECIAL], np.uint8)
SPELLED_TAG = (B, A)  # a template tag in ordinary tokens
PROMPTS = PlayPrompts(
    challenger_ids=(TAG, B, SPACE, A),
    query_prefix_ids=(A,),
    solver=TokenTemplate(prefix_ids=(TAG, SPACE), suffix_ids=(TAG,)),
    tags=(SPELLED_TAG,),
)
MODEL = tiny_config(
    vocab_size=5,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    initializer_range=0.5,
)
PLAY = PlayConfig(num_queries=3, num_generations=4, max_query_length=3, max_completion_length=2)
TASK_WEIGHT, QUALITY_WEIGHT = 1.5, 0.5
DRAWS = 8192  # sampled gradients
BOUND = 5.0  # of |z|, over some 500 parameters and 4 directions: passed by chance once in 3000 such tests


class Tables(NamedTuple):
    """The rewards of every (query, answer), by their codes; NaN says that an answer cannot be scored."""

    task: np.ndarray
    quality: np.ndarray
    on_task: np.ndarray
    """bool [query codes]: whether the query is one of the task."""


def make_tables(masked: bool) -> Tables:
    rng = np.random.default_rng(7)
    shape = (MODEL.vocab_size**PLAY.max_query_length, MODEL.vocab_size**PLAY.max_completion_length)
    task, quality, on_task = rng.normal(0.5, 2.0, shape), rng.normal(0.0, 2.0, shape), np.ones(shape[0], bool)
    if masked:
        task[rng.random(shape) < 0.4] = np.nan
        on_task[rng.random(shape[0]) < 0.3] = False
    return Tables(task.astype(np.float32), quality.astype(np.float32), on_task)


@dataclass(frozen=True)
class Setting:
    """One game; `masked` has answers that cannot be scored and queries off the task."""

    loss: LossConfig = field(default_factory=lambda: LossConfig(beta=0.3, alpha_challenger=0.7))
    solver: SamplingConfig = field(default_factory=SamplingConfig)
    challenger: SamplingConfig = field(default_factory=SamplingConfig)
    masked: bool = False

    @property
    def game(self) -> tuple[GameSpec, Hyperparameters]:
        return game_spec(
            MODEL,
            PROMPTS,
            (STOP,),
            play=PLAY,
            sampling=self.solver,
            challenger_sampling=self.challenger,
            loss=self.loss,
            optimizer=OptimizerConfig(micro_batch_size=8, logprob_chunk=16, remat="none"),
        )


LSP = Setting()
LSP_ZERO = Setting(replace(LSP.loss, use_quality=False))
TEMPERED = Setting(solver=SamplingConfig(temperature=0.7), challenger=SamplingConfig(temperature=1.4))


@cache
def policy() -> llama.Params:
    return tiny_params(MODEL, seed=136)  # 40 % of its queries valid, 32 % blank, 19 % cut off, 10 % with a tag


@cache
def reference_policy() -> llama.Params:
    """Near enough to the policy that the KL is a moderate number, far enough that it matters."""
    other = tiny_params(MODEL, seed=4)
    return jax.tree.map(lambda x, y: x + 0.4 * (y - x), policy(), other)


# --- the sampled side: the stages of `algorithm/stages.py` ------------------------------------------------------------


def code(tokens: jax.Array) -> jax.Array:
    """A number for each completion; what follows the end is 0, as is the stop token."""
    powers = jnp.asarray(MODEL.vocab_size ** np.arange(tokens.shape[-1]), jnp.int32)
    return tokens @ powers


def score(kind: str, tables: Any, episode: Episode) -> RewardOutput:
    query, answer = code(episode.queries.sampled.tokens), code(episode.answers.tokens)
    values = tables[kind][query[:, None], answer]
    return RewardOutput(values, jnp.ones(values.shape, bool), tables["on_task"][query])


REWARDS = (
    DeviceReward("task", "task", TASK_WEIGHT, partial(score, "task")),
    DeviceReward("quality", "quality", QUALITY_WEIGHT, partial(score, "quality")),
)
SPECS = tuple(RewardSpec(reward.name, reward.kind, reward.weight) for reward in REWARDS)


def batched(one: Any, xs: Any) -> Any:
    """`one` of each element of `xs`, on the host; 512 at a time so that memory stays small."""
    return jax.device_get(jax.jit(lambda xs: jax.lax.map(one, xs, batch_size=512))(xs))


@cache
def episodes(solver: SamplingConfig, challenger: SamplingConfig) -> Episode:
    """The play of iterations 0, 1, ...: it depends on nothing but the policy and how it samples."""
    game, _ = Setting(solver=solver, challenger=challenger).game

    def play(iteration: jax.Array) -> Episode:
        key = stages.iteration_key(jax.random.key(11), iteration, jnp.int32(0))
        params = stages.rollout_params(policy(), game, {})
        return rollout.solve(params, rollout.challenge(params, jnp.asarray(KINDS), key, game), key, game)

    return batched(play, jnp.arange(DRAWS))


@cache
def sampled(setting: Setting) -> np.ndarray:
    """Joint gradients [DRAWS, P]."""
    (game, hyper), params, reference = setting.game, policy(), reference_policy()
    tables = {name: jnp.asarray(table) for name, table in make_tables(setting.masked)._asdict().items()}

    def learn(episode: Episode) -> jax.Array:
        outputs = tuple(scoring.score_component(tables, episode, score=reward.score) for reward in REWARDS)
        batch = learn_batch(episode, outputs, SPECS, hyper, game=game).batch
        references = reference_logprobs(reference, batch, game.learner)._replace(params=reference)
        return ravel_pytree(gradients(params, batch, references, hyper, game.learner)[0])[0]

    return batched(learn, episodes(setting.solver, setting.challenger))


# --- the exact side: enumeration -----------------------------------------------------------------------------------


def completions(longest: int) -> list[tuple[int, ...]]:
    """All that can be sampled: ended by the stop token, or cut off at `longest`."""
    others = range(1, MODEL.vocab_size)
    ended = [(*text, STOP) for length in range(longest) for text in itertools.product(others, repeat=length)]
    return ended + list(itertools.product(others, repeat=longest))


def is_valid(query: Sequence[int]) -> bool:
    """Ended by itself, with a word in it, and no template tag."""
    *text, last = query
    tagged = any(tuple(text[i : i + 2]) == SPELLED_TAG for i in range(len(text)))
    return last == STOP and (A in text or B in text) and TAG not in text and not tagged


QUERIES, ANSWERS = completions(PLAY.max_query_length), completions(PLAY.max_completion_length)
VALID = np.array([is_valid(query) for query in QUERIES])


class Sequences(NamedTuple):
    """Rows [prompt | completion], padded at the right."""

    tokens: np.ndarray
    positions: np.ndarray
    """[R, T]: where each completion token stands."""
    mask: np.ndarray
    """[R, T]."""


def sequences(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Sequences:
    width, longest = max(len(p) + len(c) for p, c in pairs), max(len(c) for _, c in pairs)
    tokens = np.zeros((len(pairs), width), np.int32)
    for row, (prompt, completion) in enumerate(pairs):
        tokens[row, : len(prompt) + len(completion)] = (*prompt, *completion)
    starts = np.array([len(prompt) for prompt, _ in pairs])
    mask = np.arange(longest)[None] < np.array([len(completion) for _, completion in pairs])[:, None]
    return Sequences(tokens, np.where(mask, starts[:, None] + np.arange(longest)[None], 1), mask)


def solver_prompt(query: tuple[int, ...]) -> tuple[int, ...]:
    return (*PROMPTS.solver.prefix_ids, *PROMPTS.query_prefix_ids, *query[:-1], *PROMPTS.solver.suffix_ids)


QUERY_ROWS = sequences([(PROMPTS.challenger_ids, query) for query in QUERIES])
ANSWER_ROWS = sequences([(solver_prompt(q), a) for q in itertools.compress(QUERIES, VALID) for a in ANSWERS])


def next_token(params: llama.Params, rows: Sequences, temperature: float | jax.Array) -> jax.Array:
    """log pi(. | prefix) [R, T, V] before each token of the completions."""
    logits = llama.forward(params, MODEL, jnp.asarray(rows.tokens))
    before = jnp.take_along_axis(logits, jnp.asarray(rows.positions - 1)[..., None], axis=1)
    return jax.nn.log_softmax(before / temperature)


def chosen(log_policy: jax.Array, rows: Sequences) -> jax.Array:
    """log pi(token | prefix) [R, T], 0 after the completion."""
    tokens = np.take_along_axis(rows.tokens, rows.positions, axis=1)
    return jnp.where(rows.mask, jnp.take_along_axis(log_policy, tokens[..., None], axis=-1)[..., 0], 0.0)


def number(completion: tuple[int, ...]) -> int:
    """As `code`."""
    return sum(token * MODEL.vocab_size**place for place, token in enumerate(completion))


def by_codes(table: np.ndarray) -> np.ndarray:
    """A reward table's entries [valid queries, answers]."""
    return np.array([[table[number(q), number(a)] for a in ANSWERS] for q in itertools.compress(QUERIES, VALID)])


TERMS = ("solver", "challenger", "solver KL", "challenger KL")


class Logs(NamedTuple):
    """log pi(. | prefix) [R, T, V] of all queries and of all answers."""

    queries: jax.Array
    answers: jax.Array


@jax.jit
def log_policies(params: llama.Params, temperatures: tuple[float, float]) -> Logs:
    """`temperatures` are the Challenger's and the Solver's."""
    return Logs(next_token(params, QUERY_ROWS, temperatures[0]), next_token(params, ANSWER_ROWS, temperatures[1]))


def paper_terms(policy: Logs, reference: Logs, setting: Setting) -> jax.Array:
    """[4]: what both players maximise and the KL they pay, so written that the gradient of each is the exact one.

    The Challenger's probabilities are constants to the Solver, and the other way round; the KL of a token is exact and
    its prefix a constant, as in the sum of per-token estimators.
    """
    stop = jax.lax.stop_gradient
    probabilities, divergences = [], []
    for rows, log_policy, log_reference in zip((QUERY_ROWS, ANSWER_ROWS), policy, reference, strict=True):
        probability = jnp.exp(jnp.sum(chosen(log_policy, rows), axis=1))
        per_prefix = {
            "k1": jnp.zeros(rows.mask.shape),
            "k2": jnp.sum(jnp.exp(log_policy) * (log_policy - log_reference), axis=-1),
            "k3": jnp.sum(jnp.exp(log_reference) * (log_reference - log_policy), axis=-1),
        }
        per_prefix["full"] = per_prefix["k2"]
        divergence = jnp.sum(jnp.where(rows.mask, per_prefix[setting.loss.kl_estimator], 0.0), axis=1)
        probabilities.append(probability)
        divergences.append(stop(probability) * divergence)
    query, answer = probabilities[0], probabilities[1].reshape(-1, len(ANSWERS))
    played = stop(query)[VALID]

    tables = make_tables(masked=False)
    task = TASK_WEIGHT * by_codes(tables.task)
    quality = QUALITY_WEIGHT * by_codes(tables.quality) * setting.loss.use_quality
    value = jnp.sum(answer * task, axis=1)
    quality_value = jnp.sum(answer * quality, axis=1)
    reward = jnp.full(len(QUERIES), setting.loss.invalid_query_penalty).at[np.flatnonzero(VALID)]
    reward = reward.set(quality_value - value)
    return jnp.stack(
        [
            jnp.sum(played * jnp.sum(answer * (task + quality), axis=1)),
            jnp.sum(query * stop(reward)),
            jnp.sum(played * jnp.sum(divergences[1].reshape(answer.shape), axis=1)),
            jnp.sum(divergences[0]),
        ]
    )


def shrunk(p: float | jax.Array, group: int) -> float | jax.Array:
    """E[1 - 1/m] of a group of `group` of which one counts and each other with probability p; 1 - 1/group at p = 1."""
    others = group - 1
    return sum(math.comb(others, k) * p**k * (1 - p) ** (others - k) * k / (k + 1) for k in range(group))


def estimator_terms(policy: Logs, reference: Logs, setting: Setting) -> jax.Array:
    """[4], as `paper_terms` but with each sample's expected weight on its log-probability, baselines included.

    It also holds where tokens are cut off in sampling (the log-probability is then the tempered one, without the kept
    mass: a biased gradient, but a defined one) and where some answers cannot be scored. KL estimator k2.
    """
    stop = jax.lax.stop_gradient
    roles = ((QUERY_ROWS, setting.challenger), (ANSWER_ROWS, setting.solver))
    drawn, logs, divergences = [], [], []
    for (rows, sampling), log_policy, log_reference in zip(roles, policy, reference, strict=True):
        rank = jnp.argsort(jnp.argsort(-log_policy, axis=-1), axis=-1)
        kept = rank < (sampling.top_k or MODEL.vocab_size)
        behaviour = jax.nn.log_softmax(jnp.where(kept, log_policy, -jnp.inf))
        taken = chosen(log_policy, rows)
        drawn.append(stop(jnp.exp(jnp.sum(chosen(behaviour, rows), axis=1))))
        logs.append(jnp.sum(taken, axis=1))
        divergences.append(jnp.sum(0.5 * (taken - chosen(log_reference, rows)) ** 2, axis=1))
    shape = (-1, len(ANSWERS))
    query, answer = drawn[0], drawn[1].reshape(shape)

    tables = make_tables(setting.masked)
    on_task = np.array([by_codes(np.broadcast_to(tables.on_task[:, None], tables.task.shape))[:, 0]])[0]
    task, quality = TASK_WEIGHT * by_codes(tables.task), QUALITY_WEIGHT * by_codes(tables.quality)
    counts = np.isfinite(task) & on_task[:, None]
    task, quality = (np.where(counts, x, 0.0) for x in (task, quality * setting.loss.use_quality))
    share = jnp.sum(answer * counts, axis=1)
    some = jnp.where(share > 0, share, 1.0)
    value, quality_value = (jnp.sum(answer * x, axis=1) / some for x in (task, quality))
    centred = shrunk(share, PLAY.num_generations)[:, None] * (task + quality - (value + quality_value)[:, None])
    played = query[VALID][:, None] * answer * counts

    where = np.flatnonzero(VALID)
    penalty = setting.loss.invalid_query_penalty
    counted = jnp.ones(len(QUERIES)).at[where].set(jnp.where(on_task, 1 - (1 - share) ** PLAY.num_generations, 1.0))
    reward = jnp.full(len(QUERIES), penalty).at[where].set(jnp.where(on_task, quality_value - value, penalty))
    total = jnp.sum(query * counted)
    weight = query * counted * shrunk(total, PLAY.num_queries) * (reward - jnp.sum(query * counted * reward) / total)
    return jnp.stack(
        [
            jnp.sum(stop(played * centred) * logs[1].reshape(shape)),
            jnp.sum(stop(weight) * logs[0]),
            jnp.sum(stop(played) * divergences[1].reshape(shape)),
            jnp.sum(stop(query * counted) * divergences[0]),
        ]
    )


@jax.jit
def pull_back(params: llama.Params, temperatures: tuple[float, float], cotangents: Logs) -> jax.Array:
    """Gradients [4, P] from those with respect to the log-probabilities.

    One after the other: under `vmap` XLA's CPU backend (jaxlib 0.10.2) gets the backward pass of this scan wrong.
    """
    flat, unravel = ravel_pytree(params)
    _, backward = jax.vjp(lambda x: log_policies(unravel(x), temperatures), flat)
    return jax.lax.map(lambda cotangent: backward(cotangent)[0], cotangents)


@cache
def exact(setting: Setting, terms: Any) -> np.ndarray:
    """Gradients [4, P] of `terms`."""
    temperatures = (setting.challenger.temperature, setting.solver.temperature)
    ours, theirs = (log_policies(params, temperatures) for params in (policy(), reference_policy()))
    cotangents = jax.jacrev(lambda logs: terms(logs, theirs, setting))(ours)
    return np.asarray(pull_back(policy(), temperatures, cotangents), np.float64)


def joint(gradients: np.ndarray, factors: Sequence[float], setting: Setting) -> np.ndarray:
    """The expected gradient of the loss: of -(L_Sol + alpha L_Ch), each player's part times its factor."""
    solver, challenger, solver_kl, challenger_kl = gradients
    alpha, beta = setting.loss.alpha_challenger, setting.loss.beta
    return -factors[0] * solver - alpha * factors[1] * challenger + beta * (solver_kl + alpha * challenger_kl)


PAPER = (1 - 1 / PLAY.num_generations, 1 - 1 / PLAY.num_queries)


class Comparison(NamedTuple):
    z: float
    """Largest |difference of means| / standard error, over parameters and along the gradient of each exact term."""
    relative: float
    """Norm of the difference over that of the expected gradient."""
    noise: float
    """What `relative` is expected to be from sampling noise alone."""


def compare(samples: np.ndarray, expected: np.ndarray, directions: np.ndarray) -> Comparison:
    directions = directions[np.linalg.norm(directions, axis=1) > 0]
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    samples = samples.astype(np.float64)
    difference = samples.mean(0) - expected
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert error.min() > 0  # every parameter moves
    along = (samples @ directions.T).std(0, ddof=1) / np.sqrt(len(samples))
    z = np.concatenate([difference / error, directions @ difference / along])
    norm = np.linalg.norm(expected)
    return Comparison(
        float(np.abs(z).max()), float(np.linalg.norm(difference) / norm), float(np.linalg.norm(error) / norm)
    )


def check(setting: Setting, terms: Any, factors: Sequence[float]) -> None:
    gradients = exact(setting, terms)
    result = compare(sampled(setting), joint(gradients, factors, setting), gradients)
    print(result)
    assert result.z < BOUND, result
    assert result.relative < 1.5 * result.noise, result


def probabilities() -> tuple[np.ndarray, np.ndarray]:
    """Of all queries, and [valid queries, answers] of all answers, at temperature 1."""
    logs = log_policies(policy(), (1.0, 1.0))
    queries, answers = (
        np.exp(np.asarray(jnp.sum(chosen(log, rows), axis=1)))
        for log, rows in zip(logs, (QUERY_ROWS, ANSWER_ROWS), strict=True)
    )
    return queries, answers.reshape(-1, len(ANSWERS))


def test_everything_is_enumerated() -> None:
    queries, answers = probabilities()
    assert (len(QUERIES), VALID.sum(), len(ANSWERS)) == (85, 9, 21)
    np.testing.assert_allclose(queries.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(answers.sum(1), 1, rtol=1e-5)


def test_valid_queries_come_as_often_as_enumerated() -> None:
    """The fraction that the sampler and `queries.valid` give is that of the list above, within its standard error."""
    valid = episodes(LSP.solver, LSP.challenger).queries.valid
    expected = probabilities()[0][VALID].sum()
    assert 0.3 < expected < 0.7
    assert abs(valid.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / valid.size)


@pytest.mark.parametrize("row", range(PLAY.num_queries))
def test_plays_come_as_often_as_enumerated(row: int) -> None:
    """Query `row` with the first answer to it, and with the first answer to query 0: chi-square of the joint counts.

    Noise shared by the roles or by rows would keep each one's frequencies and bend the joint ones.
    """
    queries, answers = probabilities()
    played = episodes(LSP.solver, LSP.challenger)
    drawn = np.asarray(code(played.queries.sampled.tokens))
    replies = np.asarray(code(played.answers.tokens))[:, :, 0]
    query_codes, answer_codes = np.array([number(q) for q in QUERIES]), np.array([number(a) for a in ANSWERS])
    first = answers.T @ (queries[VALID] / queries[VALID].sum())  # to query 0, whatever it is, if it is valid
    valid = np.isin(drawn, query_codes[VALID])

    given_own = (queries[VALID][:, None] * answers).ravel()
    own = [(drawn[:, row] == q) & (replies[:, row] == a) for q in query_codes[VALID] for a in answer_codes]
    assert_fits(np.array([np.sum(hit) for hit in own]), given_own * DRAWS)
    if row > 0:  # independent of another query's answers
        chosen_rows = valid[:, 0]
        others = [(drawn[:, row] == q) & (replies[:, 0] == a) & chosen_rows for q in query_codes for a in answer_codes]
        expected = (queries[:, None] * first[None]).ravel() * chosen_rows.sum()
        assert_fits(np.array([np.sum(hit) for hit in others]), expected)


def assert_fits(counts: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's chi-square of cells with 5 or more expected, within 4 of its standard deviations."""
    cells = expected >= 5
    freedom = cells.sum()
    assert freedom > 20
    chi2 = np.sum((counts[cells] - expected[cells]) ** 2 / expected[cells])
    print(f"chi2 {chi2:.1f} of {freedom} cells")
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_lsp_gradient() -> None:
    check(LSP, paper_terms, PAPER)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(LSP_ZERO, id="lsp-zero"),
        pytest.param(Setting(replace(LSP.loss, alpha_challenger=0.0)), id="solver-alone"),
        pytest.param(TEMPERED, id="temperature", marks=pytest.mark.slow),
    ],
)
def test_gradient(setting: Setting) -> None:
    """LSP-Zero, the Solver alone, and roles that sample at two temperatures other than 1."""
    check(setting, paper_terms, PAPER)


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(replace(LSP, masked=True), id="masked"),
        pytest.param(replace(TEMPERED, solver=SamplingConfig(0.7, top_k=3)), id="top-k", marks=pytest.mark.slow),
    ],
)
def test_gradient_of_the_estimator(setting: Setting) -> None:
    """Answers without a score and queries off the task drop out; truncated sampling weighs as it draws."""
    check(setting, estimator_terms, (1, 1))


def test_both_enumerations_agree() -> None:
    """Where nothing is cut off or masked, the expected weights of the samples give the paper's gradient."""
    for setting in (LSP, TEMPERED):
        paper, estimator = exact(setting, paper_terms), exact(setting, estimator_terms)
        expected = paper * np.array([*PAPER, 1, 1])[:, None]
        np.testing.assert_allclose(estimator, expected, atol=2e-5 * np.abs(expected).max())


MUTANTS = {
    "without 1 - 1/G": (1, PAPER[1], 1, 1),
    "without 1 - 1/N": (PAPER[0], 1, 1, 1),
    "Challenger's sign": (PAPER[0], -PAPER[1], 1, 1),
    "no KL for the Solver": (*PAPER, 0, 1),
    "no KL for the Challenger": (*PAPER, 1, 0),
    "alpha not on the Challenger's KL": (*PAPER, 1, 1 / LSP.loss.alpha_challenger),
}


@pytest.mark.parametrize("factors", MUTANTS.values(), ids=MUTANTS)
def test_a_wrong_factor_is_seen(factors: tuple[float, ...]) -> None:
    """The comparison of `test_lsp_gradient` fails when one factor of the four terms is wrong."""
    gradients = exact(LSP, paper_terms)
    wrong = joint(gradients * np.array(factors)[:, None], (1, 1), LSP)
    result = compare(sampled(LSP), wrong, gradients)
    print(result)
    assert result.z > 1.5 * BOUND, result


@pytest.mark.parametrize("change", [{"use_quality": False}, {"invalid_query_penalty": 0.0}, {"kl_estimator": "k3"}])
def test_another_objective_is_seen(change: dict[str, Any]) -> None:
    other = replace(LSP, loss=replace(LSP.loss, **change))
    gradients = exact(other, paper_terms)
    result = compare(sampled(LSP), joint(gradients, PAPER, other), gradients)
    print(result)
    assert result.z > 1.5 * BOUND, result
