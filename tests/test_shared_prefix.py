"""Learning with one pass over a prompt for all rows that continue it, and with completions only as wide as needed:
the same numbers as the plain form, row by row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from everyday import everyday
from lsp_jax.learn import batch as batches
from lsp_jax.learn.batch import LearnBatch, Rows, Sampled, by_length, make_rows, width_bucket, widths
from lsp_jax.learn.logprobs import completion_hidden
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.update import gradients, reference_logprobs
from lsp_jax.model import llama
from specs import hyper, learner_spec
from tiny import EOS, VOCABULARY, tiny_config, tiny_params

QUICK_COMPILES = True  # the time goes into compiling
CONFIG = tiny_config()
OPT = OptimizerConfig(micro_batch_size=8, logprob_chunk=16, remat="none")
TEMPERATURES = (0.7, 1.3)
GROUP, WIDTH, COLUMNS = 4, 6, 8


@pytest.fixture(scope="module")
def params() -> llama.Params:
    return tiny_params(CONFIG)


@pytest.fixture(scope="module")
def reference_params() -> llama.Params:
    return tiny_params(CONFIG, seed=50)


def group_rows(groups: int, group: int = GROUP, seed: int = 0, columns: int = COLUMNS) -> Rows:
    """`group` completions of 1 to `columns` tokens for each of `groups` prompts of 1 to WIDTH tokens, padded with stop
    ids; the second row is outside the loss."""
    rng = np.random.default_rng(seed)
    count = groups * group
    prompts = rng.integers(0, VOCABULARY, (groups, WIDTH)), rng.permutation(np.arange(groups) % WIDTH + 1)
    lengths = rng.permutation(np.arange(count) % columns + 1)
    completions = np.where(np.arange(columns) < lengths[:, None], rng.integers(0, VOCABULARY, (count, columns)), EOS)
    noise = rng.standard_normal((count, columns)).astype(np.float32)
    return make_rows(
        prompts=tuple(jnp.repeat(jnp.asarray(x, jnp.int32), group, axis=0) for x in prompts),  # pyright: ignore
        sampled=Sampled(
            tokens=jnp.asarray(completions, jnp.int32),
            lengths=jnp.asarray(lengths, jnp.int32),
            logprobs=jnp.asarray(noise),
            log_mass=jnp.zeros((count, columns)),
        ),
        advantages_B=jnp.asarray(rng.standard_normal(count), jnp.float32),
        counts_B=jnp.arange(count) != 1,
        scale=1.0,
        loss_type="sequence",
    )


def learned(
    params: llama.Params,
    reference_params: llama.Params,
    batch: LearnBatch,
    sharing: tuple[int, int],
    opt: OptimizerConfig = OPT,
    loss: LossConfig | None = None,
) -> tuple[Any, Any, Any]:
    """The reference's log-probabilities, gradient and metrics; compiled anew in every call."""
    loss = loss or LossConfig(beta=0.2)
    spec = learner_spec(CONFIG, loss, opt, TEMPERATURES, sharing)

    def anew(stage: Any) -> Any:
        return jax.jit(partial(stage.__wrapped__, spec=spec))  # a stage keeps its programs, whatever NARROWEST is

    references = anew(reference_logprobs)(reference_params, batch)._replace(params=reference_params)
    return (references, *anew(gradients)(params, batch, references, hyper(loss, opt)))


def difference(left: Any, right: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, left, right)) / optax.tree.norm(right))


