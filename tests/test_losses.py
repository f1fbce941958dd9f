"""The loss and its KL estimators: values and gradients against float64 numpy, expectations by enumeration."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.learn.batch import Rows, Sampled, make_rows
from lsp_jax.learn.logprobs import TokenStatistics, token_statistics
from lsp_jax.learn.losses import KL_ESTIMATORS, LOSS_TYPES, LossConfig, kl_terms, policy_loss
from lsp_jax.learn.spec import LossSpec
from specs import hyper
from tiny import tiny_config

LENGTHS = np.array([3, 7, 1, 5, 4])
WIDTH = 9  # the declared maximum; no row reaches it
COUNTS = np.array([1, 1, 1, 0, 1], bool)  # row 3 is masked
NAN = float("nan")

loss_and_gradient = jax.jit(jax.value_and_grad(policy_loss, has_aux=True), static_argnames="spec")


class Case:
    """Random log-probabilities of five rows of unequal lengths, float64."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        shape = (len(LENGTHS), WIDTH)
        self.logprobs = -rng.gamma(1.5, size=shape)
        self.reference = self.logprobs + 0.4 * rng.standard_normal(shape)
        self.full_kl = rng.gamma(0.3, size=shape)
        self.entropy = rng.gamma(2.0, size=shape)
        self.behaviour = self.logprobs + 0.1 * rng.standard_normal(shape)
        self.log_mass = -0.05 * rng.random(shape)
        self.advantages = rng.standard_normal(len(LENGTHS))
        self.mask = (np.arange(WIDTH)[None] < LENGTHS[:, None]) & COUNTS[:, None]

    def fill_masked(self, value: float) -> None:
        """Puts `value` into every array wherever the mask is False."""
        for name in ("logprobs", "reference", "full_kl", "entropy", "behaviour", "log_mass"):
            setattr(self, name, np.where(self.mask, getattr(self, name), value))
        self.advantages = np.where(COUNTS, self.advantages, value)

    def rows(self, config: LossConfig, scale: float = 1.0) -> Rows:
        count = len(LENGTHS)
        return make_rows(
            prompts=(jnp.full((1, 2), 9, jnp.int32), jnp.full(1, 2, jnp.int32)),
            sampled=Sampled(
                tokens=jnp.full((count, WIDTH), 5, jnp.int32),
                lengths=jnp.asarray(LENGTHS, jnp.int32),
                logprobs=jnp.asarray(self.behaviour, jnp.float32),
                log_mass=jnp.asarray(self.log_mass, jnp.float32),
            ),
            advantages_B=jnp.asarray(self.advantages, jnp.float32),
            counts_B=jnp.asarray(COUNTS),
            scale=scale,
            loss_type=config.loss_type,
        )

    def statistics(self) -> TokenStatistics:
        return TokenStatistics(*(jnp.asarray(x, jnp.float32) for x in (self.logprobs, self.entropy, self.full_kl)))

    def compute(self, config: LossConfig, scale: float = 1.0, rows: Rows | None = None) -> tuple[Any, Any, Any]:
        """Loss, metric sums and the gradient with respect to the learner's statistics."""
        rows = self.rows(config, scale) if rows is None else rows
        reference = jnp.asarray(self.reference, jnp.float32)
        arguments = self.statistics(), reference, rows
        (loss, sums), grads = loss_and_gradient(*arguments, spec=config.spec, hyper=hyper(config))
        return loss, sums, grads


