"""How a benchmark speaks with a peer: one JSON request a line on its standard input, one JSON reply a line back.

A peer runs under the Python of its own environment and imports nothing of lsp_jax. It is a class with a method for each
request that it can answer; what it cannot is answered `{"unsupported": reason}`, what fails `{"error": reason}`.

| request | fields | reply |
|---|---|---|
| versions | | `packages`, `dtype`, `threads`, `settings` |
| rollout | prompts, repeats, new_tokens, seed, dtype | `seconds` with prefill, `tokens` generated, `rows` |
| logprobs | rows, prompt_lengths, dtype | `logprobs`: of every token after the prompt, per row |
| step | prompts, completions, rewards, beta, learning_rate, micro_batch_size, generate | see `step` below |

Rollout: `repeats` completions of each prompt, all in one batch, each of exactly `new_tokens` tokens: no stop token ends
them, temperature 1, no truncation. Rows come prompt by prompt, without their prompt. The model is loaded before the
clock starts; what is compiled for a new shape is in the seconds of that shape's first request, so ask twice.

Step: one GRPO step from the model's own weights in float32: generation of as many tokens as the longest completion
(thrown away, the given `completions` take their place, so that all do the same update; left out unless `generate`),
reference log-probabilities, update by AdamW. `completions` are consecutive per prompt. The reply has the seconds
`generation`, `reference`, `update` and `total`, `peak_bytes` (highest resident memory of the process in the step),
`loss` and `grad_norm`. A peer may take further fields, see its docstring.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

Reply = dict[str, Any]
OPERATIONS = ("versions", "rollout", "logprobs", "step")


class Unsupported(Exception):
    """The library has no way to do what was asked; the text says why."""


def serve(peer: type) -> None:
    """Answers requests until the input ends. `peer(model_dir)` is made here, once standard output is out of reach."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print, from C too, must not come between the replies
    instance = None
    for line in sys.stdin:
        try:
            instance = instance or peer(sys.argv[1])
            reply = _answer(instance, json.loads(line))
        except Unsupported as reason:
            reply = {"unsupported": str(reason)}
        except Exception as error:  # the benchmark goes on without this reply
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(peer: Any, request: dict[str, Any]) -> Reply:
    operation = request.pop("op")
    if operation not in OPERATIONS or not hasattr(peer, operation):
        raise Unsupported(f"no {operation} here")
    return getattr(peer, operation)(**request)


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def threads() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def reset_peak() -> None:
    """From here on `peak_bytes` counts. What was freed but kept for reuse is first given back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Highest resident memory of this process since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
