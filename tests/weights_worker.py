"""What the tests of sharded weights run in processes of their own, since a process chooses its devices once.

python weights_worker.py checks DIR                 8 devices: every one of `CHECKS`, as JSON {name: failure or ""}
python weights_worker.py shared DIR PORT INDEX      process INDEX of 2 with 4 devices each: loads and exports
python weights_worker.py memory DIR DEVICES DTYPE   one load and one export, step by step
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lsp_jax.core.errors import InputError
from lsp_jax.model import weight_files, weights
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import Layout, MeshConfig, make_mesh, partitions, shard_params, use_mesh
from lsp_jax.policy import load_pretrained, save_pretrained

MESHES = {"fsdp": (1, 8, 1), "fsdp x tensor": (1, 4, 2), "all three": (2, 2, 2), "copies": (8, 1, 1)}
MODELS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "score": {"head": "score"},
}
"""Fields of the `tiny_config`s whose directories the tests make before, in float32 and (`-bfloat16`) in bfloat16."""


def mesh_of_sizes(name: str) -> Mesh:
    mesh = make_mesh(MeshConfig(*MESHES[name]))
    assert mesh is not None
    return mesh


def load(directory: Path, dtype: str = "float32", mesh: Mesh | None = None, layout: Layout = "train") -> Params:
    return weights.load_params(directory, weights.read_config(directory), dtype, mesh, layout)


def check_placed(params: Params, whole: Params, mesh: Mesh, layout: Layout) -> None:
    """Every leaf lies as the table says, and every device holds its part of `whole` and no more."""

    def check(leaf: jax.Array, expected: jax.Array, spec: Any) -> None:
        sharding = NamedSharding(mesh, spec)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim) and leaf.committed, (leaf.sharding, sharding)
        assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
        for part in leaf.addressable_shards:
            assert part.data.shape == sharding.shard_shape(leaf.shape)
            assert part.data.devices() == {part.device}
            np.testing.assert_array_equal(np.asarray(part.data), np.asarray(expected)[part.index])

    jax.tree.map(check, params, whole, partitions(whole, layout))


@contextmanager
def reads() -> Iterator[list[tuple[str, int]]]:
    """Lists (tensor, elements) of every read from the files of weights opened inside."""
    found: list[tuple[str, int]] = []
    opened = weight_files._open

    class Slice:
        def __init__(self, name: str, stored: Any):
            self.name, self.get_shape, self.get_dtype, self.stored = name, stored.get_shape, stored.get_dtype, stored

        def __getitem__(self, index: Any) -> np.ndarray:
            value = self.stored[index]
            found.append((self.name, value.size))
            return value

    class Handle:
        def __init__(self, handle: Any):
            self.handle, self.keys = handle, handle.keys

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.handle.get_slice(name))

        def __enter__(self) -> Handle:
            return self

        def __exit__(self, *error: Any) -> None:
            self.handle.__exit__(*error)

    weight_files._open = lambda path: Handle(opened(path))
    try:
        yield found
    finally:
        weight_files._open = opened


# --- 8 devices in one process ------------------------------------------------------------------------------------


def loaded_as_whole(base: Path, model: str, dtype: str) -> None:
    """From float32 and bfloat16 files, on every mesh and in both layouts."""
    for stored in (model, f"{model}-bfloat16"):
        whole = load(base / stored, dtype)
        for name in MESHES:
            for layout in ("train", "decode"):
                mesh = mesh_of_sizes(name)
                check_placed(load(base / stored, dtype, mesh, layout), whole, mesh, layout)


def only_slices_are_read(base: Path) -> None:
    """Every element once, whoever holds copies; never a whole matrix where the mesh splits it."""
    total = sum(leaf.size for leaf in jax.tree.leaves(load(base / "untied")))
    parts = {"fsdp": 8, "fsdp x tensor": 8, "all three": 4, "copies": 1}
    for name, split in parts.items():
        with reads() as found:
            load(base / "untied", mesh=mesh_of_sizes(name))
        assert sum(size for _, size in found) == total
        matrices = {size for tensor, size in found if "q_proj" in tensor}
        assert matrices == {32 * 32 // split}, (name, matrices)
        assert {size for tensor, size in found if "embed" in tensor} == {296 * 32 // split}
    with reads() as found:
        load(base / "untied", mesh=mesh_of_sizes("fsdp x tensor"), layout="decode")
    assert sum(size for _, size in found) == total
    assert {size for tensor, size in found if "q_proj" in tensor} == {32 * 32 // 2}


def exported_as_whole(base: Path) -> None:
    """Byte for byte what is exported from one device, in one file and in several."""
    files = {"dtype": "bfloat16", "max_shard_bytes": 10_000}
    cases = [("biases", "fsdp", {}), ("biases", "all three", files), ("score", "fsdp x tensor", files)]
    for number, (model, mesh, options) in enumerate(cases):
        config, out = weights.read_config(base / model), base / "exports" / str(number)
        weights.save_params(load(base / model), config, out / "whole", **options)
        weights.save_params(load(base / model, mesh=mesh_of_sizes(mesh)), config, out / "sharded", **options)
        same_files(out / "sharded", out / "whole")
        assert len(list((out / "whole").glob("model-*"))) > 3 or not options


def same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir()) and "config.json" in names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def copies_may_be_donated(base: Path) -> None:
    """On the CPU copies share the memory that was read into: a donating step spoils none of them."""
    mesh, whole = mesh_of_sizes("copies"), load(base / "tied")
    with use_mesh(mesh):
        params = load(base / "tied", mesh=mesh)
        for _ in range(3):
            params = jax.jit(lambda tree: shard_params(jax.tree.map(lambda leaf: leaf + 1, tree)), donate_argnums=0)(
                params
            )
    check_placed(params, jax.tree.map(lambda leaf: leaf + 1 + 1 + 1, whole), mesh, "train")


def refused(base: Path) -> None:
    """Before any tensor is read: a mesh that does not divide the model, one of other axes, a damaged file."""
    foreign = Mesh(np.asarray(jax.devices()), ("model",))
    too_many = make_mesh(MeshConfig(fsdp=2, tensor=4))
    cut = base / "cut"
    cut.mkdir()
    for file in (base / "tied").iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: -8 if file.suffix == ".safetensors" else None])
    cases = [
        (base / "tied", too_many, ("mesh.tensor", "num_key_value_heads 2")),
        (base / "tied", foreign, ("mesh", "make_mesh")),
        (cut, mesh_of_sizes("fsdp"), ("model.safetensors", "damaged or truncated")),
    ]
    for directory, mesh, words in cases:
        with reads() as found:
            try:
                load(directory, mesh=mesh)
            except InputError as error:
                message = str(error)
            else:
                raise AssertionError(f"not refused: {words}")
        assert not found and all(word in message for word in words), message


def a_head_of_its_own_is_sharded(base: Path) -> None:
    """Beside a flag that ties it: placed as that of the untied model."""
    whole = load(base / "untied")
    for name in MESHES:
        mesh = mesh_of_sizes(name)
        check_placed(load(base / "flagged", mesh=mesh), whole, mesh, "train")


CHECKS: dict[str, tuple[Any, ...]] = {
    **{
        f"{model} in {dtype}": (loaded_as_whole, model, dtype)
        for model in MODELS
        for dtype in ("float32", "bfloat16", "float16")
    },
    **{check.__name__: (check,) for check in (only_slices_are_read, exported_as_whole)},
    **{check.__name__: (check,) for check in (copies_may_be_donated, refused, a_head_of_its_own_is_sharded)},
}


def run_checks(base: Path) -> dict[str, str]:
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    results = {}
    for name, (check, *arguments) in CHECKS.items():
        try:
            check(base, *arguments)
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


# --- two processes -----------------------------------------------------------------------------------------------


def run_shared(base: Path, port: int, index: int) -> dict[str, Any]:
    """Loads over 2 x 4 devices and exports; what this process read and where its parts lie."""
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = make_mesh(MeshConfig(fsdp=8))
    assert mesh is not None and mesh.is_multi_process
    with reads() as found:
        policy = load_pretrained(base / "untied", mesh=mesh)
    for params in (policy.params, load(base / "flagged", mesh=mesh)):
        check_placed(params, load(base / "untied"), mesh, "train")
    save_pretrained(policy, base / f"exported-{index}", "bfloat16")
    matrices = sum(size for tensor, size in found if "q_proj" in tensor)
    return {"parts": sorted({size for name, size in found if "q_proj" in name}), "matrices": matrices}


# --- memory ------------------------------------------------------------------------------------------------------


def run_memory(directory: Path, devices: int, dtype: str) -> None:
    """Loads onto `devices` devices and exports. Before each step it says what it has and waits for a line."""
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(MeshConfig(fsdp=devices))
    config = weights.read_config(directory)

    def say(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)
        sys.stdin.readline()

    jax.block_until_ready(jnp.zeros(1) + 1)
    say()
    started = time.perf_counter()
    params = weights.load_params(directory, config, dtype, mesh)
    seconds = time.perf_counter() - started
    leaves = jax.tree.leaves(params)
    held = [sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves) for i in range(devices)]
    say(bytes=sum(leaf.nbytes for leaf in leaves), held=held, seconds=seconds)
    weights.save_params(params, config, directory / "exported")
    say()


if __name__ == "__main__":
    what, where, *more = sys.argv[1:]
    if what == "checks":
        print(json.dumps(run_checks(Path(where))))
    elif what == "shared":
        print(json.dumps(run_shared(Path(where), int(more[0]), int(more[1]))))
    else:
        run_memory(Path(where), int(more[0]), more[1])
