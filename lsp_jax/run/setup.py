"""From a configuration to everything a run needs, with every check that can be made before long work starts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsp_jax import config as configs
from lsp_jax.config import TrainConfig
from lsp_jax.errors import InputError
from lsp_jax.learn.update import TrainState, init_state
from lsp_jax.model.llama import Params, cast, init_params
from lsp_jax.model.weights import check_dtype, load_params, read_config
from lsp_jax.policy import Policy, check_replaceable, open_pretrained, save_pretrained
from lsp_jax.reward.base import HostReward, Reward, RewardSpec, check_rewards
from lsp_jax.reward.quality import quality_reward
from lsp_jax.reward.verify import arithmetic_reward, callable_reward, load_callable, probe_callable
from lsp_jax.run.checkpoint import Checkpoints, abstract
from lsp_jax.run.iteration import Game
from lsp_jax.run.metrics import check_trackers
from lsp_jax.text.judge import judge_template
from lsp_jax.text.prompts import PlayPrompts
from lsp_jax.text.tokenizer import SPECIAL, Tokenizer

CHECKPOINTS, BASE, EXPORT = "checkpoints", "base", "export"
_RUN_FILES = ("config.json", "metrics.jsonl", "transcripts.jsonl", CHECKPOINTS, EXPORT)


@dataclass(frozen=True)
class Run:
    """What the host loop works with."""

    config: TrainConfig
    policy: Policy
    """The policy as loaded: what training starts from."""
    reference: Params
    """The frozen reference in the compute dtype; the loaded arrays themselves when that is theirs."""
    game: Game
    rewards: tuple[Reward, ...]
    kinds: jax.Array
    """uint8 [V]: text, blank or control, over the model's vocabulary."""
    seed_key: jax.Array
    directory: Path

    @property
    def specs(self) -> tuple[RewardSpec, ...]:
        return tuple(RewardSpec(reward.name, reward.kind, reward.weight) for reward in self.rewards)


def prepare(config: TrainConfig, rewards: Sequence[Reward] = (), policy: Policy | None = None) -> Run:
    """Checks everything and loads the model unless `policy` is given; writes nothing.

    `rewards` are further components beside the configured ones. Raises InputError.
    """
    if policy is not None:
        config = replace(config, model=config.model or policy.source)
    config.check()
    check_trackers(config.report_to)
    directory = Path(config.output_dir).expanduser()
    config = _dated(config, directory)
    _check_output(config, directory)
    host_rewards = _host_rewards(config)
    check_rewards([*host_rewards, *rewards, *_quality_spec(config)], config.loss.use_quality)
    for reward in rewards:
        if isinstance(reward, HostReward):
            probe_callable(reward)
    if policy is None:
        source, opened = open_pretrained(config.model, config.revision or None)
        opened = replace(opened, tokenizer=opened.tokenizer.dated(config.date))
        make_game(config, opened)  # what does not fit is said before gigabytes are read
        policy = replace(opened, params=load_params(source, opened.config, config.param_dtype))
    else:
        params = cast(policy.params, config.param_dtype)
        policy = replace(policy, tokenizer=policy.tokenizer.dated(config.date), params=params)
    game = make_game(config, policy)
    kinds = token_kinds(policy)
    reference = cast(policy.params, game.compute_dtype)
    components: list[Reward] = [*host_rewards, *rewards]
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
    return Run(config, policy, reference, game, tuple(components), kinds, seed_key, directory)


def make_game(config: TrainConfig, policy: Policy) -> Game:
    """The static part of every stage; checks that prompts and completions fit the model's context."""
    compute = config.compute_dtype
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    prompts = PlayPrompts.build(policy.tokenizer, config.prompts)
    solver = len(prompts.solver.prefix_ids) + len(prompts.query_prefix_ids) + len(prompts.solver.suffix_ids)
    play, context = config.play, policy.config.max_position_embeddings
    lengths = {
        "prompts.challenger": len(prompts.challenger_ids) + play.max_query_length,
        "play.max_completion_length": solver + play.max_query_length + play.max_completion_length,
    }
    if config.reward.quality_weight:
        judge = judge_template(policy.tokenizer).fixed_length + len(prompts.query_prefix_ids)
        lengths["reward.quality_weight"] = judge + play.max_query_length + play.max_completion_length
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


