"""Polling of a cloud machine's metadata server for preemption notices, so that a run saves in time.

Google's server answers TRUE; Amazon's requires a token and answers 404 until there is a notice. Machines that send
SIGTERM (Slurm, Kubernetes, TPU slices under an orchestrator) need no polling.
"""

from __future__ import annotations

import http.client
import threading
import urllib.request
from collections.abc import Callable
from types import TracebackType

_AMAZON = "http://169.254.169.254/latest"
GOOGLE = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"
SECONDS = 5.0
"""Polling interval; Amazon gives two minutes' notice, Google thirty seconds'."""
TIMEOUT = 3.0

# metadata servers are reached directly, never through a proxy
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Preemption:
    """Context in which a thread polls `source` (gce, aws, or an address) and calls `noticed` once at a notice."""

    def __init__(self, source: str, noticed: Callable[[str], None], seconds: float = SECONDS):
        """`noticed` gets a description of the notice; an empty `source` disables polling."""
        self._source, self._noticed, self._seconds = source, noticed, seconds
        self._over = threading.Event()

    def __enter__(self) -> Preemption:
        if self._source:
            threading.Thread(target=self._watch, name="lsp-jax-preemption", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()

    def _watch(self) -> None:
        ask = {"gce": _google, "aws": _amazon}.get(self._source, lambda: _says_so(self._source))
        while not self._over.is_set():
            if ask():
                self._noticed("a preemption notice")
                return
            self._over.wait(self._seconds)


def _google() -> bool:
    return _says_so(GOOGLE, {"Metadata-Flavor": "Google"})


def _says_so(address: str, headers: dict[str, str] | None = None) -> bool:
    return _answer(urllib.request.Request(address, headers=headers or {})).strip().upper() == "TRUE"


def _amazon() -> bool:
    """Whether Amazon has scheduled an interruption. Instances that require no token issue one too."""
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _answer(urllib.request.Request(f"{_AMAZON}/api/token", method="PUT", headers=seconds))
    headers = {"X-aws-ec2-metadata-token": token} if token else {}
    # complete reply: {"action": "terminate", "time": "2017-09-18T08:22:00Z"}
    return "action" in _answer(urllib.request.Request(f"{_AMAZON}/meta-data/spot/instance-action", headers=headers))


def _answer(request: urllib.request.Request) -> str:
    """Returns the body of the reply; empty without one."""
    try:
        with _open(request, timeout=TIMEOUT) as reply:
            return reply.read(4096).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException):
        return ""
