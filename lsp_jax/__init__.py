"""Language Self-Play (arXiv 2509.07414) in JAX and Flax.

    import lsp_jax as lsp
    policy = lsp.load_pretrained("path-or-hub-id")                # .config .params .tokenizer
    logits = lsp.forward(policy.params, policy.config, tokens)    # [B, T] -> [B, T, V]
    texts = lsp.generate(policy, ["What is 3 + 4?"], lsp.SamplingConfig(temperature=0.0))
    state = lsp.train(lsp.presets.quickstart())

Importing the package touches no device and reads no flags. Names are imported lazily, so that worker processes of host
rewards and `lsp-jax --help` start without JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsp_jax import presets
    from lsp_jax.config import TrainConfig
    from lsp_jax.core.errors import InputError
    from lsp_jax.model.llama import forward
    from lsp_jax.play.generate import generate
    from lsp_jax.play.sampler import SamplingConfig
    from lsp_jax.policy import Policy, load_pretrained, save_pretrained
    from lsp_jax.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Policy",
    "SamplingConfig",
    "TrainConfig",
    "forward",
    "generate",
    "load_pretrained",
    "presets",
    "save_pretrained",
    "train",
]

_MODULES = {
    "InputError": "core.errors",
    "Policy": "policy",
    "SamplingConfig": "play.sampler",
    "TrainConfig": "config",
    "forward": "model.llama",
    "generate": "play.generate",
    "load_pretrained": "policy",
    "save_pretrained": "policy",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        value: Any = importlib.import_module("lsp_jax.presets")
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"lsp_jax.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module 'lsp_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
