"""For `test_fuzz.py`: changes to whole files, limits for what is done with them, and where they lie."""

from __future__ import annotations

import copy
import io
import json
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from lsp_jax import cli
from lsp_jax.core.errors import InputError
from refusal import WeightsRead

SECONDS = 20  # of the processor, for one input; most take milliseconds
MEMORY = 4 << 30  # bytes that one input may take

# --- what is tried -------------------------------------------------------------------------------------------------

DEEP, DIGITS = "<deep>", "<digits>"  # what json cannot write: put in as text
ODD_TEXTS = ["", "\ud800", "a\0b", "\x1b[2J\r", "x" * 100_000, "~nosuchuser/x", "..", "/dev/null/x", "<|im_start|>"]
ODD_VALUES = [*ODD_TEXTS, DEEP, DIGITS, 10**400, -(2**63), 2**31, 2**60, [], {}, [[]], {"a": None}, ["a"], [-1]]
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=20))
VALUES = st.one_of(PLAIN, st.sampled_from(ODD_VALUES).map(copy.deepcopy))  # what is put in may be changed further
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from([*ODD_TEXTS, "9" * 5000, "nan", "inf", "-1", "0", "1", "2", "3", "0.5", "1e999", "None", "True"]),
    st.integers().map(str),
    st.floats().map(str),
)


def json_bytes(value: Any) -> bytes:
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    return text.replace(f'"{DIGITS}"', "9" * 5000).encode()


def changed_json(whole: bytes) -> st.SearchStrategy[bytes]:
    """A JSON text in which one or two values, at any depth, are missing, replaced or added."""

    @st.composite  # without arguments: hypothesis writes them all down
    def change(draw: st.DrawFn) -> bytes:
        value = json.loads(whole)
        for _ in range(draw(st.integers(1, 2))):
            inside = value
            while True:
                key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
                if not isinstance(inside[key], (dict, list)) or not inside[key] or draw(st.booleans()):
                    break
                inside = inside[key]
            what = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
            if what == "drop" and len(inside) > 1:
                del inside[key]
            elif what == "add" and isinstance(inside, dict):
                inside[draw(st.text(max_size=20)) + "\x1b"] = draw(VALUES)
            else:
                inside[key] = draw(VALUES)
        return json_bytes(value)

    return change()


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file with some bytes changed, cut short, or something else altogether."""

    @st.composite
    def damage(draw: st.DrawFn) -> bytes:
        what = draw(st.sampled_from(["bytes", "bytes", "number", "number", "cut", "other"]))
        if what == "other":
            return draw(st.one_of(st.binary(max_size=100), VALUES.map(json_bytes)))
        # the beginning is where lengths and names are
        place = draw(st.one_of(st.integers(0, min(len(whole), 100)), st.integers(0, len(whole))))
        if what == "cut":
            return whole[:place]
        if what == "number":
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**64 - 1]))
            put = number.to_bytes(8, "little")[: draw(st.sampled_from([4, 8]))]
        else:
            put = draw(st.binary(min_size=1, max_size=4))
        return whole[:place] + put + whole[place + len(put) :]

    return damage()


def changed(whole: bytes) -> st.SearchStrategy[bytes | None]:
    """Other content for a file that holds `whole`; None: a directory in its place."""
    try:
        json.loads(whole)
    except ValueError:
        return st.one_of(damaged(whole), damaged(whole), damaged(whole), st.none())
    return st.one_of(changed_json(whole), changed_json(whole), changed_json(whole), damaged(whole), st.none())


def any_of(*paths: Path) -> st.SearchStrategy[tuple[Path, bytes | None]]:
    """One of the files and other content for it."""
    return st.one_of(*(st.tuples(st.just(path), changed(path.read_bytes())) for path in paths))


# --- how it must end -----------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not caught by what expects anything from a library."""


@contextmanager
def limits() -> Iterator[None]:
    """`SECONDS` of processor time, so that a busy machine is no hang, and `MEMORY` more than the process ever had.

    SIGPROF is libtpu's, which samples itself once it is loaded (by tests that compile for TPUs). Memory is looked at
    afterwards: libraries' own threads end the process where a limit refuses them any.
    """

    armed = False

    def late(*_: Any) -> None:
        if armed:  # never outside of the input's own doing, such as in pytest's report of it
            raise Hang

    handler = signal.signal(signal.SIGVTALRM, late)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        armed = True
        yield
    except Hang:
        raise AssertionError(f"takes over {SECONDS} s") from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
    assert taken < MEMORY, f"takes {taken >> 20} MiB"


def tree(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


class Place:
    """Where the inputs lie: below `root`, the working directory and home included; only `out` may be written."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "here" / "out"
        self.model, self.shards, self.pieces = root / "model", root / "shards", root / "pieces"
        self.run, self.rows, self.gguf = root / "run", root / "rows.jsonl", root / "tiny.gguf"

    def ends(self, action: Callable[[], None], file: Path | None = None, content: bytes | None = None) -> None:
        """`action` must succeed, be refused or come to the weights, with `content` in `file` (None: a directory)."""
        whole = file.read_bytes() if file else b""
        if file:
            file.unlink()
            file.mkdir() if content is None else file.write_bytes(content)
        before = tree(self.root)
        try:
            with limits():
                action()
        except (InputError, WeightsRead):
            pass
        finally:
            shutil.rmtree(self.out, ignore_errors=True)
            after = tree(self.root)
            if file:
                file.rmdir() if content is None else file.unlink()
                file.write_bytes(whole)
        assert after == before

    def command(self, *arguments: Any) -> None:
        """A command line, which must end with status 0 or 2; an error of ours is one printable line, after warnings."""
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            try:
                status = cli.main([str(argument) for argument in arguments])
            except SystemExit as stop:  # what tyro refuses
                status = stop.code
            except WeightsRead:
                status = 0
        err = said.getvalue()
        assert status in (0, 2) and "Traceback" not in err, (status, err)
        if err.startswith("lsp-jax: "):
            lines = err.splitlines(keepends=True)
            assert all(line[:-1].isprintable() and line[-1] == "\n" and len(line) < 1100 for line in lines), err
            warnings = [line.startswith("lsp-jax: warning: ") for line in lines]
            assert all(warnings[:-1]) and warnings[-1] == (status == 0), (status, err)

    def train(self, *more: Any, model: Path | None = None) -> None:
        short = ["--prompts.challenger", "Ask.", "--play.max-query-length", 8, "--play.max-completion-length", 8]
        self.command("train", "--model", model or self.model, "--output-dir", self.out, *short, *more)


def sentencepiece() -> bytes:
    """A tokenizer.model by hand: control pieces, the bytes, two words; in protobuf's form, number * 8 + kind first."""

    def part(number: int, body: bytes) -> bytes:
        return bytes([number * 8 + 2, len(body)]) + body

    words = ["▁yes", "▁no", "▁Yes", "▁No"]
    begun = dict.fromkeys(word[:end] for word in words for end in range(1, len(word) + 1))
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    pieces += [(text, 1) for text in begun]
    scored = [
        part(1, part(1, text.encode()) + b"\x15" + struct.pack("<f", -float(place)) + bytes([24, kind]))
        for place, (text, kind) in enumerate(pieces)
    ]
    bpe_with_bytes, as_it_is = bytes([24, 2, 0x98, 2, 1]), bytes([24, 1, 32, 0, 40, 1])
    return b"".join(scored) + part(2, bpe_with_bytes) + part(3, part(1, b"identity") + as_it_is)
