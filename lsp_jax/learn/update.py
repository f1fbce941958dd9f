"""One joint gradient for both roles, accumulated over micro-batches inside jit, then clipped AdamW.

1. `reference_statistics`: the frozen reference's log-probabilities of every completion (its hidden states for `full`).
2. `gradients`: loss and gradient of both roles, micro-batch by micro-batch, weights carrying the denominators.
3. `apply_gradients`: clip by global norm, AdamW with warm-up; a step that is not finite changes nothing and is counted.

With several inner epochs, `fix_old` puts the log-probabilities of the parameters that played into the rows first, and
2 and 3 are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lsp_jax.core.errors import InputError
from lsp_jax.learn.batch import LearnBatch, Rows, micro_batches, width_bucket, widths
from lsp_jax.learn.logprobs import completion_hidden, completion_tokens, token_statistics
from lsp_jax.learn.losses import LossConfig, policy_loss
from lsp_jax.learn.novelty import Memory, empty, pooled
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import Params, Remat, cast
from lsp_jax.model.sharding import row_shards, shard_params, shard_rows

Metrics = dict[str, jax.Array]
DEFAULT_MICRO_BATCH_SIZE = 8  # rows a device where nothing says how many fit


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the way its gradient is made. Names as in TRL."""

    learning_rate: float = 3e-6
    """Step size after warm-up (LSP: 3e-6; 1e-6 for GRPO)."""
    warmup_steps: int = 0
    """Updates over which the step size rises linearly from 0; the first update uses 1 / warmup_steps of it."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay on every parameter."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradient; longer ones are scaled down to it."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the first moment. The second stays float32: in bfloat16 its small steps would be rounded away."""
    micro_batch_size: int = 0
    """Rows whose activations a device holds at one time; gradients of all micro-batches are added up. 0: as many as
    fit, by an estimate; 8 where a device does not say what it can hold."""
    logprob_chunk: int = 512
    """Tokens whose logits a device holds at one time."""
    remat: Remat = "full"
    """Rematerialisation, what the backward pass recomputes: full: each layer; dots: all of a layer but its
    products with weights; none."""

    def check(self) -> None:
        """Raises InputError naming the field."""
        for field in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            if not 0 < getattr(self, field) < math.inf:
                raise InputError(f"optimizer.{field}", getattr(self, field), "must be > 0 and finite")
        for field, least in (("micro_batch_size", 0), ("logprob_chunk", 1)):
            if getattr(self, field) < least:
                raise InputError(f"optimizer.{field}", getattr(self, field), f"must be at least {least}")
        for field, allowed in (("moment_dtype", ("float32", "bfloat16")), ("remat", get_args(Remat))):
            if getattr(self, field) not in allowed:
                raise InputError(f"optimizer.{field}", getattr(self, field), f"must be one of {', '.join(allowed)}")
        for field in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"optimizer.{field}", getattr(self, field), "must be in [0, 1)")
        for field in ("warmup_steps", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise InputError(f"optimizer.{field}", getattr(self, field), "must be >= 0")


class TrainState(NamedTuple):
    """All that an update changes; donated to it."""

    params: Params
    """Master parameters."""
    opt_state: Any
    """Optax state: both moments and the count of updates made."""
    iteration: jax.Array
    """int32: iterations done, those with skipped updates included; the update leaves it to the iteration."""
    attempt: jax.Array
    """int32: rises when an iteration is played anew, so that it draws other noise."""
    skipped: jax.Array
    """int32: updates skipped because they were not finite."""
    memory: Memory | None = None
    """Embeddings of the Challenger's earlier queries; None where nothing is remembered."""


class Reference(NamedTuple):
    """The frozen reference's statistics of one role's rows."""

    logprobs: jax.Array
    """float32 [B, T]."""
    hidden: jax.Array | None
    """[B, T, D] for the `full` KL, else None."""
    embeddings: jax.Array | None = None
    """float32 [B, D] of the Challenger's rows (`learn/novelty.py`), else None."""


def optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with a linear warm-up. Its count moves only with updates made."""
    warmup = max(config.warmup_steps, 1)

    def schedule(count: Any) -> jax.Array:
        return config.learning_rate * jnp.minimum(1.0, (count + 1) / warmup)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b1=config.adam_beta1,
            b2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            mu_dtype=config.moment_dtype,
        ),
    )


def init_state(params: Params, config: OptimizerConfig, memory: tuple[int, int] | None = None) -> TrainState:
    """A fresh state that owns copies of `params` (it is donated; the reference keeps its own), spread over the mesh;
    with room for a `memory` of so many queries, of the model's width."""
    params = jax.tree.map(jnp.copy, params)
    # the second moment is float32 whatever the parameters are
    moments = optimizer(config).init(cast(params, "float32"))
    iteration, attempt, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: the state is donated
    remembered = None if memory is None else empty(*memory)
    return shard_params(TrainState(params, moments, iteration, attempt, skipped, remembered))


def reference_statistics(
    params: Params,
    batch: LearnBatch,
    config: LlamaConfig,
    loss: LossConfig,
    opt: OptimizerConfig,
    temperature: tuple[float, float],
    sharing: tuple[int, int] = (1, 1),
) -> tuple[Reference, Reference | None]:
    """The reference's log-probabilities for every row, by micro-batches; hidden states too for the `full` KL.

    `temperature` is that of the Solver and of the Challenger, `sharing` how many consecutive rows of theirs have one
    prompt, which is then run once for as many of them as a micro-batch holds.
    """

    def of_role(rows: Rows, temperature: float, group: int, embed: bool) -> Reference:
        count, length = rows.behaviour_logprobs.shape
        size, share = _micro_rows(rows, opt, group)

        def one(part: Rows) -> Reference:
            hidden = completion_hidden(params, config, part, share=share)
            targets = completion_tokens(part)
            stats = token_statistics(params, config, hidden, targets, temperature, opt.logprob_chunk)
            found = Reference(stats.logprobs, hidden if loss.kl_estimator == "full" else None)
            missing = length - targets.shape[1]
            found = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)), found)
            return found._replace(embeddings=pooled(hidden, part.completion_lengths) if embed else None)

        def narrow(part: Rows) -> Reference:
            return _at_width(part, lambda columns: one(part.narrowed(columns)))

        out = jax.lax.map(narrow, shard_rows(micro_batches(rows, size), axis=1))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)

    solver = of_role(batch.solver, temperature[0], sharing[0], embed=False)
    if batch.challenger is None:
        return solver, None
    return solver, of_role(batch.challenger, temperature[1], sharing[1], embed=True)


