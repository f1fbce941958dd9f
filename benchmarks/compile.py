"""What compiling costs: the first and the second start of one run, and what is compiled once a run has begun.

    PYTHONPATH=. python benchmarks/compile.py MODEL_DIR

1. `starts`: the same run twice, each a process of its own, with an empty directory for programs before the first:
   quickstart's game on MODEL_DIR. Seconds of the first iteration, of a steady one (the median of the later ones), and
   of those the first spends compiling or taking programs from disk. Tracing is in neither, but in the iteration.
2. `warm`: 51 iterations of a smaller game with answers of changing lengths, in chunks, everything that decoding may
   need compiled before (`--precompile`): how many programs iterations 2 to 51 add.

Writes `results/compile.json` and `results/compile.md`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure

import lsp_jax as lsp
from lsp_jax.config import TrainConfig
from lsp_jax.core.files import read_jsonl

STEADY, ITERATIONS = 4, 51
"""Iterations of a start; those that must compile nothing, and the first."""


def lines_of(directory: Path) -> list[dict[str, float]]:
    return list(read_jsonl(directory / "metrics.jsonl"))


def start(config: TrainConfig, directory: Path) -> dict[str, float]:
    """One start of the run in a process of its own."""
    file = directory.with_suffix(".json")
    file.write_text(replace(config, output_dir=str(directory)).to_json(), encoding="utf-8")
    code = "import sys, lsp_jax; lsp_jax.train(lsp_jax.config.TrainConfig.load(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, stdout=subprocess.DEVNULL, timeout=1800)
    first, *later = lines_of(directory)
    return {
        "first": first["time/iteration"],
        "steady": statistics.median(line["time/iteration"] for line in later),
        "programs": first["compile/count"],
        "loading": first["compile/seconds"],
        "compiled later": later[-1]["compile/count"] - first["compile/count"],
    }


def starts(model: str, directory: Path) -> dict[str, Any]:
    base = lsp.presets.quickstart()
    cache = str(directory / "programs")
    config = replace(base, model=model, max_steps=STEADY + 1, save_steps=STEADY + 1, compilation_cache=cache)
    found: dict[str, Any] = {name: start(config, directory / name) for name in ("first", "second")}
    second = found["second"]
    found["ratio"] = (second["first"] - second["loading"]) / second["steady"]
    return found


def warm(model: str, directory: Path) -> dict[str, float]:
    """Programs that iterations 2 to 51 compile, and how many mean lengths they saw."""
    base = lsp.presets.quickstart()
    config = replace(
        base,
        model=model,
        output_dir=str(directory / "warm"),
        max_steps=ITERATIONS,
        save_steps=ITERATIONS,
        precompile=True,
        compilation_cache=str(directory / "programs"),
        play=replace(base.play, num_queries=4, num_generations=2, max_completion_length=48, decode_chunk=8),
        reward=replace(base.reward, quality_weight=0.0),
    )
    lsp.train(config)
    lines = lines_of(directory / "warm")
    return {
        "iterations": len(lines) - 1,
        "compiled": lines[-1]["compile/count"] - lines[0]["compile/count"],
        "mean lengths seen": len({line["solver/completions/mean_length"] for line in lines}),
    }


def table(found: dict[str, Any]) -> str:
    lines = ["| start | first iteration s | of it loading or compiling s | programs | steady s | compiled later |"]
    lines.append("|---" * 6 + "|")
    for name in ("first", "second"):
        row = found["starts"][name]
        seconds = f"{row['first']:.1f} | {row['loading']:.1f} | {row['programs']:.0f} | {row['steady']:.1f}"
        lines.append(f"| {name} | {seconds} | {row['compiled later']:.0f} |")
    warm = found["warm"]
    return "\n".join(
        [
            *lines,
            "",
            f"Second start: first iteration without loading over a steady one {found['starts']['ratio']:.2f}.",
            f"{warm['iterations']} iterations after the first, {warm['mean lengths seen']} different mean lengths: "
            f"{warm['compiled']:.0f} programs compiled.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = str(Path(options.model).resolve())
        found = {"starts": starts(model, Path(directory)), "warm": warm(model, Path(directory))}
    measure.write("compile", found, table(found))


if __name__ == "__main__":
    main()
