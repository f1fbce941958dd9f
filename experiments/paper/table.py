"""The paper's result tables beside your own runs, with the command for every cell that is missing.

    python experiments/paper/table.py [--runs runs] [--protocol v1|v3]

A run is trained by one command a stage (`lsp-jax train --preset ...`, the second stage with `--init-from` the first).
Its score on a benchmark is read from `RUNS/<run>/evaluation/<benchmark>.json`, an object with the number `score`
(percent); any evaluator may write it. Paper: arXiv 2509.07414, v1 (September 2025) and v3 (December 2025).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One trained run."""

    preset: str
    after: str = ""
    """The run whose policy it starts from; empty: the base model."""
    options: str = ""


@dataclass(frozen=True)
class Cell:
    """One number of the paper."""

    protocol: str
    benchmark: str
    row: str
    run: str
    """Key of `RUNS`, or `base`."""
    paper: float | None
    """Percent; None where the paper gives only the best of its rows."""


RUNS = {
    "paper_grpo": Stage("paper_grpo"),
    "paper_lsp_zero": Stage("paper_lsp_zero"),
    "paper_lsp": Stage("paper_lsp"),
    "grpo_then_lsp_zero": Stage("paper_lsp_zero", after="paper_grpo"),
    "grpo_then_lsp": Stage("paper_lsp", after="paper_grpo"),
    "lsp_zero_then_grpo": Stage("paper_grpo", after="paper_lsp_zero"),
    "lsp_then_grpo": Stage("paper_grpo", after="paper_lsp"),
    "paper_grpo_maths": Stage("paper_grpo_maths"),
    "paper_lsp_zero_maths": Stage("paper_lsp_zero_maths"),
    "paper_lsp_maths": Stage("paper_lsp_maths"),
    "lsp_zero_then_grpo_maths": Stage("paper_grpo_maths", after="paper_lsp_zero_maths"),
    "lsp_then_grpo_maths": Stage("paper_grpo_maths", after="paper_lsp_maths"),
    "paper_grpo_mbpp": Stage("paper_grpo_mbpp", options="--allow-code-execution"),
    "paper_lsp_zero_code": Stage("paper_lsp_zero_code"),
    "paper_lsp_code": Stage("paper_lsp_code"),
    "lsp_zero_then_grpo_mbpp": Stage("paper_grpo_mbpp", "paper_lsp_zero_code", "--allow-code-execution"),
    "lsp_then_grpo_mbpp": Stage("paper_grpo_mbpp", "paper_lsp_code", "--allow-code-execution"),
}
"""Every run behind the tables; the key is its folder."""

_ROWS = ("base", "RL on data", "LSP-Zero", "LSP", "LSP-Zero, then RL", "LSP, then RL")


def _benchmark(name: str, runs: tuple[str, ...], base: float, best: float) -> list[Cell]:
    """The rows of a benchmark of which the paper gives the base model's number and the best row's."""
    cells = [Cell("v3", name, row, run, base if run == "base" else None) for row, run in zip(_ROWS, runs, strict=True)]
    return [*cells, Cell("v3", name, "best of the rows", "", best)]


_ALPACA = ("base", "paper_grpo", "paper_lsp_zero", "paper_lsp", "lsp_zero_then_grpo", "lsp_then_grpo")
_MATHS = ("base", "paper_grpo_maths", "paper_lsp_zero_maths", "paper_lsp_maths")
_MATHS += ("lsp_zero_then_grpo_maths", "lsp_then_grpo_maths")
_CODE = ("base", "paper_grpo_mbpp", "paper_lsp_zero_code", "paper_lsp_code")
_CODE += ("lsp_zero_then_grpo_mbpp", "lsp_then_grpo_mbpp")

