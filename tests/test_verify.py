"""Arithmetic questions and answers by hand and against Python's operators; callables of every bad kind."""

from __future__ import annotations

import itertools
import operator
import random
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward.arithmetic import MAX_QUESTION, final_number, parse_arithmetic
from lsp_jax.reward.base import EpisodeTexts, HostReward, RewardOutput, check_rewards, score_on_host
from lsp_jax.reward.execution.user_functions import load_callable
from lsp_jax.reward.user_callable import arithmetic_reward, callable_reward, probe_callable

SPELLINGS = {
    operator.add: ("+", " + ", " plus "),
    operator.sub: ("-", " - ", " − ", " minus "),
    operator.mul: ("*", " x ", "X", " × ", " times ", " multiplied by "),
}
LEAD_INS = (
    "",
    "What is ",
    "what's ",
    "What’s ",
    "CALCULATE ",
    "Compute: ",
    "How much is ",
    "Find ",
    "Solve\n",
    "Evaluate ",
)
ENDS = ("", "?", " = ?", "=", ".", " =", "?\n")


def two_numbers(rng: random.Random) -> tuple[str, int]:
    first, second, join = rng.randint(0, 9999), rng.randint(0, 9999), rng.choice(list(SPELLINGS))
    return f"{first}{rng.choice(SPELLINGS[join])}{second}", join(first, second)


def three_numbers(rng: random.Random) -> tuple[str, int]:
    a, b, c = (rng.randint(0, 99) for _ in range(3))
    first, second = rng.choice(list(SPELLINGS)), rng.choice(list(SPELLINGS))
    one, two = rng.choice(SPELLINGS[first]), rng.choice(SPELLINGS[second])
    form = rng.randrange(3)
    if form == 0:
        return f"({a}{one}{b}){two}{c}", second(first(a, b), c)
    if form == 1:
        return f"{a}{one}({b}{two}{c})", first(a, second(b, c))
    right_first = second is operator.mul and first is not operator.mul
    value = first(a, second(b, c)) if right_first else second(first(a, b), c)
    return f"{a}{one}{b}{two}{c}", value


@pytest.mark.parametrize("make", [two_numbers, three_numbers])
def test_generated_questions_have_the_value_that_python_gives(make: Callable[[random.Random], tuple[str, int]]):
    rng = random.Random(0)
    values = []
    for lead, end in itertools.product(LEAD_INS, ENDS):
        for _ in range(5):
            expression, value = make(rng)
            assert parse_arithmetic(f"{lead}{expression}{end}") == value, f"{lead}{expression}{end}"
            values.append(value)
    assert min(values) < 0 < max(values) and len(set(values)) > 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3 + 4", 1),
        ("What is -3 * 4?", -12),
        ("−3 − 4", -7),
        ("3 - (-4)", 7),
        ("-(3 + 4) * 2", -14),
        ("2 * (3 + 4) - 5", 9),
        ("2 + 3 * 4 - 5", 9),
        ("10 - 4 - 3", 3),
        ("10 - (4 - 3)", 9),
        ("((1 + 2)) * ((3))", 9),
        ("9999*9999*9999*9999", 9999**4),
        ("007 + 0", 7),
        ("  What   is 3\n+\t4 ?  ", 7),
        ("Calculate:3+4", 7),
        ("0x10 + 4", 4),
        ("3 + 4 = ?.", 7),
    ],
)
def test_questions_by_hand(text: str, value: int):
    assert parse_arithmetic(text) == value


