"""Queries from a data set instead of the Challenger: prompts of a JSONL file or a Hugging Face data set.

1. `load_data` reads all rows and encodes their prompts once; unusable rows are skipped and counted.
2. `PromptData.batch` selects the N queries at a cursor; the order of each epoch depends only on the seed.
3. `data_queries` puts them on device as the `Queries` that `solve` splices into the Solver's chat template.

Data is treated as plain text: tags in it have no effect, and nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lsp_jax.core.errors import LONGEST, InputError, shown
from lsp_jax.core.files import read_jsonl_lines, user_path
from lsp_jax.model.sharding import replicate
from lsp_jax.play.generate import PROMPT_BUCKETS, bucket, pad_prompts
from lsp_jax.play.selfplay import Queries
from lsp_jax.text.prompts import SLOT, template_pieces
from lsp_jax.text.tokenizer import Tokenizer
from lsp_jax.text.tokenizer_files import check_text


@dataclass(frozen=True)
class DataConfig:
    """Data set of prompts for training the Solver without a Challenger (GRPO)."""

    source: str = ""
    """JSONL file, or id of a data set on the Hugging Face hub (needs the extra `data`); empty: self-play."""
    subset: str = ""
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str = ""
    """Branch, tag or commit of a hub data set; empty: its default branch."""
    prompt_fields: tuple[str, ...] = ("prompt",)
    """Fields that form the prompt, joined by blank lines; empty fields are skipped, lists joined by newlines. A single
    field may hold messages (`role`, `content`) that end with the user's."""
    instruction: str = ""
    """Text prepended to every prompt, such as the required form of the final answer."""
    answer_field: str = "answer"
    """Field with the reference answer, passed to rewards as `answer`; a field other than the default must exist."""
    max_prompt_length: int = 512
    """Maximum prompt length in tokens, without the chat template; rows with longer prompts are skipped."""
    shuffle: bool = True
    """Shuffle each epoch, depending on the seed; False keeps the order of the data set."""

    def check(self) -> None:
        """Raises InputError naming the field; touches no file."""
        if not self.source:
            return
        if not self.prompt_fields:
            raise InputError("data.prompt_fields", self.prompt_fields, "name at least one field of the rows")
        if self.max_prompt_length < 1:
            raise InputError("data.max_prompt_length", self.max_prompt_length, "must be at least 1 token")


@dataclass(frozen=True)
class PromptData:
    """The usable rows of a data set with their encoded prompts."""

    rows: tuple[Mapping[str, Any], ...]
    """Rows with the fields of the file, and `answer` set from `answer_field`."""
    ids: tuple[list[int], ...]
    """Token ids of each row's prompt."""
    left_out: int
    """Number of skipped rows, without a prompt or with one over the length limit."""
    width: int
    """Bucket of the longest prompt; all batches have this width, so each program compiles once."""
    shuffle: bool
    before: tuple[tuple[int, ...], ...] = ()
    """Token ids before each row's prompt, if some rows have system or earlier turns; empty: those of a single turn."""
    places: tuple[str, ...] = ()
    """Where each row is from: `PATH:LINE`, or its number in a hub data set."""

    def batch(self, cursor: int, count: int, seed: int) -> list[int]:
        """Returns the indices of `count` rows from `cursor` (prompts consumed so far) on, across epochs."""
        picked: list[int] = []
        while len(picked) < count:
            epoch, start = divmod(cursor + len(picked), len(self.rows))
            order = np.arange(len(self.rows))
            if self.shuffle:
                order = np.random.default_rng([seed, epoch]).permutation(len(self.rows))
            picked += order[start : start + count - len(picked)].tolist()
        return picked


def widest(config: DataConfig) -> int:
    """Width of a query of maximum length."""
    return bucket(config.max_prompt_length, PROMPT_BUCKETS, "data.max_prompt_length")


