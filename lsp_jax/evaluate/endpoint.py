"""Client of an OpenAI-compatible endpoint: many requests with limited concurrency and retries.

The key is read from the environment and sent in one header; redirects are not followed, so it reaches no other host.
"""

from __future__ import annotations

import ipaddress
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from lsp_jax.core.console import printable
from lsp_jax.core.errors import InputError, RunError
from lsp_jax.evaluate.result_cache import digest

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes after which a request is retried."""
LONGEST_WAIT = 60.0
"""Maximum seconds between two attempts, even if the endpoint asks for more."""
LARGEST_REPLY = 4 << 20
"""Maximum bytes of a reply."""
FAILURES = 10
"""Consecutive failed requests after which the evaluation stops."""


@dataclass(frozen=True)
class EndpointConfig:
    """A model at an OpenAI-compatible endpoint."""

    url: str = ""
    """Base URL of the endpoint, such as https://api.openai.com/v1."""
    model: str = ""
    """Name of the model at the endpoint; use a dated or versioned name, because results refer to it."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the API key; not needed for a local endpoint."""
    allow_local_http: bool = False
    """Allow http:// for an endpoint on the local host (localhost, 127.0.0.0/8, ::1)."""
    concurrency: int = 8
    """Maximum number of parallel requests."""
    retries: int = 6
    """Retries when the endpoint is busy, cannot be reached or sends an invalid reply."""
    timeout: float = 120.0
    """Time limit of one reply, in seconds."""
    max_tokens: int = 1024
    """Maximum reply length in tokens."""
    input_price: float = 0.0
    """US dollars per million prompt tokens, for the cost estimate; 0: unknown."""
    output_price: float = 0.0
    """US dollars per million reply tokens; 0: unknown."""

    @property
    def is_local(self) -> bool:
        """Whether the endpoint is on the local host."""
        name = httpx.URL(self.url).host
        try:
            return name == "localhost" or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    @property
    def key(self) -> str:
        """The API key, "" if there is none."""
        return os.environ.get(self.key_variable, "").strip()

    def check(self, field: str = "judge") -> None:
        """Raises InputError naming `field`.<name>; sends no requests."""
        try:
            url = httpx.URL(self.url)
            scheme, place, user = url.scheme, url.host, url.userinfo
        except httpx.InvalidURL as error:
            raise InputError(f"{field}.url", self.url, f"is not a URL ({error})") from error
        if user or url.query or url.fragment:
            remedy = f"must be a base such as https://HOST/v1; put the key into the environment ({self.key_variable})"
            raise InputError(f"{field}.url", f"{scheme}://{place}...", remedy)
        if not place or scheme not in ("https", "http"):
            raise InputError(f"{field}.url", self.url, "must begin with https:// and name a host")
        if scheme == "http" and not (self.is_local and self.allow_local_http):
            remedy = f"must be https://; http:// only on the local host, with --{field}.allow-local-http"
            raise InputError(f"{field}.url", self.url, remedy)
        if not self.model:
            raise InputError(f"{field}.model", self.model, "give the model's name at the endpoint")
        if not self.key and not self.is_local:
            remedy = "contains no key: set this environment variable, or name another with "
            raise InputError(f"{field}.key_variable", self.key_variable, remedy + f"--{field}.key-variable")
        for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{field}.{name}", getattr(self, name), f"must be at least {least}")
        for name in ("input_price", "output_price"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{field}.{name}", getattr(self, name), "must be >= 0 and finite")
        if not 0 < self.timeout < float("inf"):
            raise InputError(f"{field}.timeout", self.timeout, "must be a number of seconds above 0")


class _NoReply(Exception):
    """Reason why a request has no reply; `wait` seconds until a retry, None for no retry."""

    def __init__(self, why: str, wait: float | None):
        super().__init__(why)
        self.wait = wait


class Endpoint:
    """Client for single-message requests; use it from one thread only."""

    def __init__(self, config: EndpointConfig, field: str = "judge"):
        """`config` has passed `check`."""
        self.config: EndpointConfig = config
        self._field = field
        self.name: str = f"{config.model} at {httpx.URL(config.url).host}"
        self.identity: str = digest(config.url.rstrip("/"), config.model, config.max_tokens)
        self.counts: Counter[str] = Counter()
        """Counts of requests: `asked`, `tokens in`, `tokens out`, and each kind of failure."""
        self.models: Counter[str] = Counter()
        """Counts of the model names in replies."""
        self._stop, self._lock = threading.Event(), threading.Lock()
        headers = {"Authorization": f"Bearer {config.key}"} if config.key else {}
        # local endpoints must not go through a proxy set in the environment
        self._client = httpx.Client(
            headers=headers, timeout=config.timeout, follow_redirects=False, trust_env=not config.is_local
        )

    def close(self) -> None:
        """Cancels pending requests and closes the client."""
        self._stop.set()
        self._client.close()

    def check(self) -> None:
        """Requests the list of models, so that a wrong URL, key or model name is found before any long work.

        Raises InputError; an endpoint without such a list passes.
        """
        try:
            reply = self._client.get(f"{self.config.url.rstrip('/')}/models")
        except httpx.HTTPError as error:
            remedy = f"cannot be reached ({type(error).__name__}); check the URL and the network"
            raise InputError(f"{self._field}.url", self.config.url, remedy) from None
        self._refuse(reply)
        try:
            names = [model["id"] for model in reply.json()["data"]] if reply.status_code == 200 else []
        except (ValueError, TypeError, KeyError):
            names = []
        if names and self.config.model not in names:
            listed = printable(", ".join(map(str, names[:10])))
            raise InputError(
                f"{self._field}.model", self.config.model, f"the endpoint has no such model; it has {listed}"
            )

    def estimate(self, questions: Sequence[str]) -> str:
        """Returns a one-line cost estimate, with four characters per token and replies of maximum length."""
        taken, given = sum(map(len, questions)) // 4, len(questions) * self.config.max_tokens
        line = f"{self.name}: {len(questions)} questions, about {taken:,} tokens in, at most {given:,} out"
        prices = self.config.input_price, self.config.output_price
        if any(prices):
            dollars = (taken * prices[0] + given * prices[1]) / 1e6
            line += f", at most about ${dollars:,.2f}"
        return line

    def ask(self, questions: Sequence[str]) -> Iterator[tuple[int, str | None, str]]:
        """Yields (index, reply or None, reason of failure) once per question, in order of completion.

        Raises InputError if the endpoint rejects the key or the model, RunError after `FAILURES` consecutive failures;
        earlier replies have been yielded by then.
        """
        waiting, in_a_row = iter(enumerate(questions)), 0
        pool = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="endpoint")
        try:
            busy: dict[Future[str], int] = {}
            while True:
                while len(busy) < self.config.concurrency and (following := next(waiting, None)) is not None:
                    index, text = following
                    busy[pool.submit(self._reply, text)] = index
                if not busy:
                    return
                for future in wait(busy, return_when=FIRST_COMPLETED).done:
                    index = busy.pop(future)
                    try:
                        reply, why, in_a_row = future.result(), "", 0
                    except _NoReply as error:
                        reply, why, in_a_row = None, str(error), in_a_row + 1
                        self._count("failed")
                    yield index, reply, why
                    if in_a_row >= FAILURES:
                        remedy = f"{in_a_row} requests in a row had no reply ({why}); verdicts are cached: retry later"
                        raise RunError(f"judge {self.name}: {remedy}")
        finally:
            self._stop.set()  # interrupts waits for retries
            pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()

    def _reply(self, question: str) -> str:
        for number in range(self.config.retries + 1):
            try:
                return self._once(question)
            except _NoReply as error:
                if error.wait is None or number == self.config.retries:
                    raise
                # with jitter, so that requests do not all return at once
                pause = max(error.wait, min(2.0**number, LONGEST_WAIT) * random.uniform(0.5, 1.0))
                self._count("retried")
                if self._stop.wait(min(pause, LONGEST_WAIT)):
                    raise
        raise AssertionError("unreachable")

    def _once(self, question: str) -> str:
        self._count("asked")
        request = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": self.config.max_tokens,
            "stream": False,
        }
        try:
            status, headers, body = self._post(request)
        except httpx.HTTPError as error:
            self._count(kind := type(error).__name__)
            raise _NoReply(kind, 0.0) from None
        if status in BUSY:
            self._count(f"status {status}")
            raise _NoReply(f"status {status}", _seconds(headers.get("retry-after", "")))
        if status != 200:
            self._count(f"status {status}")
            raise _NoReply(f"status {status}", None)
        return self._read(body)

    def _post(self, request: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Returns status, headers and at most `LARGEST_REPLY` bytes, within the time limit of one reply."""
        end, body = time.monotonic() + self.config.timeout, bytearray()
        with self._client.stream("POST", f"{self.config.url.rstrip('/')}/chat/completions", json=request) as reply:
            self._refuse(reply)
            for part in reply.iter_bytes():
                body += part
                if len(body) > LARGEST_REPLY or time.monotonic() > end:
                    raise httpx.ReadTimeout("the reply is too long or too slow")
            return reply.status_code, reply.headers, bytes(body)

    def _read(self, body: bytes) -> str:
        try:
            reply = httpx.Response(200, content=body).json()
            text, usage, model = reply["choices"][0]["message"]["content"], reply.get("usage"), reply.get("model", "")
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            text = usage = model = None
        if not isinstance(text, str):
            self._count("invalid reply")
            raise _NoReply("the reply is not a chat completion", 0.0)
        with self._lock:
            self.models[printable(str(model))] += 1
            for name, field in (("tokens in", "prompt_tokens"), ("tokens out", "completion_tokens")):
                value = usage.get(field) if isinstance(usage, dict) else None
                self.counts[name] += value if isinstance(value, int) else 0
        return text

    def _refuse(self, reply: httpx.Response) -> None:
        """Raises InputError for failures that a retry cannot resolve."""
        config, status = self.config, reply.status_code
        if status in (401, 403):
            raise InputError(
                f"{self._field}.key_variable", config.key_variable, f"the endpoint rejects its key ({status})"
            )
        if 300 <= status < 400:
            raise InputError(
                f"{self._field}.url", config.url, f"redirects ({status}), which is not followed: give the target URL"
            )

    def _count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1


def _seconds(retry_after: str) -> float:
    """Parses the seconds of a Retry-After header; 0 if it is a date or missing."""
    try:
        return min(max(float(retry_after), 0.0), LONGEST_WAIT)
    except ValueError:
        return 0.0
