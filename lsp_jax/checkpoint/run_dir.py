"""The folder of a run: file names, checks before writing, initialisation, saved checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsp_jax import config as configs
from lsp_jax.checkpoint.manager import Checkpoints
from lsp_jax.checkpoint.provenance import MANIFEST
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import check_writable, user_path, write_text
from lsp_jax.policy import Policy, check_replaceable
from lsp_jax.text.chat_template import today

METRICS_FILE, TRANSCRIPTS_FILE, CHECKSUMS_FILE = "metrics.jsonl", "transcripts.jsonl", "checksums.jsonl"
ALARMS_FILE = "alarms.jsonl"
FILES = METRICS_FILE, TRANSCRIPTS_FILE, CHECKSUMS_FILE, ALARMS_FILE
CHECKPOINTS, BASE, EXPORT, PROFILE = "checkpoints", "base", "export", "profile"
REPORT = "report.html"
_RUN_FILES = ("config.json", *FILES, CHECKPOINTS, EXPORT)


# --- this run's folder -------------------------------------------------------------------------------------------


def check_output(config: TrainConfig, directory: Path) -> None:
    """Raises InputError if the folder is not writable, holds another run, or lacks the run to resume."""
    if directory.exists() and not directory.is_dir():
        raise InputError("output_dir", config.output_dir, "is a file; give a directory")
    check_writable("output_dir", directory)
    check_replaceable(directory / EXPORT)
    found = [name for name in _RUN_FILES if (directory / name).exists()]
    if config.resume == "never" and found:
        raise InputError(
            "output_dir",
            config.output_dir,
            f"holds another run ({found[0]}); give a new directory, or --resume auto to continue that run",
        )
    if config.resume == "must" and not saved_steps(directory):
        raise InputError("resume", "must", f"no checkpoint in {directory / CHECKPOINTS}; use auto or never to start")
    if found and "config.json" not in found:
        raise InputError("output_dir", config.output_dir, f"holds {found[0]} but no config.json; give a new directory")
    if "config.json" in found:
        changed = configs.differences(TrainConfig.load(directory / "config.json"), config)
        if changed:
            raise InputError(
                "resume",
                config.resume,
                f"the run in {directory} was started with another {', '.join(changed)}; "
                "use the same values or a new output_dir",
            )


def resolve_run_constants(config: TrainConfig, directory: Path) -> TrainConfig:
    """Fills in the fields that stay constant in a run: the date in chat templates, and the initial checkpoint.

    Unless set in `config`, they are those of the resumed run, else today's date and the newest checkpoint of
    `init_from`.
    """
    saved = directory / "config.json"
    earlier = TrainConfig.load(saved) if config.resume != "never" and saved.is_file() else None
    date, step = config.date, config.init_step
    if earlier is not None:
        date = date or earlier.date
        if config.init_from == earlier.init_from:
            step = step or earlier.init_step
    if config.init_from:
        step = checked_step(user_path("init_from", config.init_from), step or None, "init_step")
    return replace(config, date=date or today(), init_step=step)


def init_run_dir(directory: Path, config: TrainConfig, policy: Policy, identity: Mapping[str, Any]) -> None:
    """Creates the run's folder with its configuration and, the first time, its manifest (`identity`).

    The base model's configuration and tokenizer are copied there, so that an export needs only the run's folder.
    """
    base = directory / BASE
    base.mkdir(parents=True, exist_ok=True)
    files = {"config.json": config.to_json()}
    if not (directory / MANIFEST).exists():
        started_with = {name: value for name, value in identity.items() if name != "config"}
        files = {MANIFEST: json.dumps(started_with, indent=2) + "\n", **files}
    for name, text in files.items():
        write_text(directory / name, text)  # atomic: without a configuration the run cannot be resumed
    hf_config = json.dumps(policy.config.to_hf(), indent=2) + "\n"
    (base / "config.json").write_text(hf_config, encoding="utf-8")
    policy.tokenizer.save(base)


# --- checkpoints in a run's folder ---------------------------------------------------------------------------------


def checked_step(run: Path, step: int | None, field: str) -> int:
    """Returns `step`, by default the newest checkpoint; InputError if there is no run or no such checkpoint."""
    TrainConfig.load(run / "config.json")
    saved = saved_steps(run)
    if not saved or (step is not None and step not in saved):
        raise InputError(field, step, f"{run} has checkpoints {saved or 'none'}; give one of them or none")
    return max(saved) if step is None else step


def saved_steps(run: Path) -> list[int]:
    """Returns the iterations of a run's checkpoints, oldest first."""
    checkpoints = Checkpoints(run / CHECKPOINTS)
    try:
        return checkpoints.steps()
    finally:
        checkpoints.close()
