"""Both roles' play as the host loop does it: short completions by one program, long ones chunk by chunk.

The numbers are those of `algorithm/stages.py`'s `challenge` and `solve`, which compose under `jax.jit`.
"""

from __future__ import annotations

from functools import partial

import jax

from lsp_jax.algorithm import stages
from lsp_jax.algorithm.spec import Game
from lsp_jax.core.stage import first_checked
from lsp_jax.model import llama
from lsp_jax.play import selfplay
from lsp_jax.play.chunked_decode import Chunks
from lsp_jax.play.decode import Completions
from lsp_jax.play.selfplay import Episode, Queries
from lsp_jax.text.prompts import Ragged


def challenge(params: llama.Params, token_classes: jax.Array, key: jax.Array, game: Game) -> Queries:
    """N queries, as `stages.challenge`."""
    if not game.play.chunks(game.play.max_query_length):
        return first_checked(stages.challenge, params, token_classes, key, game)
    prompts, keys = _challenger_rows(key, game)
    return _read_queries(_queries(game).run(params, prompts[0], prompts[1], keys), token_classes, game)


def solve(params: llama.Params, queries: Queries, key: jax.Array, game: Game) -> Episode:
    """The episode: G answers to each query, as `stages.solve`."""
    if not game.play.chunks(game.play.max_completion_length):
        return first_checked(stages.solve, params, queries, key, game)
    prompts, keys = _solver_rows(queries, key, game)
    return Episode(queries, prompts, _grouped(_answers(game).run(params, prompts[0], prompts[1], keys), game))


def precompile(params: llama.Params, queries: Queries, key: jax.Array, game: Game) -> None:
    """Compiles what both roles' decoding can need, whatever lengths they play; `queries` are of the run's shapes."""
    if queries.sampled is not None and game.play.chunks(game.play.max_query_length):
        prompts, keys = _challenger_rows(key, game)
        _queries(game).precompile(params, prompts[0], prompts[1], keys)
    if game.play.chunks(game.play.max_completion_length):
        prompts, keys = _solver_rows(queries, key, game)
        _answers(game).precompile(params, prompts[0], prompts[1], keys)


def _queries(game: Game) -> Chunks:
    play = game.play
    return Chunks(game.model, game.challenger_sampling, play.max_query_length, game.stop_ids, play.decode_chunk)


def _answers(game: Game) -> Chunks:
    play = game.play
    return Chunks(game.model, game.solver_sampling, play.max_completion_length, game.stop_ids, play.decode_chunk)


@partial(jax.jit, static_argnames="game")
def _challenger_rows(key: jax.Array, game: Game) -> tuple[Ragged, jax.Array]:
    return selfplay.challenger_rows(key, game.prompts, game.play)


@partial(jax.jit, static_argnames="game")
def _read_queries(sampled: Completions, token_classes: jax.Array, game: Game) -> Queries:
    return selfplay.read_queries(sampled, token_classes, game.prompts)


@partial(jax.jit, static_argnames="game")
def _solver_rows(queries: Queries, key: jax.Array, game: Game) -> tuple[Ragged, jax.Array]:
    prompts = selfplay.splice_queries(queries, game.prompts)
    return prompts, selfplay.solver_keys(key, prompts[0].shape[0], game.play)


@partial(jax.jit, static_argnames="game")
def _grouped(flat: Completions, game: Game) -> Completions:
    return selfplay.grouped(flat, game.play)
