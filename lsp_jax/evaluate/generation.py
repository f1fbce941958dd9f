"""Batched, cached generation for evaluation, with the decoding programs of training.

Prompts of all tasks are batched by length, which limits padding and the number of programs: one per prompt width and
completion length, shared by all models of the same shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lsp_jax.core import runtime
from lsp_jax.evaluate.result_cache import Store, digest
from lsp_jax.model.sharding import mesh_of, replicate, row_shards, use_mesh
from lsp_jax.play.chunked_decode import decode_in_chunks
from lsp_jax.play.decode import DecodeSpec
from lsp_jax.play.generate import PROMPT_BUCKETS, bucket, check_finite, pad_prompts, prompt_ids
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.policy import Policy
from lsp_jax.text.prompts import SLOT, template_pieces

CHUNK = 32
"""Tokens between two checks for finished rows."""


class Request(NamedTuple):
    """A request for one answer."""

    ids: tuple[int, ...]
    """Token ids of the prompt, checked by `play.generate.prompt_ids`."""
    max_new_tokens: int
    """Maximum answer length in tokens."""
    sampling: SamplingConfig
    sample: int = 0
    """Index among several answers to this prompt."""
    seed: int = 0

    def key(self, model: str) -> str:
        """Returns the cache key, a digest of all inputs; `model` is the digest of the weights."""
        return digest(
            "answer",
            model,
            list(self.ids),
            self.max_new_tokens,
            list(vars(self.sampling).values()),
            self.sample,
            self.seed,
        )

    @property
    def width(self) -> int:
        """Width of the batch that contains the prompt."""
        return bucket(len(self.ids), PROMPT_BUCKETS, "prompt length")

    @property
    def program(self) -> tuple[Any, ...]:
        """Key of the compiled program; requests with equal keys can share a batch."""
        return self.max_new_tokens, tuple(vars(self.sampling).values()), self.width


class Answer(NamedTuple):
    """A generated answer."""

    text: str
    """Text without the stop token."""
    tokens: int
    stopped: bool
    """False if truncated at `max_new_tokens`."""


@partial(jax.jit, static_argnames="seed")
def _row_keys(prompts: jax.Array, samples: jax.Array, seed: int) -> jax.Array:
    """Derives a key per row from its prompt and sample index, so that sampling does not depend on the batch."""
    whole = jax.random.key(seed)
    return jax.vmap(lambda prompt, sample: jax.random.fold_in(jax.random.fold_in(whole, prompt), sample))(
        prompts, samples
    )


def chat_prompts(policy: Policy, texts: Sequence[str], max_new_tokens: int) -> list[tuple[int, ...]]:
    """Returns the ids of single user messages in the model's chat template.

    Texts are spliced in as plain text, so control tokens spelled in them have no effect. Raises InputError if a prompt
    with `max_new_tokens` new tokens does not fit the model's context.
    """
    before, after = template_pieces(policy.tokenizer, [{"role": "user", "content": SLOT}])
    encoded = [[*before, *policy.tokenizer.encode(text.strip()), *after] for text in texts]
    return [tuple(prompt_ids(policy, ids, max_new_tokens)) for ids in encoded]


def answers(
    policy: Policy, requests: Sequence[Request], store: Store, model: str, batch_size: int = 32, about: str = "answers"
) -> list[Answer]:
    """Returns the answer to each request, from `store` if cached there; adds new ones to it batch by batch.

    `model` is the digest of the weights, `about` the label of the progress bar. An answer depends on the weights, its
    request and, through rounding only, on its batch. Raises InputError for a model whose logits are not finite.
    """
    keys = [request.key(model) for request in requests]
    missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in store}
    with tqdm(total=len(set(keys)), desc=about, unit="answer", disable=None) as progress:
        progress.update(len(set(keys)) - len(missing))
        for batch in _batches(list(missing.items()), batch_size):
            made = _complete(policy, [request for _, request in batch], batch_size, about)
            store.add({key: list(answer) for (key, _), answer in zip(batch, made, strict=True)})
            progress.update(len(batch))
    return [Answer(*store[key]) for key in keys]


def _batches(missing: list[tuple[str, Request]], size: int) -> Iterator[list[tuple[str, Request]]]:
    """Yields batches of at most `size` requests with a common program, shortest prompts first."""
    ordered = sorted(missing, key=lambda item: (item[1].program, item[1].seed, len(item[1].ids)))
    for _, group in groupby(ordered, key=lambda item: (item[1].program, item[1].seed)):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _complete(policy: Policy, requests: Sequence[Request], batch_size: int, about: str) -> list[Answer]:
    first = requests[0]
    with use_mesh(mesh_of(policy.params)):
        shards = row_shards()
        rows = -(-batch_size // shards) * shards  # constant, so that the last batch needs no program of its own
        tokens, lengths = pad_prompts([request.ids for request in requests], first.width, rows)
        numbers = np.zeros((2, rows), np.uint32)
        for row, request in enumerate(requests):
            content = hashlib.sha256(np.asarray(request.ids, np.int64).tobytes()).digest()
            numbers[:, row] = int.from_bytes(content[:4], "little"), request.sample
        prompts, lengths_there, *parts = replicate((tokens, lengths, *numbers))
        longest, stop_ids = first.max_new_tokens, policy.tokenizer.stop_ids
        spec = DecodeSpec(policy.config, first.sampling, longest, stop_ids, min(CHUNK, longest))
        keys = _row_keys(*parts, seed=first.seed)
        out = decode_in_chunks(policy.params, (prompts, lengths_there), keys, spec)
        *told, logprobs = runtime.to_host((out.tokens, out.lengths, out.stopped, out.logprobs))
    check_finite(policy.source, logprobs[: len(requests)], lambda _: about)
    made = []
    for ids, length, stopped in list(zip(*told, strict=True))[: len(requests)]:
        text = policy.tokenizer.decode(ids[: length - stopped].tolist(), skip_special_tokens=True)
        made.append(Answer(text, int(length), bool(stopped)))
    return made
