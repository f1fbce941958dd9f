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
from lsp_jax.core.files import read_json_object
from lsp_jax.model.llama import Params
from lsp_jax.policy import Policy
from lsp_jax.text.prompts import PlayPrompts

MANIFEST = "manifest.json"
"""File in which a run records its provenance when it starts."""
PACKAGES = ("lsp-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")

NUMERICS = (
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_enable_x64", "jax_default_matmul_precision"),
)
"""Settings of JAX, from the environment or `jax.config`, that decide which numbers are drawn or computed."""


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect results, and the kind of device."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"device": jax.devices()[0].device_kind}


def parameters_digest(params: Params, dtype: str | None = None) -> str:
    """Returns the SHA-256 of all arrays' names, shapes, dtypes and checksums (of a cast to `dtype`), on any mesh."""
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
    """Returns the reference recorded by the run in that folder: `source`, `revision`, `commit`, `digest`.

    Raises InputError if the manifest cannot be read.
    """
    reference = read_json_object(run / MANIFEST, "restore the file", "run").get("reference")
    if not isinstance(reference, dict):
        raise InputError("run", str(run / MANIFEST), "contains no reference; restore the file")
    return reference


def identity(config: TrainConfig, policy: Policy, params: Params, reward_model: Policy | None) -> dict[str, Any]:
    """Returns the provenance recorded in every checkpoint of a run; its reference is `policy` with `params`."""
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
