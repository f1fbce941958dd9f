"""What one device makes of LSP: right numbers, speed against what the device can do, memory of a whole iteration.

    PYTHONPATH=. python benchmarks/device_check.py [--output FILE.json] [--budget SECONDS] [--small]

Random weights of known shapes and prompts of placeholder ids, as in `lsp-jax plan`: no model, no tokenizer, no network.
What is run are the package's own stages (`lsp_jax/algorithm/stages.py`). Every completion runs to its full length
(there is no stop token) and every query is taken as valid, so time and memory are the most that such an
iteration can need.

1. Ceilings, measured here: one large bfloat16 matrix product, and a triad a = b + s * c over arrays of 1 GiB.
2. A whole iteration (N = 8, G = 8, 256 + 512 tokens, policy, reference and reward model of the shape): seconds of its
   second run by phase, and the device's peak memory.
3. Update: 64 rows of 768 tokens. Useful operations over the seconds, as a share of the measured matrix product.
   Counted per row of W tokens, T of them a completion: 6 x (a layer's weights) x L x W, causal attention
   6 x L x H x h x W^2, the head 6 x V x D x T. What rematerialisation computes a second time is not counted.
4. Decode: 128 rows. Bytes that a step must read (all weights but an untied embedding, the prompts' cache once a prompt,
   the columns of the generated cache that are filled) over the seconds, as a share of the measured triad. Prefill is in
   the seconds and not in the bytes.
5. Parity: bfloat16 and the attention kernel of this device against float32 on the CPU, both in this process; the shape
   with fewer layers.

A part for which too little time is left is skipped; one that fails, for want of memory say, is reported, and the rest
goes on. At the end of the budget the script writes what it has and stops. `--small` does all of it with a tiny model on
the CPU in seconds; those figures say nothing about an accelerator.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import device_parts as parts
import jax
from device_parts import FULL, SMALL, TINY, Result

from lsp_jax.model.known_models import SHAPES

MODELS = {"llama-3.2-1b": 8, "llama-3.2-3b": 4}
"""The shapes checked, and rows of a micro-batch."""

NEEDED = {"ceilings": 15, "iteration": 90, "update": 40, "decode": 40, "parity": 30}
"""Seconds that must be left for a part to begin."""

LINES: tuple[tuple[str, str, str, str], ...] = (
    ("measured matrix product, TFLOP/s (bfloat16)", "ceilings", "gemm_tflops", ".1f"),
    ("measured triad, GB/s", "ceilings", "bandwidth_gbytes", ".0f"),
    ("whole iteration, s", "iteration", "seconds", ".2f"),
    ("whole iteration, peak memory, GiB", "iteration", "peak_gib", ".1f"),
    ("sampler against learner (1 is equal)", "iteration", "metrics.sampling/token_mult_prob_error", ".4f"),
    ("update, s", "update", "seconds", ".3f"),
    ("update, tokens/s", "update", "tokens_per_second", ".0f"),
    ("update, useful TFLOP/s", "update", "useful_tflops", ".1f"),
    ("update, share of the matrix product (MFU)", "update", "share_of_gemm", ".1%"),
    ("decode, tokens/s", "decode", "tokens_per_second", ".0f"),
    ("decode, GB read a step", "decode", "gbytes_per_step", ".3g"),
    ("decode, share of the triad's bandwidth", "decode", "share_of_bandwidth", ".1%"),
    (f"logits, relative error (at most {parts.LOGITS_TOLERANCE})", "parity", "logits_relative_error", ".4f"),
    (f"log-probabilities, mean error (at most {parts.LOGPROB_TOLERANCE})", "parity", "logprob_mean_difference", ".4f"),
)
"""Of the table: what, which part, which figure, how it is written."""


class Check:
    """The results so far, and the time that is left."""

    def __init__(self, budget: float, output: Path, about: Result):
        self.end, self.output, self.running = time.monotonic() + budget, output, ""
        self.report: Result = {**about, "budget_seconds": budget, "ceilings": {}, "models": {}}

    def attempt(self, name: str, call: Callable[[], Result]) -> Result:
        """The part's figures, or why there are none."""
        left = self.end - time.monotonic()
        if left < NEEDED[name]:
            return {"skipped": f"{left:.0f} s left, {NEEDED[name]} needed"}
        self.running, start = name, time.monotonic()
        try:
            return {**call(), "part_seconds": round(time.monotonic() - start, 1)}
        except Exception as error:  # one part must not take the others with it
            kind = "does not fit in memory" if "RESOURCE_EXHAUSTED" in str(error) else type(error).__name__
            words = [(str(error).splitlines() or [""])[0][:200], *getattr(error, "__notes__", ())]
            return {"failed": f"{kind}: {' '.join(words)}"}
        finally:
            gc.collect()  # the arrays of a part that failed hang on its traceback

    def write(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")

    def stop(self) -> None:
        """At the end of the budget, from another thread: a compilation cannot be interrupted, a process can end."""
        self.report["stopped"] = f"the budget ended in part {self.running}"
        self.write()
        print(table(self.report), flush=True)
        os._exit(1)


def table(report: Result) -> str:
    """One Markdown table, and below it what is missing."""
    models = report["models"]
    device = report["device"]
    figures_of = "CPU, small mode: no figures of an accelerator" if report["small"] else device["kind"]
    lines = [f"| {figures_of} | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    notes = [report["stopped"]] if "stopped" in report else []
    for what, part, name, form in LINES:
        results = [report["ceilings"] if part == "ceilings" else model.get(part, {}) for model in models.values()]
        cells = [_cell(result, name, form) for result in results]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for model, results in {"": {"ceilings": report["ceilings"]}, **models}.items():
        for part, result in results.items():
            notes += [f"{model} {part} {why}: {result[why]}".strip() for why in ("failed", "skipped") if why in result]
    return "\n".join([*lines, "", *notes]).rstrip()


def _cell(result: Result, name: str, form: str) -> str:
    for key in name.split("."):
        result = result.get(key, {}) if isinstance(result, dict) else {}
    return format(result, form) if isinstance(result, int | float) else "-"


def about(small: bool) -> Result:
    """Device, versions, date and command."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "memory_gib": None if limit is None else limit / 2**30,
        },
        "small": small,
        "versions": {name: metadata.version(name) for name in packages} | {"python": sys.version.split()[0]},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def failures(report: Result) -> list[str]:
    """Parts that failed and parity that is out of tolerance."""
    found = ["ceilings"] if "failed" in report["ceilings"] else []
    for name, results in report["models"].items():
        found += [f"{name} {part}" for part, result in results.items() if "failed" in result]
        found += [f"{name} parity"] if not results["parity"].get("within", True) else []
    return found


def main(arguments: list[str] | None = None) -> int:
    """0 when all that was run is right, 1 when something failed, 2 for a machine without an accelerator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, for machines without an accelerator")
    parser.add_argument("--output", type=Path, default=Path("device_check.json"), help="JSON file")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds after which the script ends")
    options = parser.parse_args(arguments)
    # read when the device is first touched; XLA takes three quarters when nothing is said
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if jax.default_backend() == "cpu" and not options.small:
        print("device_check.py: error: no accelerator here: use --small", file=sys.stderr)
        return 2
    # the figures of the small mode mean nothing, and its time is the compiler's
    jax.config.update("jax_disable_most_optimizations", options.small)
    sizes = SMALL if options.small else FULL
    check = Check(options.budget, options.output, about(options.small))
    timer = threading.Timer(options.budget, check.stop)
    timer.daemon = True
    timer.start()
    top = check.report["ceilings"] = check.attempt("ceilings", lambda: parts.ceilings(sizes))
    shapes = {"tiny": (TINY, 8)} if options.small else {name: (SHAPES[name], rows) for name, rows in MODELS.items()}
    for name, (model, rows) in shapes.items():
        results: Result = {}
        check.report["models"][name] = results
        each: dict[str, Callable[[], Result]] = {  # the iteration first: memory's peak is the process's
            "iteration": lambda model=model, rows=rows: parts.whole_iteration(model, rows, sizes),
            "update": lambda model=model, rows=rows: parts.update(model, rows, sizes, top),
            "decode": lambda model=model: parts.decode(model, sizes, top),
            "parity": lambda model=model: parts.parity(model, sizes),
        }
        for part, call in each.items():
            results[part] = check.attempt(part, call)
            check.write()
    timer.cancel()
    print(table(check.report))
    return 1 if failures(check.report) else 0


if __name__ == "__main__":
    sys.exit(main())