def longest(data: PromptData, fixed: int) -> int:
    """Returns the tokens of the longest prompt; turns before it count as far as they exceed `fixed` tokens."""
    return (
        max(map(len, data.ids))
        if not data.before
        else max(len(ids) + max(len(before) - fixed, 0) for ids, before in zip(data.ids, data.before, strict=True))
    )


def data_queries(data: PromptData, picked: Sequence[int]) -> Queries:
    """Puts the rows `picked` on device as queries: [N, width] ids, all valid, without sampled tokens."""
    number = len(picked)
    arrays = [pad_prompts([data.ids[index] for index in picked], data.width, number), np.ones(number, bool)]
    if data.before:
        width = bucket(max(map(len, data.before)), PROMPT_BUCKETS, "length of the turns before a prompt")
        arrays.append(pad_prompts([data.before[index] for index in picked], width, number))
    text, valid, *before = replicate(tuple(arrays))
    return Queries(None, text, valid, before=before[0] if before else None)


def load_data(config: DataConfig, tokenizer: Tokenizer) -> PromptData:
    """Reads and encodes the data set.

    Raises:
        InputError: the source is missing, empty or unreadable, a row is not an object or lacks a prompt field, or no
            row has a prompt within the length limit.
    """
    rows: list[Mapping[str, Any]] = []
    prompts: list[_Encoded] = []
    left_out, fields = 0, ""
    answered = config.answer_field in ("", DataConfig.answer_field)
    for place, row in read_rows(config):
        answered, fields = answered or config.answer_field in row, fields or _names(row)
        prompt = _encoded(_messages(row, config, place), config, tokenizer, place)
        if prompt is None:
            left_out += 1
            continue
        rows.append(_with_answer(row, config.answer_field))
        prompts.append(prompt)
    if not rows:
        why = (
            f"{left_out} rows, none with a prompt of 1 to {config.max_prompt_length} tokens" if left_out else "no rows"
        )
        raise InputError("data.source", config.source, f"{why}; give another file, or other data.prompt_fields")
    if not answered:
        remedy = f"no row of {config.source} has this field (the first has {fields})"
        raise InputError("data.answer_field", config.answer_field, remedy)
    ids, places = tuple(prompt.ids[-1] for prompt in prompts), tuple(prompt.place for prompt in prompts)
    width = bucket(max(map(len, ids)), PROMPT_BUCKETS, "data.max_prompt_length")
    before: tuple[tuple[int, ...], ...] = ()
    if any(len(prompt.roles) > 1 for prompt in prompts):
        templates: dict[tuple[str, ...], Sequence[Sequence[int]]] = {}
        before = tuple(_before(prompt, tokenizer, templates) for prompt in prompts)
    return PromptData(tuple(rows), ids, left_out, width, config.shuffle, before, places)


def _with_answer(row: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """Returns the row with `answer` from `field`, and without it if the row lacks that field."""
    if field in row:
        return {**row, "answer": row[field]}
    return {name: value for name, value in row.items() if name != "answer" or not field}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row))[:LONGEST] or "none"


class _Encoded(NamedTuple):
    """A prompt's messages, of which the last is the user's."""

    roles: tuple[str, ...]
    ids: list[list[int]]
    """Of each message's text."""
    place: str


def _encoded(
    messages: Sequence[tuple[str, str]], config: DataConfig, tokenizer: Tokenizer, place: str
) -> _Encoded | None:
    """Encodes the messages of a prompt; None if the last one is empty or they are too long."""
    texts = [content.strip() for _, content in messages]  # as in chat templates
    if not texts[-1]:
        return None
    texts[-1] = f"{config.instruction.strip()}\n\n{texts[-1]}".strip()
    for text in texts:
        check_text(f"data.prompt_fields ({place})", text)
    ids = [tokenizer.encode(text) if text else [] for text in texts]
    fits = ids[-1] and sum(map(len, ids)) <= config.max_prompt_length
    return _Encoded(tuple(role for role, _ in messages), ids, place) if fits else None


