"""What was said in an iteration, with what it was worth: the lines of `transcripts.jsonl`."""

from __future__ import annotations

from typing import Any

import numpy as np

from lsp_jax import host, processes
from lsp_jax.learn.advantages import Advantages
from lsp_jax.reward.base import EpisodeTexts, Scores, episode_texts
from lsp_jax.run.setup import Run
from lsp_jax.run.step import Played


def numbers_and_lines(run: Run, number: int, played: Played) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of iteration `number` and its records, with one read from the device (texts may take another).

    With several processes only process 0 gets records.
    """
    shown = None if processes.is_writer() else range(0)
    texts = played.texts or episode_texts(played.episode, run.policy.tokenizer, queries=shown)
    learned = played.learnable.advantages, played.learnable.scores, played.episode.answers.stopped
    values, learned = host.to_host((played.metrics, learned))
    return {name: float(value) for name, value in values.items()}, records(number, texts, *learned)


def records(
    iteration: int, texts: EpisodeTexts, advantages: Advantages, scores: Scores, stopped: np.ndarray
) -> list[dict[str, Any]]:
    """One record a query, from host (numpy) copies of the iteration's results; `stopped` bool [N, G].

    R and R_Q are the weighted sums by kind, `rewards` each component before its weight. A score that does not count is
    written all the same; `valid` says that it did not.
    """
    out = []
    for n, query in enumerate(texts.queries):
        answers = [
            {
                "text": text,
                "R": float(scores.task[n, g]),
                "R_Q": float(scores.quality[n, g]),
                "rewards": {name: float(values[n, g]) for name, values in scores.components.items()},
                "advantage": float(advantages.solver[n, g]),
                "valid": bool(advantages.answer_counts[n, g]),
                "stopped": bool(stopped[n, g]),
            }
            for g, text in enumerate(texts.answers[n])
        ]
        out.append(
            {
                "iteration": iteration,
                "index": n,
                "query": query,
                "valid": bool(scores.valid_query[n]),
                "counted": bool(advantages.query_counts[n]),
                "reward": float(advantages.challenger_reward[n]),
                "advantage": float(advantages.challenger[n]),
                "answers": answers,
            }
        )
    return out
