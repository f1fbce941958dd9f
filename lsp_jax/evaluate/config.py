"""The configuration of `lsp-jax evaluate`: models, tasks, judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lsp_jax.core import arguments
from lsp_jax.core.errors import InputError, one_of
from lsp_jax.core.files import check_writable, user_path
from lsp_jax.evaluate import tasks
from lsp_jax.evaluate.endpoint_config import EndpointConfig
from lsp_jax.model.sharding import MeshConfig
from lsp_jax.model.weights import check_dtype
from lsp_jax.play.sampler import GREEDY_BELOW, SamplingConfig
from lsp_jax.policy import open_pretrained
from lsp_jax.reward.preference import open_reward_model

JUDGES = ("endpoint", "model", "reward_model")


@dataclass(frozen=True)
class JudgeConfig:
    """Judge of the win rate."""

    kind: Literal["endpoint", "model", "reward_model"] = "endpoint"
    """endpoint: OpenAI-compatible; model: a chat model loaded locally; reward_model: a Llama classifier."""
    source: str = ""
    """Directory or hub id of the model or reward model."""
    max_tokens: int = 256
    """Maximum verdict length of a local chat model, in tokens."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """Settings of an endpoint judge."""

    def check(self) -> None:
        """Raises InputError naming the field; reads no weights and sends no requests."""
        one_of("judge.kind", self.kind, JUDGES)
        if self.kind == "endpoint":
            self.endpoint.check("judge.endpoint")
        elif not self.source:
            raise InputError("judge.source", self.source, f"give the directory or hub id of the {self.kind}")
        elif self.kind == "reward_model":
            open_reward_model(self.source)
        else:
            open_pretrained(self.source)
        if self.max_tokens < 1:
            raise InputError("judge.max_tokens", self.max_tokens, "must be at least 1 token")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate runs and models on benchmarks, and by win rate against another model."""

    models: tuple[str, ...]
    """Run folders, model directories or hub ids."""
    steps: tuple[str, ...] = ()
    """Checkpoints of the runs: iterations, or all; default: the newest."""
    tasks: tuple[str, ...] = ()
    """gsm8k, math, humaneval; each alone or with a local file, as in gsm8k=FILE.jsonl."""
    winrate_against: str = ""
    """Baseline of the win rate: a run, a model, or a JSON file with outputs in AlpacaEval's format; empty: none."""
    instructions: str = ""
    """Instructions of the win rate in AlpacaEval's JSON format; empty: those of `winrate_against` if it is a file."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Judge of the win rate."""
    control: bool = True
    """Also compare the baseline with itself, sampled with another seed: the interval should contain a half."""
    output_dir: str = "evaluation"
    """Output directory; answers and verdicts in it are cached and reused."""
    temperature: float = 0.01
    """Sampling temperature; the paper's evaluations use 0.01. 0, or anything below 1e-5, is greedy."""
    num_samples: int = 1
    """Answers per problem of a task."""
    pass_k: tuple[int, ...] = (1,)
    """Values of k for pass@k, with several answers per problem."""
    max_completion_length: int = 0
    """Maximum answer length in tokens; 0: the default of each task, and 1024 for the win rate."""
    limit: int = 0
    """Maximum number of problems per task and of instructions; 0: all."""
    batch_size: int = 32
    """Batch size in answers."""
    seed: int = 0
    """Random seed of sampling."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the parameters."""
    allow_code_execution: bool = False
    """Allow running model-written programs (humaneval), in a sandbox."""
    compilation_cache: str = "~/.cache/lsp_jax"
    """Directory of the persistent compilation cache; empty: none."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Device mesh."""

    def check(self) -> None:
        """Raises InputError naming the field; reads no weights and sends no requests."""
        if (plain := arguments.plain(self)) is not self:
            plain.check()
            return
        if not self.models:
            raise InputError("models", self.models, "give at least one run or model")
        if not self.tasks and not self.winrate_against:
            raise InputError("tasks", self.tasks, "give tasks, --winrate-against, or both")
        if "humaneval" in tasks.named(self.tasks) and not self.allow_code_execution:
            remedy = "runs model-written programs: allow that with --allow-code-execution (in a sandbox)"
            raise InputError("tasks", "humaneval", remedy)
        for name, least in (("num_samples", 1), ("max_completion_length", 0), ("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"must be at least {least}")
        if not 0 <= self.seed < 2**32 - 1:
            raise InputError("seed", self.seed, "must be in 0 .. 2**32 - 2")
        if not self.pass_k or not all(1 <= k <= self.num_samples for k in self.pass_k):
            raise InputError("pass_k", self.pass_k, f"must be in 1 .. num_samples ({self.num_samples})")
        SamplingConfig(self.temperature).check("sampling")
        if self.num_samples > 1 and SamplingConfig(self.temperature).greedy:
            remedy = f"must be at least {GREEDY_BELOW} with several samples: greedy answers are identical"
            raise InputError("temperature", self.temperature, remedy)
        check_dtype(self.dtype)
        if self.winrate_against:
            self.judge.check()
        if self.winrate_against and not self.instructions and not self.baseline_is_file:
            raise InputError(
                "instructions", "", "give AlpacaEval's JSON file, or such a file with outputs as the baseline"
            )
        check_writable("output_dir", user_path("output_dir", self.output_dir))

    @property
    def baseline_is_file(self) -> bool:
        """Whether the baseline is a file of outputs instead of a model."""
        return user_path("winrate_against", self.winrate_against).is_file()