def plain_loss(case: Case, config: LossConfig, scale: float = 1.0) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and its gradients with respect to log-probabilities and full_kl, token by token in Python floats."""
    counted = [i for i in range(len(LENGTHS)) if COUNTS[i]]
    tokens = sum(int(LENGTHS[i]) for i in counted)
    rows = {"sequence": len(LENGTHS), "token_mean": tokens, "constant_length": len(LENGTHS) * WIDTH}[config.loss_type]
    loss, by_logprob, by_full = 0.0, np.zeros_like(case.logprobs), np.zeros_like(case.logprobs)
    for i in counted:
        # the ratio's value is 1: once a row, or once a token
        gain = case.advantages[i] * (1 if config.loss_type == "sequence" else LENGTHS[i])
        for t in range(LENGTHS[i]):
            d = case.logprobs[i, t] - case.reference[i, t]
            term, slope = {
                "k1": (d, 1.0),
                "k2": (d * d / 2, d),
                "k3": (np.exp(-d) - 1 + d, 1 - np.exp(-d)),
                "full": (case.full_kl[i, t], 0.0),
            }[config.kl_estimator]
            gain -= config.beta * term
            by_logprob[i, t] = -scale / rows * (case.advantages[i] - config.beta * slope)
            if config.kl_estimator == "full":
                by_full[i, t] = scale / rows * config.beta
        loss -= scale / rows * gain
    return loss, by_logprob, by_full


def loss_configs(beta: float = 0.3) -> list[LossConfig]:
    return [LossConfig(beta=beta, kl_estimator=k, loss_type=t) for k in KL_ESTIMATORS for t in LOSS_TYPES]


def config_id(config: LossConfig) -> str:
    return f"{config.kl_estimator}-{config.loss_type}"


@pytest.mark.parametrize("config", loss_configs(), ids=config_id)
def test_value_and_gradient_equal_a_plain_calculation(config: LossConfig) -> None:
    case = Case()
    loss, _, grads = case.compute(config)
    value, by_logprob, by_full = plain_loss(case, config)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(grads.logprobs, by_logprob, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads.full_kl, by_full, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads.entropy, 0)
    assert np.abs(by_logprob[case.mask]).min() > 1e-5


@pytest.mark.parametrize("cap", [0.0, 1.2])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_inner_epoch_equals_a_plain_calculation(loss_type: Any, cap: float) -> None:
    """Ratios on both sides of the clip range: value and gradient token by token in Python floats, k2."""
    case, rng = Case(), np.random.default_rng(9)
    old = case.logprobs + 0.25 * rng.standard_normal(case.logprobs.shape)
    config = LossConfig(
        beta=0.3,
        loss_type=loss_type,
        num_iterations=2,
        clip_epsilon=0.1,
        clip_epsilon_high=0.2,
        importance_cap=cap,
    )
    rows = case.rows(config)._replace(old_logprobs=jnp.asarray(np.where(case.mask, old, NAN), jnp.float32))
    value, by_logprob = 0.0, np.zeros_like(old)
    cut, weights = {"low": 0, "high": 0}, []
    for i, t in zip(*np.nonzero(case.mask), strict=True):
        ratio, d = np.exp(case.logprobs[i, t] - old[i, t]), case.logprobs[i, t] - case.reference[i, t]
        weight = min(np.exp(old[i, t] - case.log_mass[i, t] - case.behaviour[i, t]), cap) if cap else 1.0
        better, share = case.advantages[i], float(rows.weights[i])
        kept = 1.0
        if better > 0 and ratio > 1.2:
            cut["high"], kept = cut["high"] + 1, 0.0
        if better < 0 and ratio < 0.9:
            cut["low"], kept = cut["low"] + 1, 0.0
        gain = better * (ratio if kept else min(max(ratio, 0.9), 1.2))
        value -= share * weight * (gain - 0.3 * ratio * d * d / 2)
        by_logprob[i, t] = -share * weight * (kept * ratio * better - 0.3 * ratio * d)
        weights.append(weight)
    loss, sums, grads = case.compute(config, rows=rows)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(grads.logprobs, by_logprob, rtol=1e-4, atol=1e-7)
    assert min(cut.values()) > 0
    assert {side: int(sums[f"clip_ratio/{side}"]) for side in cut} == cut
    difference = (case.logprobs - old)[case.mask]
    np.testing.assert_allclose(sums["kl_to_old"], np.sum(np.exp(difference) - 1 - difference), rtol=1e-4)
    if cap:
        assert np.isclose(weights, cap).any() and min(weights) < 0.9
        np.testing.assert_allclose(sums["importance_weight"], np.sum(weights), rtol=1e-5)


def test_two_rows_by_hand() -> None:
    """Advantages 1 and -2, lengths 2 and 1, beta 0.5, every log-ratio to the reference 0.2, k2 = 0.02 a token."""
    logprobs = np.array([[-1.0, -2.0], [-0.5, -9.0]])
    rows = Rows(
        tokens=jnp.ones((2, 3), jnp.int32),
        prompt_lengths=jnp.ones(2, jnp.int32),
        completion_lengths=jnp.asarray([2, 1]),
        behaviour_logprobs=jnp.asarray(logprobs, jnp.float32),
        log_mass=jnp.zeros((2, 2)),
        advantages=jnp.asarray([1.0, -2.0]),
        weights=jnp.asarray([0.5, 0.5]),
    )
    statistics = TokenStatistics(jnp.asarray(logprobs, jnp.float32), jnp.ones((2, 2)), jnp.zeros((2, 2)))
    reference = jnp.asarray(logprobs - 0.2, jnp.float32)
    loss, sums = policy_loss(statistics, reference, rows, LossSpec(), hyper(LossConfig(beta=0.5)))
    # -1/2 (1 - 0.5 * 0.04) - 1/2 (-2 - 0.5 * 0.02)
    np.testing.assert_allclose(loss, -0.49 + 1.005, rtol=1e-5)
    np.testing.assert_allclose(sums["tokens"], 3)
    np.testing.assert_allclose(sums["kl"], 3 * (np.exp(-0.2) - 1 + 0.2), rtol=1e-4)
    np.testing.assert_allclose(sums["entropy"], 3)
    np.testing.assert_allclose(sums["prob_error"], 3)


@pytest.mark.parametrize("config", loss_configs(), ids=config_id)
@pytest.mark.parametrize("garbage", [NAN, np.inf, -np.inf])
def test_what_is_masked_changes_neither_value_nor_gradient(config: LossConfig, garbage: float) -> None:
    clean, dirty = Case(), Case()
    dirty.fill_masked(garbage)
    for kept, with_garbage in zip(
        jax.tree.leaves(clean.compute(config)), jax.tree.leaves(dirty.compute(config)), strict=True
    ):
        assert np.all(np.isfinite(with_garbage))
        np.testing.assert_array_equal(kept, with_garbage)


@pytest.mark.parametrize("config", loss_configs(), ids=config_id)
def test_masked_row_equals_leaving_it_out_with_the_denominator_kept(config: LossConfig) -> None:
    case = Case()
    loss, sums, grads = case.compute(config)
    rows = case.rows(config)
    shorter = Case()
    for name in ("logprobs", "reference", "full_kl", "entropy"):
        setattr(shorter, name, getattr(case, name)[COUNTS])
    kept = jax.tree.map(lambda x: x[COUNTS], rows)
    # a share of all five rows, of the counted tokens, of five rows of the greatest length
    expected = {"sequence": 1 / 5, "token_mean": 1 / (3 + 7 + 1 + 4), "constant_length": 1 / (5 * 9)}
    np.testing.assert_allclose(kept.weights, expected[config.loss_type], rtol=1e-6)
    loss_without, sums_without, grads_without = shorter.compute(config, rows=kept)
    np.testing.assert_allclose(loss, loss_without, rtol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(value, sums_without[name], rtol=1e-6)
    np.testing.assert_allclose(grads.logprobs[COUNTS], grads_without.logprobs, rtol=1e-6)
    np.testing.assert_array_equal(grads.logprobs[~COUNTS], 0)
    np.testing.assert_array_equal(grads.full_kl[~COUNTS], 0)


@pytest.mark.parametrize("config", loss_configs(), ids=config_id)
def test_alpha_scales_value_and_gradient_not_the_metrics(config: LossConfig) -> None:
    case = Case()
    loss, sums, grads = case.compute(config)
    scaled_loss, scaled_sums, scaled_grads = case.compute(config, scale=0.25)
    np.testing.assert_allclose(scaled_loss, 0.25 * loss, rtol=1e-6)
    np.testing.assert_allclose(scaled_grads.logprobs, 0.25 * grads.logprobs, rtol=1e-6)
    np.testing.assert_allclose(plain_loss(case, config, 0.25)[0], scaled_loss, rtol=1e-5)
    for name, value in sums.items():
        np.testing.assert_array_equal(value, scaled_sums[name])
    off_loss, _, off_grads = case.compute(config, scale=0.0)
    assert off_loss == 0 and not np.any(off_grads.logprobs)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_metrics_are_sums_over_unmasked_tokens(estimator: Any) -> None:
    case = Case()
    _, sums, _ = case.compute(LossConfig(kl_estimator=estimator))
    mask, d = case.mask, case.logprobs - case.reference
    assert sums["tokens"] == mask.sum()
    np.testing.assert_allclose(sums["kl"], (np.exp(-d) - 1 + d)[mask].sum(), rtol=1e-5)  # k3's value always
    np.testing.assert_allclose(sums["entropy"], case.entropy[mask].sum(), rtol=1e-5)
    gap = np.abs(case.logprobs - case.log_mass - case.behaviour)
    np.testing.assert_allclose(sums["prob_error"], np.exp(gap)[mask].sum(), rtol=1e-5)


def test_beta_zero_reads_no_reference() -> None:
    config = LossConfig(beta=0.0)
    case = Case()
    loss, _, grads = case.compute(config)
    case.reference = case.reference + 3
    shifted_loss, _, shifted_grads = case.compute(config)
    assert loss == shifted_loss
    np.testing.assert_array_equal(grads.logprobs, shifted_grads.logprobs)
    weighted = np.where(case.mask, -case.advantages[:, None] / len(LENGTHS), 0)
    np.testing.assert_allclose(grads.logprobs, weighted, rtol=1e-6)


# --- estimators: one prefix, the vocabulary enumerated -------------------------------------------------------------

VOCABULARY, HIDDEN, TEMPERATURE = 11, 6, 0.7
HEAD = tiny_config(vocab_size=VOCABULARY, hidden_size=HIDDEN)


def head(seed: int) -> np.ndarray:
    """A tied head [V, D], float64."""
    return 0.5 * np.random.default_rng(seed).standard_normal((VOCABULARY, HIDDEN))


PREFIX = np.random.default_rng(7).standard_normal(HIDDEN)
POLICY, REFERENCE = head(1), head(2)


def distribution(weight: np.ndarray) -> np.ndarray:
    logits = weight @ PREFIX / TEMPERATURE
    probabilities = np.exp(logits - logits.max())
    return probabilities / probabilities.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def head_gradient(by_logit: np.ndarray) -> np.ndarray:
    """Gradient with respect to the head [V, D] from that with respect to the tempered logits [V]."""
    return by_logit[:, None] * PREFIX[None, :] / TEMPERATURE


def forward_gradient() -> np.ndarray:
    """Of KL(pi || ref)."""
    p, q = distribution(POLICY), distribution(REFERENCE)
    return head_gradient(p * (np.log(p / q) - kl(p, q)))


def reverse_gradient() -> np.ndarray:
    """Of KL(ref || pi)."""
    return head_gradient(distribution(POLICY) - distribution(REFERENCE))


def as_params(weight: Any) -> dict[str, Any]:
    return {"model": {"embed_tokens": {"weight": weight}}}


def enumerated_statistics(weight: jax.Array, estimator: str) -> tuple[TokenStatistics, jax.Array]:
    """Each token of the vocabulary as one row of one completion token after the prefix; the reference's log-probs."""
    hidden = jnp.broadcast_to(jnp.asarray(PREFIX, jnp.float32)[None, None], (VOCABULARY, 1, HIDDEN))
    tokens = jnp.arange(VOCABULARY)[:, None]
    frozen = as_params(jnp.asarray(REFERENCE, jnp.float32))
    statistics = partial(
        token_statistics, config=HEAD, hidden_BTD=hidden, targets_BT=tokens, temperature=TEMPERATURE, chunk=4
    )
    against = (frozen, hidden) if estimator == "full" else None
    return statistics(as_params(weight), reference=against), statistics(frozen).logprobs


