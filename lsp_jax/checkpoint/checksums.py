"""Checksums of arrays on device: what was saved is what was restored, or the array that is not is named.

Orbax restores a flipped byte without a word. An array's checksum is the sum of its elements' bit patterns (the upper
half folded into the lower), each times an odd weight of its position, modulo 2^32. A sum has no order, so it is the
same on every mesh; an odd weight loses no bit, so any change of one element changes it.
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
"""Of each array by its path: `shape`, `dtype`, `checksum`."""


def checksum(x: jax.Array) -> jax.Array:
    """uint32 of an array with elements of at most four bytes."""
    bits = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize])
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # mixed, since with weights that grow evenly two exchanged elements might leave the sum as it was
    weight = (index + 1) * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0x85EBCA77)
    weight = (weight ^ (weight >> 13)) | 1
    bits = bits.astype(jnp.uint32)
    # any odd weight times the highest bit is that bit again: the flips of two signs would cancel
    return jnp.sum((bits ^ (bits >> 16)) * weight, dtype=jnp.uint32)


@partial(jax.jit, static_argnames="dtype")
def _checksums(leaves: list[jax.Array], dtype: str | None) -> list[jax.Array]:
    return [checksum(leaf if dtype is None else leaf.astype(dtype)) for leaf in leaves]


def manifest(tree: Any, dtype: str | None = None) -> Manifest:
    """Every array of `tree` by its path (`params/model/norm/weight`), with its checksum, read from the device at once:
    as it is, or as it would be in `dtype`, without a copy.

    With several processes all must call it together.
    """
    paths, leaves = zip(*jax.tree.leaves_with_path(tree), strict=True)
    sums = runtime.to_host(_checksums(list(leaves), dtype))
    return {
        path_name(path): {"shape": list(leaf.shape), "dtype": dtype or leaf.dtype.name, "checksum": int(value)}
        for path, leaf, value in zip(paths, leaves, sums, strict=True)
    }


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of the arrays that the two do not have alike, in the order of `left`."""
    return [name for name in dict.fromkeys((*left, *right)) if left.get(name) != right.get(name)]
