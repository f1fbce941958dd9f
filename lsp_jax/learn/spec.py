"""Static settings of the learner's programs, and traced hyperparameters.

`LearnerSpec` is static: a different one compiles different programs. `Hyperparameters` are traced scalars: changing one
compiles nothing, and a sweep over them shares all programs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.fused_attention import fused_kernel
from lsp_jax.model.llama import Params, Remat
from lsp_jax.model.lora import LoraConfig, attach_adapters

Scalar = Any
"""float32 []: an array of JAX or numpy, a tracer, or a Python number."""


class Hyperparameters(NamedTuple):
    """Scalars float32 [] of the objective and the optimiser; a pytree, traced by every stage that reads it."""

    beta: Scalar
    """Weight of the KL to the reference."""
    clip_low: Scalar
    """Lower clipping bound of the probability ratio, 1 - epsilon; read with inner epochs."""
    clip_high: Scalar
    """Upper clipping bound of the ratio."""
    importance_cap: Scalar
    """Cap of the truncated importance weights; read with `LossSpec.importance_correction`."""
    alpha_challenger: Scalar
    """Weight of the Challenger's loss."""
    invalid_query_penalty: Scalar
    """Challenger reward of an invalid query."""
    value_low: Scalar
    """Lowest V(q) for which the Challenger is rewarded; -inf: no gate."""
    value_high: Scalar
    """Highest such V(q); inf: no gate."""
    novelty_penalty: Scalar
    """Subtracted from the Challenger's reward of a near-duplicate query."""
    near_duplicate: Scalar
    """Cosine similarity from which a query is a near-duplicate of an earlier one."""
    learning_rate: Scalar
    """Learning rate after warm-up."""
    warmup_steps: Scalar
    """Updates of linear warm-up, at least 1."""
    weight_decay: Scalar
    """Decoupled weight decay."""
    max_grad_norm: Scalar
    """Maximum global norm of the gradient, for clipping."""


@dataclass(frozen=True)
class LossSpec:
    """The static settings of `LossConfig` (`learn/losses.py`)."""

    kl_estimator: str = "k2"
    loss_type: str = "sequence"
    scale_rewards: str = "none"
    num_iterations: int = 1
    """Inner epochs: updates per rollout batch."""
    importance_correction: bool = False
    """Whether each token's gain has a truncated importance weight."""
    use_quality: bool = True
    """Whether quality rewards are part of the advantages (LSP) or only measured (LSP-Zero)."""
    trains_challenger: bool = True
    """Whether the Challenger's rows are in the loss."""


@dataclass(frozen=True)
class OptimizerSpec:
    """The static settings of `OptimizerConfig` (`learn/optimizer.py`)."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    moment_dtype: str = "float32"


@dataclass(frozen=True)
class RoleSpec:
    """Sampling settings of one role on which the learner depends."""

    temperature: float = 1.0
    """Sampling temperature: the policy in the loss is the tempered one."""
    prompt_group: int = 1
    """Number of consecutive rows that continue the same prompt."""


@dataclass(frozen=True)
class LearnerSpec:
    """All static settings of the reference pass and the update; hashable, a static argument."""

    model: LlamaConfig
    loss: LossSpec = field(default_factory=LossSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    micro_batch_size: int = 0
    """Rows per device and micro-batch; 0: `DEFAULT_MICRO_BATCH_SIZE`."""
    logprob_chunk: int = 512
    """Tokens per device whose logits are computed at a time."""
    remat: Remat = "full"
    """What the backward pass recomputes."""
    compute_dtype: str = "float32"
    """dtype of forward and backward passes; master parameters keep theirs."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    solver: RoleSpec = field(default_factory=RoleSpec)
    challenger: RoleSpec = field(default_factory=RoleSpec)

    def attach_adapters(self, base: Params) -> Callable[[Params], Params]:
        """A function from the trained parameters, all or adapters of `base`, to those of the model."""
        return partial(attach_adapters, base, lora=self.lora) if self.lora.rank else lambda params: params

    @property
    def needs_base(self) -> bool:
        """Whether the update reads the frozen reference's parameters: with adapters, and for the exact KL."""
        return self.lora.rank > 0 or self.loss.kl_estimator == "full"

    @property
    def recompute_old_logprobs(self) -> bool:
        """Whether the learner recomputes old log-probabilities: below float32, decoding and teacher-forced passes round
        differently, and importance correction compares the two."""
        return self.compute_dtype != "float32" or self.loss.importance_correction

    def prompt_sharing(self, role: RoleSpec) -> int:
        """Number of consecutive rows of `role` for which a shared prompt is computed once.

        1 on platforms with a fused attention kernel: it takes complete rows, and saves more than the prompts cost.
        """
        return 1 if fused_kernel(self.compute_dtype, self.model.head_dim) is not None else role.prompt_group
