"""Causal self-attention of full rows with the fused kernel of the platform that the program is compiled for.

Fused kernels never materialise the scores [B, H, S, S]: cuDNN's on NVIDIA GPUs, splash attention (Pallas) on TPUs.
`attend` is the fallback on other platforms and for shapes and dtypes that a kernel does not support. All three agree
within the precision of the dtype.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lsp_jax.model.attention import Segment, attend, causal_mask, to_cache_layout
from lsp_jax.model.sharding import TENSOR, P, context, row_axes

_LANES = 128  # block sizes of splash attention are multiples of this many positions
# The largest that divides the row is used: larger is faster, and 512 fits VMEM (v5e, v5p, v6e) at head size 128.
_BLOCKS = (512, 384, 256, 128)


class Kernel(Protocol):
    """A causal attention kernel for arrays on one device; returns [B, S, H, h]."""

    def __call__(self, queries_BSHh: jax.Array, keys_BSKh: jax.Array, values_BSKh: jax.Array) -> jax.Array: ...


def causal_attention(queries_BSHh: jax.Array, keys_BSKh: jax.Array, values_BSKh: jax.Array) -> jax.Array:
    """Causal attention of `queries_BSHh` over `keys_BSKh` and `values_BSKh`; returns [B, S, H, h].

    H is a multiple of K. Scores are scaled by h**-0.5; scores and softmax are float32 for any input dtype.

    To compile ahead of time for devices other than the default ones, trace inside `use_mesh` with a mesh of those
    devices, even a single one.
    """
    kernel = fused_kernel(queries_BSHh.dtype, queries_BSHh.shape[-1])
    if kernel is None:
        segment = Segment(*to_cache_layout(keys_BSKh, values_BSKh), causal_mask(queries_BSHh.shape[1]))
        return attend(queries_BSHh, (segment,))
    return _on_shards(kernel, queries_BSHh, keys_BSKh, values_BSKh)


def fused_kernel(dtype: jnp.dtype | str, width: int) -> Kernel | None:
    """Returns the platform's kernel for heads of `width` in `dtype`, None if it has none."""
    platform, dtype = _platform(), jnp.dtype(dtype)
    if platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32):
        return splash_attention
    if platform == "gpu" and dtype in (jnp.bfloat16, jnp.float16) and width <= 128 and width % 8 == 0 and _has_flash():
        return cudnn_attention
    return None


def _platform() -> str:
    """The platform of the program being traced: that of the mesh inside `use_mesh`, else of the default device.

    `jax.lax.platform_dependent` would choose at lowering, but it traces all branches, and cuDNN's cannot be traced
    without CUDA.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return getattr(device, "platform", device) or jax.default_backend()


def _has_flash() -> bool:
    """Whether all local GPUs are NVIDIA's, Ampere (8.0) or newer, as cuDNN's kernel requires; True without GPUs."""
    if jax.default_backend() != "gpu":
        return True  # compiled ahead of time, for a topology
    return all(
        "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8 for device in jax.local_devices()
    )


def _on_shards(kernel: Kernel, queries_BSHh: jax.Array, keys_BSKh: jax.Array, values_BSKh: jax.Array) -> jax.Array:
    """Runs `kernel` on each device's own rows and heads, because the compiler cannot partition a custom call."""
    sizes = context()
    if sizes is None:
        return kernel(queries_BSHh, keys_BSKh, values_BSKh)
    heads = TENSOR if keys_BSKh.shape[2] % sizes[TENSOR] == 0 else None
    spec = P(row_axes(queries_BSHh.shape[0]) or None, None, heads, None)
    # check_vma off: kernels do not declare over which axes their results vary
    return jax.shard_map(kernel, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
        queries_BSHh, keys_BSKh, values_BSKh
    )


def cudnn_attention(queries_BSHh: jax.Array, keys_BSKh: jax.Array, values_BSKh: jax.Array) -> jax.Array:
    """`causal_attention` with cuDNN's flash kernel: float16 or bfloat16, h up to 128 and a multiple of 8."""
    length = queries_BSHh.shape[1]
    # the kernel's gradient requires an even length
    queries_BSHh, keys_BSKh, values_BSKh = (_pad(x, 2) for x in (queries_BSHh, keys_BSKh, values_BSKh))
    out_BSHh = jax.nn.dot_product_attention(
        queries_BSHh, keys_BSKh, values_BSKh, is_causal=True, implementation="cudnn"
    )
    return out_BSHh[:, :length]


def splash_attention(
    queries_BSHh: jax.Array, keys_BSKh: jax.Array, values_BSKh: jax.Array, interpret: bool = False
) -> jax.Array:
    """`causal_attention` with the TPU splash kernel; `interpret` runs it on any platform, slowly, for tests."""
    # imported here: the import takes half a second and is needed on TPUs only
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads, width = queries_BSHh.shape[1:]
    # the kernel does not scale
    scaled_BSHh = (queries_BSHh.astype(jnp.float32) * width**-0.5).astype(queries_BSHh.dtype)
    heads_first = [_pad(x, _LANES).swapaxes(1, 2) for x in (scaled_BSHh, keys_BSKh, values_BSKh)]
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
    """Right-pads S of `x` [B, S, heads, h] to a multiple; causal attention never reads the padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))