def _before(
    prompt: _Encoded, tokenizer: Tokenizer, templates: dict[tuple[str, ...], Sequence[Sequence[int]]]
) -> tuple[int, ...]:
    """Returns the chat template's ids before the last message, with the earlier ones in it; adds to `templates`."""
    for roles in (("user",), prompt.roles):
        if roles in templates:
            continue
        try:
            templates[roles] = template_pieces(tokenizer, [{"role": role, "content": SLOT} for role in roles])
        except InputError as error:
            remedy = f"the chat template does not take messages of these roles, at {prompt.place} ({error.remedy})"
            raise InputError("data.prompt_fields", ", ".join(roles), remedy) from error
        if templates[roles][-1] != templates["user",][-1]:  # the Solver's prompts share their end
            remedy = f"the chat template ends differently after messages of these roles, at {prompt.place}"
            raise InputError("data.prompt_fields", ", ".join(roles), remedy)
    earlier = zip(templates[prompt.roles], [*prompt.ids[:-1], []], strict=False)
    return tuple(token for piece, ids in earlier for token in (*piece, *ids))


def _messages(row: Mapping[str, Any], config: DataConfig, place: str) -> list[tuple[str, str]]:
    """Returns the roles and texts of a row's prompt; a prompt of text is one user message."""
    parts = []
    for field in config.prompt_fields:
        if field not in row:
            remedy = f"a row has no such field (it has {_names(row)}), at {place}"
            raise InputError("data.prompt_fields", field, remedy)
        value = row[field]
        lines = list(value) if isinstance(value, (list, tuple)) else [value]
        if lines and all(isinstance(line, Mapping) for line in lines):
            if len(config.prompt_fields) > 1:
                remedy = f"holds messages, which cannot be joined with other fields, at {place}"
                raise InputError("data.prompt_fields", field, remedy)
            return _conversation(lines, field, place)
        if not all(isinstance(line, str) or line is None for line in lines):
            remedy = f"must be a string, a list of strings or messages, not {shown(value, 40)}, at {place}"
            raise InputError("data.prompt_fields", field, remedy)
        parts.append("\n".join(line for line in lines if line).strip())
    return [("user", "\n\n".join(part for part in parts if part))]


def _conversation(messages: Sequence[Mapping[str, Any]], field: str, place: str) -> list[tuple[str, str]]:
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, (list, tuple)):  # parts, as in multimodal data sets
            texts = [
                part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
            content = "\n".join(texts) if len(texts) == len(content) else None
        if not isinstance(role, str) or not role or not isinstance(content, str):
            remedy = f"a message must have role and content as text, not {shown(message, 60)}, at {place}"
            raise InputError("data.prompt_fields", field, remedy)
        found.append((role, content))
    if found[-1][0] != "user":
        remedy = f"messages must end with the user's, not one of role {shown(found[-1][0], 40)}, at {place}"
        raise InputError("data.prompt_fields", field, remedy)
    return found


def read_rows(config: DataConfig, field: str = "data.source") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Reads the rows of a JSONL file or a hub data set, each with its place; InputError names `field`."""
    path = user_path(field, config.source)
    if path.is_file():
        return read_jsonl_lines(path, field)
    if path.suffix in (".jsonl", ".json") or (config.source.startswith((".", "/", "~")) and not path.is_dir()):
        raise InputError(field, config.source, "no such file; give a JSONL file or a hub data set's id")
    return ((f"row {number} of {config.source}", row) for number, row in enumerate(_read_hub(config, field), 1))


def _read_hub(config: DataConfig, field: str) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        remedy = "is not a file, and hub data sets need the package datasets: pip install 'lsp-jax[data]'"
        raise InputError(field, config.source, remedy) from error
    try:
        # the package itself rejects data sets with code
        return datasets.load_dataset(
            config.source, config.subset or None, split=config.split, revision=config.revision or None
        )
    except Exception as error:  # network, unknown id or split; its text is omitted because it may quote the token
        remedy = f"could not be loaded from the hub ({type(error).__name__}); check its id, subset, split and revision"
        raise InputError(field, config.source, remedy) from None
