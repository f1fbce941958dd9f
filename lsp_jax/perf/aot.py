"""Every stage of a run compiled ahead of time for devices that are not at hand, from shapes alone.

`Compiler` keeps what lies on the devices as trees of shapes with shardings, `compile_run` goes through the stages in
the order of `training/step.py`. Of each stage the compiler says what memory it needs; what else lies there at that
moment is added, and what it does is counted (`perf/cost.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsp_jax.algorithm import stages
from lsp_jax.algorithm.spec import Game
from lsp_jax.config import TrainConfig
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.lora import merge_trees
from lsp_jax.model.sharding import Layout, shardings, use_mesh
from lsp_jax.perf import hlo, placeholders
from lsp_jax.perf.chips import GIB, Topology
from lsp_jax.perf.cost import Work, count
from lsp_jax.play.prompt_data import widest
from lsp_jax.play.selfplay import Queries
from lsp_jax.reward import scoring
from lsp_jax.reward.base import RewardOutput, RewardSpec
from lsp_jax.reward.preference import preference_scores
from lsp_jax.reward.quality import logits_scores
from lsp_jax.reward.text_judge import write_judgements

Say = Callable[[str], None]

# Without a device nothing is tuned by trial, and tiles that are then guessed for Triton's products can be impossible.
_OPTIONS = {"cuda": {"xla_gpu_enable_triton_gemm": False}}


@dataclass(frozen=True)
class Phase:
    """One compiled stage; bytes are those of one chip."""

    name: str
    arguments: int
    outputs: int
    aliased: int
    """Outputs that take the place of arguments."""
    temporaries: int
    held: int
    """Bytes resident meanwhile that this stage does not read."""
    work: Work
    times: int
    """How often an iteration runs it; 0: once a run."""
    compile_seconds: float
    failure: str = ""
    """The compiler's words where it refused; it has then said nothing of memory or work."""

    @property
    def peak(self) -> int:
        """Bytes at the stage's worst moment."""
        return self.held + self.arguments + self.temporaries + self.outputs - self.aliased


