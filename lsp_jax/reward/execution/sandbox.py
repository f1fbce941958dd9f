"""The sandbox: a child that sees nothing of this machine but Python, and can change nothing of it.

bubblewrap (the program `bwrap`) gives the child user, mount, pid, network, ipc and uts name spaces of its own: a
read-only file system with the system's libraries, Python and one file of ours, an empty private directory in memory as
the one writable place, no network device, no other process, no environment, no descriptors but its three pipes, no
capabilities, no new privileges, a session of its own, and another user than root. `sandbox_main`
then gives up processes, memory, file size and open files before it takes a request; time is the pool's to watch.

What it does not protect from: a hole in the kernel that an unprivileged process can reach with the system calls that
Python needs. Reading is not hidden either: /usr and Python's own directory are visible.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from lsp_jax.core.errors import InputError
from lsp_jax.reward.execution.pool import Program, Workers

DISK = 32 << 20  # bytes of the writable place
_SANDBOX_MAIN = Path(__file__).with_name("sandbox_main.py")
_SYSTEM = ("/bin", "/lib", "/lib32", "/lib64")  # links into /usr, or directories on older systems


def sandboxed(mode: str, packages: tuple[str, ...] = (), once: bool = False) -> Program:
    """The program that runs `sandbox_main.py` in `mode` with the named Python packages and nothing else installed.

    Raises:
        InputError: not Linux, no `bwrap` on PATH, or a package is missing.
    """
    bwrap = shutil.which("bwrap")
    if sys.platform != "linux" or bwrap is None:
        remedy = "is not on PATH; install the Debian package bubblewrap, on Linux"
        raise InputError("sandbox bwrap", None if bwrap is None else sys.platform, remedy)
    argv = [bwrap, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    argv += ["--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    argv += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    argv += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            argv += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            argv += ["--ro-bind", str(path), str(path)]
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    for part in ("bin", "lib"):
        directory = str(Path(sys.base_prefix) / part)
        if not directory.startswith("/usr/"):
            argv += ["--ro-bind", directory, directory]
    for name in packages:
        found = _package(name)
        for path in (found, *sorted(found.parent.glob(f"{name}*.dist-info"))):  # some read their versions
            argv += ["--ro-bind", str(path), f"/packages/{path.name}"]
    argv += ["--ro-bind", str(_SANDBOX_MAIN), "/sandbox_main.py"]
    for device in ("/dev/null", "/dev/urandom"):
        argv += ["--dev-bind", device, device]
    argv += ["--perms", "0700", "--size", str(DISK), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    argv += ["--", str(python), "-I", "-S", "-B", "-X", "utf8", "/sandbox_main.py", mode]
    return Program(tuple(argv), isolated=True, once=once)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("sandbox package", name, 'is not installed; pip install "lsp-jax[maths]"')
    return Path(spec.submodule_search_locations[0])


def check_sandbox(workers: Workers) -> None:
    """Tries every property of the sandbox once, from inside.

    Raises:
        InputError: it cannot be had here: names what is missing.
    """
    program = sandboxed("probe", once=True)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        (outcome,) = workers.run(program, [{"port": server.getsockname()[1], "file": file.name}])
    if outcome.reply is None:
        remedy = (
            f"did not start: {outcome.failure}; it needs user name spaces, which some systems and containers forbid"
        )
        raise InputError("sandbox", "bwrap", remedy)
    allowed = outcome.reply.get("allowed")
    if allowed != []:
        names = ", ".join(map(str, allowed)) if isinstance(allowed, list) else allowed
        raise InputError("sandbox", names, "should be impossible inside and is not: nothing runs there")
