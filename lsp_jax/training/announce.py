"""Console messages at the start and end of a run: its settings and its output files."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from lsp_jax.algorithm.spec import GameSpec
from lsp_jax.checkpoint.provenance import MANIFEST
from lsp_jax.checkpoint.run_dir import (
    ALARMS_FILE,
    BASE,
    CHECKPOINTS,
    CHECKSUMS_FILE,
    EXPORT,
    METRICS_FILE,
    REPORT,
    TRANSCRIPTS_FILE,
)
from lsp_jax.core import processes
from lsp_jax.core.console import printable
from lsp_jax.core.errors import InputError
from lsp_jax.model.lora import adapters_shape
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.training.doctor import Finding
from lsp_jax.training.run import Run

WRITTEN = {
    "config.json": "every setting of the run",
    MANIFEST: "versions at the start, and the source of the weights",
    METRICS_FILE: "one line per iteration",
    TRANSCRIPTS_FILE: "one line per query: its answers, R, R_Q, advantages, validity",
    ALARMS_FILE: "one line per start or end of an alarm",
    REPORT: "curves, queries and answers, alarms, times; open it in a browser",
    CHECKSUMS_FILE: "one line per checkpoint: the checksum of each array",
    f"{CHECKPOINTS}/": "checkpoints to resume from (--resume auto)",
    f"{BASE}/": "configuration and tokenizer of the base model",
    f"{EXPORT}/": "the trained policy as a Hugging Face directory",
}


def announce(run: Run, done: int) -> None:
    """Prints what will run, before the first long wait; `done` iterations are already complete."""
    config, play = run.config, run.config.play
    has_quality = any(reward.kind == "quality" for reward in run.rewards)
    method = "LSP" if config.loss.use_quality and has_quality else "LSP-Zero"
    if not run.game.trains_challenger:
        method = "Solver alone" if run.data is None else "GRPO on data"
    source = f"{config.init_from} (checkpoint {config.init_step})" if config.init_from else config.model
    print(
        f"{method}: {printable(source)}, {play.num_queries} queries x {play.num_generations} answers, "
        f"rewards {', '.join(reward.name for reward in run.rewards)}, "
        f"{jax.default_backend()} ({run.game.learner.compute_dtype}), {config.max_steps} iterations -> {run.directory}"
    )
    if run.mesh is not None:
        sizes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
        print(f"mesh: {sizes} ({run.mesh.size} devices, {jax.process_count()} processes)")
    if not config.optimizer.micro_batch_size:
        print(f"update: micro-batches of {run.game.learner.micro_batch_size} rows per device")
    if run.game.learner.lora.rank:
        print(_adapters(run))
    print(policy_in_the_loss(run.game))
    if run.data is not None:
        print(f"data: {len(run.data.rows)} prompts of {printable(config.data.source)}, {run.data.left_out} left out")
    if done >= config.max_steps:
        print(f"all {done} iterations are done: only the export is written again; raise --max-steps to continue")
    elif done:
        print(f"resuming after iteration {done}")
    elif config.resume == "auto":
        print("no checkpoint yet: starting from the model")
    if done < config.max_steps:
        cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        kept = f", kept in {printable(cache)} for the next start" if cache else ""
        print(f"the first iteration also compiles every program: one to several minutes{kept}", flush=True)


def _adapters(run: Run) -> str:
    """Describes the adapters, with the numbers of trained and of base parameters (the reference's)."""
    lora = run.game.learner.lora
    trees = adapters_shape(run.reference, lora), run.reference
    trained, base = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in trees)
    where = ", ".join(lora.targets)
    return (
        f"adapters of rank {lora.rank} on {where}: {trained / 1e6:.2f} of {base / 1e6:.0f} million parameters trained"
    )


def findings(found: Sequence[Finding]) -> None:
    """Prints the warnings among the findings of `examine`. Raises InputError at the first error."""
    for finding in found:
        if finding.level == "error":
            raise InputError(finding.check, finding.message, finding.remedy)
        if finding.level == "warning" and processes.is_writer():
            print(finding, flush=True)


def finish(run: Run) -> None:
    """Prints the names of the written files, with their contents."""
    print(f"wrote {run.directory}/")
    for name, meaning in WRITTEN.items():
        print(f"  {name:20} {meaning}")


def policy_in_the_loss(game: GameSpec) -> str:
    """Describes in one line from which distribution each role samples, and which one is the policy in the loss."""
    roles = [("Solver", game.solver.sampling)]
    if game.trains_challenger:
        roles.append(("Challenger", game.challenger.sampling))
    return "; ".join(f"{role}: {_policy_of(sampling)}" for role, sampling in roles)


def _policy_of(sampling: SamplingConfig) -> str:
    settings = [f"temperature {sampling.temperature:g}"]
    if sampling.top_k > 0:
        settings.append(f"top-k {sampling.top_k}")
    if sampling.top_p < 1:
        settings.append(f"top-p {sampling.top_p:g}")
    if sampling.min_p > 0:
        settings.append(f"min-p {sampling.min_p:g}")
    seen = "the same distribution" if sampling.temperature == 1 else "the tempered distribution"
    if sampling.truncates:
        seen = f"{'the whole' if sampling.temperature == 1 else 'the whole tempered'} distribution; kept mass stored"
    return f"{', '.join(settings)} (the loss sees {seen})"
