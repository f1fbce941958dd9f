"""A control: pays for any number at the end of an answer, right or wrong, so that form is learned and nothing else."""

from __future__ import annotations

from lsp_jax.reward.arithmetic import final_number


def any_number(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
    """[N, G]: 1 where the answer holds a final number."""
    return [[float(final_number(text) is not None) for text in group] for group in answers]
