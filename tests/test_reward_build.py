"""Fields of `RewardConfig` reach the components that they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward import build, code
from lsp_jax.reward.config import RewardConfig
from lsp_jax.reward.execution.pool import Workers


class Asked(Exception):
    """Raised in place of the real call, with its arguments."""


def asked(*arguments: Any, **options: Any) -> Any:
    raise Asked(*arguments, options)


def test_kind_and_weight_of_a_callable(tmp_path: Path) -> None:
    file = tmp_path / "score.py"
    file.write_text("def score(queries, answers):\n    return [[0.0] * len(row) for row in answers]\n")
    config = RewardConfig(
        quality_weight=0.0,
        arithmetic_weight=1.0,
        callable=f"{file}:score",
        callable_kind="quality",
        callable_weight=0.25,
    )
    workers = Workers(1, 60.0)
    try:
        opened = build.open_rewards(config, (), workers)
    finally:
        workers.close()
    expected = [("arithmetic", "task", 1.0), ("callable", "quality", 0.25)]
    assert [(spec.name, spec.kind, spec.weight) for spec in opened.specs] == expected
    assert [(part.name, part.kind, part.weight) for part in opened.components] == expected


def test_a_kind_that_is_none() -> None:
    with pytest.raises(InputError, match=r"reward\.callable_kind"):
        RewardConfig(callable_kind="both").check()  # type: ignore[arg-type]


def test_the_time_limit_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "check_sandbox", lambda _: None)
    monkeypatch.setattr(code, "code_reward", asked)
    with pytest.raises(Asked) as found:
        build.open_rewards(RewardConfig(code_weight=2.0, code_timeout=3.5), (), Workers(1, 60.0))
    weight, options = found.value.args
    assert (weight, options["timeout"]) == (2.0, 3.5)


@pytest.mark.parametrize(("given", "expected"), [("v1.2", "v1.2"), ("", None)])
def test_the_revision_of_a_reward_model(monkeypatch: pytest.MonkeyPatch, given: str, expected: str | None) -> None:
    monkeypatch.setattr(build, "open_reward_model", asked)
    config = RewardConfig(preference_model="owner/model", preference_revision=given, preference_weight=1.0)
    with pytest.raises(Asked) as found:
        build.open_rewards(config, (), Workers(1, 60.0))
    assert found.value.args[:2] == ("owner/model", expected)
