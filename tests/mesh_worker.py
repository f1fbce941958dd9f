"""One LSP iteration on meshes of 8 CPU devices, compared with one device: `mesh_worker.py MODEL REWARD NAME ...`.

Prints one JSON object: for each mesh how far it is from the single device, and what is spread over what.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_xla_profile_version", 2)  # kept apart from what is compiled in full, see conftest.py

import lsp_jax as lsp  # noqa: E402
from lsp_jax.algorithm import rollout, stages  # noqa: E402
from lsp_jax.algorithm.learner_batch import learn_batch  # noqa: E402
from lsp_jax.algorithm.spec import GameSpec  # noqa: E402
from lsp_jax.config import RewardConfig  # noqa: E402
from lsp_jax.learn.optimizer import OptimizerConfig  # noqa: E402
from lsp_jax.learn.update import gradients, reference_logprobs  # noqa: E402
from lsp_jax.model import llama  # noqa: E402
from lsp_jax.model.sharding import HOST_MEMORY, MeshConfig, load_to_device, make_mesh, partitions, use_mesh  # noqa: E402
from lsp_jax.play.sampler import SamplingConfig  # noqa: E402
from lsp_jax.play.selfplay import Episode, PlayConfig  # noqa: E402
from lsp_jax.reward import scoring  # noqa: E402
from lsp_jax.reward.judge import Judge, judge_params  # noqa: E402
from lsp_jax.reward.text_judge import judge_spec, write_judgements  # noqa: E402
from lsp_jax.text.judge_prompts import text_judge_template  # noqa: E402
from lsp_jax.training import setup  # noqa: E402
from lsp_jax.training.run import Run  # noqa: E402
from lsp_jax.training.step import StepContext, train_step  # noqa: E402
from test_trainer import game_config  # noqa: E402

MESHES = {
    "8 data": MeshConfig(data=8),
    "8 fsdp": MeshConfig(fsdp=-1),
    "4 fsdp x 2 tensor": MeshConfig(fsdp=4, tensor=2),
    "2 data x 2 fsdp x 2 tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}

JUDGED = {"data": 2, "fsdp": 2, "tensor": 2}  # there the judge writes too
PARKED = "8 fsdp"  # there reference and reward model wait in host memory


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def iteration(run: Run, params: Any) -> dict[str, Any]:
    """The stages by themselves, so that the gradient before clipping can be seen."""
    state, game = start(run, params), in_one_piece(run.game)
    key = stages.iteration_key(run.seed_key, state.iteration, state.attempt)
    playing = stages.rollout_params(state.params, game, run.reference)
    episode = rollout.solve(playing, rollout.challenge(playing, run.token_classes, key, game), key, game)
    outputs = tuple(
        scoring.score_component(load_to_device(reward.params), episode, score=reward.score) for reward in run.rewards
    )
    learnable = learn_batch(episode, outputs, run.specs, run.hyper, game=game)
    references = reference_logprobs(load_to_device(run.reference), learnable.batch, game.learner)
    arguments = state.params, learnable.batch, references, run.hyper
    program = gradients.lower(*arguments, spec=game.learner).compile()
    gradient, metrics = program(*arguments)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradient)
    return {
        "queries": np.asarray(episode.queries.text[0]),
        "answers": np.asarray(episode.answers.tokens),
        "rewards": [np.asarray(output.values) for output in outputs],
        "gradient": vector(gradient),
        "gradient_specs": specs(gradient),
        "moved": vector(moved),
        "loss": float(metrics["loss"]),
        "parked": {leaf.sharding.memory_kind for leaf in jax.tree.leaves(run.reference)} == {HOST_MEMORY},
        "judged": judged(run, params, episode) if run.mesh is None or dict(run.mesh.shape) == JUDGED else None,
        "decode_specs": specs(playing),
        "answers_spec": specs(episode.answers.tokens)[0],
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        **(in_chunks(run, state) if run.mesh is not None else {}),
    }


def in_chunks(run: Run, state: Any) -> dict[str, Any]:
    """The same iteration as a run on that mesh executes it, decoding chunk by chunk."""
    result = train_step(run, state, StepContext(1))
    return {
        "played_loss": float(result.metrics["loss"]),
        "state_specs": specs(result.state),
        "wanted_specs": [str(spec) for spec in jax.tree.leaves(partitions(result.state), is_leaf=is_spec)],
    }


def in_one_piece(game: GameSpec) -> GameSpec:
    """The same game, decoded by one program a role."""
    return replace(game, challenger=replace(game.challenger, chunk=0), solver=replace(game.solver, chunk=0))


def judged(run: Run, params: Any, episode: Episode) -> np.ndarray:
    """What the policy writes as the judge in `text` mode."""
    tokenizer = run.policy.tokenizer
    judge = Judge(run.game.model, text_judge_template(tokenizer), tokenizer.encode(" ")[0], 4)
    params = judge_params(params, judge, tokenizer, run.token_classes)
    return np.asarray(write_judgements(params, episode, judge=judge, spec=judge_spec(judge, 6, (2,))).tokens)


def is_spec(value: Any) -> bool:
    return isinstance(value, jax.sharding.PartitionSpec)


def start(run: Run, params: Any) -> Any:
    return jax.jit(run.game.init_train_state)(params)


def specs(tree: Any) -> list[str]:
    """How each array is spread, trailing whole axes left out."""
    return [str(getattr(leaf.sharding, "spec", None)) for leaf in jax.tree.leaves(tree)]


def activations(run: Run, params: Any) -> dict[str, str]:
    """What lies where in a prefill and a teacher-forced pass of 8 rows."""
    tokens, lengths = jax.numpy.ones((8, 16), int), jax.numpy.full(8, 16)

    def passes(params: Any) -> Any:
        hidden, cache = llama.extend(params, run.game.model, tokens, lengths)
        return hidden, cache.keys, llama.forward(params, run.game.model, tokens)

    hidden, keys, logits = jax.jit(passes)(params)
    return dict(zip(("hidden", "keys", "logits"), specs((hidden, keys, logits)), strict=True))


def texts(model: str, mesh: Any) -> list[str]:
    """What the policy loaded onto `mesh` writes, greedily and sampled."""
    policy = lsp.load_pretrained(model, mesh=mesh)
    prompts = ["What is 3 + 4?", "Name a colour.", "x"]
    return [
        text
        for temperature in (0.0, 0.7)
        for text in lsp.generate(policy, prompts, SamplingConfig(temperature), max_completion_length=12, batch_size=2)
    ]


def main() -> None:
    model, reward_model, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = game_config(
            model,
            Path(folder) / "run",
            play=PlayConfig(8, 4, max_query_length=8, max_completion_length=8, decode_chunk=3),
            reward=RewardConfig(preference_model=reward_model, quality_weight=0.5, judge_rows=4, preference_rows=4),
            optimizer=OptimizerConfig(learning_rate=1e-3, micro_batch_size=2, logprob_chunk=4),
        )
        make, setup.make_mesh = setup.make_mesh, lambda *_: None
        # micro-batches are rows a device: as many in all as on the mesh of 8
        at_once = replace(config, optimizer=replace(config.optimizer, micro_batch_size=16))
        alone = iteration(*setup.setup(at_once))
        setup.make_mesh = make
        found: dict[str, Any] = {"alone": {"temporaries": alone["temporaries"]}}
        norm = np.linalg.norm(alone["gradient"])
        for name in names:
            sizes = MESHES[name]
            run, params = setup.setup(replace(config, mesh=sizes, park_frozen=name == PARKED))
            assert dict(run.mesh.shape) == dict(make_mesh(sizes).shape)
            with use_mesh(run.mesh):
                got, lying = iteration(run, params), activations(run, params)
            found[name] = {
                "same_queries": bool((got["queries"] == alone["queries"]).all()),
                "same_answers": bool((got["answers"] == alone["answers"]).all()),
                "rewards": max(
                    float(np.abs(a - b).max()) for a, b in zip(got["rewards"], alone["rewards"], strict=True)
                ),
                "gradient": float(np.linalg.norm(got["gradient"] - alone["gradient"]) / norm),
                "moved": float(np.linalg.norm(got["moved"] - alone["moved"]) / (0.1 * norm)),
                "loss": abs(got["loss"] - alone["loss"]),
                "played_loss": abs(got["played_loss"] - alone["loss"]),
                "parked": got["parked"],
                "same_judgements": got["judged"] is None or bool((got["judged"] == alone["judged"]).all()),
                **{key: got[key] for key in got if key.endswith(("specs", "spec", "temporaries"))},
                **lying,
            }
        found["generate"] = [texts(model, None), texts(model, make_mesh(MESHES["4 fsdp x 2 tensor"]))]
        print(json.dumps(found))


if __name__ == "__main__":
    main()
