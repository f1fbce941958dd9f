"""Completions of prompts: the pure function `complete`, and `generate` of the public interface.

`complete` prefills each prompt once and decodes its rows (`play/decode.py`); `generate` calls it with encoded prompts,
padded to declared buckets, and decodes the completions to text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import numpy as np

from lsp_jax.core import arguments, runtime
from lsp_jax.core.errors import InputError
from lsp_jax.model import llama
from lsp_jax.model.sharding import mesh_of, replicate, use_mesh
from lsp_jax.play.decode import Completions, DecodeSpec, rollout
from lsp_jax.play.sampler import SamplingConfig, row_keys
from lsp_jax.policy import Policy, check_policy
from lsp_jax.text.prompts import Ragged
from lsp_jax.text.tokenizer_files import check_messages

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
    prompts: Prompt | Sequence[Prompt],
    sampling: SamplingConfig = SAMPLED,
    *,
    max_completion_length: int = 64,
    seed: int = 0,
    stop_at_eos: bool = True,
    batch_size: int = 64,
) -> list[str]:
    """One completion of each prompt as text, without the stop token and other control tokens.

    A prompt is a string (one user message, in the chat template), a list of messages (`role`, `content`), or a list of
    token ids (used as they are); a single prompt is taken as a list of one. `SamplingConfig(temperature=0)` is greedy.
    `stop_at_eos=False` forces `max_completion_length` tokens. The draws depend on `seed` and each prompt's index in the
    list, not on `batch_size`.

    Raises InputError for arguments that cannot be used (an empty prompt, ids outside the vocabulary, a prompt longer
    than the model's context, ...), and for a model whose logits are not finite.
    """
    check_policy("policy", policy)
    sampling, length = check_options(sampling, max_completion_length, seed)
    listed = as_prompts(prompts)
    batch_size = arguments.integer("batch_size", batch_size, least=1, of="rows")
    stop_ids = policy.tokenizer.stop_ids if arguments.boolean("stop_at_eos", stop_at_eos) else ()
    ids = [prompt_ids(policy, prompt, length, f"prompts[{i}]") for i, prompt in enumerate(listed)]
    spec = DecodeSpec(policy.config, sampling, length, stop_ids)
    texts: list[str] = []
    for start in range(0, len(ids), batch_size):
        part = ids[start : start + batch_size]
        rows = next((b for b in ROW_BUCKETS if len(part) <= b <= batch_size), batch_size)
        width = bucket(max(map(len, part)), PROMPT_BUCKETS, "prompt length")
        arrays = pad_prompts(part, width, rows), jax.random.key(int(seed)), np.int32(start)
        with use_mesh(mesh_of(policy.params)):
            out = complete(policy.params, *replicate(arrays), spec)
        tokens, lengths, logprobs = runtime.to_host((out.tokens, out.lengths - out.stopped, out.logprobs))
        check_finite(policy.source, logprobs[: len(part)], lambda row, first=start: f"prompts[{first + row}]")
        rows_ids = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)][: len(part)]
        texts += [policy.tokenizer.decode(row, skip_special_tokens=True) for row in rows_ids]
    return texts


def check_options(sampling: object, max_completion_length: object, seed: object) -> tuple[SamplingConfig, int]:
    """Raises InputError for what can be seen without a model; returns the plain values."""
    given = arguments.instance("sampling", sampling, SamplingConfig, "must be a SamplingConfig")
    given.check("sampling")
    arguments.seed("seed", seed)
    length = arguments.integer("max_completion_length", max_completion_length, least=1, of="tokens")
    return arguments.plain(given, "sampling"), length


def as_prompts(prompts: object) -> list[Prompt]:
    """Returns a list of prompts; a single one, of any form, is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    remedy = "must be a list of prompts, each text, messages or token ids"
    listed = arguments.items("prompts", _on_host(prompts), remedy)
    single = bool(listed) and isinstance(listed[0], Mapping | int | np.integer)
    return [listed] if single else listed


def _on_host(value: object) -> object:
    """Arrays as nested lists; anything else as it is."""
    return runtime.to_host(value).tolist() if isinstance(value, np.ndarray | jax.Array) else value


def prompt_ids(policy: Policy, prompt: Prompt, new_tokens: int, field: str = "prompt") -> list[int]:
    """The ids of one prompt; InputError when they do not fit the policy's vocabulary, context or buckets."""
    if isinstance(prompt, str):
        ids = policy.tokenizer.chat_ids(prompt)
    else:
        listed = arguments.items(field, _on_host(prompt), "must be text, a list of messages, or a list of token ids")
        if listed and isinstance(listed[0], Mapping):
            ids = policy.tokenizer.chat_ids(check_messages(field, listed))
        else:
            ids = [arguments.integer(field, token, of="a token") for token in listed]
    if not ids:
        raise InputError(field, prompt, "has no tokens: give text, messages or token ids")
    outside = [token for token in ids if not 0 <= token < policy.config.vocab_size]
    if outside:
        raise InputError(field, outside[0], f"token id outside the vocabulary (0 to {policy.config.vocab_size - 1})")
    if len(ids) + new_tokens > policy.config.max_position_embeddings:
        raise InputError(
            f"{field} length",
            len(ids),
            f"with {new_tokens} new tokens exceeds the model's context of {policy.config.max_position_embeddings}",
        )
    bucket(len(ids), PROMPT_BUCKETS, f"{field} length")
    return ids


def check_finite(source: str, logprobs: np.ndarray, name: Callable[[int], str]) -> None:
    """Raises InputError where logits were not finite: a draw's log-probability in `logprobs` [B, T] then is not either.

    `name` says what a row is, `source` which model it is of.
    """
    rows, columns = np.nonzero(~np.isfinite(logprobs))
    if len(rows):
        remedy = (
            f"its logits are not finite at token {columns[0] + 1} of the completion of {name(int(rows[0]))}: "
            "its weights hold NaN or inf, or it overflows in this dtype; restore the weights, or load it in float32"
        )
        raise InputError("model", source, remedy)
