"""The TPU's kernel, interpreted, on the rows and heads of 4 CPU devices: `python tests/mesh_attention.py`.

Prints one JSON object: the shapes that the kernel saw, and how far values and gradients are from a single device's.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 4)

from lsp_jax.model import fused_attention  # noqa: E402
from lsp_jax.model.sharding import MeshConfig, make_mesh, use_mesh  # noqa: E402
from test_attention import gradient, inputs, interpreted, xla  # noqa: E402


def main() -> None:
    arrays = inputs(rows=4, length=20, heads=4, kv_heads=2, width=8)
    target = jax.random.normal(jax.random.key(0), arrays[0].shape)
    expected = (xla(*arrays), *gradient(xla, arrays, target))
    seen = []

    def kernel(*parts: jax.Array) -> jax.Array:
        seen.append([part.shape for part in parts])
        return interpreted(*parts)

    vars(fused_attention)["fused_kernel"] = lambda dtype, width: kernel
    with use_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2))):
        actual = (
            jax.jit(fused_attention.causal_attention)(*arrays),
            *gradient(fused_attention.causal_attention, arrays, target),
        )

    def distance(a: Any, b: Any) -> float:
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())

    errors = [distance(a, b) for a, b in zip(actual, expected, strict=True)]
    print(json.dumps({"seen": seen[0], "errors": errors, "spec": str(actual[0].sharding.spec)}))


if __name__ == "__main__":
    main()
