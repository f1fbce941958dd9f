"""Every kind of run goes on exactly: LSP, LSP-Zero, GRPO with data and adapters, with accumulation and two epochs."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import child_run
import lsp_jax as lsp
from lsp_jax.config import RewardConfig
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.model.lora import LoraConfig
from lsp_jax.model.sharding import MeshConfig
from lsp_jax.play.prompt_data import DataConfig
from lsp_jax.text.prompts import PromptConfig
from test_process_runs import saved_state
from test_resume import K, assert_same_run, config_of
from test_trainer import host_reward, read_lines, same_bits

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
    "LSP with adapters": lambda _: {"loss": LossConfig(num_iterations=2), "lora": LoraConfig(rank=2)},
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


DEVICES = {1: (MeshConfig(), 8), 8: (MeshConfig(fsdp=4, tensor=2), 2)}
"""The mesh, and the rows a device that make an accumulation of 2 of the 16 rows of an update."""


@pytest.mark.slow
@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_after_k_steps_and_k_more_are_2k_steps(kind: str, devices: int, game_model: Path, tmp_path: Path):
    """Killed in iteration k + 1, once the checkpoint of iteration k is whole; each part in a process of its own."""
    mesh, rows = DEVICES[devices]
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, micro_batch_size=rows)
    whole = config_of(game_model, tmp_path / "whole", optimizer=optimizer, mesh=mesh, **KINDS[kind](tmp_path))
    killed = replace(whole, output_dir=str(tmp_path / "killed"))
    env = child_run.environment(tmp_path / "programs", devices)
    ended = child_run.run(killed, "killed_after_saving", K, env=env)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
    assert (tmp_path / "killed" / "checkpoints" / str(K)).is_dir()
    assert len(read_lines(tmp_path / "killed" / "metrics.jsonl")) == K + 1
    said = [child_run.run(config, env=env) for config in (replace(killed, resume="must"), whole)]
    assert [ended.returncode for ended in said] == [0, 0], said[0].stderr[-3000:] + said[1].stderr[-3000:]
    assert f"resuming after iteration {K}\n" in said[0].stdout and "resuming" not in said[1].stdout
    if devices > 1:
        assert "mesh: data 1, fsdp 4, tensor 2 (8 devices" in said[0].stdout
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    sums = [(tmp_path / name / "checksums.jsonl").read_bytes() for name in ("killed", "whole")]
    assert sums[0] == sums[1]
    states = [saved_state(tmp_path / name, game_model, 2 * K)[0] for name in ("killed", "whole")]
    assert same_bits(*states)
    assert any(line["grad_norm"] > 0 for line in read_lines(tmp_path / "whole" / "metrics.jsonl"))
