"""Named configurations: `lsp-jax train --preset NAME`, or `lsp.presets.NAME()` in a notebook."""

from __future__ import annotations

from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.errors import InputError
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.update import OptimizerConfig
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text import tasks
from lsp_jax.text.prompts import PromptConfig

DEMO_MODEL = "./models/SmolLM2-135M-Instruct"  # with a dot: never a hub id
"""Where `make quickstart` puts the demo model (`lsp-jax demo-model` makes it)."""


def quickstart() -> TrainConfig:
    """LSP on the demo model playing arithmetic, in minutes on two CPU cores.

    The Challenger completes "What is ", a verifier checks the Solver's final number, and the frozen model's own quality
    score keeps both roles readable. Learning rate and temperature are far above the paper's: so few iterations of so
    small a model would show nothing otherwise.
    """
    return TrainConfig(
        model=DEMO_MODEL,
        output_dir="runs/quickstart",
        max_steps=6,
        save_steps=3,
        save_total_limit=1,
        play=PlayConfig(num_queries=8, num_generations=4, max_query_length=12, max_completion_length=20),
        prompts=PromptConfig(challenger=tasks.ARITHMETIC, query_prefix="What is "),
        sampling=SamplingConfig(temperature=0.8),
        challenger_sampling=SamplingConfig(temperature=0.8),
        # the quality score 0..7 at a weight that leaves a right answer worth more than a pretty one
        reward=RewardConfig(quality_weight=0.1, arithmetic_weight=1.0),
        loss=LossConfig(beta=0.02, invalid_query_penalty=-1.5),
        optimizer=OptimizerConfig(learning_rate=3e-5, micro_batch_size=16),
    )


PRESETS = {"quickstart": quickstart}


def get(name: str) -> TrainConfig:
    """The preset of that name; InputError lists the names."""
    if name not in PRESETS:
        raise InputError("preset", name, f"must be one of {', '.join(PRESETS)}")
    return PRESETS[name]()
