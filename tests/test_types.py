"""What users see of the types: `py.typed` is there, and nothing public has a type that checkers have to guess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNTYPED = "lsp_jax.model.modules."
"""Flax's modules: `nnx.Module` and `nnx.Param` are dynamic to a type checker."""


@pytest.mark.step
def test_the_public_surface_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    command += ["--verifytypes", "lsp_jax", "--ignoreexternal"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # it does not look through an editable installation
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)
    found = json.loads(done.stdout)["typeCompleteness"]
    assert found["pyTypedPath"] and len(found["symbols"]) > 1500
    unknown = [symbol["name"] for symbol in found["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    assert not [name for name in unknown if not f"{name}.".startswith(UNTYPED)]