class Compiler:
    """Compiles stages one after the other and keeps count of what lies on the devices."""

    def __init__(self, topology: Topology, mesh: Mesh, say: Say, parked: tuple[str, ...] = ()):
        self.topology: Topology = topology
        self.mesh: Mesh = mesh
        self.say: Say = say
        self.alive: dict[str, Any] = {}
        """Arrays resident on the devices, by name."""
        self.parked = parked
        """Of it, what is in host memory but for the stages that read it."""
        self.phases: list[Phase] = []

    def put(self, tree: Any, layout: Layout | None = None) -> Any:
        """Shapes with their place: parameters by the table's `layout`, anything else whole on every device."""
        if layout is not None:
            return placed(tree, shardings(tree, self.mesh, layout))
        whole = NamedSharding(self.mesh, PartitionSpec())
        return placed(tree, jax.tree.map(lambda _: whole, tree))

    def stage(self, name: str, lower: Callable[..., Any], *reads: Any, times: int = 1) -> Any:
        """Compiles `lower(*reads)`, shapes of things that are alive; returns its result's shapes with their places."""
        away = {id(leaf) for name in self.parked for leaf in jax.tree.leaves(self.alive.get(name))}
        lying, read = (
            device_bytes([leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in away])
            for tree in (self.alive, reads)
        )
        held = lying - read
        start = time.perf_counter()
        with use_mesh(self.mesh):  # for tracing only: nothing can be run on a mesh of devices that are not there
            lowered = lower(*reads)
        try:
            compiled = lowered.compile(_OPTIONS.get(self.topology.chip.platform))
        except jax.errors.JaxRuntimeError as error:
            words = " ".join(line.strip() for line in str(error).splitlines()[:2])
            self.phases.append(Phase(name, 0, 0, 0, 0, held, Work(), times, time.perf_counter() - start, words))
            self.say(f"{name}: refused by the compiler: {words}")
            return self.put(lowered.out_info)
        spent = time.perf_counter() - start
        memory = compiled.memory_analysis()
        kinds = ("argument", "output", "alias", "temp")
        arguments, outputs, aliased, temporaries = (getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
        work = count(hlo.parse(compiled.as_text()), len(self.topology.devices))
        phase = Phase(name, arguments, outputs, aliased, temporaries, held, work, times, spent)
        self.phases.append(phase)
        self.say(f"{name}: compiled in {spent:.1f} s, {phase.peak / GIB:.2f} GiB a chip")
        return placed(lowered.out_info, compiled.output_shardings)


def placed(shapes: Any, places: Any) -> Any:
    """Shapes with shardings."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def device_bytes(tree: Any) -> int:
    """Bytes of `tree` on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_run(
    config: TrainConfig,
    game: Game,
    reward_model: LlamaConfig | None,
    topology: Topology,
    mesh: Mesh,
    say: Say,
) -> Compiler:
    """All stages of the run `config`, from its start to the first update; `mesh` is one of the topology's devices,
    also where there is only one."""
    compiler = Compiler(topology, mesh, say, ("reference", "reward model") if config.park_frozen else ())
    alive, put = compiler.alive, compiler.put
    _start(compiler, config, game, reward_model)
    token_classes = alive["token_classes"] = put(_array(jnp.uint8, game.model.vocab_size))
    key = put(jax.eval_shape(jax.random.key, 0))
    params = _weight_sync(compiler, game)
    if config.data.source:
        queries = put(shapes_of_data_queries(game, widest(config.data)))
    else:
        challenge = partial(stages.challenge.lower, game=game)
        queries = compiler.stage("challenge", challenge, params, token_classes, key)
    solve = partial(stages.solve.lower, game=game)
    episode = alive["episode"] = compiler.stage("solve", solve, params, queries, key)
    del alive["playing copy"]
    _score(compiler, config, game, reward_model)
    _learn(compiler, config, game, episode)
    return compiler


def _weight_sync(compiler: Compiler, game: Game) -> Any:
    """The parameters that play. Adapters on one device play beside the reference, of which no copy is made."""
    alive, state = compiler.alive, compiler.alive["state"]
    if game.lora.rank and compiler.mesh.size == 1:
        lower = partial(stages.adapters_cast.lower, game=game)
        adapters = alive["playing copy"] = compiler.stage("weight_sync", lower, state.params)
        return merge_trees(alive["reference"], adapters)
    sync = jax.jit(partial(stages.rollout_params, game=game))
    base = alive["reference"] if game.lora.rank else {}
    params = compiler.stage("weight_sync", lambda params, base: sync.lower(params, base=base), state.params, base)
    alive["playing copy"] = params
    return params


def _start(compiler: Compiler, config: TrainConfig, game: Game, reward_model: LlamaConfig | None) -> None:
    """Arrays resident during the whole run, and how the state is made from the loaded parameters."""
    alive, put = compiler.alive, compiler.put
    loaded = llama.params_shape(game.model)
    alive["loaded"] = put(_as(loaded, game.compute_dtype if game.lora.rank else config.param_dtype), "train")
    alive["reference"] = put(_as(loaded, game.compute_dtype), "train")
    if reward_model is not None:
        alive["reward model"] = put(_as(llama.params_shape(reward_model), "bfloat16"), "train")
    if config.reward.quality_weight:
        tokens = put(placeholders.rubric(placeholders.judge(config, game.model)))
        lower = jax.jit(llama.extend, static_argnums=1).lower
        _, alive["rubric"] = compiler.stage(
            "rubric", lambda params: lower(params, game.model, *tokens), alive["reference"], times=0
        )
    alive["state"] = compiler.stage("start", jax.jit(game.init_train_state).lower, alive["loaded"], times=0)
    del alive["loaded"]


def shapes_of_data_queries(game: Game, width: int) -> Queries:
    """Shapes of an iteration's queries from data, [N, width]."""
    number = game.play.num_queries
    text = _array(jnp.int32, number, width), _array(jnp.int32, number)
    return Queries(None, text, _array(jnp.bool_, number))


def _score(compiler: Compiler, config: TrainConfig, game: Game, reward_model: LlamaConfig | None) -> None:
    """The compiled rewards; those on the host take no device memory."""
    alive, reward = compiler.alive, config.reward
    token_classes, episode = alive["token_classes"], alive["episode"]
    if reward_model is not None:
        preference = partial(
            preference_scores,
            config=reward_model,
            template=placeholders.preference_template(),
            blank=placeholders.BLANK,
            rows=reward.preference_rows,
        )
        lower = partial(scoring.score_component.lower, preference)
        params = {"model": alive["reward model"], "token_classes": token_classes}
        compiler.stage(
            "preference reward",
            lambda params, episode: lower(params | placeholders.no_tags(), episode),
            params,
            episode,
        )
    if reward.quality_weight:
        judge = placeholders.judge(config, game.model)
        if reward.quality_mode == "logits":
            lower = partial(scoring.score_component.lower, partial(logits_scores, judge=judge))
        else:
            length = reward.quality_max_length
            lower = partial(write_judgements.lower, judge=judge, max_length=length, stop_ids=game.stop_ids)
        params = {"reference": alive["reference"], "rubric": alive["rubric"], "token_classes": token_classes}
        compiler.stage(
            "quality reward", lambda params, episode: lower(params | placeholders.no_tags(), episode), params, episode
        )


def _learn(compiler: Compiler, config: TrainConfig, game: Game, episode: Any) -> None:
    """Advantages, reference, log-probabilities of inner epochs, update."""
    alive = compiler.alive
    specs = _specs(config)
    outputs = tuple(compiler.put(_output(game)) for _ in specs)
    batch = compiler.stage(
        "advantages", lambda episode: stages.learn_batch.lower(episode, outputs, specs, game), episode
    ).batch
    alive["batch"] = batch
    lower = partial(stages.reference.lower, game=game)
    references = alive["references"] = compiler.stage("reference", lower, alive["reference"], batch)
    state, against = alive["state"], alive["reference"] if game.needs_base else {}
    if game.loss.num_iterations > 1:
        lower = partial(stages.with_old_logprobs.lower, game=game)
        batch = alive["batch"] = compiler.stage("old log-probabilities", lower, state.params, against, batch)
    update = partial(stages.update.lower, game=game)
    compiler.stage("update", update, state, against, batch, references, times=game.loss.num_iterations)


def _output(game: Game) -> RewardOutput:
    """The shapes of any reward component's output."""
    number, group = game.play.num_queries, game.play.num_generations
    answers = _array(jnp.float32, number, group), _array(jnp.bool_, number, group)
    return RewardOutput(*answers, _array(jnp.bool_, number))


def _array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _as(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree)


def _specs(config: TrainConfig) -> tuple[RewardSpec, ...]:
    """One spec for each configured component: how they are mixed changes nothing that is counted."""
    reward = config.reward
    names = [name for name in ("arithmetic", "maths", "code", "quality") if getattr(reward, f"{name}_weight")]
    names += ["preference"] if reward.preference_model and reward.preference_weight else []
    names += ["callable"] if reward.callable else []
    return tuple(RewardSpec(name, "quality" if name == "quality" else "task", 1.0) for name in names)
