"""What a program in the sandbox tries in vain; each attempt is made for real."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lsp_jax.core.errors import InputError
from lsp_jax.reward.code import code_reward
from lsp_jax.reward.execution import sandbox
from lsp_jax.reward.execution.pool import Workers
from lsp_jax.reward.execution.sandbox import check_sandbox, sandboxed
from lsp_jax.reward.execution.sandbox_main import system_call_filter

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")
OK = "def f():\n    return 1\n"
ROW = {"test_list": ["assert f() == 1"]}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2, timeout=10) as pool:
        yield pool


def passes(workers: Workers, program: str, timeout: float = 10) -> bool:
    """Whether the program passes; also that the next one works."""
    values, valid, _ = code_reward(workers=workers, timeout=timeout).score([""], [[program, OK]], [ROW])
    assert valid.all() and values[0, 1] == 1
    return bool(values[0, 0])


@needs_bwrap
def test_the_sandbox_is_whole(workers: Workers):
    check_sandbox(workers)


# Each finds what it looks for outside the sandbox and raises inside, or is ended there.
ATTEMPTS = {
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "environment": "import os\nassert os.environ['LSP_JAX_TEST_SECRET']",
    "parent's environment": "open('/proc/1/environ', 'rb').read()",
    "write outside": "open('{dir}/new', 'w').write('x')",
    "write /usr": "open('/usr/x', 'w')",
    "write /": "open('/x', 'w')",
    "read a secret": "assert open('{dir}/secret').read()",
    "read the home directory": "import os\nassert os.listdir('{home}')",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "fork": "import os\nwhile True:\n    os.fork()",
    "subprocess": "import subprocess\nsubprocess.run(['/usr/bin/true'], check=True)",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=[99]).start()",
    "memory": "x = bytearray(100 << 30)",
    "memory by pieces": "x = []\nwhile True:\n    x.append(bytes(1 << 20))",
    "disk": "i = 0\nwhile True:\n    i += 1\n    with open(f'f{{i}}', 'wb') as f:\n        f.write(bytes(8 << 20))",
    "large file": "with open('f', 'wb') as f:\n    for _ in range(99):\n        f.write(bytes(1 << 20))",
    "kill the parent": "import os\nassert os.getppid() == 1 or os.kill(os.getppid(), 9)\nos.kill({pid}, 9)",
    "kill all": "import os\nos.kill(-1, 9)\nos._exit(0)",
    "root": "import os\nos.setuid(0)",
    "name space": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.unshare(0x10000000) == 0",
    "terminal": "open('/dev/tty')",
    "raise the limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "open files": "x = [open('/dev/null') for _ in range(1000)]",
}


HARMLESS = (
    "socket",
    "environment",
    "write outside",
    "read a secret",
    "read the home directory",
    "read /etc/passwd",
    "subprocess",
    "open files",
)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The attempts, aimed at a server, a file, an environment and a home directory that are there."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").write_text("secret")
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("LSP_JAX_TEST_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield {
            name: program.format(port=port, dir=tmp_path, home=home, pid=os.getpid())
            for name, program in ATTEMPTS.items()
        }


@needs_bwrap
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_attempts_fail(attempt: str, workers: Workers, written: dict[str, str], tmp_path: Path):
    program = f"{written[attempt]}\n{OK}"
    compile(program, attempt, "exec")
    assert not passes(workers, program)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("attempt", HARMLESS)
def test_the_same_attempts_succeed_outside(attempt: str, written: dict[str, str]):
    """So that they fail inside for the reason that is meant."""
    assert subprocess.run([sys.executable, "-c", written[attempt]], check=False).returncode == 0


@needs_bwrap
def test_the_real_home_directory_is_not_there(workers: Workers):
    """Nothing below it but the way to a Python that lives there."""
    own = Path(sys.base_prefix)
    names = [path.name for path in Path.home().iterdir() if path != own and path not in own.parents]
    if not names:
        pytest.skip("the home directory is empty")
    program = f"import os\nhome = {str(Path.home())!r}\n"
    program += f"seen = set(os.listdir(home)) if os.path.isdir(home) else set()\nassert not seen & set({names!r})\n"
    assert passes(workers, program + OK)


@needs_bwrap
@pytest.mark.parametrize("program", ["import time\ntime.sleep(99)", "while True: pass", "def f():\n    return f()"])
def test_programs_without_end_are_ended(program: str, workers: Workers):
    start = time.monotonic()
    assert not passes(workers, program, timeout=1)
    assert time.monotonic() - start < 4


@needs_bwrap
def test_a_flood_of_output_reaches_nobody(workers: Workers, capfd: pytest.CaptureFixture[str]):
    flood = "import os\nfor _ in range(100):\n    os.write(1, b'x' * 1000000)\n    os.write(2, b'x' * 1000000)\n"
    assert passes(workers, flood + OK)
    endless = (
        "import os\nwhile True:\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'x' * 100000)\n"
    )
    endless += "        except OSError:\n            pass\n"
    assert not passes(workers, endless)
    captured = capfd.readouterr()
    assert "xxx" not in captured.out + captured.err


@needs_bwrap
def test_the_writable_place_is_empty_and_works(workers: Workers):
    program = "import os\nassert os.listdir('.') == []\nopen('a', 'w').write('x')\n"
    assert passes(workers, program + OK) and passes(workers, program + OK)


@needs_bwrap
def test_no_process_is_left(workers: Workers):
    passes(workers, "import time\ntime.sleep(99)", timeout=0.5)
    time.sleep(0.2)
    command = b"\0/sandbox_main.py\0code\0"
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _holds(path, command, os.getpid())]
    assert not left


def _holds(path: Path, command: bytes, parent: int) -> bool:
    try:
        return command in path.read_bytes() and f"PPid:\t{parent}\n" in (path.parent / "status").read_text()
    except OSError:
        return False


@needs_bwrap
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that every user can read")
def test_it_works_for_an_ordinary_user_too(workers: Workers, monkeypatch: pytest.MonkeyPatch):
    """The other tests run as whoever started them, root in containers."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        monkeypatch.setattr(sandbox, "_SANDBOX_MAIN", Path(shutil.copy(sandbox._SANDBOX_MAIN, directory)))
        monkeypatch.setattr(sys, "base_prefix", "/usr")
        monkeypatch.setattr(sys, "_base_executable", "/usr/bin/python3")
        user = (shutil.which("setpriv") or "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        whole = sandboxed("probe", once=True)
        monkeypatch.setattr(sandbox, "sandboxed", lambda *_, **__: whole._replace(argv=(*user, *whole.argv)))
        check_sandbox(workers)


def test_what_is_missing_is_named(workers: Workers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="not on PATH; install the Debian package bubblewrap"):
        check_sandbox(workers)
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(fake))
    with pytest.raises(InputError, match="setting up uid map: Permission denied"):
        check_sandbox(workers)
    with pytest.raises(InputError, match=r"no_such_package.*lsp-jax\[maths\]"):
        sandboxed("maths", ("no_such_package",))


