"""`text` mode of the quality self-reward: the judge writes a calculation and a tagged score, and only that is read.

    1+0+1+1+0+1+1=5
    <score>5</score>

The grammar covers all of what the judge wrote in its turn, from its first token to its stop token. Nothing else is
ever parsed: a calculation or a tag in a query or an answer is text that the judge was shown. The score is the sum of
the seven items, recomputed; a judge that contradicts itself, adds a word or is cut off has not scored, and the answer
is masked. LSP, Section 3 (quality self-reward).
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
    """The score 0..7 in the judge's whole turn (without its stop token), None when it is not of the form.

    Seven digits 0 or 1 joined by `+`, `=`, their total, and the total between `<score>` and `</score>`, with white
    space between them as it comes and nothing else. All three totals must agree.
    """
    match = _TURN.fullmatch(turn)
    if match is None:
        return None
    items, total, tagged = match.groups()
    score = items.count("1")
    return score if score == int(total) == int(tagged) else None


def text_scores(params: Any, tokenizer: Tokenizer, judge: Judge, spec: DecodeSpec, episode: Episode) -> RewardOutput:
    """R_Q of every answer, `values` [N, G] on device; what cannot be parsed is masked. One read from the device."""
    written = write_judgements(params, episode, judge=judge, spec=spec)
    turns = judge_turns(written, tokenizer)
    scores = [[None if turn is None else parse_score(turn) for turn in group] for group in turns]
    values = np.array([[score or 0 for score in group] for group in scores], np.float32)
    valid = np.array([[score is not None for score in group] for group in scores], bool)
    return RewardOutput(*replicate((values, valid, np.ones(len(scores), bool))))


def judge_spec(judge: Judge, max_length: int, stop_ids: tuple[int, ...]) -> DecodeSpec:
    """How the judge writes: greedily, up to `max_length` tokens."""
    return DecodeSpec(judge.config, SamplingConfig(temperature=0.0), max_length, stop_ids)


@stage(static=("judge", "spec"))
def write_judgements(params: Any, episode: Episode, *, judge: Judge, spec: DecodeSpec) -> Completions:
    """The judge's turns, greedy: arrays [N, G, ...]. Pure. On a mesh the reference is laid out for decoding first."""
    params = params | {"reference": shard_params(params["reference"], "decode")}

    def write(prefixes: Any, last: jax.Array) -> Completions:
        keys = row_keys(jax.random.key(0), last.shape[0])  # greedy: never drawn from
        return continue_prompts(params["reference"], prefixes, last, keys, spec)

    return judge_episode(params, episode, judge, write)


def judge_turns(written: Completions, tokenizer: Tokenizer) -> list[list[str | None]]:
    """[N][G] texts without the stop tokens, control tokens spelled; None for a turn that was cut off."""
    tokens, lengths, stopped = runtime.to_host((written.tokens, written.lengths - written.stopped, written.stopped))
    return [
        [tokenizer.decode(ids[:length].tolist()) if whole else None for ids, length, whole in zip(*group, strict=True)]
        for group in zip(tokens, lengths, stopped, strict=True)
    ]