def _at_width(rows: Rows, compute: Callable[[int], Any]) -> Any:
    """`compute(columns)` with the fewest declared columns that hold the completions of `rows`: chosen on the device."""
    columns = widths(rows.behaviour_logprobs.shape[1])
    if len(columns) == 1:
        return compute(columns[0])
    return jax.lax.switch(width_bucket(rows, columns), [lambda width=width: compute(width) for width in columns])


def fix_old(
    params: Params,
    batch: LearnBatch,
    config: LlamaConfig,
    opt: OptimizerConfig,
    temperature: tuple[float, float],
    recompute: bool,
    sharing: tuple[int, int] = (1, 1),
) -> LearnBatch:
    """The batch with `old_logprobs` of both roles; `params` are those that played, before any update.

    They are the sampler's own, the truncation's share added back, or with `recompute` the learner's (one more forward
    pass), for when the two round differently.
    """
    if recompute:
        solver, challenger = reference_statistics(params, batch, config, LossConfig(), opt, temperature, sharing)
        old = (solver.logprobs, None if challenger is None else challenger.logprobs)
    else:
        old = tuple(None if rows is None else rows.behaviour_logprobs + rows.log_mass for rows in batch)
    challenger_rows = None if batch.challenger is None else batch.challenger._replace(old_logprobs=old[1])
    return LearnBatch(batch.solver._replace(old_logprobs=old[0]), challenger_rows)


