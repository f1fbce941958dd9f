"""Chunks in a run, programs compiled before the first iteration, kept on disk for the next start, traced on request."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax.config import RewardConfig, TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.play.selfplay import PlayConfig
from test_trainer import game_config, host_reward, read_lines, tree_hash

QUICK_COMPILES = True  # whatever is compared is compiled alike
PLAY = PlayConfig(num_queries=4, num_generations=2, max_query_length=8, max_completion_length=12)


def config_of(model: Path, directory: Path, chunk: int, **changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"reward": RewardConfig(quality_weight=0.5), "play": replace(PLAY, decode_chunk=chunk)}
    return game_config(model, directory, **{**fields, **changes})


@pytest.mark.parametrize(
    ("iterations", "lengths"),
    [pytest.param(21, 10, marks=pytest.mark.full), pytest.param(51, 20, marks=pytest.mark.slow)],
)
def test_a_run_in_chunks_plays_the_same_and_compiles_nothing_once_it_has_begun(
    game_model: Path, tmp_path: Path, iterations: int, lengths: int
) -> None:
    """Iterations of more than that many mean lengths with everything compiled before; two of them in one piece to
    compare with."""
    long = {"max_steps": iterations, "save_steps": iterations, "precompile": True, "profile": True}
    lsp.train(config_of(game_model, tmp_path / "chunks", 5, **long), rewards=[host_reward()])
    lsp.train(config_of(game_model, tmp_path / "whole", 0, max_steps=2), rewards=[host_reward()])
    chunked, whole = (read_lines(tmp_path / name / "transcripts.jsonl") for name in ("chunks", "whole"))
    assert [(r["query"], [a["text"] for a in r["answers"]]) for r in chunked[:8]] == [
        (r["query"], [a["text"] for a in r["answers"]]) for r in whole
    ]
    metrics = read_lines(tmp_path / "chunks" / "metrics.jsonl")
    assert len({line["solver/completions/mean_length"] for line in metrics}) > lengths
    assert {line["compile/count"] for line in metrics[1:]} == {metrics[1]["compile/count"]}
    assert all(line["host_reads"] >= 1 for line in metrics)
    assert read_lines(tmp_path / "whole" / "metrics.jsonl")[0]["host_reads"] < metrics[0]["host_reads"]
    assert (
        list((tmp_path / "chunks" / "profile").rglob("*.xplane.pb")) and not (tmp_path / "whole" / "profile").exists()
    )


@pytest.mark.full
def test_the_second_start_compiles_nothing(game_model: Path, tmp_path: Path) -> None:
    """Two processes of the same run: the second finds every program on disk, adds none, and plays the same."""
    config = config_of(game_model, tmp_path / "first", 6, max_steps=1, compilation_cache=str(tmp_path / "kept"))
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # the run's own is what this is about
    found = []
    for name in ("first", "second"):
        (tmp_path / f"{name}.json").write_text(replace(config, output_dir=str(tmp_path / name)).to_json())
        command = [sys.executable, str(Path(__file__)), str(tmp_path / f"{name}.json")]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stderr[-3000:]
        found.append(json.loads(ran.stdout.splitlines()[-1]))
        found[-1]["kept"] = sum(file.endswith("-cache") for file in tree_hash(tmp_path / "kept"))
    first, second = found
    assert first["misses"] > 20 and first["kept"] == second["kept"] > 20
    assert second["misses"] == 0 and second["hits"] >= first["misses"]
    transcripts = [(tmp_path / name / "transcripts.jsonl").read_bytes() for name in ("first", "second")]
    assert transcripts[0] == transcripts[1]


def test_a_chunk_below_zero_is_refused() -> None:
    with pytest.raises(InputError, match=r"play\.decode_chunk = -1: must be a number of tokens, or 0"):
        replace(PLAY, decode_chunk=-1).check(trains_challenger=True)


def main() -> None:
    """A run, then how often a program was found on disk and how often not."""
    import jax

    counts = {"hits": 0, "misses": 0}

    def count(event: str, **_: Any) -> None:
        if event.startswith("/jax/compilation_cache/cache_"):
            counts[event.rpartition("_")[2]] = counts.get(event.rpartition("_")[2], 0) + 1

    jax.monitoring.register_event_listener(count)
    lsp.train(TrainConfig.load(sys.argv[1]))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
