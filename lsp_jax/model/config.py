"""Model configuration of a Llama, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lsp_jax.core.errors import InputError

ROPE_TYPES = ("default", "linear", "llama3")
Head = Literal["lm", "score"]
ARCHITECTURES: dict[Head, str] = {"lm": "LlamaForCausalLM", "score": "LlamaForSequenceClassification"}


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of the RoPE frequencies for contexts longer than in pretraining."""

    rope_type: str
    """`linear` (divide by the factor) or `llama3` (long wavelengths divided, short ones kept, the rest blended)."""
    factor: float
    """Scaling factor, > 0."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this are kept."""
    original_max_position_embeddings: int = 8192
    """llama3: context length in tokens before scaling."""


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
    rope_theta: float = 10000.0
    """Base of the RoPE frequencies."""
    rope_scaling: RopeScaling | None = None
    """None for plain RoPE."""
    tie_word_embeddings: bool = False
    """Whether the head shares the embedding matrix."""
    attention_bias: bool = False
    """Biases on q, k, v and o."""
    mlp_bias: bool = False
    """Biases on gate, up and down."""
    max_position_embeddings: int = 2048
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

        Raises InputError for another `model_type` or activation, a missing size, an unknown RoPE type, a classifier
        with more than one label, and for any of these with the wrong type or out of range.
        """
        if config.get("model_type") != "llama":
            raise InputError("model_type", config.get("model_type"), "only Llama models ('llama') are supported")
        if config.get("hidden_act", "silu") != "silu":
            raise InputError("hidden_act", config["hidden_act"], "only 'silu' is supported")
        sizes = {field: _positive(config, field) for field in _SIZES}
        theta, scaling = _read_rope(config)
        heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
        return cls(
            **sizes,
            num_key_value_heads=_positive(config, "num_key_value_heads", heads),
            head_dim=_positive(config, "head_dim", width // heads),
            rope_theta=theta,
            rope_scaling=scaling,
            bos_token_id=next(iter(_token_ids(config, "bos_token_id")), None),
            eos_token_id=_token_ids(config, "eos_token_id"),
            pad_token_id=next(iter(_token_ids(config, "pad_token_id")), None),
            head=_read_head(config),
            **{field: _optional(config, field) for field in _OPTIONAL if config.get(field) is not None},
        )

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """Returns a `config.json` for transformers (with both spellings of RoPE) and vLLM; `dtype` is the weights'."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            scaling = self.rope_scaling
            rope = {"rope_type": scaling.rope_type, "factor": scaling.factor}
            if scaling.rope_type == "llama3":
                rope |= {field: getattr(scaling, field) for field in _LLAMA3}
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
        frequencies = self.rope_theta ** -(np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        if scaling.rope_type == "linear":
            return frequencies / scaling.factor
        wavelengths = 2 * math.pi / frequencies
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        # blending weight: 1 keeps a (short) wavelength, 0 scales a (long) one fully
        kept = np.clip((scaling.original_max_position_embeddings / wavelengths - low) / (high - low), 0.0, 1.0)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL = (
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "initializer_range",
)
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _positive(config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if type(value) is not int or not 1 <= value < 2**31:  # arrays are indexed with int32
        raise InputError(field, value, "must be a positive integer below 2**31 in config.json")
    return value


def _optional(config: dict[str, Any], field: str) -> Any:
    """Reads an optional field, which must have the type of its default."""
    value, kind = config[field], type(getattr(LlamaConfig, field))
    if kind is int:
        return _positive(config, field)
    if kind is float:
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise InputError(field, value, "must be a finite number >= 0 in config.json")
        return float(value)
    if type(value) is not kind:
        raise InputError(field, value, "must be true or false in config.json")
    return value


def _token_ids(config: dict[str, Any], field: str) -> tuple[int, ...]:
    """Returns the ids of a field that holds none, one or a list of them."""
    value = config.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and -(2**31) <= token < 2**31 for token in ids):  # some files use -1 for none
        raise InputError(field, value, "must be a token id or a list of token ids in config.json")
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


def _read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    rope = {**old, **new}
    theta = float(new.get("rope_theta") or config.get("rope_theta") or old.get("rope_theta") or 10000.0)
    if not 0 < theta < math.inf:
        raise InputError("rope_theta", theta, "must be > 0 and finite")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise InputError("rope_type", kind, f"must be one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    needed = ("factor", *_LLAMA3) if kind == "llama3" else ("factor",)
    missing = [field for field in needed if rope.get(field) is None]
    if missing:
        raise InputError("rope_scaling", rope, f"rope_type {kind!r} also needs {', '.join(missing)}")
    lengths = {"original_max_position_embeddings": int(rope[_LLAMA3[2]])} if kind == "llama3" else {}
    factors = {field: float(rope[field]) for field in needed if field != _LLAMA3[2]}
    if not all(0 < number < math.inf for number in (*factors.values(), *lengths.values())):
        raise InputError("rope_scaling", rope, f"{', '.join(needed)} must be > 0 and finite")
    if kind == "llama3" and not factors["low_freq_factor"] < factors["high_freq_factor"]:
        raise InputError("rope_scaling", rope, "low_freq_factor must be below high_freq_factor")
    return theta, RopeScaling(kind, **factors, **lengths)
