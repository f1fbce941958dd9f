"""Models and checkpoints under evaluation, opened before any weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from lsp_jax.checkpoint.export import load_run_params, open_run
from lsp_jax.checkpoint.run_dir import CHECKPOINTS, saved_steps
from lsp_jax.config import TrainConfig
from lsp_jax.core.errors import InputError
from lsp_jax.core.files import user_path
from lsp_jax.model.llama import Params
from lsp_jax.model.sharding import shardings
from lsp_jax.model.weights import load_params
from lsp_jax.policy import Policy, open_pretrained

ALL = "all"
DATE = "26 Jul 2024"
"""Date in chat templates for models without a run, fixed so that prompts do not change from day to day."""


class Subject(NamedTuple):
    """A model, or the policy of a run at one checkpoint."""

    name: str
    opened: Policy
    """Configuration and tokenizer; `params` is empty."""
    place: Path
    """The model's directory, or the run's folder."""
    step: int | None
    """The checkpoint's iteration; None for a model."""

    @property
    def label(self) -> str:
        """Name in tables and files."""
        return self.name if self.step is None else f"{self.name}@{self.step}"

    def load(self, dtype: str, mesh: Mesh | None) -> Policy:
        """Loads the parameters in `dtype`, with the same sharding for every source, so that programs are shared."""
        params: Params
        if self.step is None:
            params = load_params(self.place, self.opened.config, dtype, mesh)
        else:
            params = load_run_params(self.place, self.step, dtype, mesh)
        return replace(self.opened, params=jax.device_put(params, shardings(params, mesh)))


def open_subjects(names: Sequence[str], steps: Sequence[str] = ()) -> list[Subject]:
    """Opens every model, and every run at each of `steps` (iterations or `all`; default: the newest checkpoint).

    Names are run folders, model directories or hub ids. Raises InputError for other names, for a missing checkpoint,
    and for steps without a run.
    """
    wanted = _numbers(steps)
    subjects: list[Subject] = []
    for name in names:
        folder = user_path("models", name)
        if not (folder / CHECKPOINTS).is_dir():
            directory, opened = open_pretrained(name)
            dated = replace(opened, tokenizer=opened.tokenizer.dated(DATE))
            subjects.append(Subject(name, dated, directory, None))
            continue
        opened, saved = open_run(folder), saved_steps(folder)
        opened = replace(opened, tokenizer=opened.tokenizer.dated(TrainConfig.load(folder / "config.json").date))
        absent = [step for step in wanted if step not in saved]
        if not saved or absent:
            remedy = f"{name} has checkpoints {saved or 'none'}; give some of them, {ALL}, or omit steps for the newest"
            raise InputError("steps", absent[0] if absent else None, remedy)
        chosen = wanted or (saved if ALL in steps else [max(saved)])
        subjects += [Subject(name, opened, folder, step) for step in chosen]
    if steps and all(subject.step is None for subject in subjects):
        raise InputError("steps", " ".join(steps), "only runs have checkpoints, and no run is given")
    labels = [subject.label for subject in subjects]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError("models", twice[0], "is given twice")
    return subjects


def _numbers(steps: Sequence[str]) -> list[int]:
    if ALL in steps:
        if len(steps) > 1:
            raise InputError("steps", " ".join(steps), f"give iterations, or only {ALL}")
        return []
    for step in steps:
        if not step.isascii() or not step.isdecimal() or len(step) > 9 or not int(step):
            raise InputError("steps", step, f"must be iterations of checkpoints, or {ALL}")
    return sorted({int(step) for step in steps})
