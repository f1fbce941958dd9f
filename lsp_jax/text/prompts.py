"""The roles' prompts as token ids: fixed pieces taken from the chat template once, model text spliced in on device.

A role's prompt is a list of messages with slots. `template_pieces` renders it with several placeholder texts per slot
and keeps the ids that never change, so that prompts equal those of `apply_chat_template(tokenize=True)`. Queries and
answers are inserted as the ids the model sampled, without decoding and tokenising them again.

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

SLOT = "\0slot\0"  # real prompts do not contain NUL
_PLACEHOLDERS = ("Apples", "Which 2", "question?", "seven things.", "Blue", "Write code")


@dataclass(frozen=True)
class PromptConfig:
    """Prompts of the roles, including the Challenger's task."""

    challenger: str = challenger_tasks.INSTRUCTIONS
    """The Challenger's user message: describes the task and the form of one query."""
    query_prefix: str = ""
    """Fixed start of every query, such as `What is `. It is part of the query; only the rest is sampled."""


class TokenTemplate(NamedTuple):
    """A prompt with one slot: prefix ids, then the slot, then suffix ids."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


@dataclass(frozen=True)
class PlayPrompts:
    """All fixed prompt pieces as token ids; hashable, a static argument of the jitted stages."""

    challenger_ids: tuple[int, ...]
    """The Challenger's complete prompt, including the query prefix."""
    query_prefix_ids: tuple[int, ...]
    """The query prefix alone; it precedes the sampled tokens in the Solver's prompt."""
    solver: TokenTemplate
    """The Solver's chat template around a query."""
    tags: tuple[tuple[int, ...], ...]
    """Template tags made of ordinary tokens (`[INST]`), as their token ids with and without a leading space."""

    @classmethod
    def build(cls, tokenizer: Tokenizer, config: PromptConfig) -> PlayPrompts:
        """Tokenises the prompts; raises InputError when the chat template is missing or changes inserted text."""
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
    """Returns the fixed ids before, between and after the slots of `messages`, by default with generation prompt.

    Ids are fixed if they stay the same while the text of a slot varies. Raises InputError when the ids between the
    pieces do not decode to the slot's text.
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

    first = [_PLACEHOLDERS[0]] * slots
    base = render(first)
    pieces, end = [], 0
    for slot in range(slots):
        others = [render([*first[:slot], text, *first[slot + 1 :]]) for text in _PLACEHOLDERS[1:]]
        start = min(_common(base, other) for other in others)
        after = min(_common(base[::-1], other[::-1]) for other in others)
        content = tokenizer.decode(base[start : len(base) - after])
        if content.strip() != _PLACEHOLDERS[0]:
            raise InputError(
                "chat_template", content, f"must keep the text of messages unchanged ({_PLACEHOLDERS[0]!r})"
            )
        pieces.append(tuple(base[end:start]))
        end = len(base) - after
    return (*pieces, tuple(base[end:]))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def text_tags(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Returns the template tags in `pieces` that are made of ordinary tokens."""
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
    """Returns fixed ids as one row for `pack`, shared by all rows of the batch."""
    return jnp.asarray(ids, jnp.int32).reshape(1, -1), jnp.full(1, len(ids), jnp.int32)


def pack(parts: Sequence[Ragged]) -> Ragged:
    """Concatenates ragged parts row by row: tokens [B, sum of widths], right-padded with 0, and lengths [B]."""
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
    """Inserts token ids [N, T] with lengths [N] into the template's slot; returns prompts [N, P] and lengths [N]."""
    return pack((ids_row(template.prefix_ids), text, ids_row(template.suffix_ids)))


def blank_special(text: Ragged, token_classes: jax.Array, blank: int) -> Ragged:
    """Replaces control tokens in `text` by `blank`, so that none closes a turn; `token_classes` is uint8 [V]."""
    tokens, lengths = text
    return jnp.where(token_classes[tokens] == SPECIAL, blank, tokens), lengths


def contains_sequence(text: Ragged, sequence: Sequence[int]) -> jax.Array:
    """bool [B]: whether the unpadded tokens of a row contain `sequence`."""
    tokens, lengths = text
    width, size = tokens.shape[1], len(sequence)
    if size == 0 or size > width:
        return jnp.zeros(tokens.shape[0], bool)
    hits = jnp.ones((tokens.shape[0], width - size + 1), bool)
    for offset, token in enumerate(sequence):
        hits = hits & (tokens[:, offset : width - size + 1 + offset] == token)
    return jnp.any(hits & (jnp.arange(width - size + 1)[None] + size <= lengths[:, None]), axis=-1)
