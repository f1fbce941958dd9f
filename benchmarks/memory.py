"""Peak memory of one GRPO step and what less of it costs: micro-batches and recomputation, beside TRL and tunix.

    make bench-peers
    python benchmarks/memory.py MODEL_DIR [--peers trl tunix]

The step of `step.py` with prompts of 64 tokens, 16 completions of 128, float32, generation and reference included. Each
entry is one request to a fresh process, asked twice: the second, compiled, is reported. The peak is the process's
highest resident memory during the step. Weights, gradients and two moments alone are 4 x 0.50 GiB, the reference's
weights one more.

Writes `results/memory.json` and `results/memory.md`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import measure
from peers.client import Peer
from step import LENGTHS, request

import lsp_jax as lsp

OURS = [
    *({"micro_batch_size": rows, "remat": "full"} for rows in (1, 2, 4, 8, 16)),
    {"micro_batch_size": 8, "remat": "dots"},
    {"micro_batch_size": 8, "remat": "none"},
]
PEERS: dict[str, list[dict[str, Any]]] = {
    "trl": [{"micro_batch_size": 8, "checkpointing": True}, {"micro_batch_size": 8, "checkpointing": False}],
    "tunix": [{"micro_batch_size": 8}],
}


def asked(name: str, model: str, fields: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The second reply of a fresh process."""
    message = request(LENGTHS["64"], 0, vocabulary) | fields
    with Peer(name, model) as peer:
        reply = peer.ask(message, timeout=1800)
        if "total" in reply:
            reply = peer.ask(message, timeout=1800)
    print(f"{name} {fields}: {measure.brief(reply)}", file=sys.stderr, flush=True)
    return {**reply, "library": name, "settings": fields}


def table(entries: list[dict[str, Any]]) -> str:
    lines = ["| library | settings | peak GiB | update s | step s |", "|---|---|---|---|---|"]
    for entry in entries:
        settings = ", ".join(f"{name} {value}" for name, value in entry["settings"].items())
        if "total" not in entry:
            lines.append(f"| {entry['library']} | {settings} | {entry.get('error') or entry.get('unsupported')} | | |")
            continue
        numbers = f"{entry['peak_bytes'] / 2**30:.2f} | {entry['update']:.1f} | {entry['total']:.1f}"
        lines.append(f"| {entry['library']} | {settings} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    options = parser.parse_args()
    vocabulary = lsp.load_pretrained(options.model).config.vocab_size
    wanted = [("lsp_jax", fields) for fields in OURS]
    wanted += [(name, fields) for name in options.peers for fields in PEERS[name]]
    entries = [asked(name, options.model, fields, vocabulary) for name, fields in wanted]
    measure.write("memory", {"entries": entries}, table(entries))


if __name__ == "__main__":
    main()
