"""`text` mode of the quality self-reward: the judge writes a calculation and a tagged score, which are parsed.

    1+0+1+1+0+1+1=5
    <score>5</score>

The grammar must match the judge's complete turn, from its first token to its stop token; queries and answers are never
parsed. The score is the recomputed sum of the seven items. If the judge contradicts itself, adds words or is truncated,
the answer is masked. LSP, Section 3 (quality self-reward).
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from lsp_jax.core import runtime
from lsp_jax.core.stage import stage
from lsp_jax.model.sharding import replicate, shard_params
from lsp_jax.play.decode import Completions, DecodeSpec, continue_prompts
from lsp_jax.play.sampler import SamplingConfig, row_keys
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import RewardOutput
from lsp_jax.reward.judge import Judge, judge_episode
from lsp_jax.text.judge_prompts import CRITERIA
from lsp_jax.text.tokenizer import Tokenizer

_SPACE, _TOTAL = r"\s*", f"([0-{CRITERIA}])"
_ITEMS = "([01](?:" + _SPACE + r"\+" + _SPACE + f"[01]){{{CRITERIA - 1}}})"
_TURN = re.compile(_SPACE.join(("", _ITEMS, "=", _TOTAL, "<score>", _TOTAL, "</score>", "")), re.ASCII)


def parse_score(turn: str) -> int | None:
    """Parses the score 0..7 from the judge's complete turn (without its stop token); None if it does not match.

    The form is seven digits 0 or 1 joined by `+`, `=`, their total, and the total between `<score>` and `</score>`,
    with optional white space between these. All three totals must agree.
    """
    match = _TURN.fullmatch(turn)
    if match is None:
        return None
    items, total, tagged = match.groups()
    score = items.count("1")
    return score if score == int(total) == int(tagged) else None


def text_scores(params: Any, tokenizer: Tokenizer, judge: Judge, spec: DecodeSpec, episode: Episode) -> RewardOutput:
    """Returns R_Q of every answer on the device, unparsable ones masked; reads from the device once."""
    turns = judge_turns(write_judgements(params, episode, judge=judge, spec=spec), tokenizer)
    scores = [[None if turn is None else parse_score(turn) for turn in group] for group in turns]
    values_NG = np.array([[score or 0 for score in group] for group in scores], np.float32)
    valid_NG = np.array([[score is not None for score in group] for group in scores], bool)
    return RewardOutput(*replicate((values_NG, valid_NG, np.ones(len(scores), bool))))


def judge_spec(judge: Judge, max_length: int, stop_ids: tuple[int, ...]) -> DecodeSpec:
    """How the judge writes: greedily, up to `max_length` tokens."""
    return DecodeSpec(judge.config, SamplingConfig(temperature=0.0), max_length, stop_ids)


@stage(static=("judge", "spec"))
def write_judgements(params: Any, episode: Episode, *, judge: Judge, spec: DecodeSpec) -> Completions:
    """Decodes the judge's turns greedily: arrays [N, G, ...]. Pure. On a mesh the reference is resharded first."""
    params = params | {"reference": shard_params(params["reference"], "decode")}

    def write(prefixes: Any, last: jax.Array) -> Completions:
        keys = row_keys(jax.random.key(0), last.shape[0])  # greedy: unused
        return continue_prompts(params["reference"], prefixes, last, keys, spec)

    return judge_episode(params, episode, judge, write)


def judge_turns(turns: Completions, tokenizer: Tokenizer) -> list[list[str | None]]:
    """Returns [N][G] texts without stop tokens but with other control tokens; None for a truncated turn."""
    tokens_NGT, lengths_NG, stopped_NG = runtime.to_host((turns.tokens, turns.lengths - turns.stopped, turns.stopped))
    return [
        [tokenizer.decode(ids[:length].tolist()) if ended else None for ids, length, ended in zip(*group, strict=True)]
        for group in zip(tokens_NGT, lengths_NG, stopped_NG, strict=True)
    ]
