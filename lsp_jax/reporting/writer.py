"""A run's JSONL files and trackers."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsp_jax.checkpoint.run_dir import ALARMS_FILE, CHECKSUMS_FILE, FILES, METRICS_FILE, TRANSCRIPTS_FILE
from lsp_jax.core.errors import InputError, RunError
from lsp_jax.core.files import read_jsonl
from lsp_jax.monitor.hooks import Event, StepRecord
from lsp_jax.reporting.metrics import describe

_TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # report_to -> package


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

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Writes the iteration's metrics and transcripts."""
        self.write(record.iteration, record.metrics)
        self.write_transcripts(record.transcripts)
        self.write_alarms(())  # the file is there from the first iteration on, also where none ever begins
        return ()

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

    def rollback_records(self, offset: int) -> list[dict[str, Any]]:
        """Alarms written after `offset` for which the run went back: that it did is not undone by going back again."""
        return [record for record in read_jsonl(self.directory / ALARMS_FILE, offset=offset) if "back_to" in record]

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        # ASCII: model text may hold characters that readers take for line ends
        lines = "".join(json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n" for record in records)
        try:
            with (self.directory / name).open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            raise RunError(f"{self.directory / name} could not be written: {error}") from error

    def offsets(self) -> dict[str, int]:
        """Bytes in each file, on disk for good: what a checkpoint keeps for `truncate_to`."""
        sizes = {}
        for name in FILES:
            with (self.directory / name).open("ab") as file:
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        return sizes

    def existing(self) -> list[str]:
        """The names of those files that are there."""
        return [name for name in FILES if (self.directory / name).is_file()]

    def truncate_to(self, offsets: Mapping[str, int]) -> None:
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
