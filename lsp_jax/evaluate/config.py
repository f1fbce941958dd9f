"""The configuration of `lsp-jax evaluate`: models, tasks, judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lsp_jax.core.errors import InputError, one_of
from lsp_jax.core.files import check_writable, user_path
from lsp_jax.evaluate import tasks
from lsp_jax.evaluate.endpoint import EndpointConfig
from lsp_jax.model.sharding import MeshConfig
from lsp_jax.model.weights import check_dtype
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.policy import open_pretrained
from lsp_jax.reward.preference import open_reward_model

JUDGES = ("endpoint", "model", "reward_model")


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges the win rate."""

    kind: Literal["endpoint", "model", "reward_model"] = "endpoint"
    """endpoint: an OpenAI-compatible one; model: a chat model loaded here; reward_model: a Llama classifier."""
    source: str = ""
    """Directory or hub id of the model or reward model."""
    max_tokens: int = 256
    """Longest verdict of a model loaded here, in tokens."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The endpoint, where it judges."""

    def check(self) -> None:
        """Raises InputError naming the field; reads no weights and asks nobody."""
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
    """Evaluate runs and models on benchmarks, and against another model before a judge."""

    models: tuple[str, ...]
    """Folders of runs, directories of models, hub ids."""
    steps: tuple[str, ...] = ()
    """Checkpoints of the runs: iterations, or all; none: the newest."""
    tasks: tuple[str, ...] = ()
    """gsm8k, math, humaneval; each alone or with a local file, as in gsm8k=FILE.jsonl."""
    winrate_against: str = ""
    """The baseline: a run, a model, or a JSON file with outputs in AlpacaEval's form. Empty: no win rate."""
    instructions: str = ""
    """Instructions of the win rate: AlpacaEval's JSON; empty: that of `winrate_against`, where it is a file."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Who judges the win rate."""
    control: bool = True
    """Also judge the baseline against itself, drawn with another seed: its interval should hold a half."""
    output_dir: str = "evaluation"
    """Where answers, verdicts and results are kept; the same one again goes on."""
    temperature: float = 0.01
    """Of all answers; the paper's evaluations use 0.01."""
    num_samples: int = 1
    """Answers to each problem of a task."""
    pass_k: tuple[int, ...] = (1,)
    """The k of pass@k, with more than one answer a problem."""
    max_completion_length: int = 0
    """Longest answer in tokens; 0: what each task is known to need, and 1024 for the win rate."""
    limit: int = 0
    """The first so many problems of each task and instructions; 0: all."""
    batch_size: int = 32
    """Answers at one time."""
    seed: int = 0
    """Of the draws."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the parameters."""
    allow_code_execution: bool = False
    """Run the programs that models write (humaneval), in a sandbox."""
    compilation_cache: str = "~/.cache/lsp_jax"
    """Directory in which compiled programs are kept; empty: none."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices share the work."""

    def check(self) -> None:
        """Raises InputError naming the field; reads no weights and asks nobody."""
        if not self.models:
            raise InputError("models", self.models, "give at least one run or model")
        if not self.tasks and not self.winrate_against:
            raise InputError("tasks", self.tasks, "give tasks, --winrate-against, or both")
        if "humaneval" in tasks.named(self.tasks) and not self.allow_code_execution:
            remedy = "runs programs that a model wrote: allow it with --allow-code-execution (they run in a sandbox)"
            raise InputError("tasks", "humaneval", remedy)
        for name, least in (("num_samples", 1), ("max_completion_length", 0), ("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"must be at least {least}")
        if not 0 <= self.seed < 2**32 - 1:
            raise InputError("seed", self.seed, "must be in 0 .. 2**32 - 2")
        if not self.pass_k or not all(1 <= k <= self.num_samples for k in self.pass_k):
            raise InputError("pass_k", self.pass_k, f"must be from 1 to num_samples ({self.num_samples})")
        if self.num_samples > 1 and not self.temperature > 0:
            raise InputError("temperature", self.temperature, "several greedy answers are one: give more than 0")
        SamplingConfig(self.temperature).check("sampling")
        check_dtype(self.dtype)
        if self.winrate_against:
            self.judge.check()
        if self.winrate_against and not self.instructions and not self.baseline_is_file:
            raise InputError("instructions", "", "give AlpacaEval's JSON file, or a baseline that is one with outputs")
        check_writable("output_dir", user_path("output_dir", self.output_dir))

    @property
    def baseline_is_file(self) -> bool:
        """Whether the baseline is a file of outputs, not a model."""
        return user_path("winrate_against", self.winrate_against).is_file()
