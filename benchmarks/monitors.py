"""What the monitors of self-play cost beside an iteration.

    PYTHONPATH=. python benchmarks/monitors.py MODEL_DIR [--rounds 5]

Quickstart's game, four iterations of it, and each monitor alone on what was played: the mean of the reference's hidden
states, the memory with its similarities (full, of 4096 queries), words counted, alarms looked at. Their sum over a
steady iteration. The probe is not among them: it is part of an iteration's play, each `health.probe_steps` iterations.

Writes `results/monitors.json` and `results/monitors.md`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure

import lsp_jax as lsp
from lsp_jax import presets
from lsp_jax.algorithm import stages
from lsp_jax.learn import novelty
from lsp_jax.learn.novelty import COUNT, EMBEDDINGS
from lsp_jax.monitor.health import Health, HealthConfig, lexical_metrics

ITERATIONS = 4


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    events: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "run")
        config = replace(presets.quickstart(), model=options.model, output_dir=output, max_steps=ITERATIONS)
        lsp.train(config, callbacks=[lambda event: events.append(event._replace(state=None))])
    iteration = statistics.median(event.metrics["time/iteration"] for event in events[1:])
    metrics, lines = events[-1].metrics, events[-1].transcripts

    model, play = lsp.load_pretrained(options.model).config, config.play
    key = jax.random.key(0)
    hidden = jax.random.normal(key, (play.num_queries, play.max_query_length, model.hidden_size))
    lengths = jnp.full(play.num_queries, play.max_query_length)
    full = novelty.empty(config.memory.size, model.hidden_size)
    full |= {EMBEDDINGS: jax.random.normal(key, full[EMBEDDINGS].shape), COUNT: jnp.asarray(10**5, jnp.int32)}
    embeddings, health = jax.jit(novelty.pooled)(hidden, lengths), Health(HealthConfig())
    contestants: dict[str, Callable[[], Any]] = {
        "pooled states": lambda: jax.jit(novelty.pooled)(hidden, lengths),
        "memory": lambda: stages.update_novelty(full, embeddings, lengths, config.memory.near_duplicate),
        "words": lambda: lexical_metrics(lines, config.prompts.challenger),
        "alarms": lambda: health.update(1, metrics),
    }
    timed = {name: partial(seconds, run) for name, run in contestants.items()}
    found = {name: measure.spread(values) for name, values in measure.in_turn(timed, options.rounds).items()}
    share = sum(entry["median"] for entry in found.values()) / iteration
    rows = [f"| {name} | {measure.shown({k: 1e3 * v for k, v in entry.items()}, 2)} |" for name, entry in found.items()]
    table = [
        "| monitor | ms |",
        "|---|---|",
        *rows,
        "",
        f"Together {100 * share:.2f} % of an iteration of {iteration:.1f} s.",
    ]
    measure.write("monitors", {"monitors": found, "iteration": iteration, "share": share}, "\n".join(table))


if __name__ == "__main__":
    main()
