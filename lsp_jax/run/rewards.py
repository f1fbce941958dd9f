"""From a configuration to the reward components of a run, and how they are mixed.

1. `open_rewards`: everything that can be checked without weights: names and weights, the user's function, the sandbox,
   the data's fields, the reward model's files.
2. `load_rewards`: the components themselves, once the policy is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lsp_jax.config import TrainConfig
from lsp_jax.errors import InputError
from lsp_jax.model.llama import Params
from lsp_jax.play.data import PromptData
from lsp_jax.policy import Policy
from lsp_jax.reward import code, maths
from lsp_jax.reward.base import HostReward, Reward, RewardSpec, check_rewards
from lsp_jax.reward.preference import load_reward_model, open_reward_model, preference_reward
from lsp_jax.reward.quality import quality_reward
from lsp_jax.reward.sandbox import check_sandbox
from lsp_jax.reward.verify import arithmetic_reward, callable_reward, probe_callable
from lsp_jax.reward.workers import Workers


class OpenedRewards(NamedTuple):
    """What `load_rewards` needs; making it has read no weights."""

    components: tuple[Reward, ...]
    """Those that need no weights."""
    reward_model: Policy | None
    """Configuration and tokenizer of the preference reward's model; `params` is empty."""
    specs: tuple[RewardSpec, ...]
    """How all components are mixed, in the order of `load_rewards`."""


def open_rewards(config: TrainConfig, given: Sequence[Reward], workers: Workers) -> OpenedRewards:
    """`given` are components beside the configured ones; host components score in `workers`. Raises InputError.

    What depends on the data's rows is checked by `check_data`.
    """
    reward = config.reward
    specs = [RewardSpec(component.name, component.kind, component.weight) for component in given]
    check_rewards([*_configured_specs(config), *specs], config.loss.use_quality)
    components = [*_host_rewards(config, workers), *given]
    for component in given:
        if isinstance(component, HostReward):
            probe_callable(component)
    model = None
    if reward.preference_model and reward.preference_weight:
        _, model = open_reward_model(reward.preference_model, reward.preference_revision or None)
        model = replace(model, tokenizer=model.tokenizer.dated(config.date))
    host_specs = [RewardSpec(component.name, component.kind, component.weight) for component in components]
    device_specs = [spec for spec in _configured_specs(config) if spec.name in ("preference", "quality")]
    return OpenedRewards(tuple(components), model, _mixed(config, [*host_specs, *device_specs]))


def check_data(config: TrainConfig, data: PromptData | None) -> None:
    """Raises InputError when the rows lack what a configured component compares with."""
    if data is not None and config.reward.maths_weight:
        maths.check_rows(data.rows)
    if data is not None and config.reward.code_weight:
        code.check_rows(data.rows)


def load_rewards(
    config: TrainConfig,
    opened: OpenedRewards,
    policy: Policy,
    reference: Params,
    kinds: jax.Array,
    mesh: Mesh | None = None,
) -> tuple[Reward, ...]:
    """Every component, in the order of `opened.specs`; reads the reward model's weights onto `mesh`."""
    reward, components = config.reward, list(opened.components)
    if opened.reward_model is not None:
        model = load_reward_model(opened.reward_model.source, "auto", reward.preference_revision or None, mesh)
        model = replace(model, tokenizer=opened.reward_model.tokenizer)
        weight, rows = reward.preference_weight, reward.preference_rows
        components.append(preference_reward(model, policy.tokenizer, kinds, "task", weight, rows))
    if reward.quality_weight:
        components.append(
            quality_reward(
                reference,
                policy.config,
                policy.tokenizer,
                kinds,
                reward.quality_weight,
                reward.judge_rows,
                mode=reward.quality_mode,
                rubric=reward.rubric,
                max_length=reward.quality_max_length,
            )
        )
    return tuple(components)


def _configured_specs(config: TrainConfig) -> list[RewardSpec]:
    """Every component that the configuration asks for, known before any is made."""
    reward = config.reward
    specs = [
        RewardSpec(name, "task", getattr(reward, f"{name}_weight"))
        for name in ("arithmetic", "maths", "code")
        if getattr(reward, f"{name}_weight")
    ]
    if reward.callable:
        specs.append(RewardSpec("callable", reward.callable_kind, reward.callable_weight))
    if reward.preference_model and reward.preference_weight:
        specs.append(RewardSpec("preference", "task", reward.preference_weight))
    if reward.quality_weight:
        specs.append(RewardSpec("quality", "quality", reward.quality_weight))
    return specs


def _host_rewards(config: TrainConfig, workers: Workers) -> list[HostReward]:
    reward, components = config.reward, []
    if reward.arithmetic_weight:
        components.append(arithmetic_reward(reward.arithmetic_weight, workers=workers))
    if reward.maths_weight or reward.code_weight:
        check_sandbox(workers)
    if reward.maths_weight:
        maths.check_maths(workers)
        components.append(maths.maths_reward(reward.maths_weight, workers=workers))
    if reward.code_weight:
        components.append(code.code_reward(reward.code_weight, workers=workers, timeout=reward.code_timeout))
    if reward.callable:
        component = callable_reward(reward.callable, "callable", reward.callable_kind, reward.callable_weight, workers)
        probe_callable(component)
        components.append(component)
    return components


def _mixed(config: TrainConfig, specs: Sequence[RewardSpec]) -> tuple[RewardSpec, ...]:
    """`specs` with standardisation and clipping; InputError for a name that is none of theirs."""
    names, bounds = [spec.name for spec in specs], config.reward.bounds()
    for field, used in (("reward.standardize", config.reward.standardize), ("reward.clip", tuple(bounds))):
        unknown = [name for name in used if name not in names]
        if unknown:
            raise InputError(field, unknown[0], f"no component has this name; there are {', '.join(names)}")
    standardize = config.reward.standardize
    return tuple(spec._replace(standardize=spec.name in standardize, clip=bounds.get(spec.name)) for spec in specs)
