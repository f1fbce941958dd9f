"""The quality self-reward R_Q in 0..7, `logits` mode: the frozen reference judges answers by seven yes/no criteria.

1. The rubric is prefilled once a run, its cache shared by every query of every iteration.
2. Each query continues the rubric, once for its G answers.
3. Each answer, with the request to judge it, continues its query, once for the seven criteria.
4. Seven branches of a few tokens ("3.") read p = yes / (yes + no) from the logits; the score is the sum of the p.

The paper's judge writes a calculation and a tagged score; reading the same verdicts from the logits needs no decoding
and cannot fail to parse. Query and answer enter as ids, with control ids replaced, so that nothing in them can close a
turn of a template whose tags are control tokens (ChatML's, Llama 3's). LSP, Section 3 (quality self-reward).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import DeviceReward, RewardOutput
from lsp_jax.text.prompts import CRITERIA, JudgeTemplate, Ragged, harmless, ids_row, judge_template, pack
from lsp_jax.text.tokenizer import Tokenizer


def quality_reward(
    reference: llama.Params,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    kinds: jax.Array,
    weight: float = 1.0,
    rows: int = 16,
    name: str = "quality",
) -> DeviceReward:
    """The component, with the rubric prefilled under the frozen `reference` parameters.

    `kinds` uint8 [V] is `Tokenizer.token_kinds()` over the model's vocabulary; about `rows` answers are judged
    at one time (whole groups: at least G).
    """
    template = judge_template(tokenizer)
    tokens, lengths = ids_row(template.rubric_ids)
    _, rubric = jax.jit(llama.extend, static_argnums=1)(reference, config, tokens, lengths)
    blank = tokenizer.encode(" ")[0]
    score = partial(quality_scores, config=config, template=template, blank=blank, rows=rows)
    return DeviceReward(name, "quality", weight, score, {"reference": reference, "rubric": rubric, "kinds": kinds})


def quality_scores(
    params: Any, episode: Episode, *, config: LlamaConfig, template: JudgeTemplate, blank: int, rows: int
) -> RewardOutput:
    """R_Q in [0, 7] for every answer, `values` [N, G]; nothing is masked. Pure."""
    queries, answers = episode.answers.lengths.shape
    chunk = _largest_divisor(queries, max(1, rows // answers))

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(queries // chunk, chunk, *x.shape[1:])

    query = jax.tree.map(split, harmless(episode.queries.text, params["kinds"], blank))
    answer = jax.tree.map(split, harmless((episode.answers.tokens, episode.answer_lengths), params["kinds"], blank))

    def judge(part: tuple[Ragged, Ragged]) -> jax.Array:
        query, (tokens, lengths) = part
        return _judge(params, config, template, query, (tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)))

    values = jax.lax.map(judge, (query, answer)).reshape(queries, answers)
    return RewardOutput(values, jnp.ones_like(values, bool), jnp.ones(queries, bool))


def _judge(params: Any, config: LlamaConfig, template: JudgeTemplate, query: Ragged, answer: Ragged) -> jax.Array:
    """Scores [n * G] of n queries [n, .] with their answers [n * G, .]."""
    reference, rubric = params["reference"], params["rubric"]
    query_part = pack((query, ids_row(template.middle_ids)))
    _, query_cache = llama.extend(reference, config, *query_part, (rubric,))
    answer_part = pack((answer, ids_row(template.tail_ids)))
    _, answer_cache = llama.extend(reference, config, *answer_part, (rubric, query_cache))

    rows = answer_part[0].shape[0]
    width = max(map(len, template.branch_ids))
    padded = [(*ids, *[0] * (width - len(ids))) for ids in template.branch_ids]
    branches = jnp.tile(jnp.asarray(padded, jnp.int32), (rows, 1))
    lengths = jnp.tile(jnp.asarray([len(ids) for ids in template.branch_ids], jnp.int32), rows)
    hidden, _ = llama.extend(reference, config, branches, lengths, (rubric, query_cache, answer_cache))
    log_odds = _yes_no(reference, config, template, llama.last_hidden(hidden, lengths))
    return jnp.sum(jax.nn.sigmoid(log_odds).reshape(rows, CRITERIA), axis=-1)


def _yes_no(params: llama.Params, config: LlamaConfig, template: JudgeTemplate, hidden: jax.Array) -> jax.Array:
    """log(yes / no) [B]: only the declared tokens' rows of the head are read."""
    weight = llama.head_weight(params, config)
    sides = [
        jax.nn.logsumexp(
            jnp.einsum("bd,vd->bv", hidden, weight[jnp.asarray(ids)], preferred_element_type=jnp.float32), axis=-1
        )
        for ids in (template.yes_ids, template.no_ids)
    ]
    return sides[0] - sides[1]


def _largest_divisor(number: int, limit: int) -> int:
    return max(size for size in range(1, min(number, limit) + 1) if number % size == 0)
