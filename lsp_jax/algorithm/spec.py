"""The static specification of a run, and the traced scalars passed to its programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from lsp_jax.config import TrainConfig
from lsp_jax.learn.optimizer import TrainState, init_state
from lsp_jax.learn.spec import Hyperparameters, LearnerSpec, RoleSpec
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import Params
from lsp_jax.model.lora import init_adapters
from lsp_jax.play.decode import DecodeSpec
from lsp_jax.text.prompts import PlayPrompts


@dataclass(frozen=True)
class GameSpec:
    """All settings that determine the programs of a run; hashable. Each stage takes the part that it depends on."""

    prompts: PlayPrompts
    challenger: DecodeSpec
    solver: DecodeSpec
    learner: LearnerSpec
    num_queries: int
    """N."""
    num_generations: int
    """G."""
    memory_size: int
    """Queries of the Challenger kept for novelty, if it is trained."""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        model: LlamaConfig,
        prompts: PlayPrompts,
        stop_ids: tuple[int, ...],
        compute_dtype: str,
    ) -> GameSpec:
        """The specification of the run `config`; `compute_dtype` is float32 or bfloat16."""
        play, optimizer = config.play, config.optimizer
        return cls(
            prompts=prompts,
            challenger=DecodeSpec(
                model, config.challenger_sampling, play.max_query_length, stop_ids, play.decode_chunk
            ),
            solver=DecodeSpec(model, config.sampling, play.max_completion_length, stop_ids, play.decode_chunk),
            learner=LearnerSpec(
                model=model,
                loss=config.loss.spec,
                optimizer=optimizer.spec,
                micro_batch_size=optimizer.micro_batch_size,
                logprob_chunk=optimizer.logprob_chunk,
                remat=optimizer.remat,
                compute_dtype=compute_dtype,
                lora=config.lora,
                solver=RoleSpec(config.sampling.temperature, play.num_generations),
                challenger=RoleSpec(config.challenger_sampling.temperature, play.num_queries),
            ),
            num_queries=play.num_queries,
            num_generations=play.num_generations,
            memory_size=config.memory.size,
        )

    @property
    def model(self) -> LlamaConfig:
        """Model configuration of both roles."""
        return self.learner.model

    @property
    def trains_challenger(self) -> bool:
        """Whether the Challenger is trained."""
        return self.learner.loss.trains_challenger

    @property
    def init_train_state(self) -> Callable[[Params], TrainState]:
        """Function from the loaded parameters to the initial train state; to be jitted."""
        size = (self.memory_size, self.model.hidden_size) if self.trains_challenger else None
        start = partial(init_state, spec=self.learner.optimizer, memory=size)
        lora = self.learner.lora
        return (lambda params: start(init_adapters(params, lora))) if lora.rank else start


def hyperparameters(config: TrainConfig) -> Hyperparameters:
    """The traced scalars of the run `config`, numpy float32."""
    loss, optimizer = config.loss, config.optimizer
    clip_low, clip_high = loss.clip_range
    value_low, value_high = loss.value_gate
    scalars = Hyperparameters(
        beta=loss.beta,
        clip_low=clip_low,
        clip_high=clip_high,
        importance_cap=loss.importance_cap,
        alpha_challenger=loss.alpha_challenger,
        invalid_query_penalty=loss.invalid_query_penalty,
        value_low=value_low,
        value_high=value_high,
        novelty_penalty=config.memory.penalty,
        near_duplicate=config.memory.near_duplicate,
        learning_rate=optimizer.learning_rate,
        warmup_steps=max(optimizer.warmup_steps, 1),
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
    )
    return Hyperparameters(*map(np.float32, scalars))
