"""The sandbox: a child process that can see little more of the host than Python, and can modify nothing.

bubblewrap (the program `bwrap`) gives the child its own user, mount, pid, network, ipc and uts namespaces: a read-only
file system with system libraries, Python, the packages that it is given and one file of ours, a private writable
directory in memory, no network device, no other processes, no environment, no descriptors except three pipes, no
capabilities, no new privileges, its own session, and a non-root user. `sandbox_main` then limits processes, memory,
file size and open files before it accepts a request; the pool enforces time limits.

It does not protect against kernel vulnerabilities reachable through the system calls that Python needs. /usr and
Python's own directory are readable.
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

DISK = 32 << 20  # bytes of the writable directory
_SANDBOX_MAIN = Path(__file__).with_name("sandbox_main.py")
_SYSTEM = ("/bin", "/lib", "/lib32", "/lib64")  # links into /usr, or directories on older systems


def sandboxed(mode: str, packages: tuple[str, ...] = (), once: bool = False) -> Program:
    """Returns the program that runs `sandbox_main.py` in `mode` with only the named Python packages.

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
        package = _package(name)
        argv += ["--ro-bind", str(package), f"/packages/{name.replace('.', '/')}"]
        # some read their own version, and some have shared libraries beside them
        beside = [*package.parent.glob(f"{name}*.dist-info"), *package.parent.glob(f"{name}.libs")]
        for path in sorted(beside):
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
    """Probes every property of the sandbox from inside.

    Raises:
        InputError: the sandbox does not start, or does not confine; names what is missing.
    """
    program = sandboxed("probe", once=True)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        (outcome,) = workers.run(program, [{"port": server.getsockname()[1], "file": file.name}])
    if outcome.reply is None:
        remedy = f"did not start: {outcome.failure}; it needs user namespaces, which some systems and containers forbid"
        raise InputError("sandbox", "bwrap", remedy)
    allowed = outcome.reply.get("allowed")
    if allowed != []:
        names = ", ".join(map(str, allowed)) if isinstance(allowed, list) else allowed
        raise InputError(
            "sandbox", names, "should be impossible in the sandbox but is not; refusing to run programs in it"
        )
