"""Machines that are not at hand: devices to compile for, by name, and what their makers publish of the chips.

1. TPU slices as `v5e:4x4` (chips along each axis), through libtpu.
2. NVIDIA GPUs of one host as `h100:8`, through JAX's CUDA plugin and a description of the device (`topologies/`).

Both compile on a machine with neither. Nothing here starts a backend other than the one that JAX has.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from lsp_jax.core.errors import InputError

GIB = 2**30
_DESCRIPTIONS = Path(__file__).with_name("topologies")
_PLUGIN = {"tpu": ("libtpu", "plan"), "cuda": ("jax_cuda13_plugin", "plan-gpu")}

EXAMPLES = "v5e:4x4, v6e:4x4, v5p:2x2x2, h100:8, h200:8"
_COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask Google's metadata server which machine this is,
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # and do not complain that it was not said; what is compiled for is named
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so others may compile at the same time
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Environment variables that libtpu reads when it is loaded."""


@dataclass(frozen=True)
class Chip:
    """One chip's published peak figures."""

    name: str
    platform: str
    """tpu or cuda."""
    flops: float
    """bfloat16 operations a second with dense matrices."""
    memory: int
    """Bytes of HBM that a program can have."""
    bandwidth: float
    """Bytes a second between HBM and the chip."""
    network: float
    """Bytes a second into the chip from others of its slice or host: half of a figure published for both directions."""
    compiler: str
    """The chip in the compiler's words: a TPU's name, or the file that describes a GPU."""


# TPU: cloud.google.com/tpu/docs/v5e, /v6e, /v5p (system architecture). Memory is published in GB and is GiB; 0.25 GiB
# of it are not a program's, as the compiler's own limit (15.75 GiB on v5e) shows.
# GPU: nvidia.com/en-us/data-center/h100 and /h200 (SXM; tensor-core figures halved, theirs are with sparsity).
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, int(15.75 * GIB), 819e9, 400e9 / 2, "v5e"),
        Chip("v6e", "tpu", 918e12, int(31.75 * GIB), 1638e9, 800e9 / 2, "v6e"),
        Chip("v5p", "tpu", 459e12, int(94.75 * GIB), 2765e9, 1200e9 / 2, "v5p"),
        Chip("h100", "cuda", 989.5e12, 84978434048, 3.35e12, 900e9 / 2, "h100_sxm.txtpb"),
        Chip("h200", "cuda", 989.5e12, 141 * 10**9, 4.8e12, 900e9 / 2, "h200_sxm.txtpb"),
    )
}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    chip: Chip
    devices: Sequence[Any]
    """As `jax.devices()` gives them where the machine is."""

    @property
    def compiler(self) -> str:
        """The package that compiles for it."""
        return _PLUGIN[self.chip.platform][0].replace("_", "-")


def open_topology(name: str) -> Topology:
    """The machine `name`: `v5e:4x4`, `v5p:2x2x2`, `h100:1`, `h100:8`, ...

    Raises InputError for a name that is none of these, a shape that the maker does not sell, and a compiler that is not
    installed, saying which extra brings it.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", shape):
        raise InputError("topology", name, f"must be a chip and its number or grid, as in {EXAMPLES}")
    package, extra = _PLUGIN[chip.platform]
    if importlib.util.find_spec(package) is None:
        raise InputError("topology", name, f"its compiler is not installed: pip install 'lsp-jax[{extra}]'")
    if chip.platform == "cuda" and "x" in shape:
        raise InputError("topology", name, f"must be a number of GPUs in one host, as in {kind}:8")
    try:
        devices = _tpu(chip, shape) if chip.platform == "tpu" else _gpu(chip, int(shape))
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            "topology", name, f"is no machine that its compiler knows: {str(error).splitlines()[0]}"
        ) from None
    return Topology(name, chip, devices)


def _tpu(chip: Chip, shape: str) -> Sequence[Any]:
    for variable, value in _COMPILE_ONLY.items():
        os.environ.setdefault(variable, value)
    name = f"{chip.compiler}:{shape}"
    return topologies.get_topology_desc(topology_name=name, platform="tpu").devices


def _gpu(chip: Chip, number: int) -> Sequence[Any]:
    described = (_DESCRIPTIONS / chip.compiler).read_text(encoding="utf-8")
    grid = f"1x1x{number}"  # hosts x processes x devices
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=chip.name, topology=grid, target_config=described
    )
    return found.devices
