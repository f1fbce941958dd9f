"""The state that a run starts from: its newest intact checkpoint, or the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lsp_jax.checkpoint.host_state import HostState
from lsp_jax.checkpoint.manager import Checkpoints, Damaged, abstract
from lsp_jax.checkpoint.run_dir import CHECKSUMS_FILE
from lsp_jax.config import TrainConfig
from lsp_jax.core import console, processes
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import read_jsonl
from lsp_jax.learn.optimizer import TrainState
from lsp_jax.model.llama import Params
from lsp_jax.training.run import Run


def start_state(
    run: Run, params: Params, checkpoints: Checkpoints, provenance: dict[str, Any], before: int | None = None
) -> tuple[TrainState, HostState]:
    """Returns train state and host state of the newest intact checkpoint, or initial ones from `params`.

    The host state gets the `provenance` of this start. A damaged checkpoint is reported and set aside, except when only
    checkpoints `before` an iteration are considered. Raises InputError if there were checkpoints but none is intact (a
    run never silently starts from scratch), or if the run started from another model.
    """
    make = run.game.init_train_state
    steps = checkpoints.steps() if run.config.resume != "never" else []
    if before is None and run.config.resume != "never":
        checkpoints.clean()
    steps = [step for step in steps if before is None or step < before]
    remedy = "output_dir must lie on storage that all processes share"
    processes.check_same("checkpoint", {"newest": steps[-1] if steps else None}, remedy)
    wanted = abstract(run.mesh, make, params)
    for step in reversed(steps):
        try:
            state, host = checkpoints.restore(step, wanted)
        except Damaged as error:
            if before is not None:
                continue
            console.report_quarantined(step, str(error), checkpoints.set_aside(step))
            continue
        _check_same_run(run.config, host.provenance, provenance)
        return state, replace(host, provenance=provenance)
    if before is None and run.config.resume != "never":
        _check_none(run.directory, checkpoints)
    return jax.jit(make)(params), HostState(provenance=provenance)


def _check_none(directory: Path, checkpoints: Checkpoints) -> None:
    """Raises InputError if there was a checkpoint and none is left: each save records the previous checkpoint. (A first
    checkpoint that is lost before the second save goes unnoticed.)"""
    remedy = "put one back, or start in a new output_dir"
    if checkpoints.damaged.is_dir():
        raise InputError("checkpoint", str(checkpoints.damaged), f"none of the run's checkpoints is intact: {remedy}")
    kept = 0
    for line in read_jsonl(directory / CHECKSUMS_FILE, skip="invalid"):
        kept = line.get("before", kept)
    if kept:
        remedy = f"checkpoint {kept} existed, and none is left: {remedy}"
        raise InputError("checkpoint", str(checkpoints.directory), remedy)


def _check_same_run(config: TrainConfig, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises InputError where the model, its prompts or JAX's settings are not those that the run started with.

    Checkpoints of earlier versions record the model alone."""
    field, source = ("init_from" if config.init_from else "model"), here["reference"]["source"]
    began = f"those that the run started from ({saved['reference']['source']})"
    if saved["reference"]["digest"] != here["reference"]["digest"]:
        raise InputError(field, source, f"its parameters are not {began}: the reference must stay")
    if saved.get("prompts", here["prompts"]) != here["prompts"]:
        remedy = f"its tokenizer and chat template give other prompts than {began}: restore those files"
        raise InputError(field, source, remedy)
    for name, value in here["numerics"].items():
        before = saved.get("numerics", {}).get(name, value)
        if before != value:
            raise InputError(name, value, f"the run was started with {before}, and would not go on exactly: set it so")
