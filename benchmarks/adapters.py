"""What adapters save: the memory and time of iterations that train all parameters, and of those that train adapters.

    python benchmarks/adapters.py MODEL_DIR [--iterations 3]

The preset `quickstart` against `lora_laptop` (rank 16 on all projections), each in a process of its own, float32: the
process's peak resident memory, what the state holds, seconds of the last iteration's phases, bytes of a checkpoint.

Writes `results/adapters.json` and `results/adapters.md`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure

PRESETS = "quickstart", "lora_laptop"
GIB = 2**30


def one(preset: str, model: str, iterations: int) -> dict[str, Any]:
    """In this process."""
    import jax

    import lsp_jax as lsp

    seen: list[Any] = []

    def look(event: Any) -> None:
        held = {"state": event.state, "trained": event.state.params}
        sizes = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in held.items()}
        times = {name: value for name, value in event.metrics.items() if name.startswith("time/")}
        seen.append({**sizes, "times": times})

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        config = replace(lsp.presets.get(preset), model=model, output_dir=str(run), max_steps=iterations)
        lsp.train(replace(config, save_steps=iterations), callbacks=[look])
        checkpoint = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**seen[-1], "checkpoint": checkpoint, "peak": peak}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for name, what in (
        ("trained parameters, GiB", "trained"),
        ("state, GiB", "state"),
        ("a checkpoint, GiB", "checkpoint"),
        ("peak resident memory of the process, GiB", "peak"),
    ):
        lines.append(f"| {name} | " + " | ".join(f"{row[what] / GIB:.3f}" for row in found.values()) + " |")
    for phase in ("challenge", "solve", "reward", "reference", "update", "iteration"):
        values = " | ".join(f"{row['times'][f'time/{phase}']:.2f}" for row in found.values())
        lines.append(f"| {phase}, s | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--preset", default="", help="only this one, in this process, as JSON")
    options = parser.parse_args()
    if options.preset:
        print(json.dumps(one(options.preset, options.model, options.iterations)))
        return
    found = {}
    for preset in PRESETS:
        command = [sys.executable, __file__, options.model, "--iterations", str(options.iterations), "--preset", preset]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[preset] = json.loads(done.stdout.splitlines()[-1])
        print(preset, f"{found[preset]['peak'] / GIB:.2f} GiB", flush=True)
    measure.write("adapters", {"iterations": options.iterations, "presets": found}, table(found))


if __name__ == "__main__":
    main()
