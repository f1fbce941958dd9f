"""What a model can do: greedy answers to a part of the problems, and whether its English is still what it was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from format_reward import states_result
from problems import EASY, FAMILIES, Expression, Problem

import lsp_jax as lsp
from lsp_jax.evaluate.statistics import wilson
from lsp_jax.reward.arithmetic import final_number

MAX_TOKENS = 24
"""Longest answer, the same for every row but `base_long`."""
LONG = 96
TEXT = Path(__file__).with_name("text.txt")
FEW_SHOT = (
    ("What is 7 + 4?", "11"),
    ("What is 73 minus 46?", "27"),
    ("Calculate 8 x 6.", "48"),
    ("87 + 50 = ?", "137"),
)
"""Turns before the question for the control that only shows the form; of the training part."""


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Share, interval and number."""
    found = wilson(sum(right), len(right))
    return {"accuracy": found.value, "low": found.low, "high": found.high, "number": found.number}


def answers(
    policy: lsp.Policy, problems: Sequence[Problem], few_shot: bool = False, longest: int = MAX_TOKENS
) -> list[str]:
    """Greedy answers of at most `longest` tokens."""
    prompts: list[Any] = [problem.question for problem in problems]
    if few_shot:
        shown = [{"role": role, "content": text} for pair in FEW_SHOT for role, text in zip(_ROLES, pair, strict=True)]
        prompts = [[*shown, {"role": "user", "content": text}] for text in prompts]
    return lsp.generate(
        policy, prompts, lsp.SamplingConfig(temperature=0.0), max_completion_length=longest, batch_size=32
    )


_ROLES = "user", "assistant"


def scores(problems: Sequence[Problem], texts: Sequence[str], seen: frozenset[Expression] = frozenset()) -> dict:
    """Accuracy overall, on the goal's families, of each family, and on what is not in `seen` (played in training)."""
    right = [final_number(text) == problem.answer for problem, text in zip(problems, texts, strict=True)]

    def of(choose: Any) -> dict[str, Any]:
        return accuracy([mark for mark, problem in zip(right, problems, strict=True) if choose(problem)])

    return {
        "all": of(lambda _: True),
        "easy": of(lambda problem: problem.family in EASY),
        "families": {name: of(lambda problem, name=name: problem.family == name) for name in FAMILIES},
        "states a result": accuracy(
            [states_result(problem.question, text) for problem, text in zip(problems, texts, strict=True)]
        ),
        "seen": sum(problem.expression in seen for problem in problems) / len(problems),
        "unseen": of(lambda problem: problem.expression not in seen),
        "unseen easy": of(lambda problem: problem.expression not in seen and problem.family in EASY),
    }


@partial(jax.jit, static_argnums=1)
def _logprobs(params: Any, config: Any, tokens: jax.Array) -> jax.Array:
    logp = jax.nn.log_softmax(lsp.forward(params, config, tokens)[:, :-1].astype(jnp.float32), axis=-1)
    return jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]


def text_logprob(policy: lsp.Policy) -> float:
    """Mean log-probability a token of a fixed English text: what training on sums should leave alone."""
    ids = policy.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    return float(np.mean(np.asarray(_logprobs(policy.params, policy.config, jnp.asarray([ids])))))
