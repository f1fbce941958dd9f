"""HTML report of one run, or of several side by side: curves, queries and answers, alarms, times, settings.

The single file needs no network. Model text is embedded as JSON and inserted into the page only as text.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lsp_jax.checkpoint.provenance import MANIFEST
from lsp_jax.checkpoint.run_dir import ALARMS_FILE, METRICS_FILE, REPORT, TRANSCRIPTS_FILE
from lsp_jax.config import TrainConfig, flat, flatten
from lsp_jax.core import console
from lsp_jax.core.errors import InputError, one_line
from lsp_jax.core.files import check_writable, read_json_object, read_jsonl, user_path, write_text
from lsp_jax.monitor.hooks import Event, StepRecord
from lsp_jax.reporting.metrics import PHASES, describe

PAGE = Path(__file__).parent / "page"
MOST_POINTS = 1000
"""Maximum number of points of a curve."""
SHOWN_ITERATIONS, SHOWN_QUERIES, SHOWN_CHARACTERS, SHOWN_REPEATS = 24, 4, 2000, 20
"""Limits of the page: iterations with queries, queries per iteration, characters per text, repeated queries."""
BREAK = 50
"""Time between two reports of a live run, as a multiple of the time that writing one takes."""

CHARTS = (
    ("Reward", "solver/reward", "challenger/reward"),
    ("Reward components", "rewards/<name>/mean"),
    ("KL to the reference", "solver/kl", "challenger/kl"),
    ("Entropy, nats per token", "solver/entropy", "challenger/entropy"),
    ("Length, tokens", "solver/completions/mean_length", "challenger/completions/mean_length"),
    ("Truncated completions", "solver/completions/clipped_ratio", "challenger/completions/clipped_ratio"),
    ("Queries", "queries/valid_fraction", "queries/unique_fraction", "queries/near_duplicate_fraction"),
    ("Diversity of queries", "queries/cluster_entropy", "queries/distinct_1", "queries/distinct_2"),
    ("Value of queries", "queries/value/min", "queries/value/median", "queries/value/max"),
    ("Groups with equal rewards", "solver/frac_reward_zero_std", "resampled_fraction"),
    ("Valid answers", "answers/valid_fraction", "answers/tag_fraction", "queries/leak_fraction"),
    ("Learner vs. sampler", "sampling/token_mult_prob_error"),
    ("Gradient norm", "grad_norm"),
    ("Probe vs. reference", "probe/gain"),
    ("Tokens per second", "tokens_per_second"),
    ("Fraction of the hardware limit", *(f"limit/{phase}" for phase in PHASES)),
)
"""Default curves of a report: title and metrics; metrics that no run has are omitted."""


# --- the data of a run --------------------------------------------------------------------------------------------


def collect(run: Path) -> dict[str, Any]:
    """Returns the data of a report on a run, which may still be running, as JSON types.

    Raises InputError if there is no run, or one of its files cannot be read.
    """
    config = TrainConfig.load(run / "config.json")
    lines = list(_lines(run / METRICS_FILE))
    manifest = run / MANIFEST
    started = read_json_object(manifest, "restore the file", "run") if manifest.is_file() else {}
    queries, repeated = _queries(run, lines[-1]["iteration"] if lines else 0)
    return {
        "name": run.resolve().name,
        "facts": _facts(config, lines),
        "metrics": _columns(lines),
        "alarms": list(_lines(run / ALARMS_FILE)),
        "queries": queries,
        "repeated": repeated,
        "config": {name: json.dumps(value) for name, value in flat(config).items()},
        "started": {name: str(value) for name, value in flatten(started).items()},
    }


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a file that a run may be writing."""
    return read_jsonl(path, skip="torn")


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Returns metrics by name, of at most MOST_POINTS evenly spaced iterations including the last.

    Metrics that most iterations lack (the probe's) are thinned separately, or evenly spaced iterations might miss them.
    """
    common = Counter(name for line in lines for name in line)
    rare = {name for name, number in common.items() if 2 * number < len(lines)}
    special = [number for number, line in enumerate(lines) if not rare.isdisjoint(line)]
    kept = [lines[number] for number in sorted({*_spaced(range(len(lines))), *_spaced(special)})]
    return {name: [line.get(name) for line in kept] for name in dict.fromkeys(name for line in kept for name in line)}


def _spaced(numbers: Sequence[int]) -> Sequence[int]:
    """Returns at most MOST_POINTS evenly spaced elements, including the last."""
    step = -(-len(numbers) // MOST_POINTS) or 1
    return numbers[(len(numbers) - 1) % step :: step] if numbers else numbers


def _facts(config: TrainConfig, lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns summary figures of the run as (label, text): means over its first and last tenth, totals."""
    facts = [("model", config.model or config.init_from), ("iterations", f"{len(lines)} of {config.max_steps}")]
    width = max(len(lines) // 10, 1)
    for label, name in (
        ("Solver's reward", "solver/reward"),
        ("Challenger's reward", "challenger/reward"),
        ("valid queries", "queries/valid_fraction"),
        ("KL", "solver/kl"),
    ):
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            first, last = (sum(part) / len(part) for part in (values[:width], values[-width:]))
            facts.append((label, f"{first:.3g} → {last:.3g}"))
    seconds, tokens = (sum(line.get(name) or 0 for line in lines) for name in ("time/iteration", "completions/tokens"))
    return [*facts, ("tokens sampled", f"{tokens:,.0f}"), ("hours", f"{seconds / 3600:.2f}")]


def _queries(run: Path, last: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns truncated transcripts of iterations spread over the run, and the most frequent repeated queries."""
    places = max(SHOWN_ITERATIONS - 1, 1)
    wanted = {round(1 + place * (last - 1) / places) for place in range(places + 1)}
    shown, asked = [], {}
    for record in _lines(run / TRANSCRIPTS_FILE):
        entry = asked.setdefault(record["query"], {"count": 0, "first": record["iteration"]})
        entry["count"], entry["last"] = entry["count"] + 1, record["iteration"]
        if record["iteration"] in wanted and record["index"] < SHOWN_QUERIES:
            shown.append(_cut(record))
    for record in shown:
        record["asked"] = asked[record.pop("key")]["count"]
    often = sorted(asked.items(), key=lambda item: -item[1]["count"])[:SHOWN_REPEATS]
    return shown, [{"query": query[:SHOWN_CHARACTERS], **entry} for query, entry in often if entry["count"] > 1]


def _cut(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with long texts truncated; `key` is the full query."""
    answers = [{**answer, "text": answer["text"][:SHOWN_CHARACTERS]} for answer in record["answers"]]
    return {**record, "query": record["query"][:SHOWN_CHARACTERS], "answers": answers, "key": record["query"]}


# --- the page -------------------------------------------------------------------------------------------------------


def _charts(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns title and metrics of each curve, omitting metrics that no run has."""
    there = dict.fromkeys(name for run in runs for name in run["metrics"])

    def matching(name: str) -> list[str]:
        pattern = re.compile(re.sub(r"<\w+>", "[^/]+", name))
        return [found for found in there if pattern.fullmatch(found)]

    charts = [{"title": title, "metrics": [m for name in names for m in matching(name)]} for title, *names in CHARTS]
    return [chart for chart in charts if chart["metrics"]]


def page(runs: Sequence[Path]) -> str:
    """Returns the report of the runs in those folders as HTML."""
    collected = [collect(run) for run in runs]
    names = [run["name"] for run in collected]
    for run, path in zip(collected, runs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(path)
    meanings = {name: _meaning(name) for run in collected for name in run["metrics"]}
    data = {"runs": collected, "charts": _charts(collected), "meanings": meanings, "phases": PHASES}
    parts = {
        "title": html.escape(", ".join(run["name"] for run in collected)),
        "style": (PAGE / "page.css").read_text(encoding="utf-8"),
        "plotly": _plotly(),
        "data": _embedded(data),
        "script": (PAGE / "page.js").read_text(encoding="utf-8"),
    }
    # a single pass, so that inserted text is never treated as a template
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _meaning(name: str) -> str:
    """Returns the definition of a metric; runs of earlier versions may have metrics that no longer exist."""
    try:
        return describe(name)
    except KeyError:
        return "not a metric of this version"


@cache
def _plotly() -> str:
    """Returns Plotly's script from its package (`plotly.offline` has it too, after a second of imports)."""
    script = importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    return script.read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """Returns JSON that contains no markup, so that it cannot close or open an HTML element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_report(runs: Sequence[str | Path], output: str | Path = "") -> Path:
    """Writes the report of the runs in those folders and returns its path.

    Default `output`: `report.html` in the folder of a single run, `comparison.html` in the current directory for
    several. Raises InputError if a folder holds no run, or the file cannot be written.
    """
    if not runs:
        raise InputError("runs", runs, "give the folder of at least one run")
    folders = [user_path("run", run) for run in runs]
    file = user_path("output", output) if output else folders[0] / REPORT if len(runs) == 1 else Path("comparison.html")
    if file.is_dir():
        raise InputError("output", str(output), "is a directory; give the name of an HTML file")
    check_writable("output", file.parent)
    text = page(folders)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)  # atomic: a browser may reload it at any time
    return file


class LiveReport:
    """Hook that keeps the report of a running run up to date, in at most a fiftieth of the run's time."""

    def __init__(self, directory: Path):
        self._directory, self._due = directory, 0.0

    def after_step(self, record: StepRecord) -> Sequence[Event]:
        """Rewrites the report if it is due."""
        self.refresh()
        return ()

    def refresh(self, last: bool = False) -> None:
        """Rewrites the report if it is due, or in any case if `last`; a failure is only a warning."""
        start = time.perf_counter()
        if start < self._due and not last:
            return
        try:
            write_report([self._directory])
        except Exception as error:
            console.warn(f"report not written: {one_line(error)}")
        now = time.perf_counter()
        self._due = now + BREAK * (now - start)
