"""Target hardware by name: devices to compile for, and the published figures of their chips.

1. TPU slices as `v5e:4x4` (chips along each axis), through libtpu.
2. NVIDIA GPUs of one host as `h100:8`, through JAX's CUDA plugin and a description of the device (`topologies/`).

Neither needs the hardware. Nothing here initialises another JAX backend than the current one.
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
    "TPU_SKIP_MDS_QUERY": "1",  # no query to Google's metadata server,
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # and no warning about it; the target is named explicitly
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so several processes may compile
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
"""Environment variables that libtpu reads when loaded."""


@dataclass(frozen=True)
class Chip:
    """One chip's published peak figures."""

    name: str
    platform: str
    """tpu or cuda."""
    flops: float
    """Dense bfloat16 operations per second."""
    memory: int
    """Bytes of HBM available to a program."""
    bandwidth: float
    """HBM bandwidth in bytes per second."""
    network: float
    """Bytes per second received from other chips of the slice or host: half of a figure that counts both directions."""
    compiler: str
    """The compiler's name of the chip: a TPU's name, or the file that describes a GPU."""


# TPU: cloud.google.com/tpu/docs/v5e, /v6e, /v5p (system architecture). Memory is published as GB but is GiB; 0.25 GiB
# are reserved, as the compiler's limit (15.75 GiB on v5e) shows.
# GPU: nvidia.com/en-us/data-center/h100 and /h200 (SXM; tensor-core figures are halved, as published with sparsity).
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
    """As `jax.devices()` returns them on that machine."""

    @property
    def compiler(self) -> str:
        """Package with its compiler."""
        return _PLUGIN[self.chip.platform][0].replace("_", "-")


def open_topology(name: str) -> Topology:
    """Opens the topology `name`: `v5e:4x4`, `v5p:2x2x2`, `h100:1`, `h100:8`, ...

    Raises InputError for an unknown name, a shape that does not exist, and a compiler that is not installed, naming the
    extra that installs it.
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
