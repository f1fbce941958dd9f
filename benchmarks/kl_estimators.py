"""The KL estimators on a trained policy against its base: what each says, and where its gradient points.

    python benchmarks/kl_estimators.py BASE_DIR TRAINED_DIR [--episodes 6]

The trained model plays arithmetic against the frozen base (8 x 8 answers of up to 16 tokens, temperature 1, no
truncation). `value` is the term's mean a token, `gradient` that of the term alone (no reward), compared with that of
`full`, which sums over the vocabulary: `|mean|` the length of the mean over episodes, `one` that of a single episode,
both as multiples of full's mean; `cosine` of the mean and of a single episode with full's mean. Then how much
probability truncation cuts off of what the same policy writes.

Writes `results/kl_estimators.json` and `results/kl_estimators.md`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

import lsp_jax as lsp
from lsp_jax.algorithm import rollout, stages
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.learn.losses import KL_ESTIMATORS
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.learn.update import Objective, reference_logprobs, role_gradients
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import Episode, PlayConfig
from lsp_jax.training.setup import setup

TRUNCATIONS = {
    "top-p 0.95": SamplingConfig(top_p=0.95),
    "top-p 0.9": SamplingConfig(top_p=0.9),
    "top-k 50": SamplingConfig(top_k=50),
    "min-p 0.05": SamplingConfig(min_p=0.05),
}


def game_of(trained: str, folder: str) -> tuple[Any, Any]:
    """The run that plays, and the policy's parameters: temperature 1, nothing cut off."""
    preset = lsp.presets.quickstart()
    play = PlayConfig(num_queries=8, num_generations=8, max_query_length=12, max_completion_length=16)
    config = replace(preset, model=trained, output_dir=folder, play=play, sampling=SamplingConfig())
    config = replace(config, optimizer=replace(preset.optimizer, micro_batch_size=64))
    run, params = setup(replace(config, reward=replace(config.reward, quality_weight=0.0)))
    run.workers.close()
    return run, params


def played(run: Any, params: Any, game: GameSpec, number: int) -> Episode:
    key = jax.random.fold_in(jax.random.key(0), number)
    queries = rollout.challenge(params, run.token_classes, key, game)
    episode = rollout.solve(params, queries, key, game)
    if not bool(episode.queries.valid.any()):
        raise SystemExit(f"episode {number} has no valid query, so no token to compare on: give a trained model")
    return episode


@partial(jax.jit, static_argnames=("game", "estimator"))
def term(
    params: Any, base: Any, episode: Episode, hyper: Hyperparameters, game: GameSpec, estimator: str
) -> tuple[jax.Array, Any]:
    """A token's mean term, and the gradient of the Solver's rows with nothing but beta = 1 times it."""
    batch = stages.rows_without_rewards(episode, game)
    spec = replace(game.learner, loss=replace(game.learner.loss, kl_estimator=estimator))
    references, rows = reference_logprobs(base, batch, spec=spec), batch.solver
    objective = Objective(spec, spec.solver, hyper._replace(beta=1.0), base)
    value, _, grads = role_gradients(params, rows, references.solver, objective)
    return value / jnp.sum(rows.weights[:, None] * rows.mask), grads


def estimators(run: Any, params: Any, base: Any, episodes: int) -> dict[str, dict[str, Any]]:
    """By estimator."""
    plays = [played(run, params, run.game, number) for number in range(episodes)]
    values: dict[str, list[float]] = {}
    means: dict[str, Any] = {}
    single: dict[str, list[tuple[float, float]]] = {}
    for name in ("full", *(name for name in KL_ESTIMATORS if name != "full")):
        values[name], single[name], total = [], [], None
        for number, episode in enumerate(plays):
            value, grads = term(params, base, episode, run.hyper, run.game, name)
            values[name].append(float(value))
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            if name != "full":
                single[name].append((float(optax.tree.norm(grads)), cosine(grads, means["full"])))
            print(name, number, values[name][-1], flush=True)
        means[name] = jax.tree.map(lambda x: x / episodes, total)
    length = float(optax.tree.norm(means["full"]))
    return {
        name: {
            "value": float(np.mean(values[name])),
            "error": float(np.std(values[name], ddof=1) / np.sqrt(episodes)),
            "norm": float(optax.tree.norm(means[name])) / length,
            "cosine": cosine(means[name], means["full"]),
            "one_norm": float(np.mean([norm for norm, _ in single[name]])) / length if single[name] else None,
            "one_cosine": float(np.mean([angle for _, angle in single[name]])) if single[name] else None,
        }
        for name in KL_ESTIMATORS
    }


def cosine(left: Any, right: Any) -> float:
    return float(optax.tree.vdot(left, right) / (optax.tree.norm(left) * optax.tree.norm(right)))


def truncation(run: Any, params: Any) -> dict[str, dict[str, Any]]:
    """What is cut off a token, in nats of the learner's log-probability."""
    found = {}
    for name, sampling in TRUNCATIONS.items():
        game = replace(run.game, solver=replace(run.game.solver, sampling=sampling))
        answers = played(run, params, game, 0).answers
        mask = np.arange(answers.tokens.shape[-1]) < np.asarray(answers.lengths)[..., None]
        lost = -np.asarray(answers.log_mass)[mask]
        found[name] = {"mean": float(lost.mean()), "largest": float(lost.max()), "tokens": int(mask.sum())}
    return found


def table(found: dict[str, dict[str, Any]], cut: dict[str, dict[str, float]]) -> str:
    lines = ["| estimator | value a token (standard error) | mean gradient | cosine | one episode's | cosine |"]
    lines.append("|---" * 6 + "|")
    for name, row in found.items():
        one = f"{row['one_norm']:.2f} | {row['one_cosine']:.2f}" if row["one_norm"] is not None else " | "
        value = f"{row['value']:.4f} ({row['error']:.4f})"
        lines.append(f"| `{name}` | {value} | {row['norm']:.2f} | {row['cosine']:.2f} | {one} |")
    lines += ["", "| truncation | mean of -log kept mass a token | largest |", "|---|---|---|"]
    lines += [f"| {name} | {row['mean']:.4f} | {row['largest']:.3f} |" for name, row in cut.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("trained")
    parser.add_argument("--episodes", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, params = game_of(options.trained, f"{folder}/run")
        found = estimators(run, params, lsp.load_pretrained(options.base).params, options.episodes)
        cut = truncation(run, params)
    data = {"episodes": options.episodes, "estimators": found, "truncation": cut}
    measure.write("kl_estimators", data, table(found, cut))


if __name__ == "__main__":
    main()
