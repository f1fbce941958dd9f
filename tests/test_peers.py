"""The peers' client: what it answers when a peer is not there, does not start or cannot do what it is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

PEERS = Path(__file__).parents[1] / "benchmarks/peers"

ECHO = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from protocol import Unsupported, serve

class Echo:
    def __init__(self, model_dir):
        print("a library that prints")
    def rollout(self, prompts):
        print("and again", flush=True)
        return {"rows": prompts}
    def logprobs(self):
        raise Unsupported("has no logits")
    def step(self):
        raise ValueError("too large\\nsecond line")

serve(Echo)
"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PEERS))
    import client

    return client


def environment(root: Path, program: str) -> None:
    """An installed environment of llama.cpp whose Python is the shell script `program`."""
    python = root / ".venv-bench-llamacpp/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{program}\n", encoding="utf-8")
    python.chmod(0o755)
    (root / ".venv-bench-llamacpp/.installed").touch()


def test_a_peer_that_is_not_installed_says_why(client: Any, tmp_path: Path) -> None:
    with client.Peer("vllm", tmp_path, root=tmp_path) as peer:
        assert "make bench-peers" in peer.ask({"op": "versions"})["error"]
    (tmp_path / ".venv-bench-vllm").mkdir()
    (tmp_path / ".venv-bench-vllm/.failed").write_text("no wheel for this machine\n", encoding="utf-8")
    with client.Peer("vllm", tmp_path, root=tmp_path) as peer:
        assert peer.ask({"op": "versions"}) == {"error": "not installed: no wheel for this machine"}


def test_a_peer_that_ends_or_hangs_is_reported_and_not_asked_again(client: Any, tmp_path: Path) -> None:
    environment(tmp_path / "ends", "echo no such module >&2; exit 1")
    with client.Peer("llamacpp", tmp_path, root=tmp_path / "ends") as peer:
        assert peer.ask({"op": "versions"}) == {"error": "its process ended: no such module"}
        assert peer.ask({"op": "versions"}) == {"error": "its process ended: no such module"}
    environment(tmp_path / "hangs", "cat >/dev/null; exec sleep 60")
    with client.Peer("llamacpp", tmp_path, root=tmp_path / "hangs") as peer:
        assert peer.ask({"op": "rollout"}, timeout=0.2) == {"error": "no reply to rollout in 0.2 s"}
        assert peer.process.poll() is not None


def test_replies_and_nothing_that_libraries_print(client: Any, tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO, encoding="utf-8")
    environment(tmp_path, f'exec "{sys.executable}" "{script}" "{PEERS}" "$2"')
    with client.Peer("llamacpp", tmp_path, root=tmp_path) as peer:
        assert peer.ask({"op": "rollout", "prompts": [[1, 2]]}) == {"rows": [[1, 2]]}
        assert peer.ask({"op": "logprobs"}) == {"unsupported": "has no logits"}
        assert peer.ask({"op": "step"}) == {"error": "ValueError: too large"}
        assert "unsupported" in peer.ask({"op": "versions"})
        assert "unsupported" in peer.ask({"op": "__init__"})
        assert "and again" in peer.errors()


def test_texts_that_part_are_told_with_the_gap(monkeypatch: pytest.MonkeyPatch, game_model: Path) -> None:
    monkeypatch.syspath_prepend(str(PEERS.parent))
    import exports

    import lsp_jax as lsp
    from lsp_jax.play.generate import prompt_ids

    policy = lsp.load_pretrained(game_model)
    ours = ["ab ba"] * len(exports.PROMPTS)
    prompts = [prompt_ids(policy, prompt, exports.NEW_TOKENS) for prompt in exports.PROMPTS]
    wrong = [[*prompts[0], 1], *prompts[1:]]
    reply = {"packages": {}, "prompt_tokens": wrong, "texts": ["ab cb", "ab b", *ours[2:]]}
    found = exports.compared(policy, ours, reply)
    assert (found["same_text"], found["same_prompt"]) == (len(ours) - 2, len(ours) - 1)
    mine, theirs = policy.tokenizer.encode("ab ba"), policy.tokenizer.encode("ab cb")
    shared = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    row = jnp.array([[*prompts[0], *mine[:shared]]])
    logits = np.asarray(lsp.forward(policy.params, policy.config, row), np.float64)[0, -1]
    assert found["parted"][0]["gap"] == pytest.approx(logits[mine[shared]] - logits[theirs[shared]], abs=1e-5)
    assert exports.gap(policy, exports.PROMPTS[0], "ab", "ab") is None

    counted = {"packages": {}, "prompt_tokens": [len(ids) for ids in prompts], "texts": ours}
    found = exports.compared(policy, ours, counted)
    assert (found["same_prompt"], found["parted"]) == (len(ours), [])
    assert f"{len(ours)} of {len(ours)} (their number)" in exports.table({"engine": found})
