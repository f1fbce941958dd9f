"""From a configuration to a `Run`, with all checks that can be made before long work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from lsp_jax.algorithm.spec import GameSpec, hyperparameters
from lsp_jax.checkpoint.export import load_run_params, open_run
from lsp_jax.checkpoint.run_dir import check_output, resolve_run_constants
from lsp_jax.config import TrainConfig, flat
from lsp_jax.core import processes
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.model.llama import Params, cast, params_shape
from lsp_jax.model.lora import adapters_shape
from lsp_jax.model.sharding import check_model, make_mesh, offload_to_host, replicate, shardings, use_mesh
from lsp_jax.model.weights import load_params
from lsp_jax.perf.memory import device_memory, with_micro_batch_size
from lsp_jax.play.prompt_data import PromptData, load_data, longest
from lsp_jax.policy import Policy, open_pretrained
from lsp_jax.reporting.metrics import check_metric
from lsp_jax.reporting.writer import check_trackers
from lsp_jax.reward.base import DeviceReward, Reward
from lsp_jax.reward.build import check_data, load_rewards, open_rewards
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.preference import check_context
from lsp_jax.text.judge_prompts import judge_length
from lsp_jax.text.prompts import PlayPrompts
from lsp_jax.text.tokenizer import SPECIAL
from lsp_jax.training.run import Run


def setup(config: TrainConfig, rewards: Sequence[Reward] = (), policy: Policy | None = None) -> tuple[Run, Params]:
    """Checks all settings and loads the model unless `policy` is given; writes nothing.

    Returns the run and the initial parameters, to which only the caller holds a reference: delete it once there is a
    train state. `rewards` are further components beside the configured ones. Raises InputError.
    """
    if policy is not None:
        config = replace(config, model=config.model or policy.source)
    config.check()
    check_same(config)
    check_trackers(config.report_to)
    check_metric(config.metric_for_best_model)
    directory = user_path("output_dir", config.output_dir)
    config = resolve_run_constants(config, directory)
    check_output(config, directory)
    # decided once: between two processes the date may change or another run may save
    date, step = processes.gather("date and init_step", [config.date, config.init_step])[0]
    config = replace(config, date=date, init_step=step)
    workers = Workers(config.reward.workers, config.reward.timeout)
    try:
        opened_rewards = open_rewards(
            config.reward, rewards, workers, use_quality=config.loss.use_quality, date=config.date
        )
        opened, load = _source(config, policy)
        opened = replace(opened, params={}, tokenizer=opened.tokenizer.dated(config.date))
        data = load_data(config.data, opened.tokenizer) if config.data.source else None
        probe = load_probe(config, opened)
        for rows in (data, probe):
            check_data(config.reward, rows, workers)
        game = make_game(config, opened, data, probe)  # checks lengths before gigabytes are read
        if opened_rewards.reward_model is not None:
            query = longest_query(config, game.prompts, data, probe)
            check_context(opened_rewards.reward_model, query, config.play.max_completion_length)
        mesh = make_mesh(config.mesh, opened.config)
        if mesh is not None and opened_rewards.reward_model is not None:
            check_model(tuple(mesh.shape.values()), opened_rewards.reward_model.config, "reward model")
        memory = min(processes.gather("device memory", device_memory() or 0)) or None
        scorer = opened_rewards.reward_model
        width = max(data.width, longest(data, len(game.prompts.solver.prefix_ids))) if data else 0
        game = with_micro_batch_size(game, config, scorer and scorer.config, mesh, memory, width)
        # with adapters the base is frozen and needs no master copy
        dtype = game.learner.compute_dtype if config.lora.rank else config.param_dtype
        params = load(mesh, dtype)
        with use_mesh(mesh):
            classes = token_classes(opened)
            reference = cast(params, game.learner.compute_dtype)
            components = load_rewards(config.reward, opened_rewards, opened, reference, classes, mesh)
            if config.park_frozen:
                reference, components = _offloaded(reference, components, stays=config.lora.rank > 0)
            specs = jax.tree.map(np.float32, opened_rewards.specs)
            seed_key, hyper, specs = replicate((jax.random.key(config.seed), hyperparameters(config), specs))
    except BaseException:
        workers.close()
        raise
    made = opened, reference, game, hyper, data, probe, components, specs, scorer, workers, mesh, classes
    return Run(config, *made, seed_key, directory), params


def check_same(config: TrainConfig) -> None:
    """Raises InputError if processes were started with different configurations."""
    values = {name: value for name, value in flat(config).items() if name != "processes.index"}
    processes.check_same("config", values, "start all processes with the same settings")


def _offloaded(reference: Params, components: tuple[Reward, ...], stays: bool) -> tuple[Params, tuple[Reward, ...]]:
    """Moves both to host memory; shared arrays (the judge is the reference) stay shared. With adapters the reference
    `stays` on the devices, because rollouts read it."""
    trees = [component.params if isinstance(component, DeviceReward) else None for component in components]
    leaves, structure = jax.tree.flatten((reference, trees))
    kept = {id(leaf) for leaf in jax.tree.leaves(reference)} if stays else set()
    # each array once, even if several trees hold it
    parked = {id(leaf): leaf if id(leaf) in kept else offload_to_host(leaf) for leaf in leaves}
    reference, trees = jax.tree.unflatten(structure, [parked[id(leaf)] for leaf in leaves])
    return reference, tuple(
        replace(component, params=tree) if isinstance(component, DeviceReward) else component
        for component, tree in zip(components, trees, strict=True)
    )


def _source(config: TrainConfig, policy: Policy | None) -> tuple[Policy, Callable[[Mesh | None, str], Params]]:
    """Opens the initial policy: given, another run's, or a model's. Returns it without parameters, and a function that
    loads these onto a mesh in a dtype."""
    if policy is not None:
        given = policy
        return given, lambda mesh, dtype: jax.device_put(cast(given.params, dtype), shardings(given.params, mesh))
    if config.init_from:
        opened = open_run(config.init_from)
        return opened, lambda mesh, dtype: load_run_params(config.init_from, config.init_step, dtype, mesh)
    directory, opened = open_pretrained(config.model, config.revision or None)
    return opened, lambda mesh, dtype: load_params(directory, opened.config, dtype, mesh)


def load_probe(config: TrainConfig, policy: Policy) -> PromptData | None:
    """Loads the prompts of `health.probe` in the format of `data`; None if there are none. Raises InputError."""
    if not config.health.probe:
        return None
    if not user_path("health.probe", config.health.probe).is_file():
        raise InputError("health.probe", config.health.probe, "no such file; give a JSONL file of prompts")
    return load_data(replace(config.data, source=config.health.probe, shuffle=False), policy.tokenizer)


def make_game(
    config: TrainConfig, policy: Policy, data: PromptData | None = None, probe: PromptData | None = None
) -> GameSpec:
    """Returns the static specification; checks that prompts and completions fit the model's context."""
    compute = config.compute_dtype
    if compute == "auto":
        compute = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    prompts = PlayPrompts.build(policy.tokenizer, config.prompts)
    play, context = config.play, policy.config.max_position_embeddings
    if config.lora.rank:
        adapters_shape(params_shape(policy.config), config.lora)  # checks the rank
    query = longest_query(config, prompts, data, probe)
    solver = len(prompts.solver.prefix_ids) + query + len(prompts.solver.suffix_ids)
    lengths = {"play.max_completion_length": solver + play.max_completion_length}
    if data is None:
        lengths["prompts.challenger"] = len(prompts.challenger_ids) + play.max_query_length
    if config.reward.quality_weight:
        reward = config.reward
        judge = judge_length(policy.tokenizer, reward.quality_mode, reward.rubric, reward.quality_max_length)
        lengths["reward.quality_weight"] = judge + query + play.max_completion_length
    for field, length in lengths.items():
        if length > context:
            raise InputError(
                field,
                length,
                f"tokens of prompt and completion exceed the model's context of {context}: shorten one of them",
            )
    return GameSpec.of(config, policy.config, prompts, policy.tokenizer.stop_ids, compute)


def token_classes(policy: Policy) -> jax.Array:
    """`Tokenizer.token_classes` on device; rows of the embedding beyond the tokenizer count as control ids."""
    token_classes = np.full(policy.config.vocab_size, SPECIAL, np.uint8)
    known = policy.tokenizer.token_classes()
    token_classes[: len(known)] = known
    return replicate(token_classes)


def longest_query(
    config: TrainConfig, prompts: PlayPrompts, data: PromptData | None, probe: PromptData | None = None
) -> int:
    """Returns the number of tokens of the longest possible query."""
    fixed = len(prompts.solver.prefix_ids)
    probed = longest(probe, fixed) if probe is not None else 0
    if data is not None:
        return max(probed, longest(data, fixed))
    return max(probed, len(prompts.query_prefix_ids) + config.play.max_query_length)
