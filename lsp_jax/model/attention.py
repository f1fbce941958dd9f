"""Attention over one or more segments of keys under a single softmax.

A `Segment` is any set of keys: a training row's own keys (causal), a prompt's keys shared by the G answers that
continue it, the judge's rubric shared by all rows, the generated keys of a decode loop. A segment with N rows serves
B = N * G query rows, its row n the rows n*G .. (n+1)*G - 1, so that shared keys are stored, read and multiplied once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsp_jax.model.sharding import TENSOR, P, context, row_axes


class Segment(NamedTuple):
    """Keys and values with their attention mask.

    Each head is one matrix, in the memory layout of the matrix product that reads it, which dominates a decode step.
    """

    keys: jax.Array
    """[N, K, h, P], rotated."""
    values: jax.Array
    """[N, K, P, h]."""
    mask: jax.Array
    """bool, broadcastable to [N, 1, S, P]: True where query position s may attend to key p."""


def to_cache_layout(keys_BSKh: jax.Array, values_BSKh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, S, K, h], the layout of projections, -> [B, K, h, S] and [B, K, S, h], the layout of segments and caches."""
    return keys_BSKh.transpose(0, 2, 3, 1), values_BSKh.swapaxes(1, 2)


def causal_mask(length: int) -> jax.Array:
    """bool [1, 1, length, length]: position s attends to positions up to s."""
    positions = jnp.arange(length)
    return (positions[None, :] <= positions[:, None])[None, None]


def length_mask(lengths_N: jax.Array, width: int) -> jax.Array:
    """bool [N, 1, 1, width]: True for the first `lengths_N` keys."""
    return (jnp.arange(width)[None, :] < lengths_N[:, None])[:, None, None, :]


def attend(queries_BSHh: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Grouped-query attention of `queries_BSHh` over all `segments` jointly; returns [B, S, H, h].

    Scores and softmax are float32 for any input dtype. B must be a multiple of every segment's N, and H of its K. A
    fully masked query (a padded position) gets a finite, meaningless row. On a mesh every device computes its own rows
    and heads.
    """
    sizes = context()
    if sizes is None:
        return _attend(queries_BSHh, segments)
    rows = row_axes(queries_BSHh.shape[0]) or None
    shards = math.prod(sizes[axis] for axis in rows or ())
    heads = TENSOR if segments[0].keys.shape[1] % sizes[TENSOR] == 0 else None
    query_spec = P(rows, None, heads, None)
    sharded = [segment.keys.shape[0] % shards == 0 for segment in segments]
    specs = []
    for segment, split in zip(segments, sharded, strict=True):
        keys: Any = P(rows if split else None, heads, None, None)
        mask: Any = P(rows if split and len(segment.mask) > 1 else None)
        specs.append(Segment(keys, keys, mask))

    def local(queries_BSHh: jax.Array, segments: Sequence[Segment]) -> jax.Array:
        if rows is not None:
            first = jax.lax.axis_index(rows) * queries_BSHh.shape[0]
            segments = [
                segment if split else _rows_of(segment, first, queries_BSHh.shape[0], queries_BSHh.shape[0] * shards)
                for segment, split in zip(segments, sharded, strict=True)
            ]
        return _attend(queries_BSHh, segments)

    # the compiler does not see that query rows and segment rows align, and would move the scores between devices
    attended = jax.shard_map(local, in_specs=(query_spec, specs), out_specs=query_spec, check_vma=False)
    return attended(queries_BSHh, list(segments))


def _rows_of(segment: Segment, first: jax.Array, number: int, batch: int) -> Segment:
    """The rows of a replicated segment for the query rows `first` .. `first + number - 1` of `batch`."""
    rows = segment.keys.shape[0]
    if rows == 1:
        return segment
    group = batch // rows
    # one segment row if all of the device's query rows share it, else one per query row
    index = first // group + jnp.arange(1) if group % number == 0 else (first + jnp.arange(number)) // group
    mask = segment.mask[index] if len(segment.mask) > 1 else segment.mask
    return Segment(segment.keys[index], segment.values[index], mask)


def _attend(queries_BSHh: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """Attention on one device: for each segment row and kv head the scores are one product, [G*R*S, h] x [h, P].

    The softmax is combined from per-segment sums, because concatenating scores or keys would cost a decode step more
    than its matrix products.
    """
    batch, length, heads, width = queries_BSHh.shape
    kv_heads = segments[0].keys.shape[1]
    repeats = heads // kv_heads
    scale = width**-0.5
    queries_BKRSh = queries_BSHh.reshape(batch, length, kv_heads, repeats, width).transpose(0, 2, 3, 1, 4)

    def by_group(x: jax.Array, rows: int) -> jax.Array:
        """[B, K, ...] -> [N, K, G, ...]: grouped by segment row."""
        return x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2)

    def by_row(x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2).reshape(batch, kv_heads, *x.shape[3:])

    scores = []
    for segment in segments:
        grouped_NKGRSh = by_group(queries_BKRSh, len(segment.keys))
        score_NKGRSP = jnp.einsum(
            "nkgrsh,nkhp->nkgrsp", grouped_NKGRSh, segment.keys, preferred_element_type=jnp.float32
        )
        scores.append(jnp.where(segment.mask[:, :, None, None], score_NKGRSP * scale, jnp.finfo(jnp.float32).min))
    # softmax is invariant to the shift: subtracting the maximum keeps it finite and needs no gradient
    highest = [by_row(jnp.max(jax.lax.stop_gradient(score_NKGRSP), axis=-1)) for score_NKGRSP in scores]
    shift_BKRS = reduce(jnp.maximum, highest)
    out_BKRSh = jnp.zeros(queries_BKRSh.shape, jnp.float32)
    total_BKRS = jnp.zeros(queries_BKRSh.shape[:-1], jnp.float32)
    for segment, score_NKGRSP in zip(segments, scores, strict=True):
        weights_NKGRSP = jnp.exp(score_NKGRSP - by_group(shift_BKRS, len(segment.keys))[..., None])
        total_BKRS = total_BKRS + by_row(jnp.sum(weights_NKGRSP, axis=-1))
        weights_NKGRSP = weights_NKGRSP.astype(segment.values.dtype)
        value_NKGRSh = jnp.einsum(
            "nkgrsp,nkph->nkgrsh", weights_NKGRSP, segment.values, preferred_element_type=jnp.float32
        )
        out_BKRSh = out_BKRSh + by_row(value_NKGRSh)
    out_BSKRh = (out_BKRSh / total_BKRS[..., None]).transpose(0, 3, 1, 2, 4)
    return out_BSKRh.reshape(queries_BSHh.shape).astype(queries_BSHh.dtype)
