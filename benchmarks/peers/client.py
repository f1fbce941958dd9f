"""The peers, each a process in its own environment, asked one request at a time (`protocol.py` has the requests).

    python benchmarks/peers/client.py NAME MODEL_DIR [REQUEST.json]

asks one peer for a tiny rollout, log-probabilities and step (or for the request in the file) and prints its replies.
`make bench-peers` makes the environments. A peer without one, or that fails, answers with the reason and raises
nothing. Peers inherit the environment's variables. Beside other work set OMP_WAIT_POLICY=passive: PyTorch's threads
else wait in loops, and what shares their cores makes a step take many times as long.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "transformers": ".venv-bench-torch",
    "trl": ".venv-bench-torch",
    "tunix": ".venv-bench-tunix",
    "vllm": ".venv-bench-vllm",
    "llamacpp": ".venv-bench-llamacpp",
}
"""Which environment a peer runs in; this project's own runs in that of the benchmark."""
OURS = "lsp_jax"

# nothing is looked up on a network, and no setting of this environment leaks into another
SETTINGS = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}

Reply = dict[str, Any]


def missing(name: str, root: Path = HERE.parents[1]) -> str:
    """Why a peer cannot be started, or nothing."""
    if name == OURS:
        return ""
    environment = root / ENVIRONMENTS[name]
    if (environment / ".installed").exists():
        return ""
    if (environment / ".failed").exists():
        return "not installed: " + (environment / ".failed").read_text(encoding="utf-8").strip()
    return "not installed: make bench-peers has not made its environment"


class Peer:
    """One peer's process; a context manager. `failure` says why it cannot be asked (again), or nothing."""

    def __init__(self, name: str, model_dir: Path | str, root: Path = HERE.parents[1]):
        self.name, self.failure = name, missing(name, root)
        self.process: subprocess.Popen[str] | None = None
        self.replies: queue.Queue[str] = queue.Queue()
        if self.failure:
            return
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        python = sys.executable if name == OURS else root / ENVIRONMENTS[name] / "bin/python"
        settings = {**os.environ, **SETTINGS} | ({"PYTHONPATH": str(root)} if name == OURS else {})
        self.process = subprocess.Popen(
            [python, HERE / f"{name}_peer.py", Path(model_dir).resolve()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            encoding="utf-8",
            env=settings,
            start_new_session=True,  # vLLM has children: all of them end with it
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process and self.process.stdout
        for line in self.process.stdout:
            self.replies.put(line)
        self.replies.put("")

    def ask(self, request: dict[str, Any], timeout: float = 600.0) -> Reply:
        """The reply; `error` in it when there is none within `timeout` seconds, or no process left to give one."""
        if self.failure or self.process is None or self.process.stdin is None:
            return {"error": self.failure or "closed"}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.replies.get(timeout=timeout)
        except queue.Empty:
            # a reply that came later would be taken for that of the next request
            return self._give_up(f"no reply to {request['op']} in {timeout:g} s")
        except OSError:
            line = ""
        return json.loads(line) if line else self._give_up(f"its process ended: {self._last_words()}")

    def _give_up(self, reason: str) -> Reply:
        self.failure = reason
        self._stop()
        return {"error": reason}

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.errors().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing said"

    def errors(self) -> str:
        """What it and its libraries have printed."""
        self.log.seek(0)
        return self.log.read()

    def close(self) -> None:
        """Ends the process and its children."""
        self.failure = self.failure or "closed"
        self._stop()

    def _stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)  # the end of its input ends it
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def small_requests() -> list[dict[str, Any]]:
    """One tiny request of each kind; the rollout twice, for its first compiles."""
    prompts = [[1, 4093, 198, 1780, 216, 33], [1, 4093, 198, 19556, 11]]
    completions = [[28, 253, 1002, 30], [198, 3725, 253, 446], [504, 338, 216, 34], [2683, 28, 6330, 17]]
    rollout = {"op": "rollout", "prompts": prompts, "repeats": 2, "new_tokens": 8, "seed": 1, "dtype": "float32"}
    rows = [[*prompts[i // 2], *tokens] for i, tokens in enumerate(completions)]
    logprobs = {"op": "logprobs", "rows": rows, "prompt_lengths": [len(prompts[i // 2]) for i in range(4)]}
    step = {
        "op": "step",
        "prompts": prompts,
        "completions": completions,
        "rewards": [0.0, 1.0, 0.5, 0.25],
        "beta": 0.04,
        "learning_rate": 1e-6,
        "micro_batch_size": 2,
        "generate": True,
    }
    return [{"op": "versions"}, rollout, rollout, logprobs, step]


def main() -> int:
    """1 when a reply is an error."""
    name, model_dir = sys.argv[1:3]
    requests = [json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[3:]] or small_requests()
    failed = False
    with Peer(name, model_dir) as peer:
        for request in requests:
            reply = peer.ask(request)
            print(f"{request['op']}: {json.dumps(reply)}", flush=True)
            failed = failed or "error" in reply
        if failed and peer.process:
            print(peer.errors()[-6000:], file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
