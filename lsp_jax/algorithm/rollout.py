"""Rollouts of both roles: short completions in one program, long ones in chunks.

The functions also compose under `jax.jit`, where decoding is always one program.
"""

from __future__ import annotations

import jax
from jax.core import Tracer

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.core.stage import EAGER, Backend, Stage, stage
from lsp_jax.model import llama
from lsp_jax.play import chunked_decode, decode, selfplay
from lsp_jax.play.decode import Completions, DecodeSpec
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.text.prompts import Ragged


def challenge(
    params: llama.Params, token_classes: jax.Array, key: jax.Array, game: GameSpec, on: Backend = EAGER
) -> Queries:
    """Samples N queries; `token_classes` uint8 [V] tells text, blank and control tokens apart."""
    prompts, keys = on.call(challenger_rows, key, game=game)
    sampled = complete(params, prompts, keys, game.challenger, on)
    return on.call(read_queries, sampled, token_classes, game=game)


def solve(params: llama.Params, queries: Queries, key: jax.Array, game: GameSpec, on: Backend = EAGER) -> Episode:
    """Samples G answers to each query, which complete the episode."""
    prompts, keys = on.call(solver_rows, queries, key, game=game)
    answers = complete(params, prompts, keys, game.solver, on)
    return Episode(queries, prompts, on.call(grouped, answers, game=game))


def complete(
    params: llama.Params, prompts: Ragged, keys: jax.Array, spec: DecodeSpec, on: Backend = EAGER
) -> Completions:
    """Completions [B, ...] of `prompts` (tokens [N, P], lengths [N]) for rows with `keys` [B]."""
    if spec.chunked and not isinstance(keys, Tracer):
        return chunked_decode.decode_in_chunks(params, prompts, keys, spec, on)
    return on.call(rollout, params, prompts, keys, spec=spec)


rollout: Stage[..., Completions] = stage(static="spec")(decode.rollout)


def precompile(params: llama.Params, queries: Queries, key: jax.Array, game: GameSpec) -> None:
    """Compiles the decoding programs of both roles for all lengths; `queries` have the run's shapes."""
    if queries.sampled is not None and game.challenger.chunked:
        chunked_decode.precompile(params, *challenger_rows(key, game), game.challenger)
    if game.solver.chunked:
        chunked_decode.precompile(params, *solver_rows(queries, key, game), game.solver)


@stage(static="game")
def challenger_rows(key: jax.Array, game: GameSpec) -> tuple[Ragged, jax.Array]:
    """The Challenger's prompt and the keys of its rows."""
    return selfplay.challenger_rows(key, game.prompts, game.num_queries)


@stage(static="game")
def read_queries(sampled: Completions, token_classes: jax.Array, game: GameSpec) -> Queries:
    """Parses the Challenger's completions into queries."""
    return selfplay.read_queries(sampled, token_classes, game.prompts)


@stage(static="game")
def solver_rows(queries: Queries, key: jax.Array, game: GameSpec) -> tuple[Ragged, jax.Array]:
    """The Solver's prompts and the keys of its rows."""
    return selfplay.solver_rows(queries, key, game.prompts, game.num_generations)


@stage(static="game")
def grouped(flat: Completions, game: GameSpec) -> Completions:
    """Reshapes completions [N * G, ...] to [N, G, ...]."""
    return selfplay.grouped(flat, game.num_generations)
