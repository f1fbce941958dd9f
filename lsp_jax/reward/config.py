"""Configuration of the reward components and of their combination."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lsp_jax.core.errors import InputError, one_of


@dataclass(frozen=True)
class RewardConfig:
    """Reward components and their combination. A weight of 0 disables a component."""

    preference_model: str = ""
    """Reward model: a Llama sequence classifier with one label, as a directory or hub id (kind task); empty: none."""
    preference_revision: str = ""
    """Branch, tag or commit of its hub id."""
    preference_weight: float = 1.0
    """Weight of the reward model's score."""
    preference_rows: int = 16
    """Batch size of the reward model, in conversations per device."""
    quality_weight: float = 1.0
    """Weight of the reference's quality score 0..7 (kind quality)."""
    quality_mode: Literal["logits", "text"] = "logits"
    """logits: seven yes/no probabilities from one prefill; text: the reference writes its score, as in the paper."""
    quality_max_length: int = 64
    """text: maximum length of the judge's completion in tokens; a truncated verdict is a parse failure."""
    rubric: str = ""
    """TOML file with seven criteria for the quality judge; empty: those of `lsp_jax/text/rubric.toml`."""
    judge_rows: int = 16
    """Batch size of the quality judge, in answers per device."""
    arithmetic_weight: float = 0.0
    """Weight of the arithmetic reward: 1 for the correct final number, else 0 (kind task)."""
    maths_weight: float = 0.0
    """Weight of the maths reward: 1 if the final answer equals the data's, else 0 (kind task); needs data and a
    sandbox."""
    code_weight: float = 0.0
    """Weight of the code reward: 1 if the program passes the data's tests, else 0 (kind task); needs
    --allow-code-execution."""
    callable: str = ""
    """Python function `package.module:function` or `file.py:function`: (queries, answers) -> rewards [N, G]."""
    callable_weight: float = 1.0
    """Weight of that function's rewards."""
    callable_kind: Literal["task", "quality"] = "task"
    """Kind of that function's rewards: task: negated for the Challenger; quality: not negated."""
    workers: int = 2
    """Worker processes that score texts on the host."""
    timeout: float = 60.0
    """Time limit of one call of a host reward, in seconds; answers that exceed it are masked."""
    code_timeout: float = 10.0
    """Time limit of one program, in seconds; programs that exceed it fail their tests."""
    standardize: tuple[str, ...] = ()
    """Components standardised to mean 0 and standard deviation 1 over each iteration, before clipping."""
    clip: tuple[str, ...] = ()
    """Clipping bounds of components before weighting, each as `name:lowest:highest`."""

    def check(self) -> None:
        """Raises InputError naming the field."""
        for name in ("preference", "quality", "arithmetic", "maths", "code", "callable"):
            if not math.isfinite(getattr(self, f"{name}_weight")):
                raise InputError(f"reward.{name}_weight", getattr(self, f"{name}_weight"), "must be a finite number")
        one_of("reward.callable_kind", self.callable_kind, ("task", "quality"))
        one_of("reward.quality_mode", self.quality_mode, ("logits", "text"))
        for name in ("preference_rows", "quality_max_length", "judge_rows", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"reward.{name}", getattr(self, name), "must be at least 1")
        for name in ("timeout", "code_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"reward.{name}", getattr(self, name), "must be > 0 seconds and finite")
        self.bounds()

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Parses `clip` by component; InputError for entries that are not `name:lowest:highest`."""
        bounds = {}
        for entry in self.clip:
            name, _, limits = entry.partition(":")
            try:
                low, high = map(float, limits.split(":"))
            except ValueError:
                low, high = 1.0, 0.0
            if not name or not low < high:
                raise InputError("reward.clip", entry, "must be name:lowest:highest, as in preference:-10:10")
            bounds[name] = (low, high)
        return bounds
