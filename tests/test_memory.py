"""The estimate of how many rows fit, against sums by hand and against what the compiler says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax import presets
from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.config import TrainConfig
from lsp_jax.learn.batch import Rows
from lsp_jax.learn.logprobs import completion_hidden
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.update import DEFAULT_MICRO_BATCH_SIZE
from lsp_jax.model.known_models import shape_of
from lsp_jax.model.llama import params_shape
from lsp_jax.perf import placeholders
from lsp_jax.perf.memory import row_bytes, with_micro_batch_size
from lsp_jax.play.selfplay import PlayConfig
from tiny import tiny_config

GIB = 2**30


def game_of(config: TrainConfig, model: str = "llama-3.2-3b") -> GameSpec:
    return placeholders.game(config, shape_of(model))


def micro_batch(*arguments: Any) -> int:
    return with_micro_batch_size(*arguments).learner.micro_batch_size


@pytest.mark.full
def test_more_memory_never_holds_fewer_rows():
    config = presets.get("recommended_lsp_3b")
    rows = [micro_batch(game_of(config), config, None, None, gib * GIB) for gib in range(1, 200, 7)]
    assert rows == sorted(rows) and rows[0] == 1 and rows[-1] > 8
    assert rows[-1] <= config.play.num_queries * config.play.num_generations
    assert all(number & (number - 1) == 0 for number in rows)


def test_a_given_number_stays_and_unknown_memory_gives_the_plain_one():
    config = replace(TrainConfig(), optimizer=OptimizerConfig(micro_batch_size=3))
    game = game_of(config)
    assert with_micro_batch_size(game, config, None, None, 80 * GIB) is game
    config = TrainConfig()
    assert micro_batch(game_of(config), config, None, None, None) == DEFAULT_MICRO_BATCH_SIZE


def test_parking_frozen_models_leaves_room_for_rows():
    config = presets.get("recommended_lsp_3b")
    model = shape_of("llama-3.2-3b")

    def rows(parked: bool) -> int:
        return micro_batch(game_of(config), replace(config, park_frozen=parked), model, None, 85 * GIB)

    assert rows(False) < rows(True)


def test_long_prompts_of_data_leave_room_for_fewer_rows():
    config = presets.get("recommended_lsp_3b")
    rows = [micro_batch(game_of(config), config, None, None, 80 * GIB, width) for width in (0, 512, 4096)]
    assert rows[0] >= rows[1] > rows[2] >= 1
    game = game_of(config)
    asked = config.play.max_query_length + len(game.prompts.query_prefix_ids)
    assert row_bytes(game, data_width=asked) <= row_bytes(game) < row_bytes(game, data_width=4096)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_bytes_of_a_row_are_near_what_the_compiler_takes(remat: str):
    """The slope over rows of the temporaries of value and gradient, attention by XLA in float32."""
    model = tiny_config(hidden_size=64, intermediate_size=192, num_hidden_layers=6, head_dim=16, num_attention_heads=4)
    config = TrainConfig(
        play=PlayConfig(max_query_length=96, max_completion_length=96),
        optimizer=OptimizerConfig(remat=remat),
        compute_dtype="float32",
    )
    game = placeholders.game(config, model)
    width = len(game.prompts.challenger_ids) + 96

    def temporaries(number: int) -> int:
        def loss(params, tokens):
            ones = jnp.ones((number,), jnp.int32)
            zeros = jnp.zeros((number, 8), jnp.float32)
            rows = Rows(tokens, ones, 8 * ones, zeros, zeros, zeros[:, 0], zeros[:, 0])
            return jnp.sum(completion_hidden(params, model, rows, remat=remat) ** 2)

        tokens = jax.ShapeDtypeStruct((number, max(width, 96 + 96)), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(params_shape(model), tokens).compile().memory_analysis().temp_size_in_bytes

    slope = (temporaries(16) - temporaries(8)) / 8
    assert 0.4 < row_bytes(game) / slope < 2.0, (row_bytes(game), slope)
    assert np.isfinite(slope)
