"""The arithmetic study's own parts: problems, their grading and the figures' numbers, against hand calculations."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "arithmetic"))

import evaluate
import format_reward
import problems
import rows
import study

from lsp_jax.reward.arithmetic import parse_arithmetic

PARTS = (problems.HELD_OUT, problems.DEVELOPMENT, problems.TRAINING)


def test_no_expression_is_in_two_parts():
    found = {name: {problem.expression for problem in problems.part(name)} for name in PARTS}
    assert not found[PARTS[0]] & found[PARTS[1]] and not (found[PARTS[0]] | found[PARTS[1]]) & found[PARTS[2]]


def test_the_held_out_part_is_large_and_even():
    asked = problems.part(problems.HELD_OUT)
    assert len(asked) >= 900 and set(Counter(problem.family for problem in asked).values()) == {problems.PER_FAMILY}
    assert len({problem.question for problem in asked}) == len(asked)
    wordings = Counter(next(n for n, p in enumerate(problems.PHRASINGS) if _is(problem, p)) for problem in asked)
    assert len(wordings) == len(problems.PHRASINGS) and min(wordings.values()) > 100
    assert asked == problems.part(problems.HELD_OUT)


def _is(problem: problems.Problem, phrasing: str) -> bool:
    return problems.question(problem.expression, phrasing) == problem.question


@pytest.mark.parametrize("name", PARTS)
def test_every_answer_is_the_verifiers(name: str):
    for problem in problems.part(name)[::7]:
        assert parse_arithmetic(problem.question) == problem.answer, problem
        assert problems.expressions(problem.question) == {problem.expression}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What is 3 + 4 times 5?", {(3, "+", 4), (4, "*", 5)}),
        ("what is 12 multiplied by 3", {(12, "*", 3)}),
        ("12345 + 6 and 7 − 8", {(7, "-", 8)}),
        ("There are 3 apples.", set()),
    ],
)
def test_expressions_in_a_text(text: str, found: set):
    assert problems.expressions(text) == found


def test_commuted_twins_of_held_out_problems_in_training_are_as_many_as_said():
    held, training = ([problem.expression for problem in problems.part(name)] for name in (PARTS[0], PARTS[2]))
    twins = [problems.twin(expression) for expression in held]
    assert sum(twin != own and twin in set(training) for own, twin in zip(held, twins, strict=True)) == 193
    assert problems.twin((7, "-", 4)) == (7, "-", 4)


def test_what_states_a_result():
    """The control's reward: what the base model does by itself, saying the question again, is no result."""
    cases = (("9 + 1 = 10", 1.0), ("It is 11.", 1.0), ("we add 1 to 9", 0.0), ("Sure.", 0.0))
    texts, paid = zip(*cases, strict=True)
    assert format_reward.any_result(["Calculate 9 + 1."], [list(texts)]) == [list(paid)]
    assert format_reward.states_result("What is 7 - 0?", "It is 7."), "the result itself, though it is in the question"


def test_what_was_played_counts_with_its_twins(tmp_path: Path):
    (tmp_path / "1-lsp").mkdir()
    queries = ["What is 3 + 4?", "What is 5 minus 2?"]
    lines = "".join(json.dumps({"query": query}) + "\n" for query in queries)
    (tmp_path / "1-lsp" / "transcripts.jsonl").write_text(lines)
    assert study.played(tmp_path) == {(3, "+", 4), (4, "+", 3), (5, "-", 2)}


def test_scores_by_hand():
    asked = problems.part(problems.HELD_OUT)
    texts = [f"It is {problem.answer}." if problem.family == "one digit" else "no idea" for problem in asked]
    seen = frozenset(problem.expression for problem in asked if problem.family == "two by one")
    found = evaluate.scores(asked, texts, seen)
    assert found["all"]["accuracy"] == pytest.approx(1 / 6) and found["easy"]["accuracy"] == pytest.approx(1 / 3)
    assert found["families"]["one digit"]["accuracy"] == 1 and found["states a result"]["accuracy"] == pytest.approx(
        1 / 6
    )
    assert found["seen"] == pytest.approx(1 / 6) and found["unseen"]["number"] == len(asked) * 5 // 6


@pytest.mark.parametrize(
    ("expression", "count"),
    [((5, "+", 6), 1), ((12, "+", 13), 0), ((99, "+", 1), 2), ((21, "-", 3), 1), ((3, "*", 4), 1), ((2, "*", 3), 0)],
)
def test_carries(expression: problems.Expression, count: int):
    assert study.carries(expression) == count


def test_examples_of_the_control_are_of_no_part_that_is_asked():
    shown = {expression for question, _ in evaluate.FEW_SHOT for expression in problems.expressions(question)}
    assert len(shown) == len(evaluate.FEW_SHOT)
    asked = {problem.expression for name in PARTS[:2] for problem in problems.part(name)}
    assert not shown & asked
    assert all(parse_arithmetic(question) == int(answer) for question, answer in evaluate.FEW_SHOT)


@pytest.mark.parametrize("kind", sorted({kind for kinds in rows.STAGES.values() for kind in kinds}))
def test_every_stage_is_a_run_that_can_be_made(kind: str, tmp_path: Path):
    config = rows.stage(kind, 8, 1, tmp_path / f"1-{kind}")
    config.check()
    assert bool(config.data.source) == (config.loss.alpha_challenger == 0) == (kind in ("grpo", "format"))
    assert (config.reward.quality_weight > 0) == (kind not in ("grpo", "format", "lsp_zero"))
    assert (config.seed, config.max_steps) == (1, 8)
    if config.data.source:
        asked = [json.loads(line)["prompt"] for line in Path(config.data.source).read_text().splitlines()]
        family = {problem.question: problem.family for problem in problems.part(problems.TRAINING)}
        counted = Counter(family[question] for question in asked)
        assert counted == dict.fromkeys(problems.FAMILIES, rows.TRAINING_PER_FAMILY), "none of them held out"
