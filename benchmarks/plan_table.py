"""What fits where: `lsp-jax plan` for several models and topologies, as JSON, a table each, and one of all.

    JAX_PLATFORMS=cpu python benchmarks/plan_table.py DIRECTORY [--only v5e:4x4 ...] [--models llama-3.2-3b ...]

Needs the extras `plan` and `plan-gpu`, no accelerator and no weights; each line takes minutes of one core. A line that
is already in DIRECTORY is not made anew. JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1 compiles in half the time, with programs
that are a little less optimised.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lsp_jax import presets
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.model.sharding import MeshConfig
from lsp_jax.perf import plan
from lsp_jax.perf.chips import GIB, open_topology

MODELS = {
    "llama-3.2-3b": "recommended_lsp_3b",
    "llama-3.2-1b": "recommended_lsp_1b",
    "llama-3.1-8b": "recommended_lsp_8b",
}
TOPOLOGIES = ("v5e:4x4", "h100:1", "v5e:8x8", "h100:8", "v6e:4x4", "v5p:2x2x2", "h200:8")
SHARED = (("llama-3.1-8b", "v5e:4x4"), ("llama-3.1-8b", "v6e:4x4"))
"""Where the copy that plays is too large for one chip, `tensor` is 4; elsewhere the mesh is the default one."""
LARGE = ("llama-3.2-3b", "v5e:16x16")


def config_of(model: str, topology: str) -> TrainConfig:
    """N = 8, G = 8, 256 + 512 tokens, a reward model of 3B."""
    config = presets.get(MODELS[model])
    play = dataclasses.replace(
        config.play, num_queries=8, num_generations=8, max_query_length=256, max_completion_length=512
    )
    mesh = MeshConfig(fsdp=-1, tensor=4) if (model, topology) in SHARED else MeshConfig()
    return dataclasses.replace(config, model=model, play=play, mesh=mesh)


def line(data: dict[str, Any]) -> str:
    """One plan as a row of the table."""
    worst = max(data["phases"], key=lambda phase: phase["peak"])
    update = next(phase for phase in data["phases"] if phase["name"] == "update")
    network = sum(phase["network_bytes"] * phase["times"] for phase in data["phases"])
    cells = [
        data["model"],
        data["topology"],
        " x ".join(str(size) for size in data["mesh"].values()),
        str(data["sizes"]["micro_batch_size"]),
        f"{sum(data['resident'].values()) / GIB:.2f}",
        f"{worst['peak'] / GIB:.2f} ({worst['name']})",
        f"{data['chip']['memory'] / GIB:.2f}",
        "yes" if data["fits"] else "**no**",
        f"{network / 1e9:.1f}",
        f"{data['seconds']:.2f}",
        f"{update['seconds']:.2f} ({update['bound']})",
        f"{data['tokens_per_second']:.0f}",
        f"{data['programs']} in {sum(phase['compile_seconds'] for phase in data['phases']):.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def phase_name(program: dict[str, Any]) -> str:
    """Of which phase a program is; the plans of earlier versions call the first one `handover`."""
    name = program["name"].split(":")[0]
    return "weight_sync" if name == "handover" else name


def network(directory: Path) -> list[str]:
    """GB that one chip of a v5e takes in during each phase of an iteration, by the number of chips."""
    files = {
        chips: directory / f"llama-3.2-3b_v5e_{grid}.json" for chips, grid in ((16, "4x4"), (64, "8x8"), (256, "16x16"))
    }
    made = {chips: json.loads(path.read_text()) for chips, path in files.items() if path.exists()}
    rows = [f"| stage | {' | '.join(f'{chips} chips' for chips in made)} |", "|---|" + "---:|" * len(made)]
    for name in ("weight_sync", "challenge", "solve", "preference reward", "quality reward", "reference", "update"):
        taken = [
            sum(entry["network_bytes"] * entry["times"] for entry in data["phases"] if phase_name(entry) == name)
            for data in made.values()
        ]
        rows.append(f"| {name} | {' | '.join(f'{size / 1e9:.3g}' for size in taken)} |")
    return rows


HEAD = (
    "model", "topology", "data x fsdp x tensor", "micro-batch", "always there", "peak (stage)", "memory", "fits",
    "GB network", "s", "update s", "tokens/s", "programs",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    wanted = [(model, topology) for topology in TOPOLOGIES for model in MODELS]
    wanted = [*wanted[: len(MODELS) * 2], LARGE, *wanted[len(MODELS) * 2 :]]
    rows = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for model, topology in wanted:
        path = arguments.directory / f"{model}_{topology.replace(':', '_')}.json"
        if not path.exists():
            if model not in arguments.models or (arguments.only and topology not in arguments.only):
                continue
            print(f"{datetime.now(UTC):%H:%M:%S} {model} on {topology}", flush=True)
            try:
                made = plan.plan(config_of(model, topology), open_topology(topology))
            except InputError as error:
                print(f"{model} on {topology}: {error}", flush=True)
                continue
            plan.write(made, path)
            path.with_suffix(".md").write_text(plan.table(made) + "\n", encoding="utf-8")
            print(made.verdict, flush=True)
        rows.append(line(json.loads(path.read_text())))
    print("\n".join(rows))
    print()
    print("\n".join(network(arguments.directory)))


if __name__ == "__main__":
    main()
