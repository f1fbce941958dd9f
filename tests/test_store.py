"""Results by content: on disk when `add` returns, whole after a crash, never two writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.evaluate.result_cache import Store, digest


def test_what_was_added_is_there_again(tmp_path: Path):
    with Store(tmp_path / "new" / "a.jsonl") as store:
        store.add({"one": [1, "ä\n"], "two": None})
        assert "one" in store and len(store) == 2
    with Store(tmp_path / "new" / "a.jsonl") as store:
        assert store["one"] == [1, "ä\n"] and store["two"] is None and "three" not in store


def test_a_killed_process_has_lost_nothing(tmp_path: Path):
    program = (
        "import sys; from lsp_jax.evaluate.result_cache import Store\n"
        "store = Store(sys.argv[1]); store.add({'a': 1}); print('added', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.jsonl")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"added\n"
        with pytest.raises(InputError, match="another evaluation"):
            Store(tmp_path / "a.jsonl")
        os.kill(process.pid, signal.SIGKILL)
    with Store(tmp_path / "a.jsonl") as store:
        assert store["a"] == 1


def test_half_a_line_is_dropped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with Store(path) as store:
        store.add({"a": 1, "b": 2})
    path.write_bytes(path.read_bytes()[:-5])
    with Store(path) as store:
        assert "b" not in store
        store.add({"c": 3})
    with Store(path) as store:
        assert store["a"] == 1 and store["c"] == 3 and len(store) == 2


@pytest.mark.parametrize("line", ["[1]", "{", '{"key": "a"}', "[" * 100_000, '{"key": [], "value": 1}'])
def test_a_file_of_someone_else_is_left_alone(tmp_path: Path, line: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"key": "a", "value": 1}\n' + line + "\n")
    with pytest.raises(InputError, match=r"a.jsonl:2.*(not a cached result|JSON)"):
        Store(path)
    assert path.read_text().endswith(line + "\n")


def test_digests_tell_contents_apart():
    assert digest("a", ["b"]) == digest("a", ["b"])
    assert len({digest("a", "b"), digest("ab"), digest(["a", "b"]), digest("a", "b", "")}) == 4
