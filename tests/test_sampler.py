"""The sampler: what it keeps and draws, and the log-probability it reports, against float64 numpy and transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from everyday import everyday
from lsp_jax.core.errors import InputError
from lsp_jax.model.llama import tempered
from lsp_jax.play import sampler
from lsp_jax.play.sampler import BLOCK, SamplingConfig, draw_index, row_keys, row_uniforms, sample, truncate

VOCABULARY = 300  # two blocks, the second one ragged
CONFIGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.7),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=17),
    SamplingConfig(temperature=0.7, top_k=17),
    SamplingConfig(top_k=VOCABULARY + 1),
    SamplingConfig(top_p=0.9),
    SamplingConfig(temperature=0.7, top_p=0.35),
    SamplingConfig(top_p=1e-4),
    SamplingConfig(min_p=0.05),
    SamplingConfig(temperature=0.7, min_p=0.3),
    SamplingConfig(temperature=1.5, top_k=40, top_p=0.8),
    SamplingConfig(temperature=0.7, top_p=0.9, min_p=0.02),
    SamplingConfig(top_k=60, min_p=0.01),
    SamplingConfig(temperature=0.7, top_k=50, top_p=0.95, min_p=0.01),
]
ONE_BELOW = np.nextafter(np.float32(1), np.float32(0))
EXTREMES = np.array([0.0, np.finfo(np.float32).tiny, 2.0**-24, 0.5, 1 - 2.0**-20, ONE_BELOW], np.float32)

GRID = np.stack(np.meshgrid(EXTREMES, EXTREMES), axis=-1).reshape(-1, 2)

jitted_sample = jax.jit(sample, static_argnames="config")
jitted_draw = jax.jit(draw_index)
jitted_truncate = jax.jit(truncate, static_argnames="config")


def config_id(config: SamplingConfig) -> str:
    return f"T{config.temperature}-k{config.top_k}-p{config.top_p}-m{config.min_p}"


def logits_rows(rows: int = 24, seed: int = 0) -> np.ndarray:
    """Rows from nearly flat to nearly one-hot, tokens in no order; some tokens impossible already."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(0.1, 30, rows)[:, None]
    logits = (scale * rng.standard_normal((rows, VOCABULARY))).astype(np.float32)
    logits[::3, ::7] = -np.inf
    return logits


def exact_kept(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """bool [B, V] in float64, by going through each row's tokens one by one."""
    scaled = logits.astype(np.float64) / config.temperature
    kept = np.zeros(logits.shape, bool)
    for row in range(len(logits)):
        order = [token for token in np.argsort(-scaled[row]) if scaled[row, token] > -np.inf]
        if config.top_k:
            order = order[: config.top_k]
        mass = np.exp(scaled[row, order] - scaled[row, order].max())
        mass /= mass.sum()
        before, nucleus = 0.0, []
        for token, probability in zip(order, mass, strict=True):
            if config.top_p < 1 and before >= config.top_p:
                break
            nucleus.append(token)
            before += probability
        highest = scaled[row, nucleus].max()
        kept[row, [t for t in nucleus if np.exp(scaled[row, t] - highest) >= config.min_p]] = True
    return kept


def exact_logprobs(logits: np.ndarray, config: SamplingConfig, truncated: bool = True) -> np.ndarray:
    """float64 [B, V]: log-probabilities under the tempered distribution, renormalised over what is kept."""
    scaled = logits.astype(np.float64) / config.temperature
    if truncated:
        scaled = np.where(exact_kept(logits, config), scaled, -np.inf)
    scaled = scaled - scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def uniforms(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 2), np.float32)


