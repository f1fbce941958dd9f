"""Text to token ids and back, for fast tokenizers and SentencePiece models behind one class.

Nothing here adds a token that was not asked for: `encode` never adds a beginning-of-sequence token, and the ids of a
prompt come from the chat template alone: they equal `apply_chat_template(tokenize=True)`, and a BOS is never doubled.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lsp_jax.errors import InputError

TEXT, BLANK, SPECIAL = 0, 1, 2  # the values of Tokenizer.token_kinds

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
FILES = (*_TOKENIZER_FILES, "added_tokens.json", "chat_template.jinja", "generation_config.json")

Messages = str | list[dict[str, str]]


class Tokenizer:
    """A tokenizer read from a local directory.

    Attributes:
        directory: where it was read from; `save` copies its files from there.
        vocab_size: highest id + 1.
        bos_id: the beginning-of-sequence id, None where there is none. `encode` does not add it.
        stop_ids: sorted ids that end a completion: every `eos_token_id` of generation_config.json (of config.json where
            generation_config.json names none), and the tokenizer's own end-of-sequence token.
        pad_id: an id to fill unused positions: the tokenizer's pad token, else the first stop id. It may be a stop id:
            no mask may be made from it.
        special_ids: every control token, Llama 3's reserved range and the unknown token included.
    """

    def __init__(self, directory: Path, backend: _FastBackend | _SentencePieceBackend):
        self._template_arguments: dict[str, str] = {}
        self.directory = directory
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.bos_id = backend.bos_id
        self.special_ids = backend.special_ids
        self.stop_ids = _stop_ids(directory, backend.eos_id)
        self.pad_id = self.stop_ids[0] if backend.pad_id is None else backend.pad_id

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, or tokenizer.model where there is no tokenizer.json, from the directory `path`.

        Raises:
            InputError: the directory or its tokenizer is missing, or a file cannot be read. Code in it never runs.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise InputError(
                "tokenizer", str(path), "no such directory; give one that holds tokenizer.json or tokenizer.model"
            )
        if (directory / "tokenizer.json").is_file():
            return cls(directory, _FastBackend(directory))
        if (directory / "tokenizer.model").is_file():
            return cls(directory, _SentencePieceBackend(directory))
        raise InputError("tokenizer", str(path), "no tokenizer.json and no tokenizer.model there; add one of them")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, with no token added.

        Text that spells a special token is ordinary text, so that what a model wrote cannot end a turn or open one;
        `allow_special=True` parses it as transformers does, for text from a chat template. Text that the vocabulary
        cannot spell may still give the unknown token's id.
        """
        ids = self._backend.encode(text, allow_special)
        if allow_special or self._control_ids.isdisjoint(ids):
            return ids
        # A vocabulary whose merges build a control token out of plain characters: spell it character by character.
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
        """The text of `ids`, spaces as they are; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens)

    def dated(self, date: str) -> Tokenizer:
        """This tokenizer with `date` in chat templates that show the day (Llama 3.1 and later), instead of today's."""
        other = copy.copy(self)
        other._template_arguments = {"date_string": date}
        return other

    def chat_ids(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's chat template; a string is one user message.

        Equal to transformers' `apply_chat_template(messages, tokenize=True)`: special tokens spelled inside a message
        are parsed there and here, so text that a model wrote does not belong in `messages` (splice its ids instead).

        Raises:
            InputError: there is no chat template, no message, or the template refuses the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages:
            raise InputError("messages", messages, "give at least one message")
        if not self._backend.chat_template:
            raise InputError(
                "chat_template",
                None,
                f"add chat_template.jinja to {self.directory}, or chat_template to its "
                "tokenizer_config.json (base models have none: use the instruct model's)",
            )
        from jinja2 import TemplateError

        try:
            return self._backend.chat_ids(messages, add_generation_prompt, self._template_arguments)
        except TemplateError as error:
            raise InputError("messages", messages, f"the chat template refuses them: {error}") from error

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, and its id."""
        return self._backend.vocabulary()

    def token_kinds(self) -> np.ndarray:
        """What each id is, uint8 [vocab_size]: 0 text, 1 blank (decodes to white space or nothing), 2 in `special_ids`.

        A token that is part of a UTF-8 character counts as text; the byte token of a newline or a space as blank.
        """
        return self._kinds

    @cached_property
    def _kinds(self) -> np.ndarray:
        texts = (self._backend.decode([token], skip_special_tokens=False) for token in range(self.vocab_size))
        kinds = np.array([TEXT if text.strip() else BLANK for text in texts], dtype=np.uint8)
        kinds[list(self.special_ids)] = SPECIAL
        kinds.flags.writeable = False
        return kinds

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files and generation_config.json, byte for byte, into `directory` (made if missing)."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        if target.samefile(self.directory):
            return
        for name in FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, target / name)


class _FastBackend:
    """tokenizer.json, read and run by transformers."""

    def __init__(self, directory: Path):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
            template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        except Exception as error:  # the Rust library raises bare Exception for a file it cannot parse
            remedy = f"cannot be read ({_one_line(error)}); restore the original file"
            raise InputError("tokenizer.json", str(directory), remedy) from error
        self._tokenizer: Any = tokenizer
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int | None = tokenizer.pad_token_id
        self.unk_id: int | None = tokenizer.unk_token_id
        added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
        self.special_ids = frozenset(added | set(tokenizer.all_special_ids))
        self.chat_template: str | None = template

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
        options = {"add_generation_prompt": add_generation_prompt, "tokenizer_kwargs": {"split_special_tokens": False}}
        options |= {"tokenize": True, "return_dict": True}
        return self._tokenizer.apply_chat_template(messages, **options, **arguments)["input_ids"]


class _SentencePieceBackend:
    """tokenizer.model, run by SentencePiece, with the ids that transformers' LlamaTokenizer gives for the same files.

    Equal: text is cut at the special and added tokens, and each piece encoded on its own. The dummy prefix (a space
    before the text) goes to the first piece of a text only; with `"legacy": true` in tokenizer_config.json to every
    piece; with `"add_prefix_space": false` to none; and never to a piece that begins with a space, where SentencePiece
    alone would make it two. Different: transformers 5 ranks the merges of a tokenizer.model by id, SentencePiece, with
    which the model was trained, by score, which shows before a word after two or more spaces (SentencePiece is followed
    here); and a normalizer inside tokenizer.model (Llama's and Mistral's do nothing) is applied here, ignored there.
    """

    def __init__(self, directory: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._model: Any = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            remedy = f"cannot be read ({_one_line(error)}); restore the original file"
            raise InputError("tokenizer.model", str(directory), remedy) from error
        config = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
        size: int = self._model.get_piece_size()
        is_control, is_unknown, piece = self._model.is_control, self._model.is_unknown, self._model.id_to_piece
        control = {piece(token): token for token in range(size) if is_control(token) or is_unknown(token)}
        extra = _added_tokens(directory, config)
        self._added = {**control, **{text: token for text, (token, _) in extra.items()}}
        self.special_ids = frozenset(control.values()) | {token for token, special in extra.values() if special}
        self._text_of = {token: text for text, token in self._added.items()}
        self._any_added = _alternatives(self._added)
        self._plain_added = _alternatives([text for text, id_ in self._added.items() if id_ not in self.special_ids])
        self.vocab_size = max(size, *(token + 1 for token in self._added.values()))
        defaults = {role: getattr(self._model, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
        self.names = {
            role: _token_text(config.get(f"{role}_token"), piece(token) if token >= 0 else None)
            for role, token in defaults.items()
        }
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = (self._id_of(name) for name in self.names.values())
        self.chat_template = _chat_template(directory, config)
        self._legacy = config.get("legacy") is True
        self._prefix_space = config.get("add_prefix_space") is not False
        self._newline: list[int] = self._model.encode("\n")

    def _id_of(self, text: str | None) -> int | None:
        if text is None:
            return None
        token: Any = self._added.get(text, self._model.piece_to_id(text))
        return token if self._piece(token) == text else None

    def vocabulary(self) -> dict[str, int]:
        return {self._piece(token): token for token in range(self.vocab_size)}

    def _piece(self, token: int) -> str:
        in_model = 0 <= token < self._model.get_piece_size()
        return self._text_of.get(token, self._model.id_to_piece(token) if in_model else "")

    def encode(self, text: str, allow_special: bool) -> list[int]:
        ids: list[int] = []
        pattern = self._any_added if allow_special else self._plain_added
        start = 0
        for match in pattern.finditer(text):
            ids += self._encode_piece(text[start : match.start()], first=start == 0)
            ids.append(self._added[match.group()])
            start = match.end()
        return ids + self._encode_piece(text[start:], first=start == 0)

    def _encode_piece(self, piece: str, first: bool) -> list[int]:
        if not piece:
            return []
        prefix = self._prefix_space and (first or self._legacy) and not piece.startswith((" ", "▁"))
        # SentencePiece prefixes a space to what it encodes, but not after a newline, whose ids are then cut off.
        ids: list[int] = self._model.encode("\n" + " " * prefix + piece)
        if ids[: len(self._newline)] != self._newline:
            raise InputError("tokenizer.model", piece, "its vocabulary joins newlines to text; give a tokenizer.json")
        return ids[len(self._newline) :]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        kept = [token for token in ids if not (skip_special_tokens and token in self.special_ids)]
        text, pending = "", b""
        for token in kept:
            if token < self._model.get_piece_size() and self._model.is_byte(token):
                pending += bytes([int(self._model.id_to_piece(token)[3:-1], 16)])  # "<0x0A>"
                continue
            text += _decode_bytes(pending) + self._piece(token).replace("▁", " ")
            pending = b""
        text += _decode_bytes(pending)
        return text.removeprefix(" ") if self._prefix_space else text

    def chat_ids(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, arguments: dict[str, str]
    ) -> list[int]:
        from transformers.utils.chat_template_utils import render_jinja_template

        names: dict[str, Any] = {f"{role}_token": text for role, text in self.names.items() if text is not None}
        names |= {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        names |= arguments
        rendered, _ = render_jinja_template([messages], **names)
        return self.encode(rendered[0], allow_special=True)


def _decode_bytes(data: bytes) -> str:
    """UTF-8 text of a run of byte tokens; one U+FFFD a byte where the run is not UTF-8, as transformers decodes it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


def _alternatives(texts: Sequence[str] | dict[str, int]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(path.name, str(path.parent), f"is not JSON ({error}); restore the original file") from error
    if not isinstance(value, dict):
        raise InputError(path.name, str(path.parent), "must hold a JSON object; restore the original file")
    return value


def _stop_ids(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    name = "generation_config.json"
    declared = _read_json(directory / name).get("eos_token_id")
    if declared is None:
        name = "config.json"
        declared = _read_json(directory / name).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise InputError(
            "eos_token_id", declared, f"must be a token id or a list of them; correct {name} in {directory}"
        )
    stop: list[int] = sorted({*ids, *([] if eos_id is None else [eos_id])})
    if not stop:
        raise InputError(
            "eos_token_id", None, f"no stop token is declared; add eos_token_id to {directory}/generation_config.json"
        )
    return tuple(stop)


def _token_text(entry: object, default: str | None) -> str | None:
    """A token's text from tokenizer_config.json, where it is a string or an object with "content"."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else default


def _added_tokens(directory: Path, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Added tokens by text: (id, whether it is special)."""
    named = {_token_text(config.get(f"{role}_token"), None) for role in ("bos", "eos", "unk", "pad")}
    named |= {_token_text(entry, None) for entry in config.get("additional_special_tokens") or []}
    tokens: dict[str, tuple[int, bool]] = {}
    for text, token in _read_json(directory / "added_tokens.json").items():
        tokens[text] = (int(token), text in named)
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        tokens[entry["content"]] = (int(token), bool(entry.get("special")) or entry["content"] in named)
    return tokens


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the (default) template of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # older files hold a list of named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
