"""Hugging Face directories <-> parameters: `config.json` and safetensors, with one name table for both directions.

Weights are read tensor by tensor from memory-mapped files into one stacked array a leaf, and written shard by shard.
Pickled weights (`.bin`, `.pt`) are never opened: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  importing it gives numpy, and through it safetensors, bfloat16
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lsp_jax.errors import InputError
from lsp_jax.host import to_host
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.llama import Params, params_shape
from lsp_jax.model.sharding import shardings

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")
_STORED = ("F32", "BF16", "F16")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_CONVERT = (
    "make safetensors of a trusted model with transformers: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT), for a reward model with "
    "AutoModelForSequenceClassification"
)

# Hugging Face's name, path in `Params`, stored transposed ([out, in] there, [in, out] here). `{}` is the layer, which
# here is the leading axis. A model has the rows whose path is in `params_shape(config)`; shapes come from there too.
_TABLE = (
    ("model.embed_tokens.weight", "model/embed_tokens/weight", False),
    ("model.layers.{}.input_layernorm.weight", "model/layers/input_layernorm/weight", False),
    ("model.layers.{}.self_attn.q_proj.weight", "model/layers/self_attn/q_proj/weight", True),
    ("model.layers.{}.self_attn.q_proj.bias", "model/layers/self_attn/q_proj/bias", False),
    ("model.layers.{}.self_attn.k_proj.weight", "model/layers/self_attn/k_proj/weight", True),
    ("model.layers.{}.self_attn.k_proj.bias", "model/layers/self_attn/k_proj/bias", False),
    ("model.layers.{}.self_attn.v_proj.weight", "model/layers/self_attn/v_proj/weight", True),
    ("model.layers.{}.self_attn.v_proj.bias", "model/layers/self_attn/v_proj/bias", False),
    ("model.layers.{}.self_attn.o_proj.weight", "model/layers/self_attn/o_proj/weight", True),
    ("model.layers.{}.self_attn.o_proj.bias", "model/layers/self_attn/o_proj/bias", False),
    ("model.layers.{}.post_attention_layernorm.weight", "model/layers/post_attention_layernorm/weight", False),
    ("model.layers.{}.mlp.gate_proj.weight", "model/layers/mlp/gate_proj/weight", True),
    ("model.layers.{}.mlp.gate_proj.bias", "model/layers/mlp/gate_proj/bias", False),
    ("model.layers.{}.mlp.up_proj.weight", "model/layers/mlp/up_proj/weight", True),
    ("model.layers.{}.mlp.up_proj.bias", "model/layers/mlp/up_proj/bias", False),
    ("model.layers.{}.mlp.down_proj.weight", "model/layers/mlp/down_proj/weight", True),
    ("model.layers.{}.mlp.down_proj.bias", "model/layers/mlp/down_proj/bias", False),
    ("model.norm.weight", "model/norm/weight", False),
    ("lm_head.weight", "lm_head/weight", False),
    ("score.weight", "score/weight", True),
)


class _Tensor(NamedTuple):
    """One tensor as Hugging Face names it, and where it lies here."""

    name: str
    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]
    """In the file, that is [out, in] for projections."""


# --- reading -----------------------------------------------------------------------------------------------------


def read_config(directory: str | Path) -> LlamaConfig:
    """The `LlamaConfig` of a Hugging Face directory; InputError where `config.json` is missing or unusable."""
    config = _read_json(Path(directory) / "config.json", "a model directory holds one")
    try:
        return LlamaConfig.from_hf(config)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError("config.json", str(directory), f"not a usable Llama configuration ({error})") from error


def load_params(directory: str | Path, config: LlamaConfig, dtype: str = "float32", mesh: Mesh | None = None) -> Params:
    """The parameters of a Hugging Face directory on the default device, cast to `dtype`.

    Reads `model.safetensors`, or the shards named by `model.safetensors.index.json`, in float32, bfloat16 or float16.
    All names, types and shapes are checked before the first tensor is read. The host holds one leaf at a time, which
    on the CPU becomes the parameter, and one tensor of a file.
    Raises InputError for a name, shape or type that `config` does not expect, a missing tensor, or a damaged file.
    """
    check_dtype(dtype)
    with ExitStack() as stack:
        sources = _open_checked(Path(directory), config, stack)
        params: Params = {}
        for path, shape in _leaves(config).items():
            parts = [(tensor, handle) for tensor, handle in sources if tensor.path == path]
            _insert(params, path, _load_leaf(parts, shape, dtype))
        return params if mesh is None else jax.device_put(params, shardings(params, mesh))


def check_weights(directory: str | Path, config: LlamaConfig) -> None:
    """Everything that `load_params` refuses, read from the files' headers alone; InputError."""
    with ExitStack() as stack:
        _open_checked(Path(directory), config, stack)


def _open_checked(directory: Path, config: LlamaConfig, stack: ExitStack) -> list[tuple[_Tensor, Any]]:
    """Every tensor of the model with the open file that holds it; names, types and shapes are checked."""
    handles = {path: stack.enter_context(_open(path)) for path in _weight_files(directory)}
    found = {name: path for path, handle in handles.items() for name in handle.keys()}  # noqa: SIM118
    tensors = list(_tensors(config))
    _check_names(found, tensors, config)
    sources = [(tensor, handles[found[tensor.name]]) for tensor in tensors]
    for tensor, handle in sources:
        _check_tensor(handle, tensor)
    return sources


