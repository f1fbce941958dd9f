"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + alpha / rank * (x A) B, with W frozen and A, B trained.

An adapter tree has the structure of the parameters, with only `lora_A` [L, in, r] and `lora_B` [L, r, out] at adapted
projections. `attach_adapters` combines it with the base weights without copying them, and the model's functions then
compute the adapted model. One frozen base in memory thus serves as policy, reference and judge.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import CARD, check_writable, is_ours, replacing, sealed, write_text
from lsp_jax.core.runtime import to_host
from lsp_jax.model.llama import Params

PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
"""The projections of a layer, with the submodule that holds each."""

FILES = "adapter_config.json", "adapter_model.safetensors"
"""File names of PEFT."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters. Names follow PEFT where it has an equivalent."""

    rank: int = 0
    """Rank r of the adapters; 0 trains all parameters. (PEFT's r.)"""
    alpha: float = 32.0
    """Numerator of the scaling alpha / rank of the adapters. (PEFT's lora_alpha.)"""
    targets: tuple[str, ...] = tuple(PROJECTIONS)
    """Adapted projections, out of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. (PEFT's
    target_modules.)"""
    seed: int = 0
    """Random seed of the initial A; B starts at zero, so the initial policy equals the base."""

    @property
    def scale(self) -> float:
        """The scaling factor alpha / rank."""
        return self.alpha / self.rank

    def check(self) -> None:
        """Raises InputError naming the field."""
        if self.rank < 0:
            raise InputError("lora.rank", self.rank, "must be at least 1, or 0 to train all parameters")
        if not 0 < self.alpha < math.inf:
            raise InputError("lora.alpha", self.alpha, "must be > 0 and finite")
        arguments.seed("lora.seed", self.seed)
        if not self.targets:
            raise InputError("lora.targets", "", f"must name at least one of {', '.join(PROJECTIONS)}")
        for name in self.targets:
            if name not in PROJECTIONS:
                raise InputError("lora.targets", name, f"must be one of {', '.join(PROJECTIONS)}")


def init_adapters(params: Params, lora: LoraConfig) -> Params:
    """Returns initial float32 adapters for `params`: A uniform in +-1 / sqrt(in) as in PEFT, B zero."""
    adapters: Params = {}
    for number, name in enumerate(PROJECTIONS):  # A does not depend on which other projections are adapted
        if name not in lora.targets:
            continue
        part = PROJECTIONS[name]
        layers, inputs, outputs = params["model"]["layers"][part][name]["weight"].shape
        if lora.rank > min(inputs, outputs):
            remedy = f"must be at most {min(inputs, outputs)}: {name} is {inputs} x {outputs}"
            raise InputError("lora.rank", lora.rank, remedy)
        key, bound = jax.random.fold_in(jax.random.key(lora.seed), number), 1 / math.sqrt(inputs)
        first = jax.random.uniform(key, (layers, inputs, lora.rank), jnp.float32, -bound, bound)
        adapters.setdefault(part, {})[name] = {"lora_A": first, "lora_B": jnp.zeros((layers, lora.rank, outputs))}
    return {"model": {"layers": adapters}}


def adapters_shape(params: Params, lora: LoraConfig) -> Params:
    """Returns the shapes of `init_adapters`, without allocating. Raises InputError for a rank that is too large."""
    return jax.eval_shape(partial(init_adapters, lora=lora), params)


def attach_adapters(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """Returns the parameters of the adapted model: the arrays of `base`, uncopied, and the adapters with B scaled."""
    return merge_trees(base, scale_adapters(adapters, lora))


def scale_adapters(adapters: Params, lora: LoraConfig) -> Params:
    """The adapters with B times alpha / rank."""

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf * lora.scale if path[-1].key == "lora_B" else leaf

    return jax.tree_util.tree_map_with_path(scale, adapters)


def merge_trees(one: Params, other: Params) -> Params:
    """Merges two nested dicts with disjoint leaves."""
    return {
        name: merge_trees(one[name], other[name]) if name in one and name in other else {**other, **one}[name]
        for name in {**one, **other}
    }


def _merge(weight: jax.Array, first: jax.Array, second: jax.Array, lora: LoraConfig) -> jax.Array:
    change = lora.scale * jnp.einsum(
        "lir,lro->lio", first.astype(jnp.float32), second.astype(jnp.float32), precision="highest"
    )
    return (weight.astype(jnp.float32) + change).astype(weight.dtype)


_merged = jax.jit(_merge, static_argnames="lora")
_merged_over = jax.jit(_merge, static_argnames="lora", donate_argnames="weight")


def merged(base: Params, adapters: Params, lora: LoraConfig, over: bool = False) -> Params:
    """Returns the parameters of a plain model with the adapters merged: W + alpha / rank * A B.

    The sum is computed in float32 and cast to the dtype of `base`; unadapted arrays are shared with `base`. `over`
    donates the adapted projections of `base`, which are then invalid.
    """
    merge = _merged_over if over else _merged
    layers = {part: dict(projections) for part, projections in base["model"]["layers"].items()}
    for part, projections in adapters["model"]["layers"].items():
        for name, pair in projections.items():
            plain = layers[part][name]
            layers[part][name] = {**plain, "weight": merge(plain["weight"], pair["lora_A"], pair["lora_B"], lora)}
    return {**base, "model": {**base["model"], "layers": layers}}


def save_adapters(
    adapters: Params, lora: LoraConfig, base: str, directory: Path, revision: str | None = None, card: str = ""
) -> None:
    """Writes the files of PEFT, `adapter_config.json` and `adapter_model.safetensors`, and `card` as README.md.

    `base` is the name of the base model, `revision` its commit or branch on the hub.
    """
    tensors: dict[str, np.ndarray] = {}
    for part, projections in adapters["model"]["layers"].items():
        for name, pair in projections.items():
            for kind, stacked in pair.items():
                for layer, leaf in enumerate(to_host(stacked)):
                    path = f"base_model.model.model.layers.{layer}.{part}.{name}.{kind}.weight"
                    tensors[path] = np.ascontiguousarray(leaf.T)  # torch's projections are [out, in]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    check_adapters_replaceable(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / FILES[0]) as config_file, replacing(directory / FILES[1]) as weights_file:
        config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, weights_file, metadata={"format": "pt"})
    if card:
        write_text(directory / CARD, sealed(card))


def check_adapters_replaceable(directory: Path) -> None:
    """Raises InputError unless `directory` is empty, an earlier export of adapters, or absent and can be created."""
    check_writable("directory", directory)
    present = list(directory.iterdir()) if directory.exists() else []
    foreign = [path.name for path in present if path.name not in FILES and not (path.name == CARD and is_ours(path))]
    if foreign:
        remedy = f"contains {min(foreign)} and is not an earlier export of adapters; give an empty or new directory"
        raise InputError("directory", str(directory), remedy)
