"""One joint gradient for both roles, accumulated over micro-batches inside jit, then clipped AdamW.

1. `reference_logprobs`: the frozen reference's log-probabilities of every completion (its hidden states for `full`).
2. `gradients`: loss and gradient of both roles, micro-batch by micro-batch, weights carrying the denominators.
3. `update`: the gradient, and one step of `learn/optimizer.py`; the old state is donated.

With several inner epochs, `with_old_logprobs` first fixes the denominators of the ratios, and `update` is repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.core.stage import Stage, stage
from lsp_jax.learn.batch import LearnBatch, Reference, References, Rows, micro_batches, width_bucket, widths
from lsp_jax.learn.logprobs import completion_hidden, completion_tokens, token_statistics
from lsp_jax.learn.losses import policy_loss
from lsp_jax.learn.nonfinite import first_not_finite
from lsp_jax.learn.novelty import pooled
from lsp_jax.learn.optimizer import Metrics, TrainState, apply_gradients
from lsp_jax.learn.spec import Hyperparameters, LearnerSpec, RoleSpec
from lsp_jax.model.llama import Params, cast
from lsp_jax.model.sharding import row_shards, shard_params, shard_rows

DEFAULT_MICRO_BATCH_SIZE = 8  # rows per device if its memory limit is unknown


@stage(static="spec")
def reference_logprobs(params: Params, batch: LearnBatch, spec: LearnerSpec) -> References:
    """Log-probabilities of every row under `params`, computed in micro-batches; for the `full` KL also hidden states.

    A prompt that the rows of a micro-batch share is computed once for them.
    """
    solver = _role_reference(params, batch.solver, spec, spec.solver, embed=False)
    if batch.challenger is None:
        return References(solver)
    return References(solver, _role_reference(params, batch.challenger, spec, spec.challenger, embed=True))


def _role_reference(params: Params, rows: Rows, spec: LearnerSpec, role: RoleSpec, embed: bool) -> Reference:
    count, length = rows.behaviour_logprobs.shape
    size, share = _micro_rows(rows, spec, role)

    def one(part: Rows) -> Reference:
        hidden_BTD = completion_hidden(params, spec.model, part, share=share)
        targets_BT = completion_tokens(part)
        stats = token_statistics(params, spec.model, hidden_BTD, targets_BT, role.temperature, spec.logprob_chunk)
        found = Reference(stats.logprobs, hidden_BTD if spec.loss.kl_estimator == "full" else None)
        missing = length - targets_BT.shape[1]
        found = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), found)
        return found._replace(embeddings=pooled(hidden_BTD, part.completion_lengths) if embed else None)

    def narrow(part: Rows) -> Reference:
        return _at_width(part, lambda columns: one(part.narrowed(columns)))

    out = jax.lax.map(narrow, shard_rows(micro_batches(rows, size), axis=1))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)


def _at_width(rows: Rows, compute: Callable[[int], Any]) -> Any:
    """`compute(columns)` at the smallest of `widths` that holds the completions of `rows`, selected on the device."""
    columns = widths(rows.behaviour_logprobs.shape[1])
    if len(columns) == 1:
        return compute(columns[0])
    return jax.lax.switch(width_bucket(rows, columns), [lambda width=width: compute(width) for width in columns])


def _micro_rows(rows: Rows, spec: LearnerSpec, role: RoleSpec) -> tuple[int, int]:
    """Rows of a micro-batch, equally many and at most `micro_batch_size` per device; rows that share a prompt.

    A device holds complete groups if they fit, else an equal part of one, and computes a prompt once for its rows.
    """
    group = spec.prompt_sharing(role)
    each = min(spec.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE, -(-rows.tokens.shape[0] // row_shards()))
    each = each - each % group if each > group else max(n for n in range(1, each + 1) if group % n == 0)
    return each * row_shards(), min(each, group)


@stage(static="spec")
def with_old_logprobs(
    params: Params, reference_params: Params | None, batch: LearnBatch, spec: LearnerSpec
) -> LearnBatch:
    """The batch with old log-probabilities of both roles, the denominators of the ratios of inner epochs.

    `params` are the trained parameters before the first update, `reference_params` the base of adapters. The old
    log-probabilities are the sampler's, with `log_mass` added back, or the learner's from another forward pass if the
    two round differently (`recompute_old_logprobs`).
    """
    if spec.recompute_old_logprobs:
        compute = spec.attach_adapters(reference_params or {})(cast(params, spec.compute_dtype))
        plain = replace(spec, loss=replace(spec.loss, kl_estimator="k2"))  # without hidden states
        solver, challenger, _ = reference_logprobs(compute, batch, plain)
        old = (solver.logprobs, None if challenger is None else challenger.logprobs)
    else:
        old = tuple(None if rows is None else rows.behaviour_logprobs + rows.log_mass for rows in batch)
    challenger_rows = None if batch.challenger is None else batch.challenger._replace(old_logprobs=old[1])
    return LearnBatch(batch.solver._replace(old_logprobs=old[0]), challenger_rows)


class Objective(NamedTuple):
    """The loss of one role's rows as a function of the trained parameters."""

    spec: LearnerSpec
    role: RoleSpec
    hyper: Hyperparameters
    reference_params: Params | None
    """Parameters of the frozen reference, if the loss reads them."""

    def __call__(
        self, params: Params, rows: Rows, reference: Reference, share: int, columns: int
    ) -> tuple[jax.Array, Metrics]:
        """Loss and metric sums of `rows`, with completions cut to `columns` tokens (none may be longer); each `share`
        consecutive rows continue the same prompt."""
        spec, model = self.spec, self.spec.model
        rows, reference = rows.narrowed(columns), jax.tree.map(lambda x: x[:, :columns], reference)
        params = spec.attach_adapters(self.reference_params or {})(params)
        hidden_BTD = completion_hidden(params, model, rows, spec.remat, share)
        against = None if reference.hidden is None else (self.reference_params or {}, reference.hidden)
        targets_BT, temperature = completion_tokens(rows), self.role.temperature
        stats = token_statistics(params, model, hidden_BTD, targets_BT, temperature, spec.logprob_chunk, against)
        return policy_loss(stats, reference.logprobs, rows, spec.loss, self.hyper)


