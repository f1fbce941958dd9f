"""Queries from a data set instead of the Challenger: prompts of a JSONL file or a Hugging Face data set.

1. `load_data` reads all rows and encodes their prompts once; unusable rows are skipped and counted.
2. `PromptData.batch` selects the N queries at a cursor; the order of each epoch depends only on the seed.
3. `data_queries` puts them on device as the `Queries` that `solve` splices into the Solver's chat template.

Data is treated as plain text: tags in it have no effect, and nothing in it is executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsp_jax.core.errors import LONGEST, InputError, shown
from lsp_jax.core.files import read_jsonl, user_path
from lsp_jax.model.sharding import replicate
from lsp_jax.play.generate import PROMPT_BUCKETS, bucket, pad_prompts
from lsp_jax.play.selfplay import Queries
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
    """Fields that form the prompt, joined by blank lines; empty fields are skipped, lists joined by newlines."""
    instruction: str = ""
    """Text prepended to every prompt, such as the required form of the final answer."""
    answer_field: str = "answer"
    """Field with the reference answer, passed to rewards as `answer`."""
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


def data_queries(data: PromptData, picked: Sequence[int]) -> Queries:
    """Puts the rows `picked` on device as queries: [N, width] ids, all valid, without sampled tokens."""
    tokens, lengths = pad_prompts([data.ids[index] for index in picked], data.width, len(picked))
    text, valid = replicate(((tokens, lengths), np.ones(len(picked), bool)))
    return Queries(None, text, valid)


def load_data(config: DataConfig, tokenizer: Tokenizer) -> PromptData:
    """Reads and encodes the data set.

    Raises:
        InputError: the source is missing, empty or unreadable, a row is not an object or lacks a prompt field, or no
            row has a prompt within the length limit.
    """
    rows: list[Mapping[str, Any]] = []
    ids: list[list[int]] = []
    left_out = 0
    for row in read_rows(config):
        prompt = _prompt(row, config)
        check_text("data.prompt_fields", prompt)
        encoded = tokenizer.encode(prompt) if prompt else []
        if not 0 < len(encoded) <= config.max_prompt_length:
            left_out += 1
            continue
        rows.append({**row, "answer": row[config.answer_field]} if config.answer_field in row else row)
        ids.append(encoded)
    if not rows:
        why = (
            f"{left_out} rows, none with a prompt of 1 to {config.max_prompt_length} tokens" if left_out else "no rows"
        )
        raise InputError("data.source", config.source, f"{why}; give another file, or other data.prompt_fields")
    width = bucket(max(map(len, ids)), PROMPT_BUCKETS, "data.max_prompt_length")
    return PromptData(tuple(rows), tuple(ids), left_out, width, config.shuffle)


def _prompt(row: Mapping[str, Any], config: DataConfig) -> str:
    """Returns the prompt of a row, "" if its fields are empty; stripped, as in chat templates."""
    parts = []
    for field in config.prompt_fields:
        if field not in row:
            known = ", ".join(map(str, row))[:LONGEST] or "none"
            raise InputError("data.prompt_fields", field, f"a row has no such field (it has {known})")
        value = row[field]
        lines = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(line, str) or line is None for line in lines):
            raise InputError(
                "data.prompt_fields", field, f"must be a string or list of strings, not {shown(value, 40)}"
            )
        parts.append("\n".join(line for line in lines if line).strip())
    prompt = "\n\n".join(part for part in parts if part)
    return f"{config.instruction.strip()}\n\n{prompt}".strip() if prompt else ""


def read_rows(config: DataConfig, field: str = "data.source") -> Iterator[Mapping[str, Any]]:
    """Reads the rows of a JSONL file or a hub data set; InputError names `field`."""
    path = user_path(field, config.source)
    if path.is_file():
        return read_jsonl(path, field)
    if path.suffix in (".jsonl", ".json") or (config.source.startswith((".", "/", "~")) and not path.is_dir()):
        raise InputError(field, config.source, "no such file; give a JSONL file or a hub data set's id")
    return iter(_read_hub(config, field))


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
