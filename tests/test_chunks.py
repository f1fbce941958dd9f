"""Decoding chunk by chunk: the tokens of the single program, with finished rows dropped and a cache that grows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from everyday import everyday
from lsp_jax.core import runtime
from lsp_jax.core.stage import Backend, execute
from lsp_jax.model import llama
from lsp_jax.model.sharding import AXES
from lsp_jax.play import chunked_decode as chunking
from lsp_jax.play.chunked_decode import (
    cache_lengths,
    decode_chunk,
    decode_in_chunks,
    grow_cache,
    precompile,
    prefill,
    row_counts,
    unstack,
)
from lsp_jax.play.decode import Completions, DecodeSpec
from lsp_jax.play.generate import complete
from lsp_jax.play.sampler import SamplingConfig, row_keys
from tiny import VOCABULARY, tiny_config, tiny_params

QUICK_COMPILES = True  # the time goes into compiling
CONFIG = tiny_config()
SAMPLING = SamplingConfig(temperature=0.9)
STOPS = tuple(range(0, VOCABULARY, 9))  # about one token in nine ends a row: lengths are spread
COLUMNS = 24


@pytest.fixture(scope="module")
def params() -> llama.Params:
    return tiny_params(CONFIG)


def prompts(number: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(number)
    return jnp.asarray(rng.integers(0, VOCABULARY, (number, 7)), jnp.int32), jnp.asarray(rng.integers(1, 8, number))


def whole(params: llama.Params, number: int, repeats: int, stops: tuple[int, ...], sampling: Any) -> Completions:
    spec = DecodeSpec(CONFIG, sampling, COLUMNS, stops)
    return complete(params, prompts(number), jax.random.key(5), jnp.int32(0), spec, repeats)


def chunked(
    params: llama.Params, number: int, repeats: int, stops: tuple[int, ...], chunk: int, sampling: Any = SAMPLING
) -> Completions:
    keys = row_keys(jax.random.key(5), number * repeats)
    return decode_in_chunks(params, prompts(number), keys, DecodeSpec(CONFIG, sampling, COLUMNS, stops, chunk))


CASES = [(4, 4, 4), (3, 4, 7), (4, 4, 24), (4, 4, 100)]
LONG = [pytest.param(case, marks=pytest.mark.slow) for case in ((1, 16, 5), (16, 1, 1))]


@pytest.mark.parametrize("case", [*everyday(CASES, 0), *LONG], ids=str)
def test_chunks_give_the_single_programs_tokens(
    params: llama.Params, case: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several prompts, one for all rows, one for each; chunks that divide the length and that do not."""
    number, repeats, chunk = case
    monkeypatch.setattr(chunking, "SHORTEST_CACHE", 6)
    expected = whole(params, number, repeats, STOPS, SAMPLING)
    got = chunked(params, number, repeats, STOPS, chunk)
    spread = np.asarray(expected.lengths)
    assert spread.min() <= 4 and spread.max() >= 12 and len(set(spread)) > 5
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_truncated_sampling_and_forced_length(params: llama.Params) -> None:
    sampling = SamplingConfig(temperature=0.8, top_k=9)
    expected, got = whole(params, 2, 4, (), sampling), chunked(params, 2, 4, (), 10, sampling)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.log_mass, expected.log_mass, rtol=1e-4, atol=1e-5)
    assert (np.asarray(got.lengths) == COLUMNS).all() and not np.asarray(got.stopped).any()


