"""What the Challenger has asked: the ring, how near a query is to earlier ones, clusters; against numpy in float64."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.learn import novelty as memories
from lsp_jax.learn.novelty import COUNT, EMBEDDINGS, MemoryConfig

QUICK_COMPILES = True  # shares programs with the other modules that play the tiny game
RNG = np.random.default_rng(0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_newest_stay():
    """Two rounds and a half of a ring of 4, three at a time: each in its place, the count goes on."""
    memory = memories.empty(4, 2)
    for start in range(0, 9, 3):
        rows = jnp.stack([jnp.arange(start, start + 3.0), jnp.ones(3)], axis=1)
        memory = jax.jit(memories.remember)(memory, rows)
    assert int(memory[COUNT]) == 9
    assert sorted(np.asarray(memory[EMBEDDINGS][:, 0]).tolist()) == [5, 6, 7, 8]
    assert float(memory[EMBEDDINGS][8 % 4, 0]) == 8


def test_pooled_is_the_mean_of_real_tokens():
    hidden, lengths = RNG.normal(size=(3, 5, 8)), np.array([5, 2, 1])
    hidden[1, 2:] = np.nan  # padding may hold anything
    expected = unit(np.stack([hidden[n, :length].mean(axis=0) for n, length in enumerate(lengths)]))
    found = memories.pooled(jnp.asarray(hidden, jnp.float32), jnp.asarray(lengths))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("known", [0, 3, 6])
def test_similarities_against_numpy(known: int):
    """About the mean of all while there are few; what is not filled yet has no part in it."""
    old, new = unit(RNG.normal(size=(known, 8)) + 3), unit(RNG.normal(size=(4, 8)) + 3)
    new[2] = new[0]
    memory = memories.remember(memories.empty(6, 8), jnp.asarray(old, jnp.float32))
    to_memory, among = memories.similarities(memory, jnp.asarray(new, jnp.float32))
    mean = np.concatenate([old, new]).mean(axis=0)
    a, b = unit(new - mean), unit(old - mean) if known else np.zeros((0, 8))
    np.testing.assert_allclose(np.asarray(to_memory)[:, :known], a @ b.T, atol=1e-5)
    assert (np.asarray(to_memory)[:, known:] == -1).all()
    np.testing.assert_allclose(among, np.where(new @ new.T > memories.SAME, 1, a @ a.T), atol=1e-5)
    near = np.asarray(memories.nearest(to_memory, among))
    expected = [max([-1.0, *(a[n] @ b.T), *(a[n] @ a[:n].T)]) for n in range(4)]
    np.testing.assert_allclose(near, expected, atol=1e-5)
    assert near[2] == pytest.approx(1, abs=1e-5), "the second of two equal ones"


def test_a_collapse_does_not_hide_itself():
    """Varied queries for a while, then paraphrases of one until nothing else is remembered: they stay near."""
    common = np.ones(16) * 2
    memory = memories.empty(64, 16)
    for _ in range(20):
        varied = unit(RNG.normal(size=(8, 16)) + common)
        memory = memories.remember(memory, jnp.asarray(varied, jnp.float32))
    one = RNG.normal(size=16) + common
    for _ in range(50):
        alike = jnp.asarray(unit(one + 0.05 * RNG.normal(size=(8, 16))), jnp.float32)
        to_memory, among = memories.similarities(memory, alike)
        memory = memories.remember(memory, alike)
    assert float(memories.nearest(to_memory, among).min()) > 0.9
    assert float(memories.cluster_entropy(among, 0.9)) == pytest.approx(0, abs=1e-6)


def test_the_same_query_from_the_start_is_the_same():
    """With nothing else asked the centre is the query itself, and what is left of it is rounding."""
    memory, same = memories.empty(64, 16), jnp.tile(jnp.asarray(unit(RNG.normal(size=(1, 16))), jnp.float32), (4, 1))
    for _ in range(3):
        to_memory, among = memories.similarities(memory, same)
        memory = memories.remember(memory, same)
    assert (np.asarray(memories.nearest(to_memory, among)) == 1).all()
    assert float(memories.cluster_entropy(among, 0.9)) == 0


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ([], 1.0),
        ([(0, 1), (1, 2), (2, 3)], 0.0),  # a chain is one cluster
        ([(0, 1), (2, 3)], 0.5),  # two of two: log 2 over log 4
        ([(0, 3)], (0.5 * np.log(2) + 0.5 * np.log(4)) / np.log(4)),
    ],
)
def test_cluster_entropy_by_hand(links: list[tuple[int, int]], expected: float):
    among = np.eye(4)
    for a, b in links:
        among[a, b] = among[b, a] = 0.95
    assert float(memories.cluster_entropy(jnp.asarray(among), 0.9)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "field"), [(MemoryConfig(size=7), "memory.size"), (MemoryConfig(near_duplicate=1.1), "near_duplicate")]
)
def test_settings_that_cannot_be_used(config: MemoryConfig, field: str):
    with pytest.raises(InputError, match=field):
        config.check(8)


@pytest.mark.full
def test_a_run_remembers_its_queries(game_model: Path, tmp_path: Path):
    """The embeddings in the state are those of the queries that were played, made here from a whole forward pass."""
    import lsp_jax as lsp
    from lsp_jax.training.setup import setup
    from test_resume import config_of
    from test_trainer import host_reward, read_lines

    config = config_of(game_model, tmp_path / "run", max_steps=2)
    state = lsp.train(config, rewards=[host_reward()])
    assert state.memory is not None and int(state.memory[COUNT]) == 8
    run, _ = setup(config_of(game_model, tmp_path / "other"), [host_reward()])
    run.workers.close()
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert all(0 <= line["queries/near_duplicate_fraction"] <= 1 for line in metrics)
    found = np.asarray(state.memory[EMBEDDINGS])
    np.testing.assert_allclose(np.linalg.norm(found[:8], axis=1), 1, atol=1e-5)
    assert not found[8:].any()