CELLS: list[Cell] = [
    Cell("v1", "alpacaeval_gpt4o", "GRPO on data", "paper_grpo", 40.9),
    Cell("v1", "alpacaeval_gpt4o", "LSP-Zero", "paper_lsp_zero", 40.1),
    Cell("v1", "alpacaeval_gpt4o", "LSP", "paper_lsp", 40.6),
    Cell("v1", "alpacaeval_gpt4o", "GRPO, then LSP-Zero", "grpo_then_lsp_zero", 40.0),
    Cell("v1", "alpacaeval_gpt4o", "GRPO, then LSP", "grpo_then_lsp", 43.1),
    Cell("v1", "alpacaeval_gpt4o_vicuna", "GRPO on data", "paper_grpo", 28.7),
    Cell("v1", "alpacaeval_gpt4o_vicuna", "GRPO, then LSP-Zero", "grpo_then_lsp_zero", 36.3),
    Cell("v1", "alpacaeval_gpt4o_vicuna", "GRPO, then LSP", "grpo_then_lsp", 46.3),
    *(
        Cell("v3", "alpacaeval_llama4", row, run, paper)
        for row, run, paper in zip(_ROWS, _ALPACA, (26.5, 38.8, 32.0, 36.4, 36.3, 39.5), strict=True)
    ),
    *_benchmark("math", _MATHS, 48.7, 54.6),
    *_benchmark("gsm8k", _MATHS, 77.5, 79.9),
    *_benchmark("humaneval", _CODE, 97.2, 98.7),
]
"""Every number of the paper's tables; AlpacaEval is judged by GPT-4o in v1, by Llama-4-Maverick in v3."""


def commands(run: str, runs: str = "runs") -> list[str]:
    """The training commands of a run, its earlier stage first; none for the base model."""
    if run not in RUNS:
        return []
    stage = RUNS[run]
    parts = ["lsp-jax train", f"--preset {stage.preset}", f"--output-dir {runs}/{run}", "--resume auto"]
    if stage.after:
        parts.append(f"--init-from {runs}/{stage.after}")
    return [*commands(stage.after, runs), " ".join([*parts, stage.options]).strip()]


def score(run: str, benchmark: str, runs: Path) -> float | None:
    """The run's score in percent, None when it has not been evaluated. Raises ValueError for a file without one."""
    path = runs / run / "evaluation" / f"{benchmark}.json"
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    number = value.get("score") if isinstance(value, dict) else None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 100:
        raise ValueError(f"{path}: must hold an object with `score`, a number from 0 to 100")
    return float(number)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def table(protocol: str, runs: Path) -> str:
    """The protocol's cells as Markdown, the paper's number beside ours."""
    lines = ["| benchmark | row | paper | ours |", "|---|---|---|---|"]
    best: dict[str, float] = {}
    for cell in CELLS:
        if cell.protocol != protocol:
            continue
        ours = score(cell.run, cell.benchmark, runs) if cell.run else best.get(cell.benchmark)
        if ours is not None:
            best[cell.benchmark] = max(ours, best.get(cell.benchmark, 0.0))
        lines.append(f"| {cell.benchmark} | {cell.row} | {_shown(cell.paper)} | {_shown(ours)} |")
    return "\n".join(lines)


def missing(protocol: str, runs: Path) -> list[str]:
    """For each cell without a number of ours, what to run."""
    lines, told = [], set()
    for cell in CELLS:
        if cell.protocol != protocol or not cell.run or score(cell.run, cell.benchmark, runs) is not None:
            continue
        lines.append(f"# {cell.benchmark}, {cell.row}")
        for command in commands(cell.run, str(runs)):
            folder = command.split("--output-dir ")[1].split()[0]
            if command not in told and not (Path(folder) / "export").is_dir():
                lines.append(command)
            told.add(command)
        model = "the base model" if cell.run == "base" else f"{runs}/{cell.run}/export"
        lines.append(f"#   evaluate {model}; write its score to {runs}/{cell.run}/evaluation/{cell.benchmark}.json")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables beside your own runs.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--protocol", choices=("v1", "v3"), help="only this version of the paper")
    arguments = parser.parse_args()
    for protocol in (arguments.protocol,) if arguments.protocol else ("v1", "v3"):
        print(f"## Protocol {protocol}\n\n{table(protocol, arguments.runs)}\n")
        todo = missing(protocol, arguments.runs)
        if todo:
            print("Missing:\n\n```sh\n" + "\n".join(todo) + "\n```\n")


if __name__ == "__main__":
    main()