@needs_bwrap
def test_a_sandbox_with_a_hole_is_refused(workers: Workers, monkeypatch: pytest.MonkeyPatch):
    whole, shared = sandboxed("probe", once=True), tempfile.gettempdir()
    holes = {
        "network": (["--unshare-net"], []),
        "the environment": (["--clearenv"], ["--setenv", "A", "b"]),
        "writing outside": (["--remount-ro", "/"], []),
        "the run's files": (["--remount-ro", "/"], ["--ro-bind", shared, shared]),
        "capabilities": (["--cap-drop", "ALL"], ["--cap-add", "ALL"]),
        "root's rights": (["--uid", "65534"], ["--uid", "0"]),
        "other processes": (["--unshare-pid"], ["--ro-bind", "/proc", "/proc"]),
    }
    for name, (without, instead) in holes.items():
        argv = list(whole.argv)
        place = next(i for i in range(len(argv)) if argv[i : i + len(without)] == without)
        argv[place : place + len(without)] = instead
        monkeypatch.setattr(sandbox, "sandboxed", lambda *_, argv=argv, **__: whole._replace(argv=tuple(argv)))
        with pytest.raises(InputError, match=name):
            check_sandbox(workers)


def test_the_filter_is_for_known_machines_and_its_jumps_land():
    import struct

    for machine in ("x86_64", "aarch64"):
        rules = list(struct.iter_unpack("HBBI", system_call_filter(machine)))
        assert rules[-1][3] == 0x00050001 and rules[-2][3] == 0x7FFF0000
        for place, (code, true, _, value) in enumerate(rules):
            if code in (0x15, 0x35) and place > 1:
                assert place + 1 + true == len(rules) - 1, hex(value)
    with pytest.raises(OSError, match="m68k"):
        system_call_filter("m68k")
