"""Log-probabilities, entropy and KL by chunks: against full logits, numpy and torch, and what they cost in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from everyday import everyday
from lsp_jax.learn.batch import Rows, Sampled, make_rows, micro_batches
from lsp_jax.learn.logprobs import TokenStatistics, completion_hidden, completion_tokens, token_statistics
from lsp_jax.model import llama
from tiny import EOS, VOCABULARY, tiny_config, tiny_params

CONFIG = tiny_config(num_hidden_layers=1)
PROMPTS = np.array([3, 1, 6, 4, 2])
COMPLETIONS = np.array([2, 5, 1, 4, 3])
TEMPERATURE = 0.7

forward = jax.jit(llama.forward, static_argnums=1)
hidden_of = jax.jit(completion_hidden, static_argnums=1)


@pytest.fixture(scope="module")
def params() -> llama.Params:
    return tiny_params(CONFIG)


def token_lists(seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts full of stop ids, and completions that end in one (which is the pad id as well)."""
    rng = np.random.default_rng(seed)
    prompts = [rng.choice([EOS, EOS, EOS, 0, 7, 30], size).tolist() for size in PROMPTS]
    completions = [[*rng.integers(0, VOCABULARY, size - 1).tolist(), EOS] for size in COMPLETIONS]
    return prompts, completions


def ragged(lists: list[list[int]], width: int, fill: int) -> tuple[jax.Array, jax.Array]:
    padded = [[*row, *[fill] * (width - len(row))] for row in lists]
    return jnp.asarray(padded, jnp.int32), jnp.asarray([len(row) for row in lists], jnp.int32)


def ragged_rows(extra: int = 0, fill: int = EOS, counts: list[int] | None = None) -> Rows:
    """The lists as rows, their padding `extra` columns wider than needed and filled with `fill`."""
    prompts, completions = token_lists()
    width = max(COMPLETIONS) + extra
    shape = (len(COMPLETIONS), width)
    return make_rows(
        prompts=ragged(prompts, max(PROMPTS) + extra, fill),
        sampled=Sampled(*ragged(completions, width, fill), logprobs=jnp.zeros(shape), log_mass=jnp.zeros(shape)),
        advantages_B=jnp.ones(len(COMPLETIONS)),
        counts_B=jnp.ones(len(COMPLETIONS), bool) if counts is None else jnp.asarray(counts, bool),
        scale=1.0,
        loss_type="sequence",
    )


def log_softmax(logits: Any, temperature: float) -> np.ndarray:
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def random_case(shape: tuple[int, int] = (3, 7), seed: int = 0) -> tuple[llama.Params, jax.Array, jax.Array]:
    """A tied head, hidden states [B, T, D] and targets [B, T]."""
    rng = np.random.default_rng(seed)
    weight = jnp.asarray(0.5 * rng.standard_normal((VOCABULARY, 32)), jnp.float32)
    hidden = jnp.asarray(rng.standard_normal((*shape, 32)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, shape), jnp.int32)
    return {"model": {"embed_tokens": {"weight": weight}}}, hidden, targets


@partial(jax.jit, static_argnames=("temperature", "chunk"))
def statistics_of(
    params: llama.Params,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float = TEMPERATURE,
    chunk: int = 7,
    reference: tuple[llama.Params, jax.Array] | None = None,
) -> TokenStatistics:
    return token_statistics(params, CONFIG, hidden, targets, temperature, chunk, reference)


# --- rows: from lengths only ---------------------------------------------------------------------------------------


def test_rows_hold_prompt_and_completion_without_a_gap() -> None:
    rows = ragged_rows(extra=2, fill=EOS)
    prompts, completions = token_lists()
    width = max(PROMPTS) + max(COMPLETIONS) + 4
    expected = [[*p, *c, *[0] * (width - len(p) - len(c))] for p, c in zip(prompts, completions, strict=True)]
    np.testing.assert_array_equal(rows.tokens, expected)


