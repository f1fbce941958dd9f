"""Named configurations: `lsp-jax train --preset NAME`, or `lsp.presets.NAME()` in a notebook.

`paper_*` reproduce the paper's runs literally: values it gives are marked "given", those it leaves open are listed in
`LEFT_OPEN` with our value and the reason. `recommended_lsp_*` are the settings we recommend. The paper's stages ("GRPO,
then LSP") are two runs, the second with `--init-from` the first; `experiments/paper` has a command for every cell of
the paper's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core.errors import one_of
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.model.lora import LoraConfig
from lsp_jax.play.prompt_data import DataConfig
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text import challenger_tasks
from lsp_jax.text.prompts import PromptConfig

DEMO_MODEL = "./models/SmolLM2-135M-Instruct"  # the leading dot rules out a hub id
"""Directory of the demo model, created by `make quickstart` (with `lsp-jax demo-model`)."""

PAPER_MODEL = "meta-llama/Llama-3.2-3B-Instruct"
PAPER_REWARD_MODEL = "Skywork/Skywork-Reward-V2-Llama-3.2-3B"
MODELS = {
    "1b": "meta-llama/Llama-3.2-1B-Instruct",
    "3b": PAPER_MODEL,
    "8b": "meta-llama/Llama-3.1-8B-Instruct",
}
"""Policies of `recommended_lsp`."""

LEFT_OPEN: dict[str, tuple[Any, str]] = {
    "play.num_generations": (8, "batch 4 x accumulation 2 on eight devices would be 8 queries x 8; TRL's default too"),
    "play.max_query_length": (256, "long enough for the instructions shown in the paper"),
    "play.max_completion_length": (512, "most answers of the base model end earlier"),
    "sampling.temperature": (1.0, "samples from the trained policy itself"),
    "sampling.top_p": (1.0, "no truncation, for the same reason"),
    "challenger_sampling.temperature": (1.0, "as for the Solver"),
    "challenger_sampling.top_p": (1.0, "as for the Solver"),
    "loss.alpha_challenger": (1.0, "equal weight for both roles"),
    "loss.invalid_query_penalty": (
        -40.0,
        "below -V of queries with high-scoring answers, so that truncation does not pay",
    ),
    "reward.preference_weight": (1.0, "the reward model's raw score"),
    "reward.quality_weight": (1.0, "points 0..7, unscaled: the equations add R and R_Q without a factor"),
    "reward.quality_max_length": (64, "room for the seven points, their sum and the tag"),
    "optimizer.adam_beta1": (0.9, "AdamW's default"),
    "optimizer.adam_beta2": (0.999, "AdamW's default"),
    "optimizer.weight_decay": (0.0, "TRL's default"),
    "optimizer.warmup_steps": (0, "no warm-up is mentioned"),
    "optimizer.max_grad_norm": (1.0, "TRL's default"),
    "max_steps": (1500, "the last iteration with samples in the paper"),
}
"""Our values for settings that the paper omits, with reasons. (GRPO has no Challenger: alpha_challenger is 0.)"""


def quickstart() -> TrainConfig:
    """LSP on arithmetic with the demo model, in minutes on two CPU cores.

    The Challenger completes "What is ", a verifier checks the Solver's final number, and the frozen model's own quality
    score keeps the text of both roles readable. The learning rate is far above the paper's, so that a few iterations
    of such a small model show an effect.
    """
    return TrainConfig(
        model=DEMO_MODEL,
        output_dir="runs/quickstart",
        max_steps=6,
        save_steps=3,
        save_total_limit=1,
        play=PlayConfig(num_queries=8, num_generations=4, max_query_length=12, max_completion_length=20),
        prompts=PromptConfig(challenger=challenger_tasks.ARITHMETIC, query_prefix="What is "),
        sampling=SamplingConfig(temperature=0.8),
        challenger_sampling=SamplingConfig(temperature=0.8),
        # the quality score is 0..7: at this weight a correct answer is still worth more than a well-written one
        reward=RewardConfig(quality_weight=0.1, arithmetic_weight=1.0),
        loss=LossConfig(beta=0.02, invalid_query_penalty=-1.5),
        optimizer=OptimizerConfig(learning_rate=3e-5, micro_batch_size=16),
    )


def paper_lsp() -> TrainConfig:
    """LSP on general instructions with a reward model and the quality self-reward, without data (LSP, Section 3)."""
    return TrainConfig(
        model=PAPER_MODEL,
        output_dir="runs/paper_lsp",
        max_steps=_open("max_steps"),
        save_steps=500,
        save_total_limit=3,  # the paper shows samples from three checkpoints
        play=PlayConfig(
            num_queries=8,  # given
            num_generations=_open("play.num_generations"),
            max_query_length=_open("play.max_query_length"),
            max_completion_length=_open("play.max_completion_length"),
        ),
        prompts=PromptConfig(challenger=challenger_tasks.INSTRUCTIONS),
        sampling=SamplingConfig(_open("sampling.temperature"), top_p=_open("sampling.top_p")),
        challenger_sampling=SamplingConfig(
            _open("challenger_sampling.temperature"), top_p=_open("challenger_sampling.top_p")
        ),
        reward=RewardConfig(
            preference_model=PAPER_REWARD_MODEL,  # given
            preference_weight=_open("reward.preference_weight"),
            quality_weight=_open("reward.quality_weight"),
            quality_mode="text",  # given: a short calculation and a tagged score
            quality_max_length=_open("reward.quality_max_length"),
        ),
        loss=LossConfig(
            beta=0.05,  # given
            kl_estimator="k1",  # as printed; its expected gradient is zero, see learn/losses.py
            loss_type="sequence",  # given: no length normalisation, no standard deviation
            alpha_challenger=_open("loss.alpha_challenger"),
            invalid_query_penalty=_open("loss.invalid_query_penalty"),
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-6,  # given
            warmup_steps=_open("optimizer.warmup_steps"),
            adam_beta1=_open("optimizer.adam_beta1"),
            adam_beta2=_open("optimizer.adam_beta2"),
            weight_decay=_open("optimizer.weight_decay"),
            max_grad_norm=_open("optimizer.max_grad_norm"),
            micro_batch_size=4,  # given as batch size 4, accumulation 2; it does not change the gradient
        ),
    )


def paper_lsp_zero() -> TrainConfig:
    """LSP without the quality self-reward, on general instructions."""
    return _zero(paper_lsp())


def paper_grpo() -> TrainConfig:
    """The baseline with data: GRPO of the Solver on Alpaca's instructions with the same reward model."""
    base = paper_lsp()
    return replace(
        _zero(base),
        output_dir="runs/paper_grpo",
        data=DataConfig(source="tatsu-lab/alpaca", prompt_fields=("instruction", "input")),
        loss=replace(base.loss, alpha_challenger=0.0, use_quality=False),
        optimizer=replace(base.optimizer, learning_rate=1e-6),  # given
    )


