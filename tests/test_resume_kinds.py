"""Every kind of run goes on exactly: LSP, LSP-Zero and GRPO with data, with accumulation and inner epochs of two."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax.config import RewardConfig
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.update import OptimizerConfig
from lsp_jax.play.data import DataConfig
from lsp_jax.text.prompts import PromptConfig
from test_resume import K, assert_same_run, config_of
from test_trainer import host_reward, same_bits

QUICK_COMPILES = True  # the resumed run is compared bit by bit with the whole one
pytestmark = pytest.mark.full


def grpo(folder: Path) -> dict[str, Any]:
    """Seven prompts and four a step: an epoch ends inside every run, and the cursor decides who comes next."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {number}."}) + "\n" for number in range(7)))
    return {
        "data": DataConfig(source=str(file)),
        "loss": LossConfig(alpha_challenger=0.0, num_iterations=2),
        "prompts": PromptConfig(challenger="Ask."),
    }


KINDS = {
    "LSP": lambda _: {"loss": LossConfig(num_iterations=2), "reward": RewardConfig(quality_weight=0.5)},
    "LSP-Zero": lambda _: {"loss": LossConfig(num_iterations=2, use_quality=False)},
    "GRPO": grpo,
}


@pytest.mark.parametrize("kind", KINDS)
def test_k_steps_and_k_more_are_2k_steps(kind: str, game_model: Path, tmp_path: Path):
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, micro_batch_size=8)  # 16 rows: accumulation of 2
    whole = config_of(game_model, tmp_path / "whole", optimizer=optimizer, **KINDS[kind](tmp_path))
    state = lsp.train(whole, rewards=[host_reward()])
    half = replace(whole, output_dir=str(tmp_path / "half"), max_steps=K)
    lsp.train(half, rewards=[host_reward()])
    shutil.rmtree(tmp_path / "half" / "export")
    resumed = lsp.train(replace(half, max_steps=2 * K, resume="must"), rewards=[host_reward()])
    assert same_bits(resumed, state)
    assert_same_run(tmp_path / "half", tmp_path / "whole")
