"""Makes one row of the study: trains it (or goes on with it), asks it the held-out problems, writes its result file.

    python experiments/arithmetic/study.py lsp                    # runs/arithmetic/lsp-0, results/lsp-0.json
    python experiments/arithmetic/study.py lsp --seed 1 --steps 120
    python experiments/arithmetic/study.py lsp --part development --name try-lr   # tuning: never on the held-out part

A row of the default length takes 15 minutes to half an hour on two cores. Stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate
import jax
import problems
import rows
from problems import DEVELOPMENT, HELD_OUT, Expression

import lsp_jax as lsp
from lsp_jax.checkpoint.provenance import versions
from lsp_jax.core.files import read_jsonl
from lsp_jax.presets import DEMO_MODEL

HERE = Path(__file__).parent
CURVES = (
    *("solver/reward", "challenger/reward", "rewards/arithmetic/mean", "rewards/quality/mean"),
    *("queries/valid_fraction", "queries/unique_fraction", "queries/near_duplicate_fraction"),
    *("queries/value/median", "solver/frac_reward_zero_std", "resampled_fraction"),
    *("solver/kl", "challenger/kl", "solver/entropy", "challenger/entropy"),
)
SAMPLES = 6
"""Iterations of which queries and answers are shown."""


def train(row: str, steps: int, seed: int, folder: Path) -> tuple[lsp.Policy, dict[str, Any]]:
    """The row's policy, and what its training was like."""
    kinds, told = rows.STAGES[row], []
    policy = lsp.load_pretrained(DEMO_MODEL)
    for number, kind in enumerate(kinds):
        part = folder / f"{number + 1}-{kind}"
        config = rows.stage(kind, steps // len(kinds), seed, part)
        if number:
            config = replace(config, init_from=str(folder / f"{number}-{kinds[number - 1]}"))
        state = lsp.train(config, callbacks=[_Development(policy, part, config.max_steps)])
        policy = replace(policy, params=state.params)
        told.append(history(part))
    return policy, {"stages": told}


class _Development:
    """Asks the development problems ten times a run, in a file of the run's folder."""

    def __init__(self, policy: lsp.Policy, folder: Path, steps: int):
        self._policy, self._file, self._every = policy, folder / "development.jsonl", -(-steps // 10)
        self._problems = problems.part(DEVELOPMENT)

    def __call__(self, event: Any) -> None:
        if event.iteration % self._every:
            return
        texts = evaluate.answers(replace(self._policy, params=event.state.params), self._problems)
        found = evaluate.scores(self._problems, texts)
        line = {"iteration": event.iteration, "all": found["all"], "easy": found["easy"]}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def history(folder: Path) -> dict[str, Any]:
    """Curves, tokens, difficulty and samples of one stage from its files."""
    metrics, records = list(read_jsonl(folder / "metrics.jsonl")), list(read_jsonl(folder / "transcripts.jsonl"))
    development = {line["iteration"]: line for line in read_jsonl(folder / "development.jsonl")}  # the last one counts
    shown = {round(1 + n * (len(metrics) - 1) / (SAMPLES - 1)) for n in range(SAMPLES)} if metrics else set()
    return {
        "folder": folder.name,
        "iterations": len(metrics),
        "train_seconds": sum(line.get("time/iteration", 0.0) for line in metrics),
        "tokens": sum(line.get("completions/tokens", 0.0) for line in metrics),
        "answers": sum(len(record["answers"]) for record in records),
        "curves": {name: [line.get(name) for line in metrics] for name in CURVES if any(name in m for m in metrics)},
        "development": [development[number] for number in sorted(development)],
        "difficulty": difficulty(records),
        "alarms": list(read_jsonl(folder / "alarms.jsonl")),
        "samples": [
            {
                "iteration": record["iteration"],
                "query": record["query"],
                "valid": record["valid"],
                "answer": record["answers"][0]["text"],
                "R": record["answers"][0]["R"],
            }
            for record in records
            if record["iteration"] in shown and record["index"] < 3
        ],
    }


def difficulty(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each iteration's valid queries: numbers' digits, operators, carries, and how many were unlike one another."""
    by_iteration: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        by_iteration.setdefault(record["iteration"], []).append(record)
    out = []
    for iteration, group in sorted(by_iteration.items()):
        asked = [record["query"] for record in group if record["valid"]]
        found = [expression for query in asked for expression in problems.expressions(query)]
        signs = Counter(sign for _, sign, _ in found)
        number = max(len(found), 1)
        out.append(
            {
                "iteration": iteration,
                "digits": sum(len(str(a)) + len(str(b)) for a, _, b in found) / (2 * number),
                "carries": sum(carries(expression) for expression in found) / number,
                "expressions": len(found) / max(len(asked), 1),
                "unique": len(set(asked)) / max(len(asked), 1),
                **{sign: signs[sign] / number for sign in "+-*"},
            }
        )
    return out


def carries(expression: Expression) -> int:
    """How often a digit is carried or borrowed; of a product, as in adding its digits' products."""
    a, sign, b = expression
    count = carry = 0
    if sign == "*":
        while a:
            carry = (a % 10 * b + carry) // 10
            count, a = count + (carry > 0), a // 10
        return count
    while a or b:
        digit = a % 10 + (b % 10 + carry if sign == "+" else -(b % 10) - carry)
        carry = int(digit > 9 or digit < 0)
        count, a, b = count + carry, a // 10, b // 10
    return count


def played(folder: Path) -> frozenset[Expression]:
    """Every expression in a query of any stage below `folder`, and their twins."""
    queries = [record["query"] for file in folder.glob("*/transcripts.jsonl") for record in read_jsonl(file)]
    found = {expression for query in queries for expression in problems.expressions(query)}
    return frozenset(found | set(map(problems.twin, found)))


def machine() -> str:
    """The processor by name and model: runs are the same on one kind of machine, and not quite on another."""
    file = Path("/proc/cpuinfo")
    told = file.read_text(encoding="utf-8") if file.is_file() else ""
    name, model = (re.search(rf"^{key}\s*:\s*(.+)$", told, re.M) for key in ("model name", "model"))
    called = name[1].replace("(R)", "").removesuffix(" Processor") if name else platform.machine()
    number = f" (model {model[1]})" if model else ""
    return f"{called}{number}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=rows.ROWS)
    parser.add_argument("--steps", type=int, default=30, help="iterations in all; the same for all rows of a table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default=HELD_OUT, choices=(HELD_OUT, DEVELOPMENT))
    parser.add_argument("--name", default="", help="of run and result; ROW-SEED without")
    options = parser.parse_args()
    name = options.name or f"{options.row}-{options.seed}"
    folder = Path("runs/arithmetic") / name
    if options.row in rows.UNTRAINED:
        policy, told = lsp.load_pretrained(DEMO_MODEL), {}
    else:
        policy, told = train(options.row, options.steps, options.seed, folder)
    asked = problems.part(options.part)
    longest = evaluate.LONG if options.row == "base_long" else evaluate.MAX_TOKENS
    texts = evaluate.answers(policy, asked, few_shot=options.row == "few_shot", longest=longest)
    seen = played(folder)
    result = {
        "row": options.row,
        "seed": options.seed,
        "steps": 0 if options.row in rows.UNTRAINED else options.steps,
        "part": options.part,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "scores": evaluate.scores(asked, texts, seen),
        "played": sorted(seen.intersection(problem.expression for problem in asked)),
        "text_logprob": evaluate.text_logprob(policy),
        **told,
        "answers": [[problem.question, text] for problem, text in zip(asked, texts, strict=True)],
    }
    target = HERE / "results" if options.part == HELD_OUT else folder
    target.mkdir(parents=True, exist_ok=True)
    file = target / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{file}: {json.dumps(result['scores']['all'])}")


if __name__ == "__main__":
    main()
