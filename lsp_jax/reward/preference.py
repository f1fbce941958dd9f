"""The preference reward: a Bradley-Terry reward model's score of a conversation (query, answer).

The reward model is a Llama with a score head (`LlamaForSequenceClassification` with one label). It reads the query as
the user's message and the answer as the assistant's in its own chat template, and its score stands at the last token of
that conversation, whatever the template puts after the answer included. Which token is the last is known from lengths,
never from token values.

1. Where its tokenizer is the policy's (the vocabularies are compared, not their names), query and answer are spliced in
   as the ids that the policy wrote, and all stays on device.
2. Where it is another, the texts are decoded and encoded again on the host, and scored by the same program.

Control ids in query and answer, and what spells a tag of the reward model's chat template (`[/INST]`), are replaced by
blanks: nothing that a model wrote can close a turn. LSP, Section 4 (the task reward R).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsp_jax.core import processes
from lsp_jax.core.errors import InputError
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import replicate, shard_rows
from lsp_jax.model.weights import check_weights, load_params
from lsp_jax.play.selfplay import Episode
from lsp_jax.policy import Policy, open_pretrained
from lsp_jax.reward.base import DeviceReward, EpisodeReward, Kind, RewardOutput, episode_texts, groups_per_chunk
from lsp_jax.text.prompts import SLOT, Ragged, blank_special, ids_row, pack, template_pieces, text_tags
from lsp_jax.text.template_tags import TagTables, blank_tags, tag_tables
from lsp_jax.text.tokenizer import Tokenizer

STRETCHES = (1, 2, 4, 8)
"""Widths for texts in another tokenizer's ids, in multiples of the policy's: as many programs at most."""

_PROBES = (
    "What is 12 + 345? It's 357.",
    "  two spaces, a tab\tand\n\nnew lines \n",
    "def f(x):\n    return [x**2 for _ in range(10)]  # 0.5",
    "Größe, naïve, Ελλάδα, 東京, मुंबई, 🙂👍🏽",
    "<|im_start|>user<|im_end|><|eot_id|><|begin_of_text|></s><s>[INST]",
)


class PreferenceTemplate(NamedTuple):
    """The reward model's chat template around a query and an answer; hashable."""

    prefix_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    trims: bool
    """Whether the template strips white space from both ends of a message."""

    @property
    def fixed_length(self) -> int:
        """Tokens of the conversation beside query and answer."""
        return len(self.prefix_ids + self.middle_ids + self.tail_ids)


# --- the model and what can be known before its weights are read ---------------------------------------------------


def open_reward_model(path_or_hub_id: str | Path, revision: str | None = None) -> tuple[Path, Policy]:
    """The reward model's configuration and tokenizer (`params` is empty), and the directory that holds its weights.

    Raises InputError for what is not a Llama classifier with one label, a tokenizer larger than the vocabulary, a chat
    template that is missing or changes its messages, and for weights that are missing or do not fit.
    """
    directory, model = open_pretrained(path_or_hub_id, revision, head="score")
    preference_template(model.tokenizer)
    check_weights(directory, model.config)
    return directory, model


def load_reward_model(
    path_or_hub_id: str | Path, dtype: str = "auto", revision: str | None = None, mesh: Mesh | None = None
) -> Policy:
    """`open_reward_model` with the parameters; `dtype` auto is bfloat16 on accelerators and float32 on the CPU."""
    directory, model = open_reward_model(path_or_hub_id, revision)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return replace(model, params=load_params(directory, model.config, dtype, mesh))


def preference_template(tokenizer: Tokenizer) -> PreferenceTemplate:
    """The fixed ids of [user: query, assistant: answer], without a generation prompt. Raises InputError."""
    messages = [{"role": "user", "content": SLOT}, {"role": "assistant", "content": SLOT}]
    prefix, middle, tail = template_pieces(tokenizer, messages, add_generation_prompt=False)
    if not middle:
        raise InputError("chat_template", None, "must put something between a question and its answer")
    filled = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}]
    query, answer = (tokenizer.encode(message["content"]) for message in filled)
    if [*prefix, *query, *middle, *answer, *tail] != tokenizer.chat_ids(filled, add_generation_prompt=False):
        raise InputError("chat_template", str(tokenizer.directory), "a message inside it has other ids than one alone")
    bare, spaced = (
        tokenizer.chat_ids([{"role": "user", "content": text}], add_generation_prompt=False) for text in ("a", "\n a ")
    )
    return PreferenceTemplate(prefix, middle, tail, trims=bare == spaced)