def assert_same(got: tuple[Any, Any, Any], plain: tuple[Any, Any, Any], batch: LearnBatch) -> None:
    for role, rows in batch._asdict().items():
        if rows is not None:
            ours, theirs = getattr(got[0], role), getattr(plain[0], role)
            np.testing.assert_allclose(ours.logprobs[rows.mask], theirs.logprobs[rows.mask], rtol=1e-4, atol=1e-4)
    assert difference(got[1], plain[1]) < 1e-5
    for name, value in plain[2].items():
        np.testing.assert_allclose(got[2][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# --- shared prompts ------------------------------------------------------------------------------------------------


CASES = [
    {"micro_batch_size": 12},  # the last micro-batch filled up with groups without weight
    {"micro_batch_size": 2, "remat": "full"},  # half a group
    {"micro_batch_size": 3, "remat": "dots"},  # no divisor: two rows at a time
]
RARE = [
    {"micro_batch_size": 8},  # whole groups
    {"micro_batch_size": 6},  # no multiple: one group at a time
    {"micro_batch_size": 1},  # nothing to share
]
RARE = [pytest.param(case, marks=pytest.mark.slow) for case in RARE]


@pytest.mark.parametrize("change", [*everyday(CASES, 1), *RARE], ids=str)
def test_gradient_reference_and_metrics_equal_those_of_the_plain_form(
    params: llama.Params, reference_params: llama.Params, change: dict[str, Any]
) -> None:
    """The Solver's five groups of four, and the Challenger's single group of six, all of unequal lengths."""
    batch = LearnBatch(group_rows(5), group_rows(1, 6, seed=1))
    plain = learned(params, reference_params, batch, (1, 1))
    assert float(optax.tree.norm(plain[1])) > 0.1
    got = learned(params, reference_params, batch, (GROUP, 6), replace(OPT, **change))
    assert_same(got, plain, batch)


@pytest.mark.full
def test_exact_kl_shares_prompts_too(params: llama.Params, reference_params: llama.Params) -> None:
    batch, loss = LearnBatch(group_rows(3), None), LossConfig(beta=1.0, kl_estimator="full")
    plain = learned(params, reference_params, batch, (1, 1), loss=loss)
    assert_same(learned(params, reference_params, batch, (GROUP, 1), loss=loss), plain, batch)


@pytest.mark.full
def test_completions_of_one_token(params: llama.Params, reference_params: llama.Params) -> None:
    """All of them are predicted from the prompt alone."""
    batch = LearnBatch(group_rows(3, columns=1), None)
    plain = learned(params, reference_params, batch, (1, 1))
    assert_same(learned(params, reference_params, batch, (GROUP, 1)), plain, batch)


def test_a_prompt_is_run_once(params: llama.Params) -> None:
    """Operations of the pass, as compiled: without sharing every row runs its own copy of the prompt."""
    rows = group_rows(2)

    def operations(share: int) -> float:
        run = jax.jit(partial(completion_hidden, config=CONFIG, share=share))
        analysis = run.lower(params, rows=rows).compile().cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    tokens = {1: 8 * (WIDTH + COLUMNS), GROUP: 2 * WIDTH + 8 * (COLUMNS - 1)}
    assert operations(GROUP) / operations(1) == pytest.approx(tokens[GROUP] / tokens[1], rel=0.15)


# --- only as wide as needed ----------------------------------------------------------------------------------------


def test_widths_are_few_and_not_narrow() -> None:
    assert widths(20) == (20,) and widths(63) == (63,)
    assert widths(64) == (32, 64) and widths(100) == (50, 100)
    assert widths(512) == (128, 256, 512) and widths(130) == (33, 65, 130)


@pytest.mark.parametrize(("longest", "index"), [(0, 0), (2, 0), (3, 1), (4, 1), (5, 2), (8, 2)])
def test_the_narrowest_that_holds_what_counts(longest: int, index: int) -> None:
    rows = group_rows(1)
    rows = rows._replace(completion_lengths=jnp.asarray([0, 8, longest, 0]))  # the second row is outside the loss
    assert int(width_bucket(rows, (2, 4, 8))) == index


def test_rows_are_sorted_inside_their_groups_and_groups_among_themselves() -> None:
    rows = group_rows(3)
    ordered = by_length(rows, GROUP, rows.weights > 0)
    counted = np.where(ordered.weights > 0, ordered.completion_lengths, 0).reshape(3, GROUP)
    assert (np.diff(counted, axis=1) <= 0).all() and (np.diff(counted[:, 0]) <= 0).all()
    original = [tuple(np.asarray(x)[n].tobytes() for x in rows if x is not None) for n in range(12)]
    moved = [tuple(np.asarray(x)[n].tobytes() for x in ordered if x is not None) for n in range(12)]
    assert sorted(original) == sorted(moved) and original != moved
    for group in range(3):
        start = GROUP * (original.index(moved[GROUP * group]) // GROUP)
        assert sorted(moved[GROUP * group : GROUP * (group + 1)]) == sorted(original[start : start + GROUP])


@pytest.mark.full
@pytest.mark.parametrize("sharing", [pytest.param((1, 1), marks=pytest.mark.slow), (GROUP, 6)], ids=str)
def test_width_changes_no_number(
    params: llama.Params, reference_params: llama.Params, sharing: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of two rows of one length or nearly so: each of the three widths is used."""
    solver, challenger = group_rows(5), group_rows(1, 6, seed=1)
    batch = LearnBatch(by_length(solver, GROUP, solver.weights > 0), by_length(challenger, 6, challenger.weights > 0))
    opt = replace(OPT, micro_batch_size=2)
    plain = learned(params, reference_params, batch, (1, 1), opt)
    monkeypatch.setattr(batches, "NARROWEST", 2)
    columns = widths(COLUMNS)
    assert columns == (2, 4, 8)
    parts = batches.micro_batches(batch.solver, 2)
    used = {int(width_bucket(jax.tree.map(lambda x, n=n: x[n], parts), columns)) for n in range(10)}
    assert used == {0, 1, 2}
    assert_same(learned(params, reference_params, batch, sharing, opt), plain, batch)
