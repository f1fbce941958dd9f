"""Worker processes: whatever a reward function does, the other items keep their results and the next call works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward.base import EpisodeTexts, score_on_host
from lsp_jax.reward.execution.pool import MAX_LOG, Program, WorkerFailure, Workers, line_of
from lsp_jax.reward.user_callable import arithmetic_reward, callable_reward, probe_callable

CHILD = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    r = json.loads(line)
    n, do = r["number"], r["do"]
    if do == "hang": time.sleep(99)
    if do == "crash": os.kill(os.getpid(), 11)
    if do == "exit": sys.exit(0)
    if do == "garbage": print("no json", flush=True)
    if do == "huge": sys.stdout.write("x" * (9 << 20)); sys.stdout.flush(); time.sleep(99)
    if do == "deep": print("[" * 100000, flush=True)
    if do == "list": print("[1]", flush=True)
    if do == "other": print(json.dumps({"number": n + 1}), flush=True)
    if do == "twice": sys.stdout.write(json.dumps({"number": n}) + "\\n" + json.dumps({"number": n + 1}) + "\\n"); sys.stdout.flush()
    if do == "quiet": os.close(2); time.sleep(0.5)
    if do == "noise": sys.stderr.write("\\x1b[31m" + "loud " * 100000); sys.stderr.flush()
    print(json.dumps({"number": n, "did": do, "pid": os.getpid(), "size": len(r.get("text", ""))}), flush=True)
"""  # noqa: E501
PROGRAM = Program((sys.executable, "-c", CHILD))
BAD = ("hang", "crash", "exit", "garbage", "huge", "deep", "list", "other", "twice")


def write(path: Path, text: str) -> str:
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_bad_items_fail_and_the_others_keep_their_results():
    items = [{"do": do} for bad in BAD for do in ("well", bad)]
    with Workers(3, timeout=1) as workers:
        outcomes = workers.run(PROGRAM, items)
        assert [o.reply is not None for o in outcomes] == [item["do"] == "well" for item in items]
        assert all(o.started for o in outcomes) and outcomes[1].failure == "took more than 1 s"
        assert "exit status -11" in outcomes[3].failure
        (after,) = workers.run(PROGRAM, [{"do": "well", "text": "x" * 1_000_000}])  # more than a pipe holds
        assert after.reply and after.reply["size"] == 1_000_000


def test_children_are_used_again_until_the_pool_is_closed():
    with Workers(1, timeout=5) as workers:
        pids = {
            o.reply["pid"]
            for o in workers.run(PROGRAM, [{"do": "x"}] * 5) + workers.run(PROGRAM, [{"do": "x"}])
            if o.reply
        }
        assert len(pids) == 1
        os.kill(pids.pop(), signal.SIGKILL)
        time.sleep(0.2)
        assert workers.run(PROGRAM, [{"do": "x"}])[0].reply  # one that died while it waited costs no item
        once = PROGRAM._replace(once=True)
        assert len({o.reply["pid"] for o in workers.run(once, [{"do": "x"}] * 3) if o.reply}) == 3
        (last,) = workers.run(PROGRAM, [{"do": "x"}])
    assert last.reply
    with pytest.raises(ProcessLookupError):
        os.kill(last.reply["pid"], 0)


def test_what_cannot_start_fails_every_item_soon():
    with Workers(2, timeout=5) as workers:
        for argv in ((sys.executable, "-c", "import sys; sys.exit('no \x1b luck')"), ("/no/such/program",)):
            outcomes = workers.run(Program(argv), [{}] * 500)
            assert len(outcomes) == 500 and not any(o.started or o.reply for o in outcomes)
        assert "No such file" in outcomes[0].failure
        failure = workers.run(Program((sys.executable, "-c", "import sys; sys.exit('no \x1b luck')")), [{}])[0].failure
        assert "no \\x1b luck" in failure