def expected_loss(weight: jax.Array, beta: float, advantages: jax.Array, estimator: Any) -> jax.Array:
    """E over tokens drawn from POLICY of `policy_loss`: row v weighs pi(v), which carries no gradient."""
    statistics, reference = enumerated_statistics(weight, estimator)
    rows = Rows(
        tokens=jnp.stack([jnp.zeros(VOCABULARY, jnp.int32), jnp.arange(VOCABULARY)], axis=1),
        prompt_lengths=jnp.ones(VOCABULARY, jnp.int32),
        completion_lengths=jnp.ones(VOCABULARY, jnp.int32),
        behaviour_logprobs=jax.lax.stop_gradient(statistics.logprobs),
        log_mass=jnp.zeros((VOCABULARY, 1)),
        advantages=advantages,
        weights=jax.lax.stop_gradient(jnp.exp(statistics.logprobs[:, 0])),
    )
    spec, scalars = LossSpec(kl_estimator=estimator), hyper()._replace(beta=beta)
    return policy_loss(statistics, reference, rows, spec, scalars)[0]


expected_loss_and_gradient = jax.jit(jax.value_and_grad(expected_loss), static_argnums=3)


def expectation(
    estimator: str, beta: float = 1.0, advantages: np.ndarray | None = None, weight: np.ndarray = POLICY
) -> tuple[float, np.ndarray]:
    """Expected loss and gradient with respect to the head `weight`."""
    advantages = np.zeros(VOCABULARY) if advantages is None else advantages
    arrays = (jnp.asarray(weight, jnp.float32), jnp.float32(beta), jnp.asarray(advantages, jnp.float32))
    loss, gradient = expected_loss_and_gradient(*arrays, estimator)
    return float(loss), np.asarray(gradient)


