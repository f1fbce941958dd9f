"""How a frozen model is shown what it judges, whatever is then read from it.

1. The rubric is prefilled once a run, its cache shared by every query of every iteration.
2. Each query continues the rubric, once for its G answers.
3. Each answer, with the request to judge it, continues its query.

Query and answer enter as ids: control ids and template tags in them are blanked, so that nothing in them can close a
turn. LSP, Section 3 (quality self-reward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.kv_cache import KVCache
from lsp_jax.model.sharding import replicate, shard_rows
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import groups_at_once
from lsp_jax.text.judge_prompts import JudgeTemplate, judge_tags
from lsp_jax.text.prompts import Ragged, ids_row, pack
from lsp_jax.text.template_tags import blank_tags, tag_tables
from lsp_jax.text.tokenizer import SPECIAL, Tokenizer


@dataclass(frozen=True)
class Judge:
    """The static part; hashable."""

    config: LlamaConfig
    template: JudgeTemplate
    blank: int
    """The id that stands in for control ids and tags."""
    rows: int
    """About so many answers are judged at one time on each device that has rows of its own (whole groups)."""


def judge_params(
    reference: llama.Params, judge: Judge, tokenizer: Tokenizer, token_classes: jax.Array
) -> dict[str, Any]:
    """Everything on device that judging reads: the reference, the rubric's cache, what must be blanked."""
    tokens, lengths = ids_row(judge.template.rubric_ids)
    _, rubric = jax.jit(llama.extend, static_argnums=1)(reference, judge.config, tokens, lengths)
    tags = replicate(tag_tables(tokenizer, judge_tags(tokenizer)))
    return {"reference": reference, "rubric": rubric, "token_classes": token_classes, "tags": tags}


Read = Callable[[Sequence[KVCache], jax.Array], Any]
"""(rubric, query and answer caches, last hidden states [n * G, D]) -> a pytree of arrays [n * G, ...]."""


def judge_episode(params: Any, episode: Episode, judge: Judge, read: Read) -> Any:
    """The result of `read` for every answer, [N, G, ...]. Pure."""
    queries, answers = episode.answers.lengths.shape
    chunk = groups_at_once(queries, answers, judge.rows)
    texts = episode.answers.tokens.reshape(queries * answers, -1), episode.answer_lengths.reshape(-1)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(queries // chunk, x.shape[0] * chunk // queries, *x.shape[1:])

    def part(texts: tuple[Ragged, Ragged]) -> Any:
        texts = shard_rows(texts)
        return read(*_prefilled(params, judge, *texts))

    shown = jax.tree.map(split, (_harmless(episode.queries.text, params, judge), _harmless(texts, params, judge)))
    return jax.tree.map(lambda x: x.reshape(queries, answers, *x.shape[2:]), jax.lax.map(part, shown))


def _harmless(text: Ragged, params: Any, judge: Judge) -> Ragged:
    tokens, lengths = text
    plain = jnp.where(params["token_classes"][tokens] == SPECIAL, judge.blank, tokens)
    return blank_tags((plain, lengths), params["tags"], judge.blank)


def _prefilled(
    params: Any, judge: Judge, query: Ragged, answer: Ragged
) -> tuple[tuple[KVCache, KVCache, KVCache], jax.Array]:
    """Caches of the rubric, n queries [n, .] and their answers [n * G, .]; the last hidden states [n * G, D]."""
    reference, config, rubric = params["reference"], judge.config, params["rubric"]
    query_part = pack((query, ids_row(judge.template.middle_ids)))
    _, query_cache = llama.extend(reference, config, *query_part, (rubric,))
    answer_part = pack((answer, ids_row(judge.template.tail_ids)))
    hidden, answer_cache = llama.extend(reference, config, *answer_part, (rubric, query_cache))
    return (rubric, query_cache, answer_cache), llama.last_hidden(hidden, answer_part[1])
