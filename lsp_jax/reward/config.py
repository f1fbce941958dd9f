"""Which reward components a run has, and how they are mixed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lsp_jax.core.errors import InputError, one_of


@dataclass(frozen=True)
class RewardConfig:
    """Which components score an episode, and how they are mixed. A weight of 0 leaves a component out."""

    preference_model: str = ""
    """A Llama sequence classifier with one label (directory or hub id) that scores answers (kind task); empty: none."""
    preference_revision: str = ""
    """Branch, tag or commit of its hub id."""
    preference_weight: float = 1.0
    """Weight of its scores."""
    preference_rows: int = 16
    """Conversations that it reads at one time."""
    quality_weight: float = 1.0
    """The reference's quality score 0..7 (kind quality)."""
    quality_mode: Literal["logits", "text"] = "logits"
    """logits: seven yes/no probabilities from one prefill; text: the reference writes its score, as in the paper."""
    quality_max_length: int = 64
    """text: tokens that the judge may write for one answer; a verdict cut off there is a parse failure."""
    rubric: str = ""
    """A TOML file of seven criteria in place of ours (`lsp_jax/text/rubric.toml`); empty: ours."""
    judge_rows: int = 16
    """Answers that the quality judge reads at one time."""
    arithmetic_weight: float = 0.0
    """1 for the right final number of an arithmetic question, else 0 (kind task)."""
    maths_weight: float = 0.0
    """1 when the final answer equals the data's reference answer, else 0 (kind task); needs data and a sandbox."""
    code_weight: float = 0.0
    """1 when the answer's program passes the data's tests, else 0 (kind task); needs --allow-code-execution."""
    callable: str = ""
    """A Python function `package.module:function` or `file.py:function`, (queries, answers) -> rewards [N, G]."""
    callable_weight: float = 1.0
    """Weight of that function's rewards."""
    callable_kind: Literal["task", "quality"] = "task"
    """task: the Challenger gets it negated; quality: as it is."""
    workers: int = 2
    """Processes that score texts on the host."""
    timeout: float = 60.0
    """Seconds that one call of a host reward may take; what takes longer is masked."""
    code_timeout: float = 10.0
    """Seconds that one program may run; what takes longer has failed its tests."""
    standardize: tuple[str, ...] = ()
    """Names of components brought to mean 0 and standard deviation 1 over each iteration, before clipping."""
    clip: tuple[str, ...] = ()
    """Bounds of components before their weight, each as `name:lowest:highest`."""

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
        """`clip` by component; InputError for what is not `name:lowest:highest`."""
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
