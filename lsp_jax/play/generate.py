"""Completions of prompts: the pure function `complete`, and `generate` of the public interface.

`complete` prefills each prompt once and decodes its rows (`play/decode.py`); `generate` calls it with encoded prompts,
padded to declared buckets, and decodes the completions to text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from lsp_jax.core import runtime
from lsp_jax.core.errors import InputError
from lsp_jax.model import llama
from lsp_jax.model.sharding import mesh_of, replicate, use_mesh
from lsp_jax.play.decode import Completions, DecodeSpec, rollout
from lsp_jax.play.sampler import SamplingConfig, row_keys
from lsp_jax.policy import Policy
from lsp_jax.text.prompts import Ragged

PROMPT_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
SAMPLED = SamplingConfig()

Prompt = str | list[dict[str, str]] | list[int]


@partial(jax.jit, static_argnames=("spec", "repeats"))
def complete(
    params: llama.Params, prompts: Ragged, key: jax.Array, first_row: jax.Array, spec: DecodeSpec, repeats: int = 1
) -> Completions:
    """`repeats` completions of each right-padded prompt (tokens [N, P], lengths [N]); arrays [N * repeats, ...].

    Row r draws with `fold_in(key, first_row + r)`, so the noise does not depend on how a list is split.
    """
    return rollout(params, prompts, row_keys(key, prompts[0].shape[0] * repeats, first_row), spec)


def bucket(size: int, buckets: Sequence[int], field: str) -> int:
    """The smallest declared bucket that holds `size`; InputError when none does."""
    for candidate in buckets:
        if size <= candidate:
            return candidate
    raise InputError(field, size, f"longer than the largest bucket ({buckets[-1]} tokens): shorten it")


def pad_prompts(prompts: Sequence[Sequence[int]], width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [rows, width] right-padded ids and lengths [rows]; rows beyond the prompts repeat the last one."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row in range(rows):
        ids = prompts[min(row, len(prompts) - 1)]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


def generate(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig = SAMPLED,
    *,
    max_completion_length: int = 64,
    seed: int = 0,
    stop_at_eos: bool = True,
    batch_size: int = 64,
) -> list[str]:
    """One completion of each prompt as text, without the stop token and other control tokens.

    A prompt is a string (one user message, in the chat template), a list of messages (`role`, `content`), or a list of
    token ids (used as they are). `SamplingConfig(temperature=0)` is greedy. `stop_at_eos=False` forces
    `max_completion_length` tokens. The draws depend on `seed` and each prompt's index in the list, not on `batch_size`.
    Raises InputError for an empty prompt, ids outside the vocabulary, and a prompt longer than the model's context.
    """
    check_options(prompts, sampling, max_completion_length)
    if batch_size < 1:
        raise InputError("batch_size", batch_size, "must be at least 1 row")
    ids = [prompt_ids(policy, prompt, max_completion_length) for prompt in prompts]
    stop_ids = policy.tokenizer.stop_ids if stop_at_eos else ()
    spec = DecodeSpec(policy.config, sampling, max_completion_length, stop_ids)
    texts: list[str] = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        rows = next((b for b in ROW_BUCKETS if len(part) <= b <= batch_size), batch_size)
        width = bucket(max(map(len, part)), PROMPT_BUCKETS, "prompt length")
        arrays = pad_prompts(part, width, rows), jax.random.key(seed), np.int32(start)
        with use_mesh(mesh_of(policy.params)):
            out = complete(policy.params, *replicate(arrays), spec)
        done = runtime.to_host((out.tokens, out.lengths - out.stopped))
        rows_ids = [row[:length].tolist() for row, length in zip(*done, strict=True)][: len(part)]
        texts += [policy.tokenizer.decode(row, skip_special_tokens=True) for row in rows_ids]
    return texts


def check_options(prompts: Sequence[Prompt], sampling: SamplingConfig, max_completion_length: int) -> None:
    """Raises InputError for options that are invalid for any model."""
    if isinstance(prompts, str):
        raise InputError("prompts", prompts, "must be a list; put a single prompt into one")
    sampling.check("sampling")
    if max_completion_length < 1:
        raise InputError("max_completion_length", max_completion_length, "must be at least 1 token")


def prompt_ids(policy: Policy, prompt: Prompt, new_tokens: int) -> list[int]:
    """The ids of one prompt; InputError when they do not fit the policy's vocabulary, context or buckets."""
    if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], dict)):
        ids = policy.tokenizer.chat_ids(prompt)  # pyright: ignore[reportArgumentType]
    else:
        ids = [int(token) for token in prompt]  # pyright: ignore[reportArgumentType]
    if not ids:
        raise InputError("prompt", prompt, "has no tokens: give text, messages or token ids")
    outside = [token for token in ids if not 0 <= token < policy.config.vocab_size]
    if outside:
        raise InputError("prompt", outside[0], f"token id outside the vocabulary (0 to {policy.config.vocab_size - 1})")
    if len(ids) + new_tokens > policy.config.max_position_embeddings:
        raise InputError(
            "prompt length",
            len(ids),
            f"with {new_tokens} new tokens exceeds the model's context of {policy.config.max_position_embeddings}",
        )
    bucket(len(ids), PROMPT_BUCKETS, "prompt length")
    return ids
