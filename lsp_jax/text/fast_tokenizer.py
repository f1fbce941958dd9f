"""tokenizer.json backend of `text/tokenizer.py`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.core.files import write_text
from lsp_jax.text.chat_template import chat_template_of
from lsp_jax.text.tokenizer_files import read_json

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"
"""The class of transformers, in every version, that runs a tokenizer.json as it is."""
_ROLES = ("bos_token", "eos_token", "unk_token")


class FastBackend:
    """A tokenizer.json run by the `tokenizers` library, with roles and added tokens of tokenizer_config.json.

    The file decides every step, whatever class tokenizer_config.json names. transformers 5 rebuilds the steps of many
    classes (`LlamaTokenizerFast`, `GPT2Tokenizer`) from the vocabulary, without those that the class does not know:
    digits one by one, Unicode normalisation, lower case.
    """

    def __init__(self, directory: Path):
        from transformers import PreTrainedTokenizerFast

        self._settings = read_json(directory / _SETTINGS)
        for name in ("special_tokens_map.json", "added_tokens.json"):
            read_json(directory / name)
        self.chat_template: str | None = chat_template_of(directory, self._settings)
        file = str(directory / _FILE)
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(directory), tokenizer_file=file, trust_remote_code=False, local_files_only=True
            )
            self._roles = self._add_roles(tokenizer)
            self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
            self.bos_id: int | None = tokenizer.bos_token_id
            self.eos_id: int | None = tokenizer.eos_token_id
            self.pad_id: int | None = tokenizer.pad_token_id
            self.unk_id: int | None = tokenizer.unk_token_id
            added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
            special = added | set(tokenizer.all_special_ids)
            self.special_ids: frozenset[int] = frozenset(special) - {None}  # None for an empty token text
        except Exception as error:  # the Rust library raises a bare Exception for a file it cannot parse
            raise _blamed(directory, error) from error
        dropout = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
        if dropout:
            remedy = f"must be null: the ids of a text would be random; correct {_FILE} in {directory}"
            raise InputError("model.dropout", dropout, remedy)
        self._tokenizer: Any = tokenizer

    def _add_roles(self, tokenizer: Any) -> dict[str, str]:
        """Gives roles without an entry the token that transformers' class has for them, and returns those."""
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        name = self._settings.get("tokenizer_class")
        named = tokenizer_class_from_name(name) if isinstance(name, str) else None
        parameters = inspect.signature(named.__init__).parameters if inspect.isclass(named) else {}
        vocabulary, roles = tokenizer.get_vocab(), {}
        for role in _ROLES:
            text = parameters[role].default if role in parameters else None
            if getattr(tokenizer, role) is None and role not in self._settings and text in vocabulary:
                roles[role] = text
        if roles:
            tokenizer.add_special_tokens(roles)
        return roles

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    def encode(self, text: str, allow_special: bool) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": not allow_special, "verbose": False}
        return self._tokenizer(text, **options)["input_ids"]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens, clean_up_tokenization_spaces=False)

    @property
    def role_tokens(self) -> dict[str, str]:
        return self._tokenizer.special_tokens_map

    def adapt(self, directory: Path) -> None:
        """Names the generic class in the tokenizer_config.json of `directory`, a copy of this tokenizer's files, if
        transformers would otherwise build another tokenizer from it."""
        from transformers import AutoTokenizer

        if self._settings.get("tokenizer_class") in (_GENERIC, "TokenizersBackend") and not self._roles:
            return
        try:
            theirs = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
            same = theirs.special_tokens_map == self._tokenizer.special_tokens_map
            same = same and _steps(theirs) == _steps(self._tokenizer)
        except Exception:  # whatever it is that transformers cannot do with the class, or the code it names
            same = False
        if not same:
            settings = {**self._settings, "tokenizer_class": _GENERIC, **self._roles}
            settings.pop("auto_map", None)
            write_text(directory / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def _steps(tokenizer: Any) -> dict[str, Any]:
    """Returns the steps that decide ids and texts; the post-processor only adds tokens, which nothing here asks for."""
    steps = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in steps.items() if name not in ("post_processor", "truncation", "padding")}


def _blamed(directory: Path, error: Exception) -> InputError:
    """Returns the error of a tokenizer that cannot be loaded, naming the file at fault."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(directory / _FILE))
    except Exception as fault:
        return InputError(_FILE, str(directory), f"cannot be read ({one_line(fault)}); restore the original file")
    if not (directory / _SETTINGS).is_file():
        remedy = f"cannot be used ({type(error).__name__}: {one_line(error)}); restore the original file"
        return InputError(_FILE, str(directory), remedy)
    remedy = f"does not fit {_FILE} ({type(error).__name__}: {one_line(error)}); restore the original files"
    return InputError(_SETTINGS, str(directory), remedy)