@pytest.mark.parametrize("fill", [EOS, 0, 99])
def test_mask_positions_and_tokens_come_from_lengths(fill: int) -> None:
    counts = [1, 1, 0, 1, 1]
    rows = ragged_rows(extra=3, fill=fill, counts=counts)
    mask, positions, tokens = (np.asarray(x) for x in (rows.mask, rows.positions, completion_tokens(rows)))
    assert mask.shape == positions.shape == tokens.shape == (5, max(COMPLETIONS) + 3)
    _, completions = token_lists()
    for row, completion in enumerate(completions):
        size = len(completion)
        assert mask[row].tolist() == [bool(counts[row]) and t < size for t in range(mask.shape[1])]
        assert positions[row, :size].tolist() == [PROMPTS[row] + t for t in range(size)]
        assert tokens[row, :size].tolist() == completion  # the stop token that ended it is the last one
    assert positions.max() < rows.tokens.shape[1]


def test_one_prompt_for_all_rows_is_shared() -> None:
    _, completions = token_lists()
    shape = (len(COMPLETIONS), max(COMPLETIONS))
    rows = make_rows(
        prompts=ragged([[EOS, 5, EOS]], 3, 0),
        sampled=Sampled(*ragged(completions, shape[1], 0), logprobs=jnp.zeros(shape), log_mass=jnp.zeros(shape)),
        advantages_B=jnp.ones(5),
        counts_B=jnp.ones(5, bool),
        scale=1.0,
        loss_type="sequence",
    )
    assert rows.prompt_lengths.tolist() == [3] * 5
    for row, completion in enumerate(completions):
        assert rows.tokens[row, : 3 + len(completion)].tolist() == [EOS, 5, EOS, *completion]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_micro_batches_keep_every_row_and_add_rows_without_weight(size: int) -> None:
    rows = ragged_rows()
    rows = rows._replace(old_logprobs=rows.behaviour_logprobs - 1)
    split = micro_batches(rows, size)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), split)
    assert split.tokens.shape[:2] == (-(-5 // size), size)
    for whole, parts in zip(rows, flat, strict=True):
        np.testing.assert_array_equal(whole, parts[:5])
    assert not flat.mask[5:].any() and np.all(flat.weights[5:] == 0)
    assert np.all(flat.prompt_lengths >= 1)  # the column before a completion exists


# --- log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", everyday((TEMPERATURE, 1.0), 0))
@pytest.mark.parametrize("tied", [True, False])
def test_equal_log_softmax_of_full_logits(temperature: float, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    params, rows = tiny_params(config, seed=3), ragged_rows()
    hidden = hidden_of(params, config, rows)
    stats = token_statistics(params, config, hidden, completion_tokens(rows), temperature, 7)
    prompts, completions = token_lists()
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        # each row by itself, unpadded
        logp = log_softmax(forward(params, config, jnp.asarray([[*prompt, *completion]]))[0], temperature)
        for t, token in enumerate(completion):
            np.testing.assert_allclose(stats.logprobs[row, t], logp[len(prompt) + t - 1, token], atol=2e-5)


@pytest.mark.full
def test_remat_changes_nothing(params: llama.Params) -> None:
    rows = ragged_rows()

    def total(params: llama.Params, remat: str) -> jax.Array:
        hidden = completion_hidden(params, CONFIG, rows, remat=remat)
        logprobs = token_statistics(params, CONFIG, hidden, completion_tokens(rows), 1.0, 7).logprobs
        return jnp.sum(jnp.where(rows.mask, logprobs, 0))

    plain, again = (jax.jit(jax.value_and_grad(total), static_argnums=1)(params, remat) for remat in ("none", "full"))
    for left, right in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(("extra", "fill"), [(0, 99), (1, EOS), (6, EOS), (6, 99)])
def test_extra_padding_changes_nothing(params: llama.Params, extra: int, fill: int) -> None:
    outputs = []
    for rows in (ragged_rows(), ragged_rows(extra, fill)):
        stats = statistics_of(params, hidden_of(params, CONFIG, rows), completion_tokens(rows))
        outputs.append((np.asarray(rows.mask), stats))
    (mask, plain), (padded_mask, padded) = outputs
    assert mask.sum() == padded_mask.sum() == COMPLETIONS.sum()
    for left, right in zip(plain, padded, strict=True):
        np.testing.assert_allclose(np.asarray(left)[mask], np.asarray(right)[padded_mask], atol=1e-5)


def test_equal_numpy_in_value() -> None:
    params, hidden, targets = random_case()
    weight = np.asarray(params["model"]["embed_tokens"]["weight"], np.float64)
    logp = log_softmax(np.asarray(hidden, np.float64) @ weight.T, TEMPERATURE)
    stats = statistics_of(params, hidden, targets)
    chosen = np.take_along_axis(logp, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(stats.logprobs, chosen, atol=1e-5)
    np.testing.assert_allclose(stats.entropy, -np.sum(np.exp(logp) * logp, axis=-1), atol=1e-5)
    np.testing.assert_array_equal(stats.full_kl, 0)

    other, other_hidden, _ = random_case(seed=9)
    other_weight = np.asarray(other["model"]["embed_tokens"]["weight"], np.float64)
    ref_logp = log_softmax(np.asarray(other_hidden, np.float64) @ other_weight.T, TEMPERATURE)
    with_kl = statistics_of(params, hidden, targets, reference=(other, other_hidden))
    np.testing.assert_allclose(with_kl.full_kl, np.sum(np.exp(logp) * (logp - ref_logp), axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(with_kl.logprobs, stats.logprobs)
    same = statistics_of(params, hidden, targets, reference=(params, hidden))
    np.testing.assert_allclose(same.full_kl, 0, atol=1e-6)


def test_peaked_distribution_stays_finite() -> None:
    params, hidden, targets = random_case()
    stats = statistics_of(params, 200 * hidden, targets, reference=(params, -200 * hidden))
    for values in stats:
        assert np.all(np.isfinite(values))
    assert np.all(np.asarray(stats.entropy) >= -1e-3)  # logits in the thousands round to 2e-4
    assert np.asarray(stats.logprobs).min() < -100


@pytest.mark.parametrize("temperature", everyday((1e-5, 1e-3), 0))
def test_small_temperatures_equal_float64(temperature: float) -> None:
    """Of hidden states that make logits as near to one another; the gradient stays finite and is the softmax's."""
    params, hidden, targets = random_case()
    hidden = hidden * temperature
    logits = llama.logits(params, CONFIG, hidden)
    stats = statistics_of(params, hidden, targets, temperature)
    exact = log_softmax(logits, temperature)
    chosen = np.take_along_axis(exact, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(stats.logprobs, chosen, atol=2e-5)
    np.testing.assert_allclose(stats.entropy, -np.sum(np.exp(exact) * exact, axis=-1), atol=2e-5)
    gradient = jax.grad(lambda states: statistics_of(params, states, targets, temperature).logprobs.sum())(hidden)
    weight = np.asarray(params["model"]["embed_tokens"]["weight"], np.float64)
    expected = (weight[np.asarray(targets)] - np.exp(exact) @ weight) / temperature
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    far = statistics_of(params, hidden * 1e4, targets, temperature)
    assert np.all(np.isfinite(far.logprobs)) and np.all(np.isfinite(far.entropy))


@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0])
def test_equal_torch_cross_entropy_in_value_and_gradient(temperature: float) -> None:
    torch = pytest.importorskip("torch")
    params, hidden, targets = random_case()
    weights = np.random.default_rng(5).standard_normal(targets.shape).astype(np.float32)

    def weighted(params: llama.Params, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = token_statistics(params, CONFIG, hidden, targets, temperature, 5).logprobs
        return jnp.sum(weights * logprobs), logprobs

    (_, logprobs), grads = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(params, hidden)
    head = torch.tensor(np.asarray(params["model"]["embed_tokens"]["weight"], np.float64), requires_grad=True)
    states = torch.tensor(np.asarray(hidden, np.float64), requires_grad=True)
    logits = (states @ head.T / temperature).flatten(0, 1)
    labels = torch.tensor(np.asarray(targets), dtype=torch.int64).flatten()
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").reshape(targets.shape)
    (-losses * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(logprobs, -losses.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(grads[1], states.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(grads[0]["model"]["embed_tokens"]["weight"], head.grad.numpy(), atol=2e-5)


@pytest.mark.parametrize("chunk", everyday((1, 7, 512), 1))
def test_chunk_size_changes_neither_values_nor_gradients(chunk: int) -> None:
    params, hidden, targets = random_case((3, 9))  # 27 tokens: chunks of 7 do not divide them
    reference = random_case((3, 9), seed=2)[:2]
    weights = jnp.asarray(np.random.default_rng(5).standard_normal((2, 3, 9)), jnp.float32)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def weighted(params: llama.Params, hidden: jax.Array, chunk: int) -> tuple[jax.Array, TokenStatistics]:
        stats = token_statistics(params, CONFIG, hidden, targets, TEMPERATURE, chunk, reference)
        return jnp.sum(weights[0] * stats.logprobs + weights[1] * stats.full_kl), stats

    whole, chunked = weighted(params, hidden, 27), weighted(params, hidden, chunk)
    for left, right in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(left, right, atol=3e-5, rtol=1e-4)
    assert float(jnp.abs(whole[1][1]).max()) > 0.1


def test_entropy_carries_no_gradient() -> None:
    params, hidden, targets = random_case()
    gradient = jax.grad(lambda h: jnp.sum(token_statistics(params, CONFIG, h, targets, 1.0, 7).entropy))(hidden)
    np.testing.assert_array_equal(gradient, 0)


def test_half_precision_inputs_give_float32_statistics() -> None:
    params, hidden, targets = random_case()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, hidden))
    stats = statistics_of(*half, targets)
    exact = statistics_of(*jax.tree.map(lambda x: x.astype(jnp.float32), half), targets)
    for values, expected in zip(stats, exact, strict=True):
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, expected, atol=1e-4)  # the head's products are added up in float32


# --- memory ----------------------------------------------------------------------------------------------------------

BIG_VOCABULARY, BIG_TOKENS = 32768, 2048


def temporary_bytes(chunk: int, with_reference: bool) -> int:
    """Temporaries of the compiled value and gradient, nothing run."""
    config = tiny_config(vocab_size=BIG_VOCABULARY, hidden_size=16)
    weight = jax.ShapeDtypeStruct((BIG_VOCABULARY, 16), jnp.float32)
    hidden = jax.ShapeDtypeStruct((2, BIG_TOKENS // 2, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((2, BIG_TOKENS // 2), jnp.int32)

    def loss(weight: jax.Array, hidden: jax.Array, targets: jax.Array, other: jax.Array) -> jax.Array:
        heads = ({"model": {"embed_tokens": {"weight": w}}} for w in (weight, other))
        params, frozen = heads
        reference = (frozen, hidden) if with_reference else None
        stats = token_statistics(params, config, hidden, targets, TEMPERATURE, chunk, reference)
        return jnp.sum(stats.logprobs + stats.full_kl)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    analysis = gradient.lower(weight, hidden, targets, weight).compile().memory_analysis()
    if analysis is None:
        pytest.skip("this backend reports no memory analysis")
    return analysis.temp_size_in_bytes


@pytest.mark.full  # compiled as training compiles it, optimisations included
@pytest.mark.parametrize("with_reference", [False, True], ids=["logprobs", "full_kl"])
def test_logits_never_exist_whole(with_reference: bool) -> None:
    logits_bytes = BIG_TOKENS * BIG_VOCABULARY * 4
    assert temporary_bytes(128, with_reference) < logits_bytes / 2
    assert temporary_bytes(BIG_TOKENS, with_reference) >= logits_bytes
