"""The maths reward against a table made by hand."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward import maths
from lsp_jax.reward.answers.find import final_answer
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.maths import check_maths, check_rows, maths_reward

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None or importlib.util.find_spec("sympy") is None,
    reason="bwrap is not on PATH, or sympy is not installed",
)

# fmt: off
TABLE = [  # the row's answer, a model's answer, equal
    ("16 - 3 = 13\n#### 18", "So she makes $18 a day.", 1), ("#### 18", "#### 18", 1), ("#### 18", "#### 17", 0),
    ("#### 18", "The answer is \\boxed{18}.", 1), ("#### 18", "18 is wrong, \\boxed{17}", 0),
    ("#### 1,234", "It is 1234.", 1), ("#### 1,234", "It is 1,234 dollars", 1), ("#### 1234", "\\boxed{1,234}", 1),
    ("#### -5", "so x = -5", 1), ("#### 5", "so x = -5", 0), ("#### 18", "", 0), ("#### 18", "I do not know", 0),
    ("#### 70000", "#### $70,000", 1), ("#### 0.5", "one half, 1/2", 1), ("#### 18", "18 apples, or 19", 0),
    ("#### 18", "#### 3\nNo:\n#### 18\nbecause of 7", 1),
    ("Thus $\\boxed{\\frac{1}{2}}$.", "\\boxed{\\dfrac12}", 1), ("\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", 1),
    ("\\boxed{\\frac{1}{2}}", "It is $\\frac{1}{2}$.", 1), ("\\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{3}}", 0),
    ("\\boxed{2\\sqrt{3}}", "\\boxed{\\sqrt{12}}", 1), ("\\boxed{x^2+2x+1}", "\\boxed{(x+1)^2}", 1),
    ("\\boxed{x^2+2x+1}", "\\boxed{(x-1)^2}", 0), ("\\boxed{(1, 2)}", "\\boxed{(1,2)}", 1),
    ("\\boxed{(1, 2)}", "\\boxed{(2,1)}", 0), ("\\boxed{\\{1, 2\\}}", "\\boxed{\\{2, 1\\}}", 1),
    ("\\boxed{[0, 1)}", "\\boxed{[0,1)}", 1), ("\\boxed{\\pi}", "\\boxed{\\pi}", 1), ("\\boxed{\\pi}", "\\boxed{3}", 0),
    ("42", "\\boxed{42}", 1), ("\\frac{3}{4}", "\\boxed{\\frac{3}{4}}", 1), ("\\boxed{7}", "\\boxed{7", 0),
    ("\\boxed{\\text{even}}", "\\boxed{\\text{even}}", 1), ("#### 18", "__import__('os').system('true')", 0),
    ("#### 18", "\\boxed{__import__('os')._exit(0)}", 0), ("#### 18", "\\boxed{" * 2000, 0), ("#### 18", "\0\ud800", 0),
]
# fmt: on


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(1, timeout=20) as pool:
        yield pool


@pytest.mark.full
@needs_sandbox
def test_answers_by_hand(workers: Workers):
    check_maths(workers)
    rows, answers = [{"answer": gold} for gold, _, _ in TABLE], [[answer] for _, answer, _ in TABLE]
    values, valid, valid_query = maths_reward(workers=workers).score([""] * len(rows), answers, rows)
    wrong = [(row, value) for row, value in zip(TABLE, values[:, 0].tolist(), strict=True) if value != row[2]]
    assert not wrong and valid.all() and valid_query.all()


@pytest.mark.full
@needs_sandbox
def test_a_comparison_without_end_is_masked_and_the_next_one_works(workers: Workers):
    reward = maths_reward(workers=workers, timeout=1.5)
    bomb = "\\boxed{9^{9^{9^{9^{9}}}} + (10^{10^{10}})!}"
    values, valid, _ = reward.score([""], [[bomb, "\\boxed{18}"]], [{"answer": "#### 18"}])
    assert values.tolist() == [[0, 1]] and valid.tolist() == [[False, True]]
    rows = [{"answer": "see the picture"}]
    values, valid, _ = reward.score([""], [["18"]], rows)
    assert not valid.any() and not values.any()


@needs_sandbox
def test_a_sandbox_that_does_not_start_masks(workers: Workers, monkeypatch: pytest.MonkeyPatch):
    whole = maths.sandboxed("maths", maths._PACKAGES)
    monkeypatch.setattr(maths, "sandboxed", lambda *_: whole._replace(argv=(*whole.argv[:-1], "no such mode")))
    values, valid, _ = maths_reward(workers=workers).score([""], [["18", "18"]], [{"answer": "18"}])
    assert not valid.any() and not values.any()
    with pytest.raises(InputError, match="did not start in the sandbox"):
        check_maths(workers)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("\\boxed{1} or \\boxed{\\frac{1}{2}}.", ("\\frac{1}{2}", True)),
        ("\\fbox{3}", ("3", True)),
        ("#### 7\nmore", ("7", True)),
        ("#### 7 \\boxed{8}", ("8", True)),
        ("\\boxed{7", ("\\boxed{7", False)),
        ("it is 7", ("it is 7", False)),
    ],
)
def test_where_the_result_is_read(text: str, result: tuple[str, bool]):
    assert final_answer(text) == result


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "self-play has none"),
        ([{}], "None"),
        ([{"answer": 7}], "= 7"),
        ([{"answer": "1"}, {"answer": " "}], r"\[1\]"),
    ],
)
def test_rows_without_answers_are_named(rows: list, message: str):
    with pytest.raises(InputError, match=message):
        check_rows(rows)
