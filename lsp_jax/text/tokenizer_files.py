"""Auxiliary tokenizer files: stop ids and added tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import read_json_object

GENERATION = "generation_config.json"
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; {} if there is no file."""
    return read_json_object(path, "restore the original file") if path.is_file() else {}


def stop_ids_of(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """Returns the sorted ids that end a completion: those in generation_config.json (or config.json), and `eos_id`."""
    name = GENERATION
    declared = read_json(directory / name).get("eos_token_id")
    if declared is None:
        name = "config.json"
        declared = read_json(directory / name).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(is_id(token) for token in ids):
        raise InputError(
            "eos_token_id", declared, f"must be a token id or a list of them; correct {name} in {directory}"
        )
    stop: list[int] = sorted({*ids, *([] if eos_id is None else [eos_id])})
    if not stop:
        raise InputError(
            "eos_token_id", None, f"no stop token is declared; add eos_token_id to {directory}/generation_config.json"
        )
    return tuple(stop)


def token_text(entry: object, default: str | None) -> str | None:
    """Returns a token's text from tokenizer_config.json, where it is a string or an object with "content"."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    check_text("token", text)
    return text if isinstance(text, str) else default


def check_text(field: str, text: object) -> None:
    """Raises InputError for a lone surrogate, which comes from `"\\ud800"` in JSON or bytes on a command line."""
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise InputError(field, text, "contains a lone surrogate, which is not a character; remove it") from error


def check_messages(field: str, messages: object) -> list[dict[str, Any]]:
    """Returns the messages of a conversation; InputError unless each has the texts `role` and `content`."""
    given = arguments.items(field, messages, "must be a list of messages, {'role': ..., 'content': ...}")
    if not given:
        raise InputError(field, given, "give at least one message")
    for message in given:
        arguments.instance(field, message, Mapping, "must hold messages, {'role': ..., 'content': ...}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise InputError(field, message, f"a message needs {name!r}, which must be text")
    return [dict(message) for message in given]


def is_id(value: object) -> bool:
    """Whether a value from a file is a valid token id (int32 on device)."""
    return type(value) is int and 0 <= value < 2**31


class Added(NamedTuple):
    """A token found in text before the vocabulary's own rules apply, with the options of the `tokenizers` library."""

    id: int
    special: bool
    """Whether it is a control token."""
    options: dict[str, bool]
    """`lstrip`, `rstrip`, `single_word` and `normalized`."""


def added_tokens(directory: Path, config: dict[str, Any]) -> dict[str, Added]:
    """Returns the added tokens by text; `config` is the content of tokenizer_config.json."""
    named = named_tokens(directory, config)
    tokens: dict[str, Added] = {}
    for text, token in read_json(directory / "added_tokens.json").items():
        special = text in named
        options = named.get(text) or _options({}, special)
        tokens[token_text(text, None) or ""] = Added(_id_of(token, "added_tokens.json", text), special, options)
    field = "added_tokens_decoder"
    decoder = config.get(field) or {}
    if not isinstance(decoder, dict):
        raise InputError(field, decoder, f"must be an object; restore tokenizer_config.json in {directory}")
    for token, entry in decoder.items():
        text = token_text(entry, None)
        if not text or not isinstance(entry, dict):
            raise InputError(field, entry, 'must be an object with "content", the token\'s text')
        special = bool(entry.get("special")) or text in named
        tokens[text] = Added(_id_of(token, field, text), special, _options(entry, special))
    if "" in tokens:
        raise InputError("added_tokens.json", "", f"a token must have a text; restore the file in {directory}")
    return tokens


def named_tokens(directory: Path, config: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """Returns the options of every token that has a role or is listed as special, by text."""
    named: dict[str, dict[str, bool]] = {}
    for source in (read_json(directory / "special_tokens_map.json"), config):
        entries = [source.get(f"{role}_token") for role in _ROLES]
        for field in ("additional_special_tokens", "extra_special_tokens"):
            more = source.get(field) or []
            entries += list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
        for entry in entries:
            text = token_text(entry, None)
            if text and (isinstance(entry, dict) or text not in named):
                named[text] = _options(entry if isinstance(entry, dict) else {}, special=True)
    return named


def _options(entry: dict[str, Any], special: bool) -> dict[str, bool]:
    """Options of an added token's entry; absent ones as the `tokenizers` library has them."""
    options = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": not special}
    for name in options:
        value = entry.get(name, options[name])
        if not isinstance(value, bool):
            raise InputError(f"{name} of token {entry.get('content')!r}", value, "must be true or false")
        options[name] = value
    return options


def _id_of(value: object, field: str, text: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 11 else value
    if not is_id(number):
        raise InputError(f"{field} {text!r}", value, "must be a token id, an integer >= 0")
    assert isinstance(number, int)
    return number