# fmt: off
NOT_QUESTIONS = [
    "", " ", "?", "What is", "What is ?", "7", "What is 7?", "What is your name?", "What is 3 + 4 and why?",
    "Please, what is 3 + 4?", "What is the sum of 3 and 4?", "What is What is 3 + 4?", "3 + 4? 5", "3 + 4 ? =",
    "3 + 4 == ", "3 + 4!", "3 4", "3 + 4 5", "3 +", "+ 3 + 4", "* 3 + 4", "3 + * 4", "3 ** 4", "3 - -4", "--3 + 4",
    "3 / 4", "8 ÷ 4", "3 % 4", "2 ^ 3", "3.5 + 4", "1,234 + 5", "12345 + 1", "1 + 99999999999", "1 + 2 + 3 + 4 + 5",
    "(3 + 4", "3 + 4)", "3 + ()", "(3)(4)", "3(4 + 5)", "3 plusplus 4", "3 multiplied 4", "3 timesx 4",
    "Whatis 3 + 4", "x + 4", "1e3 + 4", "1_0 + 4", "٣ + ٤", "３ + ４", "3 + 4²", "3 + 4\0", "3 + 4 #", "3 + 4\n5 + 6",
    "__import__('os')", "What is 3 + 4; import os", "(" * 11 + "3 + 4" + ")" * 11, "(" * 99 + "3",
    "(" * 90 + "1 + 2" + ")" * 90, "3 + 4" + " " * MAX_QUESTION, "ſolve 3 + 4",
]
# fmt: on


@pytest.mark.parametrize("text", NOT_QUESTIONS)
def test_anything_else_is_not_a_question(text: str):
    assert parse_arithmetic(text) is None


# fmt: off
FINAL_NUMBERS = [
    ("7", "7"), ("The answer is 7.", "7"), ("7.0", "7"), ("it is 7.50!", "7.5"), ("0.1", "0.1"), (".5", "0.5"),
    ("about .5", "0.5"), ("The answer is...7", "7"), ("done.7", "7"), ("1,234", "1234"),
    ("1,234,567.25 dollars", "1234567.25"), ("$1,000.", "1000"), ("12,5", "5"), ("5, 7", "7"), ("1,2345", "2345"),
    ("1,234,5", "5"), ("7,", "7"), ("007", "7"), ("-7", "-7"), ("−7", "-7"), ("= -7", "-7"), ("is -7.", "-7"),
    ("(-7)", "-7"), ("-.5", "-0.5"), ("-0", "0"), ("- 7", "7"), ("+7", "7"), ("10-7", "7"), ("10 -7", "7"),
    ("10 - 7", "7"), ("10 - -7", "-7"), ("(3 + 4) -7", "7"), ("3 - 10 = -7", "-7"), ("GPT-4", "4"), ("3–7", "7"),
    ("12km", "12"), ("the 7th", "7"), ("7%", "7"), ("**7**", "7"), ("$\\boxed{7}$", "7"), ("答案是7。", "7"),
    ("7 H2O", "7"), ("7, see x2 and 1e5", "7"), ("7 in version 1.2.3", "7"), ("7 and 1,234.5.6", "7"), ("7 ٣", "7"),
    ("5 ٣7", "5"), ("5 7٣", "5"), ("1 2 3 4 5 6 7", "7"), ("The answer is 7, or 8, or 9", "9"),
    ("7" + "." + "0" * 30, "7"), ("1" * 40, "1" * 40),
]
# fmt: on


@pytest.mark.parametrize(("text", "number"), FINAL_NUMBERS)
def test_final_number(text: str, number: str):
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "x2",
        "_7",
        "1.2.3",
        "٣",
        "７",
        "²",
        "½",
        "Ⅶ",
        "-",
        ".",
        "NaN",
        "inf",
        "7 or " + "1" * 41,
        "1" * 10_000,
    ],
)
def test_no_final_number(text: str):
    assert final_number(text) is None


def test_arithmetic_reward_compares_the_final_number_with_the_value():
    reward = arithmetic_reward(weight=2.0)
    check_rewards([reward], use_quality=False)
    queries = ["What is 3 + 4?", "What is 3 - 10?", "Tell me a joke", "What is 1000 + 234?"]
    answers = [
        ["7", "7.0", "seven", "8"],
        ["-7", "3 - 10 = -7.", "7", "3 -7"],
        ["None", "0", "", "7"],
        ["1,234", "I say 1234, or perhaps 1235", "1 234", "1234.0001"],
    ]
    values, valid_answer, valid_query = reward.score(queries, answers, ())
    assert values.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert values.dtype == np.float32 and valid_answer.all() and valid_answer.shape == (4, 4)
    assert valid_query.tolist() == [True, True, False, True]
    assert (reward.name, reward.kind, reward.weight) == ("arithmetic", "task", 2.0)
    probe_callable(reward)


