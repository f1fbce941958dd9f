"""Provenance of a run beside its configuration: the parameters it started with, and the packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from lsp_jax.checkpoint.checksums import manifest
from lsp_jax.config import TrainConfig, flat
from lsp_jax.core.errors import InputError
from lsp_jax.model.llama import Params
from lsp_jax.policy import Policy
from lsp_jax.text.prompts import PlayPrompts

MANIFEST = "manifest.json"
"""The file in which a run notes its identity at its start."""
PACKAGES = ("lsp-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")

NUMERICS = (
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_enable_x64", "jax_default_matmul_precision"),
)
"""Settings of JAX, from the environment or `jax.config`, that decide which numbers are drawn or computed."""


def versions() -> dict[str, str]:
    """Of Python, the packages that decide what is computed, and the kind of device."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"device": jax.devices()[0].device_kind}


def parameters_digest(params: Params, dtype: str | None = None) -> str:
    """SHA-256 of all arrays' names, shapes, dtypes and checksums, as they are or in `dtype`: the same on every mesh."""
    return hashlib.sha256(json.dumps(manifest(params, dtype), sort_keys=True).encode()).hexdigest()


def numerics() -> dict[str, str]:
    """The values of `NUMERICS` here."""
    return {name: str(getattr(jax.config, name, None)) for name in NUMERICS}


def prompts_digest(config: TrainConfig, policy: Policy) -> str:
    """SHA-256 of the token ids of the roles' prompts, to which tokenizer, chat template and date contribute."""
    prompts = PlayPrompts.build(policy.tokenizer, config.prompts)
    ids = [prompts.challenger_ids, prompts.query_prefix_ids, *prompts.solver]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def reference_of(run: Path) -> dict[str, Any]:
    """The reference recorded by the run in that folder: `source`, `revision`, `commit`, `digest`. Raises InputError
    where that cannot be read."""
    try:
        return dict(json.loads((run / MANIFEST).read_text(encoding="utf-8"))["reference"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"its {MANIFEST} cannot be read ({type(error).__name__}): restore the file"
        raise InputError("run", str(run), remedy) from error


def identity(config: TrainConfig, policy: Policy, params: Params, reward_model: Policy | None) -> dict[str, Any]:
    """The provenance that every checkpoint of a run records; `policy` with `params` is the model it started from, its
    reference."""
    settings = flat(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    source = f"{config.init_from} checkpoint {config.init_step}" if config.init_from else config.model
    return {
        "config": settings,
        "config_digest": digest,
        "versions": versions(),
        "numerics": numerics(),
        "prompts": prompts_digest(config, policy),
        "reference": {
            "source": source,
            "revision": config.revision,
            "commit": policy.commit,
            "digest": parameters_digest(params),
        },
        "reward_model": reward_model
        and {
            "source": reward_model.source,
            "revision": config.reward.preference_revision,
            "commit": reward_model.commit,
        },
    }
