"""Where arrays lie on a machine of many devices: the mesh, and one table from parameter to partition.

The mesh has the axes `data`, `fsdp` and `tensor`. Rows (queries, answers, learner rows) are spread over `data` and
`fsdp`; parameters and moments over `fsdp` and `tensor`; heads, the MLP's width and the vocabulary over `tensor`. Over
several slices `data` crosses the slower network between them.

Code that computes never sees a mesh: it says what an array's axes are (`shard_rows`, `shard_heads`, ...), which means
something inside `use_mesh(mesh)` and nothing without one. So the same functions run on one core and on a pod.

There are two layouts of parameters: `train` spreads them over `fsdp` and `tensor`; `decode` keeps them whole over
`fsdp`, since decoding would have to gather them for every token.
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
# An adapter is spread as its projection is on the side that it touches, whole along its rank.
_PARTITIONS |= {
    path.replace("weight", kind): spec
    for path, (_, inputs, outputs) in ((path, axes) for path, axes in _PARTITIONS.items() if "_proj/weight" in path)
    for kind, spec in (("lora_A", P(None, inputs, None)), ("lora_B", P(None, None, outputs)))
}


# --- the mesh ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. All 0: chosen by their number (`default_sizes`); one may be -1: what is left."""

    data: int = 0
    """Copies of the parameters; the axis that crosses slices."""
    fsdp: int = 0
    """Devices that share one copy of parameters and moments, each with rows of its own."""
    tensor: int = 0
    """Devices that share the heads, the MLP's width and the vocabulary of the same rows."""

    def check(self) -> None:
        """Raises InputError naming the field."""
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size < -1:
                raise InputError(f"mesh.{axis}", size, "must be a number of devices, -1 for what is left, or 0")
        if sizes.count(-1) > 1:
            raise InputError("mesh", sizes, "only one of data, fsdp and tensor may be -1")

    def sizes(self, devices: int, slices: int = 1, config: LlamaConfig | None = None) -> tuple[int, int, int]:
        """Devices along data, fsdp, tensor. InputError where they do not multiply to `devices`."""
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
            raise InputError(
                "mesh.data", data, f"must be a multiple of the {slices} slices: it is the axis across them"
            )
        return data, fsdp, tensor


def default_sizes(devices: int, slices: int = 1, config: LlamaConfig | None = None) -> tuple[int, int, int]:
    """Sizes for a number of devices: 1 -> 1 1 1; 4, 8, 16 -> fsdp; 64 -> 1 16 4; 256 -> 4 16 4 (data fsdp tensor).

    Up to 16 devices parameters are spread and nothing else, which costs least. Beyond, 4 devices share each row, since
    one iteration has few rows, and what is left after 16-fold `fsdp` holds copies. Halved until the model's heads and
    widths divide.
    """
    inside = devices // slices
    tensor = math.gcd(4, inside) if inside > 16 else 1
    fsdp = math.gcd(16, inside // tensor)
    if config is not None:
        spread = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size")
        while any(getattr(config, name) % tensor for name in spread):
            tensor //= 2
        fsdp = math.gcd(16, inside // tensor, config.hidden_size)
    return devices // (fsdp * tensor), fsdp, tensor


def make_mesh(mesh: MeshConfig, config: LlamaConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh over `devices` (all there are), None for a single one: nothing to spread there.

    Raises InputError where the sizes do not divide the devices, or the model `config` the sizes.
    """
    devices = jax.devices() if devices is None else devices
    # only TPUs have slices; on GPUs that number tells hosts apart
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    sizes = mesh.sizes(len(devices), slices, config)
    if config is not None:
        check_model(sizes, config)
    if len(devices) == 1:
        return None
    if slices > 1:
        inside = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:  # 16 of fsdp by 4 of tensor on a torus of 8 x 8: an axis of ours may end inside one of the machine's
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_model(sizes: Sequence[int], config: LlamaConfig, of: str = "model") -> None:
    """InputError where an axis does not divide the dimension that is spread over it."""
    _, fsdp, tensor = sizes
    spread = [
        (TENSOR, tensor, "num_key_value_heads", config.num_key_value_heads),
        (TENSOR, tensor, "num_attention_heads", config.num_attention_heads),
        (TENSOR, tensor, "intermediate_size", config.intermediate_size),
        (TENSOR, tensor, "vocab_size", config.vocab_size),
        (FSDP, fsdp, "hidden_size", config.hidden_size),
    ]
    for axis, size, name, dimension in spread:
        if dimension % size:
            raise InputError(f"mesh.{axis}", size, f"does not divide the {of}'s {name} {dimension}")


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Inside, arrays are spread over `mesh`; None changes nothing. Nests."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of `tree` lie on, None when they are on single devices."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


# --- parameters ----------------------------------------------------------------------------------------------------


def partition(path: str, layout: Layout = "train") -> PartitionSpec:
    """The axes of the parameter at `path` ("model/norm/weight"); KeyError for one that the table lacks."""
    spec = _PARTITIONS[path]
    return spec if layout == "train" else P(*(None if axis == FSDP else axis for axis in spec))


def partitions(tree: Any, layout: Layout = "train") -> Any:
    """A `PartitionSpec` for every leaf of `tree`: parameters, or what an optimiser keeps in their form.

    A leaf is found by the end of its path. Scalars (counters) lie on every device. Raises ValueError for anything else
    that the table does not name, rather than leave it whole on every device.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        name = "/".join(keys)
        if name in _PARTITIONS:
            return partition(name, layout)
        if leaf.ndim == 0:
            return P()
        raise ValueError(f"no partition for {jax.tree_util.keystr(path)} of shape {leaf.shape}: add it to the table")

    return jax.tree_util.tree_map_with_path(of, tree)


def shardings(tree: Any, mesh: Mesh | None, layout: Layout = "train") -> Any:
    """A sharding for every leaf of `tree`, as `partitions`; the default device's without a mesh."""
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: single, tree)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partitions(tree, layout))


def shard_params(tree: Any, layout: Layout = "train") -> Any:
    """Inside jit: `tree` laid out as the table says."""
    if context() is None:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, partitions(tree, layout))


