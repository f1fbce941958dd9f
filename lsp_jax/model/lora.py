"""Low-rank adapters (LoRA, arXiv 2106.09685): y = x W + alpha / rank * (x A) B, with W frozen and A, B trained.

An adapter tree has the parameters' own form, with `lora_A` [L, in, r] and `lora_B` [L, r, out] where a projection is
adapted and nothing elsewhere. `attached` puts it beside the base's weights, without a copy of them: what the model's
functions then compute is the adapted model. So one frozen base in memory is policy, reference and judge at once.
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

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import CARD, check_writable, is_ours, sealed
from lsp_jax.core.runtime import to_host
from lsp_jax.model.llama import Params

PROJECTIONS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
"""The projections of a layer and the part of it that they are in."""

FILES = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters in place of training all parameters. Names as in PEFT where it has them."""

    rank: int = 0
    """Width r of the adapters; 0 trains all parameters. (PEFT's r.)"""
    alpha: float = 32.0
    """The adapters' product is scaled by alpha / rank. (PEFT's lora_alpha.)"""
    targets: tuple[str, ...] = tuple(PROJECTIONS)
    """Projections that are adapted, of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. (PEFT's
    target_modules.)"""
    seed: int = 0
    """Of A's first values; B begins at zero, so that the policy begins as the base."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def check(self) -> None:
        """Raises InputError naming the field."""
        if self.rank < 0:
            raise InputError("lora.rank", self.rank, "must be at least 1, or 0 to train all parameters")
        if not 0 < self.alpha < math.inf:
            raise InputError("lora.alpha", self.alpha, "must be > 0 and finite")
        if not 0 <= self.seed < 2**32:
            raise InputError("lora.seed", self.seed, "must be in 0 .. 2**32 - 1")
        if not self.targets:
            raise InputError("lora.targets", "", f"must name at least one of {', '.join(PROJECTIONS)}")
        for name in self.targets:
            if name not in PROJECTIONS:
                raise InputError("lora.targets", name, f"must be one of {', '.join(PROJECTIONS)}")


def init_adapters(params: Params, lora: LoraConfig) -> Params:
    """Float32 adapters of a model like `params`: A uniform in +-1 / sqrt(in) as in PEFT, B zero."""
    adapters: Params = {}
    for number, name in enumerate(PROJECTIONS):  # the same A whatever else is adapted
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
    """The shapes of `init_adapters`, without making any array. Raises InputError for a rank that is too large."""
    return jax.eval_shape(partial(init_adapters, lora=lora), params)


def attached(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The adapted model's parameters: the arrays of `base` themselves, the adapters beside them with B scaled."""
    return united(base, scaled(adapters, lora))


def scaled(adapters: Params, lora: LoraConfig) -> Params:
    """The adapters with B times alpha / rank."""

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf * lora.scale if path[-1].key == "lora_B" else leaf

    return jax.tree_util.tree_map_with_path(scale, adapters)


def united(one: Params, other: Params) -> Params:
    """Nested dicts with the leaves of both, which share none."""
    return {
        name: united(one[name], other[name]) if name in one and name in other else {**other, **one}[name]
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
    """Parameters of a plain model that computes what the adapted one does: W + alpha / rank * A B, made in float32 and
    kept in the dtype of `base`, whose other arrays are taken as they are; `over` writes over the projections of `base`,
    which hold nothing any more then."""
    merge = _merged_over if over else _merged
    layers = {part: dict(found) for part, found in base["model"]["layers"].items()}
    for part, found in adapters["model"]["layers"].items():
        for name, pair in found.items():
            held = layers[part][name]
            layers[part][name] = {**held, "weight": merge(held["weight"], pair["lora_A"], pair["lora_B"], lora)}
    return {**base, "model": {**base["model"], "layers": layers}}


def save_adapters(
    adapters: Params, lora: LoraConfig, base: str, directory: Path, revision: str | None = None, card: str = ""
) -> None:
    """Writes PEFT's two files, `adapter_config.json` and `adapter_model.safetensors`, and a model `card` as README.md.

    `base` is the model's name, `revision` its commit or branch on the hub.
    """
    tensors: dict[str, np.ndarray] = {}
    for part, found in adapters["model"]["layers"].items():
        for name, pair in found.items():
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
    fresh = [directory / f".{name}.new" for name in FILES]
    fresh[0].write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, fresh[1], metadata={"format": "pt"})
    for path, name in zip(fresh, FILES, strict=True):
        path.replace(directory / name)
    if card:
        (directory / CARD).write_text(sealed(card), encoding="utf-8")


def check_adapters_replaceable(directory: Path) -> None:
    """Raises InputError unless `directory` is empty or an earlier export of adapters, or absent and can be made."""
    check_writable("directory", directory)
    there = list(directory.iterdir()) if directory.exists() else []
    foreign = [path.name for path in there if path.name not in FILES and not (path.name == CARD and is_ours(path))]
    if foreign:
        remedy = f"holds {min(foreign)} and is not an earlier export of adapters; give an empty or new directory"
        raise InputError("directory", str(directory), remedy)
