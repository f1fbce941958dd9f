"""Loading and saving parameters as Hugging Face directories: `config.json` and safetensors.

Weights are read from memory-mapped files into one stacked array per leaf, and written tensor by tensor. On a mesh each
process reads only the shards of its own devices; only process 0 writes. Pickled weights (`.bin`, `.pt`) are never
opened: unpickling can run arbitrary code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from lsp_jax.core.console import printable, warn
from lsp_jax.core.errors import InputError, one_of
from lsp_jax.core.files import read_json_object
from lsp_jax.core.runtime import to_host
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.hf_names import Tensor, file_tensors, leaf_shapes
from lsp_jax.model.llama import Params
from lsp_jax.model.rope import rope_conflict
from lsp_jax.model.sharding import AXES, Layout, check_model, mesh_of, partition
from lsp_jax.model.weight_checks import (
    EMBEDDING,
    HEAD,
    check_names,
    check_range,
    check_tensor,
    head_is_tied,
    largest_lost,
    leaf_of,
    overflow,
    say_other_frequencies,
)
from lsp_jax.model.weight_files import (
    INDEX,
    SINGLE,
    STORED,
    Source,
    holds,
    open_weights,
    refuse_adapters,
)

DTYPES = tuple(STORED)

# --- reading -----------------------------------------------------------------------------------------------------


def read_config(directory: str | Path) -> LlamaConfig:
    """Reads the `LlamaConfig` of a Hugging Face directory.

    If `config.json` ties head and embedding, but the weights have a head of its own that differs, the configuration is
    untied, with a warning. RoPE keys that contradict each other are warned of, too.
    Raises InputError if `config.json` is missing or unusable, and for a directory with a PEFT adapter.
    """
    directory = Path(directory)
    refuse_adapters(directory)
    config = read_json_object(directory / "config.json", "a model directory must contain a valid one")
    try:
        read, conflict = LlamaConfig.from_hf(config), rope_conflict(config)
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError("config.json", str(directory), f"is not a usable Llama configuration ({error})") from error
    if conflict:
        warn(f"{printable(str(directory))}/config.json: {printable(conflict, 600)}")
    if read.head == "lm" and read.tie_word_embeddings and _has_own_head(directory):
        told = f"{HEAD} differs from {EMBEDDING}, so both are kept, although config.json says tie_word_embeddings"
        warn(f"{printable(str(directory))}: {told}; exports say false")
        return replace(read, tie_word_embeddings=False)
    return read


def _has_own_head(directory: Path) -> bool:
    """Whether the files hold a head that differs from the embedding."""
    if not holds(directory, HEAD):
        return False
    with ExitStack() as stack:
        return not head_is_tied(open_weights(directory, stack))


def load_params(
    directory: str | Path,
    config: LlamaConfig,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    layout: Layout = "train",
) -> Params:
    """Loads the parameters of a Hugging Face directory, cast to `dtype`, onto the default device or `mesh`.

    Reads `model.safetensors`, or the shards listed in `model.safetensors.index.json`, in float32, bfloat16 or float16.
    All names, dtypes and shapes are checked before the first tensor is read. On a mesh, leaves are sharded by the table
    of `model/sharding.py` for `layout`, and each process reads only the shards of its own devices, replicated shards
    once. Host memory holds one leaf, or one device's shard of it, at a time (on CPU this buffer becomes the parameter)
    and as much of one tensor of a file.
    Raises InputError for a mesh that does not divide the model, names, shapes or dtypes that do not match `config`, a
    missing tensor, or a damaged file.
    """
    check_dtype(dtype)
    _check_mesh(mesh, config)
    with ExitStack() as stack:
        sources = _open_checked(Path(directory), config, stack, say=True)
        params: Params = {}
        leaves = leaf_shapes(config).items()
        for path, shape in tqdm(leaves, desc="loading", unit="array", disable=None, leave=False):
            parts = [(tensor, source) for tensor, source in sources if tensor.path == path]
            sharding = None if mesh is None else NamedSharding(mesh, partition(path, layout))
            _insert(params, path, _load_leaf(parts, shape, dtype, sharding))
        return params


def check_weights(directory: str | Path, config: LlamaConfig) -> None:
    """Runs the checks of `load_params` on the headers of the files alone; raises InputError."""
    with ExitStack() as stack:
        _open_checked(Path(directory), config, stack)


def _open_checked(
    directory: Path, config: LlamaConfig, stack: ExitStack, say: bool = False
) -> list[tuple[Tensor, Source]]:
    """Returns every tensor of the model with its file; checks names, dtypes and shapes, `say` warns."""
    sources = open_weights(directory, stack, say)
    tensors = check_names(sources, config)
    for tensor in tensors:
        check_tensor(sources[tensor.name], tensor)
    if say:
        say_other_frequencies(sources, config)
    return [(tensor, sources[tensor.name]) for tensor in tensors]


def _check_mesh(mesh: Mesh | None, config: LlamaConfig) -> None:
    if mesh is None:
        return
    if mesh.axis_names != AXES:
        raise InputError("mesh", mesh.axis_names, f"axes must be {AXES}, as made by lsp_jax.model.sharding.make_mesh")
    check_model([mesh.shape[axis] for axis in AXES], config)


def _load_leaf(
    parts: list[tuple[Tensor, Source]], shape: tuple[int, ...], dtype: str, sharding: NamedSharding | None
) -> jax.Array:
    """Loads one leaf from the tensors of its layers; with a sharding, only this process's shards."""
    if sharding is None:
        full = (slice(None),) * len(shape)
        return jax.block_until_ready(jax.device_put(_host_part(parts, full, shape, dtype)))
    indices = sharding.devices_indices_map(shape)
    holders: dict[str, list[Any]] = {}
    for device in sorted(sharding.addressable_devices, key=lambda device: device.id):
        holders.setdefault(str(indices[device]), []).append(device)
    arrays: list[jax.Array] = []
    for devices in holders.values():
        part = _host_part(parts, indices[devices[0]], sharding.shard_shape(shape), dtype)
        arrays += jax.block_until_ready(jax.device_put([part] * len(devices), devices))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _host_part(
    parts: list[tuple[Tensor, Source]], index: tuple[slice, ...], shape: tuple[int, ...], dtype: str
) -> np.ndarray:
    """Reads the slice `index` of a leaf, with shape `shape`. Layers are never sharded, other axes sliced on disk."""
    part = _aligned_empty(shape, jnp.dtype(dtype))
    for tensor, source in parts:
        inside = index if tensor.layer is None else index[1:]
        value = source.read(inside[::-1] if tensor.transposed else inside)
        lost = largest_lost(value, dtype)
        if lost:
            raise overflow(tensor.name, lost, dtype)
        part[... if tensor.layer is None else tensor.layer] = value.T if tensor.transposed else value
    return part


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array aligned to 64 bytes, which JAX's CPU backend adopts without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def check_dtype(dtype: str) -> None:
    """Raises InputError unless `dtype` is one of float32, bfloat16, float16."""
    one_of("dtype", dtype, DTYPES)


