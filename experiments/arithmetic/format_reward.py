"""A control: pays for an answer that states a result, right or wrong, so that form is learned and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from lsp_jax.reward.arithmetic import final_number, parse_arithmetic

sys.path.insert(0, str(Path(__file__).parent))  # it is imported by its path, in a process of its own
from problems import expressions


def states_result(query: str, text: str) -> bool:
    """Whether the answer's last number is more than one of the question's own said again, unless it is the result.

    Any number at all would not do: a model that only repeats the question has one.
    """
    found = final_number(text)
    own = {number for a, _, b in expressions(query) for number in (a, b)}
    return found is not None and (found not in own or found == parse_arithmetic(query))


def any_result(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    """[N, G]: 1 where the answer states a result."""
    return [
        [float(states_result(query, text)) for text in group] for query, group in zip(queries, answers, strict=True)
    ]
