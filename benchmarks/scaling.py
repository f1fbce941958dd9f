"""How time and memory of each phase grow with the work, against how its arithmetic grows.

    PYTHONPATH=. python benchmarks/scaling.py [--axes queries answers completion prompt model] [--rounds 3]

1. A random Llama of 19 M parameters plays and learns GRPO steps of N = 4 prompts, G = 4 answers, P = 64 and T = 64
   tokens, float32, all tokens forced; along each axis one of the four grows. Along `model` a ladder of random Llamas
   from 5 to 361 M parameters does the same step.
2. Phases: rollout by chunks, reference pass, update (micro-batches of 8 rows). Seconds are medians; bytes are what the
   compiled program keeps beside its arguments (for the rollout: the decode program's, with its caches).
3. For each axis the slope of log(seconds) over log(size), by least squares, beside the slope of the operations counted
   in `limits.py`. A phase whose slope is more than 0.1 above that of its operations is marked.

Writes `results/scaling.json` and `results/scaling.md`; axes that are not asked for keep what was measured before.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from limits import head_weights, layer_weights, rollout_roofline, step_roofline

from lsp_jax.algorithm.spec import GameSpec, hyperparameters
from lsp_jax.config import TrainConfig
from lsp_jax.learn.batch import LearnBatch, Sampled, make_rows
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.learn.spec import Hyperparameters
from lsp_jax.learn.update import reference_logprobs, update
from lsp_jax.model.config import LlamaConfig
from lsp_jax.model.known_models import SHAPES
from lsp_jax.model.llama import Params, init_params
from lsp_jax.play import chunked_decode
from lsp_jax.play.sampler import row_keys
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.text.prompts import PlayPrompts, TokenTemplate

PHASES = ("rollout", "reference", "update")
MARGIN = 0.1
"""How much steeper than its operations a phase may grow before it is marked."""


class Work(NamedTuple):
    """One step's size."""

    queries: int = 4
    answers: int = 4
    completion: int = 64
    prompt: int = 64


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 16384) -> LlamaConfig:
    return replace(
        SHAPES["smollm2-135m"],
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


SMALL = llama(320, 896, 12, 5, 1)
LADDER = (
    llama(192, 512, 6, 3, 1),
    SMALL,
    llama(512, 1408, 20, 8, 4),
    SHAPES["smollm2-135m"],
    llama(960, 2560, 32, 15, 5, 49152),
)
AXES = {
    "queries": (2, 4, 8, 16),
    "answers": (2, 4, 8, 16),
    "completion": (32, 64, 128, 256, 512),
    "prompt": (32, 64, 128, 256, 512),
}


def parameters(config: LlamaConfig) -> int:
    return config.num_hidden_layers * layer_weights(config) + head_weights(config)


def operations(config: LlamaConfig, work: Work) -> dict[str, float]:
    """Of each phase: the seconds of its limit where an operation takes one and bytes take none."""
    sizes = work.queries * work.answers, work.queries, work.prompt, work.completion, 1e-9, 1e30
    played = rollout_roofline(config, *sizes)
    step = step_roofline(config, *sizes, recompute=True, shared_prompts=True)
    rollout = played.prefill_seconds + played.decode_seconds
    return {"rollout": rollout, "reference": step.reference, "update": step.update}


def game_of(model: LlamaConfig, work: Work) -> tuple[GameSpec, Hyperparameters]:
    config = TrainConfig(
        play=PlayConfig(work.queries, work.answers, max_completion_length=work.completion),
        loss=LossConfig(alpha_challenger=0.0),
        optimizer=OptimizerConfig(micro_batch_size=8),
    )
    prompts = PlayPrompts((1,), (), TokenTemplate((), ()), ())  # what is played is given
    return GameSpec.of(config, model, prompts, (), "float32"), hyperparameters(config)


def rows_of(prompts: jax.Array, work: Work, vocabulary: int) -> LearnBatch:
    rng, count = np.random.default_rng(1), work.queries * work.answers
    zeros = jnp.zeros((count, work.completion))
    rows = make_rows(
        (jnp.repeat(prompts, work.answers, axis=0), jnp.full(count, work.prompt, jnp.int32)),
        Sampled(
            jnp.asarray(rng.integers(0, vocabulary, zeros.shape), jnp.int32),
            jnp.full(count, work.completion, jnp.int32),
            *(zeros, zeros),
        ),
        *(jnp.asarray(rng.normal(size=count), jnp.float32), jnp.ones(count, bool), 1.0, "sequence"),
    )
    return LearnBatch(rows, None)


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median of `rounds` calls, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        gc.collect()
        start = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def kept(program: Any) -> int:
    """Bytes that a compiled program needs beside its arguments."""
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def rollout(params: Params, prompts: jax.Array, game: GameSpec, rounds: int) -> tuple[float, int]:
    """Seconds, and the bytes of the last chunk with its caches."""
    ragged, spec = (prompts, jnp.full(len(prompts), prompts.shape[1], jnp.int32)), game.solver
    keys = row_keys(jax.random.key(0), len(prompts) * game.num_generations)
    taken = seconds(lambda: chunked_decode.decode_in_chunks(params, ragged, keys, spec), rounds)
    longest = chunked_decode.cache_lengths(spec.max_new_tokens)[-1]
    prefix, rows = chunked_decode.prefill(params, ragged, keys, spec=spec, cache_columns=longest)
    layers = chunked_decode.unstack(params, config=game.model)
    decode = chunked_decode.decode_chunk.lower(params, layers, prefix, rows, spec=spec).compile()
    return taken, kept(decode) + sum(x.nbytes for x in jax.tree.leaves((prefix, rows.cache)))


def phases(config: LlamaConfig, work: Work, rounds: int) -> dict[str, tuple[float, int]]:
    """Seconds and bytes of each phase."""
    params = jax.jit(partial(init_params, config))(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (work.queries, work.prompt), 0, config.vocab_size)
    (game, hyper), found = game_of(config, work), {}
    spec = game.learner
    found["rollout"] = rollout(params, prompts, game, rounds)
    batch = rows_of(prompts, work, config.vocab_size)
    reference = reference_logprobs.lower(params, batch, spec=spec).compile()
    references = reference(params, batch)
    found["reference"] = seconds(lambda: reference(params, batch), rounds), kept(reference)
    state = jax.jit(game.init_train_state)(params)
    program = update.lower(state, batch, references, hyper, spec=spec).compile()

    def step() -> Any:
        nonlocal state  # consumed
        state, metrics = program(state, batch, references, hyper)
        return metrics

    found["update"] = seconds(step, rounds), kept(program)
    return found


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of `values` in `sizes`: the straight line through their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def along(axis: str, rounds: int) -> dict[str, Any]:
    """All points of one axis, and each phase's exponents."""
    if axis == "model":
        points = [(float(parameters(config)), config, Work()) for config in LADDER]
    else:
        points = [(float(size), SMALL, Work()._replace(**{axis: size})) for size in AXES[axis]]
    sizes = [size for size, _, _ in points]
    counted, measured = [operations(config, work) for _, config, work in points], []
    for size, config, work in points:
        measured.append(phases(config, work, rounds))
        print(axis, f"{size:.0f}", measure.brief({name: value[0] for name, value in measured[-1].items()}), flush=True)
        jax.clear_caches()
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "sizes": sizes}
    for phase in PHASES:
        taken, held = ([point[phase][i] for point in measured] for i in (0, 1))
        needed = [count[phase] for count in counted]
        exponents = {"seconds": slope(sizes, taken), "operations": slope(sizes, needed), "bytes": slope(sizes, held)}
        found[phase] = {"seconds": taken, "operations": needed, "bytes": held, "exponents": exponents}
    return found