def transformers_kept(logits: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """bool [B, V] that transformers' chain of warpers keeps, in the order of its `generate`."""
    torch = pytest.importorskip("torch")
    warpers: Any = pytest.importorskip("transformers.generation.logits_process")
    chain = [warpers.TemperatureLogitsWarper(config.temperature)] if config.temperature != 1 else []
    if config.top_k:
        chain.append(warpers.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        chain.append(warpers.TopPLogitsWarper(config.top_p))
    if config.min_p:
        chain.append(warpers.MinPLogitsWarper(config.min_p))
    scores = torch.tensor(logits)
    for warper in chain:
        scores = warper(None, scores)
    return np.isfinite(scores.numpy())


@pytest.mark.parametrize("config", everyday(CONFIGS, 0, 4, 12), ids=config_id)
def test_logprob_and_log_mass_equal_float64(config: SamplingConfig) -> None:
    logits = logits_rows()
    truncated, tempered = exact_logprobs(logits, config), exact_logprobs(logits, config, truncated=False)
    rows = np.arange(len(logits))
    for seed in range(4):
        draw = jitted_sample(logits, uniforms(len(logits), seed), config=config)
        token, logprob, log_mass = (np.asarray(x) for x in draw)
        assert token.dtype == np.int32 and logprob.dtype == np.float32 and log_mass.dtype == np.float32
        np.testing.assert_allclose(logprob, truncated[rows, token], atol=2e-5, rtol=1e-6)
        np.testing.assert_allclose(tempered[rows, token] - log_mass, logprob, atol=1e-4, rtol=0)
        mass = np.where(np.isfinite(truncated), np.exp(tempered), 0).sum(axis=1)
        np.testing.assert_allclose(log_mass, np.log(mass), atol=2e-5)
        if not config.truncates:
            assert np.all(log_mass == 0)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("seed", everyday((0, 1), 0))
def test_kept_set_equals_float64(config: SamplingConfig, seed: int) -> None:
    logits = logits_rows(seed=seed)
    kept = np.asarray(jitted_truncate(logits / np.float32(config.temperature), config=config)) > -np.inf
    np.testing.assert_array_equal(kept, exact_kept(logits, config))
    assert kept.any(axis=1).all()


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full)])
def test_kept_set_equals_transformers(config: SamplingConfig, seed: int) -> None:
    logits = logits_rows(seed=seed)
    kept = np.asarray(jitted_truncate(logits / np.float32(config.temperature), config=config)) > -np.inf
    np.testing.assert_array_equal(kept, transformers_kept(logits, config))


def test_truncation_leaves_kept_logits_as_they_are() -> None:
    logits = logits_rows()
    out = np.asarray(truncate(jnp.asarray(logits), SamplingConfig(top_k=40, top_p=0.9, min_p=0.02)))
    kept = out > -np.inf
    np.testing.assert_array_equal(out[kept], logits[kept])


def test_min_p_counts_from_the_kept_most_probable_token() -> None:
    probabilities = np.array([[0.4, 0.3, 0.2, 0.06, 0.04]])
    kept = truncate(jnp.log(jnp.asarray(probabilities, jnp.float32)), SamplingConfig(top_p=0.95, min_p=0.4))
    np.testing.assert_array_equal(np.asarray(kept) > -np.inf, [[True, True, True, False, False]])


SMALL = [
    SamplingConfig(temperature=1e-5),
    SamplingConfig(temperature=3e-5, top_k=17, top_p=0.9, min_p=0.02),
    SamplingConfig(temperature=1e-3),
    SamplingConfig(temperature=0.009, top_p=0.8),
]


@pytest.mark.parametrize("config", everyday(SMALL, 1), ids=config_id)
def test_small_temperatures_equal_float64(config: SamplingConfig) -> None:
    """Logits as near as the temperature is small, around 0 and far from it: several tokens are likely."""
    near = np.float32(config.temperature / 5) * logits_rows()
    offset = np.float32(0 if config.truncates else 3)  # there some are equal, and a cut between those has no one answer
    logits = np.concatenate([near, near + offset, logits_rows()]).astype(np.float32)
    exact, rows = exact_logprobs(logits, config), np.arange(len(logits))
    tokens = []
    for seed in range(4):
        draw = jitted_sample(logits, uniforms(len(logits), seed), config=config)
        np.testing.assert_allclose(draw.logprob, exact[rows, draw.token], atol=2e-5, rtol=1e-5)
        tokens.append(np.asarray(draw.token))
    assert any(np.any(tokens[0] != other) for other in tokens[1:]), "not greedy yet"
    if not config.truncates:  # and the quotient itself would not do
        naive = np.asarray(jax.nn.log_softmax(jnp.asarray(logits) / config.temperature))
        assert np.abs(naive[exact > -20] - exact[exact > -20]).max() > 2e-5


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-38, 1e-9, 9.9e-6])
def test_temperatures_below_the_bound_are_greedy(temperature: float) -> None:
    logits = np.concatenate([logits_rows(), 1e-6 * logits_rows(seed=1), 1e4 * logits_rows(seed=2)]).astype(np.float32)
    config = SamplingConfig(temperature, top_k=5, top_p=0.9)
    for pair in (GRID[0], GRID[-1]):
        draw = jitted_sample(logits, np.tile(pair, (len(logits), 1)), config=config)
        np.testing.assert_array_equal(draw.token, np.argmax(logits, axis=1))
        assert not np.any(draw.logprob) and not np.any(draw.log_mass)


