"""Building the reward components of a run from its configuration.

1. `open_rewards` checks everything that needs no weights: names and weights, the user's function, the sandbox, the
   fields of the data, the files of the reward model.
2. `load_rewards` builds the components once the policy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lsp_jax.core.errors import InputError
from lsp_jax.model.llama import Params
from lsp_jax.play.prompt_data import PromptData
from lsp_jax.policy import Policy
from lsp_jax.reward import code, maths
from lsp_jax.reward.base import UNBOUNDED, HostReward, Reward, RewardSpec, check_rewards
from lsp_jax.reward.config import RewardConfig
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import check_sandbox
from lsp_jax.reward.preference import load_reward_model, open_reward_model, preference_reward
from lsp_jax.reward.quality import quality_reward
from lsp_jax.reward.user_callable import arithmetic_reward, callable_reward, probe_callable


class OpenedRewards(NamedTuple):
    """Checked reward components before any weights are read; the input of `load_rewards`."""

    components: tuple[Reward, ...]
    """Components without weights."""
    reward_model: Policy | None
    """Configuration and tokenizer of the preference reward's model; `params` is empty."""
    specs: tuple[RewardSpec, ...]
    """Specs of all components, in the order of `load_rewards`."""


def open_rewards(
    config: RewardConfig, given: Sequence[Reward], workers: Workers, *, use_quality: bool = True, date: str = ""
) -> OpenedRewards:
    """Checks the components of a run, both configured and `given` ones; raises InputError.

    Host components score in `workers`; `use_quality` tells whether quality rewards are trained on; `date` is shown by
    the reward model's chat template. `check_data` checks what depends on the rows of the data set.
    """
    specs = [RewardSpec(component.name, component.kind, component.weight) for component in given]
    check_rewards([*_configured_specs(config), *specs], use_quality)
    components = [*_host_rewards(config, workers), *given]
    for component in given:
        if isinstance(component, HostReward):
            probe_callable(component)
    model = None
    if config.preference_model and config.preference_weight:
        _, model = open_reward_model(config.preference_model, config.preference_revision or None)
        model = replace(model, tokenizer=model.tokenizer.dated(date))
    host_specs = [RewardSpec(component.name, component.kind, component.weight) for component in components]
    device_specs = [spec for spec in _configured_specs(config) if spec.name in ("preference", "quality")]
    return OpenedRewards(tuple(components), model, _mixed(config, [*host_specs, *device_specs]))


def check_data(config: RewardConfig, data: PromptData | None, workers: Workers) -> None:
    """Raises InputError when the rows lack a field that a configured component needs, or its text cannot be read."""
    if data is not None and config.maths_weight:
        maths.check_rows(data.rows)
        maths.check_golds([str(row["answer"]) for row in data.rows], data.places, workers)
    if data is not None and config.code_weight:
        code.check_rows(data.rows, data.places)


def load_rewards(
    config: RewardConfig,
    opened: OpenedRewards,
    policy: Policy,
    reference: Params,
    token_classes: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Reward, ...]:
    """Returns all components in the order of `opened.specs`; loads the reward model onto `mesh`."""
    components = list(opened.components)
    if opened.reward_model is not None:
        model = load_reward_model(opened.reward_model.source, "auto", config.preference_revision or None, mesh)
        model = replace(model, tokenizer=opened.reward_model.tokenizer)
        weight, rows = config.preference_weight, config.preference_rows
        components.append(preference_reward(model, policy.tokenizer, token_classes, "task", weight, rows))
    if config.quality_weight:
        components.append(quality_reward(reference, policy, token_classes, config))
    return tuple(components)


def _configured_specs(config: RewardConfig) -> list[RewardSpec]:
    """Specs of all configured components, before any is built."""
    specs = [
        RewardSpec(name, "task", getattr(config, f"{name}_weight"))
        for name in ("arithmetic", "maths", "code")
        if getattr(config, f"{name}_weight")
    ]
    if config.callable:
        specs.append(RewardSpec("callable", config.callable_kind, config.callable_weight))
    if config.preference_model and config.preference_weight:
        specs.append(RewardSpec("preference", "task", config.preference_weight))
    if config.quality_weight:
        specs.append(RewardSpec("quality", "quality", config.quality_weight))
    return specs


def _host_rewards(config: RewardConfig, workers: Workers) -> list[HostReward]:
    components: list[HostReward] = []
    if config.arithmetic_weight:
        components.append(arithmetic_reward(config.arithmetic_weight, workers=workers))
    if config.maths_weight or config.code_weight:
        check_sandbox(workers)
    if config.maths_weight:
        maths.check_maths(workers)
        components.append(maths.maths_reward(config.maths_weight, workers=workers))
    if config.code_weight:
        components.append(code.code_reward(config.code_weight, workers=workers, timeout=config.code_timeout))
    if config.callable:
        component = callable_reward(config.callable, "callable", config.callable_kind, config.callable_weight, workers)
        probe_callable(component)
        components.append(component)
    return components


def _mixed(config: RewardConfig, specs: Sequence[RewardSpec]) -> tuple[RewardSpec, ...]:
    """Adds standardisation and clipping to `specs`; InputError for an unknown component name."""
    names, bounds = [spec.name for spec in specs], config.bounds()
    for field, used in (("reward.standardize", config.standardize), ("reward.clip", tuple(bounds))):
        unknown = [name for name in used if name not in names]
        if unknown:
            raise InputError(field, unknown[0], f"is not a component of this run; those are {', '.join(names)}")
    standardize = config.standardize
    return tuple(
        replace(spec, standardize=spec.name in standardize, clip=bounds.get(spec.name, UNBOUNDED)) for spec in specs
    )
