"""The small files beside a tokenizer: what they say of stop ids, added tokens and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lsp_jax.errors import InputError


def one_line(error: Exception) -> str:
    """The first line of what a library says."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(path.name, str(path.parent), f"is not JSON ({error}); restore the original file") from error
    if not isinstance(value, dict):
        raise InputError(path.name, str(path.parent), "must hold a JSON object; restore the original file")
    return value


def stop_ids_of(directory: Path, eos_id: int | None) -> tuple[int, ...]:
    """Sorted ids that end a completion: all that generation_config.json (or config.json) declares, and `eos_id`."""
    name = "generation_config.json"
    declared = read_json(directory / name).get("eos_token_id")
    if declared is None:
        name = "config.json"
        declared = read_json(directory / name).get("eos_token_id")
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


def token_text(entry: object, default: str | None) -> str | None:
    """A token's text from tokenizer_config.json, where it is a string or an object with "content"."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else default


def added_tokens(directory: Path, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    """Added tokens by text: (id, whether it is special)."""
    named = {token_text(config.get(f"{role}_token"), None) for role in ("bos", "eos", "unk", "pad")}
    named |= {token_text(entry, None) for entry in config.get("additional_special_tokens") or []}
    tokens: dict[str, tuple[int, bool]] = {}
    for text, token in read_json(directory / "added_tokens.json").items():
        tokens[text] = (int(token), text in named)
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        tokens[entry["content"]] = (int(token), bool(entry.get("special")) or entry["content"] in named)
    return tokens


def chat_template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the (default) template of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # older files hold a list of named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None
