"""A checksum sees every bit of every array, and where it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.checkpoint.checksums import checksum, differing, manifest

DTYPES = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16, "int32": np.uint32, "int8": np.uint8}


def by_hand(x: np.ndarray) -> int:
    """In Python's integers, one element after the other."""
    total = 0
    for index, bits in enumerate(x.ravel().view(DTYPES[x.dtype.name]).tolist()):
        weight = (index + 1) * 0x9E3779B1 % 2**32
        weight = (weight ^ (weight >> 15)) * 0x85EBCA77 % 2**32
        total += (bits ^ (bits >> 16)) * ((weight ^ (weight >> 13)) | 1)
    return total % 2**32


def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    drawn = 40 * np.random.default_rng(len(shape)).normal(size=shape)
    return np.asarray(jnp.asarray(drawn).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4), (0, 4)], ids=str)
def test_checksum_by_hand(shape: tuple[int, ...], dtype: str) -> None:
    x = values(shape, dtype)
    assert int(checksum(jnp.asarray(x))) == by_hand(x)


def test_any_flipped_bit_and_any_exchange_shows() -> None:
    x = values((4, 6), "float32")
    right, bytes_of = by_hand(x), x.tobytes()
    flipped = []
    for bit in range(8 * len(bytes_of)):
        changed = bytearray(bytes_of)
        changed[bit // 8] ^= 1 << bit % 8
        flipped.append(np.frombuffer(changed, np.float32).reshape(x.shape))
    sums = np.asarray(jax.vmap(checksum)(jnp.asarray(np.stack(flipped))))
    assert (sums != right).all() and len(sums) == 768
    for left in range(24):
        for other in range(left):
            swapped = x.ravel().copy()
            swapped[[left, other]] = swapped[[other, left]]
            assert by_hand(swapped.reshape(x.shape)) != right
    assert int(checksum(jnp.asarray(x.T))) != right and int(checksum(jnp.asarray(x.ravel()))) == right
    zeros = np.zeros(4, np.float32)
    assert int(checksum(jnp.asarray(-zeros))) != int(checksum(jnp.asarray(zeros))), "four signs must not cancel"
    assert int(checksum(jnp.asarray(-x))) != right


def test_manifest_names_what_differs() -> None:
    tree: dict[str, Any] = {"a": {"w": jnp.ones((2, 3))}, "n": (jnp.zeros((), jnp.int32), jnp.array([True, False]))}
    saved = manifest(tree)
    assert list(saved) == ["a/w", "n/0", "n/1"]
    assert saved["a/w"] == {"shape": [2, 3], "dtype": "float32", "checksum": by_hand(np.ones((2, 3), np.float32))}
    tree["n"] = (tree["n"][0] + 1, tree["n"][1])
    assert differing(saved, manifest(tree)) == ["n/0"]
    assert differing(saved, {"a/w": saved["a/w"], "b": {}}) == ["n/0", "n/1", "b"]
