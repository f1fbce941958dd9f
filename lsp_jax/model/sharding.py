"""Sharding: the device mesh, and one table from parameter paths to partition specs.

The mesh has the axes `data`, `fsdp` and `tensor`. Rows (queries, answers, learner rows) are sharded over `data` and
`fsdp`; parameters and moments over `fsdp` and `tensor`; heads, the MLP's width and the vocabulary over `tensor`. With
several slices, `data` spans the slower network between them.

Model code does not see the mesh: it annotates the axes of arrays (`shard_rows`, `shard_heads`, ...), which takes effect
inside `use_mesh(mesh)` and is a no-op outside. The same functions thus run on one core and on a pod.

Parameters have two layouts: `train` shards them over `fsdp` and `tensor`; `decode` replicates them over `fsdp`, because
decoding would otherwise gather them for every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lsp_jax.core.errors import InputError
from lsp_jax.model.config import LlamaConfig

AXES = DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
Layout = Literal["train", "decode"]
P: type[PartitionSpec] = PartitionSpec

# Axes of every parameter by its path (layers are stacked in front; projections are [in, out]).
_IN_OUT, _OUT_IN = P(None, FSDP, TENSOR), P(None, TENSOR, FSDP)
_PARTITIONS = {
    "memory/embeddings": P(None, FSDP),
    "memory/centre": P(),
    "model/embed_tokens/weight": P(TENSOR, FSDP),
    "model/layers/input_layernorm/weight": P(),
    "model/layers/self_attn/q_proj/weight": _IN_OUT,
    "model/layers/self_attn/k_proj/weight": _IN_OUT,
    "model/layers/self_attn/v_proj/weight": _IN_OUT,
    "model/layers/self_attn/o_proj/weight": _OUT_IN,
    "model/layers/self_attn/q_proj/bias": P(None, TENSOR),
    "model/layers/self_attn/k_proj/bias": P(None, TENSOR),
    "model/layers/self_attn/v_proj/bias": P(None, TENSOR),
    "model/layers/self_attn/o_proj/bias": P(),
    "model/layers/post_attention_layernorm/weight": P(),
    "model/layers/mlp/gate_proj/weight": _IN_OUT,
    "model/layers/mlp/up_proj/weight": _IN_OUT,
    "model/layers/mlp/down_proj/weight": _OUT_IN,
    "model/layers/mlp/gate_proj/bias": P(None, TENSOR),
    "model/layers/mlp/up_proj/bias": P(None, TENSOR),
    "model/layers/mlp/down_proj/bias": P(),
    "model/norm/weight": P(),
    "lm_head/weight": P(TENSOR, FSDP),
    "score/weight": P(FSDP, None),
}
# Adapters are sharded like their projection along the input or output axis, and replicated along the rank.
_PARTITIONS |= {
    path.replace("weight", kind): spec
    for path, (_, inputs, outputs) in ((path, axes) for path, axes in _PARTITIONS.items() if "_proj/weight" in path)
    for kind, spec in (("lora_A", P(None, inputs, None)), ("lora_B", P(None, None, outputs)))
}


# --- the mesh ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh: number of devices along each axis. All 0: chosen automatically; one may be -1: all the rest."""

    data: int = 0
    """Data parallelism: replicas of the parameters. With several slices this axis spans them."""
    fsdp: int = 0
    """Fully sharded data parallelism: devices that share one copy of parameters and moments, each with its own rows."""
    tensor: int = 0
    """Tensor parallelism: devices that share heads, MLP width and vocabulary for the same rows."""

    def check(self) -> None:
        """Raises InputError naming the field."""
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size < -1:
                raise InputError(f"mesh.{axis}", size, "must be a number of devices, -1 for all the rest, or 0")
        if sizes.count(-1) > 1:
            raise InputError("mesh", sizes, "only one of data, fsdp and tensor may be -1")

    def sizes(self, devices: int, slices: int = 1, config: LlamaConfig | None = None) -> tuple[int, int, int]:
        """Returns the devices along data, fsdp, tensor; InputError unless their product is `devices`."""
        self.check()
        sizes = [getattr(self, axis) for axis in AXES]
        if not any(sizes):
            return default_sizes(devices, slices, config)
        sizes = [size or 1 for size in sizes]
        given = math.prod(size for size in sizes if size != -1)
        named = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        if devices % given or (-1 not in sizes and given != devices):
            remedy = f"do not divide {devices} devices: their product must be {devices} (one may be -1)"
            raise InputError("mesh", named, remedy)
        data, fsdp, tensor = (devices // given if size == -1 else size for size in sizes)
        if data % slices:
            raise InputError("mesh.data", data, f"must be a multiple of the {slices} slices, which this axis spans")
        return data, fsdp, tensor


def default_sizes(devices: int, slices: int = 1, config: LlamaConfig | None = None) -> tuple[int, int, int]:
    """Default sizes (data, fsdp, tensor): up to 16 devices all in fsdp; 64 -> 1 16 4; 256 -> 4 16 4.

    Up to 16 devices, fsdp alone costs least. Beyond, 4-fold `tensor` shares each row, because one iteration has few
    rows, and devices beyond 16-fold `fsdp` become replicas. Sizes are halved until they divide the model's heads and
    widths.
    """
    inside = devices // slices
    tensor = math.gcd(4, inside) if inside > 16 else 1
    fsdp = math.gcd(16, inside // tensor)
    if config is not None:
        sharded = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size")
        while any(getattr(config, name) % tensor for name in sharded):
            tensor //= 2
        fsdp = math.gcd(16, inside // tensor, config.hidden_size)
    return devices // (fsdp * tensor), fsdp, tensor


def make_mesh(mesh: MeshConfig, config: LlamaConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Returns the mesh over `devices` (default: all), None for a single device.

    Raises InputError when the sizes do not divide the devices, or do not divide the dimensions of the model `config`.
    """
    devices = jax.devices() if devices is None else devices
    # only TPUs have slices; on GPUs slice_index distinguishes hosts
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    sizes = mesh.sizes(len(devices), slices, config)
    if config is not None:
        check_model(sizes, config)
    if len(devices) == 1:
        return None
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:  # a mesh axis may split a physical one: 16 fsdp by 4 tensor on a torus of 8 x 8
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_model(sizes: Sequence[int], config: LlamaConfig, of: str = "model") -> None:
    """Raises InputError when an axis does not divide the dimension that is sharded over it."""
    _, fsdp, tensor = sizes
    sharded = [
        (TENSOR, tensor, "num_key_value_heads", config.num_key_value_heads),
        (TENSOR, tensor, "num_attention_heads", config.num_attention_heads),
        (TENSOR, tensor, "intermediate_size", config.intermediate_size),
        (TENSOR, tensor, "vocab_size", config.vocab_size),
        (FSDP, fsdp, "hidden_size", config.hidden_size),
    ]
    for axis, size, name, dimension in sharded:
        if dimension % size:
            raise InputError(f"mesh.{axis}", size, f"does not divide the {of}'s {name} {dimension}")


def check_mesh(field: str, mesh: object) -> None:
    """Raises InputError unless `mesh` has the axes of `make_mesh`."""
    if not isinstance(mesh, Mesh) or mesh.axis_names != AXES:
        raise InputError(field, mesh, f"must be a mesh with the axes {', '.join(AXES)}, or None; make_mesh returns one")


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Context in which arrays are sharded over `mesh`; None changes nothing. Can be nested."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of the arrays of `tree`, None if they are on single devices."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


# --- parameters ----------------------------------------------------------------------------------------------------


def partition(path: str, layout: Layout = "train") -> PartitionSpec:
    """Returns the partition spec of the parameter at `path` ("model/norm/weight"); KeyError if the table lacks it."""
    spec = _PARTITIONS[path]
    return spec if layout == "train" else P(*(None if axis == FSDP else axis for axis in spec))


def partitions(tree: Any, layout: Layout = "train") -> Any:
    """Returns a `PartitionSpec` for every leaf of `tree`: parameters, or optimizer state of the same structure.

    Leaves are looked up by the names in their path. Scalars (counters) are replicated. Raises ValueError for other
    leaves that the table lacks, instead of silently replicating them.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = path_name(tuple(key for key in path if isinstance(key, jax.tree_util.DictKey)))
        if name in _PARTITIONS:
            return partition(name, layout)
        if leaf.ndim == 0:
            return P()
        raise ValueError(f"no partition for {jax.tree_util.keystr(path)} of shape {leaf.shape}: add it to the table")

    return jax.tree_util.tree_map_with_path(of, tree)


def shardings(tree: Any, mesh: Mesh | None, layout: Layout = "train") -> Any:
    """Returns a sharding for every leaf of `tree`, as `partitions`; that of the default device without a mesh."""
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: single, tree)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partitions(tree, layout))


def shard_params(tree: Any, layout: Layout = "train") -> Any:
    """Constrains `tree`, inside jit, to the layout of the table."""
    if context() is None:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, partitions(tree, layout))


def replicate(tree: Any) -> Any:
    """Puts host arrays, equal in all processes, onto every device of the current mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    replicated = NamedSharding(mesh, P())

    def put(x: Any) -> jax.Array:
        if mesh.is_multi_process and isinstance(x, (np.ndarray, np.generic)):
            # device_put would first compare the arrays between processes, which fails for NaN
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, replicated, lambda index: x[index])
        return jax.device_put(x, replicated)

    return jax.tree.map(put, tree)


HOST_MEMORY = "pinned_host"


def offload_to_host(tree: Any) -> Any:
    """Moves `tree` to the host memory of its devices with the same sharding; `load_to_device` reverses it."""

    def offload(x: Any) -> Any:
        return jax.device_put(x, x.sharding.with_memory_kind(HOST_MEMORY)) if isinstance(x, jax.Array) else x

    return jax.tree.map(offload, tree)


def load_to_device(tree: Any) -> Any:
    """Moves `tree` to device memory; arrays that are already there are not copied."""

    def load(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.sharding.memory_kind != HOST_MEMORY:
            return x
        device = next(iter(x.sharding.addressable_devices))
        return jax.device_put(x, x.sharding.with_memory_kind(device.default_memory().kind))

    return jax.tree.map(load, tree)


# --- activations ---------------------------------------------------------------------------------------------------


def context() -> dict[str, int] | None:
    """Sizes of the mesh axes inside `use_mesh`, None outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else dict(mesh.shape)


def row_shards() -> int:
    """Number of devices over which rows are sharded."""
    sizes = context()
    return 1 if sizes is None else sizes[DATA] * sizes[FSDP]


def row_axes(rows: int) -> tuple[str, ...]:
    """Returns the axes over which `rows` rows are sharded: as many as divide them evenly."""
    sizes = context() or {}
    for axes in ((DATA, FSDP), (FSDP,), (DATA,)):
        size = math.prod(sizes.get(axis, 1) for axis in axes)
        if size > 1 and rows % size == 0:
            return axes
    return ()


def shard(x: jax.Array, *axes: Any) -> jax.Array:
    """Constrains `x` to be sharded over `axes` (None: replicated); a no-op outside `use_mesh`."""
    return x if context() is None else jax.lax.with_sharding_constraint(x, P(*axes))


def shard_rows(tree: Any, axis: int = 0) -> Any:
    """Shards the rows (dimension `axis`) of every array in `tree`, and replicates all other dimensions."""
    if context() is None:
        return tree
    return jax.tree.map(lambda x: shard(x, *(None,) * axis, row_axes(x.shape[axis]) or None), tree)


def shard_heads(x: jax.Array, axis: int = 2) -> jax.Array:
    """Shards rows and heads of `x` [B, S, heads, h], or with heads at another `axis`, where their numbers divide."""
    sizes = context()
    if sizes is None:
        return x
    axes: list[Any] = [row_axes(x.shape[0]) or None, None, None, None]
    axes[axis] = TENSOR if x.shape[axis] % sizes[TENSOR] == 0 else None
    return shard(x, *axes)


def path_name(path: Any) -> str:
    """Formats a key path as `params/model/norm/weight`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
