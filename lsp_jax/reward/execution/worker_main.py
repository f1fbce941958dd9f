"""The worker process of a reward function: `python -m lsp_jax.reward.execution.worker_main package.module:function`.

Its standard output is the protocol of `lsp_jax.reward.execution.pool`; what the function prints goes to its standard
error. It imports no JAX. It ends when its input does, whatever the function is doing, and with its parent.
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

from lsp_jax.core.errors import InputError
from lsp_jax.reward.execution.user_functions import call_reward, load_callable, one_line, takes_rows

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    """The kernel ends this process with its parent, also one that is stuck in a C loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _requests() -> queue.SimpleQueue[bytes]:
    """Lines of standard input, read by a thread that ends the process after the last."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    source = os.fdopen(os.dup(0), "rb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # a function that reads its input finds none

    def read() -> None:
        for line in source:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def answer(function: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: `values`, or `refused` (a wrong shape or type), or `raised`."""
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

    def say(message: dict[str, Any]) -> None:
        protocol.write(json.dumps(message) + "\n")
        protocol.flush()

    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1)  # where it is, for whoever waits for it
    try:
        function = load_callable(sys.argv[1])
    except InputError as error:
        say({"refused": error.remedy})
        os._exit(1)
    say({"ready": True, "rows": takes_rows(function), "stacks": hasattr(signal, "SIGUSR1")})
    while True:
        request = json.loads(requests.get())
        say({**answer(function, request), "number": request["number"]})


if __name__ == "__main__":
    main()
