"""A model with its tokenizer: loading from a local directory or the Hugging Face hub, and exporting."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import constants, errors, snapshot_download
from jax.sharding import Mesh

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import CARD, check_writable, is_ours, sealed, user_path
from lsp_jax.model.config import ARCHITECTURES, Head, LlamaConfig, token_id
from lsp_jax.model.llama import Params, check_params
from lsp_jax.model.sharding import check_mesh
from lsp_jax.model.weight_files import ADAPTER, INDEX
from lsp_jax.model.weights import check_dtype, load_params, read_config, save_params
from lsp_jax.text.tokenizer import FILES, Tokenizer
from lsp_jax.text.tokenizer_files import GENERATION, check_text, read_json

_WEIGHTS = "model*.safetensors"
_EXPORT = ("config.json", _WEIGHTS, INDEX, *FILES)
_COMMIT = re.compile(r"[0-9a-f]{40}")  # directory names in the hub's cache
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Policy:
    """A Llama with its tokenizer."""

    config: LlamaConfig
    """Shape and constants."""
    params: Params
    """Nested dict of arrays, as in `lsp_jax.model.llama`."""
    tokenizer: Tokenizer
    """Encoding and decoding, chat template, stop ids."""
    source: str
    """The path or hub id it was loaded from."""
    commit: str = ""
    """Commit of the hub repository; empty for a directory."""


def check_policy(field: str, policy: object) -> Policy:
    """Returns `policy` if it is one with all its parameters, else raises InputError."""
    given = arguments.instance(field, policy, Policy, "must be a Policy, as lsp.load_pretrained returns it")
    arguments.instance(f"{field}.config", given.config, LlamaConfig, "must be a LlamaConfig")
    arguments.instance(f"{field}.tokenizer", given.tokenizer, Tokenizer, "must be a Tokenizer")
    arguments.text(f"{field}.source", given.source)
    check_params(f"{field}.params", given.params, given.config)
    return given


def load_pretrained(
    path_or_hub_id: str | Path, dtype: str = "float32", revision: str | None = None, mesh: Mesh | None = None
) -> Policy:
    """Loads a Hugging Face directory, or a hub id (`name` or `owner/name`, at `revision`) through the hub's cache.

    `dtype` is that of the parameters: float32, bfloat16 or float16. With a `mesh` (of
    `lsp_jax.model.sharding.make_mesh`) the parameters are sharded over its devices for training, and every process
    reads only its own shards. A gated model needs HF_TOKEN in the environment. Raises InputError, before any weight is
    read, for a missing directory, an unusable configuration or tokenizer, a tokenizer that does not match the model,
    and a mesh that does not divide the model; also for weights that do not match the configuration.
    """
    check_dtype(dtype)
    if mesh is not None:
        check_mesh("mesh", mesh)
    directory, policy = open_pretrained(path_or_hub_id, revision)
    return replace(policy, params=load_params(directory, policy.config, dtype, mesh))


def open_pretrained(path_or_hub_id: str | Path, revision: str | None = None, head: Head = "lm") -> tuple[Path, Policy]:
    """Returns the model's directory and its policy without weights (`params` is empty).

    Raises InputError unless the model ends in `head`: a reward model cannot serve as a policy, nor the reverse.
    """
    name = arguments.path("model", path_or_hub_id)
    directory = _locate(name, None if revision is None else arguments.text("revision", revision))
    config = read_config(directory)
    if config.head != head:
        remedy = f"its config.json describes a {ARCHITECTURES[config.head]}; give a {ARCHITECTURES[head]}"
        raise InputError("architectures", str(path_or_hub_id), remedy)
    tokenizer = Tokenizer.from_pretrained(directory).within(config.vocab_size)
    _check_token_ids(directory, config, tokenizer)
    downloaded = directory != Path(path_or_hub_id).expanduser()
    commit = directory.name if downloaded and _COMMIT.fullmatch(directory.name) else ""
    return directory, Policy(config, {}, tokenizer, str(path_or_hub_id), commit)


def _check_token_ids(directory: Path, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Raises InputError for a stop id that the model cannot produce, and for odd ids in generation_config.json."""
    declared = read_json(directory / GENERATION)
    for field in ("bos_token_id", "pad_token_id"):
        token_id(declared, field, f"{GENERATION} in {directory}")
    for token in tokenizer.stop_ids:
        if token >= config.vocab_size:
            name = GENERATION if token in _ids(declared.get("eos_token_id")) else "tokenizer_config.json"
            remedy = f"this stop id is beyond the model's vocab_size {config.vocab_size}; correct {name} in {directory}"
            raise InputError("eos_token_id", token, remedy)


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _write_stop_ids(directory: Path, policy: Policy) -> None:
    """Completes generation_config.json, from which other programs take the stop ids, with all those of the tokenizer.

    A file that already has them stays as it is.
    """
    declared, stop_ids = read_json(directory / GENERATION), list(policy.tokenizer.stop_ids)
    if set(_ids(declared.get("eos_token_id"))) == set(stop_ids):
        return
    others = declared or {"bos_token_id": policy.config.bos_token_id, "pad_token_id": policy.config.pad_token_id}
    written = {**others, "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    (directory / GENERATION).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def save_pretrained(policy: Policy, directory: str | Path, dtype: str | None = None, card: str = "") -> None:
    """Writes a Hugging Face directory for transformers and vLLM: config, safetensors, tokenizer, and a model card.

    `dtype` None keeps that of the parameters. `card` becomes README.md, which a later export replaces unless it was
    edited. generation_config.json gets every stop id of the tokenizer. Everything is written and synced to a sibling
    directory first and then renamed, so a failure leaves the previous contents. An earlier export is replaced; a
    directory that holds anything else raises InputError, as does a value that would become infinite in `dtype`. With
    several processes all must call this: process 0 alone accesses `directory` and writes, the others contribute their
    shards and return without waiting for the files.
    """
    if dtype is not None:
        check_dtype(dtype)
    check_policy("policy", policy)
    check_text("card", arguments.text("card", card))
    target = user_path("directory", arguments.path("directory", directory)).resolve()
    if jax.process_index() != 0:
        save_params(policy.params, policy.config, target, dtype)
        return
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    fresh, old = (target.with_name(f".{target.name}.{kind}-{mark}") for kind in ("new", "old"))
    try:
        save_params(policy.params, policy.config, fresh, dtype)
        policy.tokenizer.save(fresh)
        _write_stop_ids(fresh, policy)
        if card:
            (fresh / CARD).write_text(sealed(card), encoding="utf-8")
        _sync(fresh)
        check_replaceable(target)  # again: files may have appeared while the weights were written
        if target.exists():
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _locate(name: str, revision: str | None) -> Path:
    path = user_path("model", name)
    if path.is_dir():
        if revision is not None:
            raise InputError("revision", revision, f"{name} is a local directory; only hub ids have revisions")
        return path
    if path.exists():
        raise InputError("model", name, "is a file; give the directory that holds config.json and the weights")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", os.sep))
    if looks_like_path or not _HUB_ID.fullmatch(name):
        raise InputError("model", name, "no such directory (to create the demo model: lsp-jax demo-model DIR)")
    return _download(name, revision)


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*_EXPORT, ADAPTER]))
    except errors.GatedRepoError:
        remedy = "this model is gated: accept its terms on huggingface.co and set HF_TOKEN to your token"
    except errors.RevisionNotFoundError:
        raise InputError("revision", revision, f"no such branch, tag or commit of {hub_id}") from None
    except errors.RepositoryNotFoundError:
        remedy = "no such local directory, and no such model on the hub, or a private one: set HF_TOKEN to your token"
    except Exception as error:  # any network failure; its text is omitted because it may quote the token
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        remedy = (
            f"no such local directory, and the Hugging Face hub could not be read{offline}, {type(error).__name__}: "
            "give the path of a local directory, or connect to the network (HF_TOKEN for gated models)"
        )
    raise InputError("model", hub_id, remedy) from None


def check_replaceable(target: Path) -> None:
    """Raises InputError unless `target` is empty, an earlier export, or absent and can be created."""
    if not target.exists():
        check_writable("directory", target)
        return
    if not target.is_dir():
        raise InputError("directory", str(target), "is a file; give a new directory")
    names = sorted(entry.name for entry in target.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in _EXPORT)]
    if CARD in foreign and is_ours(target / CARD):
        foreign.remove(CARD)
    weights = any(fnmatch(name, _WEIGHTS) for name in names)
    if names and (foreign or not weights or "config.json" not in names):
        first = (foreign or names)[0]
        remedy = f"contains {first} and is not an earlier export; give an empty or new directory"
        raise InputError("directory", str(target), remedy)


def _sync(directory: Path) -> None:
    """Flushes the files to disk, so that a power failure after the rename cannot leave a partial export."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
