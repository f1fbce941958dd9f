"""The static specification of a run, and what follows from it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.novelty import MemoryConfig
from lsp_jax.learn.update import OptimizerConfig, TrainState, init_state
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.fused_attention import fused_kernel
from lsp_jax.model.llama import Params
from lsp_jax.model.lora import LoraConfig, attach_adapters, init_adapters
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text.prompts import PlayPrompts


@dataclass(frozen=True)
class Game:
    """All that is fixed during a run; hashable, the static argument of every stage."""

    model: LlamaConfig
    prompts: PlayPrompts
    play: PlayConfig
    solver_sampling: SamplingConfig
    challenger_sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    loss: LossConfig
    optimizer: OptimizerConfig
    compute_dtype: str
    """dtype of forward and backward passes; master parameters keep theirs."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def trains_challenger(self) -> bool:
        return self.loss.alpha_challenger > 0

    @property
    def init_train_state(self) -> Callable[[Params], TrainState]:
        """From the loaded parameters to the state that a run starts with; to be jitted."""
        size = (self.memory.size, self.model.hidden_size) if self.trains_challenger else None
        start = partial(init_state, config=self.optimizer, memory=size)
        return (lambda params: start(init_adapters(params, self.lora))) if self.lora.rank else start

    def attach_adapters(self, base: Params) -> Callable[[Params], Params]:
        """From the parameters that are trained, all or adapters of `base`, to those of the model."""
        return partial(attach_adapters, base, lora=self.lora) if self.lora.rank else lambda params: params

    @property
    def needs_base(self) -> bool:
        """Whether the update computes with the frozen reference: with adapters, and for the exact KL."""
        return self.lora.rank > 0 or self.loss.kl_estimator == "full"

    @property
    def recompute_old_logprobs(self) -> bool:
        """Whether the learner's log-probabilities of what was played are its own: below float32 decoding and the
        teacher-forced pass round differently, and importance correction compares the two."""
        return self.compute_dtype != "float32" or self.loss.importance_cap > 0

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the Solver and of the Challenger: the policies in the loss are the tempered ones."""
        return self.solver_sampling.temperature, self.challenger_sampling.temperature


def prompt_sharing(game: Game) -> tuple[int, int]:
    """How many consecutive rows of the Solver and of the Challenger are learned from with one pass over their prompt.

    1 on platforms with a fused attention kernel: it takes whole rows, and saves more than the prompts cost.
    """
    if fused_kernel(game.compute_dtype, game.model.head_dim) is not None:
        return 1, 1
    return game.play.num_generations, game.play.num_queries
