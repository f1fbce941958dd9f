"""Forms of maths answers made by hand, right and wrong ones in equal number, and golds that equal themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.evaluate.tasks import check_golds as check_task
from lsp_jax.evaluate.tasks import load_task
from lsp_jax.reward.answers.find import MAX_TEXT, final_answer, find_result
from lsp_jax.reward.answers.reading import read_answer, read_gold
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.maths import check_golds, maths_reward
from test_maths import needs_sandbox

FORMS = Path(__file__).with_name("maths_forms.txt")

GOLDS = [  # a plain gold, an equal form, one that is near and not equal
    (r"3\sqrt{2}", r"\sqrt{18}", "3"),
    ("6-5i", "-5i+6", "6"),
    ("10!", "3628800", "10"),
    ("n!", r"n \cdot (n-1)!", "n"),
    (r"\frac{3}{4}", "0.75", "3"),
    (r"-\frac{7}{9}", "-7/9", "7/9"),
    (r"\left(\frac12, 3\right)", "(1/2, 3)", "(2, 3)"),
    (r"(3, \frac{\pi}{2})", r"\left(3,\pi/2\right)", r"(3, \pi)"),
    ("[0,1)", "[0, 1)", "(0,1)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)", r"(-\infty,2)"),
    (r"\{1,2\}", "{2, 1}", r"\{1\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (
        r"\begin{bmatrix} -1 \\ 2 \end{bmatrix}",
        r"\begin{pmatrix} -1\\2\end{pmatrix}",
        r"\begin{pmatrix} -1&2\end{pmatrix}",
    ),
    ("C", "(C)", "D"),
    (r"\text{(B)}", "B", "A"),
    ("even", "Even.", "odd"),
    ("no solution", "No solution", "one solution"),
    ("all real numbers", "All real numbers.", "no real numbers"),
    ("Monday", "monday", "Sunday"),
    ("True", "true", "False"),
    (r"50\%", "50", "5"),
    (r"1\frac{1}{2}", "1.5", "11/2"),
    ("1 1/2", "3/2", "1/2"),
    ("18 dollars", "$18", "18 cents"),
    (r"\$18.90", "18.9", "18.09"),
    (r"5\text{ cm}", "50 mm", "5 m"),
    (r"9\pi\text{ square units}", r"9\pi", "9"),
    ("10 m/s", "36 km/h", "10 km/h"),
    ("x=5", "5", "y=5"),
    ("y=2x+1", "2x+1", "2x"),
    (r"x\geq 5", r"[5,\infty)", "x > 5"),
    ("-1 < x \\le 3", "(-1, 3]", "-1 \\le x \\le 3"),
    ("x<2 or x>3", "x > 3 or x < 2", "x < 2"),
    ("1, 2", "2, 1", "1"),
    ("1,234", "1234", "1, 234"),
    ("-5", "−5", "5"),
    ("0.5", "1/2", "5"),
    (r"2\pi", "6.28319", "2"),
    (r"90^\circ", "90", r"9^\circ"),
    ("3:2", "3 : 2", "2:3"),
    ("12:30", "12:30", "6:15"),
    (r"1011_2", "1011_{2}", "1011"),
    (r"0.\overline{36}", "4/11", "0.36"),
    (r"\pm 3", "-3, 3", "3"),
    (r"x=1\pm\sqrt{3}", r"1-\sqrt3, 1+\sqrt3", r"1+\sqrt3"),
    (r"\emptyset", r"\{\}", "0"),
    (r"\infty", "infinity", r"-\infty"),
    ("1,2,3,...", r"1,2,3,\ldots", "1,2,3"),
    (r"\sin x", r"\sin(x)", r"\cos x"),
    (r"\log_2 8", "3", "8"),
    (r"\binom{6}{2}", "15", "6"),
    (r"e^{i\pi}", "-1", "1"),
    ("2^{10}", "1024", "20"),
    (r"6.02\times 10^{23}", "6.02e23", "6.02e22"),
    ("3x10^5", "300000", "3e4"),
    ("a^2b", "b a^2", "ab^2"),
    (r"\frac{x+1}{x-1}", r"-\frac{x+1}{1-x}", r"\frac{x-1}{x+1}"),
    ("|x|", r"\sqrt{x^2}", "x"),
    (r"\sqrt[3]{-8}", "-2", "2"),
    ("(A) 12", "12", "(B) 12"),
    ("AB", r"\text{AB}", "BC"),
    ("f(x)=2x+1", "2x+1", "g(x)=2x+1"),
    ("1.5 million", "1500000", "1.5"),
    ("2 3/4 cups", "2.75", "23/4"),
    (r"\tan^{-1} 2", r"\arctan 2", r"\tan 2"),
    ("i", r"\sqrt{-1}", "-1"),
    ("e", "2.71828", "2.718"),
    (r"\$1{,}000", "1000", "1"),
    ("7:00 a.m.", "7:00 AM", "7:00 PM"),
    ("2x+3y=6", "6 = 3y+2x", "2x+3y=7"),
    ("H2O", "h2o", "2"),
    ("a=1, b=2", "b=2, a=1", "a=2, b=1"),
    ("4(x+1)^2", "4x^2+8x+4", "4x^2+4"),
    (r"\overline{AB}", r"\overline{AB}", r"\overline{AC}"),
    (r"\{x \mid x > 0\}", r"\{ x | x > 0 \}", r"\{x \mid x < 0\}"),
    (r"\frac{\sqrt{3}}{2}", r"\sin 60^\circ", r"\sqrt{3}"),
]
UNREADABLE = [
    "see the picture",
    "The answer is 18",
    "So she has 18 apples and gives 3 away.",
    "?",
    "-",
    "Answers may vary",
    "there is nothing in this text that is a result of any kind",
]


def forms() -> list[tuple[str, str, bool]]:
    """The gold, an answer, and whether they are equal."""
    found, gold = [], ""
    for line in FORMS.read_text(encoding="utf-8").split("\n"):
        if line[:2] in ("+ ", "- "):
            found.append((gold, line[2:].replace("⏎", "\n"), line[0] == "+"))
        elif not line.startswith("# "):
            gold = line or gold
    return found


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(1, timeout=20) as pool:
        yield pool


def grade(workers: Workers, pairs: list[tuple[str, str]]) -> list[bool]:
    rows, answers = [{"answer": gold} for gold, _ in pairs], [[answer] for _, answer in pairs]
    values, valid, _ = maths_reward(workers=workers).score([""] * len(rows), answers, rows)
    assert valid.all()
    return (values[:, 0] > 0).tolist()


@needs_sandbox
def test_right_and_wrong_forms(workers: Workers):
    table = forms()
    right = sum(equal for *_, equal in table)
    assert right >= 300 and len(table) == 2 * right
    graded = grade(workers, [row[:2] for row in table])
    assert not [row for row, got in zip(table, graded, strict=True) if row[2] != got]


@needs_sandbox
@pytest.mark.parametrize("form", ["%s", "\\boxed{%s}", "#### %s", "<answer>%s</answer>", "The answer is $%s$."])
def test_golds_equal_themselves_and_no_near_one(workers: Workers, form: str):
    assert len(GOLDS) >= 48
    same = grade(workers, [(gold, form % gold) for gold, _, _ in GOLDS])
    assert not [gold for (gold, _, _), equal in zip(GOLDS, same, strict=True) if not equal]
    near = grade(workers, [(gold, form % other) for gold, _, other in GOLDS])
    assert not [row for row, equal in zip(GOLDS, near, strict=True) if equal]


@needs_sandbox
def test_golds_equal_other_forms_and_marked_ones(workers: Workers):
    equal = grade(workers, [(gold, f"\\boxed{{{other}}}") for gold, other, _ in GOLDS])
    assert not [row for row, got in zip(GOLDS, equal, strict=True) if not got]
    for mark in ("Thus $\\boxed{%s}$.", "3 + 4 = 7\n#### %s"):
        marked = grade(workers, [(mark % gold, f"\\boxed{{{gold}}}") for gold, _, _ in GOLDS])
        assert not [gold for (gold, _, _), got in zip(GOLDS, marked, strict=True) if not got]


@needs_sandbox
def test_a_result_far_from_the_end(workers: Workers):
    prose = "I hope that this helps. Ask me for other problems of this kind, of which I know many.\n" * 200
    pairs = [("18", f"{result}\n{prose}") for result in ("\\boxed{18}", "#### 18", "The answer is 18.", "It is 18.")]
    assert grade(workers, pairs) == [True] * 4
    assert grade(workers, [("17", answer) for _, answer in pairs]) == [False] * 4


@pytest.mark.parametrize("gold", UNREADABLE)
def test_a_gold_is_not_searched(gold: str):
    assert read_gold(gold) is None


@needs_sandbox
def test_unreadable_golds_are_named_with_their_line(workers: Workers, tmp_path: Path):
    golds = ["18", "see the picture", "3\\sqrt{2}", "?"]
    places = [f"rows.jsonl:{line}" for line in (2, 4, 6, 8)]
    with pytest.raises(InputError, match=r"2 of 4.*rows.jsonl:4 'see the picture'; .*rows.jsonl:8 '\?'; each must be"):
        check_golds(golds, places, workers)
    check_golds(golds[::2], places[::2], workers)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": "a", "answer": gold}) + "\n\n" for gold in golds[:2]))
    with pytest.raises(InputError, match=r"1 of 2.*rows.jsonl:3 'see the picture'"):
        check_task("gsm8k", load_task("gsm8k", str(file)), workers)


# fmt: off
PIECES = [
    "1", "9,", "\\boxed{", "{", "(", "[", "**", "*a*", "_1_", "$", "$1$", "answer is ", "answer ", "#### ",
    "<answer>", "1 ", "\\frac", "\\text{", "`", "-", "x", "^", "!", "\\overline{", "~~", "[a](", "a ", "= ", ".",
    "<b>", "and ", "²", "٣", "|", "\n", "\\(", "</think>", ",111",
]
# fmt: on


@pytest.mark.parametrize("piece", PIECES)
def test_hostile_answers_take_linear_time(piece: str):
    """A linear reader takes half a second of CPU time for the longest text, a quadratic one minutes."""
    text, start = piece * (MAX_TEXT // len(piece)), time.process_time()
    read_answer(text, ("num", 18, None, 2))
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "candidate", "marked"),
    [
        ("#### 7 \\boxed{8}", "8", True),
        ("\\boxed{8} #### 7", "8", True),
        ("<answer>3</answer> #### 7", "3", True),
        ("\\boxed{8} and \\boxed{}", "8", True),
        ("So 3 of 4. The answer is 7. Bye.", "7", False),
    ],
)
def test_the_order_of_marks(text: str, candidate: str, marked: bool):
    assert final_answer(text)[1] == marked and candidate in find_result(text).candidates[:2]
