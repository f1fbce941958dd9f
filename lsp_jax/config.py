"""The configuration of a run: one frozen dataclass composed of the configurations of its parts.

Every field is a command line option (`--play.num-generations 4`), a run's folder holds the configuration as
`config.json`, and notebooks build the same objects.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from lsp_jax.core.errors import InputError, one_of
from lsp_jax.core.processes import ProcessConfig
from lsp_jax.learn.losses import LossConfig
from lsp_jax.learn.novelty import MemoryConfig
from lsp_jax.learn.optimizer import OptimizerConfig
from lsp_jax.model.lora import LoraConfig
from lsp_jax.model.sharding import MeshConfig
from lsp_jax.monitor.health import HealthConfig
from lsp_jax.play.prompt_data import DataConfig
from lsp_jax.play.sampler import SamplingConfig
from lsp_jax.play.selfplay import PlayConfig
from lsp_jax.reward.config import RewardConfig
from lsp_jax.text.prompts import PromptConfig

RESUMES = ("never", "auto", "must")
REPORTERS = ("tensorboard", "wandb", "trackio")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainConfig:
    """A Language Self-Play run. Field names follow TRL where it has an equivalent."""

    model: str = ""
    """Directory of a Hugging Face Llama (safetensors), or a hub id."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty is its default branch."""
    init_from: str = ""
    """Folder of another run whose policy is both the initial policy and the reference; `model` is ignored."""
    init_step: int = 0
    """Checkpoint of `init_from` to use; 0: the newest when this run starts."""
    output_dir: str = "runs/lsp"
    """Output folder of the run; must not hold another run unless that is resumed."""
    max_steps: int = 100
    """Total number of iterations, including those before a resume."""
    save_steps: int = 50
    """Iterations between checkpoints; the last iteration is always saved."""
    save_total_limit: int = 2
    """Number of most recent checkpoints to keep."""
    metric_for_best_model: str = ""
    """Metric by which the best checkpoint is kept in addition, such as `solver/reward`; empty: only the most recent
    ones."""
    greater_is_better: bool = True
    """Whether larger values of that metric are better."""
    resume: Literal["never", "auto", "must"] = "never"
    """never: start a new run; auto: continue from the newest checkpoint if there is one; must: fail without one."""
    save_errors: Literal["stop", "go_on"] = "stop"
    """When a checkpoint cannot be written (disk full): stop: end the run; go_on: warn, count the failure and retry at
    the next save. Earlier checkpoints are kept."""
    preemption_notice: str = ""
    """Source of preemption notices: gce, aws, or a URL that returns TRUE on preemption. The run then saves and exits as
    on SIGTERM. Empty: signals only."""
    max_skipped: int = 10
    """Largest number of consecutive updates skipped for non-finite values; the run then ends and names their origin."""
    stop_timeout: float = 300.0
    """Seconds a run may take to save after SIGTERM or Ctrl-C; it then exits without saving."""
    progress_timeout: float = 7200.0
    """Seconds without progress (the start of a phase) after which the run exits and shows where it hangs; 0: never."""
    seed: int = 0
    """Random seed; runs with equal seeds are identical."""
    date: str = ""
    """Date shown by chat templates (Llama 3.1 and later), as `26 Jul 2024`; empty: the day the run starts."""
    report_to: tuple[str, ...] = ()
    """Additional trackers: tensorboard, wandb, trackio. JSONL files are always written."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the master parameters and optimizer moments."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of forward and backward passes; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    park_frozen: bool = False
    """Offload the reference and reward model to host memory while idle: less device memory, a few seconds per
    iteration. (Not for `text` judges and reward models with their own tokenizer.)"""
    compilation_cache: str = "~/.cache/lsp_jax"
    """Directory of the persistent compilation cache; empty: none. JAX_COMPILATION_CACHE_DIR in the environment takes
    precedence."""
    precompile: bool = False
    """Compile the decoding programs of all lengths before the first iteration instead of on first use."""
    profile: bool = False
    """Write a trace of the second iteration to `profile/` in the run's folder (for TensorBoard or Perfetto)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Device mesh."""
    processes: ProcessConfig = field(default_factory=ProcessConfig)
    """Processes of a multi-process run."""
    allow_code_execution: bool = False
    """Allow the code reward to run model-written programs, in a sandbox."""
    play: PlayConfig = field(default_factory=PlayConfig)
    """Rollout sizes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts from a data set in place of the Challenger (GRPO)."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Prompts of the roles, including the Challenger's task."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the Solver."""
    challenger_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the Challenger."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Reward components."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """Self-play monitors and their actions."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory of the Challenger's earlier queries."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Training objective."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and gradient computation."""

    def check(self) -> None:
        """Raises InputError naming the first invalid field; touches no file and no device."""
        if not self.model and not self.init_from:
            raise InputError("model", self.model, "give a Hugging Face Llama directory or a hub id")
        if self.init_step < 0 or (self.init_step and not self.init_from):
            raise InputError("init_step", self.init_step, "must be a checkpoint of init_from, or 0 for its newest")
        if not self.output_dir:
            raise InputError("output_dir", self.output_dir, "give a directory to write to")
        for name in ("max_steps", "save_steps", "save_total_limit", "max_skipped"):
            if getattr(self, name) < 1:
                raise InputError(name, getattr(self, name), "must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError("seed", self.seed, "must be in 0 .. 2**32 - 1")
        one_of("resume", self.resume, RESUMES)
        one_of("save_errors", self.save_errors, ("stop", "go_on"))
        if self.preemption_notice not in ("", "gce", "aws") and not _is_address(self.preemption_notice):
            raise InputError("preemption_notice", self.preemption_notice, "must be gce, aws or an http URL")
        if not 0 < self.stop_timeout < math.inf:
            raise InputError("stop_timeout", self.stop_timeout, "must be > 0 seconds and finite")
        if not 0 <= self.progress_timeout <= 1e7:
            raise InputError("progress_timeout", self.progress_timeout, "must be 0 (no limit) .. 1e7 seconds")
        one_of("param_dtype", self.param_dtype, DTYPES[:2])
        one_of("compute_dtype", self.compute_dtype, ("auto", *DTYPES[:2]))
        for reporter in self.report_to:
            one_of("report_to", reporter, REPORTERS)
        self.mesh.check()
        self.processes.check()
        self.reward.check()
        self.data.check()
        self.loss.check()
        self.lora.check()
        self.optimizer.check()
        self.play.check(trains_challenger=self.loss.alpha_challenger > 0)
        self.health.check()
        self.memory.check(self.play.num_queries)
        self.sampling.check("sampling", greedy=False)
        self.challenger_sampling.check("challenger_sampling", greedy=False)
        self._check_data()

    def _check_data(self) -> None:
        """Checks the settings that require prompts from data, and those that exclude them."""
        for name in ("maths", "code"):
            weight = getattr(self.reward, f"{name}_weight")
            if weight and not self.data.source:
                remedy = f"needs data.source: the {name} reward compares with the rows of the data set"
                raise InputError(f"reward.{name}_weight", weight, remedy)
        if self.reward.code_weight and not self.allow_code_execution:
            remedy = "runs model-written programs: allow that with --allow-code-execution"
            raise InputError("reward.code_weight", self.reward.code_weight, remedy)
        if self.data.source:
            if self.loss.alpha_challenger > 0:
                remedy = "must be 0 with data.source: the Challenger does not sample the queries, so it cannot learn"
                raise InputError("loss.alpha_challenger", self.loss.alpha_challenger, remedy)
            if self.prompts.query_prefix:
                raise InputError("prompts.query_prefix", self.prompts.query_prefix, "must be empty with data.source")

    def to_json(self) -> str:
        """Returns the complete configuration as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> TrainConfig:
        """Parses the output of `to_json`; InputError names an unknown field or a value of the wrong type."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, a number of too many digits, nested too deeply
            raise InputError(source, str(error), "must be a run's config.json") from error
        return _build(cls, data, source)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads the `config.json` of a run."""
        path = Path(path)
        if not path.is_file():
            raise InputError("config", str(path), "no such file: a run's folder holds config.json")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError("config", str(path), f"cannot be read ({error}); it must be UTF-8") from error
        return cls.from_json(text, str(path))


MAY_CHANGE = (
    *("output_dir", "max_steps", "save_steps", "save_total_limit", "resume", "report_to"),
    *("metric_for_best_model", "greater_is_better", "save_errors", "max_skipped"),
    *("preemption_notice", "stop_timeout", "progress_timeout"),
    *("park_frozen", "compilation_cache", "precompile", "profile", "mesh.data", "mesh.fsdp", "mesh.tensor"),
    *(f"processes.{field.name}" for field in dataclasses.fields(ProcessConfig)),
    *("optimizer.micro_batch_size", "optimizer.logprob_chunk", "optimizer.remat"),
    "play.decode_chunk",
    *(f"health.{field.name}" for field in dataclasses.fields(HealthConfig)),
    *("reward.judge_rows", "reward.preference_rows", "reward.workers", "reward.timeout", "reward.code_timeout"),
)
"""Fields that a resumed run may change: they do not affect what the next iteration computes. (Except that mesh and
memory settings change the rounding of sums, and time limits which answers are masked as too slow.)"""


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Returns the dotted names of the fields, other than MAY_CHANGE, in which two configurations differ."""
    left, right = flat(old), flat(new)
    return [name for name in left if left[name] != right[name] and name not in MAY_CHANGE]


def flat(config: TrainConfig) -> dict[str, Any]:
    """Returns every field by its dotted name."""
    return flatten(dataclasses.asdict(config))


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their dotted names."""
    values: dict[str, Any] = {}
    for name, value in data.items():
        values |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # the port is not a number
        return False


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(where, data, f"must be an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise InputError(f"{where}: {unknown[0]}", data[unknown[0]], f"is not a field of {cls.__name__}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast(type, hint), value, f"{where}: {name}")
        elif typing.get_origin(hint) is tuple:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise InputError(f"{where}: {name}", value, "must be a list of strings")
            values[name] = tuple(value)
        else:
            values[name] = _plain(hint, value, f"{where}: {name}")
    return cls(**values)


def _plain(hint: Any, value: Any, where: str) -> Any:
    kind = str if typing.get_origin(hint) is Literal else hint
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise InputError(where, value, "is out of the range of a float") from error
    if type(value) is not kind:
        raise InputError(where, value, f"must be of type {kind.__name__}")
    return value