def role_gradients(
    params: Params,
    reference_params: Params,
    rows: Rows,
    reference: Reference,
    config: LlamaConfig,
    loss: LossConfig,
    opt: OptimizerConfig,
    temperature: float,
    total: Params | None = None,
    group: int = 1,
    whole: Callable[[Params], Params] = lambda params: params,
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, metric sums and float32 gradient of one role's rows, added up over micro-batches and onto `total`.

    Each `group` consecutive rows have one prompt. `whole` makes the model's parameters of those that are trained.
    """
    size, share = _micro_rows(rows, opt, group)

    def micro_loss(params: Params, rows: Rows, ref: Reference) -> tuple[jax.Array, Metrics]:
        params = whole(params)
        hidden = completion_hidden(params, config, rows, opt.remat, share)
        against = None if ref.hidden is None else (reference_params, ref.hidden)
        stats = token_statistics(
            params, config, hidden, completion_tokens(rows), temperature, opt.logprob_chunk, against
        )
        return policy_loss(stats, ref.logprobs, rows, loss)

    def gradient(params: Params, part: tuple[Rows, Reference]) -> Any:
        def compute(columns: int) -> Any:
            narrow = part[0].narrowed(columns), jax.tree.map(lambda x: x[:, :columns], part[1])
            return jax.value_and_grad(micro_loss, has_aux=True)(params, *narrow)

        return _at_width(part[0], compute)

    missing = -rows.tokens.shape[0] % size
    split_reference = jax.tree.map(
        lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]), reference
    )
    parts = shard_rows((micro_batches(rows, size), split_reference), axis=1)
    if parts[0].tokens.shape[0] == 1:  # no accumulator: one gradient less in memory
        (value, sums), grads = gradient(params, jax.tree.map(lambda x: x[0], parts))
        grads = shard_params(cast(grads, "float32"))
        return value, sums, grads if total is None else jax.tree.map(jnp.add, total, grads)

    def add(total: Any, part: tuple[Rows, Reference]) -> tuple[Any, None]:
        scalars, grads = gradient(params, part)
        return jax.tree.map(jnp.add, total, (scalars, shard_params(grads))), None

    first = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    scalars, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)
    start = scalars, shard_params(grads) if total is None else total
    ((value, sums), grads), _ = jax.lax.scan(add, start, parts)
    return value, sums, grads


def _micro_rows(rows: Rows, opt: OptimizerConfig, group: int) -> tuple[int, int]:
    """Rows of one micro-batch, as many on each device and `micro_batch_size` at most; and how many share a prompt.

    A device holds whole groups where they fit, else an equal part of one, and runs a prompt once for what it holds.
    """
    each = min(opt.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE, -(-rows.tokens.shape[0] // row_shards()))
    each = each - each % group if each > group else max(n for n in range(1, each + 1) if group % n == 0)
    return each * row_shards(), min(each, group)


def gradients(
    params: Params,
    reference_params: Params,
    batch: LearnBatch,
    references: tuple[Reference, Reference | None],
    config: LlamaConfig,
    loss: LossConfig,
    opt: OptimizerConfig,
    temperature: tuple[float, float],
    sharing: tuple[int, int] = (1, 1),
    whole: Callable[[Params], Params] = lambda params: params,
) -> tuple[Params, Metrics]:
    """The unclipped joint gradient of L = L_Sol + alpha_Ch * L_Ch, and metrics under `solver/` and `challenger/`.

    `params` may be a lower-precision copy of the master parameters: gradients are added up in float32. `sharing` is
    how many consecutive rows of the Solver and of the Challenger have one prompt; the gradient is the same without it.
    The gradient is that of `params`, of which `whole` makes the model's parameters.
    """
    solver, challenger = references
    value, sums, grads = role_gradients(
        params, reference_params, batch.solver, solver, config, loss, opt, temperature[0], None, sharing[0], whole
    )
    metrics = {"loss": value, **_means("solver", sums, value)}
    if batch.challenger is not None and challenger is not None:
        arguments = batch.challenger, challenger, config, loss, opt, temperature[1], grads, sharing[1], whole
        value, sums, grads = role_gradients(params, reference_params, *arguments)
        metrics |= {"loss": metrics["loss"] + value, **_means("challenger", sums, value)}
    return grads, metrics


def _means(role: str, sums: Metrics, loss: jax.Array) -> Metrics:
    tokens = jnp.maximum(sums["tokens"], 1)
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    error = means.pop("prob_error")
    return {
        f"{role}/loss": loss,
        **{f"{role}/{name}": value for name, value in means.items()},
        f"sampling/{role}/token_mult_prob_error": error,
    }


def apply_gradients(
    state: TrainState, grads: Params, loss: jax.Array, opt: OptimizerConfig, inputs_finite: jax.Array | bool = True
) -> tuple[TrainState, Metrics]:
    """One clipped AdamW step; when the loss or the gradient's norm is not finite, or what they were made from is not
    `inputs_finite`, nothing moves but `skipped`."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss) & inputs_finite

    updates, opt_state = optimizer(opt).update(grads, state.opt_state, state.params)
    moved = optax.apply_updates(state.params, updates), opt_state

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        # a choice element by element, not a branch, whose result would be a second copy of the whole state; moments of
        # float32 gradients go back to the dtype they were made with
        return jnp.where(finite, new.astype(old.dtype), old)

    params, opt_state = jax.tree.map(kept, moved, (state.params, state.opt_state))
    skipped = state.skipped + ~finite
    new = shard_params(TrainState(params, opt_state, state.iteration, state.attempt, skipped, state.memory))
    return new, {"grad_norm": norm, "skipped_updates": skipped.astype(jnp.float32)}
