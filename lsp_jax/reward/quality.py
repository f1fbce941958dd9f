"""The quality self-reward R_Q in 0..7: the frozen reference judges answers by seven yes/no criteria.

`text` mode is the paper's: the judge writes a calculation and a tagged score (`reward/text_judge.py`). It needs a model
that keeps to a form, and what it does not write well is masked.

`logits` mode reads the same verdicts without decoding, and cannot fail to parse: after rubric, query and answer
(`reward/judge.py`), seven branches of a few tokens ("3.") read p = yes / (yes + no) from the logits; the score is the
sum of the p. LSP, Section 3 (quality self-reward).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.core.errors import InputError
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.kv_cache import KVCache
from lsp_jax.play.selfplay import Episode
from lsp_jax.policy import Policy
from lsp_jax.reward.base import DeviceReward, EpisodeReward, RewardOutput
from lsp_jax.reward.config import RewardConfig
from lsp_jax.reward.judge import Judge, judge_episode, judge_params
from lsp_jax.reward.text_judge import judge_spec, text_scores
from lsp_jax.text.judge_prompts import (
    CRITERIA,
    LogitsTemplate,
    check_mode,
    judge_template,
    load_criteria,
    text_judge_template,
)


def quality_reward(
    reference: llama.Params, policy: Policy, token_classes: jax.Array, config: RewardConfig, name: str = "quality"
) -> DeviceReward | EpisodeReward:
    """The component, with the rubric prefilled under the frozen `reference` parameters of the model `policy`.

    `token_classes` uint8 [V] is `Tokenizer.token_classes()` over the model's vocabulary. Of `config` are read
    `quality_weight`, `quality_mode`, `quality_max_length`, `rubric`, and `judge_rows`: about so many answers are judged
    at a time (complete groups: at least G).

    Raises InputError for an unknown mode, a bad rubric file, a length below 1, and a judge's prompt that leaves no
    room for query and answer in the model's context.
    """
    mode, max_length, tokenizer = config.quality_mode, config.quality_max_length, policy.tokenizer
    check_mode(mode)
    if max_length < 1:
        raise InputError("max_length", max_length, "must be at least 1 token")
    criteria, context = load_criteria(config.rubric), policy.config.max_position_embeddings
    template = judge_template(tokenizer, criteria) if mode == "logits" else text_judge_template(tokenizer, criteria)
    length = template.fixed_length + (max_length if mode == "text" else 0)
    if length >= context:
        remedy = f"the judge's {length} tokens leave no room in a context of {context}"
        raise InputError("rubric", str(config.rubric), remedy)
    judge = Judge(policy.config, template, tokenizer.encode(" ")[0], config.judge_rows)
    params, weight = judge_params(reference, judge, tokenizer, token_classes), config.quality_weight
    if mode == "logits":
        return DeviceReward(name, "quality", weight, partial(logits_scores, judge=judge), params)
    score = partial(text_scores, params, tokenizer, judge, judge_spec(judge, max_length, tokenizer.stop_ids))
    return EpisodeReward(name, "quality", weight, score)


def logits_scores(params: Any, episode: Episode, *, judge: Judge) -> RewardOutput:
    """R_Q in [0, 7] for every answer, `values` [N, G]; nothing is masked. Pure."""
    values = judge_episode(params, episode, judge, partial(_read, params["reference"], judge))
    return RewardOutput(values, jnp.ones_like(values, bool), jnp.ones(values.shape[0], bool))


def _read(reference: llama.Params, judge: Judge, prefixes: Sequence[KVCache], last: jax.Array) -> jax.Array:
    """The seven branches' yes / (yes + no), added up: [B]."""
    template = judge.template
    assert isinstance(template, LogitsTemplate)
    rows = last.shape[0]
    width = max(map(len, template.branch_ids))
    padded = [(*ids, *[0] * (width - len(ids))) for ids in template.branch_ids]
    branches = jnp.tile(jnp.asarray(padded, jnp.int32), (rows, 1))
    lengths = jnp.tile(jnp.asarray([len(ids) for ids in template.branch_ids], jnp.int32), rows)
    hidden, _ = llama.extend(reference, judge.config, branches, lengths, prefixes)
    log_odds = _yes_no(reference, judge.config, template, llama.last_hidden(hidden, lengths))
    return jnp.sum(jax.nn.sigmoid(log_odds).reshape(rows, CRITERIA), axis=-1)


def _yes_no(params: llama.Params, config: LlamaConfig, template: LogitsTemplate, hidden: jax.Array) -> jax.Array:
    """log(yes / no) [B]: only the declared tokens' rows of the head are read."""
    weight = llama.head_weight(params, config)
    sides = [
        jax.nn.logsumexp(
            jnp.einsum("bd,vd->bv", hidden, weight[jnp.asarray(ids)], preferred_element_type=jnp.float32), axis=-1
        )
        for ids in (template.yes_ids, template.no_ids)
    ]
    return sides[0] - sides[1]
