"""Pages that mkdocs makes from the code: every field of the configuration, every metric."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from mkdocs.structure.files import File, Files

from lsp_jax.config import TrainConfig
from lsp_jax.evaluate.config import EvaluateConfig
from lsp_jax.reporting.metrics import METRICS


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs once it has found the pages that are written by hand."""
    for name, content in (("config", config_page()), ("metrics", metrics_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def config_page() -> str:
    parts = [
        "# Configuration",
        "As on the command line, with `--` before it; a run keeps all of them in `config.json`.",
    ]
    for title, settings in (("lsp-jax train", TrainConfig), ("lsp-jax evaluate", EvaluateConfig)):
        rows = [f"| `{name}` | {shown} | {meaning} |" for name, shown, meaning in fields(settings)]
        parts += [f"## {title}", "\n".join(["| field | default | meaning |", "|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def metrics_page() -> str:
    rows = [f"| `{name}` | {cell(meaning)} |" for name, meaning in METRICS.items()]
    intro = "A line of `metrics.jsonl` an iteration holds those that the run has; `<name>` stands for anything."
    return "\n".join(["# Metrics", "", intro, "", "| metric | meaning |", "|---|---|", *rows]) + "\n"


def fields(settings: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of every field, those of nested settings after one another."""
    meanings, types = docstrings(settings), get_type_hints(settings)
    for field in dataclasses.fields(settings):
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(kind := types[field.name]):
            yield from fields(kind, f"{name}.")  # type: ignore[arg-type]
            continue
        given = field.default if field.default is not dataclasses.MISSING else None
        shown = "required" if given is None and field.default_factory is dataclasses.MISSING else f"`{given!r}`"
        yield name, cell(shown), cell(meanings[field.name])


def docstrings(settings: type) -> dict[str, str]:
    """What stands below each field of a dataclass. Raises KeyError, later, for a field with nothing below it."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for above, below in zip(made.body, made.body[1:], strict=False):
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and isinstance(below, ast.Expr):
            found[above.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found


def cell(text: str) -> str:
    """For a table of Markdown: no bar, nothing taken for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
