"""Encoding and decoding, with fast tokenizers and SentencePiece models behind one class.

No token is added implicitly: `encode` never adds a beginning-of-sequence token, and prompts come from the chat template
alone. They equal `apply_chat_template(tokenize=True)`, and BOS is never doubled.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.text.sentencepiece import SentencePieceBackend
from lsp_jax.text.tokenizer_files import check_messages, check_text, default_config, stop_ids_of

TEXT, BLANK, SPECIAL = 0, 1, 2  # the values of Tokenizer.token_classes

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
FILES = (*_TOKENIZER_FILES, "added_tokens.json", "chat_template.jinja", "generation_config.json")

Messages = str | list[dict[str, str]]


class Tokenizer:
    """A tokenizer read from a local directory.

    Attributes:
        directory: source directory; `save` copies its files from there.
        vocab_size: highest id + 1.
        bos_id: the beginning-of-sequence id, None if there is none. `encode` does not add it.
        stop_ids: sorted ids that end a completion: every `eos_token_id` of generation_config.json (of config.json if
            generation_config.json has none), and the tokenizer's own end-of-sequence token.
        pad_id: id that fills unused positions: the tokenizer's pad token, else the first stop id. As it may be a stop
            id, masks must not be derived from it.
        special_ids: all control tokens, including Llama 3's reserved range and the unknown token.
    """

    def __init__(self, directory: Path, backend: _FastBackend | SentencePieceBackend):
        self._template_arguments: dict[str, str] = {}
        self.directory = directory
        self._backend = backend
        self.vocab_size: int = backend.vocab_size
        self.bos_id: int | None = backend.bos_id
        self.special_ids: frozenset[int] = backend.special_ids
        self.stop_ids: tuple[int, ...] = stop_ids_of(directory, backend.eos_id)
        self.pad_id: int = self.stop_ids[0] if backend.pad_id is None else backend.pad_id

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, or if absent tokenizer.model, from the directory `path`; never runs code in it.

        Raises:
            InputError: the directory or its tokenizer is missing, or a file cannot be read.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise InputError(
                "tokenizer", str(path), "no such directory; give one with tokenizer.json or tokenizer.model"
            )
        if (directory / "tokenizer.json").is_file():
            return cls(directory, _FastBackend(directory))
        if (directory / "tokenizer.model").is_file():
            return cls(directory, SentencePieceBackend(directory))
        raise InputError("tokenizer", str(path), "has neither tokenizer.json nor tokenizer.model; add one of them")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Returns the ids of `text`, with no token added.

        Text that spells a special token is encoded as ordinary text, so that model text cannot end or open a turn;
        `allow_special=True` parses it as transformers does, for text from a chat template. Text outside the vocabulary
        may still give the unknown token's id.

        Raises:
            InputError: `text` holds a lone surrogate, or the tokenizer's files contradict each other.
        """
        check_text("text", text)
        try:
            ids = self._backend.encode(text, allow_special)
        except InputError:
            raise
        except Exception as error:  # the libraries raise various types when the vocabulary lacks the unknown token
            remedy = f"cannot encode a text ({one_line(error)}); restore the original files"
            raise InputError("tokenizer", str(self.directory), remedy) from error
        if allow_special or self._control_ids.isdisjoint(ids):
            return ids
        # The merges of this vocabulary build a control token from plain characters: encode it character by character.
        parts = [self._spell_out(token) if token in self._control_ids else [token] for token in ids]
        return [token for part in parts for token in part]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return self.special_ids - {self._backend.unk_id}

    def _spell_out(self, control_id: int) -> list[int]:
        characters = self._backend.decode([control_id], skip_special_tokens=False)
        parts = [self._backend.encode(character, allow_special=False) for character in characters]
        return [token for part in parts for token in part if token not in self._control_ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of `ids` with spaces unchanged; invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens)

    def dated(self, date: str) -> Tokenizer:
        """Returns a copy that uses `date` instead of today's in chat templates that show it (Llama 3.1 and later)."""
        other = copy.copy(self)
        other._template_arguments = {"date_string": date}
        return other

    def chat_ids(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Returns the ids of a conversation in the model's chat template; a string is one user message.

        Equal to transformers' `apply_chat_template(messages, tokenize=True)`. Like there, special tokens spelled inside
        a message are parsed, so model text does not belong in `messages` (splice its ids instead).

        Raises:
            InputError: there is no chat template, no message, or the template rejects the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        messages = check_messages("messages", messages)
        if not self._backend.chat_template:
            raise InputError(
                "chat_template",
                None,
                f"add chat_template.jinja to {self.directory}, or chat_template to its "
                "tokenizer_config.json (base models have none: use the instruct model's)",
            )
        for text in (*self._template_arguments.values(), *(message.get("content", "") for message in messages)):
            check_text("messages", text)
        try:
            return self._backend.chat_ids(messages, add_generation_prompt, self._template_arguments)
        except InputError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise InputError("messages", messages, f"rejected by the chat template: {one_line(error)}") from error

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, as spelled in the vocabulary, with their ids."""
        return self._backend.vocabulary()

    def token_classes(self) -> np.ndarray:
        """Returns uint8 [vocab_size]: 0 for text, 1 for blank (decodes to white space or nothing), 2 for special ids.

        A token that is part of a UTF-8 character counts as text, the byte token of a newline or a space as blank.
        """
        return self._token_classes

    @cached_property
    def _token_classes(self) -> np.ndarray:
        texts = (self._backend.decode([token], skip_special_tokens=False) for token in range(self.vocab_size))
        token_classes = np.array([TEXT if text.strip() else BLANK for text in texts], dtype=np.uint8)
        token_classes[list(self.special_ids)] = SPECIAL
        token_classes.flags.writeable = False
        return token_classes

    def save(self, directory: str | Path) -> None:
        """Copies the tokenizer's files and generation_config.json into `directory`, which is created if missing."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if target.samefile(self.directory):
            return
        for name in FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, target / name)


class _FastBackend:
    """A tokenizer.json run by transformers."""

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        config = default_config(directory)
        try:
            options = {"trust_remote_code": False, "local_files_only": True, "config": config}
            tokenizer = AutoTokenizer.from_pretrained(str(directory), **options)
            self.chat_template: str | None = tokenizer.get_chat_template() if tokenizer.chat_template else None
            self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
            self.bos_id: int | None = tokenizer.bos_token_id
            self.eos_id: int | None = tokenizer.eos_token_id
            self.pad_id: int | None = tokenizer.pad_token_id
            self.unk_id: int | None = tokenizer.unk_token_id
            added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
            special = added | set(tokenizer.all_special_ids)
            self.special_ids: frozenset[int] = frozenset(special) - {None}  # None for an empty token text
        except Exception as error:  # the Rust library raises a bare Exception for a file it cannot parse
            remedy = f"cannot be read ({one_line(error)}); restore the original file"
            raise InputError("tokenizer.json", str(directory), remedy) from error
        self._tokenizer: Any = tokenizer

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def encode(self, text: str, allow_special: bool) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": not allow_special, "verbose": False}
        return self._tokenizer(text, **options)["input_ids"]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens, clean_up_tokenization_spaces=False)

    def chat_ids(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, arguments: dict[str, str]
    ) -> list[int]:
        options = {
            "add_generation_prompt": add_generation_prompt,
            "tokenizer_kwargs": {"split_special_tokens": False, "verbose": False},
        }
        options |= {"tokenize": True, "return_dict": True}
        return self._tokenizer.apply_chat_template(messages, **options, **arguments)["input_ids"]
