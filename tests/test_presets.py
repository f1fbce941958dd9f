"""Presets: what the paper gives is in them, what it leaves open is listed, and each of them runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lsp_jax import cli, presets
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.model.config import RopeScaling
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.training import loop
from test_data import write_rows
from test_trainer import game_dir, read_lines
from tiny import tiny_dir

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "paper"))
import table

QUICK_COMPILES = True
PAPER = [name for name in presets.PRESETS if name.startswith("paper_")]
SELF_PLAY = [name for name in PAPER if "grpo" not in name]
DATA = [name for name in PAPER if "grpo" in name]


def field(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


# --- what they say -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_can_be_checked_and_read_back(name: str):
    config = presets.get(name)
    config.check() if name != "paper_grpo_mbpp" else replace(config, allow_code_execution=True).check()
    assert TrainConfig.from_json(config.to_json()) == config
    assert presets.PRESETS[name].__doc__


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_is_pinned(name: str):
    """PAPER.md, "What the paper ran" and "One iteration"."""
    config = presets.get(name)
    assert config.model == "meta-llama/Llama-3.2-3B-Instruct"
    assert config.play.num_queries == 8
    assert config.loss.beta == 0.05 and config.loss.kl_estimator == "k1"
    assert config.loss.loss_type == "sequence" and config.loss.scale_rewards == "none"
    assert config.loss.num_iterations == 1 and config.loss.importance_cap == 0
    assert config.optimizer.learning_rate == (1e-6 if name in DATA else 3e-6)
    assert not config.reward.standardize and not config.reward.clip
    zero = name in DATA or "zero" in name
    assert config.loss.use_quality == (config.reward.quality_weight > 0) == (not zero)
    assert zero or config.reward.quality_mode == "text"
    if name in ("paper_grpo_maths", "paper_grpo_mbpp"):
        assert not config.reward.preference_model and config.reward.maths_weight + config.reward.code_weight == 1
    else:
        assert config.reward.preference_model == "Skywork/Skywork-Reward-V2-Llama-3.2-3B"


@pytest.mark.parametrize("name", SELF_PLAY)
def test_what_the_paper_leaves_open_is_listed_with_a_reason(name: str):
    config = presets.get(name)
    for path, (value, why) in presets.LEFT_OPEN.items():
        if path == "reward.quality_weight" and "zero" in name:
            continue
        assert field(config, path) == value and len(why) > 10, path


def test_tasks_differ_and_name_their_subject():
    tasks = {name: presets.get(name).prompts.challenger for name in ("paper_lsp", "paper_lsp_maths", "paper_lsp_code")}
    assert len(set(tasks.values())) == 3
    assert "mathematics" in tasks["paper_lsp_maths"] and "Python" in tasks["paper_lsp_code"]


def test_recommended_sizes():
    assert [presets.recommended_lsp(size).model for size in ("1b", "3b", "8b")] == [
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.2-3B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
    ]
    assert presets.recommended_lsp().loss.kl_estimator == "k2"
    with pytest.raises(InputError, match="1b, 3b, 8b"):
        presets.recommended_lsp("70b")


# --- each runs ---------------------------------------------------------------------------------------------------

ROWS = [
    {"instruction": "Name a planet.", "input": "", "problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$."},
    {"instruction": "Translate.", "input": "Haus", "problem": "What is 2 + 2?", "solution": "It is $\\boxed{4}$."},
    {"instruction": "Say hello.", "input": "", "problem": "What is 3 + 3?", "solution": "It is $\\boxed{6}$."},
]
CODE = {"text": "Write f that doubles.", "test_list": ["assert f(1) == 2"], "test_setup_code": ""}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy and a reward model in the shape of Llama 3.2 (tied, grouped queries, llama3 RoPE), and a data set."""
    base = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 256),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
    }
    return {
        "policy": game_dir(base / "policy", **shape),
        "reward": tiny_dir(base / "reward", seed=1, head="score", num_hidden_layers=1, **shape),
        "data": write_rows(base / "rows.jsonl", [row | CODE for row in ROWS]),
    }


def small(config: TrainConfig, models: dict[str, Path], output_dir: Path) -> TrainConfig:
    """The preset on the tiny models, three iterations of short texts; the objective as it is."""
    reward = replace(config.reward, quality_max_length=8)
    if reward.preference_model:
        reward = replace(reward, preference_model=str(models["reward"]))
    data = replace(config.data, source=str(models["data"]), subset="") if config.data.source else config.data
    return replace(
        config,
        model=str(models["policy"]),
        output_dir=str(output_dir),
        max_steps=3,
        save_steps=3,
        allow_code_execution=config.reward.code_weight > 0,
        play=replace(config.play, num_generations=2, max_query_length=8, max_completion_length=6),
        reward=reward,
        data=data,
    )


needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")


EACH_TIME = "paper_lsp", "paper_grpo_maths", "recommended_lsp_1b"
"""One of self-play, of data with a sandbox, and of ours; the others, half a minute each, only in `make test-slow`."""


def marks(name: str) -> list[pytest.MarkDecorator]:
    sandboxed = [needs_sandbox] if name in ("paper_grpo_maths", "paper_grpo_mbpp") else []
    return sandboxed if name in EACH_TIME else [*sandboxed, pytest.mark.slow]


