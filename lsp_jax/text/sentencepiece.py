"""SentencePiece backend of `text/tokenizer.py` for tokenizer.model files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.text.chat_template import chat_template_of
from lsp_jax.text.tokenizer_files import added_tokens, named_tokens, read_json, token_text


class SentencePieceBackend:
    """A tokenizer.model run by SentencePiece, matching the ids of transformers' LlamaTokenizer for the same files.

    As there, text is split at special and added tokens, with their `lstrip`, `rstrip`, `single_word` and `normalized`,
    and each piece is encoded separately. The dummy prefix (a space
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
        self._added = {**control, **{text: token.id for text, token in extra.items()}}
        self.special_ids: frozenset[int] = frozenset(control.values()) | {
            token.id for token in extra.values() if token.special
        }
        self._text_of = {token: text for text, token in self._added.items()}
        options = named_tokens(directory, config) | {text: token.options for text, token in extra.items()}
        tokens = [(text, token in self.special_ids, options.get(text, {})) for text, token in self._added.items()]
        self._any_added = _splitter(tokens, allow_special=True)
        self._plain_added = _splitter(tokens, allow_special=False)
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
        splitter = self._any_added if allow_special else self._plain_added
        pieces = splitter.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(pieces.ids, pieces.offsets, strict=True):
            if token == _OTHER:
                ids += self._encode_piece(text[start:end], first=start == 0)
            else:
                ids.append(self._added[splitter.id_to_token(token)])
        return ids

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

    @property
    def role_tokens(self) -> dict[str, str]:
        return {f"{role}_token": text for role, text in self.names.items() if text is not None}


def _decode_bytes(data: bytes) -> str:
    """Decodes a run of byte tokens; invalid UTF-8 gives one U+FFFD per byte, as in transformers."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data)


_OTHER = 0  # the id of any other text in what `_splitter` finds


def _splitter(tokens: list[tuple[str, bool, dict[str, bool]]], allow_special: bool) -> Any:
    """A tokenizer that only finds added tokens, given as text, whether special, and options: text between two of them
    becomes one token."""
    from tokenizers import AddedToken, Tokenizer, models

    splitter = Tokenizer(models.WordLevel({"\0": _OTHER}, unk_token="\0"))
    splitter.add_tokens([AddedToken(text, special=special, **options) for text, special, options in tokens])
    splitter.encode_special_tokens = not allow_special
    return splitter