def seconds(function: Callable[[str], object], text: str, repeats: int = 1) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(
    "piece",
    ["1", " ", "1 ", "-", "-1", "1,", ",111", ".1", "1.", "a1", "1a", "1e", "٣", "(", "1,111.1.1 ", "\n"],
)
def test_hostile_answers_take_linear_time(piece: str):
    """A quadratic reader takes 25 times as long for five times the text."""

    def text(size: int) -> str:
        return "1" + piece * (size // len(piece)) + "1"

    smaller = seconds(final_number, text(40_000), repeats=3)
    for size in (200_000, 1_000_000):  # a quadratic reader fails at the first, before it would take an hour
        larger = seconds(final_number, text(size))
        assert larger < 15 * smaller + 0.01
        smaller = larger


def test_hostile_questions_cost_nothing():
    """A longer text costs no more than one at the length limit, which is read in full."""
    limit = max(seconds(parse_arithmetic, piece * (MAX_QUESTION // len(piece)), 3) for piece in ("(", "1 + ", "what  "))
    for piece in ("1", " ", "(", "1 + ", "What is ", "multiplied "):
        assert parse_arithmetic(piece * 1_000_000) is None
        assert seconds(parse_arithmetic, piece * 1_000_000) <= limit + 0.001


def score_with(function: Callable) -> RewardOutput:
    return callable_reward(function, "mine").score(["a", "b"], [["x", "y", "z"], ["p", "q", "r"]], ())


@pytest.mark.parametrize("convert", [list, np.array, jnp.array, lambda rows: jnp.array(rows, jnp.bfloat16), tuple])
def test_a_callable_may_return_lists_and_arrays(convert: Callable):
    values, valid_answer, valid_query = score_with(lambda queries, answers: convert([[0, 1, 2], [3, 4, 5]]))
    assert values.dtype == np.float32 and values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert valid_answer.all() and valid_query.tolist() == [True, True]


def test_a_callable_may_return_truth_values():
    output = score_with(lambda queries, answers: [[answer > "q" for answer in group] for group in answers])
    assert output.values.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_numbers_that_are_not_finite_mask_their_answers():
    output = score_with(lambda queries, answers: [[1.0, float("nan"), 2.0], [float("inf"), 3.0, 1e300]])
    assert output.valid_answer.tolist() == [[True, False, True], [False, True, False]]
    assert output.values[output.valid_answer].tolist() == [1, 2, 3] and output.valid_query.all()


def test_a_callable_cannot_change_what_others_read():
    queries, answers = ["a", "b"], [["y", "x"], ["q", "p"]]

    def sorts(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        queries.reverse()
        for group in answers:
            group.sort()
        return [[0.0, 0.0], [0.0, 0.0]]

    callable_reward(sorts, "mine").score(queries, answers, ())
    assert (queries, answers) == (["a", "b"], [["y", "x"], ["q", "p"]])


BAD = {
    "transposed": (lambda queries, answers: np.zeros((3, 2)), r"shape \(3, 2\).*\(2, 3\)"),
    "flat": (lambda queries, answers: [0.0] * 6, r"shape \(6,\).*\(2, 3\)"),
    "per query": (lambda queries, answers: [0.0, 0.0], r"shape \(2,\).*\(2, 3\)"),
    "scalar": (lambda queries, answers: 1.0, r"shape \(\).*\(2, 3\)"),
    "nothing": (lambda queries, answers: None, r"shape \(\).*\(2, 3\)"),
    "extra axis": (lambda queries, answers: np.zeros((2, 3, 1)), r"shape \(2, 3, 1\).*\(2, 3\)"),
    "ragged": (lambda queries, answers: [[0.0, 1.0], [0.0, 1.0, 2.0]], r"unequal length.*\(2, 3\)"),
    "texts": (lambda queries, answers: answers, r"dtype <U.*\(2, 3\)"),
    "None inside": (lambda queries, answers: [[None, 1.0, 1.0], [1.0, 1.0, 1.0]], r"dtype object.*\(2, 3\)"),
    "complex": (lambda queries, answers: np.zeros((2, 3), complex), r"dtype complex128.*\(2, 3\)"),
}
BAD_ONLY_AT_THE_PROBE = {
    "NaN": (lambda queries, answers: np.full((2, 3), np.nan), r"nan.*must be finite"),
    "one infinity": (lambda queries, answers: [[0, 0, 0], [0, 0, -np.inf]], r"returned -inf for.*must be finite"),
    "raises": (lambda queries, answers: queries[7], r"raised IndexError: list index out of range"),
    "wrong arguments": (lambda queries: [[0.0]], r"raised TypeError.*2 were given"),
    "not a function": (7, r"raised TypeError.*not callable"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_callable_is_refused_and_in_a_run_masked(case: str):
    function, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        score_with(function)
    assert error.value.field == "reward.callable" and "\n" not in str(error.value)
    with pytest.raises(InputError, match=message):
        probe_callable(callable_reward(function, "mine"))
    output = score_on_host(callable_reward(function, "mine"), EpisodeTexts(["a", "b"], [["x"] * 3, ["y"] * 3]))
    assert not np.asarray(output.valid_answer).any()


@pytest.mark.parametrize("case", BAD_ONLY_AT_THE_PROBE)
def test_the_probe_refuses_what_a_run_would_mask(case: str):
    function, message = BAD_ONLY_AT_THE_PROBE[case]
    with pytest.raises(InputError, match=message) as error:
        probe_callable(callable_reward(function, "mine"))
    assert error.value.field == "reward.callable" and error.value.value == "mine" and "\n" not in str(error.value)


def test_the_probe_shows_distinct_texts_of_the_size_asked_for():
    seen = []

    def keep(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        seen.append((queries, answers))
        return [[0.0] * len(group) for group in answers]

    probe_callable(callable_reward(keep, "mine"), queries=4, answers=5)
    ((queries, answers),) = seen
    flat = [*queries, *itertools.chain(*answers)]
    assert len(queries) == 4 and [len(group) for group in answers] == [5] * 4 and len(set(flat)) == len(flat)


def test_load_callable_from_a_module_and_a_file(tmp_path: Path):
    assert load_callable("os.path:join") is __import__("os").path.join
    file = tmp_path / "my rewards.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Pair:\n    a: int\n\n"
        "def ones(queries, answers):\n    return [[Pair(1).a for _ in group] for group in answers]\n"
    )
    reward: HostReward = callable_reward(load_callable(f"{file}:ones"), "ones", kind="quality", weight=0.5)
    probe_callable(reward)
    assert reward.score(["a"], [["x", "y"]], ()).values.tolist() == [[1, 1]]
    assert (reward.name, reward.kind, reward.weight) == ("ones", "quality", 0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "must be package.module:function"),
        ("os.path.join", "must be package.module:function"),
        (":join", "must be package.module:function"),
        ("os.path:", "must be package.module:function"),
        ("os.path:join()", "must be package.module:function"),
        ("no_such_package_7:f", "ModuleNotFoundError"),
        (".relative:f", "TypeError"),
        ("os.path:no_such_function", "has no function no_such_function"),
        ("os.path:sep", "sep is not callable"),
        ("no/such/file.py:f", "FileNotFoundError"),
        ("{dir}/syntax.py:f", "SyntaxError"),
        ("{dir}/raises.py:f", "RuntimeError: two lines"),
        ("{dir}/exits.py:f", "SystemExit"),
        ("{dir}/empty.py:f", "has no function f"),
    ],
)
def test_load_callable_names_what_is_wrong(spec: str, message: str, tmp_path: Path):
    (tmp_path / "syntax.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('two\\nlines')\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=message) as error:
        load_callable(spec.format(dir=tmp_path))
    assert error.value.field == "reward.callable" and "\n" not in str(error.value)
