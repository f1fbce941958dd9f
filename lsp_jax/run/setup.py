"""From a configuration to everything a run needs, with every check that can be made before long work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsp_jax.config import TrainConfig
from lsp_jax.errors import InputError
from lsp_jax.learn.update import TrainState, init_state
from lsp_jax.model.llama import Params, cast
from lsp_jax.model.weights import load_params
from lsp_jax.play.data import PromptData, load_data
from lsp_jax.policy import Policy, open_pretrained
from lsp_jax.reward.base import HostReward, Reward, RewardSpec, check_rewards
from lsp_jax.reward.calls import load_callable
from lsp_jax.reward.preference import check_context, load_reward_model, open_reward_model, preference_reward
from lsp_jax.reward.quality import quality_reward
from lsp_jax.reward.verify import arithmetic_reward, callable_reward, probe_callable
from lsp_jax.run.checkpoint import Checkpoints, abstract
from lsp_jax.run.folder import check_output, load_run_params, open_run, settled
from lsp_jax.run.iteration import Game
from lsp_jax.run.metrics import check_trackers
from lsp_jax.text.prompts import PlayPrompts, judge_template
from lsp_jax.text.tokenizer import SPECIAL


@dataclass(frozen=True)
class Run:
    """What the host loop works with."""

    config: TrainConfig
    policy: Policy
    """The policy as loaded: what training starts from."""
    reference: Params
    """The frozen reference in the compute dtype; the loaded arrays themselves when that is theirs."""
    game: Game
    data: PromptData | None
    """Queries of a data set; None in self-play."""
    rewards: tuple[Reward, ...]
    specs: tuple[RewardSpec, ...]
    """How they are mixed, in their order."""
    kinds: jax.Array
    """uint8 [V]: text, blank or control, over the model's vocabulary."""
    seed_key: jax.Array
    directory: Path


def prepare(config: TrainConfig, rewards: Sequence[Reward] = (), policy: Policy | None = None) -> Run:
    """Checks everything and loads the model unless `policy` is given; writes nothing.

    `rewards` are further components beside the configured ones. Raises InputError.
    """
    if policy is not None:
        config = replace(config, model=config.model or policy.source)
    config.check()
    check_trackers(config.report_to)
    directory = Path(config.output_dir).expanduser()
    config = settled(config, directory)
    check_output(config, directory)
    host_rewards = _host_rewards(config)
    check_rewards([*host_rewards, *rewards, *_device_specs(config)], config.loss.use_quality)
    for reward in rewards:
        if isinstance(reward, HostReward):
            probe_callable(reward)
    reward_model = _open_preference(config)
    opened, load = _source(config, policy)
    opened = replace(opened, tokenizer=opened.tokenizer.dated(config.date))
    data = load_data(config.data, opened.tokenizer) if config.data.source else None
    game = make_game(config, opened, data)  # what does not fit is said before gigabytes are read
    if reward_model is not None:
        check_context(reward_model, longest_query(config, game.prompts, data), config.play.max_completion_length)
    policy = replace(opened, params=load())
    kinds = token_kinds(policy)
    reference = cast(policy.params, game.compute_dtype)
    components: list[Reward] = [*host_rewards, *rewards]
    if reward_model is not None:
        scored = load_reward_model(reward_model.source, revision=config.reward.preference_revision or None)
        scored = replace(scored, tokenizer=reward_model.tokenizer)
        weight, rows = config.reward.preference_weight, config.reward.preference_rows
        components.append(preference_reward(scored, policy.tokenizer, kinds, "task", weight, rows))
    if config.reward.quality_weight:
        components.append(
            quality_reward(
                reference,
                policy.config,
                policy.tokenizer,
                kinds,
                config.reward.quality_weight,
                config.reward.judge_rows,
            )
        )
    seed_key = jax.device_put(jax.random.key(config.seed))
    specs = mixing(config, components)
    return Run(config, policy, reference, game, data, tuple(components), specs, kinds, seed_key, directory)


def _source(config: TrainConfig, policy: Policy | None) -> tuple[Policy, Callable[[], Params]]:
    """The policy to start from without its parameters, and what gets them: given, another run's, or a model's."""
    if policy is not None:
        given = policy
        return given, lambda: cast(given.params, config.param_dtype)
    if config.init_from:
        opened = open_run(config.init_from)
        return opened, lambda: load_run_params(config.init_from, config.init_step, config.param_dtype)
    directory, opened = open_pretrained(config.model, config.revision or None)
    return opened, lambda: load_params(directory, opened.config, config.param_dtype)


