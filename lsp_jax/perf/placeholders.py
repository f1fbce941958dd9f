"""Placeholder token ids for the fixed texts of a run, without a tokenizer.

Memory and speed of a program depend on the lengths of prompts, not on their contents. Four characters count as one
token, as in English with a vocabulary of 128 thousand; turns of the chat template are as long as Llama 3's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.config import TrainConfig
from lsp_jax.model.config import LlamaConfig
from lsp_jax.reward.judge import Judge
from lsp_jax.reward.preference import PreferenceTemplate
from lsp_jax.text.judge_prompts import (
    CRITERIA,
    TEXT_VERDICT,
    VERDICT,
    JudgeTemplate,
    LogitsTemplate,
    load_criteria,
    rubric_text,
)
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate
from lsp_jax.text.template_tags import TagTables

BLANK = 0
_OPENING, _TURN = 30, 5  # Llama 3.2's system message with its dates and the user's header; end of turn and next header


def ids(text: str, more: int = 0) -> tuple[int, ...]:
    """Returns as many ids as `text` has tokens, plus `more`."""
    return (1,) * (-(-len(text) // 4) + more)


def game(config: TrainConfig, model: LlamaConfig) -> GameSpec:
    """Returns the static specification that `training/setup.py` would make with the tokenizer."""
    prefix = ids(config.prompts.query_prefix)
    prompts = PlayPrompts(
        challenger_ids=ids(config.prompts.challenger, _OPENING + _TURN) + prefix,
        query_prefix_ids=prefix,
        solver=TokenTemplate(ids("", _OPENING), ids("", _TURN)),
        tags=(),
    )
    compute_dtype = "bfloat16" if config.compute_dtype == "auto" else config.compute_dtype
    return GameSpec.of(config, model, prompts, model.eos_token_id or (2,), compute_dtype)


def judge(config: TrainConfig, model: LlamaConfig) -> Judge:
    """Returns the judge of the quality reward."""
    text = config.reward.quality_mode == "text"
    rubric = ids(rubric_text(load_criteria(config.reward.rubric)), _OPENING)
    pieces = (rubric, ids("", _TURN), ids(TEXT_VERDICT if text else VERDICT, 2 * _TURN))
    template = JudgeTemplate(*pieces)
    if not text:
        template = LogitsTemplate(*pieces, branch_ids=((1, 1),) * CRITERIA, yes_ids=(1,) * 4, no_ids=(1,) * 4)
    return Judge(model, template, BLANK, config.reward.judge_rows)


def rubric(judge: Judge) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of the rubric's tokens and lengths, which are prefilled once per run."""
    width = len(judge.template.rubric_ids)
    return jax.ShapeDtypeStruct((1, width), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)


def preference_template() -> PreferenceTemplate:
    """Returns the conversation template of the reward model."""
    return PreferenceTemplate(ids("", _OPENING), ids("", _TURN), ids("", 1), trims=False)


NO_TAGS = TagTables((), np.zeros(0, np.int32))
"""Tables of blanked template tags: empty, because Llama 3's chat template spells no tag in ordinary text."""
