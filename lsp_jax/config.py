"""The configuration of a run: one frozen dataclass made of the parts' own.

The command line shows every field (`--play.num-generations 4`), a run's folder holds it as `config.json`, and a
notebook builds the same objects.
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
    """A run of Language Self-Play. Names as in TRL where it has them."""

    model: str = ""
    """Directory of a Hugging Face Llama (safetensors), or a hub id."""
    revision: str = ""
    """Branch, tag or commit of a hub id; empty is its default branch."""
    init_from: str = ""
    """Folder of another run: its policy is where this one starts, and this one's reference; `model` is not read."""
    init_step: int = 0
    """Checkpoint of `init_from` to take; 0: the newest when this run starts."""
    output_dir: str = "runs/lsp"
    """Where the run writes; must not hold another run unless it is resumed."""
    max_steps: int = 100
    """Iterations to run in all, a resumed run's earlier ones included."""
    save_steps: int = 50
    """Iterations between checkpoints; the last iteration is always saved."""
    save_total_limit: int = 2
    """Newest checkpoints kept."""
    metric_for_best_model: str = ""
    """A metric by which the best checkpoint so far is kept too, such as `solver/reward`; empty: only the newest. (As in
    TRL.)"""
    greater_is_better: bool = True
    """Whether more of that metric is better."""
    resume: Literal["never", "auto", "must"] = "never"
    """never: start a new run; auto: go on from the newest checkpoint if there is one; must: fail without one."""
    save_errors: Literal["stop", "go_on"] = "stop"
    """When a checkpoint cannot be written (a full disk): stop: end the run; go_on: say so, count it, and try again at
    the next one. Earlier checkpoints stay."""
    preemption_notice: str = ""
    """Where the machine says that it will be taken away: gce, aws, or an address that answers TRUE then. The run saves
    and ends as after SIGTERM. Empty: signals only."""
    max_skipped: int = 10
    """Iterations in a row whose updates may be skipped for what is not finite; then the run ends and names it."""
    stop_timeout: float = 300.0
    """Seconds in which a run that is asked to end (SIGTERM, Ctrl-C) must have saved; then it ends as it is."""
    progress_timeout: float = 7200.0
    """Seconds without any progress (a phase that begins) after which a run ends and shows where it hangs; 0: never."""
    seed: int = 0
    """Of all noise; the same seed twice gives the same run."""
    date: str = ""
    """Day that chat templates show (Llama 3.1 and later), as `26 Jul 2024`; empty: the day on which the run starts."""
    report_to: tuple[str, ...] = ()
    """Further reporters: tensorboard, wandb, trackio. JSONL files are always written."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of master parameters and moments."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of forward and backward passes; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    park_frozen: bool = False
    """Keep reference and reward model in host memory while they are not at work: fewer bytes on the devices, some
    seconds an iteration. (Not for judges in `text` mode and reward models with a tokenizer of their own.)"""
    compilation_cache: str = "~/.cache/lsp_jax"
    """Directory in which compiled programs are kept for the next start; empty: none. JAX_COMPILATION_CACHE_DIR in the
    environment comes before it."""
    precompile: bool = False
    """Compile what decoding may need for any lengths before the first iteration, not when it is first needed."""
    profile: bool = False
    """Write a trace of the second iteration to `profile/` in the run's folder (TensorBoard or Perfetto show it)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices share the work."""
    processes: ProcessConfig = field(default_factory=ProcessConfig)
    """The processes that run it together."""
    allow_code_execution: bool = False
    """Run the programs that the model writes, in a sandbox, for the code reward."""
    play: PlayConfig = field(default_factory=PlayConfig)
    """Sizes of an iteration."""
    data: DataConfig = field(default_factory=DataConfig)
    """Queries from a data set in the Challenger's place (GRPO)."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """The prompts: what the Challenger is asked for."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the Solver samples."""
    challenger_sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the Challenger samples."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The rewards: what an answer is worth."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """The monitors of self-play and their actions."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The memory of the Challenger's queries."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of all parameters."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How the parameters move."""

    def check(self) -> None:
        """Raises InputError naming the first field that cannot be used; touches no file and no device."""
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
            raise InputError("preemption_notice", self.preemption_notice, "must be gce, aws or an http address")
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
        """Checks the settings that need queries from data, and those that do not go with them."""
        for name in ("maths", "code"):
            weight = getattr(self.reward, f"{name}_weight")
            if weight and not self.data.source:
                remedy = f"needs data.source: the {name} reward compares with what the data set's rows hold"
                raise InputError(f"reward.{name}_weight", weight, remedy)
        if self.reward.code_weight and not self.allow_code_execution:
            remedy = "runs programs that the model writes: allow it with --allow-code-execution"
            raise InputError("reward.code_weight", self.reward.code_weight, remedy)
        if self.data.source:
            if self.loss.alpha_challenger > 0:
                remedy = "must be 0 with data: queries from a data set were not sampled, nothing trains the Challenger"
                raise InputError("loss.alpha_challenger", self.loss.alpha_challenger, remedy)
            if self.prompts.query_prefix:
                raise InputError("prompts.query_prefix", self.prompts.query_prefix, "must be empty with data")

    def to_json(self) -> str:
        """The configuration as JSON, every field."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "config.json") -> TrainConfig:
        """Reads what `to_json` wrote; InputError names an unknown field or a value of another type."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, a number of too many digits, nested too deep
            raise InputError(source, str(error), "must be a run's config.json") from error
        return _build(cls, data, source)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Reads a run's `config.json`."""
        path = Path(path)
        if not path.is_file():
            raise InputError("config", str(path), "no such file: a run's folder holds config.json")
        try:
            text = path.read_text(encoding="utf-8")
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
"""Fields that a resumed run may change: they do not decide what the next iteration computes. (Mesh and memory
settings change how sums round, time limits what is masked as too slow, no more.)"""


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Dotted names of the fields, other than MAY_CHANGE, in which two configurations differ."""
    left, right = flat(old), flat(new)
    return [name for name in left if left[name] != right[name] and name not in MAY_CHANGE]


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every field by its dotted name."""
    return _flat(dataclasses.asdict(config))


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in data.items():
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number
        return False


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(where, data, f"must be an object with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise InputError(f"{where}: {unknown[0]}", data[unknown[0]], f"{cls.__name__} has no such field")
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
            raise InputError(where, value, "is beyond what a float can hold") from error
    if type(value) is not kind:
        raise InputError(where, value, f"must be of type {kind.__name__}")
    return value
