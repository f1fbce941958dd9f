"""The train state and its step: clipping by the global norm, then AdamW with a linear warm-up.

A step that is not finite changes no parameter and is counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lsp_jax.core.errors import InputError
from lsp_jax.learn.novelty import Memory, empty
from lsp_jax.learn.spec import Hyperparameters, OptimizerSpec
from lsp_jax.model.llama import Params, Remat, cast
from lsp_jax.model.sharding import shard_params

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and gradient computation. Names as in TRL."""

    learning_rate: float = 3e-6
    """Learning rate after warm-up (LSP: 3e-6; 1e-6 for GRPO)."""
    warmup_steps: int = 0
    """Updates of linear warm-up from 0; the first update uses 1 / warmup_steps of the learning rate."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.999
    """Decay rate of the second moment."""
    adam_epsilon: float = 1e-8
    """Epsilon added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay on every parameter."""
    max_grad_norm: float = 1.0
    """Maximum global norm of the gradient, for clipping."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the first moment. The second stays float32, because bfloat16 would round its small changes away."""
    micro_batch_size: int = 0
    """Rows per device and micro-batch; gradients are accumulated over micro-batches. 0: as many as fit, by an estimate,
    or 8 if the memory limit of the device is unknown."""
    logprob_chunk: int = 512
    """Tokens per device whose logits are computed at a time."""
    remat: Remat = "full"
    """Rematerialisation in the backward pass: full: recompute each layer; dots: everything except products with
    weights; none."""

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
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(f"optimizer.{field}", getattr(self, field), "must be >= 0 and finite")

    @property
    def spec(self) -> OptimizerSpec:
        """The static settings, which select the compiled program."""
        return OptimizerSpec(self.adam_beta1, self.adam_beta2, self.adam_epsilon, self.moment_dtype)


class TrainState(NamedTuple):
    """The state that an update changes; its buffers are donated."""

    params: Params
    """Master parameters."""
    opt_state: Any
    """Optax state: both moments and the count of applied updates."""
    iteration: jax.Array
    """int32: completed iterations, including those with skipped updates; not incremented by the update itself."""
    attempt: jax.Array
    """int32: incremented when an iteration is repeated, so that it draws different noise."""
    skipped: jax.Array
    """int32: updates skipped because they were not finite."""
    memory: Memory | None = None
    """Embeddings of the Challenger's earlier queries; None without a memory."""


def optimizer(spec: OptimizerSpec, hyper: Hyperparameters) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with a linear warm-up. Skipped updates do not count as warm-up steps."""

    def schedule(count: Any) -> jax.Array:
        return hyper.learning_rate * jnp.minimum(1.0, (count + 1) / hyper.warmup_steps)

    return optax.chain(
        optax.clip_by_global_norm(hyper.max_grad_norm),  # pyright: ignore[reportArgumentType]
        optax.adamw(
            schedule,
            b1=spec.adam_beta1,
            b2=spec.adam_beta2,
            eps=spec.adam_epsilon,
            weight_decay=hyper.weight_decay,  # pyright: ignore[reportArgumentType]
            mu_dtype=spec.moment_dtype,
        ),
    )


_UNREAD = Hyperparameters(*[0.0] * len(Hyperparameters._fields))
"""Placeholders: initialising the moments reads no hyperparameter."""


def init_state(params: Params, spec: OptimizerSpec, memory: tuple[int, int] | None = None) -> TrainState:
    """The initial state, sharded over the mesh. It owns copies of `params`, because it is donated and the reference
    keeps its own; `memory` = (size, width) adds an empty memory of queries."""
    params = jax.tree.map(jnp.copy, params)
    # the second moment is float32 for parameters of any dtype
    moments = optimizer(spec, _UNREAD).init(cast(params, "float32"))
    iteration, attempt, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: the state is donated
    remembered = None if memory is None else empty(*memory)
    return shard_params(TrainState(params, moments, iteration, attempt, skipped, remembered))


def apply_gradients(
    state: TrainState,
    grads: Params,
    loss: jax.Array,
    spec: OptimizerSpec,
    hyper: Hyperparameters,
    inputs_finite: jax.Array | bool = True,
) -> tuple[TrainState, Metrics]:
    """One clipped AdamW step. If the loss or the gradient's norm is not finite, or `inputs_finite` is False, only
    `skipped` changes."""
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss) & inputs_finite

    updates, opt_state = optimizer(spec, hyper).update(grads, state.opt_state, state.params)
    moved = optax.apply_updates(state.params, updates), opt_state

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        # an elementwise select, because the result of a branch would be a second copy of the whole state; moments of
        # float32 gradients are cast back to their initial dtype
        return jnp.where(finite, new.astype(old.dtype), old)

    params, opt_state = jax.tree.map(kept, moved, (state.params, state.opt_state))
    skipped = state.skipped + ~finite
    new = shard_params(TrainState(params, opt_state, state.iteration, state.attempt, skipped, state.memory))
    return new, {"grad_norm": norm, "skipped_updates": skipped.astype(jnp.float32)}
