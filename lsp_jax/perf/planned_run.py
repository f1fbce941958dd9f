"""The programs of a run, compiled by a `Planner`: its start, and one call of `stages.iteration`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.spec import GameSpec, hyperparameters
from lsp_jax.config import TrainConfig
from lsp_jax.core.stage import Backend, Stage, stage
from lsp_jax.model import llama
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.sharding import use_mesh
from lsp_jax.perf import placeholders
from lsp_jax.perf.aot import Phase, Planner, Say, device_bytes
from lsp_jax.perf.chips import Topology
from lsp_jax.play.prompt_data import widest
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.reward.base import RewardOutput, RewardSpec
from lsp_jax.reward.preference import preference_scores
from lsp_jax.reward.quality import logits_scores
from lsp_jax.reward.scoring import score_component
from lsp_jax.reward.text_judge import judge_spec, write_judgements


@dataclass(frozen=True)
class PlannedRun:
    """All programs of a run, and the arrays that are always resident."""

    phases: tuple[Phase, ...]
    resident: dict[str, int]
    """Bytes per chip by name; the state consists of master parameters and both moments."""
    checkpoint: int
    """Bytes of the train state."""


def compile_run(
    config: TrainConfig,
    game: GameSpec,
    reward_model: LlamaConfig | None,
    topology: Topology,
    mesh: Mesh,
    say: Say,
) -> PlannedRun:
    """Compiles all programs of the run `config`, from its start to the first update, without resampling of queries
    (`play.max_resamples`). `mesh` consists of the topology's devices, even if there is only one."""
    planner = Planner(topology, mesh, say)
    with use_mesh(mesh):
        source = PlannedSource(planner, config, game, reward_model)
        with planner.phase("start", times=0):
            # a list, so that this is the only reference: the iteration donates the state
            state = [planner.call(_start(game), source.loaded())]
        checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        resident = {"state": device_bytes(state)} | source.resident
        key, hyper, weight = jax.eval_shape(
            lambda: (jax.random.key(0), jax.tree.map(jnp.float32, hyperparameters(config)), jnp.float32(1))
        )
        rows = game.num_queries * game.num_generations  # no row finishes early: all completions have the maximum length
        backend = Backend(call=planner.call, phase=planner.phase, read=lambda _: rows)
        inputs = planner.put((key, hyper, weight))
        stages.iteration(backend, source, state.pop(), source.reference, inputs, game)
    return PlannedRun(planner.phases, resident, checkpoint)


def _start(game: GameSpec) -> Stage[..., Any]:
    def start(params: llama.Params) -> Any:
        return game.init_train_state(params)

    return stage()(start)


class PlannedSource:
    """The queries and rewards of an iteration as shapes; holds the arrays that they need. Host rewards take no device
    memory."""

    def __init__(self, planner: Planner, config: TrainConfig, game: GameSpec, reward_model: LlamaConfig | None) -> None:
        self._planner, self._config, self._game, self._reward_model = planner, config, game, reward_model
        self.specs: tuple[RewardSpec, ...] = planner.put(_specs(config))
        frozen = {"reference": planner.put(_as(llama.params_shape(game.model), game.learner.compute_dtype), "train")}
        self.reference: Any = frozen["reference"]
        """Parameters of the frozen reference."""
        if reward_model is not None:
            frozen["reward model"] = planner.put(_as(llama.params_shape(reward_model), "bfloat16"), "train")
        self._scorer = frozen.get("reward model")
        self._token_classes = planner.put(_array(jnp.uint8, game.model.vocab_size))
        if config.park_frozen:
            planner.offload(frozen)
        self.resident: dict[str, int] = {} if config.park_frozen else {k: device_bytes(v) for k, v in frozen.items()}
        """Bytes per chip of the arrays that this holds, by name."""
        self._rubric = self._prefilled_rubric() if config.reward.quality_weight else None
        if self._rubric is not None:
            self.resident["rubric"] = device_bytes(self._rubric)

    def loaded(self) -> Any:
        """Returns the parameters as loaded."""
        config, learner = self._config, self._game.learner
        dtype = learner.compute_dtype if learner.lora.rank else config.param_dtype
        return self._planner.put(_as(llama.params_shape(learner.model), dtype), "train")

    def _prefilled_rubric(self) -> Any:
        model, tokens = self._game.model, placeholders.rubric(placeholders.judge(self._config, self._game.model))

        def rubric(params: llama.Params, tokens: jax.Array, lengths: jax.Array) -> Any:
            return llama.extend(params, model, tokens, lengths)[1]

        with self._planner.phase("rubric", times=0):
            return self._planner.call(stage()(rubric), self.reference, *self._planner.put(tokens))

    def queries(self, on: Backend, params: llama.Params, key: jax.Array) -> Queries:
        """Sampled queries, or queries as wide as the longest prompt of the data set."""
        if self._config.data.source:
            return self._planner.put(shapes_of_data_queries(self._game, widest(self._config.data)))
        return rollout.challenge(params, self._token_classes, key, self._game, on)

    def score(
        self, on: Backend, params: llama.Params, key: jax.Array, episode: Episode
    ) -> tuple[Episode, Callable[[], tuple[RewardOutput, ...]]]:
        """As `Source.score`; all components have outputs of the same shapes."""
        reward, judged = self._config.reward, {"token_classes": self._token_classes, "tags": placeholders.NO_TAGS}
        judged["tags"] = self._planner.put(judged["tags"])
        if self._reward_model is not None:
            preference = partial(
                preference_scores,
                config=self._reward_model,
                template=placeholders.preference_template(),
                blank=placeholders.BLANK,
                rows=reward.preference_rows,
            )
            with on.phase("preference reward"):
                on.call(score_component, {"model": self._scorer, **judged}, episode, score=preference)
        if reward.quality_weight:
            judge = placeholders.judge(self._config, self._game.model)
            params = {"reference": self.reference, "rubric": self._rubric, **judged}
            with on.phase("quality reward"):
                if reward.quality_mode == "logits":
                    on.call(score_component, params, episode, score=partial(logits_scores, judge=judge))
                else:
                    spec = judge_spec(judge, reward.quality_max_length, self._game.solver.stop_ids)
                    on.call(write_judgements, params, episode, judge=judge, spec=spec)
        number, group = self._game.num_queries, self._game.num_generations
        answers = _array(jnp.float32, number, group), _array(jnp.bool_, number, group)
        output = RewardOutput(*answers, _array(jnp.bool_, number))
        return episode, lambda: tuple(self._planner.put(output) for _ in self.specs)


def shapes_of_data_queries(game: GameSpec, width: int) -> Queries:
    """Returns the shapes of queries from a data set, [N, width]."""
    number = game.num_queries
    text = _array(jnp.int32, number, width), _array(jnp.int32, number)
    return Queries(None, text, _array(jnp.bool_, number))


def _array(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _as(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tree)


def _specs(config: TrainConfig) -> tuple[RewardSpec, ...]:
    """Shapes of one spec per configured component; standardisation costs next to nothing and is left out."""
    reward = config.reward
    names = [name for name in ("arithmetic", "maths", "code", "quality") if getattr(reward, f"{name}_weight")]
    names += ["preference"] if reward.preference_model and reward.preference_weight else []
    names += ["callable"] if reward.callable else []
    specs = tuple(RewardSpec(name, "quality" if name == "quality" else "task", 1.0) for name in names)
    return jax.tree.map(lambda _: _array(jnp.float32), specs)
