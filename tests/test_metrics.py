"""The two files of a run byte by byte, the list of metrics, and model text that attacks the terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import sys
import termios
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lsp_jax.core.console import printable
from lsp_jax.core.errors import InputError
from lsp_jax.reporting.metrics import METRICS, PHASES, describe
from lsp_jax.reporting.progress import Console, summary
from lsp_jax.reporting.writer import MetricsWriter

HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202eevil\u2066\u200b\ufeff\x00\u2028\x7f\ud800 ok é 中"


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read(path: Path) -> list[dict]:
    """Strict JSON, one object a line."""
    return [
        json.loads(line, parse_constant=refuse_constant) for line in path.read_bytes().decode("ascii").split("\n")[:-1]
    ]


def test_metrics_are_one_strict_json_object_a_line(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "new" / "run")
    writer.write(1, {"loss": np.float32(0.5), "grad_norm": math.nan, "learning_rate": -math.inf, "host_reads": 3})
    path = tmp_path / "new" / "run" / "metrics.jsonl"
    assert path.read_bytes().endswith(b"}\n")  # readable before close
    writer.write(2, {"loss": np.array(np.inf, np.float32), "skipped_updates": np.int32(2)})
    writer.close()
    assert read(path) == [
        {"iteration": 1, "loss": 0.5, "grad_norm": None, "learning_rate": None, "host_reads": 3},
        {"iteration": 2, "loss": None, "skipped_updates": 2},
    ]


def test_transcripts_hold_any_text_and_arrays(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    record = {
        "query": HOSTILE,
        "answers": [HOSTILE, ""],
        "R": np.array([[1.0, np.nan]]),
        "valid": np.array([True, False]),
    }
    writer.write_transcripts([record, {"nested": {"x": (np.float64("inf"), None)}}])
    writer.write_transcripts([])
    first, second = read(tmp_path / "transcripts.jsonl")
    assert first == {"query": HOSTILE, "answers": [HOSTILE, ""], "R": [[1.0, None]], "valid": [True, False]}
    assert second == {"nested": {"x": [None, None]}}
    assert len((tmp_path / "transcripts.jsonl").read_text().splitlines()) == 2


def test_a_second_writer_appends(tmp_path: Path):
    MetricsWriter(tmp_path).write(1, {"loss": 1.0})
    MetricsWriter(tmp_path).write(2, {"loss": 2.0})
    assert [line["iteration"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_each_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A line much longer than any buffer reaches the file in one call."""
    sizes = []
    opened = io.open

    class Recorder(io.FileIO):
        def write(self, data) -> int:
            sizes.append(len(data))
            return super().write(data)

    def record(path, mode="r", *args, **kwargs):
        return io.BufferedWriter(Recorder(path, "ab")) if mode == "ab" else opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", record)
    MetricsWriter(tmp_path).write_transcripts([{"query": "x" * 1_000_000}, {"query": "y"}])
    MetricsWriter(tmp_path).write(1, {"loss": 1.0})
    monkeypatch.undo()
    written = [(tmp_path / name).stat().st_size for name in ("transcripts.jsonl", "metrics.jsonl")]
    assert sizes == written


