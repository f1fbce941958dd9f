"""Whether rewards can tell a right answer from a senseless one, before a run is spent on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsp_jax import host
from lsp_jax.config import TrainConfig
from lsp_jax.model.sharding import place, row_shards, use_mesh
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import HostReward
from lsp_jax.run.doctor import ANSWER, QUERY, Finding, examine
from lsp_jax.run.scoring import score_episode
from lsp_jax.run.setup import Run, prepare
from lsp_jax.text.tokenizer import Tokenizer

BAD_ANSWER = "no no no no"


def examine_all(config: TrainConfig) -> list[Finding]:
    """The whole pass over the run `config`; its model is loaded, nothing is trained and nothing written."""
    run = prepare(config)
    try:
        with use_mesh(run.mesh):
            return [*examine(run), *examine_rewards(run)]
    finally:
        run.workers.close()


def examine_rewards(run: Run) -> list[Finding]:
    """Has every compiled component score a right and a senseless answer; compiles what they need for that. Call it
    inside the run's mesh.

    What scores on the host has been asked already (`probe_callable`).
    """
    findings, episode = [], pair(run.policy.tokenizer, row_shards())
    for reward in run.rewards:
        if not isinstance(reward, HostReward):
            values, valid, _ = host.to_host(score_episode(reward, episode))
            findings.append(_finding(reward.name, values[0], valid[0]))
    return findings


def _finding(name: str, values: np.ndarray, valid: np.ndarray) -> Finding:
    good, bad = map(float, values)
    said = f"{good:.3f} for {ANSWER!r}, {bad:.3f} for {BAD_ANSWER!r} to {QUERY!r}"
    check = f"reward {name}"
    if not (math.isfinite(good) and math.isfinite(bad)):
        return Finding("error", check, said, "not a number: its weights or its dtype are wrong")
    if not valid.all():
        remedy = "masked where it cannot be read: a judge that keeps to no form, use --reward.quality-mode logits"
        return Finding("warning", check, said, remedy)
    if good <= bad:
        remedy = "it does not tell them apart: is it the model that was meant, and was it trained on chats?"
        return Finding("warning", check, said, remedy)
    return Finding("ok", check, said)


def pair(tokenizer: Tokenizer, queries: int) -> Episode:
    """An episode of `queries` times the same query with both answers, each of which stopped."""
    query, stop = tokenizer.encode(QUERY), tokenizer.stop_ids[0]
    answers = [[*tokenizer.encode(text), stop] for text in (ANSWER, BAD_ANSWER)]
    width, shape = max(map(len, answers)), (queries, len(answers))

    def repeated(values: Sequence[Any], dtype: Any) -> jax.Array:
        return jnp.asarray(np.broadcast_to(np.array(values, dtype), (queries, *np.shape(values))))

    text = repeated(query, np.int32), jnp.full(queries, len(query), jnp.int32)
    tokens = repeated([ids + [0] * (width - len(ids)) for ids in answers], np.int32)
    lengths, zeros = repeated([*map(len, answers)], np.int32), jnp.zeros((*shape, width))
    done = Completions(tokens, lengths, zeros, zeros, jnp.ones(shape, bool))
    return place(Episode(Queries(None, text, jnp.ones(queries, bool)), text, done))
