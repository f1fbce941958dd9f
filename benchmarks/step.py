"""One GRPO step against TRL and tunix: seconds by phase and peak memory, the same weights, prompts, tokens, rewards.

    make bench-peers
    python benchmarks/step.py MODEL_DIR [--peers trl tunix] [--rounds 3]

1. `64`: 2 prompts of 64 tokens with 8 completions of 128 each; `256`: the same after prompts of 256 tokens.
2. Losses and gradients' norms of all must agree; they are written beside the seconds.
3. `prefix`: our update with and without shared prompts, prompts of 32 to 512 tokens.

Float32, reference and generation included. Each library is a process of its own, one at work at a time. Writes
`results/step.json` and `results/step.md`.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from typing import Any

import measure
import numpy as np
from limits import step_roofline
from peers.client import Peer

import lsp_jax as lsp

PROMPTS, REPEATS, NEW = 2, 8, 128
LENGTHS = {"64": 64, "256": 256}
PREFIXES = (32, 128, 512)
STEADY = ("trl", "tunix")
"""TRL compiles nothing, and tunix compiles anew before every step, outside the seconds."""
PHASES = ("generation", "reference", "update", "total")


def request(length: int, micro_batch: int, vocabulary: int, generate: bool = True) -> dict[str, Any]:
    """Random ids above the demo model's control tokens; rewards drawn once."""
    rng = np.random.default_rng(length)
    prompts = rng.integers(20, vocabulary, (PROMPTS, length)).tolist()
    completions = rng.integers(20, vocabulary, (PROMPTS * REPEATS, NEW)).tolist()
    return {
        "op": "step",
        "prompts": prompts,
        "completions": completions,
        "rewards": rng.random(PROMPTS * REPEATS).round(3).tolist(),
        "beta": 0.04,
        "learning_rate": 1e-6,
        "micro_batch_size": micro_batch,
        "generate": generate,
    }


def compared(peers: list[Peer], length: int, micro_batch: int, rounds: int, config: Any, limits: Any) -> dict[str, Any]:
    """All libraries in turn on one step."""
    asked = request(length, micro_batch, config.vocab_size)
    contestants = {peer.name: partial(peer.ask, asked, timeout=1800) for peer in peers}
    replies = measure.in_turn(contestants, rounds, str(length), STEADY)
    limit = step_roofline(config, PROMPTS * REPEATS, PROMPTS, length, NEW, **limits, shared_prompts=True)
    found: dict[str, Any] = {"limit": limit.total}
    for name, each in replies.items():
        if "total" not in each[0]:
            found[name] = {"failed": each[0]}
            continue
        seconds = {phase: measure.spread([reply[phase] for reply in each]) for phase in PHASES}
        peak = max(reply["peak_bytes"] for reply in each) / 2**30
        found[name] = {"seconds": seconds, "peak_GiB": peak, "loss": each[0]["loss"], "grad_norm": each[0]["grad_norm"]}
    ours = found["lsp_jax"]
    for entry in found.values():
        if isinstance(entry, dict) and "seconds" in entry:
            entry["times"] = entry["seconds"]["total"]["median"] / ours["seconds"]["total"]["median"]
            entry["memory"] = ours["peak_GiB"] / entry["peak_GiB"]
    return found


def prefixes(shared: Peer, plain: Peer, micro_batch: int, rounds: int, vocabulary: int) -> dict[str, Any]:
    """Seconds of our reference pass and update, plain over shared, by the prompts' length: a process for each form."""
    found = {}
    for length in PREFIXES:
        asked = request(length, micro_batch, vocabulary, generate=False)
        forms = {
            share: partial(peer.ask, {**asked, "share": share}, timeout=1800)
            for peer, share in ((shared, True), (plain, False))
        }
        replies = measure.in_turn({str(share): run for share, run in forms.items()}, rounds, f"prefix {length}")
        seconds = {name: measure.spread([reply["total"] for reply in each]) for name, each in replies.items()}
        norms = [replies[name][0]["grad_norm"] for name in ("True", "False")]
        ratio = seconds["False"]["median"] / seconds["True"]["median"]
        found[length] = {"shared": seconds["True"], "plain": seconds["False"], "ratio": ratio, "grad_norms": norms}
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        "| prompt | library | generation s | reference s | update s | total s | times ours | peak GiB | ours / its "
        "| loss | gradient norm |",
        "|---" * 11 + "|",
    ]
    for length, entries in found["steps"].items():
        for name, entry in entries.items():
            if name == "limit":
                continue
            if "failed" in entry:
                lines.append(f"| {length} | {name} | {entry['failed']} |" + " |" * 8)
                continue
            seconds = " | ".join(measure.shown(entry["seconds"][phase]) for phase in PHASES)
            numbers = (
                f"{entry['peak_GiB']:.2f} | {entry['memory']:.2f} | {entry['loss']:.6f} | {entry['grad_norm']:.4f}"
            )
            lines.append(f"| {length} | {name} | {seconds} | {entry['times']:.2f} | {numbers} |")
    for length, entries in found["steps"].items():
        lines += ["", f"Limit of the step with prompts of {length} tokens: {entries['limit']:.1f} s."]
    lines += ["", "| prompt tokens | shared s | plain s | plain / shared |", "|---|---|---|---|"]
    for length, entry in found["prefix"].items():
        lines.append(
            f"| {length} | {measure.shown(entry['shared'])} | {measure.shown(entry['plain'])} | {entry['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peers", nargs="*", default=["trl", "tunix"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=8, help="rows; the same for all libraries")
    parser.add_argument("--name", default="step", help="of the files in results/")
    options = parser.parse_args()
    config = lsp.load_pretrained(options.model).config
    found: dict[str, Any] = {"limits": measure.limits(), "steps": {}}
    with ExitStack() as stack:
        peers = [stack.enter_context(Peer(name, options.model)) for name in ["lsp_jax", *options.peers]]
        found["peers"] = {peer.name: peer.ask({"op": "versions"}) for peer in peers}
        for name, length in LENGTHS.items():
            found["steps"][name] = compared(peers, length, options.micro_batch, options.rounds, config, found["limits"])
        plain = stack.enter_context(Peer("lsp_jax", options.model))
        found["prefix"] = prefixes(peers[0], plain, options.micro_batch, options.rounds, config.vocab_size)
    measure.write(options.name, found, table(found))


if __name__ == "__main__":
    main()
