"""RoPE: its keys in `config.json`, read with the precedence of transformers, and its frequencies."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsp_jax.core.errors import InputError, shown
from lsp_jax.model.refused_keys import check_keys

ROPE_TYPES = ("default", "linear", "llama3")
DEFAULT_THETA = 10000.0
DEFAULT_CONTEXT = 2048
"""`max_position_embeddings` of a `config.json` without it."""
_LENGTH = "original_max_position_embeddings"


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

    def to_hf(self) -> dict[str, Any]:
        """Returns the object of `rope_scaling` in `config.json`."""
        fields = ("low_freq_factor", "high_freq_factor", _LENGTH) if self.rope_type == "llama3" else ()
        return {"rope_type": self.rope_type, "factor": self.factor} | {name: getattr(self, name) for name in fields}


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns the radians per position of each rotated pair, float64 [head_dim / 2]."""
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # blending weight: 1 keeps a (short) wavelength, 0 scales a (long) one fully
    kept = np.clip((scaling.original_max_position_embeddings / wavelengths - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * plain / scaling.factor


def read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling of a `config.json`, from the keys that transformers would use.

    A non-empty `rope_scaling` replaces `rope_parameters` as a whole. `rope_theta` inside the object comes before the
    one beside it, `original_max_position_embeddings` beside it before the one inside, `rope_type` before the older
    `type`. A key that is present with null is used, and refused, like any other value that is no number.
    Raises InputError for a type other than ROPE_TYPES, a missing or invalid number, and one set of keys per layer type.
    """
    name, rope = _used(config)
    check_keys(rope, config, inside=name)
    theta = _number(rope, "rope_theta", name) if "rope_theta" in rope else DEFAULT_THETA
    if "rope_theta" not in rope and "rope_theta" in config:
        theta = _number(config, "rope_theta")
    key = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(key, "default")
    if kind not in ROPE_TYPES:
        raise InputError(f"{name}.{key}", kind, f"must be one of {', '.join(ROPE_TYPES)} in config.json")
    if kind == "default":
        return theta, None
    factor = _number(rope, "factor", name)
    if kind == "linear":
        return theta, RopeScaling(kind, factor)
    low, high = (_number(rope, field, name) for field in ("low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise InputError(f"{name}.low_freq_factor", low, f"must be below high_freq_factor ({high}) in config.json")
    return theta, RopeScaling(kind, factor, low, high, _original_length(config, name, rope))


def rope_conflict(config: dict[str, Any]) -> str:
    """Returns one line that names RoPE keys of `config.json` with different values, and says which are used; or ""."""
    name, rope = _used(config)
    other = config.get("rope_parameters") or {}
    if name == "rope_scaling" and other and _resolved(config) != _resolved({**config, "rope_scaling": None}):
        return _differ(name, rope, "rope_parameters", other)
    if "rope_theta" in rope and config.get("rope_theta") not in (None, rope["rope_theta"]):
        return _differ(f"{name}.rope_theta", rope["rope_theta"], "rope_theta", config["rope_theta"])
    if rope.get("type", rope.get("rope_type")) != rope.get("rope_type", rope.get("type")):
        return _differ(f"{name}.rope_type", rope["rope_type"], f"{name}.type", rope["type"])
    if _LENGTH in config and rope.get(_LENGTH, config[_LENGTH]) != config[_LENGTH]:
        return _differ(_LENGTH, config[_LENGTH], f"{name}.{_LENGTH}", rope[_LENGTH])
    return ""


def _differ(used: str, value: object, other: str, ignored: object) -> str:
    return f"{used} = {shown(value)} is used, as in transformers, and not {other} = {shown(ignored)}, which differs"


def _resolved(config: dict[str, Any]) -> object:
    try:
        return read_rope(config)
    except InputError as error:
        return str(error)


def _used(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the object that decides, with its key."""
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            raise InputError(name, value, "must be an object or null in config.json")
        nested = [key for key, entry in (value or {}).items() if isinstance(entry, dict)]
        if nested:
            raise InputError(f"{name}.{nested[0]}", value, "RoPE of its own for a layer type is not supported")
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    return name, config.get(name) or {}


def _number(source: dict[str, Any], field: str, inside: str = "") -> float:
    """Returns a positive, finite number; `inside` is the object that holds it."""
    value: Any = source.get(field)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        name = f"{inside}.{field}" if inside else field
        raise InputError(name, value, "must be a number > 0 and finite in config.json")
    return float(value)


def _original_length(config: dict[str, Any], name: str, rope: dict[str, Any]) -> int:
    lengths = {f"{name}.{_LENGTH}": _number(rope, _LENGTH, name)} if _LENGTH in rope else {}
    if _LENGTH in config:
        lengths = {_LENGTH: _number(config, _LENGTH)}
    if not lengths:
        field = "max_position_embeddings"
        lengths = {field: _number({field: DEFAULT_CONTEXT, **config}, field)}
    ((field, length),) = lengths.items()
    if not length.is_integer():
        raise InputError(field, length, "must be a number of tokens in config.json")
    return int(length)
