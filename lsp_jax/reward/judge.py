"""Prefilling of the quality judge's prompts, common to both modes of reading its score.

1. The rubric is prefilled once per run; its cache is shared by all queries of all iterations.
2. Each query is prefilled after the rubric, once for its G answers.
3. Each answer, with the request to judge it, is prefilled after its query.

Query and answer are inserted as token ids, with control tokens and template tags blanked, so that nothing in them can
close a turn. LSP, Section 3 (quality self-reward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.kv_cache import KVCache
from lsp_jax.model.sharding import replicate, shard_rows
from lsp_jax.play.selfplay import Episode
from lsp_jax.reward.base import groups_per_chunk
from lsp_jax.text.judge_prompts import JudgeTemplate, judge_tags
from lsp_jax.text.prompts import Ragged, blank_special, ids_row, pack
from lsp_jax.text.template_tags import blank_tags, tag_tables
from lsp_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Judge:
    """The static part of judging; hashable."""

    config: LlamaConfig
    template: JudgeTemplate
    blank: int
    """Token id that replaces control tokens and tags."""
    rows: int
    """Approximate number of answers judged at a time per row shard (full groups)."""


def judge_params(
    reference: llama.Params, judge: Judge, tokenizer: Tokenizer, token_classes: jax.Array
) -> dict[str, Any]:
    """Returns the device arrays of the judge: the reference, the rubric's cache, the tables for blanking."""
    tokens, lengths = ids_row(judge.template.rubric_ids)
    _, rubric = jax.jit(llama.extend, static_argnums=1)(reference, judge.config, tokens, lengths)
    tags = replicate(tag_tables(tokenizer, judge_tags(tokenizer)))
    return {"reference": reference, "rubric": rubric, "token_classes": token_classes, "tags": tags}


Read = Callable[[Sequence[KVCache], jax.Array], Any]
"""(rubric, query and answer caches, last hidden states [n * G, D]) -> a pytree of arrays [n * G, ...]."""


def judge_episode(params: Any, episode: Episode, judge: Judge, read: Read) -> Any:
    """Applies `read` to every answer; returns [N, G, ...]. Pure."""
    queries, answers = episode.answers.lengths.shape
    chunk = groups_per_chunk(queries, answers, judge.rows)
    texts = episode.answers.tokens.reshape(queries * answers, -1), episode.answer_lengths.reshape(-1)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(queries // chunk, x.shape[0] * chunk // queries, *x.shape[1:])

    def part(texts: tuple[Ragged, Ragged]) -> Any:
        texts = shard_rows(texts)
        return read(*_prefilled(params, judge, *texts))

    blanked = jax.tree.map(split, (_blanked(episode.queries.text, params, judge), _blanked(texts, params, judge)))
    return jax.tree.map(lambda x: x.reshape(queries, answers, *x.shape[2:]), jax.lax.map(part, blanked))


def _blanked(text: Ragged, params: Any, judge: Judge) -> Ragged:
    """Replaces control tokens and template tags in `text` by blanks."""
    return blank_tags(blank_special(text, params["token_classes"], judge.blank), params["tags"], judge.blank)


def _prefilled(
    params: Any, judge: Judge, query: Ragged, answer: Ragged
) -> tuple[tuple[KVCache, KVCache, KVCache], jax.Array]:
    """Returns the caches of the rubric, of n queries and of their n * G answers, and last hidden states [n * G, D]."""
    reference, config, rubric = params["reference"], judge.config, params["rubric"]
    query_part = pack((query, ids_row(judge.template.middle_ids)))
    _, query_cache = llama.extend(reference, config, *query_part, (rubric,))
    answer_part = pack((answer, ids_row(judge.template.tail_ids)))
    hidden, answer_cache = llama.extend(reference, config, *answer_part, (rubric, query_cache))
    return (rubric, query_cache, answer_cache), llama.last_hidden(hidden, answer_part[1])
