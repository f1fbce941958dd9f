"""Causal attention: XLA against numpy in float64, TPU's kernel interpreted, both kernels in compiled programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, use_abstract_mesh

import lsp_jax
from lsp_jax.model import fused_attention, llama
from lsp_jax.model.attention import Segment, attend, causal_mask, to_cache_layout
from lsp_jax.model.sharding import AXES, P, shardings, use_mesh
from tiny import tiny_config

Arrays = tuple[jax.Array, jax.Array, jax.Array]
H100 = Path(lsp_jax.__file__).parent / "perf/topologies/h100_sxm.txtpb"


def inputs(rows: int, length: int, heads: int, kv_heads: int, width: int, dtype: Any = jnp.float32) -> Arrays:
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(rows, length, count, width) for count in (heads, kv_heads, kv_heads)]
    queries, keys, values = (jax.random.normal(k, shape).astype(dtype) for k, shape in zip(keys, shapes, strict=True))
    return 3 * queries, keys, values


def xla(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    return attend(queries, (Segment(*to_cache_layout(keys, values), causal_mask(queries.shape[1])),))


def interpreted(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    return fused_attention.splash_attention(queries, keys, values, interpret=True)


def exact(queries: jax.Array, keys: jax.Array, values: jax.Array) -> np.ndarray:
    """Head by head and position by position in float64, from the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (queries, keys, values))
    out = np.zeros_like(q)
    repeats = q.shape[2] // k.shape[2]
    for row, position, head in np.ndindex(q.shape[:3]):
        seen = slice(0, position + 1)
        scores = k[row, seen, head // repeats] @ q[row, position, head] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[row, position, head] = weights @ v[row, seen, head // repeats] / weights.sum()
    return out


def gradient(fn: Callable[..., jax.Array], arrays: Arrays, target: jax.Array) -> Arrays:
    return jax.jit(jax.grad(lambda *a: jnp.vdot(fn(*a).astype(jnp.float32), target), (0, 1, 2)))(*arrays)


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """Within `bound` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(4, 2), *(pytest.param(*n, marks=pytest.mark.full) for n in ((4, 4), (3, 1)))]
)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_xla_equals_the_definition(heads: int, kv_heads: int, dtype: Any, bound: float) -> None:
    arrays = inputs(2, 9, heads, kv_heads, 8, dtype)
    out = fused_attention.causal_attention(*arrays)
    assert out.dtype == dtype
    assert_close(out, exact(*arrays), bound)


@pytest.mark.full
def test_splash_equals_xla() -> None:
    """Values and gradients, with grouped queries and a row that is no whole number of blocks."""
    arrays = inputs(2, 150, 4, 2, 16)
    target = jax.random.normal(jax.random.key(0), arrays[0].shape)
    assert_close(jax.jit(interpreted)(*arrays), xla(*arrays), 2e-6)
    for actual, expected in zip(gradient(interpreted, arrays, target), gradient(xla, arrays, target), strict=True):
        assert_close(actual, expected, 5e-6)


@pytest.mark.full
def test_splash_equals_the_definition_in_bfloat16() -> None:
    arrays = inputs(1, 40, 2, 1, 128, jnp.bfloat16)
    assert_close(jax.jit(interpreted)(*arrays), exact(*arrays), 1e-2)


@pytest.mark.full
def test_splash_on_each_devices_rows_and_heads() -> None:
    """On fsdp 2 x tensor 2 the kernel sees its own part of rows and heads only; results and gradients are whole."""
    script = Path(__file__).with_name("mesh_attention.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(done.stdout)
    assert found["seen"] == [[2, 20, 2, 8], [2, 20, 1, 8], [2, 20, 1, 8]]
    assert max(found["errors"]) < 5e-6
    assert "fsdp" in found["spec"] and "tensor" in found["spec"]


# --- which kernel ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "dtype", "width", "expected"),
    [
        ("tpu", jnp.bfloat16, 64, fused_attention.splash_attention),
        ("tpu", jnp.float32, 12, fused_attention.splash_attention),
        ("tpu", jnp.float16, 64, None),
        ("gpu", jnp.bfloat16, 128, fused_attention.cudnn_attention),
        ("gpu", jnp.float16, 8, fused_attention.cudnn_attention),
        ("gpu", jnp.bfloat16, 12, None),
        ("gpu", jnp.bfloat16, 136, None),
        ("gpu", jnp.float32, 64, None),
        ("cpu", jnp.bfloat16, 64, None),
    ],
)
def test_the_kernel_is_that_of_the_mesh(platform: str, dtype: Any, width: int, expected: Any) -> None:
    """Of its devices, one or many, whatever runs the compiler; the rest is XLA's."""
    device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    assert fused_attention.fused_kernel(dtype, width) is None
    with use_abstract_mesh(AbstractMesh((1, 1, 1), AXES, abstract_device=device)):
        assert fused_attention.fused_kernel(dtype, width) is expected


# --- compiled for devices that are not here ------------------------------------------------------------------------


def tpu_devices() -> Any:
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'lsp-jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask here
    return get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices


def gpu_devices() -> Any:
    if find_spec("jax_cuda13_plugin") is None:
        pytest.skip("jax's CUDA plugin is not installed: pip install 'lsp-jax[cuda]'")
    return get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x4", target_config=H100.read_text()
    ).devices


def compiled_gradient(devices: Any, remat: bool) -> str:
    """The HLO of a tiny bfloat16 model's value and gradient, a scan of two layers, on fsdp 2 x tensor 2."""
    mesh = Mesh(np.asarray(devices).reshape(1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    config = tiny_config()
    shapes = llama.params_shape(config)
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )
    tokens = jax.ShapeDtypeStruct((4, 77), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))

    def loss(params: llama.Params, tokens: jax.Array) -> jax.Array:
        return jnp.sum(llama.hidden_states(params, config, tokens).astype(jnp.float32) ** 2)

    with use_mesh(mesh):
        fn = jax.checkpoint(loss) if remat else loss
        return jax.jit(jax.value_and_grad(fn)).lower(params, tokens).compile().as_text()


@pytest.mark.full
@pytest.mark.parametrize("remat", [False, True])
def test_tpu_programs_hold_the_splash_kernel(remat: bool) -> None:
    text = compiled_gradient(tpu_devices(), remat)
    assert "tpu_custom_call" in text
    assert all(kernel in text for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"))


@pytest.mark.full
def test_gpu_programs_hold_the_cudnn_kernel() -> None:
    text = compiled_gradient(gpu_devices(), remat=True)
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
