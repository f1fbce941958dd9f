"""The quality self-reward R_Q in 0..7: the frozen reference judges answers by seven yes/no criteria.

`text` mode is the paper's: the judge writes a calculation and a tagged score (`reward/text_judge.py`). It needs a model
that follows the required format; malformed verdicts are masked.

`logits` mode reads the same verdicts without decoding, so no verdict can be malformed: rubric, query and answer are
prefilled (`reward/judge.py`), seven branches of a few tokens each ("3.") follow, and p = yes / (yes + no) is read from
the logits of each; the score is the sum of the seven p. LSP, Section 3 (quality self-reward).
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
    """Returns the component, with the rubric prefilled under the frozen `reference` parameters of the model `policy`.

    `token_classes` uint8 [V] is `Tokenizer.token_classes()` over the model's vocabulary. It reads `quality_weight`,
    `quality_mode`, `quality_max_length`, `rubric` and `judge_rows` from `config`; about `judge_rows` answers are judged
    at a time (complete groups, at least one).

    Raises InputError for an unknown mode, an invalid rubric file, a length below 1, and a judge's prompt that leaves no
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
    """Returns R_Q in [0, 7] of every answer; masks nothing. Pure."""
    values_NG = judge_episode(params, episode, judge, partial(_read, params["reference"], judge))
    return RewardOutput(values_NG, jnp.ones_like(values_NG, bool), jnp.ones(values_NG.shape[0], bool))


def _read(reference: llama.Params, judge: Judge, prefixes: Sequence[KVCache], last_BD: jax.Array) -> jax.Array:
    """Returns the sum of yes / (yes + no) over the seven branches, [B]."""
    template = judge.template
    assert isinstance(template, LogitsTemplate)
    rows = last_BD.shape[0]
    width = max(map(len, template.branch_ids))
    padded = [(*ids, *[0] * (width - len(ids))) for ids in template.branch_ids]
    branches = jnp.tile(jnp.asarray(padded, jnp.int32), (rows, 1))
    lengths = jnp.tile(jnp.asarray([len(ids) for ids in template.branch_ids], jnp.int32), rows)
    hidden, _ = llama.extend(reference, judge.config, branches, lengths, prefixes)
    log_odds = _yes_no(reference, judge.config, template, llama.last_hidden(hidden, lengths))
    return jnp.sum(jax.nn.sigmoid(log_odds).reshape(rows, CRITERIA), axis=-1)


def _yes_no(params: llama.Params, config: LlamaConfig, template: LogitsTemplate, hidden_BD: jax.Array) -> jax.Array:
    """Returns log(yes / no) [B]; reads only the head's rows of the yes and no tokens."""
    weight = llama.head_weight(params, config)
    sides = [
        jax.nn.logsumexp(
            jnp.einsum("bd,vd->bv", hidden_BD, weight[jnp.asarray(ids)], preferred_element_type=jnp.float32), axis=-1
        )
        for ids in (template.yes_ids, template.no_ids)
    ]
    return sides[0] - sides[1]