def test_an_unlisted_or_unwritable_metric_writes_nothing(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    with pytest.raises(KeyError, match="solver/invented"):
        writer.write(1, {"loss": 1.0, "solver/invented": 2.0})
    with pytest.raises(TypeError):
        writer.write(1, {"loss": object()})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_cut_back_restores_the_files_of_the_checkpoint(tmp_path: Path):
    writer = MetricsWriter(tmp_path)
    assert writer.offsets() == {"metrics.jsonl": 0, "transcripts.jsonl": 0, "checksums.jsonl": 0, "alarms.jsonl": 0}
    writer.write(1, {"loss": 1.0})
    writer.write_transcripts([{"query": "é"}])
    writer.write_checksums(1, 0, {"a/w": {"shape": [2], "dtype": "float32", "checksum": 7}})
    assert read(tmp_path / "checksums.jsonl") == [{"iteration": 1, "before": 0, "arrays": {"a/w": 7}}]
    offsets = writer.offsets()
    before = {name: (tmp_path / name).read_bytes() for name in offsets}
    assert offsets == {name: len(data) for name, data in before.items()}
    writer.write(2, {"loss": 2.0})
    writer.write_transcripts([{"query": "later"}])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 3, "lo')  # torn by a kill
    resumed = MetricsWriter(tmp_path)
    resumed.truncate_to(json.loads(json.dumps(offsets)))
    assert {name: (tmp_path / name).read_bytes() for name in offsets} == before
    resumed.truncate_to(offsets)
    resumed.write(2, {"loss": 2.5})
    assert [line["loss"] for line in read(tmp_path / "metrics.jsonl")] == [1.0, 2.5]
    resumed.truncate_to(dict.fromkeys(offsets, 0))
    assert all((tmp_path / name).stat().st_size == 0 for name in offsets)


@pytest.mark.parametrize("damage", ["missing", "shorter", "empty", "inside a line"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "transcripts.jsonl"])
def test_cut_back_refuses_files_that_the_checkpoint_did_not_see(tmp_path: Path, name: str, damage: str):
    writer = MetricsWriter(tmp_path)
    for iteration in (1, 2):
        writer.write(iteration, {"loss": 1.0})
        writer.write_transcripts([{"query": "q"}])
    offsets = writer.offsets()
    writer.write(3, {"loss": 1.0})
    writer.write_transcripts([{"query": "q"}])
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    elif damage == "inside a line":
        offsets[name] -= 1
    else:
        os.truncate(path, 0 if damage == "empty" else offsets[name] - 1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError) as error:
        MetricsWriter(tmp_path).truncate_to(offsets)
    assert error.value.field == name and "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_every_metric_that_the_stages_make_is_described():
    names = [f"time/{phase}" for phase in (*PHASES, "iteration")]
    names += ["rewards/arithmetic/mean", "rewards/my/own/std", "sampling/solver/token_mult_prob_error"]
    names += ["challenger/reward", "solver/completions/clipped_ratio", "compile/count", "iteration", "learning_rate"]
    for name in (*names, *(name for name in METRICS if "<" not in name)):
        assert describe(name).strip()
    assert describe("challenger/kl") != describe("challenger/loss")
    assert "Challenger" in describe("challenger/reward") and "Solver" in describe("solver/reward")


@pytest.mark.parametrize(
    "name",
    ["", "los", "loss ", "losses", "rewards//mean", "rewards/x/meanest", "rewards/<name>", "time/tea", "judge/reward"],
)
def test_describe_refuses_other_names(name: str):
    with pytest.raises(KeyError):
        describe(name)


@pytest.mark.parametrize("report_to", [("tensorbord",), ("none",), ("tensorboard", "")])
def test_an_unknown_tracker_is_refused(tmp_path: Path, report_to: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", types.ModuleType("tensorboardX"))
    with pytest.raises(InputError, match=r"report_to.*tensorboard, wandb, trackio"):
        MetricsWriter(tmp_path / "run", report_to)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_tracker_names_its_install(tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)  # import now fails
    with pytest.raises(InputError, match="is not installed; run pip install"):
        MetricsWriter(tmp_path / "run", (name,))
    assert not (tmp_path / "run").exists()
    MetricsWriter(tmp_path / "run").write(1, {"loss": 1.0})  # not asked for, not imported


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_finite_numbers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **arguments: calls.append(("init", arguments)),
        define_metric=lambda name, step_metric=None: calls.append((name, step_metric)),
        log=lambda values, step=None: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    writer = MetricsWriter(tmp_path / "run7", (name,))
    writer.write(4, {"loss": 1.0, "grad_norm": math.nan})
    writer.write(3, {"loss": 2.0})  # played again after a rollback: wandb's own step may not go back
    writer.close()
    writer.close()
    wandb = name == "wandb"
    axis = [("iteration", None), ("*", "iteration")] if wandb else []
    lines = [
        (None if wandb else 4, {"iteration": 4, "loss": 1.0}),
        (None if wandb else 3, {"iteration": 3, "loss": 2.0}),
    ]
    assert calls == [("init", {"project": "lsp_jax", "name": "run7"}), *axis, *lines, "finish"]


def test_tensorboard_gets_its_events(tmp_path: Path):
    pytest.importorskip("tensorboardX")
    writer = MetricsWriter(tmp_path, ("tensorboard",))
    writer.write(1, {"loss": 1.0, "grad_norm": math.nan})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes() and b"grad_norm" not in events.read_bytes()


def test_printable_leaves_nothing_that_a_terminal_obeys():
    everything = "".join(map(chr, (*range(0x12000), *range(0xE0000, 0xE1000), sys.maxunicode)))
    shown = printable(everything, limit=10**8)
    bad = [c for c in set(shown) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")]
    assert bad == []
    assert printable(HOSTILE, 500) == (
        r"\x1b[31mred\x1b]0;title\x07\r\n\x9b2J\u202eevil\u2066\u200b\ufeff\x00\u2028\x7f\ud800 ok é 中"
    )


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 10, 41])
def test_printable_keeps_to_its_limit(limit: int):
    for text in ("a" * 42, "\x1b" * 42, "ab\u202e" * 14, "a" * 10_000_000):
        shown = printable(text, limit)
        assert len(shown) <= limit and shown.endswith("..."[:limit])
        assert not re.search(r"\\(x.?|u.{0,3})?\.\.\.$", shown)  # no escape cut in two
    assert printable("a" * limit, limit) == "a" * limit
    assert printable("short", 5) == "short" and printable("longer", 5) == "lo..."


NUMBERS = {
    "solver/reward": np.float32(0.5),
    "challenger/reward": -0.25,
    "queries/valid_fraction": 0.875,
    "solver/kl": 0.0125,
    "tokens_per_second": 312.4,
    "time/iteration": 8.04,
    "time/solve": 4.0,
    "time/challenge": 1.5,
}


def test_the_summary_shows_what_is_there():
    assert summary(NUMBERS) == (
        "solver +0.500  challenger -0.250  valid 0.88  kl 0.0125  312 tok/s  8.0s (challenge 1.5, solve 4.0)"
    )
    assert summary({"solver/reward": math.nan}) == "solver +nan"
    assert summary({}) == ""


def test_without_a_terminal_the_console_writes_plain_lines():
    stream = io.StringIO()
    console = Console(total=3, start=1, stream=stream)
    console.phase("solve")  # only a bar shows it
    console.step(2, NUMBERS, (HOSTILE, "an\nanswer"))
    console.step(3, {})
    console.close()
    lines = stream.getvalue().split("\n")
    assert lines[0] == f"2/3  {summary(NUMBERS)}"
    assert lines[1].startswith(r"  Q \x1b[31mred") and lines[2] == r"  A an\nanswer" and lines[3] == "3/3  "
    assert lines[4:] == [""] and not set("\r\x1b\x9b\u202e") & set(stream.getvalue())


def read_terminal(reader: int) -> str:
    """All that was written to the other side, which is closed."""
    parts = []
    with contextlib.suppress(OSError):  # EIO is the end on Linux
        while part := os.read(reader, 10_000):
            parts.append(part)
    os.close(reader)
    return b"".join(parts).decode()


@pytest.mark.parametrize("size", [0, 20, 200])
def test_on_a_terminal_the_console_adds_a_bar(size: int, monkeypatch: pytest.MonkeyPatch):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", size, size, 0, 0))
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console(total=3, start=1)
        console.phase("solve")
        console.step(2, NUMBERS, (HOSTILE, "answer"))
        console.phase("update")
        console.step(3, {"solver/reward": 0.75})
        console.close()
        monkeypatch.undo()
    shown = read_terminal(reader).replace("\r\n", "\n")
    assert [part for part in ("1/3 |", "2/3 |", "3/3 |") if f"\r{part}" in shown] == ["1/3 |", "2/3 |", "3/3 |"]
    assert f"2/3  {summary(NUMBERS)}\n" in shown and "3/3  solver +0.750\n" in shown
    assert ", solve (compiles first)" in shown and ", update" in shown and "update (compiles" not in shown
    assert shown.count("  A answer\n") == 1 and not set("\x9b\u202e\x07") & set(shown) and "\x1b[31m" not in shown


def test_the_console_writes_to_standard_error(capsys: pytest.CaptureFixture[str]):
    Console(total=1).step(1, NUMBERS)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("1/1  solver +0.500")