def _insert(params: Params, path: str, leaf: jax.Array) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[last] = leaf


# --- writing -----------------------------------------------------------------------------------------------------


def save_params(
    params: Params,
    config: LlamaConfig,
    directory: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `config.json` and `model.safetensors` to `directory`, which is created if missing; replaces existing ones.

    Above `max_shard_bytes` (of tensors) the weights are split into `model-0000i-of-0000N.safetensors` with an index.
    `dtype` None keeps that of the parameters. Only one tensor at a time is on the host, also when parameters are
    gathered from several processes: all processes must call this, process 0 alone writes, and the others return when
    the last tensor is gathered, possibly before its file is written.
    Raises InputError, before anything is written, for a finite value that would become infinite in `dtype`.
    """
    if dtype is not None:
        check_dtype(dtype)
        check_range(params, config, dtype)
    directory = Path(directory)
    writes = jax.process_index() == 0
    file_dtype = dtype or str(params["model"]["embed_tokens"]["weight"].dtype)
    shards = _split(file_tensors(config), jnp.dtype(file_dtype).itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (directory / name).open("wb") if writes else nullcontext() as file:
            total += _write_tensors(file, params, shard, dtype)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if writes and len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if writes:
        write_json(directory / "config.json", config.to_hf(file_dtype))


def _split(tensors: Iterable[Tensor], itemsize: int, max_bytes: int) -> list[list[Tensor]]:
    """Groups consecutive tensors into shards of at most `max_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = itemsize * int(np.prod(tensor.shape))
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _write_tensors(file: BinaryIO | None, params: Params, shard: list[Tensor], dtype: str | None) -> int:
    """Writes one safetensors file tensor by tensor (without a file only gathers); returns the bytes of its tensors.

    The library's writer needs all tensors of a file in memory. The format is the header's length in 8 bytes, the header
    in JSON, and the tensors' bytes, ordered by descending item size and name, which keeps every tensor aligned.
    """
    dtypes = {tensor.name: jnp.dtype(dtype or leaf_of(params, tensor).dtype) for tensor in shard}
    ordered = sorted(shard, key=lambda tensor: (-dtypes[tensor.name].itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        stored = dtypes[tensor.name]
        start, end = end, end + stored.itemsize * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": STORED[str(stored)], "shape": tensor.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    if file is not None:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in ordered:
        leaf = leaf_of(params, tensor)
        value = _file_form(_gathered(leaf))(leaf, tensor.layer, tensor.transposed, dtype)
        if file is None:
            jax.block_until_ready(value)  # one gathered tensor at a time on the devices
        else:
            file.write(np.ascontiguousarray(to_host(value)).view(np.uint8).data)
    return end


def _gathered(leaf: jax.Array) -> NamedSharding | None:
    """Replicated sharding for a leaf with shards in other processes; else None, and the host assembles it."""
    mesh = mesh_of(leaf)
    return NamedSharding(mesh, PartitionSpec()) if mesh is not None and mesh.is_multi_process else None


@lru_cache
def _file_form(out: NamedSharding | None) -> Callable[..., jax.Array]:
    """Jitted (leaf, layer, transposed, dtype) -> one tensor as stored in the file, with sharding `out`."""

    def form(leaf: jax.Array, layer: int | None, transposed: bool, dtype: str | None) -> jax.Array:
        value = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
        value = value.T if transposed else value
        return value if dtype is None else value.astype(dtype)

    return jax.jit(form, static_argnums=(2, 3), out_shardings=out)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
