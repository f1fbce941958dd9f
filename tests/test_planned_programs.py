"""`lsp-jax plan` compiles the programs that a run executes: both walk one list of stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lsp_jax.core.stage import Backend, Stage
from lsp_jax.model.sharding import AXES
from lsp_jax.perf.aot import Planner
from lsp_jax.perf.chips import CHIPS, Topology
from lsp_jax.perf.planned_run import compile_run
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.reward.config import RewardConfig
from lsp_jax.training import step
from lsp_jax.training.setup import setup
from test_trainer import game_config, host_reward

QUICK_COMPILES = True
pytestmark = pytest.mark.full
ELSEWHERE = {"drop_finished", "none_finished"}
"""Compiled for their memory; a run in which every row goes on to the longest never meets them."""


def program(stage: Any, arrays: Any, static: dict[str, Any]) -> Any:
    """A stage with the shapes of its arrays and its static arguments, but what hangs on texts and devices."""
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(arrays))
    return stage.__name__, shapes, tuple(sorted((name, type(value).__name__) for name, value in static.items()))


@pytest.mark.parametrize(("inner_epochs", "columns", "times"), [(1, 130, [2, 2, 5]), (2, 16, [])])
def test_the_planner_meets_the_programs_of_a_run(
    inner_epochs: int,
    columns: int,
    times: list[int],
    game_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In order and as often: decoding in chunks of 16 (`times` with 33, 65 and 130 cache columns), or in one piece."""
    play = PlayConfig(4, 4, max_query_length=8, max_completion_length=columns, decode_chunk=16)
    config = game_config(game_model, tmp_path / "run", play=play, reward=RewardConfig(quality_weight=0.0))
    config = replace(config, loss=replace(config.loss, num_iterations=inner_epochs))
    run, params = setup(config, [host_reward()])
    game = replace(run.game, solver=replace(run.game.solver, stop_ids=()))  # every row goes on to the longest
    executed: list[Any] = []

    def executing(stage: Any, *arrays: Any, **static: Any) -> Any:
        executed.append(program(stage, arrays, static))
        return Stage.__call__(stage, *arrays, **static)

    monkeypatch.setattr(step, "Backend", lambda **fields: Backend(call=executing, **fields))
    state = jax.jit(game.init_train_state)(params)
    step.train_step(replace(run, game=game), state, step.StepContext(1))

    planned: list[Any] = []
    compiled = Planner.call

    def planning(self: Planner, stage: Any, *arrays: Any, **static: Any) -> Any:
        planned.append(program(stage, arrays, static))
        return compiled(self, stage, *arrays, **static)

    monkeypatch.setattr(Planner, "call", planning)
    devices = tuple(jax.devices()[:1])
    mesh = Mesh(np.reshape(devices, (1, 1, 1)), AXES, axis_types=(AxisType.Auto,) * 3)
    config = replace(config, reward=replace(config.reward, callable="a component on the host"))
    made = compile_run(config, game, None, Topology("cpu:1", CHIPS["v5e"], devices), mesh, lambda line: None)

    grown = [name for name, *_ in executed if name == "grow_cache"]
    assert len(grown) == max(len(times) - 1, 0)
    cast = "cast_for_decoding"  # on one device of the dtype itself a run makes no copy
    met = [one for one in planned if one[0] not in {*ELSEWHERE, "start", cast}]
    assert [one[0] for one in met] == [one[0] for one in executed]
    assert met == executed
    assert not times or {name for name, *_ in planned} >= ELSEWHERE
    assert not any(phase.failure for phase in made.phases) and made.resident["state"] > made.resident["reference"]
    chunks = [phase for phase in made.phases if "decode_chunk" in phase.name]
    assert [phase.times for phase in chunks] == times
    assert all(phase.work.flops > 0 and phase.work.unknown_loops == 0 for phase in chunks)
