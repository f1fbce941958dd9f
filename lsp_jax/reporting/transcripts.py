"""Records of `transcripts.jsonl`: an iteration's queries and answers with their rewards."""

from __future__ import annotations

from typing import Any

import numpy as np

from lsp_jax.learn.advantages import Advantages
from lsp_jax.reward.base import EpisodeTexts, Scores
from lsp_jax.text.tokenizer import Tokenizer


def token_texts(tokenizer: Tokenizer, ids: list[int], logprobs: list[float]) -> list[list[Any]]:
    """Returns [text, log-probability] per token; the texts concatenate to the decoded `ids`.

    A token that ends inside a character has the empty text; the token that completes it has the whole character. Each
    is decoded together with preceding ones, because SentencePiece drops the space before the first word of a text.
    """
    out, start, done = [], 0, 0
    for end, logprob in enumerate(logprobs[: len(ids)], 1):
        before = tokenizer.decode(ids[start:done], skip_special_tokens=True)
        now = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        if now.endswith("\ufffd") and end < len(ids):
            out.append(["", round(logprob, 4)])
            continue
        out.append([now[len(before) :], round(logprob, 4)])
        start, done = done, end
    return out


def records(
    iteration: int, texts: EpisodeTexts, advantages: Advantages, scores: Scores, stopped: np.ndarray
) -> list[dict[str, Any]]:
    """Returns one record per query from host (numpy) copies of the iteration's results; `stopped` is bool [N, G].

    R and R_Q are the weighted sums by kind, `rewards` the components before weighting. Masked scores are included, with
    `valid` false.
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
