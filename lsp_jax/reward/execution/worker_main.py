"""The worker process of a reward function: `python -m lsp_jax.reward.execution.worker_main package.module:function`.

Standard output carries the protocol of `lsp_jax.reward.execution.pool`; prints of the function go to standard error.
Imports no JAX. The process exits with its parent, and when its input ends, even during a call.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
from typing import Any

from lsp_jax.core.errors import InputError, one_line
from lsp_jax.reward.execution.user_functions import call_reward, load_callable, takes_rows

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    """Asks the kernel to kill this process with its parent, even if it is stuck in a C loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _requests() -> queue.SimpleQueue[bytes]:
    """Returns a queue of the lines of standard input, filled by a thread that exits the process at end of file."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    source = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a function that reads standard input gets end of file

    def read() -> None:
        for line in source:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def answer(function: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Returns the reply to one request: `values`, `refused` (wrong shape or type) or `raised`."""
    try:
        values = call_reward(function, sys.argv[1], request["queries"], request["answers"], request["rows"])
    except InputError as error:
        return {"refused": error.remedy}
    except (Exception, SystemExit) as error:  # user code may raise anything
        return {"raised": one_line(error)}
    return {"values": values.tolist()}


def main() -> None:
    _die_with_parent()
    requests = _requests()
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        protocol.write(json.dumps(message) + "\n")
        protocol.flush()

    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # prints the stack on request of the pool
    try:
        function = load_callable(sys.argv[1])
    except InputError as error:
        send({"refused": error.remedy})
        os._exit(1)
    send({"ready": True, "rows": takes_rows(function), "stacks": hasattr(signal, "SIGUSR1")})
    while True:
        request = json.loads(requests.get())
        send({**answer(function, request), "number": request["number"]})


if __name__ == "__main__":
    main()