@pytest.mark.full
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name)) for name in presets.PRESETS if name != "quickstart"]
)
def test_three_iterations(name: str, models: dict[str, Path], tmp_path: Path):
    config = small(presets.get(name), models, tmp_path / "run")
    loop.train(config)
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    transcripts = read_lines(tmp_path / "run" / "transcripts.jsonl")
    assert [line["iteration"] for line in metrics] == [1, 2, 3]
    assert len(transcripts) == 3 * config.play.num_queries
    expected = {part for part in ("preference", "quality", "maths", "code") if f"rewards/{part}/mean" in metrics[0]}
    configured = {
        "preference": bool(config.reward.preference_model),
        **{part: field(config, f"reward.{part}_weight") > 0 for part in ("quality", "maths", "code")},
    }
    assert expected == {part for part, on in configured.items() if on}
    assert ("challenger/loss" in metrics[0]) == (name in SELF_PLAY or name.startswith("recommended"))
    for line in metrics:
        assert line["skipped_updates"] == 0 and line["sampling/token_mult_prob_error"] < 1.001
    if config.reward.quality_mode == "text" and config.reward.quality_weight:
        assert all(line["rewards/quality/failed_fraction"] == 1 for line in metrics), "a random judge writes no score"
    if config.reward.code_weight or config.reward.maths_weight:
        assert all(line["answers/valid_fraction"] == 1 for line in metrics), "wrong answers, but every one was judged"


@pytest.mark.full
@pytest.mark.parametrize(
    "order", [("paper_grpo", "paper_lsp"), pytest.param(("paper_lsp", "paper_grpo"), marks=pytest.mark.slow)]
)
def test_two_stages_are_two_commands(order: tuple[str, str], models: dict[str, Path], tmp_path: Path):
    shared = ["--max-steps", 1, "--reward.preference-model", models["reward"], "--reward.quality-max-length", 8]
    shared += ["--play.num-generations", 2, "--play.max-query-length", 8, "--play.max-completion-length", 6]
    starts = [["--model", models["policy"]], ["--init-from", tmp_path / order[0]]]
    for name, start in zip(order, starts, strict=True):
        data = ["--data.source", models["data"]] if name == "paper_grpo" else []
        command = ["train", "--preset", name, "--output-dir", tmp_path / name, *start, *data, *shared]
        assert cli.main([str(part) for part in command]) == 0
    second = json.loads((tmp_path / order[1] / "config.json").read_text())
    assert second["init_from"] == str(tmp_path / order[0]) and second["init_step"] == 1
    assert read_lines(tmp_path / order[1] / "metrics.jsonl")[0]["solver/kl"] == pytest.approx(0, abs=1e-6)


# --- the paper's table -------------------------------------------------------------------------------------------


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TrainConfig]:
    """What a command of the table would train."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", seen.append)

    def run(command: str) -> TrainConfig:
        program, *arguments = command.split()
        assert program == "lsp-jax" and cli.main(arguments) == 0
        return seen.pop()

    return run


def test_every_cell_has_its_commands(parsed: Callable[[str], TrainConfig]):
    rows = {cell.run for cell in table.CELLS} - {"", "base"}
    assert rows == set(table.RUNS), "every run stands in a table and every cell has a run"
    for run, stage in table.RUNS.items():
        *earlier, last = table.commands(run, "runs")
        config = parsed(last)
        config.check()
        assert config.output_dir == f"runs/{run}"
        same = {"output_dir", "init_from", "resume", "allow_code_execution"}
        preset = presets.get(stage.preset)
        assert all(
            getattr(config, f.name) == getattr(preset, f.name) for f in dataclasses.fields(config) if f.name not in same
        )
        if stage.after:
            assert config.init_from == parsed(earlier[-1]).output_dir
        else:
            assert not earlier and not config.init_from


def test_the_table_shows_scores_beside_the_papers_and_names_what_is_missing(tmp_path: Path):
    def evaluate(run: str, benchmark: str, content: str) -> None:
        path = tmp_path / run / "evaluation" / f"{benchmark}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    evaluate("base", "math", '{"score": 41.25}')
    evaluate("paper_lsp_maths", "math", '{"score": 44}')
    shown = table.table("v3", tmp_path)
    assert "| math | base | 48.7 | 41.2 |" in shown
    assert "| math | LSP |  | 44.0 |" in shown and "| math | best of the rows | 54.6 | 44.0 |" in shown
    assert "| alpacaeval_llama4 | LSP, then RL | 39.5 |  |" in shown
    todo = "\n".join(table.missing("v3", tmp_path))
    assert f"--preset paper_lsp_maths --output-dir {tmp_path}/paper_lsp_maths" in todo, "GSM8K still needs the run"
    assert f"{tmp_path}/base/evaluation/gsm8k.json" in todo and "base/evaluation/math.json" not in todo
    (tmp_path / "paper_lsp_maths" / "export").mkdir()
    assert f"--output-dir {tmp_path}/paper_lsp_maths " not in "\n".join(table.missing("v3", tmp_path))
    evaluate("base", "math", '{"score": "good"}')
    with pytest.raises(ValueError, match="must hold an object with `score`"):
        table.table("v3", tmp_path)


def test_sampling_of_the_paper_presets_is_the_policy_itself():
    for name in PAPER:
        config = presets.get(name)
        assert config.sampling == config.challenger_sampling == SamplingConfig()
