"""SentencePiece backend of `text/tokenizer.py` for tokenizer.model files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.text.tokenizer_files import added_tokens, chat_template_of, read_json, token_text


class SentencePieceBackend:
    """A tokenizer.model run by SentencePiece, matching the ids of transformers' LlamaTokenizer for the same files.

    As there, text is split at special and added tokens and each piece is encoded separately. The dummy prefix (a space
    before the text) is added to the first piece of a text only; with `"legacy": true` in tokenizer_config.json to every
    piece; with `"add_prefix_space": false` to none; and never to a piece that starts with a space, which SentencePiece
    alone would double.

    Two differences remain. transformers 5 ranks the merges of a tokenizer.model by id; this class ranks them by score
    like SentencePiece, with which the model was trained, which matters for words after two or more spaces. A normalizer
    inside tokenizer.model (a no-op in Llama's and Mistral's) is applied here and ignored there.
    """

    def __init__(self, directory: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._model: Any = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
            pieces = [self._model.id_to_piece(token) for token in range(self._model.get_piece_size())]
        except (OSError, RuntimeError, ValueError) as error:  # ValueError: a piece that is not UTF-8
            remedy = f"cannot be read ({one_line(error)}); restore the original file"
            raise InputError("tokenizer.model", str(directory), remedy) from error
        config = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
        size, is_control, is_unknown = len(pieces), self._model.is_control, self._model.is_unknown
        control = {text: token for token, text in enumerate(pieces) if is_control(token) or is_unknown(token)}
        extra = added_tokens(directory, config)
        self._added = {**control, **{text: token for text, (token, _) in extra.items()}}
        self.special_ids: frozenset[int] = frozenset(control.values()) | {
            token for token, special in extra.values() if special
        }
        self._text_of = {token: text for text, token in self._added.items()}
        self._any_added = _alternatives(self._added)
        self._plain_added = _alternatives([text for text, id_ in self._added.items() if id_ not in self.special_ids])
        self.vocab_size: int = max(size, *(token + 1 for token in self._added.values()))
        defaults = {role: getattr(self._model, f"{role}_id")() for role in ("bos", "eos", "unk", "pad")}
        self.names: dict[str, str | None] = {
            role: token_text(config.get(f"{role}_token"), pieces[token] if token >= 0 else None)
            for role, token in defaults.items()
        }
        self.bos_id: int | None = self._id_of(self.names["bos"])
        self.eos_id: int | None = self._id_of(self.names["eos"])
        self.unk_id: int | None = self._id_of(self.names["unk"])
        self.pad_id: int | None = self._id_of(self.names["pad"])
        self.chat_template: str | None = chat_template_of(directory, config)
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
        # SentencePiece prepends a space to its input, but not after a newline, whose ids are removed again.
        ids: list[int] = self._model.encode("\n" + " " * prefix + piece)
        if ids[: len(self._newline)] != self._newline:
            raise InputError(
                "tokenizer.model", piece, "its vocabulary merges newlines with text; provide a tokenizer.json"
            )
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
    """Decodes a run of byte tokens; invalid UTF-8 gives one U+FFFD per byte, as in transformers."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


def _alternatives(texts: Sequence[str] | dict[str, int]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nothing