def test_what_the_chunks_work_on(params: llama.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows only fall and the cache only grows, to what the rows that still run need; one read a chunk, none after
    the last; nothing runs on when all have stopped."""
    monkeypatch.setattr(chunking, "SHORTEST_CACHE", 6)
    seen: list[tuple[int, int, int]] = []

    def watched(stage: Any, *arrays: Any, **static: Any) -> Any:
        if stage is not decode_chunk:
            return execute(stage, *arrays, **static)
        until, rows = 4 * (len(seen) + 1), arrays[-1]
        seen.append((until, rows.token.shape[0], rows.cache.columns))
        rows, alive = execute(stage, *arrays, **static)
        assert int(rows.column) == until - 1 or int(alive) == 0
        return rows, alive

    spec, reads = DecodeSpec(CONFIG, SAMPLING, COLUMNS, STOPS, chunk=4), runtime.reads()
    done = decode_in_chunks(params, prompts(4), row_keys(jax.random.key(5), 16), spec, Backend(call=watched))
    lengths = np.asarray(done.lengths)
    assert len(seen) == -(-lengths.max() // 4)
    assert runtime.reads() - reads == min(len(seen), COLUMNS // 4 - 1)
    number = 16
    for until, rows, cache in seen:
        alive = int((lengths > until - 4).sum()) if until > 4 else 16
        number = min(count for count in row_counts(16) if count >= min(alive, number))
        assert rows == number
        assert cache == next(size for size in (6, 12, 24) if size >= until)
    assert seen[-1][1] < 16


@pytest.mark.full
def test_precompiled_chunks_compile_nothing(params: llama.Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the lengths: other prompts, other noise, no compilation."""
    monkeypatch.setattr(chunking, "SHORTEST_CACHE", 6)
    spec = DecodeSpec(CONFIG, SAMPLING, COLUMNS, STOPS, chunk=3)
    tokens, lengths = prompts(4)
    keys = [row_keys(jax.random.key(seed), 16) for seed in range(20)]
    other = [(tokens + seed) % VOCABULARY for seed in range(20)]
    precompile(params, (tokens, lengths), keys[0], spec)
    compiled, shapes = runtime.compiles()[0], set()
    for seed in range(20):
        done = decode_in_chunks(params, (other[seed], lengths), keys[seed], spec)
        shapes.add(tuple(sorted(np.asarray(done.lengths).tolist())))
    assert len(shapes) == 20 and runtime.compiles()[0] == compiled


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_chunk_writes_its_cache_in_place(kv_heads: int) -> None:
    """No second cache is made, whatever the heads (with one of them XLA for CPUs once copied it every step), and the
    tokens are those of log-probabilities that a whole forward pass gives too."""
    config = tiny_config(num_key_value_heads=kv_heads)
    params, spec = tiny_params(config), DecodeSpec(config, SAMPLING, 512, chunk=9)
    keys = row_keys(jax.random.key(1), 8)
    prefix, rows = prefill(params, prompts(4), keys, spec=spec, cache_columns=64)
    rows, layers = grow_cache(rows, columns=512), unstack(params, config=config)
    program = decode_chunk.lower(params, layers, prefix, rows, spec=spec).compile()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(rows.cache))
    assert program.memory_analysis().temp_size_in_bytes < cache / 2
    done = decode_chunk(params, layers, prefix, rows, spec=spec)[0].done
    tokens, lengths = (np.repeat(x, 2, axis=0) for x in prompts(4))
    for row in range(8):
        whole = np.concatenate([tokens[row, : lengths[row]], done.tokens[row, :9]])
        logits = llama.forward(params, config, jnp.asarray(whole)[None])[0] / SAMPLING.temperature
        taken = jax.nn.log_softmax(logits)[np.arange(lengths[row] - 1, len(whole) - 1), whole[lengths[row] :]]
        np.testing.assert_allclose(done.logprobs[row, :9], taken, rtol=1e-4, atol=1e-4)


def test_sizes() -> None:
    assert row_counts(64) == (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
    assert row_counts(12) == (12, 9, 6, 4, 3, 2, 1) and row_counts(7) == (7, 5, 3, 2, 1) and row_counts(1) == (1,)
    with use_abstract_mesh(AbstractMesh((1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)):
        assert row_counts(64) == (64, 48, 32, 24, 16, 12, 8, 4) and row_counts(6) == (6, 4)
    assert cache_lengths(20) == (20,) and cache_lengths(64) == (64,)
    assert cache_lengths(65) == (33, 65) and cache_lengths(512) == (64, 128, 256, 512)