def expected_gradient(estimator: str, beta: float = 1.0, advantages: np.ndarray | None = None) -> np.ndarray:
    return expectation(estimator, beta, advantages)[1]


def test_gradients_of_the_two_kls_are_right_and_different() -> None:
    """The formulas above, by central differences."""
    forward, reverse = np.zeros_like(POLICY), np.zeros_like(POLICY)
    q, step = distribution(REFERENCE), 1e-6
    for index in np.ndindex(POLICY.shape):
        up, down = POLICY.copy(), POLICY.copy()
        up[index], down[index] = POLICY[index] + step, POLICY[index] - step
        forward[index] = (kl(distribution(up), q) - kl(distribution(down), q)) / (2 * step)
        reverse[index] = (kl(q, distribution(up)) - kl(q, distribution(down))) / (2 * step)
    np.testing.assert_allclose(forward_gradient(), forward, atol=1e-7)
    np.testing.assert_allclose(reverse_gradient(), reverse, atol=1e-7)
    assert np.linalg.norm(forward - reverse) > 0.1 * np.linalg.norm(forward)


def test_expected_gradient_of_k1_is_zero() -> None:
    np.testing.assert_allclose(expected_gradient("k1"), 0, atol=1e-6)
    assert np.linalg.norm(forward_gradient()) > 0.1


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_expected_gradient_of_k2_and_full_is_that_of_kl_to_the_reference(estimator: str) -> None:
    np.testing.assert_allclose(expected_gradient(estimator), forward_gradient(), atol=2e-6)


