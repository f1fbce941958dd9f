"""A judge behind an endpoint that is slow, busy, wrong or gone; against a server on this machine."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from lsp_jax.core.errors import InputError, RunError
from lsp_jax.evaluate import endpoint as module
from lsp_jax.evaluate.endpoint import Endpoint, EndpointConfig, without_refused

KEY = "sk-secret-0123456789"
Reply = tuple[int, dict[str, str], bytes]


def completion(text: Any) -> Reply:
    body = {"model": "judge-2026-01", "choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps({**body, "usage": {"prompt_tokens": 7, "completion_tokens": 2}}).encode()


class Server:
    """Answers each POST by `behave(question, how many times it was asked)`."""

    def __init__(self) -> None:
        self.behave: Callable[[str, int], Reply] = lambda question, _: completion(f"re: {question}")
        self.models: Reply = 200, {}, b'{"data": [{"id": "judge"}]}'
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.paths: set[str] = set()
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def give(self, reply: Reply) -> None:
                status, headers, body = reply
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                outer.paths.add(self.path)
                outer.keys.add(self.headers.get("Authorization"))
                self.give(outer.models if self.path == "/v1/models" else (404, {}, b""))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = request["messages"][0]["content"]
                with outer.lock:
                    outer.keys.add(self.headers.get("Authorization"))
                    outer.paths.add(self.path)
                    outer.asked.append(question)
                    outer.requests.append(request)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    times = outer.asked.count(question)
                try:
                    reply = outer.behave(question, times)
                finally:  # before the reply is on its way: who has read it may ask again at once
                    with outer.lock:
                        outer.now -= 1
                with suppress(OSError):  # the asking side has gone
                    self.give(reply)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def config(self, **more: Any) -> EndpointConfig:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return EndpointConfig(url, "judge", "LSP_TEST_KEY", allow_local_http=True, **{"timeout": 20.0, **more})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LSP_TEST_KEY", KEY)
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.05)
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(server: Server, questions: list[str], **more: Any) -> tuple[dict[int, tuple[str | None, str]], Endpoint]:
    config = server.config(**more)
    config.check()
    endpoint = Endpoint(config)
    try:
        return {index: (reply, why) for index, reply, why in endpoint.ask(questions)}, endpoint
    finally:
        endpoint.close()


def test_every_question_once_and_few_at_a_time(server: Server):
    def slow(question: str, _: int) -> Reply:
        time.sleep(0.05)
        return completion(f"re: {question}")

    server.behave = slow
    questions = [f"q{n}" for n in range(20)]
    replies, endpoint = ask(server, questions, concurrency=3, max_tokens=5)
    assert {index: reply for index, (reply, _) in replies.items()} == {n: f"re: q{n}" for n in range(20)}
    assert sorted(server.asked) == sorted(questions) and 1 < server.most <= 3
    assert endpoint.counts == {"asked": 20, "tokens in": 140, "tokens out": 40}
    assert endpoint.models == {"judge-2026-01": 20} and server.keys == {f"Bearer {KEY}"}
    sent = server.requests[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["stream"]) == ("judge", 0.0, 5, False)


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        ((429, {"Retry-After": "0.01"}, b""), "status 429"),
        ((429, {"Retry-After": "Wed, 21 Oct 2065 07:28:00 GMT"}, b""), "status 429"),
        ((500, {}, b"oops"), "status 500"),
        ((200, {}, b"<html>"), "invalid reply"),
        ((200, {}, b"[" * 100_000), "invalid reply"),
        ((200, {}, b'{"choices": []}'), "invalid reply"),
        (completion(None), "invalid reply"),
        (completion([1]), "invalid reply"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again_and_counted(server: Server, first: Reply, kind: str):
    server.behave = lambda question, times: first if times == 1 else completion("fine")
    replies, endpoint = ask(server, ["q"])
    assert replies == {0: ("fine", "")} and len(server.asked) == 2
    assert endpoint.counts[kind] == 1 and endpoint.counts["retried"] == 1 and not endpoint.counts["failed"]


def test_a_reply_that_does_not_come_in_time(server: Server):
    def late(question: str, times: int) -> Reply:
        time.sleep(1.0 if times == 1 else 0.0)
        return completion("fine")

    server.behave = late
    replies, endpoint = ask(server, ["q"], timeout=0.3)
    assert replies == {0: ("fine", "")} and endpoint.counts["ReadTimeout"] == 1


def test_what_stays_wrong_fails_alone(server: Server):
    server.behave = lambda question, _: (400, {}, b"too long") if question == "bad" else completion("fine")
    replies, endpoint = ask(server, ["a", "bad", "b"])
    assert replies == {0: ("fine", ""), 1: (None, "status 400: too long"), 2: ("fine", "")}
    assert server.asked.count("bad") == 1 and endpoint.counts["failed"] == 1
    server.behave = lambda question, _: (503, {}, b"")
    replies, endpoint = ask(server, ["c"], retries=2)
    assert replies == {0: (None, "status 503")} and server.asked.count("c") == 3


def test_an_endpoint_that_is_gone_ends_it_after_a_while(server: Server):
    """What was said before is there; the rest is not tried one by one."""
    server.behave = lambda question, _: completion("fine") if question == "q0" else (500, {}, b"")
    endpoint, got = Endpoint(server.config(retries=0, concurrency=1)), []
    with pytest.raises(RunError, match=r"10 requests in a row had no reply \(status 500\)"):
        got.extend(endpoint.ask([f"q{n}" for n in range(100)]))
    endpoint.close()
    assert got[0] == (0, "fine", "") and len(got) == module.FAILURES + 1 and len(server.asked) < 15


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_it_at_once(server: Server, status: int):
    server.behave = lambda question, _: (status, {}, b"")
    with pytest.raises(InputError, match=r"LSP_TEST_KEY.*rejects its key") as caught:
        ask(server, [f"q{n}" for n in range(50)], concurrency=1)
    assert len(server.asked) <= 2 and KEY not in str(caught.value)
    server.models = status, {}, b""
    with pytest.raises(InputError, match="rejects its key"):
        Endpoint(server.config()).check()


def test_redirects_are_not_followed(server: Server):
    """The key would reach whoever the endpoint names."""
    elsewhere = Server()
    url = f"http://127.0.0.1:{elsewhere.server.server_address[1]}/v1/chat/completions"
    server.behave = lambda question, _: (307, {"Location": url}, b"")
    with pytest.raises(InputError, match=r"redirects \(307\), which is not followed"):
        ask(server, ["q"])
    assert not elsewhere.asked and not elsewhere.keys
    elsewhere.server.shutdown()
    elsewhere.server.server_close()


def test_the_look_before_any_work(server: Server):
    Endpoint(server.config()).check()
    for unknown in ((404, {}, b""), (200, {}, b"nonsense"), (200, {}, b'{"data": 3}')):
        server.models = unknown
        Endpoint(server.config()).check()
    server.models = 200, {}, b'{"data": [{"id": "other\\u001b[2J"}]}'
    with pytest.raises(InputError, match=r"judge.model = 'judge'.*it has other\\x1b"):
        Endpoint(server.config()).check()
    gone = EndpointConfig("http://127.0.0.1:9/v1", "judge", allow_local_http=True)
    with pytest.raises(InputError, match=r"judge.url.*cannot be reached \(ConnectError\)"):
        Endpoint(gone).check()
    assert not server.asked


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": ""}, "must begin with https"),
        ({"url": "ftp://judge.org/v1"}, "must begin with https"),
        ({"url": "http://judge.org/v1", "allow_local_http": True}, "must be https"),
        ({"url": "http://127.0.0.1.judge.org/v1", "allow_local_http": True}, "must be https"),
        ({"url": "http://localhost:8000/v1"}, "allow-local-http"),
        ({"url": "http://gpu-box.lan:8000/v1"}, "allow-http-hosts gpu-box.lan"),
        ({"url": "http://gpu-box.lan/v1", "allow_http_hosts": ("gpu-box",)}, "must be https"),
        ({"url": "http://gpu-box.lan.org/v1", "allow_http_hosts": ("gpu-box.lan",)}, "must be https"),
        (
            {"url": "http://gpu-box.lan/v1", "allow_http_hosts": ("http://gpu-box.lan",)},
            "without scheme, port and path",
        ),
        ({"url": "http://gpu-box.lan:1/v1", "allow_http_hosts": ("gpu-box.lan:1",)}, "without scheme, port and path"),
        ({"url": "http://8.8.8.8/v1", "allow_http_hosts": ("8.8.8.8",)}, "of your own network"),
        ({"url": "https://user:word@judge.org/v1"}, "put the key into the environment"),
        ({"url": "https://judge.org/v1?key=1"}, "put the key into the environment"),
        ({"url": "https://judge.org:port/v1"}, "is not a URL"),
        ({"model": ""}, "give the model's name"),
        ({"key_variable": "LSP_NO_SUCH_KEY"}, "contains no key"),
        ({"concurrency": 0}, "at least 1"),
        ({"retries": -1}, "at least 0"),
        ({"timeout": float("nan")}, "above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LSP_TEST_KEY", KEY)
    good = {"url": "https://judge.org/v1", "model": "judge", "key_variable": "LSP_TEST_KEY"}
    EndpointConfig(**good).check()
    with pytest.raises(InputError, match=message) as caught:
        EndpointConfig(**{**good, **fields}).check("judge.endpoint")
    assert caught.value.field.startswith("judge.endpoint.") and "word" not in str(caught.value)


def test_the_estimate_says_what_it_may_cost():
    config = EndpointConfig("https://judge.org/v1", "judge-1", max_tokens=100, input_price=2.0, output_price=10.0)
    line = Endpoint(config).estimate(["x" * 4000] * 1000)
    assert (
        line
        == "judge-1 at judge.org: 1000 questions, about 1,000,000 tokens in, at most 100,000 out, at most about $3.00"
    )


def test_a_key_is_in_no_representation(server: Server):
    endpoint = Endpoint(server.config())
    assert KEY not in repr(endpoint.__dict__) + repr(server.config()) + endpoint.identity


OPENAI = {
    "max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. "
    "Use 'max_completion_tokens' instead.",
    "temperature": "Unsupported value: 'temperature' does not support 0.0 with this model. "
    "Only the default (1) value is supported.",
}
"""What reasoning models of the OpenAI API answer."""


def refusal(name: str) -> Reply:
    error = {"message": OPENAI[name], "type": "invalid_request_error", "param": name, "code": "unsupported_parameter"}
    return 400, {}, json.dumps({"error": error}).encode()


@pytest.mark.parametrize("unknown", [["max_tokens"], ["temperature"], ["max_tokens", "temperature"]], ids=str)
def test_a_parameter_that_the_model_does_not_take_is_left_out_from_then_on(
    server: Server, unknown: list[str], capsys: pytest.CaptureFixture[str]
):
    """One refusal each, then never again; the length stays limited."""

    def behave(question: str, _: int) -> Reply:
        found = next((name for name in unknown if name in server.requests[-1]), None)
        return refusal(found) if found else completion("fine")

    server.behave = behave
    replies, endpoint = ask(server, ["a", "b", "c"], concurrency=1, max_tokens=9)
    assert [replies[n] for n in range(3)] == [("fine", "")] * 3
    assert server.asked == ["a"] * (len(unknown) + 1) + ["b", "c"]
    assert endpoint.counts["status 400"] == len(unknown) and not endpoint.counts["failed"]
    last, length = server.requests[-1], "max_completion_tokens" if "max_tokens" in unknown else "max_tokens"
    assert last[length] == 9 and ("temperature" in last) == ("temperature" not in unknown)
    assert endpoint.parameters == {name: last[name] for name in ("temperature", length) if name in last}
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and all(name in warnings[0] for name in unknown)


def test_refusals_of_several_requests_at_once(server: Server):
    def behave(question: str, _: int) -> Reply:
        return refusal("max_tokens") if "max_tokens" in server.requests[-1] else completion("fine")

    server.behave = behave
    replies, endpoint = ask(server, [f"q{n}" for n in range(12)], concurrency=4)
    assert {reply for reply, _ in replies.values()} == {"fine"} and endpoint.counts["status 400"] <= 8


def test_a_refusal_that_persists_is_shown_and_not_remembered(server: Server):
    server.behave = lambda question, _: (
        400,
        {},
        b'{"error": {"message": "max_tokens: no. max_completion_tokens: no."}}',
    )
    replies, endpoint = ask(server, ["a"])
    assert replies[0] == (None, "status 400: max_tokens: no. max_completion_tokens: no.") and len(server.asked) == 2
    assert endpoint.parameters == {"temperature": 0.0, "max_tokens": 1024}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"detail": [{"loc": ["body", "max_tokens"], "msg": "extra fields not permitted"}]}', ["temperature", "new"]),
        (b'{"detail": [{"loc": ["body"], "msg": "bad", "input": {"max_tokens": 3}}]}', ["temperature", "max_tokens"]),
        (b'{"error": {"message": "Unknown name.", "param": "temperature"}}', ["max_tokens"]),
        (b'{"error": "`temperature` is deprecated for this model."}', ["max_tokens"]),
        (b"temperature and max_tokens are not supported", ["new"]),
        (b'{"message": "max_tokens is too large: 1024; the context length is 512"}', ["temperature", "max_tokens"]),
        (b'{"error": {"message": "no such model"}}', ["temperature", "max_tokens"]),
        (b"", ["temperature", "max_tokens"]),
        (b"[" * 10_000, ["temperature", "max_tokens"]),
    ],
    ids=str,
)
def test_which_parameters_are_refused(body: bytes, kept: list[str]):
    expected = {"max_completion_tokens" if name == "new" else name for name in kept}
    assert without_refused({"temperature": 0.0, "max_tokens": 5}, body).keys() == expected


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": {"message": "The model `judge` is gone.", "code": 3}}', ": The model `judge` is gone."),
        (b'{"error": "out of\\nmemory"}', ": out of memory"),
        (b'{"detail": "Not\\u001b[31m here"}', ": Not\\x1b[31m here"),
        (b"<html>\r\n<b>Bad\x00 gateway</b>", ": <html> <b>Bad\\x00 gateway</b>"),
        (
            f"key {KEY} is wrong, also {KEY[:14]}*** and ...{KEY[-10:]}".encode(),
            ": key [key] is wrong, also [key] and ...[key]",
        ),
        (b"\xff\xfe", ": \ufffd\ufffd"),
        (b"", ""),
        (b"x" * 1_000_000, ": " + "x" * 297 + "..."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_errors_body_is_shown_in_one_safe_line(server: Server, body: bytes, shown: str):
    server.behave = lambda question, _: (404, {}, body)
    replies, _ = ask(server, ["q"])
    assert replies == {0: (None, f"status 404{shown}")}
    server.behave = lambda question, _: (503, {}, body)
    replies, _ = ask(server, ["q"], retries=0)
    assert replies == {0: (None, f"status 503{shown}")}
    server.models = 401, {}, body
    with pytest.raises(InputError) as caught:
        Endpoint(server.config()).check()
    assert f"(401{shown})" in str(caught.value) and KEY not in str(caught.value)


def test_a_url_of_chat_completions_is_taken_for_what_it_is(server: Server):
    base = server.config().url
    for url in (base, f"{base}/", f"{base}/chat/completions", f"{base}/chat/completions/"):
        config = dataclasses.replace(server.config(), url=url)
        config.check()
        endpoint = Endpoint(config)
        endpoint.check()
        assert list(endpoint.ask(["q"])) == [(0, "re: q", "")]
        assert endpoint.identity == Endpoint(server.config()).identity, "verdicts of one endpoint stay its own"
        endpoint.close()
    assert server.paths == {"/v1/models", "/v1/chat/completions"}


def test_a_judge_on_the_own_network_is_allowed_by_name(monkeypatch: pytest.MonkeyPatch):
    """Over http, without a key; and the default key, which is for another host, is not sent to it unencrypted."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("LSP_TEST_KEY", "own")
    for host in ("gpu-box.lan", "GPU-box.lan", "192.168.1.20", "[fd00::1]"):
        config = EndpointConfig(f"http://{host}:8000/v1", "judge", allow_http_hosts=("other", host))
        config.check()
        assert config.key == "" and KEY not in repr(Endpoint(config)._client.headers)
        assert dataclasses.replace(config, key_variable="LSP_TEST_KEY").key == "own"
        assert dataclasses.replace(config, url=f"https://{host}/v1").key == KEY
    monkeypatch.delenv("OPENAI_API_KEY")
    EndpointConfig("https://gpu-box.lan/v1", "judge", allow_http_hosts=("gpu-box.lan",)).check()


def test_a_key_that_is_wanted_and_not_sent(server: Server):
    server.models = 401, {}, b""
    config = dataclasses.replace(server.config(), key_variable="LSP_NO_SUCH_KEY")
    with pytest.raises(InputError, match="wants a key, and none is sent"):
        Endpoint(config).check()