def table(found: dict[str, Any]) -> str:
    lines = [
        "| axis, measured | sizes | phase | seconds | MiB | exponent of seconds | of operations | of bytes | steeper |",
        "|---" * 9 + "|",
    ]
    for axis, entry in found.items():
        sizes = ", ".join(f"{size / 1e6:.0f} M" if axis == "model" else f"{size:.0f}" for size in entry["sizes"])
        for phase in PHASES:
            values, exponents = entry[phase], entry[phase]["exponents"]
            taken = ", ".join(f"{value:.3g}" for value in values["seconds"])
            held = ", ".join(f"{value / 2**20:.0f}" for value in values["bytes"])
            steeper = "yes" if exponents["seconds"] > exponents["operations"] + MARGIN else ""
            numbers = " | ".join(f"{exponents[name]:.2f}" for name in ("seconds", "operations", "bytes"))
            lines.append(f"| {axis}, {entry['date']} | {sizes} | {phase} | {taken} | {held} | {numbers} | {steeper} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", default=[*AXES, "model"], choices=[*AXES, "model"])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    file = measure.RESULTS / "scaling.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["axes"] if file.is_file() else {}
    found = earlier | {axis: along(axis, options.rounds) for axis in options.axes}
    measure.write("scaling", {"axes": found}, table(found))


if __name__ == "__main__":
    main()
