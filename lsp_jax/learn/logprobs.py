"""Log-probabilities, entropy and exact KL of tokens from hidden states, with the head applied in chunks.

The full logits [tokens, vocabulary] never exist, forward or backward: each chunk's logits are recomputed for its
gradient. Everything is float32. "The policy" here is the tempered one, with logits divided by the sampling temperature,
so that sampler and learner use the same distribution.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.learn.batch import Rows
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import row_shards, shard_rows


class TokenStatistics(NamedTuple):
    """Statistics of each completion token, float32 [B, T]; meaningless where masked."""

    logprobs: jax.Array
    """log pi(token | prefix)."""
    entropy: jax.Array
    """Entropy of pi(. | prefix) in nats; carries no gradient."""
    full_kl: jax.Array
    """sum_v pi(v) (log pi(v) - log pi_ref(v)); 0 unless the reference's hidden states were given."""


def completion_hidden(
    params: llama.Params, config: LlamaConfig, rows: Rows, remat: llama.Remat = "none", share: int = 1
) -> jax.Array:
    """Hidden states [B, T, D] from which the completion tokens are predicted.

    Each `share` consecutive rows have the same prompt; above 1 it is computed, forward and backward, once for them.
    """
    if share == 1:
        hidden_BWD = llama.hidden_states(params, config, rows.tokens, remat=remat)
        return jnp.take_along_axis(hidden_BWD, (rows.positions - 1)[..., None], axis=1)
    completions_BT = completion_tokens(rows)
    prompts_NP, lengths_N = rows.tokens[::share, : -completions_BT.shape[1]], rows.prompt_lengths[::share]
    # without the completion tokens that follow the prompt
    prompts_NP = jnp.where(jnp.arange(prompts_NP.shape[1])[None] < lengths_N[:, None], prompts_NP, 0)
    # the last token of a completion predicts no other
    before_NPD, inside_BSD = llama.shared_hidden_states(
        params, config, prompts_NP, lengths_N, completions_BT[:, :-1], remat
    )
    first_BD = jnp.repeat(llama.last_hidden(before_NPD, lengths_N), share, axis=0)
    return shard_rows(jnp.concatenate([first_BD[:, None], inside_BSD], axis=1))


def completion_tokens(rows: Rows) -> jax.Array:
    """int32 [B, T]: the completion's tokens."""
    return jnp.take_along_axis(rows.tokens, rows.positions, axis=1)


def token_statistics(
    params: llama.Params,
    config: LlamaConfig,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    temperature: float,
    chunk: int,
    reference: tuple[llama.Params, jax.Array] | None = None,
) -> TokenStatistics:
    """Statistics of `targets_BT` under the head applied to `hidden_BTD`, about `chunk` tokens at a time.

    A chunk holds the same columns (at least one) of every row, so that on a mesh all devices work on every chunk.
    `chunk` then counts the tokens of one device, which holds only its share of the vocabulary.
    `reference` = (its parameters, its hidden states [B, T, D]) adds the exact KL of each token.
    """
    rows, length = targets_BT.shape
    columns = max(1, min(length, chunk * row_shards() // rows))

    def chunked(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, -length % columns)] + [(0, 0)] * (x.ndim - 2))
        parts = jnp.moveaxis(padded.reshape(rows, -1, columns, *x.shape[2:]), 1, 0)
        return shard_rows(parts, axis=1)

    @jax.checkpoint
    def statistics(part: tuple[jax.Array, ...]) -> TokenStatistics:
        logp_BCV = jax.nn.log_softmax(llama.tempered(llama.logits(params, config, part[0]), temperature), axis=-1)
        chosen_BC = jnp.take_along_axis(logp_BCV, part[1][..., None], axis=-1)[..., 0]
        stopped_BCV = jax.lax.stop_gradient(logp_BCV)
        entropy_BC = -jnp.sum(jnp.exp(stopped_BCV) * stopped_BCV, axis=-1)
        kl_BC = jnp.zeros_like(chosen_BC)
        if reference is not None:
            ref_logits_BCV = llama.logits(reference[0], config, part[2])
            ref_logp_BCV = jax.nn.log_softmax(llama.tempered(ref_logits_BCV, temperature), axis=-1)
            kl_BC = jnp.sum(jnp.exp(logp_BCV) * (logp_BCV - ref_logp_BCV), axis=-1)
        return TokenStatistics(chosen_BC, entropy_BC, kl_BC)

    parts = (chunked(hidden_BTD), chunked(targets_BT))
    if reference is not None:
        parts = (*parts, chunked(reference[1]))
    out = jax.lax.map(statistics, parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length], out)
