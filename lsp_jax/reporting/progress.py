"""Progress on the console: one line per iteration, and a progress bar on terminals."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

from lsp_jax.core.console import printable
from lsp_jax.monitor.hooks import Event, StepRecord
from lsp_jax.reporting.metrics import PHASES


def summary(metrics: Mapping[str, Any]) -> str:
    """Returns the main metrics of an iteration as one line; absent ones are omitted."""
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
    """Hook that prints one line per iteration with a sample; on a terminal it also shows a bar with the phase."""

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None):
        """`start` of `total` iterations are done; `stream` is standard error by default."""
        self._total, self._stream, self._first = total, stream or sys.stderr, start + 1
        self._bar = None
        if self._stream.isatty():
            form = "{n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
            # fixed size, because terminals that report 0 columns and rows would not show the bar
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
        """Shows the phase that has begun on the bar; in the first iteration it is compiled before it runs."""
        if self._bar is not None:
            compiling = " (compiles first)" if self._bar.n < self._first else ""
            with suppress(OSError):  # the terminal is closed
                self._bar.set_postfix_str(name + compiling)

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Prints the iteration, and its first query with the first answer."""
        first = record.transcripts[0]
        with suppress(OSError):  # the terminal or pipe is closed
            self.step(record.iteration, record.metrics, (first["query"], first["answers"][0]["text"]))
        return ()

    def step(self, iteration: int, metrics: Mapping[str, Any], sample: tuple[str, str] | None = None) -> None:
        """Prints iteration `iteration` (from 1) and one sample (query, answer) of untrusted text."""
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
        """Removes the bar; printed lines stay."""
        if self._bar is not None:
            self._bar.close()
