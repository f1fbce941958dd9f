"""The update: gradients however they are split, the joint gradient, clipped AdamW steps against torch and by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.learn.batch import LearnBatch, Rows, Sampled, make_rows
from lsp_jax.learn.losses import KL_ESTIMATORS, LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig, TrainState, apply_gradients, init_state
from lsp_jax.learn.update import gradients, reference_logprobs
from lsp_jax.model import llama
from specs import hyper, learner_spec
from tiny import EOS, VOCABULARY, tiny_config, tiny_params

QUICK_COMPILES = True  # the time goes into compiling
CONFIG = tiny_config()
OPT = OptimizerConfig(micro_batch_size=8, logprob_chunk=16, remat="none")
LOSS = LossConfig(beta=0.2)
ALPHA = 0.6
TEMPERATURES = (0.7, 1.3)  # Solver, Challenger

jit_apply = jax.jit(apply_gradients, static_argnames="spec")
jit_forward = jax.jit(llama.forward, static_argnums=1)


@pytest.fixture(scope="module")
def params() -> llama.Params:
    return tiny_params(CONFIG, seed=0)


@pytest.fixture(scope="module")
def reference_params() -> llama.Params:
    return tiny_params(CONFIG, seed=50)


def make_role(
    count: int, seed: int, scale: float, loss_type: str = "sequence", extra: int = 0, masked: int | None = None
) -> Rows:
    """`count` rows of unequal lengths; `extra` columns of padding; row `masked` out of the loss."""
    rng = np.random.default_rng(seed)
    prompt_lengths, lengths = rng.integers(1, 6, count), rng.permutation(np.arange(count) % 7 + 1)
    advantages = rng.standard_normal(count)
    prompts = rng.integers(0, VOCABULARY, (count, 5))
    completions = rng.integers(0, VOCABULARY, (count, 7))

    def widen(tokens: np.ndarray) -> jax.Array:
        return jnp.asarray(np.pad(tokens, ((0, 0), (0, extra)), constant_values=EOS), jnp.int32)

    return make_rows(
        prompts=(widen(prompts), jnp.asarray(prompt_lengths, jnp.int32)),
        sampled=Sampled(
            tokens=widen(completions),
            lengths=jnp.asarray(lengths, jnp.int32),
            logprobs=jnp.zeros((count, 7 + extra)),
            log_mass=jnp.zeros((count, 7 + extra)),
        ),
        advantages_B=jnp.asarray(advantages, jnp.float32),
        counts_B=jnp.arange(count) != (-1 if masked is None else masked),
        scale=scale,
        loss_type=loss_type,
    )


def make_batch(count: int = 8, loss: LossConfig = LOSS, alpha: float = ALPHA, extra: int = 0) -> LearnBatch:
    solver = make_role(count, 1, 1.0, loss.loss_type, extra, masked=2)
    return LearnBatch(solver, make_role(5, 2, alpha, loss.loss_type, extra))


def compute(
    params: llama.Params,
    reference_params: llama.Params,
    batch: LearnBatch,
    loss: LossConfig = LOSS,
    opt: OptimizerConfig = OPT,
    config: Any = CONFIG,
    temperatures: tuple[float, float] = TEMPERATURES,
) -> tuple[llama.Params, dict[str, jax.Array]]:
    # one compiled reference for all that follows: only the estimator and the model's shape matter to it
    estimator = LossConfig(kl_estimator=loss.kl_estimator)
    references = reference_logprobs(reference_params, batch, learner_spec(config, estimator, OPT, temperatures))
    references = references._replace(params=reference_params)
    return gradients(params, batch, references, hyper(loss, opt), learner_spec(config, loss, opt, temperatures))


def difference(left: Any, right: Any) -> float:
    """Norm of the difference, relative to the norm."""
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, left, right)) / optax.tree.norm(right))


def assert_identical(left: Any, right: Any) -> None:
    """Bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- one plain calculation ---------------------------------------------------------------------------------------


