"""Errors of an iteration say in which stage and phase they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from lsp_jax.core.stage import stage
from lsp_jax.training.step import Phases


@stage()
def doubled(x: jax.Array) -> jax.Array:
    return x @ jnp.ones((3, 2))


def test_an_error_of_a_compiled_stage_names_it() -> None:
    assert doubled(jnp.ones((1, 3))).shape == (1, 2)
    phases = Phases()
    with pytest.raises(TypeError) as error, phases("update"):
        doubled(jnp.ones((1, 4)))
    assert [note for note in error.value.__notes__ if note.startswith("lsp-jax")] == [  # JAX adds its own
        "lsp-jax: in the stage doubled of an iteration",
        "lsp-jax: in the phase update of an iteration",
    ]
    assert "update" not in phases.seconds, "it did not end"
