"""`Run`: everything that the host loop works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.config import TrainConfig
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.model.llama import Params
from lsp_jax.play.prompt_data import PromptData
from lsp_jax.policy import Policy
from lsp_jax.reward.base import Reward, RewardSpec
from lsp_jax.reward.execution.pool import Workers


@dataclass(frozen=True)
class Run:
    """Everything that the host loop works with."""

    config: TrainConfig
    policy: Policy
    """Model configuration and tokenizer; `params` is empty, as the caller holds the initial parameters."""
    reference: Params
    """The frozen reference in the compute dtype; the loaded arrays if they have that dtype. May be in host memory."""
    game: GameSpec
    """All settings that determine the programs."""
    hyper: Hyperparameters
    """The traced scalars, on the devices."""
    data: PromptData | None
    """Queries of a data set; None in self-play."""
    probe: PromptData | None
    """Held-out prompts (`health.probe`)."""
    rewards: tuple[Reward, ...]
    specs: tuple[RewardSpec, ...]
    """Their combination, in the same order; weights and bounds on the devices."""
    reward_model: Policy | None
    """The preference reward's model; `params` is empty."""
    workers: Workers
    """Processes of host components; closed at the end of the run."""
    mesh: Mesh | None
    """The mesh that everything is sharded over; None on a single device."""
    token_classes: jax.Array
    """uint8 [V]: text, blank or control, over the model's vocabulary."""
    seed_key: jax.Array
    directory: Path