def _check_output(config: TrainConfig, directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise InputError("output_dir", config.output_dir, "is a file; give a directory")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError("output_dir", config.output_dir, f"{existing} is not a directory that can be written to")
    check_replaceable(directory / EXPORT)
    found = [name for name in _RUN_FILES if (directory / name).exists()]
    if config.resume == "never" and found:
        raise InputError(
            "output_dir",
            config.output_dir,
            f"holds another run ({found[0]}); give a new directory, or --resume auto to go on with it",
        )
    if config.resume == "must" and not _has_checkpoint(directory):
        raise InputError("resume", "must", f"no checkpoint in {directory / CHECKPOINTS}; use auto or never to start")
    if found and "config.json" not in found:
        raise InputError("output_dir", config.output_dir, f"holds {found[0]} but no config.json; give a new directory")
    if "config.json" in found:
        changed = configs.differences(TrainConfig.load(directory / "config.json"), config)
        if changed:
            raise InputError(
                "resume",
                config.resume,
                f"the run in {directory} was started with another {', '.join(changed)}; "
                "use the same values or a new output_dir",
            )


def _dated(config: TrainConfig, directory: Path) -> TrainConfig:
    """With the day that chat templates show: the given one, else the resumed run's, else today's."""
    date, saved = config.date, directory / "config.json"
    if not date and config.resume != "never" and saved.is_file():
        date = TrainConfig.load(saved).date
    return replace(config, date=date or time.strftime("%d %b %Y"))


def _has_checkpoint(directory: Path) -> bool:
    checkpoints = Checkpoints(directory / CHECKPOINTS)
    try:
        return checkpoints.latest() is not None
    finally:
        checkpoints.close()


def _quality_spec(config: TrainConfig) -> list[RewardSpec]:
    weight = config.reward.quality_weight
    return [RewardSpec("quality", "quality", weight)] if weight else []


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


def claim(run: Run) -> None:
    """Makes the run's folder, with its configuration and, so that the run can be exported alone, the base model's."""
    base = run.directory / BASE
    base.mkdir(parents=True, exist_ok=True)
    fresh = run.directory / ".config.json.new"
    fresh.write_text(run.config.to_json(), encoding="utf-8")
    fresh.replace(run.directory / "config.json")  # whole or not at all: without it the run cannot be resumed
    hf_config = json.dumps(run.policy.config.to_hf(), indent=2) + "\n"
    (base / "config.json").write_text(hf_config, encoding="utf-8")
    run.policy.tokenizer.save(base)


def export_run(run: str | Path, directory: str | Path, step: int | None = None, dtype: str | None = None) -> int:
    """Writes the policy of a run's checkpoint (the newest without `step`) as a Hugging Face directory.

    Returns the checkpoint's iteration. Raises InputError when the folder holds no run or no such checkpoint.
    """
    run = Path(run).expanduser()
    if dtype is not None:
        check_dtype(dtype)
    check_replaceable(Path(directory).expanduser())
    config = TrainConfig.load(run / "config.json")
    checkpoints = Checkpoints(run / CHECKPOINTS, config.save_total_limit)
    try:
        saved = checkpoints.steps()
        if not saved or (step is not None and step not in saved):
            raise InputError("step", step, f"{run} has checkpoints {saved or 'none'}; give one of them or none")
        step = max(saved) if step is None else step
        model = read_config(run / BASE)
        tokenizer = Tokenizer.from_pretrained(run / BASE)
        shapes = abstract(lambda: cast(init_params(model, jax.random.key(0)), config.param_dtype))
        params = checkpoints.restore_params(step, shapes)
    finally:
        checkpoints.close()
    save_pretrained(Policy(model, params, tokenizer, str(run)), directory, dtype)
    return step
