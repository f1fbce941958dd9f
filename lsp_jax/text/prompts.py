"""The roles' prompts as token ids: fixed pieces cut from the chat template once, model text spliced in on device.

A role's prompt is a list of messages with slots. `template_pieces` renders it with several stand-ins for each slot and
keeps what never changes, so that the ids are exactly `apply_chat_template(tokenize=True)`'s, and a query or an answer
enters as the ids that the model wrote: no decoding, no second tokenisation.

The wording is ours; the paper's prompts are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.core.errors import InputError
from lsp_jax.text import challenger_tasks
from lsp_jax.text.tokenizer import SPECIAL, Tokenizer

Message = dict[str, str]
Ragged = tuple[jax.Array, jax.Array]
"""Tokens int32 [B or 1, W] and their real lengths int32 [B or 1]."""

SLOT = "\0slot\0"  # a NUL cannot stand in a sensible prompt
_STAND_INS = ("Apples", "Which 2", "question?", "seven things.", "Blue", "Write code")


@dataclass(frozen=True)
class PromptConfig:
    """The prompts: what the Challenger is asked for."""

    challenger: str = challenger_tasks.INSTRUCTIONS
    """The Challenger's user message: names the task and the form of one input to it."""
    query_prefix: str = ""
    """Fixed beginning of every query, such as `What is `. It belongs to the query; only what follows is sampled."""


class TokenTemplate(NamedTuple):
    """A prompt with one slot: prefix ids, then the slot, then suffix ids."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


@dataclass(frozen=True)
class PlayPrompts:
    """Every fixed piece of the game as ids; hashable, a static argument of the jitted stages."""

    challenger_ids: tuple[int, ...]
    """The Challenger's whole prompt, the query's fixed beginning included."""
    query_prefix_ids: tuple[int, ...]
    """That beginning alone; it goes into the Solver's prompt before the sampled tokens."""
    solver: TokenTemplate
    """The Solver's chat template around a query."""
    tags: tuple[tuple[int, ...], ...]
    """Template tags that are ordinary text (`[INST]`), as id sequences that spell them, with and without a space."""

    @classmethod
    def build(cls, tokenizer: Tokenizer, config: PromptConfig) -> PlayPrompts:
        """Raises InputError when the chat template is missing or changes the text put into it."""
        prefix, suffix = template_pieces(tokenizer, [{"role": "user", "content": SLOT}])
        query_prefix = tuple(tokenizer.encode(config.query_prefix))
        tags = text_tags(tokenizer, (prefix, suffix))
        return cls(
            challenger_ids=(*tokenizer.chat_ids(config.challenger), *query_prefix),
            query_prefix_ids=query_prefix,
            solver=TokenTemplate(prefix, suffix),
            tags=tuple(sorted({tuple(tokenizer.encode(lead + tag)) for tag in tags for lead in ("", " ")})),
        )


def template_pieces(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
) -> tuple[tuple[int, ...], ...]:
    """The fixed ids before, between and after the slots of `messages`, generation prompt included unless declined.

    Found by rendering: what stays the same while one slot's text varies is fixed. Raises InputError when a slot's text
    does not come back out of the ids between the pieces.
    """
    slots = sum(message["content"].count(SLOT) for message in messages)

    def render(contents: Sequence[str]) -> list[int]:
        filling = iter(contents)
        filled = []
        for message in messages:
            parts = message["content"].split(SLOT)
            text = parts[0] + "".join(next(filling) + part for part in parts[1:])
            filled.append({**message, "content": text})
        return tokenizer.chat_ids(filled, add_generation_prompt)

    first = [_STAND_INS[0]] * slots
    base = render(first)
    pieces, end = [], 0
    for slot in range(slots):
        others = [render([*first[:slot], text, *first[slot + 1 :]]) for text in _STAND_INS[1:]]
        start = min(_common(base, other) for other in others)
        after = min(_common(base[::-1], other[::-1]) for other in others)
        content = tokenizer.decode(base[start : len(base) - after])
        if content.strip() != _STAND_INS[0]:
            raise InputError("chat_template", content, f"must hold a message's text as it is ({_STAND_INS[0]!r})")
        pieces.append(tuple(base[end:start]))
        end = len(base) - after
    return (*pieces, tuple(base[end:]))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def text_tags(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Template tags in `pieces` that are spelled in ordinary tokens."""
    runs: list[list[int]] = []
    for piece in pieces:
        run: list[int] = []
        for token in (*piece, None):
            if token is None or token in tokenizer.special_ids:
                runs.append(run)
                run = []
            else:
                run.append(token)
    tags = {tokenizer.decode(run).strip() for run in runs if run}
    return tuple(sorted(tag for tag in tags if len(tag) > 1 and tag[0] in "[<#{|"))


# --- on device ---------------------------------------------------------------------------------------------------


def ids_row(ids: Sequence[int]) -> Ragged:
    """Fixed ids as a part for `pack`: one row shared by all."""
    return jnp.asarray(ids, jnp.int32).reshape(1, -1), jnp.full(1, len(ids), jnp.int32)


def pack(parts: Sequence[Ragged]) -> Ragged:
    """Joins ragged parts row by row without gaps: tokens [B, sum of widths] padded with 0 at the right, lengths [B]."""
    rows = max(tokens.shape[0] for tokens, _ in parts)
    width = sum(tokens.shape[1] for tokens, _ in parts)
    columns = jnp.arange(width)[None, :]
    packed, total = jnp.zeros((rows, width), jnp.int32), jnp.zeros(rows, jnp.int32)
    for tokens, lengths in parts:
        if tokens.shape[1] == 0:
            continue
        index = columns - total[:, None]
        inside = (index >= 0) & (index < lengths[:, None])
        source = jnp.broadcast_to(tokens, (rows, tokens.shape[1]))
        values = jnp.take_along_axis(source, jnp.clip(index, 0, tokens.shape[1] - 1), axis=1)
        packed, total = jnp.where(inside, values, packed), total + lengths
    return packed, total


def splice(template: TokenTemplate, text: Ragged) -> Ragged:
    """Token ids [N, T] with lengths [N] into the template's slot: prompts [N, P] and their lengths."""
    return pack((ids_row(template.prefix_ids), text, ids_row(template.suffix_ids)))


def harmless(text: Ragged, token_classes: jax.Array, blank: int) -> Ragged:
    """`text` with `blank` in place of control ids, so that none closes a turn; `token_classes` is uint8 [V]."""
    tokens, lengths = text
    return jnp.where(token_classes[tokens] == SPECIAL, blank, tokens), lengths


def contains_sequence(text: Ragged, sequence: Sequence[int]) -> jax.Array:
    """bool [B]: whether `sequence` stands in the real tokens of a row."""
    tokens, lengths = text
    width, size = tokens.shape[1], len(sequence)
    if size == 0 or size > width:
        return jnp.zeros(tokens.shape[0], bool)
    hits = jnp.ones((tokens.shape[0], width - size + 1), bool)
    for offset, token in enumerate(sequence):
        hits = hits & (tokens[:, offset : width - size + 1 + offset] == token)
    return jnp.any(hits & (jnp.arange(width - size + 1)[None] + size <= lengths[:, None]), axis=-1)
