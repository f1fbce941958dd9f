"""Client of an OpenAI-compatible endpoint: many requests with limited concurrency and retries.

The key is read from the environment and sent in one header; redirects are not followed, so it reaches no other host.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import httpx2 as httpx

from lsp_jax.core.console import printable, warn
from lsp_jax.core.errors import InputError, RunError
from lsp_jax.evaluate.endpoint_config import EndpointConfig
from lsp_jax.evaluate.result_cache import digest

BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes after which a request is retried."""
LONGEST_WAIT = 60.0
"""Maximum seconds between two attempts, even if the endpoint asks for more."""
LARGEST_REPLY = 4 << 20
"""Maximum bytes of a reply."""
LARGEST_REASON = 64 << 10
"""Maximum bytes of a reply without success that are read."""
LONGEST_REASON = 300
"""Maximum characters that are shown of it."""
FAILURES = 10
"""Consecutive failed requests after which the evaluation stops."""

_TOO_LONG = re.compile(r"too (?:large|long|many)|context.length|maximum context|exceed|reduce", re.IGNORECASE)


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
        self.identity: str = digest(config.base, config.model, config.max_tokens)
        self.counts: Counter[str] = Counter()
        """Counts of requests: `asked`, `tokens in`, `tokens out`, and each kind of failure."""
        self.models: Counter[str] = Counter()
        """Counts of the model names in replies."""
        self.parameters: dict[str, Any] = {"temperature": 0.0, "max_tokens": config.max_tokens}
        """Parameters of a request, without those that the endpoint has refused."""
        self._stop, self._lock = threading.Event(), threading.Lock()
        headers = {"Authorization": f"Bearer {config.key}"} if config.key else {}
        direct = config.is_local or config.is_named  # not through a proxy set in the environment
        self._client = httpx.Client(
            headers=headers, timeout=config.timeout, follow_redirects=False, trust_env=not direct
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
            status, _, body = self._send("GET", "models")
        except httpx.HTTPError as error:
            remedy = f"cannot be reached ({type(error).__name__}); check the URL and the network"
            raise InputError(f"{self._field}.url", self.config.url, remedy) from None
        try:
            names = [model["id"] for model in json.loads(body)["data"]] if status == 200 else []
        except (ValueError, TypeError, KeyError, RecursionError):
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
        with self._lock:
            parameters = dict(self.parameters)
        message = {"model": self.config.model, "messages": [{"role": "user", "content": question}], "stream": False}
        while True:
            self._count("asked")
            try:
                status, headers, body = self._send("POST", "chat/completions", {**message, **parameters})
            except httpx.HTTPError as error:
                self._count(kind := type(error).__name__)
                raise _NoReply(kind, 0.0) from None
            if status == 200:
                self._remember(parameters)
                return self._read(body)
            self._count(f"status {status}")
            accepted = without_refused(parameters, body) if status in (400, 422) else parameters
            if accepted == parameters:
                wait = _seconds(headers.get("retry-after", "")) if status in BUSY else None
                raise _NoReply(f"status {status}{self._reason(body)}", wait)
            parameters = accepted

    def _remember(self, parameters: dict[str, Any]) -> None:
        """Keeps the parameters that the endpoint accepts for the requests to come."""
        with self._lock:
            changed = [name for name in self.parameters if name not in parameters]
            if changed:
                self.parameters = parameters
        if changed:
            sent = ", ".join(f"{name}={value}" for name, value in parameters.items()) or "no parameters"
            warn(f"judge {self.name} refuses {' and '.join(changed)}: asked with {sent}")

    def _send(self, method: str, path: str, request: dict[str, Any] | None = None) -> tuple[int, Any, bytes]:
        """Returns status, headers and a bounded number of bytes, within the time limit of one reply.

        Raises InputError for failures that a retry cannot resolve.
        """
        end, body = time.monotonic() + self.config.timeout, bytearray()
        with self._client.stream(method, f"{self.config.base}/{path}", json=request) as reply:
            for part in reply.iter_bytes():
                body += part
                if reply.status_code != 200 and len(body) > LARGEST_REASON:
                    break
                if len(body) > LARGEST_REPLY or time.monotonic() > end:
                    raise httpx.ReadTimeout("the reply is too long or too slow")
            self._refuse(reply.status_code, bytes(body))
            return reply.status_code, reply.headers, bytes(body)

    def _reason(self, body: bytes) -> str:
        """Returns the message in the body of an error, as ": " and one safe line without the key; "" if it is empty."""
        text, key = _message(body), self.config.key
        if key:  # also a part of it, which is all that some endpoints show
            half = max(len(key) // 2, 4)
            text = re.sub(rf"{re.escape(key[:half])}\S*|{re.escape(key[-half:])}", "[key]", text)
        text = printable(" ".join(text.split()), LONGEST_REASON)
        return f": {text}" if text else ""

    def _read(self, body: bytes) -> str:
        try:
            reply = json.loads(body)
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

    def _refuse(self, status: int, body: bytes) -> None:
        """Raises InputError for failures that a retry cannot resolve."""
        config, reason = self.config, self._reason(body)
        if status in (401, 403):
            remedy = f"the endpoint rejects its key ({status}{reason})"
            if not config.key:
                remedy = f"the endpoint wants a key, and none is sent ({status}{reason}); set the variable"
                remedy += " or name another one, which must not be the default for an endpoint with http://"
            raise InputError(f"{self._field}.key_variable", config.key_variable, remedy)
        if 300 <= status < 400:
            remedy = f"redirects ({status}), which is not followed: give the target URL"
            raise InputError(f"{self._field}.url", config.url, remedy)

    def _count(self, kind: str) -> None:
        with self._lock:
            self.counts[kind] += 1


def _seconds(retry_after: str) -> float:
    """Parses the seconds of a Retry-After header; 0 if it is a date or missing."""
    try:
        return min(max(float(retry_after), 0.0), LONGEST_WAIT)
    except ValueError:
        return 0.0


def without_refused(parameters: dict[str, Any], body: bytes) -> dict[str, Any]:
    """Returns the parameters of a request without those that the body of an error names, for models that take no
    `temperature`, or `max_completion_tokens` in place of `max_tokens`."""
    text = _message(body)
    if _TOO_LONG.search(text):
        return parameters
    refused = [name for name in parameters if re.search(rf"\b{name}\b", text)]
    kept = {name: value for name, value in parameters.items() if name not in refused}
    if "max_tokens" in refused:
        kept["max_completion_tokens"] = parameters["max_tokens"]
    return kept if "max_completion_tokens" not in refused else parameters


def _message(body: bytes) -> str:
    """Returns the text in the body of an error: that of a JSON object in one of the usual forms, else all."""
    text = body[:LARGEST_REASON].decode("utf-8", "replace")
    try:
        return _text_of(json.loads(text)) or text
    except (ValueError, RecursionError):
        return text


def _text_of(reply: Any) -> str:
    """Returns error.message with error.param, error, message or detail, the last also as a list of `loc` and `msg`."""
    if isinstance(reply, list):
        return "; ".join(_text_of(part) for part in reply)
    if not isinstance(reply, dict):
        return reply if isinstance(reply, str) else ""
    if "msg" in reply:
        return f"{reply.get('loc', '')}: {reply['msg']}"
    found = next((_text_of(reply[name]) for name in ("error", "message", "detail") if reply.get(name)), "")
    param = reply.get("param")
    return f"{found} ({param})" if found and isinstance(param, str) and param not in found else found