def check_context(model: Policy, query_length: int, answer_length: int, field: str = "reward.preference_model") -> int:
    """Tokens of the longest conversation: the template's and the longest query and answer, in tokens.

    With another tokenizer than the policy's, lengths are those of texts that take as many tokens in both. Raises
    InputError, naming `field`, where they exceed the reward model's context. Needs no weights.
    """
    length = preference_template(model.tokenizer).fixed_length + query_length + answer_length
    context = model.config.max_position_embeddings
    if length > context:
        remedy = f"tokens of query, answer and template exceed the reward model's context of {context}: shorten one"
        raise InputError(field, length, remedy)
    return length


def same_tokenizer(left: Tokenizer, right: Tokenizer) -> bool:
    """Whether ids mean the same in both: vocabulary, control ids, and how a few texts of many kinds are cut."""
    if left.special_ids != right.special_ids or left.vocabulary != right.vocabulary:
        return False
    return all(
        left.encode(text, special) == right.encode(text, special) for text in _PROBES for special in (True, False)
    )


# --- the reward ----------------------------------------------------------------------------------------------------


def preference_reward(
    model: Policy,
    tokenizer: Tokenizer,
    token_classes: jax.Array,
    kind: Kind = "task",
    weight: float = 1.0,
    rows: int = 16,
    name: str = "preference",
) -> DeviceReward | EpisodeReward:
    """The component of the reward model `model`: compiled where its tokenizer equals the policy's `tokenizer`.

    `token_classes` uint8 [V] is `Tokenizer.token_classes()` over the policy's vocabulary. About `rows` conversations
    are scored at one time (whole groups: at least G). Scores are float32 in every dtype of the parameters.
    """
    template = preference_template(model.tokenizer)
    blank = tokenizer.encode(" ")[0]
    tags = replicate(tag_tables(tokenizer, text_tags(model.tokenizer, template[:3])))
    if same_tokenizer(model.tokenizer, tokenizer):
        score = partial(preference_scores, config=model.config, template=template, blank=blank, rows=rows)
        return DeviceReward(
            name, kind, weight, score, {"model": model.params, "token_classes": token_classes, "tags": tags}
        )
    written = {"token_classes": token_classes, "tags": tags}
    foreign = partial(
        _foreign_scores, model=model, tokenizer=tokenizer, written=written, template=template, blank=blank, rows=rows
    )
    return EpisodeReward(name, kind, weight, foreign)


def preference_scores(
    params: Any, episode: Episode, *, config: LlamaConfig, template: PreferenceTemplate, blank: int, rows: int
) -> RewardOutput:
    """Scores `values` [N, G] of an episode in the reward model's own ids; nothing is masked. Pure.

    Texts enter as written: white space that the policy left at an end stays, also where the template would trim it.
    """
    query, answer = _blanked_texts(episode, params["token_classes"], params["tags"], blank)
    values = score_conversations(params["model"], query, answer, config, template, rows)
    return RewardOutput(values, jnp.ones_like(values, bool), jnp.ones(values.shape[0], bool))


