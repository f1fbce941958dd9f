"""The preference reward: a Bradley-Terry reward model's score of a conversation (query, answer).

The reward model is a Llama with a score head (`LlamaForSequenceClassification` with one label). In its own chat
template, the query is the user's message and the answer the assistant's; the score is read at the last token of the
conversation, including what the template adds after the answer. Lengths determine the last token, never token values.

1. If its tokenizer equals the policy's (vocabularies are compared, not names), query and answer are spliced in as the
   policy's token ids, and all arrays stay on device.
2. Otherwise the texts are decoded and encoded again on the host, and scored by the same program.

Control ids in query and answer, and text that spells a tag of the reward model's chat template (`[/INST]`), are
replaced by blanks, so that no model output can close a turn. LSP, Section 4 (the task reward R).
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
"""Array widths for another tokenizer's ids, as multiples of the policy's; bounds the number of programs."""

_PROBES = (
    "What is 12 + 345? It's 357.",
    "  two spaces, a tab\tand\n\nnew lines \n",
    "def f(x):\n    return [x**2 for _ in range(10)]  # 0.5",
    "Größe, naïve, Ελλάδα, 東京, मुंबई, 🙂👍🏽",
    "<|im_start|>user<|im_end|><|eot_id|><|begin_of_text|></s><s>[INST]",
)


class PreferenceTemplate(NamedTuple):
    """Token ids of the reward model's chat template around a query and an answer; hashable."""

    prefix_ids: tuple[int, ...]
    middle_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]
    trims: bool
    """Whether the template strips white space at both ends of a message."""

    @property
    def fixed_length(self) -> int:
        """Number of tokens beside query and answer."""
        return len(self.prefix_ids + self.middle_ids + self.tail_ids)


# --- the model, and checks before its weights are read -------------------------------------------------------------


def open_reward_model(path_or_hub_id: str | Path, revision: str | None = None) -> tuple[Path, Policy]:
    """Opens the reward model; returns the directory of its weights, and its configuration and tokenizer (no `params`).

    Raises InputError if it is not a Llama classifier with one label, its tokenizer is larger than the vocabulary, its
    chat template is missing or changes messages, or weights are missing or have other shapes.
    """
    directory, model = open_pretrained(path_or_hub_id, revision, head="score")
    preference_template(model.tokenizer)
    check_weights(directory, model.config)
    return directory, model


def load_reward_model(
    path_or_hub_id: str | Path, dtype: str = "auto", revision: str | None = None, mesh: Mesh | None = None
) -> Policy:
    """Loads the reward model with its parameters; `dtype` auto is bfloat16 on accelerators and float32 on CPUs."""
    directory, model = open_reward_model(path_or_hub_id, revision)
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return replace(model, params=load_params(directory, model.config, dtype, mesh))


def preference_template(tokenizer: Tokenizer) -> PreferenceTemplate:
    """Returns the fixed ids of [user: query, assistant: answer], without a generation prompt. Raises InputError."""
    messages = [{"role": "user", "content": SLOT}, {"role": "assistant", "content": SLOT}]
    prefix, middle, tail = template_pieces(tokenizer, messages, add_generation_prompt=False)
    if not middle:
        raise InputError("chat_template", None, "must separate the user's message from the assistant's")
    filled = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}]
    query, answer = (tokenizer.encode(message["content"]) for message in filled)
    if [*prefix, *query, *middle, *answer, *tail] != tokenizer.chat_ids(filled, add_generation_prompt=False):
        raise InputError("chat_template", str(tokenizer.directory), "must not change the token ids of its messages")
    bare, spaced = (
        tokenizer.chat_ids([{"role": "user", "content": text}], add_generation_prompt=False) for text in ("a", "\n a ")
    )
    return PreferenceTemplate(prefix, middle, tail, trims=bare == spaced)


def check_context(model: Policy, query_length: int, answer_length: int, field: str = "reward.preference_model") -> int:
    """Returns the number of tokens of the longest conversation: template, longest query and longest answer.

    With another tokenizer than the policy's, texts are taken to have equally many tokens in both. Raises InputError,
    naming `field`, if the conversation exceeds the reward model's context. Needs no weights.
    """
    length = preference_template(model.tokenizer).fixed_length + query_length + answer_length
    context = model.config.max_position_embeddings
    if length > context:
        remedy = f"tokens of query, answer and template exceed the reward model's context of {context}: shorten one"
        raise InputError(field, length, remedy)
    return length


