"""Causal attention of whole rows, by the fused kernel of the platform that the program is compiled for.

The learner's and the reference's pass attends every row to itself and to nothing else, which fused kernels do without
ever holding the scores [B, H, S, S]: cuDNN's on NVIDIA GPUs, splash attention (Pallas) on TPUs. XLA's `attend` does it
everywhere else, and for what a kernel does not take. All three compute the same numbers within the dtype's precision.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lsp_jax.model.attention import Segment, as_held, attend, causal_mask
from lsp_jax.model.sharding import TENSOR, P, context, row_axes

_LANES = 128  # splash attention works on blocks of a multiple of this many positions
# Of these the largest that divides the row: larger is faster, and 512 fits the VMEM of v5e, v5p and v6e at 128 a head.
_BLOCKS = (512, 384, 256, 128)


class Kernel(Protocol):
    """queries [B, S, H, h], keys and values [B, S, K, h] -> [B, S, H, h], all on one device."""

    def __call__(self, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array: ...


def causal_attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Position s of `queries` [B, S, H, h] over positions up to s of `keys` and `values` [B, S, K, h]: [B, S, H, h].

    H is a multiple of K. Scores are scaled by h**-0.5; scores and softmax are float32 whatever the inputs are.

    To compile ahead of time for devices other than the default ones, trace inside `use_mesh` of a mesh of those
    devices, of a single one too.
    """
    kernel = fused_kernel(queries.dtype, queries.shape[-1])
    if kernel is None:
        return attend(queries, (Segment(*as_held(keys, values), causal_mask(queries.shape[1])),))
    return _on_shards(kernel, queries, keys, values)


def fused_kernel(dtype: jnp.dtype | str, width: int) -> Kernel | None:
    """The platform's kernel for heads of `width` in `dtype`, None where there is none that takes them."""
    platform, dtype = _platform(), jnp.dtype(dtype)
    if platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return splash_attention
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and width <= 128 and width % 8 == 0 and _has_flash():
        return cudnn_attention
    return None


def _platform() -> str:
    """The platform of the program being traced: the mesh's devices inside `use_mesh`, the default device outside.

    `jax.lax.platform_dependent` would choose later still, at lowering, and lowers only the branch it chooses; but it
    traces all of them, and cuDNN's refuses to be traced where CUDA is not installed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(device, "platform", device) or jax.default_backend()


def _has_flash() -> bool:
    """Whether the GPUs at hand are NVIDIA's from Ampere (8.0) on, which cuDNN's kernel needs; True without any."""
    if jax.default_backend() != "gpu":
        return True  # compiled ahead of time, for a topology
    return all(
        "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8 for device in jax.local_devices()
    )


def _on_shards(kernel: Kernel, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """`kernel` on every device's own rows and heads: the compiler cannot split a custom call itself."""
    sizes = context()
    if sizes is None:
        return kernel(queries, keys, values)
    heads = TENSOR if keys.shape[2] % sizes[TENSOR] == 0 else None
    spec = P(row_axes(queries.shape[0]) or None, None, heads, None)
    # without check_vma: kernels do not declare over which axes their results differ
    return jax.shard_map(kernel, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(queries, keys, values)


def cudnn_attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """`causal_attention` by cuDNN's flash kernel: float16 or bfloat16, h up to 128 and a multiple of 8."""
    length = queries.shape[1]
    queries, keys, values = (_pad(x, 2) for x in (queries, keys, values))  # its gradient takes no odd length
    out = jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")
    return out[:, :length]


def splash_attention(queries: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool = False) -> jax.Array:
    """`causal_attention` by TPU's splash kernel; `interpret` runs it on any platform, slowly, for tests."""
    # imported here: half a second that only TPUs need to spend
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads, width = queries.shape[1:]
    scaled = (queries.astype(jnp.float32) * width**-0.5).astype(queries.dtype)  # the kernel does not scale
    heads_first = [_pad(x, _LANES).swapaxes(1, 2) for x in (scaled, keys, values)]
    padded = heads_first[0].shape[2]
    block = next(size for size in _BLOCKS if padded % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((padded, padded))] * heads)
    kernel: Any = splash_attention_kernel.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)[:, :length]


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """`x` [B, S, heads, h] with S padded on the right to a multiple: what stands behind a position never reaches it."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