def role_gradients(
    params: Params, rows: Rows, reference: Reference, objective: Objective, total: Params | None = None
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, metric sums and float32 gradient of one role's rows, summed over micro-batches; `total` is added to the
    gradient."""
    size, share = _micro_rows(rows, objective.spec, objective.role)
    columns = widths(rows.behaviour_logprobs.shape[1])
    # each micro-batch runs at the smallest width that holds its completions, selected on the device
    by_width = [jax.value_and_grad(partial(objective, share=share, columns=width), has_aux=True) for width in columns]
    reference = reference._replace(embeddings=None)  # without a token axis, and not read by the loss
    missing = -rows.tokens.shape[0] % size
    split_reference = jax.tree.map(
        lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]), reference
    )
    parts = shard_rows((micro_batches(rows, size), split_reference), axis=1)
    one = jax.tree.map(lambda x: x[0], parts)
    if parts[0].tokens.shape[0] == 1:  # no accumulator: one gradient less in memory
        (value, sums), grads = jax.lax.switch(width_bucket(one[0], columns), by_width, params, *one)
        grads = shard_params(cast(grads, "float32"))
        return value, sums, grads if total is None else jax.tree.map(jnp.add, total, grads)

    def add(total: Any, part: tuple[Rows, Reference]) -> tuple[Any, None]:
        scalars, grads = jax.lax.switch(width_bucket(part[0], columns), by_width, params, *part)
        return jax.tree.map(jnp.add, total, (scalars, shard_params(grads))), None

    first = jax.eval_shape(by_width[0], params, *one)
    scalars, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)
    start = scalars, shard_params(grads) if total is None else total
    ((value, sums), grads), _ = jax.lax.scan(add, start, parts)
    return value, sums, grads


def _gradients(
    params: Params, batch: LearnBatch, references: References, hyper: Hyperparameters, spec: LearnerSpec
) -> tuple[Params, Metrics]:
    """The unclipped joint gradient of L = L_Sol + alpha_Ch * L_Ch, float32, and metrics under `solver/` and
    `challenger/`.

    It is the gradient of the trained `params`, computed with a copy in the compute dtype and accumulated in float32.
    """
    params = cast(params, spec.compute_dtype)
    objective = Objective(spec, spec.solver, hyper, references.params)
    value, sums, grads = role_gradients(params, batch.solver, references.solver, objective)
    metrics = {"loss": value, **_means("solver", sums, value)}
    if batch.challenger is not None and references.challenger is not None:
        objective = objective._replace(role=spec.challenger)
        value, sums, grads = role_gradients(params, batch.challenger, references.challenger, objective, grads)
        metrics |= {"loss": metrics["loss"] + value, **_means("challenger", sums, value)}
    return grads, metrics


gradients: Stage[..., tuple[Params, Metrics]] = stage(static="spec")(_gradients)


def _means(role: str, sums: Metrics, loss: jax.Array) -> Metrics:
    tokens = jnp.maximum(sums["tokens"], 1)
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    error = means.pop("prob_error")
    return {
        f"{role}/loss": loss,
        **{f"{role}/{name}": value for name, value in means.items()},
        f"sampling/{role}/token_mult_prob_error": error,
    }


@stage(static="spec", donate="state")
def update(
    state: TrainState, batch: LearnBatch, references: References, hyper: Hyperparameters, spec: LearnerSpec
) -> tuple[TrainState, Metrics]:
    """One joint gradient step; the old state is donated. The caller increments the iteration."""
    grads, metrics = _gradients(state.params, batch, references, hyper, spec)
    component = first_not_finite(batch, references, metrics["loss"])
    state, more = apply_gradients(state, grads, metrics["loss"], spec.optimizer, hyper, component == 0)
    metrics["not_finite/component"] = component.astype(jnp.float32)
    errors = [value for name, value in metrics.items() if name.endswith("token_mult_prob_error")]
    metrics["sampling/token_mult_prob_error"] = jnp.max(jnp.stack(errors))
    return state, metrics | more