def same_tokenizer(left: Tokenizer, right: Tokenizer) -> bool:
    """Whether both tokenizers agree in vocabulary, control ids, and the ids of some diverse texts."""
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
    """Returns the component of the reward model `model`, compiled if its tokenizer equals the policy's `tokenizer`.

    `token_classes` uint8 [V] is `Tokenizer.token_classes()` over the policy's vocabulary. About `rows` conversations
    are scored at a time (complete groups, at least one). Scores are float32 for parameters of any dtype.
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
    """Scores an episode whose token ids are also the reward model's; masks nothing. Pure.

    White space at the ends of a text is kept, even if the template would strip it.
    """
    query, answer = _blanked_texts(episode, params["token_classes"], params["tags"], blank)
    values_NG = score_conversations(params["model"], query, answer, config, template, rows)
    return RewardOutput(values_NG, jnp.ones_like(values_NG, bool), jnp.ones(values_NG.shape[0], bool))


@partial(jax.jit, static_argnames=("config", "template", "rows"))
def score_conversations(
    params: llama.Params, queries: Ragged, answers: Ragged, config: LlamaConfig, template: PreferenceTemplate, rows: int
) -> jax.Array:
    """Scores conversations, float32 [N, G]; each query is prefilled once for its G answers.

    `queries` are tokens [N, W] with lengths [N], `answers` tokens [N, G, T] with lengths [N, G].
    """
    number, group = answers[1].shape
    chunk = groups_per_chunk(number, group, rows)

    def score_chunk(part: tuple[Ragged, Ragged]) -> jax.Array:
        query, (answer_NGT, answer_lengths_NG) = shard_rows(part)
        opening = (ids_row(template.prefix_ids), query, ids_row(template.middle_ids[:-1]))
        _, cache = llama.extend(params, config, *pack(opening))
        # the middle's last token is prefilled with the answer, so that there is one even if answer and tail are empty
        flat = (answer_NGT.reshape(chunk * group, -1), answer_lengths_NG.reshape(-1))
        tokens_BT, lengths_B = pack((ids_row(template.middle_ids[-1:]), flat, ids_row(template.tail_ids)))
        hidden_BTD, _ = llama.extend(params, config, tokens_BT, lengths_B, (cache,))
        return llama.score(params, llama.last_hidden(hidden_BTD, lengths_B))

    parts = jax.tree.map(lambda x: x.reshape(number // chunk, chunk, *x.shape[1:]), (queries, answers))
    return jax.lax.map(score_chunk, parts).reshape(number, group)


@partial(jax.jit, static_argnames="blank")
def _blanked_texts(episode: Episode, token_classes: jax.Array, tags: TagTables, blank: int) -> tuple[Ragged, Ragged]:
    """Query and answer tokens with control tokens and template tags replaced by `blank`, and their lengths."""
    tokens_NGT, lengths_NG = episode.answers.tokens, episode.answer_lengths
    flat = (tokens_NGT.reshape(-1, tokens_NGT.shape[-1]), lengths_NG.reshape(-1))
    query, answer = (
        blank_tags(blank_special(text, token_classes, blank), tags, blank) for text in (episode.queries.text, flat)
    )
    return query, (answer[0].reshape(tokens_NGT.shape), lengths_NG)


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
    """As `preference_scores`, with texts decoded by the policy's tokenizer and encoded by the reward model's.

    Spelled control tokens are encoded as ordinary text. An answer that is too long for the widest program or the
    model's context is masked; if the query is too long, so are all its answers.
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
    # the widths depend on the texts, and each pair of widths is another program
    name = f"score_conversations {query_width} {answer_width}"
    processes.check_program(name, score_conversations, *arguments)
    return RewardOutput(score_conversations(*arguments), *parts[2:])


def _widths(base: tuple[int, int], lists: tuple[list[list[int]], list[list[int]]], room: int) -> tuple[int, int]:
    """Returns the narrowest of the allowed widths of query and answer that fit all rows, else the widest."""
    allowed = [factor for factor in STRETCHES if factor * sum(base) <= room] or [1]
    longest = [max(map(len, rows)) for rows in lists]
    fitting = [f for f in allowed if all(need <= f * width for need, width in zip(longest, base, strict=True))]
    factor = fitting[0] if fitting else allowed[-1]
    return factor * base[0], factor * base[1]


def _padded(lists: Sequence[Sequence[int]], width: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Pads lists of ids to tokens int32 [B, width] and lengths [B], with a mask of those that fit; others are empty."""
    fits_B = np.array([len(ids) <= width for ids in lists])
    tokens_BT, lengths_B = np.zeros((len(lists), width), np.int32), np.zeros(len(lists), np.int32)
    for row, ids in enumerate(lists):
        if fits_B[row]:
            tokens_BT[row, : len(ids)], lengths_B[row] = ids, len(ids)
    return (tokens_BT, lengths_B), fits_B
