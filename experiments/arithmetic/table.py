"""Builds the study's table and figures from whatever result files there are: `python experiments/arithmetic/table.py`.

The table goes to standard output and into RESULTS.md between its two marks; the figures, which need matplotlib, beside
it as SVG. What is said around the table is written by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from problems import FAMILIES
from rows import ROWS

HERE = Path(__file__).parent
BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def results() -> list[dict[str, Any]]:
    """Result files in the order of the rows, then of their seeds."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (HERE / "results").glob("*.json")]
    return sorted(found, key=lambda result: (ROWS.index(result["row"]), result["seed"]))


def shown(score: dict[str, Any]) -> str:
    """Percent and its 95 % interval."""
    if not score["number"]:
        return ""
    return f"{100 * score['accuracy']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown: percent of held-out problems answered right."""
    base = next((result["text_logprob"] for result in found if result["row"] == "base"), None)
    head = ["row", "seed", "all", "one and two digits", *FAMILIES, "states a result", "played, %"]
    head += ["unplayed easy", "text", "iterations", "tokens", "minutes", "CPU"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in found:
        counted, stages = result["scores"], result.get("stages", [])
        text = "" if base is None else f"{100 * (1 - result['text_logprob'] / base):+.1f} %"
        cells = [result["row"], str(result["seed"]), shown(counted["all"]), shown(counted["easy"])]
        cells += [f"{100 * counted['families'][name]['accuracy']:.0f}" for name in FAMILIES]
        cells += [f"{100 * counted['states a result']['accuracy']:.0f}", f"{100 * counted['seen']:.0f}"]
        cells += [shown(counted["unseen easy"]), text]
        cells += [str(sum(stage["iterations"] for stage in stages)) if stages else ""]
        cells += [f"{sum(stage['tokens'] for stage in stages) / 1e3:.0f} k" if stages else ""]
        cells += [f"{sum(stage['train_seconds'] for stage in stages) / 60:.0f}" if stages else ""]
        cells += [result["machine"].split(",")[0]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(found: list[dict[str, Any]]) -> None:
    """`curves.svg`, the rows that the paper has too, and `ablations.svg`, LSP and what is left out of it or added."""
    trained = [result for result in found if result.get("stages")]
    paper = ("format", "grpo", "lsp_zero", "lsp", "grpo_then_lsp", "lsp_then_grpo")
    _figure("curves.svg", [result for result in trained if result["row"] in paper])
    _figure("ablations.svg", [result for result in trained if result["row"] == "lsp" or result["row"] not in paper])


def _figure(name: str, drawn: list[dict[str, Any]]) -> None:
    """Accuracy on the development problems, rewards of both roles, and the Challenger's difficulty, over iterations: a
    row has one colour, its second seed's line is dashed."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lsp_jax"  # the same file from the same results
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    colours = {row: f"C{number}" for number, row in enumerate(dict.fromkeys(result["row"] for result in drawn))}
    panels = {
        "development, easy families": lambda stage: (
            [point["iteration"] for point in stage["development"]],
            [point["easy"]["accuracy"] for point in stage["development"]],
        ),
        "Solver's reward": lambda stage: _curve(stage, "solver/reward"),
        "Challenger's reward": lambda stage: _curve(stage, "challenger/reward"),
        "digits of the Challenger's numbers": lambda stage: _difficulty(stage, "digits"),
        "carries a question": lambda stage: _difficulty(stage, "carries"),
        "sums among the questions": lambda stage: _difficulty(stage, "+"),
        "products among the questions": lambda stage: _difficulty(stage, "*"),
        "unlike questions": lambda stage: _difficulty(stage, "unique"),
    }
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8), layout="constrained")
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=True):
        for result in drawn:
            offset, xs, ys = 0, [], []
            for stage in result["stages"]:
                x, y = points(stage)
                xs, ys = xs + [offset + value for value in x], ys + y
                offset += stage["iterations"]
            if ys:
                style = {"color": colours[result["row"]], "linestyle": "--" if result["seed"] else "-"}
                axis.plot(xs, ys, label=f"{result['row']} {result['seed']}", **style)
        axis.set_title(title)
        axis.set_xlabel("iteration")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(HERE / name, metadata={"Date": None})
    pyplot.close(figure)


def _plays(stage: dict[str, Any]) -> bool:
    """Whether it has a Challenger."""
    return not stage["folder"].endswith(("grpo", "format"))


def _curve(stage: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    if name.startswith("challenger/") and not _plays(stage):
        return [], []
    values = stage["curves"].get(name, [])
    return _smooth([(n + 1, value) for n, value in enumerate(values) if value is not None])


def _difficulty(stage: dict[str, Any], name: str) -> tuple[list[int], list[float]]:
    return _smooth([(line["iteration"], line[name]) for line in stage["difficulty"]]) if _plays(stage) else ([], [])


def _smooth(points: list[tuple[int, float]], width: int = 5) -> tuple[list[int], list[float]]:
    """Means of the last few: 8 queries an iteration are noisy."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return xs, [sum(ys[max(0, n - width + 1) : n + 1]) / len(ys[max(0, n - width + 1) : n + 1]) for n in range(len(ys))]


def main() -> None:
    found = results()
    made = table(found)
    print(made)
    file = HERE / "RESULTS.md"
    if file.is_file():
        before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        file.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")
    try:
        figures(found)
    except ImportError:
        print("no figures: they need matplotlib")


if __name__ == "__main__":
    main()
