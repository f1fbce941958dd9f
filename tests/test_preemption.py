"""A machine that says it will be taken away: the run notices, saves, and goes on exactly."""

from __future__ import annotations

import http.client
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import lsp_jax as lsp
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError, Stopped
from lsp_jax.monitor import preemption
from lsp_jax.monitor.preemption import Preemption
from test_resume import assert_same_run, config_of, train
from test_trainer import host_reward, same_bits

QUICK_COMPILES = True  # the resumed run is compared bit by bit with the whole one


class Machine:
    """A metadata server: what it answers, and what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        machine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                machine.asked.append((self.command, self.path, dict(self.headers)))
                said = machine.answers.get(self.path)
                self.send_response(404 if said is None else 200)
                self.end_headers()
                self.wfile.write((said or "").encode())

            do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Its answers for all sources; a proxy that is not there stands in the environment."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    made = Machine()
    monkeypatch.setattr(preemption, "GOOGLE", f"{made.address}/google")
    monkeypatch.setattr(preemption, "_AMAZON", f"{made.address}/latest")
    yield made
    made.server.shutdown()
    made.server.server_close()


def noticed(source: str, seconds: float = 5.0) -> bool:
    """Whether a notice comes within that time."""
    told = threading.Event()
    with Preemption(source, lambda _: told.set(), seconds=0.01):
        return told.wait(seconds)


def test_googles_machines(machine: Machine):
    machine.answers["/google"] = "FALSE"
    assert not noticed("gce", 0.3)
    machine.answers["/google"] = "TRUE"
    assert noticed("gce")
    assert machine.asked[0][2]["Metadata-Flavor"] == "Google"


@pytest.mark.parametrize("token", ["", "secret"])
def test_amazons_machines(token: str, machine: Machine):
    """Nothing is there until the moment is named; the token goes along where there is one."""
    if token:
        machine.answers["/latest/api/token"] = token
    assert not noticed("aws", 0.3)
    notice = '{"action": "terminate", "time": "2026-11-26T08:22:00Z"}'
    machine.answers["/latest/meta-data/spot/instance-action"] = notice
    assert noticed("aws")
    headers = [headers for command, _, headers in machine.asked if command == "GET"][-1]
    assert headers.get("X-aws-ec2-metadata-token".title(), headers.get("X-aws-ec2-metadata-token", "")) == token


def test_an_address_of_ones_own_and_one_where_nobody_answers(machine: Machine):
    machine.answers["/mine"] = "true\n"
    assert noticed(f"{machine.address}/mine")
    assert not noticed("http://127.0.0.1:9/mine", 0.3)


def test_an_answer_that_is_no_http_is_got_over(monkeypatch: pytest.MonkeyPatch):
    """A server that is just starting may say anything; the next answer counts."""
    answers = iter([http.client.BadStatusLine("x"), http.client.IncompleteRead(b""), ValueError(), OSError()])

    def ask(*_: Any, **__: Any) -> Any:
        error = next(answers, None)
        if error is not None:
            raise error
        return io.BytesIO(b"TRUE")

    monkeypatch.setattr(preemption, "_open", ask)
    assert noticed("http://127.0.0.1/mine")


def test_nobody_is_asked_without_a_source(machine: Machine):
    assert not noticed("", 0.1)


@pytest.mark.parametrize("source", ["azure", "file:///etc/passwd", "GCE", "http://", "http://host:80x/"])
def test_sources_that_cannot_be_used(source: str):
    with pytest.raises(InputError, match="preemption_notice"):
        TrainConfig(model="m", preemption_notice=source).check()


@pytest.mark.full
def test_the_run_saves_and_goes_on_exactly(
    machine: Machine, game_model: Path, whole_run: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Preemption.__init__, "__defaults__", (0.01,))
    config = config_of(game_model, tmp_path / "run", save_steps=100, preemption_notice="gce")

    def notice(event: lsp.run.trainer.IterationEvent) -> None:
        if event.iteration == 1:
            machine.answers["/google"] = "TRUE"
            while any(thread.name == "lsp-jax-preemption" for thread in threading.enumerate()):
                time.sleep(0.01)  # it ends once it has told the run

    with pytest.raises(Stopped, match=r"asked to end by a preemption notice; iteration \d is saved"):
        lsp.train(config, rewards=[host_reward()], callbacks=[notice])
    machine.answers.clear()
    assert same_bits(train(config_of(game_model, tmp_path / "run", resume="auto")), whole_run[1])
    assert_same_run(tmp_path / "run", whole_run[0])
