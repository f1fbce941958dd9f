"""What is not finite is found where it began, changes nothing, is counted, and ends a run that does not get over it."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsp_jax as lsp
from lsp_jax.algorithm.learner_batch import learn_batch
from lsp_jax.checkpoint.host_state import HostState
from lsp_jax.core.errors import FAILED_STATUS
from lsp_jax.core.stage import Backend, Call, execute
from lsp_jax.learn.batch import Reference
from lsp_jax.learn.nonfinite import component_names, first_not_finite
from lsp_jax.learn.update import reference_logprobs, update
from lsp_jax.monitor.numerics import Alarms, NumbersError, parameter_not_finite
from lsp_jax.policy import Policy
from lsp_jax.reward.user_callable import callable_reward
from lsp_jax.training import step
from test_resume import config_of, train
from test_trainer import host_reward, low_share, read_lines

QUICK_COMPILES = True
pytestmark = pytest.mark.full


def run_stages_by(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of a run's iterations is run by `call`."""
    monkeypatch.setattr(step, "Backend", partial(Backend, call=call))


def nan_in_one_row(x: jax.Array) -> jax.Array:
    return x.at[1, 0].set(jnp.nan)


def in_sampled(learnable: Any) -> Any:
    batch = learnable.batch
    solver = batch.solver._replace(
        behaviour_logprobs=nan_in_one_row(batch.solver.behaviour_logprobs), weights=jnp.ones_like(batch.solver.weights)
    )
    return learnable._replace(batch=batch._replace(solver=solver))


def in_reference(found: Any) -> Any:
    challenger = found.challenger
    return found._replace(challenger=challenger._replace(logprobs=nan_in_one_row(challenger.logprobs)))


