"""The mesh and the table of partitions by themselves; one whole iteration on several meshes against a single device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from lsp_jax.core.errors import InputError
from lsp_jax.learn.optimizer import OptimizerConfig, init_state
from lsp_jax.model import sharding
from lsp_jax.model.llama import params_shape
from lsp_jax.model.sharding import MeshConfig, default_sizes, make_mesh, partition, partitions, row_axes
from refusal import Refused
from test_trainer import game_dir
from tiny import tiny_config, tiny_dir

TESTS = Path(__file__).parent


def pretend(*sizes: int) -> Any:
    """A context mesh of that many devices, for what only looks at sizes."""
    return jax.sharding.use_abstract_mesh(AbstractMesh(sizes, sharding.AXES, axis_types=(AxisType.Auto,) * 3))


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "sizes"),
    [(1, (1, 1, 1)), (4, (1, 4, 1)), (8, (1, 8, 1)), (16, (1, 16, 1)), (64, (1, 16, 4)), (256, (4, 16, 4))],
)
def test_default_sizes(devices: int, sizes: tuple[int, int, int]):
    assert default_sizes(devices) == sizes
    assert MeshConfig().sizes(devices) == sizes


def test_default_sizes_fit_the_model_and_the_slices():
    assert default_sizes(64, config=tiny_config(num_key_value_heads=2)) == (2, 16, 2)
    assert default_sizes(6, config=tiny_config()) == (3, 2, 1)
    assert default_sizes(32, slices=2) == (2, 16, 1)
    for devices in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512):
        assert np.prod(default_sizes(devices, config=tiny_config())) == devices


def test_one_size_may_be_what_is_left():
    assert MeshConfig(data=2, fsdp=-1).sizes(8) == (2, 4, 1)
    assert MeshConfig(tensor=-1).sizes(8) == (1, 1, 8)
    assert MeshConfig(data=2, fsdp=2, tensor=2).sizes(8) == (2, 2, 2)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(data=3), "mesh = 'data 3, fsdp 1, tensor 1': do not divide 8 devices"),
        (MeshConfig(data=2, fsdp=2), "their product must be 8"),
        (MeshConfig(fsdp=16), "do not divide 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "only one of data, fsdp and tensor may be -1"),
        (MeshConfig(tensor=-2), r"mesh\.tensor = -2"),
    ],
)
def test_sizes_that_do_not_fit(mesh: MeshConfig, words: str):
    with pytest.raises(InputError, match=words):
        mesh.sizes(8)


def test_data_crosses_the_slices():
    with pytest.raises(InputError, match=r"mesh\.data = 1: must be a multiple of the 2 slices"):
        MeshConfig(fsdp=8).sizes(8, slices=2)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1, 1, 4), r"mesh\.tensor = 4: does not divide the model's num_key_value_heads 2"),
        ((1, 3, 1), r"mesh\.fsdp = 3: does not divide the model's hidden_size 32"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model(sizes: tuple[int, int, int], words: str):
    with pytest.raises(InputError, match=words):
        sharding.check_model(sizes, tiny_config())


def test_a_single_device_needs_no_mesh():
    assert make_mesh(MeshConfig(), tiny_config(), jax.devices()[:1]) is None


@pytest.mark.usefixtures("no_weights")
def test_a_bad_mesh_is_refused_before_the_weights(refused: Refused, train: Callable):
    refused(train("--mesh.fsdp", 3), "mesh = 'data 1, fsdp 3, tensor 1'", "do not divide 1 devices")
    refused(train("--mesh.fsdp", -3), "mesh.fsdp = -3")


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        tiny_config(head="score"),
    ],
    ids=["tied", "untied with biases", "score"],
)
def test_every_parameter_has_a_partition_that_its_shape_divides(config: Any):
    shapes = params_shape(config)
    specs = partitions(shapes)

    def check(path: Any, leaf: Any, spec: Any) -> None:
        for size, axes in zip(leaf.shape, spec, strict=False):
            assert axes is None or size % 2 == 0, (jax.tree_util.keystr(path), leaf.shape, spec)

    jax.tree_util.tree_map_with_path(check, shapes, specs)
    large = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim >= 2 and min(leaf.shape[-2:]) >= 32]
    assert large
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    for leaf, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        if leaf.ndim >= 2 and min(leaf.shape[-2:]) >= 32:
            assert {"fsdp", "tensor"} <= set(spec), (leaf.shape, spec)


def test_moments_lie_as_their_parameters_and_counters_everywhere():
    state = jax.eval_shape(lambda p: init_state(p, OptimizerConfig().spec), params_shape(tiny_config()))
    specs = partitions(state)
    wanted = specs.params["model"]["layers"]["mlp"]["down_proj"]["weight"]
    assert wanted == partition("model/layers/mlp/down_proj/weight") != jax.sharding.PartitionSpec()
    moments = [
        leaf for leaf in jax.tree.leaves(specs.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu")
    ]
    assert len(moments) == 1
    assert moments[0].mu == specs.params and moments[0].nu == specs.params
    assert specs.iteration == jax.sharding.PartitionSpec()


def test_decoding_keeps_parameters_whole_over_fsdp():
    for path in ("model/embed_tokens/weight", "model/layers/self_attn/o_proj/weight"):
        assert "fsdp" in partition(path) and "tensor" in partition(path)
        assert "fsdp" not in partition(path, "decode") and "tensor" in partition(path, "decode")


def test_what_the_table_lacks_is_an_error():
    with pytest.raises(ValueError, match=r"no partition for .*extra.* of shape \(4, 4\)"):
        partitions({"model": {"extra": {"weight": jnp.zeros((4, 4))}}})


@pytest.mark.parametrize(
    ("rows", "axes"), [(16, ("data", "fsdp")), (8, ("data", "fsdp")), (4, ("fsdp",)), (2, ("data",)), (3, ()), (1, ())]
)
def test_rows_are_spread_over_what_divides_them(rows: int, axes: tuple[str, ...]):
    with pretend(2, 4, 1):
        assert row_axes(rows) == axes
    assert row_axes(rows) == ()


def test_parked_parameters_come_back_as_they_were():
    tree = {"a": jnp.arange(6.0), "b": jnp.ones((2, 2), jnp.bfloat16)}
    parked = sharding.offload_to_host(tree)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(parked)} == {sharding.HOST_MEMORY}
    back = sharding.load_to_device(parked)
    assert [leaf.sharding for leaf in jax.tree.leaves(back)] == [leaf.sharding for leaf in jax.tree.leaves(tree)]
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    assert (
        sharding.load_to_device(sharding.offload_to_host({"n": 3, "x": np.ones(2)}))["n"] == 3
    )  # no arrays of a device: as they are
    assert (
        jax.tree.leaves(sharding.load_to_device(tree))[0].unsafe_buffer_pointer() == tree["a"].unsafe_buffer_pointer()
    )


# --- an iteration on each mesh ----------------------------------------------------------------------------------------


EVERYDAY = ["8 fsdp", "2 data x 2 fsdp x 2 tensor"]
OTHERS = ["8 data", "4 fsdp x 2 tensor"]
MESHES = [pytest.param(name, marks=pytest.mark.full) for name in EVERYDAY]
MESHES += [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


def worker(folder: Path, names: list[str]) -> dict[str, Any]:
    """What `mesh_worker.py` found on those meshes, in a process of 8 CPU devices."""
    model = game_dir(folder / "model", num_hidden_layers=2)
    reward = tiny_dir(folder / "reward", head="score", num_hidden_layers=1)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "mesh_worker.py"), str(model), str(reward), *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def everyday_meshes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker(tmp_path_factory.mktemp("mesh"), EVERYDAY)


@pytest.fixture(scope="module")
def other_meshes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker(tmp_path_factory.mktemp("mesh"), OTHERS)


@pytest.fixture
def meshes(name: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What was found on the mesh `name`, and beside it."""
    return request.getfixturevalue("everyday_meshes" if name in EVERYDAY else "other_meshes")


