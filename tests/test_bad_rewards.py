"""A reward function that hangs, dies, or returns garbage or NaN: masked and counted, and the run goes on to its end."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax.config import RewardConfig
from lsp_jax.reward.user_callable import callable_reward
from test_resume import config_of
from test_trainer import read_lines

QUICK_COMPILES = True
pytestmark = pytest.mark.full

ANSWERS = 16  # of an iteration: four of each of four queries
SPOILED = (1, 2)  # query and answer for which "nan" has no number
TIMEOUT = 3.0  # for a call that takes milliseconds, on a machine with other things to do

PLAN = {
    "well": 0.0,
    "hang": 1.0,
    "die": 1.0,
    "noise": 1.0,
    "words": 1.0,
    "shape": 1.0,
    "nan": 1 / ANSWERS,
    "well again": 0.0,
}
"""What the function does in each iteration, and the fraction of answers that is masked for it."""

FUNCTION = f"""
import os, time
from pathlib import Path

CALLS = Path(__file__).with_suffix(".calls")  # processes come and go

def rewards(queries, answers):
    with CALLS.open("a") as file:
        file.write("x")
    call = CALLS.stat().st_size  # the first is on examples, before anything is played
    do = {("well", *PLAN)!r}[call - 1]
    values = [[len(text) / 8 for text in group] for group in answers]
    if do == "hang":
        time.sleep(999)
    if do == "die":
        os.kill(os.getpid(), 9)
    if do == "noise":
        for fd in range(30):
            try:
                os.write(fd, b"garbage\\n")
            except OSError:
                pass
    if do == "words":
        return [["good" for _ in group] for group in answers]
    if do == "shape":
        return values[1:]
    if do == "nan":
        values[{SPOILED[0]}][{SPOILED[1]}] = float("nan")
    return values
"""


def check(directory: Path, failed: list[float], name: str) -> None:
    """Each iteration was learned from or changed nothing, with that fraction of its answers masked."""
    lines, records = (read_lines(directory / file) for file in ("metrics.jsonl", "transcripts.jsonl"))
    assert [line["iteration"] for line in lines] == list(range(1, len(failed) + 1))
    assert [line[f"rewards/{name}/failed_fraction"] for line in lines] == failed
    assert [line["answers/valid_fraction"] for line in lines] == [1 - fraction for fraction in failed]
    assert all((line["skipped_updates"], line["not_finite/component"]) == (0, 0) for line in lines)
    assert all(line["grad_norm"] is not None for line in lines) and lines[-1]["grad_norm"] > 0
    for line, fraction in zip(lines, failed, strict=True):
        mine = [record for record in records if record["iteration"] == line["iteration"]]
        answers = {(n, g): answer for n, record in enumerate(mine) for g, answer in enumerate(record["answers"])}
        assert len(answers) == ANSWERS
        masked = set(answers) if fraction == 1 else {SPOILED} if fraction else set()
        assert not any(answers[place]["valid"] or answers[place]["advantage"] for place in masked)
        assert {place for place in answers if answers[place]["rewards"][name] is None} == (
            masked if fraction < 1 else set()
        )
    assert (directory / "export" / "model.safetensors").is_file()


def test_a_named_function(game_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """In worker processes, as the command line has it."""
    file = tmp_path / "mine.py"
    file.write_text(FUNCTION)
    reward = RewardConfig(quality_weight=0.0, callable=f"{file}:rewards", timeout=TIMEOUT)
    lsp.train(config_of(game_model, tmp_path / "run", max_steps=len(PLAN), save_steps=4, reward=reward))
    check(tmp_path / "run", list(PLAN.values()), "callable")
    assert file.with_suffix(".calls").stat().st_size == 1 + len(PLAN), "what fails is not tried again"
    said = [record.getMessage() for record in caplog.records if "is masked" in record.getMessage()]
    assert len(said) == sum(fraction == 1 for fraction in PLAN.values())
    for message, words in zip(said, ("took more than 3 s", "exit status -9", "", "dtype", "shape"), strict=True):
        assert words in message


def test_a_function_object(game_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As a notebook has it: Python cannot stop its thread, so the iteration after one that hangs is masked as well."""
    plan = iter(["well", "well", "hang", "die", "words", "nan", "well"])
    released = threading.Event()

    def rewards(queries: list[str], answers: list[list[str]]) -> Any:
        do = next(plan)
        values = [[len(text) / 8 for text in group] for group in answers]
        if do == "hang":
            released.wait()
        if do == "die":
            raise SystemExit(1)
        if do == "nan":
            values[SPOILED[0]][SPOILED[1]] = float("nan")
        return values if do != "words" else "garbage"

    def release(event: Any) -> None:
        if event.iteration == 3:
            released.set()
            for thread in threading.enumerate():
                if thread.name == "reward function":
                    thread.join()

    config = config_of(game_model, tmp_path / "run", max_steps=7, save_steps=7)
    lsp.train(config, rewards=[callable_reward(rewards, "mine", timeout=TIMEOUT)], callbacks=[release])
    check(tmp_path / "run", [0.0, 1.0, 1.0, 1.0, 1.0, 1 / ANSWERS, 0.0], "mine")
    for words in ("took more than 3 s", "is still busy", "SystemExit", "returned shape ()"):
        assert words in caplog.text