def test_standard_error_is_passed_on_printable_and_bounded(capsys: pytest.CaptureFixture[str]):
    with Workers(1, timeout=5) as workers:
        assert workers.run(PROGRAM, [{"do": "noise"}])[0].reply
    shown = capsys.readouterr().err
    assert "loud" in shown and "\x1b" not in shown and len(shown) < 2 * MAX_LOG
    assert line_of(b"a\x00\xff\n b\x1b") == "a\\x00\ufffd b\\x1b"


def test_a_child_without_standard_error_costs_no_time_of_ours():
    with Workers(1, timeout=5) as workers:
        workers.run(PROGRAM, [{"do": "well"}])
        start = time.process_time()
        assert workers.run(PROGRAM, [{"do": "quiet"}])[0].reply
        assert time.process_time() - start < 0.1


@pytest.mark.parametrize(("count", "timeout"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan")), (1, float("inf"))])
def test_a_pool_needs_workers_and_time(count: int, timeout: float):
    with pytest.raises(InputError, match="workers"):
        Workers(count, timeout)


CALLABLES = """
    import ctypes, os, sys, time
    assert "jax" not in sys.modules, "a worker starts without JAX"
    def rewards(queries, answers):
        print("this goes to standard error")
        do = queries[0]
        if do == "hang": time.sleep(99)
        if do == "stuck": ctypes.PyDLL(None).sleep(99)
        if do == "exit": os._exit(0)
        if do == "leave": sys.exit(0)
        if do == "recursion": rewards(queries, answers)
        if do == "raise": raise ValueError("no reward")
        if do == "write":
            for fd in range(30):
                try: os.write(fd, b"garbage\\n")
                except OSError: pass
        if do == "shape": return [1.0]
        if do == "nan": return [[float("nan"), 1.0]]
        return [[1.0, 2.0]]
    def with_rows(queries, answers, rows):
        return [[row["points"]] * 2 for row in rows]
"""


@pytest.mark.full
def test_a_named_function_cannot_hang_or_break_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spec = write(tmp_path / "mine.py", CALLABLES) + ":rewards"
    with Workers(1, timeout=2) as workers:
        reward = callable_reward(spec, "mine", workers=workers)
        for do in ("hang", "stuck", "exit", "leave", "recursion", "raise", "write", "shape"):
            output = score_on_host(reward, EpisodeTexts([do], [["a", "b"]]))
            assert not np.asarray(output.valid_answer).any(), do
            if do not in ("stuck", "leave"):
                assert np.asarray(score_on_host(reward, EpisodeTexts(["go"], [["a", "b"]])).values).tolist() == [[1, 2]]
        assert len(caplog.records) == 8 and "took more than 2 s" in caplog.text and "no reward" in caplog.text
        assert reward.score(["nan"], [["a", "b"]], ()).valid_answer.tolist() == [[False, True]]
        with pytest.raises(InputError, match=r"shape \(1,\)"):
            reward.score(["shape"], [["a", "b"]], ())
        with pytest.raises(WorkerFailure, match="ValueError: no reward"):
            reward.score(["raise"], [["a", "b"]], ())


def test_rows_go_to_the_functions_that_ask_for_them(tmp_path: Path):
    spec = write(tmp_path / "mine.py", CALLABLES) + ":with_rows"
    rows = [{"points": 3}, {"points": 4}]
    with Workers(1, timeout=5) as workers:
        for function in (spec, lambda queries, answers, rows: [[row["points"]] * 2 for row in rows]):
            values = callable_reward(function, "mine", workers=workers).score(["q", "r"], [["a", "b"]] * 2, rows).values
            assert values.tolist() == [[3, 3], [4, 4]]


def test_the_probe_refuses_what_hangs_dies_or_is_not_there(tmp_path: Path):
    file = write(tmp_path / "mine.py", "import os, time\ndef h(q, a): time.sleep(99)\ndef d(q, a): os._exit(0)\n")
    with Workers(1, timeout=0.5) as workers:
        for name, message in (
            ("h", "took more than 0.5 s"),
            ("d", "ended without a reply"),
            ("x", "has no function x"),
        ):
            with pytest.raises(InputError, match=message) as error:
                probe_callable(callable_reward(f"{file}:{name}", "mine", workers=workers))
            assert error.value.field == "reward.callable"


def test_a_function_object_is_left_behind_when_it_is_late():
    calls = []

    def slow(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        calls.append(queries)
        time.sleep(0.6 if queries == ["slow"] else 0)
        return [[1.0]]

    reward = callable_reward(slow, "mine", timeout=0.2)
    with pytest.raises(WorkerFailure, match=r"took more than 0.2 s"):
        reward.score(["slow"], [["a"]], ())
    start = time.monotonic()
    with pytest.raises(WorkerFailure, match="still busy"):
        reward.score(["fast"], [["a"]], ())
    assert time.monotonic() - start < 0.1 and calls == [["slow"]]
    time.sleep(0.6)
    assert reward.score(["fast"], [["a"]], ()).values.tolist() == [[1]]

    def leaves(queries: list[str], answers: list[list[str]]) -> list[list[float]]:
        raise SystemExit(3)

    with pytest.raises(WorkerFailure, match="SystemExit"):
        callable_reward(leaves, "mine").score(["q"], [["a"]], ())


PARENT = """
import sys
from lsp_jax.reward.user_callable import callable_reward
from lsp_jax.reward.execution.pool import Workers
with Workers(1, timeout=60) as workers:
    callable_reward(sys.argv[1], "mine", workers=workers).score([sys.argv[2]], [["a"]], ())
"""


@pytest.mark.full
@pytest.mark.parametrize("how", ["sleep", "stuck"])
def test_children_end_when_the_run_is_killed(how: str, tmp_path: Path):
    """Also one that keeps the interpreter's lock in C code, which only the kernel can end."""
    note = tmp_path / "pid"
    spec = write(
        tmp_path / "mine.py",
        f"""
        import ctypes, os, time
        def f(queries, answers):
            open({str(note)!r}, "w").write(str(os.getpid()))
            if queries == ["stuck"]: ctypes.PyDLL(None).sleep(99)
            time.sleep(99)
        """,
    )
    parent = subprocess.Popen([sys.executable, "-c", PARENT, spec + ":f", how])
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    status = Path(f"/proc/{note.read_text()}/status")
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not status.exists() or "zombie" in status.read_text()


def test_arithmetic_is_graded_in_a_worker():
    with Workers(1, timeout=10) as workers:
        reward = arithmetic_reward(workers=workers)
        values, valid, valid_query = reward.score(["What is 3 + 4?", "a joke"], [["7", "8"], ["7", "8"]], ())
    assert values.tolist() == [[1, 0], [0, 0]] and valid.all() and valid_query.tolist() == [True, False]


SLOW = """
import pathlib, time

def stuck_here():
    pathlib.Path(__file__).with_suffix(".entered").touch()
    time.sleep(99)

def score(queries, answers):
    print("x" * 20_000, flush=True)  # more than is passed on of what a function says
    stuck_here()
"""


@pytest.mark.parametrize("asked", [False, True])
def test_a_function_that_hangs_shows_where(asked: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Its own stack when its time is over, and when somebody asks while it works."""
    path = write(tmp_path / "slow.py", SLOW)
    program = Program((sys.executable, "-m", "lsp_jax.reward.execution.worker_main", f"{path}:score"))
    item = {"queries": ["q"], "answers": [["a"]], "rows": []}
    entered = tmp_path / "slow.entered"
    with Workers(1, timeout=2) as workers:
        workers.ready(program)

        def ask():
            while not entered.exists():
                time.sleep(0.02)
            workers.show_stacks()

        asker = threading.Thread(target=ask, daemon=True)
        if asked:
            asker.start()
        (outcome,) = workers.run(program, [item])
    assert entered.exists()
    assert outcome.failure == "took more than 2 s"
    assert capfd.readouterr().err.count("in stuck_here") == 1 + asked
