"""Encoding and decoding, with fast tokenizers and SentencePiece models behind one class.

No token is added implicitly: `encode` never adds a beginning-of-sequence token, and prompts come from the chat template
alone. They equal `apply_chat_template(tokenize=True)`, and BOS is never doubled.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from lsp_jax.core.console import warn
from lsp_jax.core.errors import InputError, one_line
from lsp_jax.text.chat_template import render
from lsp_jax.text.fast_tokenizer import FastBackend
from lsp_jax.text.sentencepiece import SentencePieceBackend
from lsp_jax.text.tokenizer_files import check_messages, check_text, stop_ids_of

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

    def __init__(self, directory: Path, backend: FastBackend | SentencePieceBackend):
        self._date: str | None = None
        self._rows: int | None = None
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
            return cls(directory, FastBackend(directory))
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
            return self._checked(ids)
        # The merges of this vocabulary build a control token from plain characters: encode it character by character.
        parts = [self._spell_out(token) if token in self._control_ids else [token] for token in ids]
        return self._checked([token for part in parts for token in part])

    def _checked(self, ids: list[int]) -> list[int]:
        outside = next((token for token in ids if token >= self._rows), None) if self._rows is not None else None
        if outside is not None:
            remedy = (
                f"a text spells {self.decode([outside])!r}, which has no row in the model's embedding; leave it out"
            )
            raise InputError("token id", outside, remedy)
        return ids

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return self._backend.special_ids - {self._backend.unk_id}

    def _spell_out(self, control_id: int) -> list[int]:
        characters = self._backend.decode([control_id], skip_special_tokens=False)
        parts = [self._backend.encode(character, allow_special=False) for character in characters]
        return [token for part in parts for token in part if token not in self._control_ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of `ids` with spaces unchanged; invalid UTF-8 becomes U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens)

    def dated(self, date: str) -> Tokenizer:
        """Returns a copy that uses `date`, as `26 Jul 2024`, instead of today's in chat templates that show it."""
        other = copy.copy(self)
        other._date = date
        return other

    def within(self, rows: int) -> Tokenizer:
        """Returns the tokenizer as a model with `rows` rows of the embedding can use it.

        A pad token beyond them is named on standard error and left out, because nothing embeds padding; encoding a
        text that spells it raises InputError.

        Raises:
            InputError: any other token lies beyond them, or the chat template uses the pad token.
        """
        beyond = {token: text for text, token in self._backend.vocabulary().items() if token >= rows and text}
        if not beyond:
            return self
        pad = self._backend.pad_id
        roles = {self.bos_id, self._backend.unk_id, *self.stop_ids}
        surplus = [token for token in sorted(beyond) if token != pad or token in roles]
        if surplus or pad in self._template_ids():
            token = surplus[0] if surplus else pad or 0
            remedy = (
                f"more than the model's vocab_size {rows}: token {beyond[token]!r} ({token}) has no row in the "
                "embedding; the tokenizer belongs to another model"
            )
            raise InputError("tokenizer.vocab_size", self.vocab_size, remedy)
        warn(
            f"pad token {beyond[pad or 0]!r} ({pad}) of {self.directory} has no row in the embedding ({rows}): not used"
        )
        other = copy.copy(self)
        other._rows = rows
        other.vocab_size = 1 + max(token for token in self._backend.vocabulary().values() if token < rows)
        other.special_ids = self.special_ids - {pad}
        other.pad_id = self.stop_ids[0]
        other.__dict__.pop("_token_classes", None)
        return other

    def _template_ids(self) -> set[int]:
        """Ids of a conversation in the chat template; none without a template or where it takes no such roles."""
        conversation = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
        found: set[int] = set()
        for messages in (conversation[:1], conversation, [{"role": "system", "content": "Hi"}, *conversation]):
            with suppress(InputError):
                found.update(self.chat_ids(messages))
        return found

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
        for text in (self._date or "", *(message.get("content", "") for message in messages)):
            check_text("messages", text)
        try:
            messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
            roles, template = self._backend.role_tokens, self._backend.chat_template
            ids = self._backend.encode(render(template, messages, add_generation_prompt, roles, self._date), True)
        except InputError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise InputError("messages", messages, f"rejected by the chat template: {one_line(error)}") from error
        return self._checked(ids)

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, as spelled in the vocabulary, with their ids."""
        return {text: token for text, token in self._backend.vocabulary().items() if token < self.vocab_size}

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
        """Copies the tokenizer's files and generation_config.json into `directory`, which is created if missing.

        tokenizer_config.json then names another class if transformers would give other ids with the class it has.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if target.samefile(self.directory):
            return
        for name in FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, target / name)
        if isinstance(self._backend, FastBackend):
            self._backend.adapt(target)
