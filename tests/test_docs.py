"""The documents: every command in them is one that there is, every field and metric is described, the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from lsp_jax import cli
from lsp_jax.config import TrainConfig, flat
from lsp_jax.evaluate.config import EvaluateConfig
from lsp_jax.reporting.metrics import METRICS, describe

ROOT = Path(cli.__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
OPTIONS: dict[str, Any] = {
    "generate": cli.GenerateOptions,
    "export": cli.ExportOptions,
    "report": cli.ReportOptions,
    "replay": cli.ReplayOptions,
    "demo-model": cli.DemoModelOptions,
    "evaluate": tyro.conf.PositionalRequiredArgs[EvaluateConfig],
}


def commands(page: Path, anywhere: bool = False) -> Iterator[str]:
    """The commands of a page: continued lines in one piece, comments left out.
    `anywhere`: only those that need nothing but this package (others say what they need in their comment)."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if anywhere and re.search(r"\s#.*\bneeds?\b", line):
                continue
            line = re.sub(r"\s#.*", "", line).strip()
            if line and not line.startswith("#"):
                yield line


def parts(word: str, anywhere: bool = False) -> list[tuple[str, str]]:
    """Every command of the pages that has `word` in it, from there to its end, with the page's name."""
    found = []
    for page in PAGES:
        for line in commands(page, anywhere):
            for piece in re.split(r"[;|]|&&", line):
                _, there, rest = piece.partition(word)
                if there and "$" not in rest:
                    found.append((page.name, rest.strip()))
    return found


@pytest.mark.parametrize(("page", "command"), [pytest.param(*part, id=part[1][:60]) for part in parts("lsp-jax ")])
def test_a_command_is_one_that_there_is(page: str, command: str):
    name, *arguments = shlex.split(command.replace("HOST:PORT", "host:1234"))
    assert name in cli.COMMANDS, page
    if name in OPTIONS:
        tyro.cli(OPTIONS[name], args=arguments)
        return
    for option in ("topology", "output"):
        _, arguments = cli._take(option, arguments) if name == "plan" else ("", arguments)
    cli._train_config(arguments, name, "").check()


def test_every_module_has_its_line():
    text, package = (ROOT / "CONTRIBUTING.md").read_text("utf-8"), ROOT / "lsp_jax"
    modules = [path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) > 80 and [name for name in modules if f"`{name}`" not in text] == []


def test_metrics_that_are_spoken_of_are_there():
    groups = {name.split("/")[0] for name in METRICS if "/" in name and "<" not in name.split("/")[0]}
    spoken = [
        (page.name, name)
        for page in PAGES
        for name in re.findall(rf"`((?:{'|'.join(sorted(groups))})/[\w/<>-]+)`", page.read_text("utf-8"))
    ]
    assert len(spoken) > 20
    for page, name in spoken:
        assert name in METRICS or describe(re.sub(r"<\w+>", "solve", name)), page


def test_there_are_commands_to_look_at():
    assert len(parts("lsp-jax ")) > 20 and len(parts("make ")) > 5


@pytest.mark.parametrize(("page", "command"), [pytest.param(*part, id=part[1][:60]) for part in parts("make ")])
def test_a_target_is_one_that_there_is(page: str, command: str):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert command.split()[0] in targets, page


@pytest.mark.parametrize(("page", "command"), [pytest.param(*part, id=part[1][:60]) for part in parts("python ")])
def test_a_script_is_one_that_there_is(page: str, command: str):
    script = command.split()[0]
    assert script in ("-m", "-c") or (ROOT / script).is_file(), page


def test_every_field_and_metric_is_described():
    hooks = pytest.importorskip("mkdocs") and _hooks()
    described = [*hooks.fields(TrainConfig)]
    assert {name.replace("-", "_") for name, _, _ in described} == set(flat(TrainConfig()))
    assert all(len(meaning) > 8 for _, _, meaning in [*described, *hooks.fields(EvaluateConfig)])
    assert all(len(meaning) > 8 for meaning in METRICS.values())
    page = hooks.config_page()
    assert "| `play.num-generations` | `8` | G: answers the Solver gives to each query. |" in page
    assert "| `rewards/<name>/mean` |" in hooks.metrics_page()


def _hooks() -> Any:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.pop(0)
    return hooks


@pytest.mark.step
def test_the_site_builds_without_a_warning():
    """Into `build/site`, where `make docs` wants it."""
    site = ROOT / "build" / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {"index.html", "method.html", "reference/config.html", "reference/metrics.html"} <= pages
    text = (site / "index.html").read_text("utf-8")
    assert not re.findall(
        r'(?:src|<link[^>]*href)="https?://(?!\S*(?:github|squidfunk))', text
    )  # nothing from elsewhere
