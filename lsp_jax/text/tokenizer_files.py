"""Auxiliary tokenizer files: stop ids, added tokens and the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError, one_line
from lsp_jax.core.files import read_json_object

GENERATION = "generation_config.json"


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


def default_config(directory: Path) -> Any:
    """Returns transformers' default configuration of the model type in config.json; None if it has no known one.

    The type decides which class reads a tokenizer. Nothing else in config.json concerns it: transformers would check
    the whole file, and its faults would look like the tokenizer's.
    """
    from transformers import CONFIG_MAPPING

    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None
    default = CONFIG_MAPPING[kind]()
    if isinstance(config.get("tokenizer_class"), str):
        default.tokenizer_class = config["tokenizer_class"]
    return default


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


def added_tokens(directory: Path, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Returns the added tokens by text: (id, whether it is special)."""
    named = {token_text(config.get(f"{role}_token"), None) for role in ("bos", "eos", "unk", "pad")}
    more = config.get("additional_special_tokens") or []
    named |= {token_text(entry, None) for entry in (more if isinstance(more, list) else [])}
    tokens: dict[str, tuple[int, bool]] = {}
    for text, token in read_json(directory / "added_tokens.json").items():
        tokens[token_text(text, None) or ""] = (_id_of(token, "added_tokens.json", text), text in named)
    field = "added_tokens_decoder"
    decoder = config.get(field) or {}
    if not isinstance(decoder, dict):
        raise InputError(field, decoder, f"must be an object; restore tokenizer_config.json in {directory}")
    for token, entry in decoder.items():
        text = token_text(entry, None)
        if not text or not isinstance(entry, dict):
            raise InputError(field, entry, 'must be an object with "content", the token\'s text')
        tokens[text] = (_id_of(token, field, text), bool(entry.get("special")) or text in named)
    if "" in tokens:
        raise InputError("added_tokens.json", "", f"a token must have a text; restore the file in {directory}")
    return tokens


def _id_of(value: object, field: str, text: str) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 11 else value
    if not is_id(number):
        raise InputError(f"{field} {text!r}", value, "must be a token id, an integer >= 0")
    assert isinstance(number, int)
    return number


def chat_template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """Returns chat_template.jinja, else the (default) template in tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            remedy = f"cannot be read ({one_line(error)}); restore the original file"
            raise InputError(path.name, str(directory), remedy) from error
    template = config.get("chat_template")
    if isinstance(template, list):  # older files hold a list of named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None
