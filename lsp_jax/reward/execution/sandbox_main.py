"""The program inside the sandbox: `python -I -S sandbox_main.py code|maths|probe`. Standard library only.

Before it accepts a request it irrevocably limits processes and threads, memory, file size, open files and core dumps,
and denies risky system calls. It then speaks the JSON lines protocol of `lsp_jax.reward.execution.pool` on its original
standard output; output of programs is discarded.

Never run this outside the sandbox: `code` executes model-written programs.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

MEMORY = 1 << 30  # bytes of address space
FILE = 16 << 20  # bytes of one file
OPEN_FILES = 64
COMPARISON = 5.0  # seconds of a comparison of two maths results, which else are not equal

# System calls that a single process does not need: new processes and threads, namespaces and mounts, tracing, key
# rings, BPF and io_uring. Numbers from asm/unistd.h of each architecture.
_DENIED = {
    # clone fork vfork clone3 unshare setns mount umount2 pivot_root ptrace process_vm_readv process_vm_writev
    # bpf perf_event_open userfaultfd io_uring_setup add_key request_key keyctl kexec_load init_module
    "x86_64": (56, 57, 58, 435, 272, 308, 165, 166, 155, 101, 310, 311, 321, 298, 323, 425, 248, 249, 250, 246, 175),
    # the same, without fork and vfork, which this architecture lacks
    "aarch64": (220, 435, 97, 268, 40, 39, 41, 117, 270, 271, 280, 241, 282, 425, 217, 218, 219, 104, 105),
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, JMP|JGE|K, RET|K
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # linux/seccomp.h: ALLOW, ERRNO with EPERM, KILL_PROCESS
_X32 = 0x40000000  # calls of x86_64's second table
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h


def system_call_filter(machine: str) -> bytes:
    """Returns a classic BPF program: EPERM for calls in `_DENIED`, kill for calls of another architecture.

    Raises:
        OSError: no table for this architecture.
    """
    if machine not in _DENIED:
        raise OSError(f"no system call filter for {machine}")
    denied = _DENIED[machine]
    rules = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_AT_LEAST, len(denied) + 1, 0, _X32),
        *((_EQUAL, len(denied) - place, 0, number) for place, number in enumerate(denied)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]


def confine() -> None:
    """Sets limits that hold until the process exits. Raises OSError if one cannot be set."""
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    rules = system_call_filter(platform.machine())
    program = _Filter(len(rules) // 8, rules)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the system call filter")


def limit_cpu(seconds: float, for_good: bool) -> None:
    """Limits CPU time from now on; the kernel kills a process that exceeds it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, most if for_good else resource.RLIM_INFINITY))


def run_program(program: str, tests: list[str]) -> bool:
    """Executes the program, then the tests with the names it defined; returns whether nothing raised.

    The tests see Python's original builtins, even if the program modified them.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module  # dataclasses look up their module here
    standard = builtins.__dict__
    clean = dict(standard)
    try:
        exec(compile(program, "<program>", "exec"), vars(module))  # noqa: S102 - confined by the sandbox
        standard.clear()
        standard.update(clean)
        sys.settrace(None)
        sys.setprofile(None)
        names = {key: value for key, value in vars(module).items() if key not in clean and key != "__builtins__"}
        for test in tests:
            exec(compile(test, "<test>", "exec"), names)  # noqa: S102
    except BaseException:  # including SystemExit and exceptions of the program's own
        return False
    return True


def serve_code(source: Any, protocol: int) -> None:
    """Runs one program, replies with the request's nonce if it passed, and exits, whatever is still running."""
    write, leave, dumps = os.write, os._exit, json.dumps
    request = json.loads(source.readline())
    source.close()
    limit_cpu(request["seconds"], for_good=True)
    sys.path.append("/packages")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy may start no thread
    nonce, number = request.pop("nonce"), request["number"]
    passed = run_program(request["program"], request["tests"])
    write(protocol, dumps({"number": number, "nonce": nonce if passed else ""}).encode() + b"\n")
    leave(0)


class _LateError(BaseException):
    """A comparison exceeded its own time limit. No Exception: sympy catches many."""


def _late(*_: object) -> None:
    raise _LateError


def serve_maths(source: Any, protocol: int) -> None:
    """Compares pairs of a data row's answer and a model's; without the latter only tells whether the former is read."""
    from lsp_jax.reward.answers.reading import equal, read_gold

    signal.signal(signal.SIGALRM, _late)
    for line in source:
        request, result = json.loads(line), False
        limit_cpu(request["seconds"], for_good=False)
        gold = read_gold(request["gold"])
        if gold is not None and "answer" in request:
            try:
                signal.setitimer(signal.ITIMER_REAL, COMPARISON)
                result = equal(gold, request["answer"])
            except (_LateError, Exception):  # what cannot be compared is not equal
                result = False
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        reply = {"number": request["number"], "gold": gold is not None, "equal": result}
        os.write(protocol, json.dumps(reply).encode() + b"\n")


def serve_probe(source: Any, protocol: int) -> None:
    """Probes the sandbox; replies with the names of actions that should be impossible but are not."""
    request = json.loads(source.readline())
    probes = {
        "network": lambda: _network(request["port"]),
        "the run's files": lambda: _exists(request["file"]),
        **PROBES,
    }
    allowed = [name for name, attempt in probes.items() if _possible(attempt)]
    os.write(protocol, json.dumps({"number": request["number"], "allowed": allowed}).encode() + b"\n")


def _possible(attempt: Any) -> bool:
    try:
        return bool(attempt())
    except (OSError, MemoryError):
        return False


def _network(port: int) -> bool:
    """Whether a server on this host can be reached."""
    import socket

    with socket.create_connection(("127.0.0.1", port), 5):
        return True


def _fork() -> bool:
    if os.fork() == 0:
        os._exit(0)
    return True


def _writable(path: str) -> bool:
    with open(path, "w") as file:  # noqa: PTH123
        return file.write("x") > 0


def _exists(path: str) -> bool:
    return os.stat(path) is not None  # noqa: PTH116 - importing pathlib takes a third of the start-up time


def _fill() -> bool:
    """Whether the writable directory accepts 1 GiB."""
    for number in range(64):
        with open(f"fill{number}", "wb") as file:  # noqa: PTH123
            file.write(bytes(FILE))
    return True


PROBES: dict[str, Callable[[], object]] = {
    "processes": _fork,
    "memory": lambda: bytearray(MEMORY),
    "writing outside": lambda: any(_possible(lambda p=p: _writable(p)) for p in ("/x", "/dev/x", "/usr/x", sys.prefix)),
    "a large file": lambda: _writable("large") and os.truncate("large", FILE + 1) is None,
    "a full disk": _fill,
    "root's rights": lambda: os.getuid() == 0 or os.setuid(0) is None,
    "capabilities": lambda: os.chroot("/") is None,
    "the environment": lambda: set(os.environ) - {"PWD", "LC_CTYPE"},
    "other processes": lambda: os.getpid() > 10 or _exists("/proc/1"),
    "the terminal's session": lambda: _exists("/dev/tty"),
}


def main() -> None:
    source = os.fdopen(os.dup(0), "rb")
    protocol = os.dup(1)
    serve = {"code": serve_code, "maths": serve_maths, "probe": serve_probe}[sys.argv[1]]
    if serve is serve_maths:  # before the limits, so that a missing package gives a clear error
        sys.path.append("/packages")
        import sympy  # noqa: F401

        import lsp_jax.reward.answers.reading  # noqa: F401
    confine()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.write(protocol, b'{"ready": true}\n')
    serve(source, protocol)


if __name__ == "__main__":
    main()