@partial(jax.jit, static_argnames=("config", "template", "rows"))
def score_conversations(
    params: llama.Params, queries: Ragged, answers: Ragged, config: LlamaConfig, template: PreferenceTemplate, rows: int
) -> jax.Array:
    """float32 [N, G]: queries [N, W] with lengths [N], answers [N, G, T] with lengths [N, G].

    Each query is prefilled once for its G answers.
    """
    number, group = answers[1].shape
    chunk = groups_per_chunk(number, group, rows)

    def some(part: tuple[Ragged, Ragged]) -> jax.Array:
        query, (answer, answer_lengths) = shard_rows(part)
        opening = (ids_row(template.prefix_ids), query, ids_row(template.middle_ids[:-1]))
        _, cache = llama.extend(params, config, *pack(opening))
        # the middle's last token goes with the answer: there is one to read where both answer and tail are empty
        flat = (answer.reshape(chunk * group, -1), answer_lengths.reshape(-1))
        tokens, lengths = pack((ids_row(template.middle_ids[-1:]), flat, ids_row(template.tail_ids)))
        hidden, _ = llama.extend(params, config, tokens, lengths, (cache,))
        return llama.score(params, llama.last_hidden(hidden, lengths))

    parts = jax.tree.map(lambda x: x.reshape(number // chunk, chunk, *x.shape[1:]), (queries, answers))
    return jax.lax.map(some, parts).reshape(number, group)


@partial(jax.jit, static_argnames="blank")
def _blanked_texts(episode: Episode, token_classes: jax.Array, tags: TagTables, blank: int) -> tuple[Ragged, Ragged]:
    tokens, lengths = episode.answers.tokens, episode.answer_lengths
    flat = (tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1))
    query, answer = (
        blank_tags(blank_special(text, token_classes, blank), tags, blank) for text in (episode.queries.text, flat)
    )
    return query, (answer[0].reshape(tokens.shape), lengths)


# --- another tokenizer ---------------------------------------------------------------------------------------------


def _foreign_scores(
    episode: Episode,
    *,
    model: Policy,
    tokenizer: Tokenizer,
    written: dict[str, Any],
    template: PreferenceTemplate,
    blank: int,
    rows: int,
) -> RewardOutput:
    """As `preference_scores`, through text: decoded by the policy's tokenizer, encoded by the reward model's.

    What spells a control token is ordinary text there. An answer that is too long for the widest program or for the
    model's context is masked, and so are all answers of such a query.
    """
    query, (answer, _) = _blanked_texts(episode, **written, blank=blank)
    plain = episode._replace(
        queries=episode.queries._replace(text=query), answers=episode.answers._replace(tokens=answer)
    )
    texts = episode_texts(plain, tokenizer, skip_special_tokens=False)

    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text.strip() if template.trims else text)

    queries = [encode(text) for text in texts.queries]
    answers = [encode(text) for group in texts.answers for text in group]
    number, group = len(queries), len(texts.answers[0])
    room = model.config.max_position_embeddings - template.fixed_length
    query_width, answer_width = _widths((query[0].shape[-1], answer.shape[-1]), (queries, answers), room)
    query_rows, query_fits = _padded(queries, query_width)
    (answer_tokens, answer_lengths), answer_fits = _padded(answers, answer_width)
    answer_rows = (answer_tokens.reshape(number, group, -1), answer_lengths.reshape(number, group))
    valid = query_fits[:, None] & answer_fits.reshape(number, group)
    parts = replicate((query_rows, answer_rows, valid, np.ones(number, bool)))
    arguments = (model.params, *parts[:2], model.config, template, rows)
    # texts decide the widths, and each width is another program
    name = f"score_conversations {query_width} {answer_width}"
    processes.check_program(name, score_conversations, *arguments)
    values = score_conversations(*arguments)
    return RewardOutput(values, *parts[2:])


def _widths(base: tuple[int, int], lists: tuple[list[list[int]], list[list[int]]], room: int) -> tuple[int, int]:
    """The narrowest declared widths of query and answer that hold all rows, or the widest that the context has."""
    allowed = [factor for factor in STRETCHES if factor * sum(base) <= room] or [1]
    longest = [max(map(len, rows)) for rows in lists]
    fitting = [f for f in allowed if all(need <= f * width for need, width in zip(longest, base, strict=True))]
    factor = fitting[0] if fitting else allowed[-1]
    return factor * base[0], factor * base[1]


def _padded(lists: Sequence[Sequence[int]], width: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Rows of ids as tokens int32 [B, width] with lengths [B], and which of them fit; the others are emptied."""
    fits = np.array([len(ids) <= width for ids in lists])
    tokens, lengths = np.zeros((len(lists), width), np.int32), np.zeros(len(lists), np.int32)
    for row, ids in enumerate(lists):
        if fits[row]:
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return (tokens, lengths), fits