def paper_lsp_maths() -> TrainConfig:
    """LSP whose Challenger writes mathematics problems (evaluated on MATH and GSM8K)."""
    return replace(
        paper_lsp(), output_dir="runs/paper_lsp_maths", prompts=PromptConfig(challenger=challenger_tasks.MATHEMATICS)
    )


def paper_lsp_zero_maths() -> TrainConfig:
    """LSP-Zero whose Challenger writes mathematics problems."""
    return _zero(paper_lsp_maths())


def paper_grpo_maths() -> TrainConfig:
    """The mathematics baseline: GRPO on the training problems of MATH with verified final answers."""
    data = DataConfig(
        source="DigitalLearningGmbH/MATH-lighteval",
        prompt_fields=("problem",),
        answer_field="solution",
        instruction="Solve this problem step by step and put the final answer in \\boxed{}.",
    )
    reward = RewardConfig(maths_weight=1.0, quality_weight=0.0)
    return replace(paper_grpo(), output_dir="runs/paper_grpo_maths", data=data, reward=reward)


def paper_lsp_code() -> TrainConfig:
    """LSP whose Challenger asks for Python functions (evaluated on HumanEval)."""
    return replace(
        paper_lsp(), output_dir="runs/paper_lsp_code", prompts=PromptConfig(challenger=challenger_tasks.PYTHON)
    )


def paper_lsp_zero_code() -> TrainConfig:
    """LSP-Zero whose Challenger asks for Python functions."""
    return _zero(paper_lsp_code())