def plain_loss(
    params: llama.Params, reference_params: llama.Params, rows: Rows, loss: LossConfig, temperature: float
) -> jax.Array:
    """The loss of one role from full logits, all rows at once, no chunk, no micro-batch."""

    def log_policy(params: llama.Params) -> jax.Array:
        return jax.nn.log_softmax(llama.forward(params, CONFIG, rows.tokens) / temperature, axis=-1)

    plain = jax.tree.map(np.asarray, rows)
    places = [
        (row, int(start) + t)
        for row, (start, size) in enumerate(zip(plain.prompt_lengths, plain.completion_lengths, strict=True))
        for t in range(size)
        if plain.weights[row] > 0
    ]
    row, column = np.array(places).T
    here = log_policy(params)[row, column - 1]  # [tokens, V]
    there = jax.lax.stop_gradient(log_policy(reference_params))[row, column - 1]
    picked = (np.arange(len(row)), plain.tokens[row, column])
    d = here[picked] - there[picked]
    terms = {
        "k1": d,
        "k2": 0.5 * d**2,
        "k3": jnp.exp(-d) - 1 + d,
        "full": jnp.sum(jnp.exp(here) * (here - there), axis=-1),
    }
    gain = here[picked] * plain.advantages[row] - loss.beta * terms[loss.kl_estimator]
    return -jnp.sum(plain.weights[row] * gain)


@pytest.mark.full
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_gradient_equals_that_of_full_logits(
    params: llama.Params, reference_params: llama.Params, estimator: Any
) -> None:
    loss = LossConfig(beta=0.2, kl_estimator=estimator)
    rows = make_role(4, 3, 1.0, masked=1)
    got, _ = compute(params, reference_params, LearnBatch(rows, None), loss, replace(OPT, micro_batch_size=2))
    expected = jax.jit(jax.grad(lambda p: plain_loss(p, reference_params, rows, loss, TEMPERATURES[0])))(params)
    assert difference(got, expected) < 1e-5


@pytest.mark.full
def test_full_kl_alone_equals_enumeration(params: llama.Params, reference_params: llama.Params) -> None:
    """Advantages 0 and beta 1: value and gradient of the exact KL over the vocabulary, both roles."""
    loss = LossConfig(beta=1.0, kl_estimator="full")
    batch = make_batch(4, loss)
    solver, challenger = (rows._replace(advantages=jnp.zeros_like(rows.advantages)) for rows in batch)
    batch = LearnBatch(solver, challenger)
    got, metrics = compute(params, reference_params, batch, loss, replace(OPT, micro_batch_size=3))

    def exact(params: llama.Params) -> jax.Array:
        total = jnp.zeros(())
        for rows, temperature in zip((solver, challenger), TEMPERATURES, strict=True):
            logp, ref_logp = (
                jax.nn.log_softmax(llama.forward(p, CONFIG, rows.tokens) / temperature, axis=-1)
                for p in (params, reference_params)
            )
            kl = jnp.sum(jnp.exp(logp) * (logp - ref_logp), axis=-1)  # at every column of the row
            columns = jnp.arange(rows.tokens.shape[1])[None] + 1  # the column that each one predicts
            start, size = rows.prompt_lengths[:, None], rows.completion_lengths[:, None]
            inside = (columns >= start) & (columns < start + size)
            total = total + jnp.sum(rows.weights * jnp.sum(jnp.where(inside, kl, 0), axis=1))
        return total

    value, expected = jax.jit(jax.value_and_grad(exact))(params)
    assert difference(got, expected) < 1e-5
    # the loss is what is minimised: minus the gain (the ratios' value, times advantage 0), plus beta times the KL
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)