@pytest.mark.parametrize("name", MESHES)
def test_an_iteration_on_a_mesh_equals_that_on_one_device(name: str, meshes: dict[str, Any]):
    found = meshes[name]
    assert found["same_queries"] and found["same_answers"]
    assert found["rewards"] < 1e-4
    assert found["gradient"] < 1e-5  # of the gradient's norm, before clipping
    assert found["moved"] < 1e-5  # parameters after a step of plain gradient descent, in the same measure
    assert found["loss"] < 1e-5 and found["played_loss"] < 1e-5
    assert found["same_judgements"]
    assert found["parked"] == (name == "8 fsdp")


@pytest.mark.parametrize("name", MESHES)
def test_everything_is_really_spread(name: str, meshes: dict[str, Any]):
    found = meshes[name]
    rows = "fsdp" if name.startswith(("8 fsdp", "4 fsdp")) else "data"
    for key in ("hidden", "keys", "logits", "answers_spec"):
        assert rows in found[key], (key, found[key])
    if "tensor" in name:
        assert "tensor" in found["keys"] and "tensor" in found["logits"]
    # copies of the parameters have copies of the gradient, and a device's few rows share a prompt less
    assert found["temporaries"] < (0.7 if name == "8 data" else 0.5) * meshes["alone"]["temporaries"]


@pytest.mark.parametrize("name", MESHES)
def test_state_and_gradient_lie_as_the_table_says(name: str, meshes: dict[str, Any]):
    found = meshes[name]
    sizes = {part.split()[-1]: int(part.split()[0]) for part in name.split(" x ")}

    def plain(spec: str) -> str:
        """Without axes of one device and trailing whole dimensions, which JAX drops as it likes."""
        entries = [
            e if e in sizes else "None" for e in spec.removeprefix("P(").rstrip(")").replace("'", "").split(", ")
        ]
        while entries and entries[-1] == "None":
            entries.pop()
        return ",".join(entries)

    assert [plain(s) for s in found["state_specs"]] == [plain(s) for s in found["wanted_specs"]]
    params = len(found["gradient_specs"])
    assert [plain(s) for s in found["gradient_specs"]] == [plain(s) for s in found["wanted_specs"]][:params]
    assert not any("fsdp" in plain(spec) for spec in found["decode_specs"])


@pytest.mark.full
def test_generate_writes_the_same_on_a_mesh(everyday_meshes: dict[str, Any]):
    alone, spread = everyday_meshes["generate"]
    assert alone == spread and len(set(alone)) > 1