def mixing(config: TrainConfig, rewards: Sequence[Reward]) -> tuple[RewardSpec, ...]:
    """How the components are standardised, clipped and weighted; InputError for a name that is none of theirs."""
    names, bounds = [reward.name for reward in rewards], config.reward.bounds()
    for field, used in (("reward.standardize", config.reward.standardize), ("reward.clip", tuple(bounds))):
        unknown = [name for name in used if name not in names]
        if unknown:
            raise InputError(field, unknown[0], f"no component has this name; there are {', '.join(names)}")
    return tuple(
        RewardSpec(
            reward.name, reward.kind, reward.weight, reward.name in config.reward.standardize, bounds.get(reward.name)
        )
        for reward in rewards
    )


def make_game(config: TrainConfig, policy: Policy, data: PromptData | None = None) -> Game:
    """The static part of every stage; checks that prompts and completions fit the model's context."""
    compute = config.compute_dtype
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    prompts = PlayPrompts.build(policy.tokenizer, config.prompts)
    play, context = config.play, policy.config.max_position_embeddings
    query = longest_query(config, prompts, data)
    solver = len(prompts.solver.prefix_ids) + query + len(prompts.solver.suffix_ids)
    lengths = {"play.max_completion_length": solver + play.max_completion_length}
    if data is None:
        lengths["prompts.challenger"] = len(prompts.challenger_ids) + play.max_query_length
    if config.reward.quality_weight:
        judge = judge_template(policy.tokenizer).fixed_length
        lengths["reward.quality_weight"] = judge + query + play.max_completion_length
    for field, length in lengths.items():
        if length > context:
            raise InputError(
                field,
                length,
                f"tokens of prompt and completion exceed the model's context of {context}: shorten one of them",
            )
    return Game(
        model=policy.config,
        prompts=prompts,
        play=play,
        solver_sampling=config.sampling,
        challenger_sampling=config.challenger_sampling,
        stop_ids=policy.tokenizer.stop_ids,
        loss=config.loss,
        optimizer=config.optimizer,
        compute_dtype=compute,
    )


def token_kinds(policy: Policy) -> jax.Array:
    """`Tokenizer.token_kinds` on device; rows of the embedding beyond the tokenizer count as control ids."""
    kinds = np.full(policy.config.vocab_size, SPECIAL, np.uint8)
    known = policy.tokenizer.token_kinds()
    kinds[: len(known)] = known
    return jax.device_put(kinds)


def start_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any] | None]:
    """The newest checkpoint's state and host part, or a fresh state and None."""
    make = partial(init_state, config=run.config.optimizer)
    latest = checkpoints.latest() if run.config.resume != "never" else None
    if latest is None:
        return jax.jit(make)(run.policy.params), None
    return checkpoints.restore(latest, abstract(make, run.policy.params))


def longest_query(config: TrainConfig, prompts: PlayPrompts, data: PromptData | None) -> int:
    """Tokens of the longest query that can be played."""
    if data is not None:
        return max(map(len, data.ids))
    return len(prompts.query_prefix_ids) + config.play.max_query_length


def _open_preference(config: TrainConfig) -> Policy | None:
    """The reward model without its weights, None when none is asked for."""
    reward = config.reward
    if not reward.preference_model or not reward.preference_weight:
        return None
    _, model = open_reward_model(reward.preference_model, reward.preference_revision or None)
    return replace(model, tokenizer=model.tokenizer.dated(config.date))


def _device_specs(config: TrainConfig) -> list[RewardSpec]:
    """The compiled components that the configuration asks for, known before they are made."""
    reward, specs = config.reward, []
    if reward.preference_model and reward.preference_weight:
        specs.append(RewardSpec("preference", "task", reward.preference_weight))
    if reward.quality_weight:
        specs.append(RewardSpec("quality", "quality", reward.quality_weight))
    return specs


def _host_rewards(config: TrainConfig) -> list[HostReward]:
    reward, components = config.reward, []
    if reward.arithmetic_weight:
        components.append(arithmetic_reward(reward.arithmetic_weight))
    if reward.callable:
        function = load_callable(reward.callable)
        component = callable_reward(function, "callable", reward.callable_kind, reward.callable_weight)
        probe_callable(component)
        components.append(component)
    return components
