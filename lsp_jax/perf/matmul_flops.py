"""Operations of matrix products in a compiled program, 2 per multiply-add.

Compilers express a product as a dot, a convolution, a library call, or a fused attention kernel.
"""

from __future__ import annotations

import math
import re

import numpy as np

from lsp_jax.perf.hlo import Array, Computation, Instruction, inputs


def flops(computation: Computation, instruction: Instruction) -> float:
    """Returns the operations of one instruction: those of a matrix product in any form, else 0."""
    if instruction.opcode == "dot":
        return _dot(*_pair(computation, instruction), instruction)
    if instruction.opcode == "convolution":
        return _convolution(*_pair(computation, instruction), instruction)
    if instruction.opcode == "custom-call":
        return _custom(computation, instruction)
    return 0


def _pair(computation: Computation, instruction: Instruction) -> tuple[Array, Array]:
    left, right = (given[0] for given in list(inputs(computation, instruction))[:2])
    return left, right


def _numbers(text: str, name: str) -> list[int]:
    match = re.search(rf"{name}=\{{([\d,]*)\}}", text)
    return [int(number) for number in match[1].split(",") if number] if match else []


def _dot(left: Array, right: Array, instruction: Instruction) -> float:
    contracted = math.prod(left.shape[axis] for axis in _numbers(instruction.attributes, "lhs_contracting_dims"))
    return 2 * instruction.arrays[0].size * contracted


def _convolution(left: Array, right: Array, instruction: Instruction) -> float:
    """Operations of a convolution: TPUs express every matrix product as one, with batch dimensions as windows that
    mostly cover padding.

    Only window positions on real elements are counted, as the hardware multiplies only those.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left_labels, right_labels, out_labels = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(instruction.attributes)))
    made = instruction.arrays[0]
    taps = 1.0
    for axis, label in enumerate(sorted(label for label in out_labels if label.isdigit())):
        pads = _per_axis(window.get("pad"), axis, "0_0").split("_")
        taps *= _taps(
            inside=left.shape[left_labels.index(label)],
            size=right.shape[right_labels.index(label)],
            out=made.shape[out_labels.index(label)],
            stride=int(_per_axis(window.get("stride"), axis, "1")),
            low=int(pads[0]),
            spread=int(_per_axis(window.get("lhs_dilate"), axis, "1")),
            reach=int(_per_axis(window.get("rhs_dilate"), axis, "1")),
        )
    depth = right.shape[right_labels.index("i")]
    return 2 * taps * depth * made.shape[out_labels.index("b")] * made.shape[out_labels.index("f")]


def _window(attributes: str) -> str:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    return match[1] if match else ""


def _per_axis(text: str | None, axis: int, default: str) -> str:
    return text.split("x")[axis] if text else default


def _taps(inside: int, size: int, out: int, stride: int, low: int, spread: int, reach: int) -> int:
    """Number of pairs of output and window position along one axis that read an element of the input."""
    position = np.arange(out)[:, None] * stride + np.arange(size)[None] * reach - low
    return int(np.sum((position >= 0) & (position <= (inside - 1) * spread) & (position % spread == 0)))


def _custom(computation: Computation, instruction: Instruction) -> float:
    """Operations of a library call: cuBLAS products and fused attention; 0 for any other."""
    attributes = instruction.attributes
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    splash = re.search(r"splash_\w+_(fwd|dkv|dq)", instruction.name)
    if target is not None and target[1].startswith("__cublas$"):
        left = _pair(computation, instruction)[0]
        contracted = _quoted("lhs_contracting_dimensions", attributes)
        return 2 * instruction.arrays[0].size * math.prod(left.shape[axis] for axis in contracted)
    if target is not None and target[1].startswith("__cudnn$fmha"):
        scores = math.prod(_quoted("dimensions", attributes))  # [B, H, S, S]; a causal mask leaves half
        half = 1 if '"mask_type": "CAUSAL"' in attributes else 2
        products = 5 if "Backward" in target[1] else 2
        return products * half * scores * _pair(computation, instruction)[0].shape[-1]
    if splash:  # causal: two tables of blocks, then queries [.., H, S, h] and keys [.., K, S, h]
        queries, keys = list(inputs(computation, instruction))[2:4]
        return _SPLASH[splash[1]] * queries[0].size * keys[0].shape[-2]
    return 0


_SPLASH = {"fwd": 2, "dkv": 4, "dq": 3}
"""Matrix products in each splash attention kernel; both backward kernels recompute scores and their gradients."""


def _quoted(name: str, attributes: str) -> list[int]:
    """Parses a list of numbers in an attribute written as JSON."""
    match = re.search(rf'"{name}": ?\[([^\]]*)\]', attributes)
    return [int(number.strip('" ')) for number in match[1].split(",") if number.strip()] if match else []
