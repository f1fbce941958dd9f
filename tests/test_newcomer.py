"""The README's first commands, as they stand there, in a virtual environment of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADING = "## Step by step"


def block() -> str:
    """The commands under the heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^{HEADING}\n.*?^```sh\n(.*?)^```", text, re.M | re.S)
    assert found is not None
    return found.group(1)


def test_the_commands_are_there() -> None:
    names = re.findall(r"^lsp-jax ([a-z-]+)", block(), re.M)
    assert names == ["demo-model", "generate", "train", "report", "export"]
    assert "pip wheel" in block() and "transformers" in block()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_in_a_fresh_environment(tmp_path: Path) -> None:
    """A copy of the checkout, no environment and no cache of compiled programs but those that the commands make."""
    kept = shutil.ignore_patterns(".git", ".venv*", "models", "runs", "build", "dist", "__pycache__", ".*_cache")
    checkout = Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=kept))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "JAX_"))}
    env |= {"PATH": f"{tmp_path / 'bin'}:{env['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PLATFORMS": "cpu"}
    script = "set -euo pipefail\n" + re.sub(r"^(?=\S)", "date +'== %T'\n", block(), flags=re.M)
    done = subprocess.run(["bash", "-c", script], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stderr[-4000:]
    assert (checkout / "fresh" / "lib").is_dir() and "wrote runs/first/" in done.stdout.replace(str(checkout) + "/", "")
    page = (checkout / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert "plotly" in page.lower() and len(page) > 1_000_000, "the wheel has the page's parts"
    assert "Language Self-Play" in (checkout / "exported" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^The sum is .+", done.stdout, re.M)
