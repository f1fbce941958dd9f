"""Folders of runs as `lsp_jax.reporting.html_report` finds them, written by hand.

They hold texts that attack a page, alarms, many lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from test_trainer import game_config

TAKES = "document.title='taken'"
HOSTILE = f'</script><script>{TAKES}</script><img src=x onerror="{TAKES}"> & \u202eright \x1b[0m'
PHASE_SECONDS = {"challenge": 1.0, "solve": 2.0, "reward": 0.25, "reference": 1.5, "update": 4.0, "log": 0.1}


def metrics(number: int, last: int) -> dict[str, Any]:
    """Of iteration `number` of `last`: curves that rise, fall and break off."""
    share = number / last
    found = {
        "iteration": number,
        "solver/reward": 0.2 + 0.6 * share,
        "challenger/reward": -0.2 - 0.5 * share,
        "solver/kl": 0.01 * share,
        "challenger/kl": None if number == 2 else 0.02 * share,
        "solver/entropy": 2 - share,
        "rewards/arithmetic/mean": 0.2 + 0.5 * share,
        "rewards/quality/mean": 4 + share,
        "queries/valid_fraction": 0.5 + 0.4 * share,
        "queries/unique_fraction": 1 - 0.8 * share,
        "solver/completions/mean_length": 12 - 4 * share,
        "completions/tokens": 700.0,
        "tokens_per_second": 150 + 10 * share,
        "limit/solve": 0.6,
        "limit/update": 0.4,
        **{f"time/{phase}": seconds for phase, seconds in PHASE_SECONDS.items()},
    }
    return {**found, "time/iteration": sum(PHASE_SECONDS.values())}


def record(number: int, index: int, query: str, tokens: bool) -> dict[str, Any]:
    """A line of `transcripts.jsonl` with three answers, the second of which is not text that a page should obey."""
    answers = []
    for place, text in enumerate(("The answer is 7.", HOSTILE, "It is 11, or" + " perhaps" * 30)):
        answer: dict[str, Any] = {"text": text, "R": float(place == 0), "R_Q": 0.4, "advantage": 0.67 - place / 3}
        answer |= {
            "rewards": {"arithmetic": float(place == 0), "quality": 4.0},
            "valid": place < 2,
            "stopped": place < 2,
        }
        if tokens:
            words = text.split(" ")
            pieces = [word if n == 0 else f" {word}" for n, word in enumerate(words)]
            answer["tokens"] = [[piece, -0.8 * (n % 8)] for n, piece in enumerate(pieces)]
        answers.append(answer)
    worth = {"valid": index != 3, "counted": True, "reward": -0.33, "advantage": 0.1 * index}
    return {"iteration": number, "index": index, "query": query, **worth, "answers": answers}


def write_run(directory: Path, last: int = 40, alarms: bool = False, **changes: Any) -> Path:
    """A run's folder of `last` iterations with 5 queries each."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(game_config("./models/tiny", directory, max_steps=last, **changes).to_json())
    started = {
        "versions": {"python": "3.11", "jax": "0.10.2"},
        "reference": {"source": "./models/tiny", "commit": None},
    }
    (directory / "manifest.json").write_text(json.dumps(started))
    lines, said = [], []
    for number in range(1, last + 1):
        lines.append(metrics(number, last))
        queries = [f"What is {number} + {index}?" for index in range(3)] + [HOSTILE, "What is 1 + 1?"]
        # the same query again and again, as a Challenger that has collapsed would ask
        queries[1] = "What is 2 + 2?" if number % 2 else queries[1]
        said += [record(number, index, query, index == 0) for index, query in enumerate(queries)]
    write_lines(directory / "metrics.jsonl", lines)
    write_lines(directory / "transcripts.jsonl", said)
    if alarms:
        begun = {"iteration": 20, "alarm": "repetition", "action": "pause", "said": "asks the same again: 0.4 < 0.5"}
        over = {"iteration": 31, "alarm": "repetition", "action": "over", "said": "the alarm repetition is over"}
        write_lines(directory / "alarms.jsonl", [begun, over])
    return directory


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
