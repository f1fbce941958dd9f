"""Checksums of arrays, computed on device, to find arrays that are restored with other values than were saved.

Orbax does not detect a flipped byte. The checksum of an array is the sum of its elements' bit patterns (the upper half
folded into the lower), each times an odd weight derived from its position, modulo 2^32. A sum does not depend on the
order, so it is the same on every mesh; an odd weight is invertible, so changing one element changes the checksum.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lsp_jax.core import runtime
from lsp_jax.model.sharding import path_name

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
Manifest = dict[str, dict[str, Any]]
"""Maps the path of each array to its `shape`, `dtype` and `checksum`."""


def checksum(x: jax.Array) -> jax.Array:
    """Returns the checksum (uint32) of an array with elements of at most four bytes."""
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # mixed, because with evenly spaced weights the sum might not change when two elements are exchanged
    weight = (index + 1) * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0x85EBCA77)
    weight = (weight ^ (weight >> 13)) | 1
    bits = bits.astype(jnp.uint32)
    # an odd weight times the highest bit is that bit again, so two flipped signs would cancel without the fold
    return jnp.sum((bits ^ (bits >> 16)) * weight, dtype=jnp.uint32)


@partial(jax.jit, static_argnames="dtype")
def _checksums(leaves: list[jax.Array], dtype: str | None) -> list[jax.Array]:
    return [checksum(leaf if dtype is None else leaf.astype(dtype)) for leaf in leaves]


def manifest(tree: Any, dtype: str | None = None) -> Manifest:
    """Returns shape, dtype and checksum of every array of `tree` by its path (`params/model/norm/weight`).

    With a `dtype`, the checksums are those of the arrays cast to it; no cast copy is kept. All checksums are read from
    the device at once. With several processes all must call this together.
    """
    paths, leaves = zip(*jax.tree.leaves_with_path(tree), strict=True)
    sums = runtime.to_host(_checksums(list(leaves), dtype))
    return {
        path_name(path): {"shape": list(leaf.shape), "dtype": dtype or leaf.dtype.name, "checksum": int(value)}
        for path, leaf, value in zip(paths, leaves, sums, strict=True)
    }


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Returns the names of arrays whose entries differ or are missing in one of the two, in the order of `left`."""
    return [name for name in dict.fromkeys((*left, *right)) if left.get(name) != right.get(name)]
