"""What the package must never do, read off its syntax trees, and what must never be written down."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lsp_jax
from test_resume import config_of, train
from test_trainer import game_dir

QUICK_COMPILES = True  # shares programs with the other modules that play this game
PACKAGE = Path(lsp_jax.__file__).parent
SANDBOXED = PACKAGE / "reward" / "execution" / "sandbox_main.py"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "yaml", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("os", "system"), ("os", "popen"), ("np", "load"), ("numpy", "load"), ("builtins", "eval")}
KEYWORDS = {"trust_remote_code", "allow_pickle", "shell"}


def violations(tree: ast.AST) -> Iterator[str]:
    """What in a file's syntax tree must not be there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"from {node.module}"
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in BUILTINS:
                yield f"{function.id}()"
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                called = function.value.id, function.attr
                yield from (f"{'.'.join(called)}()" for _ in range(called in ATTRIBUTES))
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in KEYWORDS and not off:
                    yield f"{keyword.arg}="


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch.serialization import load",
        "eval('1')",
        "exec(text)",
        "np.load(path)",
        "np.savez(x, allow_pickle=True)",
        "f(trust_remote_code=flag)",
        "run(command, shell=True)",
        "__import__('os')",
        "os.system('ls')",
    ],
)
def test_the_scan_sees_it(text: str):
    assert list(violations(ast.parse(text)))


def test_the_scan_lets_pass_what_is_harmless():
    assert not list(
        violations(ast.parse("import json\nf(trust_remote_code=False)\nre.compile('x')\nlowered.compile()"))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_of_it_is_in_the_package(path: Path):
    found = list(violations(ast.parse(path.read_text(encoding="utf-8"))))
    if path == SANDBOXED:  # executes programs, which is what the sandbox is for
        found = [name for name in found if name not in ("exec()", "compile()")]
    assert not found


def test_what_runs_in_the_sandbox_is_imported_by_nothing():
    name = "lsp_jax.reward.execution.sandbox_main"
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name != name for alias in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert node.module != name, path
                parent, _, own = name.rpartition(".")
                assert node.module != parent or all(alias.name != own for alias in node.names), path


@pytest.mark.full
def test_no_key_of_the_environment_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    secrets = {
        "HF_TOKEN": "hf_SECRETabcdefghijklmnop",
        "WANDB_API_KEY": "0123456789SECRETabcdef",
        "OPENAI_API_KEY": "sk-SECRET42",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    train(config_of(game_dir(tmp_path / "model"), tmp_path / "run", max_steps=1))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("checkpoints" in str(path) for path in files) and len(files) > 20
    for path in files:
        assert b"SECRET" not in path.read_bytes(), path
    said = capfd.readouterr()
    assert "SECRET" not in said.out + said.err