def replicate(tree: Any) -> Any:
    """Host arrays onto the devices, whole on each device of the context's mesh; the same in all processes."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    whole = NamedSharding(mesh, P())

    def put(x: Any) -> jax.Array:
        if mesh.is_multi_process and isinstance(x, (np.ndarray, np.generic)):
            # device_put would first compare the processes' arrays, and NaN with NaN
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, whole, lambda index: x[index])
        return jax.device_put(x, whole)

    return jax.tree.map(put, tree)


HOST_MEMORY = "pinned_host"


def offload_to_host(tree: Any) -> Any:
    """`tree` in the host memory of its devices, laid out as it is; `load_to_device` brings it back."""

    def parked(x: Any) -> Any:
        return jax.device_put(x, x.sharding.with_memory_kind(HOST_MEMORY)) if isinstance(x, jax.Array) else x

    return jax.tree.map(parked, tree)


def load_to_device(tree: Any) -> Any:
    """`tree` in its devices' own memory; what is there already is not copied."""

    def back(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.sharding.memory_kind != HOST_MEMORY:
            return x
        device = next(iter(x.sharding.addressable_devices))
        return jax.device_put(x, x.sharding.with_memory_kind(device.default_memory().kind))

    return jax.tree.map(back, tree)


# --- activations ---------------------------------------------------------------------------------------------------


def context() -> dict[str, int] | None:
    """Sizes of the axes inside `use_mesh`, None outside."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else dict(mesh.shape)


def row_shards() -> int:
    """Over how many devices rows are spread."""
    sizes = context()
    return 1 if sizes is None else sizes[DATA] * sizes[FSDP]


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes that `rows` rows are spread over: as many as divide them evenly."""
    sizes = context() or {}
    for axes in ((DATA, FSDP), (FSDP,), (DATA,)):
        size = math.prod(sizes.get(axis, 1) for axis in axes)
        if size > 1 and rows % size == 0:
            return axes
    return ()


def shard(x: jax.Array, *axes: Any) -> jax.Array:
    """`x` laid out by `axes` (None: whole); as it is outside `use_mesh`."""
    return x if context() is None else jax.lax.with_sharding_constraint(x, P(*axes))


def shard_rows(tree: Any, axis: int = 0) -> Any:
    """Every array of `tree` with its rows (dimension `axis`) spread, whole in all others."""
    if context() is None:
        return tree
    return jax.tree.map(lambda x: shard(x, *(None,) * axis, row_axes(x.shape[axis]) or None), tree)


def shard_heads(x: jax.Array, axis: int = 2) -> jax.Array:
    """`x` [B, S, heads, h], or with its heads at another `axis`: rows and heads spread, heads where they divide."""
    sizes = context()
    if sizes is None:
        return x
    axes: list[Any] = [row_axes(x.shape[0]) or None, None, None, None]
    axes[axis] = TENSOR if x.shape[axis] % sizes[TENSOR] == 0 else None
    return shard(x, *axes)


def path_name(path: Any) -> str:
    """`params/model/norm/weight` of a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
