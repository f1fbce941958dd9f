"""The floors of the house: nothing is imported upwards or in a circle, no file or function outgrows its room."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lsp_jax

PACKAGE = Path(lsp_jax.__file__).parent
FLOORS = (
    ("core",),
    ("text",),
    ("model",),
    ("policy", "learn"),
    ("monitor", "play"),
    ("reward",),
    ("config",),
    ("algorithm",),
    ("checkpoint", "perf", "presets"),
    ("reporting", "evaluate"),
    ("training",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items() if name != "lsp_jax"}


def imported(tree: ast.Module) -> Iterator[str]:
    """The package's modules that are imported anywhere in a file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lsp_jax":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if module in MODULES else node.module
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def room(module: str) -> str:
    return module.split(".")[1]


def upwards(trees: dict[str, ast.Module]) -> list[str]:
    """Imports of another room on the same floor or a higher one."""
    return [
        f"{module} imports {other}"
        for module, tree in trees.items()
        for other in imported(tree)
        if other != "lsp_jax" and room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]


def test_every_room_has_its_floor():
    assert {room(module) for module in TREES} == set(FLOOR)


def test_nothing_is_imported_upwards():
    assert upwards(TREES) == []


def test_an_import_upwards_is_found():
    trees = {
        "lsp_jax.core.files": ast.parse("def f():\n    from lsp_jax.training import loop"),
        "lsp_jax.reporting.writer": ast.parse("from lsp_jax.evaluate.tables import table"),
        "lsp_jax.training.loop": ast.parse("from lsp_jax.core import files"),
    }
    assert upwards(trees) == [
        "lsp_jax.core.files imports lsp_jax.training.loop",
        "lsp_jax.reporting.writer imports lsp_jax.evaluate.tables",
    ]


def test_no_circle():
    edges = {module: {other for other in imported(tree) if other in TREES} for module, tree in TREES.items()}
    list(TopologicalSorter(edges).static_order())  # raises CycleError with the circle
    edges["lsp_jax.core.errors"].add("lsp_jax.training.loop")
    with pytest.raises(CycleError):
        list(TopologicalSorter(edges).static_order())


def test_rooms_are_not_outgrown():
    long_files = [module for module, path in MODULES.items() if len(path.read_text("utf-8").splitlines()) > 350]
    functions = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno >= 60
    ]
    assert (long_files, functions) == ([], [])


MOST_PARAMETERS = 7


def crowded(trees: dict[str, ast.Module]) -> list[str]:
    """Functions of more than `MOST_PARAMETERS`; `self` and `cls` are not counted, `*args` and `**kwargs` once each."""
    found = []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                given = node.args
                names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                names = names[1:] if names[:1] in (["self"], ["cls"]) else names
                number = len(names) + (given.vararg is not None) + (given.kwarg is not None)
                if number > MOST_PARAMETERS:
                    found.append(f"{module}.{getattr(node, 'name', 'lambda')}: {number} parameters")
    return found


def test_no_function_takes_too_many_parameters():
    assert crowded(TREES) == []


def test_too_many_parameters_are_found():
    source = """
class A:
    def seven(self, a, b, c, d, e, f, g): ...
    def eight(self, a, b, c, d, /, e, f, *, g, h): ...
    @classmethod
    async def spread(cls, a, b, c, d, e, f, *args, **kwargs): ...
def outer():
    return lambda a, b, c, d, e, f, g, h: a
"""
    assert sorted(crowded({"m": ast.parse(source)})) == [
        "m.eight: 8 parameters",
        "m.lambda: 8 parameters",
        "m.spread: 8 parameters",
    ]