PLANTED = {
    "log-probabilities with which the Solver sampled": (learn_batch, in_sampled),
    "the reference's log-probabilities of what the Challenger sampled": (reference_logprobs, in_reference),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_diagnosis_names_the_place(
    name: str, game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    place, change = PLANTED[name]

    def planted(stage: Any, *arrays: Any, **static: Any) -> Any:
        found = execute(stage, *arrays, **static)
        return change(found) if stage is place else found

    run_stages_by(planted, monkeypatch)
    config = config_of(game_model, tmp_path / "run", max_skipped=2)
    with pytest.raises(NumbersError, match=rf"iteration 2.*{name}; 2 consecutive iterations were skipped") as error:
        train(config)
    assert error.value.status == FAILED_STATUS
    assert f"iteration 1: update skipped, first non-finite component: {name}" in capfd.readouterr().err
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_updates"] for line in lines] == [1, 2] and lines[0]["not_finite/component"] > 0


def test_a_parameter_that_is_not_finite_is_named(game_model: Path, tmp_path: Path):
    policy = lsp.load_pretrained(game_model)
    layers = policy.params["model"]["layers"]["mlp"]["up_proj"]
    layers["weight"] = layers["weight"].at[0, 3, 5].set(jnp.nan)
    config = config_of(game_model, tmp_path / "run", max_skipped=1)
    with pytest.raises(NumbersError, match=r"parameter model/layers/mlp/up_proj/weight"):
        lsp.train(config, rewards=[host_reward()], policy=Policy(policy.config, policy.params, policy.tokenizer, "x"))


def test_a_reward_that_is_not_finite_masks_its_answer_alone(game_model: Path, tmp_path: Path):
    """NaN for one answer of the second query: not learned from, counted, and the run goes on to its end."""

    def score(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        values = low_share(queries, answers)
        spoiled = [[math.nan if (n, g) == (1, 1) else x for g, x in enumerate(row)] for n, row in enumerate(values)]
        return spoiled if len(queries) == 4 else values  # a reward is tried on fewer before anything is played

    config = config_of(game_model, tmp_path / "run", max_steps=2)
    lsp.train(config, rewards=[callable_reward(score, "share", weight=2.0)])
    train(config_of(game_model, tmp_path / "sound", max_steps=1))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [(line["skipped_updates"], line["not_finite/component"]) for line in lines] == [(0, 0), (0, 0)]
    (sound,) = read_lines(tmp_path / "sound" / "metrics.jsonl")
    assert lines[0]["answers/valid_fraction"] == sound["answers/valid_fraction"] - 1 / 16
    answers = read_lines(tmp_path / "run" / "transcripts.jsonl")[1]["answers"]
    assert [answer["valid"] for answer in answers][:2] == [True, False] and answers[1]["advantage"] == 0


def test_every_component_by_itself(game_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A NaN or an infinity in each part in turn: its own name; in a masked place: nothing."""
    seen: dict[str, Any] = {}

    def keep(stage: Any, *arrays: Any, **static: Any) -> Any:
        if stage is update:
            seen["update"] = jax.tree.map(jnp.copy, arrays)
        return execute(stage, *arrays, **static)

    run_stages_by(keep, monkeypatch)
    train(config_of(game_model, tmp_path / "run", max_steps=1))
    state, batch, references, _ = seen["update"]
    names, check = component_names(batch), jax.jit(first_not_finite)
    sound = (batch, references, jnp.float32(1.0))
    assert len(set(names)) == len(names) and int(check(*sound)) == 0 and parameter_not_finite(state.params) is None

    def spoiled(x: jax.Array, place: int, value: float) -> jax.Array:
        return x.reshape(-1).at[place].set(value).reshape(x.shape)

    def said(*arguments: Any) -> str | None:
        found = int(check(*arguments))
        return names[found - 1] if found else None

    leaves, structure = jax.tree.flatten(state.params)
    for index in range(len(leaves)):
        worse = structure.unflatten([spoiled(x, -1, jnp.inf) if i == index else x for i, x in enumerate(leaves)])
        path = jax.tree_util.keystr(jax.tree.leaves_with_path(worse)[index][0], simple=True, separator="/")
        assert parameter_not_finite(worse) == path
    assert said(*sound[:2], jnp.float32(jnp.nan)) == "loss"
    mask = np.asarray(batch.solver.mask).ravel()
    assert mask.any() and not mask.all()
    for place, counts in ((int(np.argmax(mask)), True), (int(np.argmin(mask)), False)):
        rows = batch.solver._replace(behaviour_logprobs=spoiled(batch.solver.behaviour_logprobs, place, jnp.nan))
        name = "log-probabilities with which the Solver sampled"
        assert said(batch._replace(solver=rows), *sound[1:]) == (name if counts else None)
        bad = Reference(spoiled(references.solver.logprobs, place, -jnp.inf))
        name = "the reference's log-probabilities of what the Solver sampled"
        assert said(batch, references._replace(solver=bad), *sound[2:]) == (name if counts else None)
    rows = batch.challenger._replace(advantages=spoiled(batch.challenger.advantages, 0, jnp.nan))
    assert said(batch._replace(challenger=rows), *sound[1:]) == "advantages of the Challenger"


def test_the_count_in_a_row_goes_on_after_a_restart(monkeypatch: pytest.MonkeyPatch):
    """Else a run that is restarted more often than `max_skipped` allows would never end."""
    monkeypatch.setattr("lsp_jax.monitor.numerics.component_names", lambda _: ["a"])
    numbers = {"not_finite/component": 1.0, "sampling/token_mult_prob_error": 1.0, "grad_norm": 1.0}
    first = Alarms(max_skipped=3)
    for number in (1, 2):
        first.check(number, numbers, {"w": jnp.ones(2)}, cast(Any, None))
    saved = HostState.from_record(HostState(skipped=first.skipped).to_record())
    with pytest.raises(NumbersError, match="3 consecutive iterations were skipped"):
        Alarms(3, saved.skipped).check(3, numbers, {"w": jnp.ones(2)}, cast(Any, None))


def test_a_single_iteration_that_is_skipped_is_got_over(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The count in a row begins anew; a sampler that disagrees is said, a NaN of it too."""
    monkeypatch.setattr("lsp_jax.monitor.numerics.component_names", lambda _: ["a", "b"])
    params, batch, alarms = {"w": jnp.ones(2)}, cast(Any, None), Alarms(max_skipped=2)
    sound = {"not_finite/component": 0.0, "sampling/token_mult_prob_error": 1.0, "grad_norm": 1.0}
    for numbers in ({"not_finite/component": 2.0}, {}, {"grad_norm": math.inf}, {}):
        alarms.check(1, sound | numbers, params, batch)
    said = capfd.readouterr().err
    assert said.count("warning") == 2 and "non-finite component: b" in said and "non-finite component: gradient" in said
    for error in (1.06, math.nan):
        alarms.check(3, sound | {"sampling/token_mult_prob_error": error}, params, batch)
    assert capfd.readouterr().err.count("sampler and learner disagree") == 2
