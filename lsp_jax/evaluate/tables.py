"""Evaluation results as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lsp_jax.core.console import printable


def results_table(results: Mapping[str, Any]) -> str:
    """Returns the tables for `results`, as returned by `evaluate.runner.evaluate`."""
    parts = [_tasks(results["models"])] if any(entry["tasks"] for entry in results["models"]) else []
    if "winrate" in results:
        parts += _winrates(results["winrate"])
    return "\n\n".join(parts) + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(figure: Mapping[str, Any]) -> str:
    """Formats an interval in percent, as `62.5 (58.1 to 66.7)`."""
    if figure["value"] is None:
        return "-"
    value, low, high = (
        100 * figure[name] if figure[name] is not None else float("nan") for name in ("value", "low", "high")
    )
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _tasks(models: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for entry in models:
        for task, told in entry["tasks"].items():
            for metric in (name for name in told if name.startswith("pass@")):
                place = "" if entry["step"] is None else str(entry["step"])
                sizes = [str(told[metric]["number"]), str(told["ungraded"])]
                lengths = [f"{told['mean_tokens']:.0f}", f"{100 * told['cut_off']:.0f} %"]
                rows.append([printable(entry["name"]), place, task, metric, percent(told[metric]), *sizes, *lengths])
    head = ["model", "iteration", "task", "metric", "%, 95 % interval", "problems", "not graded", "tokens", "truncated"]
    return _rows(head, rows)


def _winrates(told: Mapping[str, Any]) -> list[str]:
    head = [
        "model",
        "win rate, %",
        "wins only, %",
        "at equal length, %",
        "win / tie / loss",
        "excluded",
        "malformed",
        "no reply",
    ]
    rows, subsets, biases = [], [], []
    for label, outcome in told["against"].items():
        label = printable(label)
        rates = [percent(outcome[name]) for name in ("win_rate", "wins_only", "length_controlled")]
        counts = " / ".join(str(outcome[name]) for name in ("wins", "ties", "losses"))
        rest = [str(outcome[name]) for name in ("left_out", "malformed", "failed")]
        rows.append([label, *rates, counts, *rest])
        for name, rate in outcome["subsets"].items():
            cells = [percent(rate["win_rate"]), percent(rate["length_controlled"]), str(rate["win_rate"]["number"])]
            subsets.append([label, printable(name), *cells])
        bias = outcome["position_bias"]
        shown = ["-" if bias[name] is None else f"{100 * bias[name]:.1f} %" for name in ("first", "consistent")]
        biases.append([label, *shown])
    who = f"Against {printable(told['baseline'])}, judged by {printable(told['judge'])} in both orders"
    parts = [f"{who}; {outcome['ties_count']}.", _rows(head, rows)]
    if subsets:
        parts.append(_rows(["model", "subset", "win rate, %", "at equal length, %", "instructions"], subsets))
    parts.append("Position bias of the judge (50 % and 100 % if unbiased):")
    parts.append(_rows(["model", "verdicts for the first answer", "the same winner in both orders"], biases))
    return parts