def test_expected_gradient_of_k3_is_that_of_kl_from_the_reference() -> None:
    np.testing.assert_allclose(expected_gradient("k3"), reverse_gradient(), atol=2e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3", "full"])
def test_expected_value_is_the_kl(estimator: str) -> None:
    value = expectation(estimator, 1.0)[0] - expectation(estimator, 0.0)[0]
    np.testing.assert_allclose(value, kl(distribution(POLICY), distribution(REFERENCE)), rtol=1e-5)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_policy_gradient_climbs_the_expected_advantage(estimator: str) -> None:
    """With beta 0: minus the gradient of E_pi[A]; with beta both terms add up."""
    advantages = np.random.default_rng(3).standard_normal(VOCABULARY)
    p = distribution(POLICY)
    exact = head_gradient(p * (advantages - p @ advantages))
    np.testing.assert_allclose(expected_gradient(estimator, 0.0, advantages), -exact, atol=2e-6)
    joint = expected_gradient(estimator, 0.3, advantages)
    np.testing.assert_allclose(joint, -exact + 0.3 * expected_gradient(estimator), atol=2e-6)


def off_policy_loss(weight: jax.Array, corrected: bool, advantages: jax.Array, estimator: Any) -> jax.Array:
    """As `expected_loss` with tokens drawn from PLAYED, or, `corrected`, from a sampler that differs from it."""
    statistics, reference = enumerated_statistics(weight, estimator)
    old, sampled = (np.log(distribution(head))[:, None] for head in (PLAYED, SAMPLER if corrected else PLAYED))
    rows = Rows(
        tokens=jnp.stack([jnp.zeros(VOCABULARY, jnp.int32), jnp.arange(VOCABULARY)], axis=1),
        prompt_lengths=jnp.ones(VOCABULARY, jnp.int32),
        completion_lengths=jnp.ones(VOCABULARY, jnp.int32),
        behaviour_logprobs=jnp.asarray(sampled, jnp.float32),
        log_mass=jnp.zeros((VOCABULARY, 1)),
        advantages=advantages,
        weights=jnp.asarray(np.exp(sampled[:, 0]), jnp.float32),
        old_logprobs=jnp.asarray(old, jnp.float32),
    )
    wide = {"num_iterations": 2, "clip_epsilon": 50.0, "importance_cap": 1e4 if corrected else 0.0}  # nothing is cut
    config = LossConfig(beta=1.0, kl_estimator=estimator, **wide)
    return policy_loss(statistics, reference, rows, config.spec, hyper(config))[0]


PLAYED, SAMPLER = head(3), head(4)


@pytest.mark.full
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_inner_epochs_keep_the_expected_gradient(estimator: str, corrected: bool) -> None:
    """Drawn from the old policy, or from a sampler that is not quite it: still KL(pi || ref) and E_pi[A] at the new."""
    advantages = np.random.default_rng(3).standard_normal(VOCABULARY)
    p = distribution(POLICY)
    climbing = head_gradient(p * (advantages - p @ advantages))
    got = jax.grad(off_policy_loss)(
        jnp.asarray(POLICY, jnp.float32), corrected, jnp.asarray(advantages, jnp.float32), estimator
    )
    # the weights of a full KL are those of its prefixes, which are the same here whoever draws the token
    np.testing.assert_allclose(got, forward_gradient() - climbing, atol=5e-6)
    assert kl(distribution(PLAYED), p) > 0.05 and kl(distribution(SAMPLER), distribution(PLAYED)) > 0.05


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_a_descent_step_on_beta_alone_lowers_the_kl(estimator: str) -> None:
    before = kl(distribution(POLICY), distribution(REFERENCE))
    stepped = distribution(POLICY - 0.2 * expected_gradient(estimator, beta=0.5))
    assert kl(stepped, distribution(REFERENCE)) < 0.99 * before


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_no_pull_at_the_reference_itself(estimator: str) -> None:
    np.testing.assert_allclose(expectation(estimator, weight=REFERENCE)[1], 0, atol=1e-6)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_terms_are_as_named(estimator: str) -> None:
    case = Case()
    d = case.logprobs - case.reference
    expected = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d, "full": case.full_kl}[estimator]
    arrays = (jnp.asarray(x, jnp.float32) for x in (case.logprobs, case.reference))
    terms = kl_terms(*arrays, estimator, jnp.asarray(case.full_kl, jnp.float32))
    np.testing.assert_allclose(terms, expected, rtol=1e-5, atol=1e-6)


def test_unknown_estimator_and_wrong_shapes_are_refused() -> None:
    case = Case()
    rows = case.rows(LossConfig())
    with pytest.raises(ValueError, match="'k4'"):
        kl_terms(jnp.zeros((1, 1)), jnp.zeros((1, 1)), "k4", jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"expected \(5, 9\)"):
        policy_loss(case.statistics(), jnp.zeros((5, 6)), rows, LossSpec(), hyper())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator"),
        ({"loss_type": "mean"}, "loss_type"),
        ({"scale_rewards": "std"}, "scale_rewards"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"clip_epsilon": 0.0}, "clip_epsilon"),
        ({"clip_epsilon": NAN}, "clip_epsilon"),
        ({"clip_epsilon_high": -0.1}, "clip_epsilon_high"),
        ({"importance_cap": 0.5}, "importance_cap"),
        ({"importance_cap": NAN}, "importance_cap"),
        ({"beta": -0.1}, "beta"),
        ({"beta": NAN}, "beta"),
        ({"alpha_challenger": -1.0}, "alpha_challenger"),
    ],
)
def test_check_names_the_bad_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        LossConfig(**change).check()
    assert error.value.field == f"loss.{field}"
    LossConfig().check()
