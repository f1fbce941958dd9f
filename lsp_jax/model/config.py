"""Model configuration of a Llama, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lsp_jax.core.errors import InputError
from lsp_jax.model.refused_keys import check_keys
from lsp_jax.model.rope import DEFAULT_CONTEXT, DEFAULT_THETA, RopeScaling, frequencies, read_rope

Head = Literal["lm", "score"]
ARCHITECTURES: dict[Head, str] = {"lm": "LlamaForCausalLM", "score": "LlamaForSequenceClassification"}


@dataclass(frozen=True)
class LlamaConfig:
    """The configuration of a Llama; hashable, a static argument of jitted functions. Names as in Hugging Face."""

    vocab_size: int
    """Rows of the embedding, in tokens."""
    hidden_size: int
    """Model width D."""
    intermediate_size: int
    """MLP width F."""
    num_hidden_layers: int
    """Decoder layers L."""
    num_attention_heads: int
    """Query heads H."""
    num_key_value_heads: int
    """Key and value heads K; H is a multiple of it."""
    head_dim: int
    """Width h of one head; H * h may differ from D."""
    rms_norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    rope_theta: float = DEFAULT_THETA
    """Base of the RoPE frequencies."""
    rope_scaling: RopeScaling | None = None
    """None for plain RoPE."""
    tie_word_embeddings: bool = False
    """Whether the head shares the embedding matrix."""
    attention_bias: bool = False
    """Biases on q, k, v and o."""
    mlp_bias: bool = False
    """Biases on gate, up and down."""
    max_position_embeddings: int = DEFAULT_CONTEXT
    """Maximum context length in tokens."""
    initializer_range: float = 0.02
    """Standard deviation of randomly initialised weights."""
    bos_token_id: int | None = None
    """Begin-of-text id, kept for export."""
    eos_token_id: tuple[int, ...] = ()
    """End ids, kept for export."""
    pad_token_id: int | None = None
    """Padding id, kept for export."""
    head: Head = "lm"
    """Type of the head: `lm` (logits over the vocabulary) or `score` (one number, for reward models)."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"must divide num_attention_heads ({self.num_attention_heads})",
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError("head_dim", self.head_dim, "must be even and at least 2: RoPE rotates pairs")
        if self.head_dim * self.num_attention_heads >= 2**31:
            raise InputError("head_dim", self.head_dim, f"is too large for {self.num_attention_heads} heads")

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """Reads a Hugging Face `config.json`, with `rope_theta`/`rope_scaling` or the newer `rope_parameters`.

        Raises InputError for another `model_type`, a key that changes the arithmetic and is not implemented
        (`model/refused_keys.py`), a missing size, an unknown RoPE type, a classifier with more than one label, and for
        any field with the wrong type or out of range.
        """
        if config.get("model_type") != "llama":
            raise InputError("model_type", config.get("model_type"), "only Llama models ('llama') are supported")
        check_keys(config, config)
        sizes = {field: _positive(config, field) for field in _SIZES}
        theta, scaling = read_rope(config)
        heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
        if config.get("head_dim") is None and width % heads:
            remedy = f"is not a multiple of num_attention_heads ({heads}), and config.json has no head_dim; add it"
            raise InputError("hidden_size", width, remedy)
        return cls(
            **sizes,
            num_key_value_heads=_positive(config, "num_key_value_heads", heads),
            head_dim=_positive(config, "head_dim", width // heads),
            rope_theta=theta,
            rope_scaling=scaling,
            bos_token_id=token_id(config, "bos_token_id"),
            eos_token_id=_end_ids(config, sizes["vocab_size"]),
            pad_token_id=token_id(config, "pad_token_id"),
            head=_read_head(config),
            **{field: _optional(config, field) for field in _OPTIONAL if field in config},
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Returns a `config.json` for transformers (with both spellings of RoPE) and vLLM; `dtype` is the weights'."""
        rope = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling.to_hf()
        eos = list(self.eos_token_id)
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if self.head == "score" else {}
        return {
            "architectures": [ARCHITECTURES[self.head]],
            **labels,
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_cache": True,
            **{field: getattr(self, field) for field in (*_SIZES, *_OPTIONAL)},
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_scaling": None if self.rope_scaling is None else dict(rope),
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
            "pad_token_id": None if (self.pad_token_id or 0) >= self.vocab_size else self.pad_token_id,  # torch's rule
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def rope_frequencies(self) -> np.ndarray:
        """Returns the radians per position of each rotated pair, float64 [head_dim / 2], with scaling."""
        return frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "initializer_range",
)


def _positive(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if type(value) is not int or not 1 <= value < 2**31:  # arrays are indexed with int32
        raise InputError(field, value, "must be a positive integer below 2**31 in config.json")
    return value


def _optional(config: dict[str, Any], field: str) -> Any:
    """Reads an optional field, which must have the type of its default; without the key that is used."""
    value, kind = config[field], type(getattr(LlamaConfig, field))
    if kind is int:
        return _positive(config, field)
    if kind is float:
        if type(value) not in (int, float) or not 0 <= value < sys.float_info.max:
            raise InputError(field, value, "must be a finite number >= 0 in config.json")
        return float(value)
    if type(value) is not kind:
        raise InputError(field, value, "must be true or false in config.json")
    return value


def token_id(config: dict[str, Any], field: str, file: str = "config.json") -> int | None:
    """Returns the token id in a field of a JSON file, None if it has none."""
    value = config.get(field)
    if value is not None and not _is_id(value):
        raise InputError(field, value, f"must be one token id, or null, in {file}")
    return value


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**31) <= value < 2**31  # some files have -1 for none


def _end_ids(config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Returns the ids of `eos_token_id`, which holds none, one or a list of them."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_id(token) for token in ids):
        raise InputError("eos_token_id", value, "must be a token id or a list of token ids in config.json")
    if any(token >= vocab_size for token in ids):
        raise InputError("eos_token_id", value, f"must be below vocab_size ({vocab_size}) in config.json")
    return tuple(ids)


def _read_head(config: dict[str, Any]) -> Head:
    """Returns the type of the head; a model is a language model unless its architecture is a classifier's."""
    if ARCHITECTURES["score"] not in (config.get("architectures") or ()):
        return "lm"
    # transformers writes the label names instead of their number, and assumes two without either
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
    if labels != 1:
        raise InputError("num_labels", labels, "only classifiers with one label, a single score, are supported")
    return "score"