def _load_leaf(parts: list[tuple[_Tensor, Any]], shape: tuple[int, ...], dtype: str) -> jax.Array:
    leaf = _aligned_empty(shape, jnp.dtype(dtype))
    for tensor, handle in parts:
        value = _read(handle, tensor.name)
        leaf[... if tensor.layer is None else tensor.layer] = value.T if tensor.transposed else value
    return jax.block_until_ready(jax.device_put(leaf))


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which JAX's CPU backend takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def check_dtype(dtype: str) -> None:
    """InputError unless `dtype` names one of float32, bfloat16, float16."""
    if dtype not in DTYPES:
        raise InputError("dtype", dtype, f"one of {', '.join(DTYPES)}")


@lru_cache
def _leaves(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf of the parameters by its path, in the table's order."""
    flat = jax.tree.flatten_with_path(params_shape(config))[0]
    shapes = {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in flat}
    paths = {path: shapes.pop(path) for _, path, _ in _TABLE if path in shapes}
    if shapes:
        raise AssertionError(f"the name table lacks {sorted(shapes)}")
    return paths


def _tensors(config: LlamaConfig) -> Iterable[_Tensor]:
    leaves = _leaves(config)
    for pattern, path, transposed in _TABLE:
        if path not in leaves:
            continue
        layers = range(config.num_hidden_layers) if "{}" in pattern else (None,)
        shape = leaves[path] if "{}" not in pattern else leaves[path][1:]
        for layer in layers:
            yield _Tensor(pattern.format(layer), path, layer, transposed, shape[::-1] if transposed else shape)


def _insert(params: Params, path: str, leaf: jax.Array) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[last] = leaf


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(path.name, str(path), f"cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise InputError(path.name, str(path), f"is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(path.name, str(path), "must hold a JSON object")
    return value


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        shards = _read_json(directory / INDEX, "the list of shards").get("weight_map")
        names = shards.values() if isinstance(shards, dict) else ()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(INDEX, str(directory), "'weight_map' must map tensor names to files beside it")
        missing = [name for name in sorted(set(names)) if not (directory / name).is_file()]
        if missing:
            raise InputError(INDEX, missing[0], f"this shard is not in {directory}; download it again")
        return [directory / name for name in sorted(set(names))]
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise InputError("weights", pickled[0], f"pickled weights can run code and are never opened; {_CONVERT}")
    raise InputError("weights", str(directory), f"holds neither {SINGLE} nor {INDEX}; {_CONVERT}")


def _damaged(path: str, error: Exception) -> InputError:
    return InputError("safetensors", path, f"the file is damaged or cut short ({error}); download it again")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise _damaged(str(path), error) from error


def _read(handle: Any, name: str) -> np.ndarray:
    try:
        return handle.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(name, error) from error


def _check_names(found: dict[str, Path], tensors: list[_Tensor], config: LlamaConfig) -> None:
    for tensor in tensors:
        if tensor.name not in found:
            head = "; only with tie_word_embeddings true it may be absent" if tensor.path == "lm_head/weight" else ""
            raise InputError(tensor.name, None, f"missing from the weights; expected shape {tensor.shape}{head}")
    expected = {tensor.name for tensor in tensors}
    for name in sorted(found):
        tied_head = config.tie_word_embeddings and name == "lm_head.weight"
        if name not in expected and not tied_head and not name.endswith("rotary_emb.inv_freq"):
            shape = tuple(_open(found[name]).get_slice(name).get_shape())
            raise InputError(name, shape, "no tensor of this name belongs to the model that config.json describes")


def _check_tensor(handle: Any, tensor: _Tensor) -> None:
    stored = handle.get_slice(tensor.name)
    shape = tuple(stored.get_shape())
    if shape != tensor.shape:
        raise InputError(tensor.name, shape, f"config.json makes its shape {tensor.shape}")
    if stored.get_dtype() not in _STORED:
        remedy = f"readable types are {', '.join(_STORED)}, not quantised ones"
        raise InputError(tensor.name, stored.get_dtype(), remedy)


# --- writing -----------------------------------------------------------------------------------------------------


def save_params(
    params: Params,
    config: LlamaConfig,
    directory: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `config.json` and `model.safetensors` into `directory`, made where missing; existing ones are replaced.

    Above `max_shard_bytes` (of tensors) the weights become `model-0000i-of-0000N.safetensors` and an index. `dtype`
    None keeps that of the parameters. One shard at a time is on the host.
    """
    if dtype is not None:
        check_dtype(dtype)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = str(params["model"]["embed_tokens"]["weight"].dtype)
    shards = _split(_tensors(config), jnp.dtype(dtype or kept).itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {tensor.name: _export(params, tensor, dtype) for tensor in shard}
        save_file(arrays, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
        del arrays
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(directory / "config.json", config.to_hf(dtype or kept))


def _split(tensors: Iterable[_Tensor], itemsize: int, max_bytes: int) -> list[list[_Tensor]]:
    """Consecutive tensors in shards of at most `max_bytes`; a larger tensor has a shard to itself."""
    shards: list[list[_Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = itemsize * int(np.prod(tensor.shape))
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _export(params: Params, tensor: _Tensor, dtype: str | None) -> np.ndarray:
    leaf: Any = params
    for key in tensor.path.split("/"):
        leaf = leaf[key]
    value = to_host(_file_form(leaf, tensor.layer, tensor.transposed, dtype))
    return np.ascontiguousarray(value)  # safetensors writes the raw buffer, whatever the strides


@partial(jax.jit, static_argnames=("transposed", "dtype"))
def _file_form(leaf: jax.Array, layer: int | None, transposed: bool, dtype: str | None) -> jax.Array:
    value = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    value = value.T if transposed else value
    return value if dtype is None else value.astype(dtype)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
