"""Log-probabilities, entropy and exact KL of tokens from hidden states, the head applied by chunks.

[tokens, vocabulary] never exists whole, forward or backward: each chunk's logits are recomputed for its gradient.
Everything is float32. "The policy" here is the tempered one, logits divided by the sampling temperature, so that the
sampler and the learner speak of the same distribution.
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
    """Per completion token, float32 [B, T]; meaningless where masked."""

    logprobs: jax.Array
    """log pi(token | prefix)."""
    entropy: jax.Array
    """Entropy of pi(. | prefix) in nats; carries no gradient."""
    full_kl: jax.Array
    """sum_v pi(v) (log pi(v) - log pi_ref(v)); 0 unless the reference's hidden states were given."""


def completion_hidden(
    params: llama.Params, config: LlamaConfig, rows: Rows, remat: llama.Remat = "none", share: int = 1
) -> jax.Array:
    """The hidden state [B, T, D] from which each completion token was predicted.

    Each `share` consecutive rows have the same prompt: above 1 it is run, forward and backward, once for all of them.
    """
    if share == 1:
        hidden = llama.hidden_states(params, config, rows.tokens, remat=remat)
        return jnp.take_along_axis(hidden, (rows.positions - 1)[..., None], axis=1)
    completions = completion_tokens(rows)
    prompts, lengths = rows.tokens[::share, : -completions.shape[1]], rows.prompt_lengths[::share]
    prompts = jnp.where(jnp.arange(prompts.shape[1])[None] < lengths[:, None], prompts, 0)  # a row's own tokens follow
    # the last token of a completion predicts nothing that counts
    before, inside = llama.shared_hidden_states(params, config, prompts, lengths, completions[:, :-1], remat)
    first = jnp.repeat(llama.last_hidden(before, lengths), share, axis=0)
    return shard_rows(jnp.concatenate([first[:, None], inside], axis=1))


def completion_tokens(rows: Rows) -> jax.Array:
    """int32 [B, T]: the completion's tokens."""
    return jnp.take_along_axis(rows.tokens, rows.positions, axis=1)


def token_statistics(
    params: llama.Params,
    config: LlamaConfig,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: float,
    chunk: int,
    reference: tuple[llama.Params, jax.Array] | None = None,
) -> TokenStatistics:
    """Statistics of `targets` [B, T] under the head applied to `hidden` [B, T, D], about `chunk` tokens at a time.

    A chunk is the same columns (at least one) of every row, so that on a mesh all devices work on each; there `chunk`
    counts the tokens of one device, which also holds only its share of the vocabulary.
    `reference` = (its parameters, its hidden states [B, T, D]) adds the exact KL of each token.
    """
    rows, length = targets.shape
    columns = max(1, min(length, chunk * row_shards() // rows))

    def chunked(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, -length % columns)] + [(0, 0)] * (x.ndim - 2))
        parts = jnp.moveaxis(padded.reshape(rows, -1, columns, *x.shape[2:]), 1, 0)
        return shard_rows(parts, axis=1)

    @jax.checkpoint
    def statistics(part: tuple[jax.Array, ...]) -> TokenStatistics:
        logp = jax.nn.log_softmax(llama.tempered(llama.logits(params, config, part[0]), temperature), axis=-1)
        chosen = jnp.take_along_axis(logp, part[1][..., None], axis=-1)[..., 0]
        stopped = jax.lax.stop_gradient(logp)
        entropy = -jnp.sum(jnp.exp(stopped) * stopped, axis=-1)
        kl = jnp.zeros_like(chosen)
        if reference is not None:
            ref_logits = llama.logits(reference[0], config, part[2])
            ref_logp = jax.nn.log_softmax(llama.tempered(ref_logits, temperature), axis=-1)
            kl = jnp.sum(jnp.exp(logp) * (logp - ref_logp), axis=-1)
        return TokenStatistics(chosen, entropy, kl)

    parts = (chunked(hidden), chunked(targets))
    if reference is not None:
        parts = (*parts, chunked(reference[1]))
    out = jax.lax.map(statistics, parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length], out)
