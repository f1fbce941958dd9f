"""The model card of an export, and its upload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lsp_jax import cli
from lsp_jax.checkpoint import export
from lsp_jax.checkpoint.model_card import TOLD, model_card
from lsp_jax.core.errors import InputError
from lsp_jax.reporting.metrics import describe
from test_trainer import read_lines

QUICK_COMPILES = True
pytestmark = pytest.mark.full


@pytest.fixture
def run(whole_run: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(whole_run[0], tmp_path / "run"))


def test_a_card_tells_what_the_run_measured(run: Path) -> None:
    lines = read_lines(run / "metrics.jsonl")
    card = (run / "export" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "base_model" not in card, "a folder is no hub id"
    first, last = lines[0], lines[-1]
    row = f"| `solver/reward` | {first['solver/reward']:.4g} (iteration 1) | {last['solver/reward']:.4g} (iteration "
    assert f"{row}{last['iteration']}) |" in card
    assert f"{sum(line['completions/tokens'] for line in lines):,.0f} tokens were sampled" in card
    assert all(describe(name) for name in TOLD) and "`solver/completions/mean_length`" in card
    settings = json.loads((run / "config.json").read_text())
    assert f"optimizer.learning_rate = {settings['optimizer']['learning_rate']}" in card and "output_dir" not in card
    assert "2509.07414" in card

    earlier = model_card(run, 1)
    assert f"| {first['solver/reward']:.4g} (iteration 1) | {first['solver/reward']:.4g} (iteration 1) |" in earlier


def test_a_hub_id_is_the_base_model_and_a_name_cannot_write_markup(run: Path) -> None:
    settings, manifest = (json.loads((run / name).read_text()) for name in ("config.json", "manifest.json"))
    commit = "0123456789" * 4
    for name, of, shown in (
        ("meta-llama/Llama-3.2-1B", commit, "base_model: meta-llama/Llama-3.2-1B\n"),
        ("meta-llama/Llama-3.2-1B", commit, f"from `meta-llama/Llama-3.2-1B` at commit {commit} for"),
        ("models/mine", "", "from `mine` for"),
        ("/home/somebody/mine", "", 'model = "mine"'),
        ("a`<b>|x", "", "`a??b??x`"),
    ):
        (run / "config.json").write_text(json.dumps(settings | {"model": name}))
        (run / "manifest.json").write_text(json.dumps(manifest | {"reference": {"commit": of}}))
        card = model_card(run, 1)
        assert shown in card and ("base_model" in card) == bool(of) and "somebody" not in card
    (run / "metrics.jsonl").unlink()
    assert "Not available." in model_card(run, 1)


def test_earlier_stages_are_followed_to_the_first_and_in_no_circle(run: Path, tmp_path: Path) -> None:
    settings = json.loads((run / "config.json").read_text())
    second = Path(shutil.copytree(run, tmp_path / "second"))
    (second / "config.json").write_text(json.dumps(settings | {"init_from": str(run), "model": ""}))
    assert f"from `{Path(settings['model']).name}` for" in model_card(second, 1)
    (run / "config.json").write_text(json.dumps(settings | {"init_from": str(second), "model": ""}))
    assert "from `run` for" in model_card(run, 1), "two folders, each begun from the other"
    shutil.rmtree(run)
    assert "from `run` for" in model_card(second, 1)


def test_an_export_replaces_its_own_card_and_no_edited_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export.export_run(run, out)
    export.export_run(run, out)
    card = out / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("## Recipe", "## Our recipe"), encoding="utf-8")
    with pytest.raises(InputError, match=r"README\.md"):
        export.export_run(run, out)
    assert "## Our recipe" in card.read_text(encoding="utf-8")


class Hub:
    """Stands in for the hub's client."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.private = True

    def __call__(self) -> Hub:
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error is not None:
            raise self.error
        self.asked.append(("create", {"repo_id": repo_id, **options}))
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


@pytest.mark.parametrize(
    ("options", "field"),
    [(["--private"], "private"), *((["--push-to-hub", name], "push_to_hub") for name in ("a/b/c", "a b", "mine"))],
)
def test_an_upload_that_cannot_be_is_refused_before_anything_is_written(
    options: list[str], field: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "out"), *options]) == 2
    assert field in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_export_is_uploaded_when_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub()
    monkeypatch.setattr(export, "HfApi", hub)
    command = ["export", str(run), str(tmp_path / "out")]
    assert cli.main(command) == 0 and hub.asked == [], "never by itself"
    assert cli.main([*command, "--push-to-hub", "me/mine", "--private"]) == 0
    assert "uploaded to https://hub/me/mine" in capsys.readouterr().out
    (created, options), (uploaded, files) = hub.asked
    assert (created, uploaded) == ("create", "upload")
    assert options == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert files["repo_id"] == "me/mine" and Path(files["folder_path"]) == tmp_path / "out"

    hub.asked.clear()
    hub.private = False  # it was there already
    assert cli.main([*command, "--push-to-hub", "me/mine", "--private"]) == 2
    assert "not private" in capsys.readouterr().err and [what for what, _ in hub.asked] == ["create"]
    assert cli.main([*command, "--push-to-hub", "me/mine"]) == 0 and hub.asked[1][1]["private"] is None
    capsys.readouterr()

    hub.error = RuntimeError("401 for Authorization: Bearer hf_secret")
    assert cli.main([*command, "--push-to-hub", "me/mine"]) == 2
    said = capsys.readouterr()
    assert "push_to_hub" in said.err and "RuntimeError" in said.err and "hf_secret" not in said.out + said.err
    assert (tmp_path / "out" / "model.safetensors").is_file(), "what was written stays"
    with pytest.raises(InputError, match="no export"):
        export.push_to_hub(tmp_path, "me/mine")
