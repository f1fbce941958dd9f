"""A cloud machine says at an address of its own that it will be taken away; a run that asks there saves in time.

Google's answers TRUE; Amazon's has nothing there (404) until it names the moment, and wants a token first. Where a
machine sends SIGTERM (Slurm, Kubernetes, TPU slices under an orchestrator) nothing need be asked.
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
"""Between two questions; Amazon gives two minutes, Google thirty seconds."""
TIMEOUT = 3.0

# these are addresses of the machine itself: a proxy for the outside world has nothing to say there
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Preemption:
    """While it is entered a thread asks `source` (gce, aws, or an address); at a notice it calls `noticed` once."""

    def __init__(self, source: str, noticed: Callable[[str], None], seconds: float = SECONDS):
        """`noticed` is given a name for what happened; an empty `source` asks nobody."""
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
    """Instances that ask for no token give one too."""
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _answer(urllib.request.Request(f"{_AMAZON}/api/token", method="PUT", headers=seconds))
    headers = {"X-aws-ec2-metadata-token": token} if token else {}
    # in whole: {"action": "terminate", "time": "2017-09-18T08:22:00Z"}
    return "action" in _answer(urllib.request.Request(f"{_AMAZON}/meta-data/spot/instance-action", headers=headers))


def _answer(request: urllib.request.Request) -> str:
    """The answer from there; empty where nobody answers (yet)."""
    try:
        with _open(request, timeout=TIMEOUT) as reply:
            return reply.read(4096).decode("utf-8", "replace")
    except (OSError, ValueError, http.client.HTTPException):
        return ""
