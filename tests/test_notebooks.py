"""Notebooks: both halves of a pair say the same, and every cell runs, here on a tiny model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from child_run import QUICK
from tiny import tiny_dir

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FOLDER = Path(__file__).parents[1] / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def test_there_are_four() -> None:
    assert NAMES == ["quickstart", "resume_and_export", "rewards", "sharding"]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name}.ipynb)" in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_both_halves_of_a_pair_are_the_same(name: str) -> None:
    text, notebook = jupytext.read(FOLDER / f"{name}.py"), nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in half.cells] for half in (text, notebook)]
    assert cells[0] == cells[1], f"jupytext --to ipynb experiments/notebooks/{name}.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 4 and not any(cell.outputs or cell.execution_count for cell in code), "committed without outputs"
    said = notebook.cells[0].source
    assert "CPU cores" in said and "minutes" in said, "its hardware and time"


@pytest.mark.step
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_JAX_NOTEBOOK_MODEL", str(tiny_dir(tmp_path / "model")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for variable, value in QUICK.items():  # a tiny model spends its time in the compiler
        monkeypatch.setenv(variable, value)
    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises with the cell and its error
    said = "".join(str(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    expected = {
        "quickstart": "challenger",
        "rewards": "rewards/brevity/mean",
        "sharding": "'loss'",
        "resume_and_export": "every bit is the same: True",
    }
    assert expected[name] in said
