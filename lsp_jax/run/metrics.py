"""What a run writes about itself: `metrics.jsonl` and `transcripts.jsonl` always, trackers when asked, the console.

Every metric has its meaning in `METRICS`; one that is not there is not written.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from lsp_jax.errors import InputError, RunError, printable

PHASES = ("handover", "challenge", "solve", "reward", "reference", "update", "log")

_ROLE_METRICS = {
    "reward": "mean reward of the {role}, over what counts in its loss",
    "reward_std": "standard deviation of the {role}'s rewards over what counts in its loss",
    "loss": "the {role}'s part of the loss",
    "kl": "KL to the reference, k3's value per token whichever estimator is differentiated",
    "entropy": "entropy of the {role}'s distribution, nats per token",
    "clip_ratio/low": "fraction of the {role}'s tokens whose ratio is below the clip range and whose advantage is < 0",
    "clip_ratio/high": "fraction of the {role}'s tokens whose ratio is above the clip range and whose advantage is > 0",
    "kl_to_old": "KL of the policy that played to the current one, k3's value per token of the {role}",
    "importance_weight": "mean weight of truncated importance correction over the {role}'s tokens",
    "completions/mean_length": "mean tokens of a completion of the {role}, its stop token included",
    "completions/max_length": "tokens of the longest completion of the {role}",
    "completions/clipped_ratio": "fraction of the {role}'s completions cut off at the maximum length",
}

METRICS: dict[str, str] = {
    "iteration": "iterations done, this one included",
    **{
        f"{role}/{name}": text.format(role=role.capitalize())
        for role in ("challenger", "solver")
        for name, text in _ROLE_METRICS.items()
    },
    "solver/frac_reward_zero_std": "fraction of queries whose valid answers all got one reward: nothing to learn there",
    "solver/prompts/mean_length": "mean tokens of the Solver's prompts, chat template included",
    "queries/valid_fraction": "fraction of queries that ended by themselves, have text, leak no tag and are on task",
    "queries/unique_fraction": "distinct queries over all queries of the iteration",
    "queries/leak_fraction": "fraction of queries that hold a control token or a tag of the chat template",
    "queries/value/<share>": "V(q), the mean task reward of a query's answers: the least, quartiles and most of them",
    "queries/nearest_similarity": "mean over queries of the highest similarity to one that was asked before",
    "queries/near_duplicate_fraction": "fraction of queries as near to an earlier one as memory.near_duplicate",
    "queries/cluster_entropy": "entropy of the iteration's clusters of queries: 1 all apart, 0 all near one another",
    "queries/distinct_1": "different words over all words of the iteration's queries",
    "queries/distinct_2": "different pairs of neighbouring words over all pairs of the iteration's queries",
    "answers/tag_fraction": "fraction of answers that hold something like a tag",
    "attempt": "times that the run had gone back when the iteration was played (health)",
    "resampled_fraction": "fraction of queries played anew because their answers all got one reward",
    "rewards/task_quality_correlation": "Pearson's correlation of R and R_Q over answers in the Solver's loss",
    "probe/reward": "mean reward of the policy's answers to the probe's prompts (health.probe)",
    "probe/gain": "how much that is above the reference's, prompt by prompt",
    "probe/standard_error": "standard error of that gain over the prompts",
    "probe/declined": "1 where the last gain was below -2 standard errors",
    "time/probe": "seconds of the look at the probe",
    "challenger/paused": "1 while an alarm keeps the Challenger from learning (health)",
    "queries/copy_fraction": "fraction of queries that repeat eight words in a row of the Challenger's prompt",
    "answers/valid_fraction": "fraction of answers that every reward component could score",
    "rewards/<name>/mean": "mean of the component <name> before its weight, over answers in the Solver's loss",
    "rewards/<name>/std": "standard deviation of the component <name> before its weight, over the same answers",
    "rewards/<name>/failed_fraction": "fraction of answers that the component <name> could not score: masked",
    "rewards/<name>/correlation/<other>": "Pearson's correlation of two components over answers in the Solver's loss",
    "sampling/token_mult_prob_error": "mean over tokens of exp|learner - sampler log-probability|, the worse role's; "
    "1 is exact, above 1.05 is an alarm",
    "sampling/<role>/token_mult_prob_error": "the same for one role",
    "loss": "joint loss of both roles, minimised",
    "grad_norm": "global norm of the joint gradient before clipping",
    "skipped_updates": "updates skipped since the start because something in them was not finite",
    "not_finite/component": "0, or the place in `learn.finite.component_names` of the first that was not finite",
    "learning_rate": "step size of this update",
    "completions/tokens": "tokens sampled in this iteration by both roles",
    "tokens_per_second": "tokens sampled over the seconds of challenge and solve, prefill included",
    **{f"time/{phase}": f"seconds in the phase {phase}" for phase in PHASES},
    **{
        f"limit/{phase}": f"least time that the phase {phase} could take on these devices over its time: 1 is the limit"
        for phase in ("challenge", "solve", "reference", "update")
    },
    "time/iteration": "seconds of the iteration, without writing its lines and checkpoint",
    "handover/bytes": "bytes, on one device, of the parameters that play: cast and laid out anew before each iteration",
    "host_reads": "reads from device to host before the metrics; with compiled rewards one a chunk of decoding",
    "checkpoint/failed": "checkpoints since the start of this process that could not be written",
    "compile/count": "programs compiled since the start",
    "compile/seconds": "seconds spent compiling since the start",
}
"""Meaning of every metric by name; `<...>` in a name stands for anything."""

_PATTERNS = [
    (re.compile(re.sub(r"<(\w+)>", r"(?P<\1>.+)", name)), meaning) for name, meaning in METRICS.items() if "<" in name
]

METRICS_FILE, TRANSCRIPTS_FILE, CHECKSUMS_FILE = "metrics.jsonl", "transcripts.jsonl", "checksums.jsonl"
ALARMS_FILE = "alarms.jsonl"
FILES = METRICS_FILE, TRANSCRIPTS_FILE, CHECKSUMS_FILE, ALARMS_FILE
_TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # report_to -> package


def describe(name: str) -> str:
    """The meaning of a metric; raises KeyError when it is not in `METRICS`."""
    if name in METRICS and "<" not in name:
        return METRICS[name]
    for pattern, meaning in _PATTERNS:
        if match := pattern.fullmatch(name):
            return re.sub(r"<(\w+)>", lambda place: match.groupdict().get(place[1], place[0]), meaning)
    raise KeyError(f"{name!r} is not in lsp_jax.run.metrics.METRICS: add it there with its meaning")


def check_metric(name: str) -> None:
    """Raises InputError for the name of no metric; empty is none at all. (One of `<...>` may be absent in a run.)"""
    try:
        describe(name or "loss")
    except KeyError:
        raise InputError("metric_for_best_model", name, "no such metric: see metrics.jsonl of any run") from None


class MetricsWriter:
    """Appends to the files of a run's directory and to the trackers asked for. Make one in one process only."""

    def __init__(self, directory: str | Path, report_to: tuple[str, ...] = ()):
        """`report_to` holds any of "tensorboard", "wandb", "trackio"; each is imported only here.

        Raises:
            InputError: an unknown tracker, or one that is not installed.
        """
        self.directory: Path = Path(directory)
        modules = [(name, _import_tracker(name)) for name in report_to]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._trackers = [_open_tracker(name, module, self.directory) for name, module in modules]

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """One line of `metrics.jsonl`: numbers by name (Python's or numpy's), null for one that is not finite.

        Raises KeyError, with nothing written, for a name that is not in `METRICS`.
        """
        for name in metrics:
            describe(name)
        values = plain({"iteration": iteration, **metrics})
        self._append(METRICS_FILE, [values])
        for log, _ in self._trackers:
            log(iteration, {name: value for name, value in values.items() if value is not None})

    def write_transcripts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """One line of `transcripts.jsonl` a record, all of them in one write; arrays become lists."""
        self._append(TRANSCRIPTS_FILE, [plain(record) for record in records])

    def write_checksums(self, iteration: int, before: int, arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """One line of `checksums.jsonl`: each array's checksum as of `iteration`, and the checkpoint `before` that was
        on disk when its save began (0 for none)."""
        sums = {name: entry["checksum"] for name, entry in arrays.items()}
        self._append(CHECKSUMS_FILE, [{"iteration": iteration, "before": before, "arrays": sums}])

    def write_alarms(self, records: Iterable[Mapping[str, Any]]) -> None:
        """One line of `alarms.jsonl` a record."""
        self._append(ALARMS_FILE, [plain(record) for record in records])

    def returns(self, offset: int) -> list[dict[str, Any]]:
        """Alarms written after `offset` for which the run went back: that it did is not undone by going back again."""
        with (self.directory / ALARMS_FILE).open("rb") as file:
            file.seek(offset)
            return [record for record in map(json.loads, file) if "back_to" in record]

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        # ASCII: model text may hold characters that readers take for line ends
        lines = "".join(json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n" for record in records)
        try:
            with (self.directory / name).open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            raise RunError(f"{self.directory / name} could not be written: {error}") from error

    def offsets(self) -> dict[str, int]:
        """Bytes in each file, on disk for good: what a checkpoint keeps for `cut_back`."""
        sizes = {}
        for name in FILES:
            with (self.directory / name).open("ab") as file:
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        return sizes

    def existing(self) -> list[str]:
        """The names of those files that are there."""
        return [name for name in FILES if (self.directory / name).is_file()]

    def cut_back(self, offsets: Mapping[str, int]) -> None:
        """Truncates the files to `offsets`, so that a resumed run goes on where its checkpoint was taken.

        Raises:
            InputError: a file is missing or shorter than its offset, or the offset is not the end of a line; then
                none is touched.
        """
        for name, offset in offsets.items():
            path = self.directory / name
            if not path.is_file():
                raise InputError(name, str(self.directory), "is missing; restore it, or start in an empty directory")
            with path.open("rb") as file:
                file.seek(max(offset - 1, 0))
                end = file.read(1)
            if offset > 0 and end != b"\n":
                remedy = f"does not have the {offset} bytes of whole lines that the checkpoint saw; restore the file"
                raise InputError(name, f"{path.stat().st_size} bytes", remedy)
        for name, offset in offsets.items():
            os.truncate(self.directory / name, offset)

    def close(self) -> None:
        """Closes the trackers; the files are closed after each line."""
        for _, finish in self._trackers:
            finish()
        self._trackers = []


def plain(value: Any) -> Any:
    """Python's own types, None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def check_trackers(report_to: tuple[str, ...]) -> None:
    """Raises InputError for an unknown tracker, or one that is not installed."""
    for name in report_to:
        _import_tracker(name)


def _import_tracker(name: str) -> Any:
    if name not in _TRACKERS:
        raise InputError("report_to", name, f"must be among {', '.join(_TRACKERS)}")
    try:
        return importlib.import_module(_TRACKERS[name])
    except ImportError as error:
        raise InputError("report_to", name, f"is not installed; run pip install {_TRACKERS[name]}") from error


_Log = Callable[[int, dict[str, Any]], None]


def _open_tracker(name: str, module: Any, directory: Path) -> tuple[_Log, Callable[[], None]]:
    """How to log to a tracker, and how to close it."""
    if name == "tensorboard":
        board = module.SummaryWriter(logdir=str(directory / "tensorboard"))

        def scalars(iteration: int, values: dict[str, Any]) -> None:
            for key, value in values.items():
                board.add_scalar(key, value, iteration)
            board.flush()

        return scalars, board.close
    module.init(project="lsp_jax", name=directory.name)  # wandb, and trackio has its interface
    if name == "trackio":
        return lambda iteration, values: module.log(values, step=iteration), module.finish
    # wandb's own step may only rise, and a run that went back to a checkpoint plays iterations again
    module.define_metric("iteration")
    module.define_metric("*", step_metric="iteration")
    return lambda iteration, values: module.log(values), module.finish


def summary(metrics: Mapping[str, Any]) -> str:
    """The numbers of one iteration on one line; those that are absent are left out."""
    shown = (
        ("solver/reward", "solver {:+.3f}"),
        ("challenger/reward", "challenger {:+.3f}"),
        ("queries/valid_fraction", "valid {:.2f}"),
        ("solver/kl", "kl {:.4f}"),
        ("tokens_per_second", "{:.0f} tok/s"),
        ("time/iteration", "{:.1f}s"),
    )
    parts = [form.format(float(metrics[name])) for name, form in shown if name in metrics]
    phases = [f"{phase} {float(metrics[f'time/{phase}']):.1f}" for phase in PHASES if f"time/{phase}" in metrics]
    return "  ".join(parts) + (f" ({', '.join(phases)})" if phases else "")


class Console:
    """Progress of a run: a line an iteration with a sample of the play; on a terminal a bar with the phase below."""

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None):
        """`total` iterations of which `start` are done; `stream` is standard error unless given."""
        self._total, self._stream, self._first = total, stream or sys.stderr, start + 1
        self._bar = None
        if self._stream.isatty():
            form = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
            # a fixed size: terminals that say they have 0 columns and rows would not show the bar
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                ncols=72,
                nrows=20,
                bar_format=form,
                mininterval=0,
                leave=False,
            )

    def phase(self, name: str) -> None:
        """Shows on the bar which phase has begun; those of the first iteration are compiled before they run."""
        if self._bar is not None:
            compiling = " (compiles first)" if self._bar.n < self._first else ""
            self._bar.set_postfix_str(name + compiling)

    def step(self, iteration: int, metrics: Mapping[str, Any], sample: tuple[str, str] | None = None) -> None:
        """Shows iteration number `iteration` (from 1) and one sample (query, answer), which may hold anything."""
        lines = [f"{iteration}/{self._total}  {summary(metrics)}"]
        if sample is not None:
            lines += [f"  Q {printable(sample[0], 100)}", f"  A {printable(sample[1], 150)}"]
        text = "\n".join(lines)
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)
            self._bar.update(iteration - self._bar.n)

    def close(self) -> None:
        """Takes the bar away; the lines stay."""
        if self._bar is not None:
            self._bar.close()
