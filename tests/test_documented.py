"""Every `lsp-jax` command of the documents that needs neither hub nor accelerator is run, in the order of a reader."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import child_run
from lsp_jax import cli
from test_docs import PAGES, parts
from tiny import tiny_dir

QUICK_COMPILES = True
DEMO = "models/SmolLM2-135M-Instruct"
NOWHERE = re.compile(r"preset (paper_|recommended_)|https://|HOST:PORT|/shared/")
"""What needs the hub, accelerators, other machines: every such command says so in its comment."""


ELSEWHERE = "demo-model", "plan"
"""Run with the real model (`tests/test_newcomer.py`), and for real machines (`tests/test_plan.py`)."""


def test_what_is_needed_is_said() -> None:
    free = [command for _, command in parts("lsp-jax ", anywhere=True)]
    assert 15 < len(free) < len(parts("lsp-jax "))
    assert not [command for command in free if NOWHERE.search(command) and not command.startswith("plan ")]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: a tiny model in the demo model's place, and the files that the documents speak of."""
    for name in (DEMO, "path-or-hub-id", "models/base"):
        tiny_dir(tmp_path / name)
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is so.\n#### {n + 1}"} for n in range(3)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["question"]}) + "\n" for row in rows))
    found = re.search(r"```python\n# my_reward\.py\n(.*?)```", PAGES[0].read_text("utf-8"), re.S)
    assert found is not None
    (tmp_path / "my_reward.py").write_text(found.group(1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")
def test_every_command_that_can_run_here_does(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen, failed = set(), []
    quickstart = "train --preset quickstart --resume auto"  # `make quickstart`, whose folder later commands name
    for command in [quickstart, *(command for _, command in parts("lsp-jax ", anywhere=True))]:
        name, *arguments = shlex.split(command)
        if command in seen or name in ELSEWHERE:
            continue
        seen.add(command)
        again = "runs/mine" in arguments and name == "train"  # several pages begin the same run
        status = cli.main([name, *arguments, *(["--resume", "auto"] if again and "--resume" not in arguments else [])])
        if status:
            failed.append((command, status, capsys.readouterr().err[-500:]))
    assert not failed
    assert len(seen) > 12 and (desk / "comparison.html").is_file() and (desk / "adapters").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readmes_notebook_lines_run(desk: Path) -> None:
    """All its blocks of Python but the reward's, in their order, in a process of their own."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text("utf-8"), re.M | re.S)
    script = "\n".join(block for block in blocks if not block.startswith("# my_reward.py"))
    assert "lsp.train(" in script and "lsp.generate(" in script
    env = child_run.environment(devices=2, quick=True)
    done = subprocess.run([sys.executable, "-c", script], cwd=desk, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (desk / "runs" / "notebook" / "report.html").is_file() and (desk / "exported" / "config.json").is_file()
