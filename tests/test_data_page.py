"""docs/data.md: every example on it is read by what it is for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lsp_jax.evaluate.tasks import load_task
from lsp_jax.evaluate.winrate import load_instructions
from lsp_jax.play.prompt_data import DataConfig, load_data
from lsp_jax.reward import code, maths
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.text.tokenizer import Tokenizer
from test_docs import ROOT
from tiny import write_tokenizer

PAGE = (ROOT / "docs" / "data.md").read_text("utf-8")
Rows = list[dict[str, Any]]


def examples(section: str) -> list[str]:
    """The examples of a section, each the text of a JSON Lines file."""
    text = re.split(r"^## ", PAGE.split(f"\n## {section}\n")[1], flags=re.MULTILINE)[0]
    return re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows_of(text: str) -> Rows:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_pretrained(directory)


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prompts(tokenizer: Tokenizer, tmp_path: Path):
    plain, joined, messages = examples("Prompts for training")
    for text, fields, expected in (
        (plain, ("prompt",), ["Name three primary colours."]),
        (joined, ("instruction", "input"), ["Sort these words.\n\npear\napple"]),
        (messages, ("prompt",), ["The capital of France?", "Times 2?"]),
    ):
        data = load_data(DataConfig(source=written(tmp_path / "a.jsonl", text), prompt_fields=fields), tokenizer)
        assert [tokenizer.decode(ids) for ids in data.ids] == expected and not data.left_out
        assert bool(data.before) == (text == messages)


def test_maths_answers(tokenizer: Tokenizer, tmp_path: Path):
    (text,) = examples("Answers for the maths reward")
    data = load_data(DataConfig(source=written(tmp_path / "a.jsonl", text)), tokenizer)
    assert [row["answer"] for row in data.rows] == [row["answer"] for row in rows_of(text)]
    maths.check_rows(data.rows)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")
def test_code_tests(tmp_path: Path):
    """Executed with a right and a wrong program."""
    rows = [row for text in examples("Tests for the code reward") for row in rows_of(text)]
    rows += rows_of(examples("Evaluation tasks")[-1])
    code.check_rows(rows)
    answers = [["def add(a, b):\n    return a + b", "def add(a, b):\n    return 8"]] * len(rows)
    with Workers(2, timeout=20) as workers:
        values, valid, _ = code.code_reward(workers=workers, timeout=20).score([""] * len(rows), answers, rows)
    assert len(rows) == 6 and valid.all() and values.tolist() == [[1, 0]] * 6


def test_tasks(tmp_path: Path):
    found = dict(zip(("gsm8k", "math", "humaneval"), examples("Evaluation tasks"), strict=True))
    for name, text in found.items():
        problems = load_task(name, written(tmp_path / "a.jsonl", text))
        assert len(problems) == len(rows_of(text))
    assert [p.row["answer"] for p in load_task("math", written(tmp_path / "a.jsonl", found["math"]))] == [
        "It is $\\boxed{x^2-4x+4}$.",
        "\\boxed{x^2-4x+4}",
    ]


@pytest.mark.parametrize("form", [str, lambda text: json.dumps(rows_of(text))], ids=["lines", "list"])
def test_instructions(form: Callable[[str], str], tmp_path: Path):
    plain, outputs = (written(tmp_path / f"{n}.json", form(text)) for n, text in enumerate(examples(_JUDGES)))
    assert [i.subset for i in load_instructions(plain, "instructions")] == ["poems", ""]
    (found,) = load_instructions(outputs, "winrate_against", outputs=True)
    assert (found.output, found.generator) == ("Air scatters blue light most.", "baseline-1")


_JUDGES = "Instructions and outputs for judges"


def test_every_example_is_read_here():
    sections = ("Prompts for training", "Answers for the maths reward", "Tests for the code reward", "Evaluation tasks")
    assert sum(len(examples(section)) for section in (*sections, _JUDGES)) == PAGE.count("```json\n") == 11
