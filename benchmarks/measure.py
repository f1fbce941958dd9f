"""What the benchmarks share: contestants measured in turn in one run, medians and ratios, a JSON file and a table."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def in_turn(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, say: str = "", steady: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """`rounds` results of each contestant, A B C A B C ..., after one round that is not counted: the machine's speed
    drifts for all of them alike. Those in `steady` do the same work in their first round as in any, and count at once.
    """
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            if number == 0 and name in steady:
                continue
            gc.collect()
            result = run()
            print(f"{say} {name} {'warm-up' if number == 0 else number}: {brief(result)}", file=sys.stderr, flush=True)
            if number:
                results[name].append(result)
    return results


def brief(result: Any) -> str:
    """A result as one line that says no more than needed."""
    if isinstance(result, float):
        return f"{result:.2f}"
    if isinstance(result, dict):
        return ", ".join(f"{key} {brief(value)}" for key, value in result.items())[:200]
    return str(result)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def shown(values: Mapping[str, float], digits: int = 1) -> str:
    """`median (lowest to highest)`."""
    return f"{values['median']:.{digits}f} ({values['lowest']:.{digits}f} to {values['highest']:.{digits}f})"


def limits() -> dict[str, float]:
    """The machine's best rates, measured now: `gemm` in GFLOP/s, `bandwidth` in GB/s."""
    from limits import measure

    return {name: rates["best"] for name, rates in measure().items()}


def circumstances() -> dict[str, Any]:
    """When, where, with what."""
    import jax

    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": f"{device.device_kind} ({device.platform})",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def write(name: str, data: Mapping[str, Any], table: str) -> None:
    """`results/NAME.json` and `results/NAME.md`, the table printed too."""
    RESULTS.mkdir(exist_ok=True)
    where = circumstances()
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, **data}, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{package} {number}" for package, number in where["versions"].items())
    head = f"{where['date']}, {where['device']}, {where['cores']} cores, Python {where['python']}, {versions}.\n"
    (RESULTS / f"{name}.md").write_text(f"`{where['command']}`\n\n{head}\n{table}\n", encoding="utf-8")
    print(table)