# --- accumulation ------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("count", "loss_type", "joint", "sizes"),
    [
        (8, "sequence", True, (2,)),
        (7, "sequence", False, (1, 4)),
        (7, "token_mean", False, (2,)),
        (8, "constant_length", False, (4,)),
        pytest.param(8, "sequence", False, (1, 2, 4), marks=pytest.mark.slow),
        pytest.param(7, "sequence", False, (2,), marks=pytest.mark.slow),
        pytest.param(8, "token_mean", False, (1, 2, 4), marks=pytest.mark.slow),
        pytest.param(7, "constant_length", False, (1, 2, 4), marks=pytest.mark.slow),
    ],
)
def test_micro_batches_add_up_to_the_same_gradient(
    params: llama.Params,
    reference_params: llama.Params,
    count: int,
    loss_type: Any,
    joint: bool,
    sizes: tuple[int, ...],
) -> None:
    """All rows at once against micro-batches, the last one filled up with empty rows where they do not divide."""
    loss = replace(LOSS, loss_type=loss_type)
    batch = make_batch(count, loss)
    batch = batch if joint else batch._replace(challenger=None)
    assert len(np.unique(batch.solver.completion_lengths)) > 4
    whole, metrics = compute(params, reference_params, batch, loss)
    assert float(optax.tree.norm(whole)) > 0.1

    def sgd_step(grads: llama.Params) -> llama.Params:
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    for size in sizes:
        opt = replace(OPT, micro_batch_size=size)
        grads, parts_metrics = compute(params, reference_params, batch, loss, opt)
        assert difference(grads, whole) < 1e-5
        assert difference(sgd_step(grads), sgd_step(whole)) < 1e-6
        for name, value in metrics.items():
            np.testing.assert_allclose(parts_metrics[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("change", [{"extra": 6}, {"chunk": 1}, {"chunk": 512}, {"remat": "full"}], ids=str)
def test_padding_chunk_and_remat_change_no_gradient(
    params: llama.Params, reference_params: llama.Params, change: dict[str, int]
) -> None:
    solver = make_batch().solver
    whole, _ = compute(params, reference_params, LearnBatch(solver, None))
    opt = replace(
        OPT,
        logprob_chunk=change.get("chunk", OPT.logprob_chunk),
        remat=str(change.get("remat", "none")),
        micro_batch_size=4,
    )
    batch = LearnBatch(make_batch(extra=change.get("extra", 0)).solver, None)
    assert difference(compute(params, reference_params, batch, opt=opt)[0], whole) < 1e-5


# --- the joint gradient --------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("loss_type", ["sequence", pytest.param("token_mean", marks=pytest.mark.full)])
def test_joint_gradient_is_solvers_plus_alpha_times_challengers(
    params: llama.Params, reference_params: llama.Params, loss_type: Any
) -> None:
    loss = replace(LOSS, loss_type=loss_type)
    batch = make_batch(loss=loss)
    joint, metrics = compute(params, reference_params, batch, loss)
    solver, solver_metrics = compute(params, reference_params, LearnBatch(batch.solver, None), loss)
    assert batch.challenger is not None
    assert not any(name.startswith("challenger/") for name in solver_metrics)

    # the Challenger by itself, in the other place, at its own temperature and with alpha 1
    alone = make_batch(loss=loss, alpha=1.0).challenger
    assert alone is not None
    arguments = params, reference_params, LearnBatch(alone, None), loss
    challenger, challenger_metrics = compute(*arguments, temperatures=TEMPERATURES[::-1])
    assert difference(joint, jax.tree.map(lambda s, c: s + ALPHA * c, solver, challenger)) < 1e-5
    assert difference(joint, solver) > 0.05
    np.testing.assert_allclose(
        metrics["loss"], solver_metrics["loss"] + ALPHA * challenger_metrics["loss"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(metrics["loss"], metrics["solver/loss"] + metrics["challenger/loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["challenger/kl"], challenger_metrics["solver/kl"], rtol=1e-5)


# --- temperature -----------------------------------------------------------------------------------------------------


def exact_logprobs(params: llama.Params, rows: Rows, temperature: float) -> np.ndarray:
    """float64 [B, T] from full logits of whole rows; 0 in the padding."""
    logits = np.asarray(jit_forward(params, CONFIG, rows.tokens), np.float64) / temperature
    logp = logits - logits.max(axis=-1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(axis=-1, keepdims=True))
    out = np.zeros(rows.behaviour_logprobs.shape)
    for row, (start, size) in enumerate(zip(rows.prompt_lengths, rows.completion_lengths, strict=True)):
        for t in range(int(size)):
            out[row, t] = logp[row, int(start) + t - 1, int(rows.tokens[row, int(start) + t])]
    return out


def real(rows: Rows) -> np.ndarray:
    """bool [B, T]: the completion's tokens."""
    return np.arange(rows.behaviour_logprobs.shape[1])[None] < np.asarray(rows.completion_lengths)[:, None]


@pytest.mark.full
@pytest.mark.parametrize("size", [8, 3])
def test_reference_logprobs_at_each_roles_temperature(reference_params: llama.Params, size: int) -> None:
    batch = make_batch()
    spec = learner_spec(CONFIG, LOSS, replace(OPT, micro_batch_size=size), TEMPERATURES)
    references = reference_logprobs(reference_params, batch, spec)
    both = references.solver, references.challenger
    for rows, reference, temperature in zip(batch, both, TEMPERATURES, strict=True):
        exact = exact_logprobs(reference_params, rows, temperature)
        np.testing.assert_allclose(reference.logprobs[real(rows)], exact[real(rows)], atol=5e-5)
        assert reference.hidden is None
    spec = learner_spec(CONFIG, replace(LOSS, kl_estimator="full"), OPT, TEMPERATURES)
    hidden = reference_logprobs(reference_params, batch, spec).solver.hidden
    assert hidden is not None and hidden.shape == (8, 7, CONFIG.hidden_size)


@pytest.mark.full
def test_learner_logprobs_at_each_roles_temperature(params: llama.Params, reference_params: llama.Params) -> None:
    """Behaviour log-probabilities that are the policy's at that temperature give an error of exactly 1, others not."""
    batch = make_batch()
    behaved = LearnBatch(
        *(
            rows._replace(behaviour_logprobs=jnp.asarray(exact_logprobs(params, rows, temperature), jnp.float32))
            for rows, temperature in zip(batch, TEMPERATURES, strict=True)
        )
    )
    _, metrics = compute(params, reference_params, behaved)
    for role, rows, temperature in zip(("solver", "challenger"), batch, TEMPERATURES, strict=True):
        np.testing.assert_allclose(metrics[f"sampling/{role}/token_mult_prob_error"], 1, atol=1e-4)
        counted = real(rows) & (np.asarray(rows.weights) > 0)[:, None]
        d = (exact_logprobs(params, rows, temperature) - exact_logprobs(reference_params, rows, temperature))[counted]
        np.testing.assert_allclose(metrics[f"{role}/kl"], np.mean(np.exp(-d) - 1 + d), rtol=1e-3)
    _, swapped = compute(params, reference_params, behaved, temperatures=TEMPERATURES[::-1])
    assert swapped["sampling/solver/token_mult_prob_error"] > 1.1


@pytest.mark.full
def test_log_mass_bridges_truncated_sampling(params: llama.Params, reference_params: llama.Params) -> None:
    batch = make_batch()
    behaviour = exact_logprobs(params, batch.solver, TEMPERATURES[0]) + 0.3  # renormalised over exp(-0.3) of the mass
    rows = batch.solver._replace(behaviour_logprobs=jnp.asarray(behaviour, jnp.float32))
    without, bridged = (
        compute(params, reference_params, LearnBatch(rows._replace(log_mass=jnp.full((8, 7), mass)), None))[1]
        for mass in (0.0, -0.3)
    )
    np.testing.assert_allclose(without["sampling/solver/token_mult_prob_error"], np.exp(0.3), rtol=1e-4)
    np.testing.assert_allclose(bridged["sampling/solver/token_mult_prob_error"], 1, atol=1e-4)


@pytest.mark.full
def test_policy_at_its_reference_has_no_kl(params: llama.Params) -> None:
    _, metrics = compute(params, params, make_batch())
    for role in ("solver", "challenger"):
        np.testing.assert_allclose(metrics[f"{role}/kl"], 0, atol=1e-6)


# --- lower precision -------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("size", [8, 2])
def test_bfloat16_copy_gives_float32_gradients(params: llama.Params, reference_params: llama.Params, size: int) -> None:
    opt = replace(OPT, micro_batch_size=size)
    batch = LearnBatch(make_role(4, 1, 1.0), None)
    half, half_reference = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, reference_params))
    grads, metrics = compute(half, half_reference, batch, opt=opt)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    rounded, rounded_reference = jax.tree.map(lambda x: x.astype(jnp.float32), (half, half_reference))
    exact, _ = compute(rounded, rounded_reference, batch)
    assert 0 < difference(grads, exact) < 0.1


# --- the step --------------------------------------------------------------------------------------------------------


def small_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = {"a": rng.standard_normal((3, 4)), "b": {"c": rng.standard_normal(5), "d": rng.standard_normal((2, 2, 2))}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


def step(state: TrainState, grads: Any, opt: OptimizerConfig, loss: float = 0.0) -> tuple[TrainState, Any]:
    return jit_apply(state, grads, jnp.float32(loss), spec=opt.spec, hyper=hyper(optimizer=opt))


def moments(state: TrainState) -> Any:
    """Adam's state inside the chain."""
    found = [x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
def test_clipping_equals_a_hand_calculation(limit: float) -> None:
    params = {"w": jnp.asarray([1.0, 2.0]), "v": jnp.asarray([[3.0]])}
    grads = {"w": jnp.asarray([2.0, -1.0]), "v": jnp.asarray([[2.0]])}  # norm 3
    opt = OptimizerConfig(learning_rate=0.1, max_grad_norm=limit)
    state, metrics = step(init_state(params, opt.spec), grads, opt)
    np.testing.assert_allclose(metrics["grad_norm"], 3, rtol=1e-6)  # as it was, before clipping
    factor = min(1.0, limit / 3)
    for name in params:
        np.testing.assert_allclose(moments(state).mu[name], 0.1 * factor * grads[name], rtol=1e-5)
        np.testing.assert_allclose(moments(state).nu[name], 0.001 * (factor * grads[name]) ** 2, rtol=1e-5)
        # the first Adam step is the learning rate against the sign
        np.testing.assert_allclose(state.params[name], params[name] - 0.1 * np.sign(grads[name]), rtol=1e-5)


@pytest.mark.parametrize("clip", [1e9, 1.0])
@pytest.mark.parametrize("warmup", [0, 3])
def test_five_steps_equal_torch_adamw(warmup: int, clip: float) -> None:
    torch = pytest.importorskip("torch")
    opt = OptimizerConfig(
        learning_rate=0.05,
        warmup_steps=warmup,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-3,
        weight_decay=0.1,
        max_grad_norm=clip,
    )
    state = init_state(small_params(), opt.spec)
    leaves, treedef = jax.tree.flatten(state.params)
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(leaf, np.float64))) for leaf in leaves]
    adamw = torch.optim.AdamW(tensors, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    rng = np.random.default_rng(1)
    for index in range(5):
        grads = [(0.1 + index) * rng.standard_normal(leaf.shape) for leaf in leaves]
        norm = np.sqrt(sum(np.sum(g**2) for g in grads))
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad * min(1.0, clip / norm))
        for group in adamw.param_groups:
            group["lr"] = 0.05 * min(1.0, (index + 1) / max(warmup, 1))
        adamw.step()
        given = jax.tree.unflatten(treedef, [jnp.asarray(g, jnp.float32) for g in grads])
        state, metrics = step(state, given, opt)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        for ours, theirs in zip(jax.tree.leaves(state.params), tensors, strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-6, rtol=1e-5)
    assert int(state.iteration) == 0 and int(state.skipped) == 0  # the iteration counts itself


@pytest.mark.parametrize(
    ("value", "loss"), [(np.nan, 0.0), (np.inf, 0.0), (-np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)]
)
def test_step_that_is_not_finite_changes_nothing_and_is_counted(value: float, loss: float) -> None:
    opt = OptimizerConfig(learning_rate=0.05, warmup_steps=4, weight_decay=0.1)
    good = [small_params(seed) for seed in (1, 2)]
    before, _ = step(init_state(small_params(), opt.spec), good[0], opt)
    bad = {**good[1], "a": good[1]["a"].at[1, 2].set(value)}
    after, metrics = step(before, bad, opt, loss)
    assert_identical(before.params, after.params)
    assert_identical(before.opt_state, after.opt_state)
    assert_identical(before.attempt, after.attempt)
    assert int(after.skipped) == 1
    assert metrics["skipped_updates"] == 1
    # the next good step is the one that would have come: moments, bias correction and warm-up did not move
    resumed, metrics = step(after, good[1], opt)
    expected, _ = step(before, good[1], opt)
    assert_identical(resumed.params, expected.params)
    assert_identical(resumed.opt_state, expected.opt_state)
    assert int(resumed.skipped) == 1
    assert metrics["skipped_updates"] == 1
    assert difference(resumed.params, before.params) > 1e-3


def test_a_fresh_state_owns_its_parameters() -> None:
    params = small_params()
    state = init_state(params, OPT.spec)
    donating = jax.jit(apply_gradients, static_argnames="spec", donate_argnames="state")
    new, _ = donating(state, small_params(1), jnp.float32(0), spec=OPT.spec, hyper=hyper(optimizer=OPT))
    assert int(new.skipped) == 0
    assert_identical(params, small_params())  # still readable, unchanged


@pytest.mark.full
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_moves(tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    params, batch = tiny_params(config, seed=4), make_batch()
    opt = replace(OPT, learning_rate=1e-3)
    grads, metrics = compute(params, params, batch, opt=opt, config=config)
    state, _ = step(init_state(params, opt.spec), grads, opt, float(metrics["loss"]))
    seen = np.zeros(config.vocab_size, bool)
    assert batch.challenger is not None
    for rows in (batch.solver, batch.challenger):
        for tokens, start, size, weight in zip(
            *map(np.asarray, (rows.tokens, rows.prompt_lengths, rows.completion_lengths, rows.weights)), strict=True
        ):
            seen[tokens[: start + size - 1]] |= weight > 0  # the last token is predicted, never read
    for path, old in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        moved = np.asarray(partial(_at, path)(state.params) != old)
        if "embed_tokens" in name and not tied:
            np.testing.assert_array_equal(moved.any(axis=1), seen)
            assert moved[seen].mean() > 0.99
        else:
            assert moved.mean() > 0.99, name


def _at(path: Any, tree: Any) -> Any:
    for entry in path:
        tree = tree[entry.key]
    return tree


@pytest.mark.full
def test_updates_lower_the_loss_they_are_made_for(params: llama.Params, reference_params: llama.Params) -> None:
    """Plain descent on a fixed batch with beta only: the KL to the reference goes down for both roles."""
    loss = LossConfig(beta=1.0, kl_estimator="full")
    rows = make_batch(loss=loss, alpha=1.0)
    solver, challenger = (r._replace(advantages=jnp.zeros_like(r.advantages)) for r in rows)
    batch, opt = LearnBatch(solver, challenger), replace(OPT, learning_rate=3e-3)
    state, values = init_state(params, opt.spec), []
    for _ in range(6):
        grads, metrics = compute(state.params, reference_params, batch, loss, opt)
        values.append([float(metrics[f"{role}/loss"]) for role in ("solver", "challenger")])
        state, _ = step(state, grads, opt, float(metrics["loss"]))
    assert np.all(np.diff(np.array(values), axis=0) < 0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon"),
        ({"micro_batch_size": -1}, "micro_batch_size"),
        ({"remat": "some"}, "remat"),
        ({"moment_dtype": "int8"}, "moment_dtype"),
        ({"logprob_chunk": 0}, "logprob_chunk"),
        ({"adam_beta1": 1.0}, "adam_beta1"),
        ({"adam_beta2": -0.1}, "adam_beta2"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_check_names_the_bad_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        OptimizerConfig(**change).check()
    assert error.value.field == f"optimizer.{field}"
    OptimizerConfig().check()