def paper_grpo_mbpp() -> TrainConfig:
    """The code baseline: GRPO on MBPP, with tests run on the programs (needs --allow-code-execution)."""
    data = DataConfig(
        source="google-research-datasets/mbpp",
        subset="full",
        prompt_fields=("text", "test_list"),
        instruction="Write a Python function in one code block. It must pass the tests below.",
    )
    reward = RewardConfig(code_weight=1.0, quality_weight=0.0)
    return replace(paper_grpo(), output_dir="runs/paper_grpo_mbpp", data=data, reward=reward)


def recommended_lsp(size: str = "3b") -> TrainConfig:
    """The recommended LSP settings for Llama 3.2 1B ("1b") or 3B ("3b"), or Llama 3.1 8B ("8b").

    Changes from the paper: a KL with a gradient (k2), the quality score read from logits (nothing to parse, a few
    tokens instead of a calculation), standardised rewards, a warm-up, and twice as many queries per iteration.
    """
    one_of("size", size, tuple(MODELS))
    base = paper_lsp()
    return replace(
        base,
        model=MODELS[size],
        output_dir=f"runs/recommended_lsp_{size}",
        save_steps=100,
        play=replace(base.play, num_queries=16),
        reward=RewardConfig(
            preference_model=PAPER_REWARD_MODEL,
            quality_mode="logits",
            standardize=("preference", "quality"),
            clip=("preference:-3:3", "quality:-3:3"),
        ),
        # rewards are standardised and clipped at 3, so -V is at least -3
        loss=replace(base.loss, kl_estimator="k2", invalid_query_penalty=-4.0),
        optimizer=replace(
            base.optimizer, learning_rate=1e-6 if size == "8b" else 3e-6, warmup_steps=20, micro_batch_size=0
        ),
    )


def recommended_lsp_1b() -> TrainConfig:
    """`recommended_lsp` on Llama 3.2 1B."""
    return recommended_lsp("1b")


def recommended_lsp_3b() -> TrainConfig:
    """`recommended_lsp` on Llama 3.2 3B."""
    return recommended_lsp("3b")


def recommended_lsp_8b() -> TrainConfig:
    """`recommended_lsp` on Llama 3.1 8B."""
    return recommended_lsp("8b")


def lora_laptop() -> TrainConfig:
    """`quickstart` with adapters: 5 million trainable parameters instead of 135, and ten times the learning rate."""
    base = quickstart()
    return replace(
        base,
        output_dir="runs/lora_laptop",
        lora=LoraConfig(rank=16, alpha=32.0),
        optimizer=replace(base.optimizer, learning_rate=3e-4),
    )


def lora_24gb() -> TrainConfig:
    """`recommended_lsp` on Llama 3.2 3B with adapters, for one accelerator with 24 GB.

    One frozen base in bfloat16 serves as policy, reference and judge, beside the reward model. It uses half the queries
    of `recommended_lsp`, so that the KV cache fits too.
    """
    base = recommended_lsp("3b")
    return replace(
        base,
        output_dir="runs/lora_24gb",
        play=replace(base.play, num_queries=8),
        lora=LoraConfig(rank=32, alpha=64.0),
        optimizer=replace(base.optimizer, learning_rate=3e-5),
    )


def _open(field: str) -> Any:
    return LEFT_OPEN[field][0]


def _zero(config: TrainConfig) -> TrainConfig:
    return replace(
        config,
        output_dir=config.output_dir.replace("_lsp", "_lsp_zero"),
        reward=replace(config.reward, quality_weight=0.0),
        loss=replace(config.loss, use_quality=False),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    preset.__name__: preset
    for preset in (
        quickstart,
        paper_lsp,
        paper_lsp_zero,
        paper_grpo,
        paper_lsp_maths,
        paper_lsp_zero_maths,
        paper_grpo_maths,
        paper_lsp_code,
        paper_lsp_zero_code,
        paper_grpo_mbpp,
        recommended_lsp_1b,
        recommended_lsp_3b,
        recommended_lsp_8b,
        lora_laptop,
        lora_24gb,
    )
}


def get(name: str) -> TrainConfig:
    """Returns the preset `name`; raises InputError listing the names if there is none."""
    one_of("preset", name, tuple(PRESETS))
    return PRESETS[name]()
