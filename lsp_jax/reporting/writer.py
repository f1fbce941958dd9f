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
    """Hook that appends to the JSONL files of a run and to trackers. Create it in one process only."""

    def __init__(self, directory: str | Path, report_to: tuple[str, ...] = ()):
        """Opens the trackers `report_to`: any of "tensorboard", "wandb", "trackio", imported only here.

        Raises:
            InputError: a tracker is unknown or not installed.
        """
        self.directory: Path = Path(directory)
        modules = [(name, _import_tracker(name)) for name in report_to]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._trackers = [_open_tracker(name, module, self.directory) for name, module in modules]

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Writes the iteration's metrics and transcripts."""
        self.write(record.iteration, record.metrics)
        self.write_transcripts(record.transcripts)
        self.write_alarms(())  # creates the file even if no alarm ever starts
        return ()

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`: Python or numpy numbers by name, non-finite ones as null.

        Raises KeyError, with nothing written, for a name that is not in `METRICS`.
        """
        for name in metrics:
            describe(name)
        values = plain({"iteration": iteration, **metrics})
        self._append(METRICS_FILE, [values])
        for log, _ in self._trackers:
            log(iteration, {name: value for name, value in values.items() if value is not None})

    def write_transcripts(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line per record to `transcripts.jsonl`, in a single write; arrays become lists."""
        self._append(TRANSCRIPTS_FILE, [plain(record) for record in records])

    def write_checksums(self, iteration: int, before: int, arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends one line to `checksums.jsonl`: each array's checksum as of `iteration`.

        `before` is the newest checkpoint on disk when the save began (0: none).
        """
        sums = {name: entry["checksum"] for name, entry in arrays.items()}
        self._append(CHECKSUMS_FILE, [{"iteration": iteration, "before": before, "arrays": sums}])

    def write_alarms(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line per record to `alarms.jsonl`."""
        self._append(ALARMS_FILE, [plain(record) for record in records])

    def rollback_records(self, offset: int) -> list[dict[str, Any]]:
        """Returns the alarms after byte `offset` that caused a rollback; a later rollback must not erase them."""
        return [record for record in read_jsonl(self.directory / ALARMS_FILE, offset=offset) if "back_to" in record]

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        # ASCII, because some readers split lines at Unicode characters that model text may contain
        lines = "".join(json.dumps(record, ensure_ascii=True, allow_nan=False) + "\n" for record in records)
        try:
            with (self.directory / name).open("ab") as file:
                file.write(lines.encode())
        except OSError as error:
            raise RunError(f"{self.directory / name} could not be written: {error}") from error

    def offsets(self) -> dict[str, int]:
        """Syncs the files and returns their sizes in bytes, which a checkpoint stores for `truncate_to`."""
        sizes = {}
        for name in FILES:
            with (self.directory / name).open("ab") as file:
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        return sizes

    def existing(self) -> list[str]:
        """Returns the names of those files that exist."""
        return [name for name in FILES if (self.directory / name).is_file()]

    def truncate_to(self, offsets: Mapping[str, int]) -> None:
        """Truncates the files to `offsets`, so that a resumed run continues from its checkpoint.

        Raises:
            InputError: a file is missing or shorter than its offset, or the offset is not the end of a line; no file is
                changed then.
        """
        for name, offset in offsets.items():
            path = self.directory / name
            if not path.is_file():
                raise InputError(name, str(self.directory), "is missing; restore it, or start in an empty directory")
            with path.open("rb") as file:
                file.seek(max(offset - 1, 0))
                end = file.read(1)
            if offset > 0 and end != b"\n":
                remedy = f"must have the {offset} bytes of complete lines before the checkpoint; restore it"
                raise InputError(name, f"{path.stat().st_size} bytes", remedy)
        for name, offset in offsets.items():
            os.truncate(self.directory / name, offset)

    def close(self) -> None:
        """Closes the trackers; the files are closed after each line."""
        for _, finish in self._trackers:
            finish()
        self._trackers = []


def plain(value: Any) -> Any:
    """Converts numpy values to Python types, and non-finite numbers to None."""
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
    """Raises InputError if a tracker is unknown or not installed."""
    for name in report_to:
        _import_tracker(name)


def _import_tracker(name: str) -> Any:
    if name not in _TRACKERS:
        raise InputError("report_to", name, f"must be one of {', '.join(_TRACKERS)}")
    try:
        return importlib.import_module(_TRACKERS[name])
    except ImportError as error:
        raise InputError("report_to", name, f"is not installed; run pip install {_TRACKERS[name]}") from error


_Log = Callable[[int, dict[str, Any]], None]


def _open_tracker(name: str, module: Any, directory: Path) -> tuple[_Log, Callable[[], None]]:
    """Opens a tracker; returns its functions to log an iteration and to close it."""
    if name == "tensorboard":
        board = module.SummaryWriter(logdir=str(directory / "tensorboard"))

        def scalars(iteration: int, values: dict[str, Any]) -> None:
            for key, value in values.items():
                board.add_scalar(key, value, iteration)
            board.flush()

        return scalars, board.close
    module.init(project="lsp_jax", name=directory.name)  # wandb or trackio, which has the same interface
    if name == "trackio":
        return lambda iteration, values: module.log(values, step=iteration), module.finish
    # wandb's own step must increase, but a run that was rolled back repeats iterations
    module.define_metric("iteration")
    module.define_metric("*", step_metric="iteration")
    return lambda iteration, values: module.log(values), module.finish