@pytest.mark.parametrize("temperature", [0.01, 0.6, 0.7, 1.0, 1e38])
def test_tempered_logits_are_the_quotient_to_the_bit(temperature: float) -> None:
    logits = jnp.asarray(logits_rows())
    np.testing.assert_array_equal(tempered(logits, temperature), logits / temperature)


@pytest.mark.parametrize("top_p", [1e-30, 1e-38, 1e-46, 5e-324])
def test_the_most_probable_token_stays_however_small_top_p(top_p: float) -> None:
    logits = logits_rows()
    draw = jitted_sample(logits, uniforms(len(logits)), config=SamplingConfig(top_p=top_p))
    np.testing.assert_array_equal(draw.token, np.argmax(logits, axis=1))
    np.testing.assert_allclose(draw.logprob, 0, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("config", [SamplingConfig(0.0), SamplingConfig(1e-3), *CONFIGS[2::4]], ids=config_id)
def test_logits_that_are_not_finite_have_no_logprob(config: SamplingConfig, value: float) -> None:
    logits = logits_rows()
    logits[::2, 40] = value
    logits[4] = -np.inf
    broken = np.arange(len(logits)) % 2 == 0
    for seed in range(2):
        logprob = np.asarray(jitted_sample(logits, uniforms(len(logits), seed), config=config).logprob)
        np.testing.assert_array_equal(np.isfinite(logprob), ~broken)


def interleaved_weights(vocabulary: int, seed: int) -> np.ndarray:
    """Weights of which every third is 0, and with blocks enough a whole block and the last tokens too."""
    rng = np.random.default_rng(seed)
    weights = rng.gamma(0.8, size=vocabulary) + 0.05
    weights[::3] = 0
    if vocabulary > 3 * BLOCK:
        weights[BLOCK : 2 * BLOCK] = 0
        weights[-5:] = 0
    return weights.astype(np.float32)


def many_draws(weights: np.ndarray, count: int, key: int) -> np.ndarray:
    """Counts [V] of `count` draws with the noise that generation uses."""

    @jax.jit
    def batch(position: jax.Array) -> jax.Array:
        noise = row_uniforms(row_keys(jax.random.key(key), 4096), position)
        return draw_index(jnp.broadcast_to(jnp.asarray(weights)[None], (4096, len(weights))), noise)[0]

    tokens = np.concatenate([np.asarray(batch(jnp.int32(position))) for position in range(count // 4096)])
    return np.bincount(tokens, minlength=len(weights))


@pytest.mark.full
@pytest.mark.parametrize("vocabulary", [257, 5, 256, 1000])
def test_many_draws_follow_the_exact_distribution(vocabulary: int) -> None:
    weights = interleaved_weights(vocabulary, seed=vocabulary)
    counts = many_draws(weights, 25 * 4096, key=vocabulary)
    assert counts[weights == 0].sum() == 0
    positive = weights > 0
    expected = weights[positive].astype(np.float64) / weights.sum(dtype=np.float64) * counts.sum()
    assert chisquare(counts[positive], expected).pvalue > 1e-3
    # and the test can fail: the same counts refuse weights that are 15 % off on every second token
    tilted = expected * np.where(np.arange(len(expected)) % 2, 1.15, 1)
    assert chisquare(counts[positive], tilted / tilted.sum() * counts.sum()).pvalue < 1e-3


@pytest.mark.full
@pytest.mark.parametrize("config", [SamplingConfig(0.7), SamplingConfig(0.7, 50, 0.9, 0.02)])
def test_sampled_tokens_follow_the_distribution_they_report(config: SamplingConfig) -> None:
    logits = 1.5 * logits_rows(rows=3)[1:2] / 3
    exact = np.exp(exact_logprobs(logits, config))[0]
    rows = np.broadcast_to(logits, (1024, VOCABULARY))
    tokens = np.concatenate([jitted_sample(rows, uniforms(1024, seed), config=config).token for seed in range(30)])
    counts = np.bincount(tokens, minlength=VOCABULARY)
    assert counts[exact == 0].sum() == 0
    likely = exact * counts.sum() >= 5
    observed = np.append(counts[likely], counts[~likely].sum() + 5)  # the rest as one cell, kept away from 0
    expected = np.append(exact[likely], exact[~likely].sum() + 5 / counts.sum()) * counts.sum()
    assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 256, 257, 511, 513, 1000])
def test_extreme_uniforms_never_draw_a_token_of_weight_zero(vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    for case in range(20):
        weights = np.exp(rng.uniform(-40, 0, vocabulary)).astype(np.float32)
        weights[rng.random(vocabulary) < (0.5 if case % 2 else 0.97)] = 0
        weights[rng.integers(vocabulary)] = 1
        index, total = jitted_draw(jnp.broadcast_to(jnp.asarray(weights)[None], (len(GRID), vocabulary)), GRID)
        index = np.asarray(index)
        assert index.min() >= 0 and index.max() < vocabulary
        assert np.all(weights[index] > 0)
        np.testing.assert_allclose(total, weights.sum(dtype=np.float64), rtol=1e-6)


def test_uniform_zero_gives_the_first_and_one_below_the_last_positive_token() -> None:
    weights = interleaved_weights(1000, seed=4)
    rows = jnp.broadcast_to(jnp.asarray(weights)[None], (2, 1000))
    index, _ = jitted_draw(rows, jnp.asarray([[0.0, 0.0], [ONE_BELOW, ONE_BELOW]]))
    np.testing.assert_array_equal(index, np.flatnonzero(weights)[[0, -1]])


def test_uniforms_on_the_borders_belong_to_the_token_that_begins_there() -> None:
    """Equal weights, all sums exact: u = i / n is the first of token i's own n-th of the unit interval."""
    first = jnp.arange(4) / 4
    index, _ = jitted_draw(jnp.ones((4, 4)), jnp.stack([first, first], axis=1))
    np.testing.assert_array_equal(index, [0, 1, 2, 3])
    index, _ = jitted_draw(jnp.ones((4, 4 * BLOCK)), jnp.stack([first, first], axis=1))
    np.testing.assert_array_equal(index, [block * BLOCK + block * BLOCK // 4 for block in range(4)])


@pytest.mark.parametrize("config", everyday(CONFIGS, 0, 4, 12), ids=config_id)
def test_never_a_masked_token(config: SamplingConfig) -> None:
    logits = logits_rows()
    kept = exact_kept(logits, config)
    rows = np.arange(len(logits))
    for pair in np.concatenate([GRID, uniforms(120)]):
        token, logprob, _ = jitted_sample(logits, np.tile(pair, (len(logits), 1)), config=config)
        assert np.all(kept[rows, np.asarray(token)])
        assert np.all(np.isfinite(logprob)) and np.all(np.asarray(logprob) <= 2e-5)


@pytest.mark.full
@pytest.mark.parametrize("trial", range(5))
def test_non_monotone_sums_cannot_yield_a_masked_token(trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a cumulative sum rounds (here: badly, up and down), what is drawn has positive weight."""
    rng = np.random.default_rng(trial)
    exact_cumsum = jnp.cumsum

    def noisy_cumsum(x: jax.Array, axis: int) -> jax.Array:
        total = exact_cumsum(x, axis=axis)
        return total * (1 + 0.05 * jnp.asarray(rng.standard_normal(total.shape), jnp.float32))

    monkeypatch.setattr(sampler.jnp, "cumsum", noisy_cumsum)
    weights = interleaved_weights(1000, seed=trial) * (rng.random(1000) < 0.3)
    noise = np.concatenate([GRID, uniforms(500, trial)])
    index, _ = draw_index(jnp.broadcast_to(jnp.asarray(weights, jnp.float32)[None], (len(noise), 1000)), noise)
    assert np.all(weights[np.asarray(index)] > 0)
    assert len(np.unique(index)) > 50  # still a draw


@pytest.mark.full
@pytest.mark.parametrize("gap", [20.0, 90.0, 1e4, 3e38])
def test_peaked_row_draws_its_peak(gap: float) -> None:
    logits = np.zeros((len(EXTREMES), VOCABULARY), np.float32)
    logits[:, 123] = gap
    for config in (SamplingConfig(), SamplingConfig(0.7) if gap < 1e38 else SamplingConfig(top_p=0.9)):
        draw = jitted_sample(logits, np.stack([np.full_like(EXTREMES, 0.5), EXTREMES], axis=1), config=config)
        assert np.asarray(draw.token)[3] == 123
        chosen = np.where(np.asarray(draw.token) == 123, 0.0, -gap / config.temperature)
        np.testing.assert_allclose(draw.logprob, chosen, atol=1e-5, rtol=1e-6)
        if gap > 110:  # the rest underflows: there is nothing else to draw
            np.testing.assert_array_equal(draw.token, 123)


@pytest.mark.parametrize("place", [0, 1, 255, 256, 299])
def test_only_possible_token_is_drawn_with_probability_one(place: int) -> None:
    logits = np.full((len(EXTREMES), VOCABULARY), -np.inf, np.float32)
    logits[:, place] = -3
    for config in (SamplingConfig(), SamplingConfig(0.7, top_k=5, top_p=0.9, min_p=0.1)):
        draw = jitted_sample(logits, np.stack([EXTREMES, EXTREMES[::-1]], axis=1), config=config)
        np.testing.assert_array_equal(draw.token, place)
        np.testing.assert_allclose(draw.logprob, 0, atol=1e-6)
        np.testing.assert_allclose(draw.log_mass, 0, atol=1e-6)


def test_greedy_takes_the_first_most_probable_token_whatever_the_noise() -> None:
    logits = logits_rows()
    logits[0, [40, 290]] = logits[0].max() + 1
    for config in (SamplingConfig(temperature=0), SamplingConfig(temperature=0, top_k=5, top_p=0.5)):
        draws = [sample(jnp.asarray(logits), jnp.full((len(logits), 2), u), config) for u in (0.0, 0.9)]
        for draw in draws:
            np.testing.assert_array_equal(draw.token, logits.argmax(axis=1))
            assert draw.token[0] == 40
            np.testing.assert_array_equal(draw.logprob, 0)
            np.testing.assert_array_equal(draw.log_mass, 0)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits = jnp.asarray(logits_rows(), jnp.bfloat16)
    draw = jitted_sample(logits, uniforms(24), config=SamplingConfig(0.7))
    exact = exact_logprobs(np.asarray(logits, np.float32), SamplingConfig(0.7))
    np.testing.assert_allclose(draw.logprob, exact[np.arange(24), np.asarray(draw.token)], atol=2e-5, rtol=1e-6)


@pytest.mark.full
def test_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    key = jax.random.key(5)
    position = jnp.int32(3)
    wide = np.asarray(row_uniforms(row_keys(key, 9), position))
    np.testing.assert_array_equal(row_uniforms(row_keys(key, 4), position), wide[:4])
    kept = jnp.asarray([7, 2, 5])  # rows left after finished ones were dropped
    np.testing.assert_array_equal(row_uniforms(row_keys(key, 9)[kept], position), wide[np.asarray(kept)])
    assert wide.dtype == np.float32 and wide.shape == (9, 2)


def test_noise_differs_by_row_position_level_and_key() -> None:
    rolled = partial(row_uniforms, row_keys(jax.random.key(5), 64))
    noise = np.stack([rolled(jnp.int32(p)) for p in range(8)] + [row_uniforms(row_keys(jax.random.key(6), 64), 0)])
    assert noise.min() >= 0 and noise.max() < 1
    assert len(np.unique(noise)) > 0.999 * noise.size
    assert abs(noise.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
    ],
)
def test_check_names_the_bad_field(change: dict[str, float], name: str) -> None:
    with pytest.raises(InputError) as error:
        SamplingConfig(**change).check("sampling")  # type: ignore[arg-type]
    assert error.value.field == f"sampling.{name}"
    assert str(change[name]) in str(error.value)


def test_check_refuses_greedy_only_where_it_trains() -> None:
    greedy = SamplingConfig(temperature=0)
    greedy.check("generation")
    with pytest.raises(InputError, match=r"play\.temperature = 0"):
        greedy.check("play", greedy=False)
    for config in CONFIGS:
        config.check("sampling", greedy=False)
